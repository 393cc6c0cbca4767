"""The broker's SQL: environments that are its own, what ran in them, what they connected to."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import UUID

import orjson

from openinteractions.db.engine import Database
from openinteractions.sandbox.port import Owner

EgressRow: TypeAlias = tuple[Any, ...]
"""The columns of `_EGRESS_COLUMNS`, in order."""

_EGRESS_COLUMNS = (
    "environment_id",
    "id",
    "project_id",
    "at",
    "host",
    "port",
    "kind",
    "method",
    "path",
    "decision",
    "reason",
    "rule",
    "credential",
    "status",
    "bytes_up",
    "bytes_down",
    "duration_ms",
)

_ENVIRONMENT = """
select id, project_id, broker, has_disk, revision,
       deleted_at is not null or expired_at is not null
         or coalesce(expires_at < now(), false) as is_gone
  from environments where id = any($1::uuid[])
"""

# Whoever died here, or has been silent for long, has left the name to be taken.
_ENTER = """
insert into brokers (name, address, host, pid, backend, capacity, problem)
values ($1, $2, $3, $4, $5, $6, $7)
on conflict (name) do update
   set address = excluded.address, host = excluded.host, pid = excluded.pid,
       backend = excluded.backend, capacity = excluded.capacity, problem = excluded.problem,
       running = 0, started_at = now(), seen = now()
 where (brokers.host = excluded.host and brokers.pid = any($8::int[]))
    or brokers.seen < now() - $9::interval
returning name
"""

_BEGIN = """
insert into executions (environment_id, id, project_id, interaction_id, epoch, sandbox)
select $1, $2, $3, $4, $5, $6
 where $4::uuid is null
    or not exists (select from executions
                    where environment_id = $1 and interaction_id = $4 and epoch > $5)
on conflict do nothing
returning id
"""

# What it did to the environment's files is not in what was counted of them before.
_END = """
with ended as (
  update executions set exit = $3::text::jsonb, output = $4, ended_at = now()
   where environment_id = $1 and id = $2 and exit is null
  returning environment_id
)
update environments set changed_at = now() where id in (select environment_id from ended)
"""

_UNFINISHED = """
select e.environment_id, e.id, e.project_id, e.epoch, e.sandbox,
       extract(epoch from now() - e.started_at)::float8
  from executions e join environments n on n.id = e.environment_id
 where n.broker = $1 and e.exit is null
"""

# A run that is not stored has an id, and no row: its environment goes with it.
_ABANDONED = """
select e.environment_id, e.id
  from unnest($1::uuid[], $2::text[]) as asked (environment_id, id)
  join executions e using (environment_id, id)
  join interactions i on i.id = e.interaction_id
 where e.exit is null
   and (i.status not in ('queued', 'in_progress') or i.deleted_at is not null)
"""

# The fence of `runs.store`. Not `for update`: a broker that hangs must not hold up a takeover.
_OWNS = """
select exists (select from jobs where id = $1 and epoch = $2::bigint and worker_id is not null)
"""


@dataclass(frozen=True, slots=True)
class Row:
    """An environment, as far as its broker needs it."""

    id: UUID
    project_id: UUID
    broker: str | None
    has_disk: bool
    revision: int
    is_gone: bool
    """Deleted or expired."""


@dataclass(frozen=True, slots=True)
class Execution:
    """A command that was started, or was about to be."""

    epoch: int
    exit: dict[str, Any] | None
    """None: nobody has said yet how it ended."""
    output: bytes | None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An execution without a result."""

    environment_id: UUID
    id: str
    project_id: UUID
    epoch: int
    sandbox: str
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """How a broker registers."""

    name: str
    address: str
    host: str
    pid: int
    backend: str
    capacity: int


async def environment(database: Database, environment_id: UUID) -> Row | None:
    """One environment's row."""
    return (await environments(database, [environment_id])).get(environment_id)


async def environments(database: Database, ids: Sequence[UUID]) -> dict[UUID, Row]:
    """The rows of several environments."""
    async with database.hot() as connection:
        rows = await connection.fetch(_ENVIRONMENT, list(ids))
    return {row[0]: Row(*row) for row in rows}


async def has_disk(database: Database, broker: str) -> list[UUID]:
    """The environments whose files this broker should have."""
    async with database.hot() as connection:
        rows = await connection.fetch(
            "select id from environments where broker = $1 and has_disk", broker
        )
    return [row[0] for row in rows]


async def sealed(database: Database, environment_id: UUID) -> tuple[int, bytes | None]:
    """An environment's revision and its sealed configuration."""
    async with database.hot() as connection:
        row = await connection.fetchrow(
            "select revision, sealed from environments where id = $1", environment_id
        )
    return (0, None) if row is None else (row[0], row[1])


async def claim_name(
    database: Database,
    card: Card,
    *,
    problem: str | None,
    dead: Sequence[int],
    dead_after: timedelta,
) -> bool:
    """Enter this broker under its name; False where another one lives under it.

    Args:
        database: Where.
        card: This broker.
        problem: Why it cannot start sandboxes now.
        dead: Process ids of this machine that are no more (or are this process).
        dead_after: Silence after which a broker is dead.
    """
    async with database.hot() as connection:
        name = await connection.fetchval(
            _ENTER,
            card.name,
            card.address,
            card.host,
            card.pid,
            card.backend,
            card.capacity,
            problem,
            list(dead),
            dead_after,
        )
    return name is not None


async def owner(database: Database, name: str) -> tuple[str, int] | None:
    """Host and process id of the broker that is, or was, registered under a name."""
    async with database.hot() as connection:
        row = await connection.fetchrow("select host, pid from brokers where name = $1", name)
    return None if row is None else (row[0], row[1])


async def beat(database: Database, card: Card, *, running: int, problem: str | None) -> bool:
    """Say that this broker lives; False where the row is not its own any more."""
    async with database.hot() as connection:
        name = await connection.fetchval(
            "update brokers set seen = now(), running = $4, problem = $5 "
            "where name = $1 and host = $2 and pid = $3 returning name",
            card.name,
            card.host,
            card.pid,
            running,
            problem,
        )
    return name is not None


async def leave(database: Database, card: Card) -> None:
    """Take this broker off the list."""
    async with database.hot() as connection:
        await connection.execute(
            "delete from brokers where name = $1 and host = $2 and pid = $3",
            card.name,
            card.host,
            card.pid,
        )


async def execution(database: Database, environment_id: UUID, name: str) -> Execution | None:
    """An execution that was started, in whichever sandbox."""
    async with database.hot() as connection:
        row = await connection.fetchrow(
            "select epoch, exit::text, output from executions "
            "where environment_id = $1 and id = $2",
            environment_id,
            name,
        )
    if row is None:
        return None
    return Execution(row[0], None if row[1] is None else orjson.loads(row[1]), row[2])


async def begin(
    database: Database,
    row: Row,
    name: str,
    *,
    interaction_id: UUID | None,
    epoch: int,
    sandbox: str,
) -> bool:
    """Write down that a command is about to be started, before it is (ruling R4).

    Returns:
        False where a higher epoch of the same interaction has been seen, or it was started before.
    """
    async with database.hot() as connection:
        found = await connection.fetchval(
            _BEGIN, row.id, name, row.project_id, interaction_id, epoch, sandbox
        )
    return found is not None


async def raise_epoch(database: Database, environment_id: UUID, name: str, epoch: int) -> None:
    """Note that somebody with a higher epoch has taken an execution over."""
    async with database.hot() as connection:
        await connection.execute(
            "update executions set epoch = $3 where environment_id = $1 and id = $2 and epoch < $3",
            environment_id,
            name,
            epoch,
        )


async def owns(database: Database, owner: Owner) -> bool:
    """Whether a run is still this owner's; one that has ended is nobody's."""
    async with database.hot() as connection:
        return await connection.fetchval(_OWNS, owner.interaction_id, owner.epoch)


async def end(
    database: Database, environment_id: UUID, name: str, *, fields: dict[str, Any], output: bytes
) -> None:
    """Keep how an execution ended; the first word counts."""
    async with database.hot() as connection:
        await connection.execute(_END, environment_id, name, orjson.dumps(fields).decode(), output)


async def unfinished(database: Database, broker: str) -> list[Unfinished]:
    """The executions of a broker's environments that have no result."""
    async with database.hot() as connection:
        rows = await connection.fetch(_UNFINISHED, broker)
    return [Unfinished(*row) for row in rows]


async def abandoned(
    database: Database, running: Sequence[tuple[UUID, str]]
) -> list[tuple[UUID, str]]:
    """Those of some executions whose interaction has ended, or was deleted."""
    async with database.hot() as connection:
        rows = await connection.fetch(
            _ABANDONED, [each[0] for each in running], [each[1] for each in running]
        )
    return [(row[0], row[1]) for row in rows]


async def log_egress(database: Database, rows: Sequence[EgressRow]) -> None:
    """Append to the record of what sandboxes connected to."""
    async with database.hot() as connection:
        await connection.copy_records_to_table("egress_log", records=rows, columns=_EGRESS_COLUMNS)


async def withdraw(database: Database, environment_id: UUID, name: str) -> None:
    """Take back what `begin` wrote: the sandbox has refused the command."""
    async with database.hot() as connection:
        await connection.execute(
            "delete from executions where environment_id = $1 and id = $2 and exit is null",
            environment_id,
            name,
        )
