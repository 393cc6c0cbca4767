"""All SQL of blobs."""

from collections.abc import Sequence
from uuid import UUID

from openinteractions.db.engine import Database
from openinteractions.resources.files.media import Blob

# One that is there already is locked, so that a delete which is about to drop it waits.
_PUT = """
with kept as (
  insert into blobs (project_id, sha256, mime_type, data)
  select distinct on (sha256) $1::uuid, sha256, mime_type, data
    from unnest($2::bytea[], $3::text[], $4::bytea[]) as u(sha256, mime_type, data)
   order by sha256
  on conflict (project_id, sha256) do update set mime_type = blobs.mime_type
)
insert into blob_uses (project_id, sha256, segment_id, depth)
select distinct $1::uuid, sha256, $5::uuid, $6::int from unnest($2::bytea[]) as u(sha256)
on conflict do nothing
"""


async def put(
    database: Database, project_id: UUID, blobs: Sequence[Blob], *, segment_id: UUID, depth: int
) -> None:
    """Keep blobs for a turn. Written before the turn's own row: a crash leaves only an orphan."""
    if not blobs:
        return
    async with database.hot() as connection:
        await connection.execute(
            _PUT,
            project_id,
            [blob.sha256 for blob in blobs],
            [blob.mime_type for blob in blobs],
            [blob.data for blob in blobs],
            segment_id,
            depth,
        )


async def get(database: Database, project_id: UUID, sha256: Sequence[bytes]) -> dict[bytes, Blob]:
    """The blobs that exist, by hash."""
    if not sha256:
        return {}
    async with database.hot() as connection:
        rows = await connection.fetch(
            "select sha256, mime_type, data from blobs "
            "where project_id = $1 and sha256 = any($2::bytea[])",
            project_id,
            list(sha256),
        )
    return {row[0]: Blob(row[0], row[1], row[2]) for row in rows}
