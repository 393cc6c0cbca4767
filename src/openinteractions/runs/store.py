"""All SQL that a run writes under its lease, and what it reads to begin.

Each statement begins at the fence: the job's row, under the epoch that this process owns. Where the
fence gives no row, another worker owns the run, and nothing is written (ruling R2).

A running job has a worker (ck_jobs_owner). Asked for its state instead, the planner walks the index
of all running jobs, the dead ones included, to find this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import orjson

from openinteractions import ids
from openinteractions.db.engine import Database
from openinteractions.errors import LeaseLost
from openinteractions.resources.interactions.store import Interaction, StoredStep

# Where progress was made, the attempts start again from zero (ruling R6).
_COMMIT = """
with fence as (
  update jobs set attempt = case when $10::boolean then 0 else attempt end
   where id = $1 and epoch = $2 and worker_id is not null returning id
), turn as (
  update interactions i set run_state = $3, epoch = $2, updated_at = now()
    from fence where i.id = fence.id
  returning i.id, i.project_id, i.segment_id, i.depth, i.created_at
), kept as (
  insert into steps (segment_id, depth, idx, project_id, type, media, data)
  select t.segment_id, t.depth, u.idx, t.project_id, u.type, u.media, u.data
    from turn t, unnest($4::smallint[], $5::text[], $6::bool[], $7::bytea[])
                 as u(idx, type, media, data)
  on conflict do nothing
), log as (
  insert into events (born, interaction_id, seq, project_id, data)
  select created_at, id, $8::bigint, project_id, $9::bytea from turn where $9 is not null
  on conflict do nothing
)
select true from turn
"""

_FINISH = """
with fence as (
  delete from jobs where id = $1 and epoch = $2 and worker_id is not null returning id
), turn as (
  update interactions i
     set status = $10, usage = $11, errors = $12, warnings = $13, run_state = $3, epoch = $2,
         updated_at = now(), sealed = null
    from fence where i.id = fence.id
  returning i.id, i.project_id, i.segment_id, i.depth, i.created_at, i.updated_at
), kept as (
  insert into steps (segment_id, depth, idx, project_id, type, media, data)
  select t.segment_id, t.depth, u.idx, t.project_id, u.type, u.media, u.data
    from turn t, unnest($4::smallint[], $5::text[], $6::bool[], $7::bytea[])
                 as u(idx, type, media, data)
), log as (
  insert into events (born, interaction_id, seq, project_id, data)
  select created_at, id, $8::bigint, project_id, $9::bytea from turn where $9 is not null
), paid as (
  insert into spend (id, project_id, key_id, interaction_id, model, input_tokens, cached_tokens,
                     output_tokens, cost_nanousd)
  select $14, project_id, $15, id, $16, $17, $18, $19, $20 from turn
), calls as (
  insert into jobs (id, project_id, kind, args, max_attempts)
  select u.id, t.project_id, 'deliver', u.args::jsonb, $23
    from turn t, unnest($21::uuid[], $22::text[]) as u(id, args)
)
select updated_at from turn
"""

_WARN = """
with fence as (
  select id from jobs where id = $1 and epoch = $2 and worker_id is not null for update
)
update interactions i set warnings = $3 from fence where i.id = fence.id
returning true
"""

_DELIVERY_ATTEMPTS = 20

_SPEND = """
insert into spend (id, project_id, key_id, model, input_tokens, cached_tokens, output_tokens,
                   cost_nanousd)
values ($1, $2, $3, $4, $5, $6, $7, $8)
"""

_LOAD = """
select id, project_id, segment_id, depth, previous_id, status, model, agent, background, logged,
       input_form, input_count, echo, usage, errors, warnings, created_at, updated_at,
       environment_id, spec, run_state, key_id, webhook, sealed,
       exists (select from budgets b where b.project_id = i.project_id
                  and (b.key_id is null or b.key_id = i.key_id))
  from interactions i where id = $1 and deleted_at is null
"""

# A line of turns back to its root: each segment with how much of it belongs to the line.
_LINE = """
with recursive line as (
  select v.id, g.parent_id, g.parent_depth, g.parent_idx, $3::int as high, $4::smallint as high_idx
    from (values ($2::uuid)) as v(id)
    left join segments g on g.id = v.id and g.project_id = $1
  union all
  select l.parent_id, g.parent_id, g.parent_depth, g.parent_idx, l.parent_depth, l.parent_idx
    from line l left join segments g on g.id = l.parent_id and g.project_id = $1
   where l.parent_id is not null and l.parent_depth >= $5
), line_steps as (
  select s.depth, s.idx, s.type, s.media, s.data
    from line l
    join steps s on s.segment_id = l.id and s.project_id = $1
                and s.depth between $5 and l.high
                and (l.high_idx is null or s.depth < l.high or s.idx <= l.high_idx)
)
"""
_HISTORY = f"{_LINE} select depth, media, data from line_steps order by depth, idx"  # noqa: S608 - constants

# Looked for in the JSON as it is: reading it would take the calls' arguments apart.
_CALLED = rf"""{_LINE}
select distinct c.id
  from line_steps s, unnest($6::text[], $7::bytea[]) as c(id, mark)
 where s.type like '%\_call' and position(c.mark in s.data) > 0
"""  # noqa: S608 - constants


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """What a run took."""

    key_id: UUID | None
    model: str
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_nanousd: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What one commit writes."""

    interaction_id: UUID
    epoch: int
    run_state: bytes
    steps: Sequence[StoredStep]
    seq: int
    events: bytes | None
    """A row of the log; None writes none."""
    is_progress: bool = True
    """False where it only records what a dead owner has left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What a finish writes beside the last progress."""

    status: str
    usage: bytes | None
    errors: bytes | None
    warnings: bytes | None
    spend: Spend
    deliveries: Sequence[str] = ()
    """Callbacks to make, each the JSON arguments of a job of kind `deliver`."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run as its rows stand."""

    interaction: Interaction
    spec: bytes
    run_state: bytes | None
    key_id: UUID | None
    webhook: bytes | None
    sealed: bytes | None
    is_budgeted: bool


async def load(database: Database, interaction_id: UUID) -> Loaded | None:
    """Read a run; None if its interaction was deleted."""
    async with database.hot() as connection:
        row = await connection.fetchrow(_LOAD, interaction_id)
    if row is None:
        return None
    *columns, spec, run_state, key_id, webhook, sealed, is_budgeted = row
    interaction = Interaction(*columns)
    return Loaded(interaction, spec, run_state, key_id, webhook, sealed, is_budgeted)


async def commit(database: Database, progress: Progress) -> None:
    """Make steps, their events and the run's state durable, in one transaction.

    Raises:
        LeaseLost: Another worker owns the run; nothing was written.
    """
    async with database.hot() as connection:
        fenced = await connection.fetchval(
            _COMMIT, *_progress_values(progress), progress.is_progress
        )
    if fenced is None:
        raise LeaseLost(f"the lease of {progress.interaction_id} is lost")


async def warn(database: Database, interaction_id: UUID, *, epoch: int, warnings: bytes) -> None:
    """Replace an interaction's `warnings` before its end.

    Raises:
        LeaseLost: Another worker owns the run; nothing was written.
    """
    async with database.hot() as connection:
        fenced = await connection.fetchval(_WARN, interaction_id, epoch, warnings)
    if fenced is None:
        raise LeaseLost(f"the lease of {interaction_id} is lost")


async def finish(database: Database, progress: Progress, ending: Ending) -> datetime:
    """Write the last steps and events, the status, the spend, and the job's end, all together.

    Returns the interaction's new `updated_at`.

    Raises:
        LeaseLost: Another worker owns the run; nothing was written.
    """
    spend = ending.spend
    async with database.hot() as connection:
        updated_at = await connection.fetchval(
            _FINISH,
            *_progress_values(progress),
            ending.status,
            ending.usage,
            ending.errors,
            ending.warnings,
            ids.uuid7(),
            spend.key_id,
            spend.model,
            spend.input_tokens,
            spend.cached_tokens,
            spend.output_tokens,
            spend.cost_nanousd,
            [ids.uuid7() for _ in ending.deliveries],
            list(ending.deliveries),
            _DELIVERY_ATTEMPTS,
        )
    if updated_at is None:
        raise LeaseLost(f"the lease of {progress.interaction_id} is lost")
    return updated_at


def _progress_values(progress: Progress) -> tuple[object, ...]:
    return (
        progress.interaction_id,
        progress.epoch,
        progress.run_state,
        [step.index for step in progress.steps],
        [step.type for step in progress.steps],
        [step.media for step in progress.steps],
        [step.data for step in progress.steps],
        progress.seq,
        progress.events,
    )


async def ended_by(database: Database, interaction_id: UUID, epoch: int) -> datetime | None:
    """When this very epoch wrote the interaction's end; None if it did not.

    Asked after a finish whose answer was lost on the way.
    """
    async with database.hot() as connection:
        return await connection.fetchval(
            "select updated_at from interactions where id = $1 and epoch = $2 "
            "and status not in ('in_progress', 'queued')",
            interaction_id,
            epoch,
        )


async def spend(database: Database, project_id: UUID, paid: Spend) -> None:
    """Record what an unstored run took."""
    async with database.hot() as connection:
        await connection.execute(
            _SPEND,
            ids.uuid7(),
            project_id,
            paid.key_id,
            paid.model,
            paid.input_tokens,
            paid.cached_tokens,
            paid.output_tokens,
            paid.cost_nanousd,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """How far back a conversation is read: up to a turn, or to one of its steps."""

    project_id: UUID
    segment_id: UUID
    depth: int
    idx: int | None = None


async def history(database: Database, line: Line, *, start: int) -> list[tuple[int, bool, bytes]]:
    """The steps of a line from a depth on, oldest first: depth, whether it has media, JSON."""
    async with database.hot() as connection:
        rows = await connection.fetch(
            _HISTORY, line.project_id, line.segment_id, line.depth, line.idx, start
        )
    return [(row[0], row[1], row[2]) for row in rows]


async def called(database: Database, line: Line, call_ids: Sequence[str]) -> set[str]:
    """Which of these ids occur as `id` in the calls of a line; in their arguments too."""
    marks = [b'"id":' + orjson.dumps(call_id) for call_id in call_ids]
    async with database.hot() as connection:
        rows = await connection.fetch(
            _CALLED, line.project_id, line.segment_id, line.depth, line.idx, 0, call_ids, marks
        )
    return {row[0] for row in rows}


async def takeover_events(database: Database, interaction: Interaction) -> list[bytes]:
    """Every row of a run's log, in order: what its readers have been shown."""
    async with database.hot() as connection:
        rows = await connection.fetch(
            "select data from events where born = $1 and interaction_id = $2 and project_id = $3 "
            "order by seq",
            interaction.created_at,
            interaction.id,
            interaction.project_id,
        )
    return [row[0] for row in rows]


async def steal(database: Database, interaction_id: UUID, worker_id: int) -> int | None:
    """Take a job from whoever has it; return its new epoch, None if it has ended."""
    async with database.hot() as connection:
        return await connection.fetchval(
            # A queued one gives up its place in its key's line, where another may be running.
            "update jobs set state = 1, worker_id = $2, epoch = epoch + 1, "
            "key = case when state = 1 then key end where id = $1 returning epoch",
            interaction_id,
            worker_id,
        )
