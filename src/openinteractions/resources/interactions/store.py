"""All SQL of interactions and their steps, seen as a resource.

The statements that a run writes under its lease (commit, finish) are in `openinteractions.runs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from openinteractions.db.engine import Database
from openinteractions.jobs.queue import LOST_CHANNEL

_COLUMNS = """id, project_id, segment_id, depth, previous_id, status, model, agent, background,
 logged, input_form, input_count, echo, usage, errors, warnings, created_at, updated_at,
 environment_id"""

# The parent is locked: a delete that races with this either sees the new turn or makes it absent.
_CREATE = """
with parent as (
  select id from interactions
   where id = $6 and project_id = $2 and deleted_at is null for share
), turn as (
  insert into interactions
    (id, project_id, key_id, segment_id, depth, previous_id, status, model, agent, background,
     logged, input_form, input_count, labels, echo, spec, warnings, expires_at, webhook,
     idempotency_key, request_hash, created_by, environment_id, sealed)
  select $1, $2, $3, $4, $5, $6::uuid, 'in_progress', $7, $8, $9, $10::boolean, $11, $12,
         $13::jsonb, $14, $15, $16, now() + $17::interval, $29::bytea, $30, $31::bytea,
         $34::bigint, $35::uuid, $36::bytea
   where $6 is null or exists (select from parent)
  on conflict (segment_id, depth) do nothing
  returning id, created_at
), line as (
  insert into segments (id, project_id, parent_id, parent_depth, parent_idx)
  select $4, $2, $18::uuid, $19::int, $20::smallint from turn where $18 is not null
), job as (
  insert into jobs (id, project_id, kind, provider, state, worker_id, epoch, attempt, rank_at,
                    max_attempts, args, key)
  select id, $2, 'run', $21::text, u.taken, $22, u.taken, u.taken, now() + $28::interval, $32,
         $33::text::jsonb, $35::uuid::text
    from turn, (select case when $22::bigint is null then 0 else 1 end) as u(taken)
), input as (
  insert into steps (segment_id, depth, idx, project_id, type, media, data)
  select $4, $5, u.n - 1, $2, u.type, u.media, u.data
    from turn, unnest($23::text[], $24::bool[], $25::bytea[])
               with ordinality as u(type, media, data, n)
), log as (
  insert into events (born, interaction_id, seq, project_id, data)
  select created_at, id, $26::bigint, $2, $27::bytea from turn where $10
)
select created_at from turn
"""

# A yes that was given before violates the key, and nothing is written.
_CREATE_CONSENTED = _CREATE.replace(
    "\nselect created_at from turn\n",
    """, consent as (
  insert into consents (interaction_id, call_id, project_id)
  select $6, call_id, $2 from turn, unnest($37::text[]) as u(call_id)
)
select created_at from turn
""",
)

_STEPS = """
select idx, type, media, data from steps
 where project_id = $1 and segment_id = $2 and depth = $3 and idx >= $4
 order by idx
"""


@dataclass(frozen=True, slots=True)
class StoredStep:
    """One step as its row holds it."""

    index: int
    """Its place in the interaction, the input's steps counted."""
    type: str
    media: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Interaction:
    """One interaction's row, without its steps."""

    id: UUID
    project_id: UUID
    segment_id: UUID
    depth: int
    previous_id: UUID | None
    status: str
    model: str | None
    agent: str | None
    background: bool
    logged: bool
    input_form: str
    input_count: int
    echo: bytes | None
    usage: bytes | None
    errors: bytes | None
    warnings: bytes | None
    created_at: datetime
    updated_at: datetime
    environment_id: UUID | None = None

    @property
    def is_running(self) -> bool:
        """Whether it can still change."""
        return self.status in {"in_progress", "queued"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a conversation a turn stands."""

    segment_id: UUID
    depth: int
    parent_id: UUID | None = None
    """The segment that a new line branches off."""
    parent_depth: int | None = None
    parent_idx: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewInteraction:
    """Everything that a create writes, in one statement."""

    id: UUID
    project_id: UUID
    key_id: UUID | None
    place: Place
    previous_id: UUID | None
    model: str | None
    agent: str | None
    background: bool
    logged: bool
    input_form: str
    steps: Sequence[StoredStep]
    labels: str | None
    """A JSON object."""
    echo: bytes
    spec: bytes
    warnings: bytes | None
    retention: timedelta
    provider: str
    created_by: int
    """The process that takes the create, among the workers."""
    worker_id: int | None
    """Who runs it from the start; None leaves it to the queue."""
    first_seq: int
    first_events: bytes
    """The log's first row; written if `logged`."""
    rank: timedelta
    """How far its service tier moves it in its project's line; negative is ahead."""
    max_attempts: int
    webhook: bytes | None
    idempotency_key: str | None
    request_hash: bytes
    environment_id: UUID | None
    """The sandbox it works in; runs in one sandbox take turns."""
    trace: str
    """The trace that the run continues: a JSON object, empty where there is none."""
    sealed: bytes | None
    """Secrets of the request, encrypted."""
    consents: Sequence[str] = ()
    """Calls of the previous interaction that a human has consented to, by their ids."""


class KeyTaken(Exception):
    """Another create has used the same Idempotency-Key in this instant."""


class ConsentUsed(Exception):
    """A call that was consented to has been carried out already."""


async def create(database: Database, new: NewInteraction) -> datetime | None:
    """Write an interaction, its input, its job and its first events.

    Returns its creation time; None if another turn took its place, or its parent was deleted.

    Raises:
        KeyTaken: Its Idempotency-Key was used meanwhile.
        ConsentUsed: One of its consents was.
    """
    try:
        async with database.hot() as connection:
            if new.consents:
                values = (*_values(new), list(new.consents))
                return await connection.fetchval(_CREATE_CONSENTED, *values)
            return await connection.fetchval(_CREATE, *_values(new))
    except asyncpg.UniqueViolationError as error:
        if getattr(error, "constraint_name", None) == "pk_consents":
            raise ConsentUsed from error
        raise KeyTaken from error


def _values(new: NewInteraction) -> tuple[object, ...]:
    place = new.place
    return (
        new.id,
        new.project_id,
        new.key_id,
        place.segment_id,
        place.depth,
        new.previous_id,
        new.model,
        new.agent,
        new.background,
        new.logged,
        new.input_form,
        len(new.steps),
        new.labels,
        new.echo,
        new.spec,
        new.warnings,
        new.retention,
        place.parent_id,
        place.parent_depth,
        place.parent_idx,
        new.provider,
        new.worker_id,
        [step.type for step in new.steps],
        [step.media for step in new.steps],
        [step.data for step in new.steps],
        new.first_seq,
        new.first_events,
        new.rank,
        new.webhook,
        new.idempotency_key,
        new.request_hash,
        new.max_attempts,
        new.trace,
        new.created_by,
        new.environment_id,
        new.sealed,
    )


async def get(database: Database, project_id: UUID, interaction_id: UUID) -> Interaction | None:
    """One interaction; None if it is absent, deleted, or another project's."""
    async with database.hot() as connection:
        row = await connection.fetchrow(
            f"select {_COLUMNS} from interactions "  # noqa: S608 - constant columns
            "where id = $1 and project_id = $2 and deleted_at is null",
            interaction_id,
            project_id,
        )
    return None if row is None else Interaction(*row)


async def find_idempotent(
    database: Database, project_id: UUID, key: str
) -> tuple[Interaction, bytes] | None:
    """The interaction that an Idempotency-Key made, and the hash of its request."""
    async with database.hot() as connection:
        row = await connection.fetchrow(
            f"select {_COLUMNS}, request_hash from interactions "  # noqa: S608 - constant columns
            "where project_id = $1 and idempotency_key = $2 and deleted_at is null",
            project_id,
            key,
        )
    return None if row is None else (Interaction(*row[:-1]), row[-1])


async def record_lost(database: Database, row: Interaction, request_hash: bytes) -> None:
    """Note that the answer to a create did not reach its caller, and tell every api process."""
    async with database.hot() as connection:
        await connection.execute(
            "insert into lost_responses (project_id, request_hash, interaction_id) "
            "values ($1, $2, $3) on conflict do nothing",
            row.project_id,
            request_hash,
            row.id,
        )
        await connection.execute("select pg_notify($1, '')", LOST_CHANNEL)


async def any_lost(database: Database) -> bool:
    """Whether any project lost an answer within the last minute."""
    async with database.hot() as connection:
        return await connection.fetchval(
            "select exists (select from lost_responses where at > now() - interval '1 minute')"
        )


async def take_lost(
    database: Database,
    project_id: UUID,
    key_id: UUID | None,
    request_hash: bytes,
    *,
    within: timedelta,
) -> Interaction | None:
    """The interaction whose answer to this very request, with this key, was lost; used once."""
    async with database.hot() as connection:
        row = await connection.fetchrow(
            f"""with taken as (
                  delete from lost_responses where ctid = (
                    select l.ctid from lost_responses l
                      join interactions i on i.id = l.interaction_id
                     where l.project_id = $1 and l.request_hash = $2
                       and l.at > now() - $3::interval
                       and i.key_id is not distinct from $4
                     order by l.at desc limit 1 for update of l skip locked)
                  returning interaction_id)
                select {_COLUMNS} from interactions
                 where id = (select interaction_id from taken) and deleted_at is null
                   and status <> 'cancelled'""",  # noqa: S608
            project_id,
            request_hash,
            within,
            key_id,
        )
    return None if row is None else Interaction(*row)


async def steps(
    database: Database, interaction: Interaction, *, start: int = 0
) -> list[StoredStep]:
    """Its steps so far, from an index on; the input's come first."""
    async with database.hot() as connection:
        rows = await connection.fetch(
            _STEPS, interaction.project_id, interaction.segment_id, interaction.depth, start
        )
    return [StoredStep(*row) for row in rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What a list is narrowed to; None and empty do not narrow."""

    status: Sequence[str] = ()
    model: str | None = None
    agent: str | None = None
    labels: str | None = None
    """A JSON object: every pair must be there."""
    created_after: datetime | None = None
    created_before: datetime | None = None


async def page(
    database: Database, project_id: UUID, narrow: Filter, *, before: UUID | None, limit: int
) -> list[Interaction]:
    """Interactions, newest first, from below an id on."""
    terms = ["project_id = $1", "deleted_at is null"]
    values: list[Any] = [project_id]

    def term(sql: str, value: object) -> None:
        if value is not None and value != ():
            values.append(value)
            terms.append(sql.format(f"${len(values)}"))

    term("id < {}", before)
    term("status = any({}::text[])", list(narrow.status) or None)
    term("model = {}", narrow.model)
    term("agent = {}", narrow.agent)
    term("labels @> {}::jsonb", narrow.labels)
    term("created_at >= {}", narrow.created_after)
    term("created_at < {}", narrow.created_before)
    async with database.hot() as connection:
        rows = await connection.fetch(
            f"select {_COLUMNS} from interactions where {' and '.join(terms)} "  # noqa: S608 - terms above
            f"order by id desc limit {int(limit)}",
            *values,
        )
    return [Interaction(*row) for row in rows]


_DELETE = """
update interactions
   set deleted_at = now(), echo = null, spec = null, run_state = null, sealed = null,
       webhook = null, labels = null, usage = null, errors = null, warnings = null,
       idempotency_key = null, request_hash = null, expires_at = null
 where id = $1 and project_id = $2 and deleted_at is null
returning segment_id, depth, created_at, environment_id
"""

# The environment that it was given and never used. Not one in which another interaction runs, or
# waits for its turn: the key of a run's job is its environment.
_DELETE_UNUSED = """
update environments set deleted_at = now(), public = null, sealed = null
 where id = $1 and project_id = $2 and is_tentative and not has_disk and deleted_at is null
   and not exists (select from jobs where key = $1::uuid::text and state = 0)
   and not exists (select from jobs where key = $1::uuid::text and state = 1)
"""

# What no live turn can reach any more: steps above the last live turn and the last place where a
# living line branches off.
_PRUNE = """
with reach as (
  select greatest(
    (select max(depth) from interactions
      where segment_id = $1 and project_id = $2 and deleted_at is null),
    (select max(parent_depth) from segments where parent_id = $1 and project_id = $2)) as depth
), steps_gone as (
  delete from steps s using reach
   where s.segment_id = $1 and s.project_id = $2 and s.depth > coalesce(reach.depth, -1)
  returning s.depth
), turns_gone as (
  delete from interactions i using reach
   where i.segment_id = $1 and i.project_id = $2 and i.deleted_at is not null
     and reach.depth is null
  returning i.depth
), line_gone as (
  delete from segments g using reach
   where g.id = $1 and g.project_id = $2 and reach.depth is null
  returning g.parent_id
)
select array(select distinct depth from steps_gone),
       (select parent_id from line_gone)
"""


async def delete(database: Database, project_id: UUID, interaction_id: UUID) -> bool:
    """Delete an interaction for good; False if it is not there.

    Its row stays as a tombstone while the conversation goes on below it. Its steps go as soon as
    no living turn builds on them (ruling R19); an emptied line goes, and its parent is looked at
    in turn.
    """
    async with database.hot() as connection, connection.transaction():
        row = await connection.fetchrow(_DELETE, interaction_id, project_id)
        if row is None:
            return False
        segment, _, born, environment = row
        if environment is not None:
            await connection.execute(_DELETE_UNUSED, environment, project_id)
        await connection.execute(
            "delete from events where born = $1 and interaction_id = $2", born, interaction_id
        )
        while segment is not None:
            await connection.execute("select pg_advisory_xact_lock(hashtext($1))", segment.hex)
            depths, parent = await connection.fetchrow(_PRUNE, segment, project_id)
            if depths:
                await _drop_blobs(connection, project_id, segment, depths)
            segment = parent
    return True


async def _drop_blobs(connection: Any, project_id: UUID, segment: UUID, depths: list[int]) -> None:  # noqa: ANN401
    # Locked before the count: a create that is about to use one of them is waited for, and seen.
    rows = await connection.fetch(
        """with gone as (
             delete from blob_uses
              where project_id = $1 and segment_id = $2 and depth = any($3::int[])
             returning sha256)
           select b.sha256 from blobs b
            where b.project_id = $1 and b.sha256 in (select sha256 from gone)
            order by b.sha256 for update of b""",
        project_id,
        segment,
        depths,
    )
    await connection.execute(
        """delete from blobs b
            where b.project_id = $1 and b.sha256 = any($2::bytea[]) and not exists (
              select from blob_uses u where u.project_id = $1 and u.sha256 = b.sha256)""",
        project_id,
        [row[0] for row in rows],
    )
