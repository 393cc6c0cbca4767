"""All SQL of credentials."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import orjson

from openinteractions.db.engine import Database

_COLUMNS = """
id, type, status, public, sealed, token_sealed,
extract(epoch from token_expires_at - clock_timestamp())::float8,
refreshing_until, created_at, updated_at
"""


def _returning(statement: str) -> str:
    return f"{statement} returning {_COLUMNS}"


_ADD = _returning("""
insert into credentials (project_id, id, type, public, sealed, token_sealed, token_expires_at)
values ($1, $2, $3, $4::jsonb, $5, $6, now() + $7::interval)
on conflict do nothing
""")

_FIND = f"""
select {_COLUMNS} from credentials where project_id = $1 and id = $2
"""  # noqa: S608 - constant columns

_PAGE = f"""
select {_COLUMNS} from credentials
 where project_id = $1 and ($2::timestamptz is null or (created_at, id) < ($2, $3::text))
 order by created_at desc, id desc limit $4
"""  # noqa: S608 - constant columns

_REPLACE = _returning("""
update credentials set public = $4::jsonb, sealed = $5, updated_at = now()
 where project_id = $1 and id = $2 and sealed = $3 and public = $6::jsonb
""")

_CLAIM = _returning("""
update credentials set refreshing_until = clock_timestamp() + $3::interval
 where project_id = $1 and id = $2
   and (refreshing_until is null or refreshing_until < clock_timestamp())
""")

_SETTLE = _returning("""
update credentials
   set public = $4::jsonb, sealed = $5, token_sealed = $6, token_expires_at = now() + $7::interval,
       refreshing_until = null, updated_at = case when $8 then now() else updated_at end
 where project_id = $1 and id = $2 and refreshing_until = $3
""")

_RELEASE = _returning("""
update credentials set public = $4::jsonb, refreshing_until = null
 where project_id = $1 and id = $2 and refreshing_until = $3
""")

_DELETE = _returning("""
delete from credentials where project_id = $1 and id = $2
""")


@dataclass(frozen=True, slots=True)
class Row:
    """A stored credential."""

    id: str
    type: str
    status: str
    public: dict[str, Any]
    sealed: bytes = field(repr=False)
    token_sealed: bytes | None = field(repr=False)
    token_left_s: float | None
    """How long the access token is still good, when it was read."""
    refreshing_until: datetime | None
    """Someone has it to refresh until then; tells this time from any other."""
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is written of a credential."""

    public: dict[str, Any]
    sealed: bytes = field(repr=False)
    token_sealed: bytes | None = field(default=None, repr=False)
    token_lasts: timedelta | None = None


async def add(
    database: Database, project_id: UUID, credential_id: str, kind: str, parts: Parts
) -> Row | None:
    """Keep a new credential; None if there is one of this id."""
    return await _row(
        database,
        _ADD,
        project_id,
        credential_id,
        kind,
        _json(parts.public),
        parts.sealed,
        parts.token_sealed,
        parts.token_lasts,
    )


async def find(database: Database, project_id: UUID, credential_id: str) -> Row | None:
    """A credential of a project."""
    return await _row(database, _FIND, project_id, credential_id)


async def page(
    database: Database, project_id: UUID, *, before: tuple[datetime, str] | None, limit: int
) -> list[Row]:
    """Credentials, newest first, from behind a time and id on."""
    async with database.hot() as connection:
        rows = await connection.fetch(_PAGE, project_id, *(before or (None, None)), limit)
    return [Row(*row) for row in rows]


async def replace(database: Database, project_id: UUID, seen: Row, parts: Parts) -> Row | None:
    """Write a credential that nobody changed since it was seen; None if somebody did."""
    return await _row(
        database,
        _REPLACE,
        project_id,
        seen.id,
        seen.sealed,
        _json(parts.public),
        parts.sealed,
        _json(seen.public),
    )


async def claim(
    database: Database, project_id: UUID, credential_id: str, lease: timedelta
) -> Row | None:
    """Take a credential to refresh it; None if somebody else has it, or there is none."""
    return await _row(database, _CLAIM, project_id, credential_id, lease)


async def settle(
    database: Database, project_id: UUID, claimed: Row, parts: Parts, *, is_update: bool
) -> Row | None:
    """Write what a refresh brought, and give the credential free; None if it was taken away.

    Args:
        database: Where.
        project_id: Whose.
        claimed: As `claim` gave it.
        parts: Public and secret parts, and the new access token.
        is_update: The caller changed it: that is a new `update_time`.
    """
    return await _row(
        database,
        _SETTLE,
        project_id,
        claimed.id,
        claimed.refreshing_until,
        _json(parts.public),
        parts.sealed,
        parts.token_sealed,
        parts.token_lasts,
        is_update,
    )


async def release(
    database: Database, project_id: UUID, claimed: Row, public: dict[str, Any]
) -> None:
    """Give a credential free without a new token, with a note of what went wrong."""
    await _row(database, _RELEASE, project_id, claimed.id, claimed.refreshing_until, _json(public))


async def delete(database: Database, project_id: UUID, credential_id: str) -> bool:
    """Delete a credential; whether there was one."""
    return await _row(database, _DELETE, project_id, credential_id) is not None


async def _row(database: Database, statement: str, *values: object) -> Row | None:
    async with database.hot() as connection:
        row = await connection.fetchrow(statement, *values)
    return None if row is None else Row(*row)


def _json(public: dict[str, Any]) -> str:
    return orjson.dumps(public).decode()
