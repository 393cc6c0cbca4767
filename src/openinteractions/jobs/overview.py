"""What the queue looks like: for metrics and for the operator's `doctor`."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from openinteractions import metrics
from openinteractions.db.engine import Database

_COUNTS = """
select kind, state, count(*),
       coalesce(extract(epoch from max(now() - run_at)
                        filter (where state = 0 and run_at <= now())), 0)
  from jobs group by kind, state order by kind, state
"""

_WORKERS = """
select w.id, w.host, w.pid, w.role, w.started_at, extract(epoch from now() - w.seen)::float8,
       (select count(*) from jobs j where j.worker_id = w.id and j.state = 1)
  from workers w order by w.id
"""

_TROUBLED = """
select id, kind, state, attempt, max_attempts, last_error, run_at
  from jobs where last_error is not null or state = 3
 order by state desc, run_at limit $1
"""

_STUCK = """
select i.id, i.status, extract(epoch from now() - i.updated_at)::float8
  from interactions i
 where i.status in ('in_progress', 'queued') and i.deleted_at is null
   and not exists (select from jobs j where j.id = i.id and j.state in (0, 1))
 limit $1
"""

_ACTIVE = """
select i.id, p.name, j.state, extract(epoch from now() - j.created_at)::float8, j.worker_id,
       j.attempt, i.model, i.agent, extract(epoch from now() - i.updated_at)::float8,
       (select count(*) from steps s where s.segment_id = i.segment_id and s.depth = i.depth),
       (select s.type from steps s where s.segment_id = i.segment_id and s.depth = i.depth
         order by s.idx desc limit 1)
  from jobs j join interactions i on i.id = j.id join projects p on p.id = i.project_id
 where j.kind = 'run' and j.state in (0, 1)
 order by j.state desc, j.created_at limit $1
"""

_OLDEST = """
select coalesce(extract(epoch from now() - min(created_at)), 0)::float8
  from jobs where kind = 'run' and state = 1
"""

_OWNERLESS = """
select count(*) from jobs j
 where j.state = 1 and not exists (
   select from workers w where w.id = j.worker_id and w.seen > now() - $1::interval)
"""

_ALIVE_S = 10.0
STATES = {0: "queued", 1: "running", 3: "failed"}


@dataclass(frozen=True, slots=True)
class Count:
    """How many jobs of a kind are in a state."""

    kind: str
    state: str
    jobs: int
    oldest_s: float
    """How long the oldest one has been due; 0 unless queued."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One process that owns jobs, as it last said."""

    id: int
    host: str
    pid: int
    role: str
    started_at: datetime
    silent_s: float
    jobs: int


@dataclass(frozen=True, slots=True)
class Troubled:
    """A job that failed at least once."""

    id: UUID
    kind: str
    state: str
    attempt: int
    max_attempts: int
    last_error: str | None
    run_at: datetime


@dataclass(frozen=True, slots=True)
class Stuck:
    """An interaction that is not over and has no job: this must not exist."""

    id: UUID
    status: str
    age_s: float


@dataclass(frozen=True, slots=True)
class Active:
    """An interaction that runs, or waits for its turn."""

    id: UUID
    project: str
    state: str
    age_s: float
    """Since it was accepted, or began to go on."""
    worker_id: int | None
    attempt: int
    model: str | None
    agent: str | None
    quiet_s: float
    """Since its row last changed."""
    steps: int
    """That are stored, its input among them."""
    last_step: str | None


@dataclass(frozen=True, slots=True)
class Overview:
    """The queue at one moment."""

    counts: Sequence[Count]
    workers: Sequence[Worker]
    troubled: Sequence[Troubled]
    stuck: Sequence[Stuck]
    active: Sequence[Active]
    """Under way, the oldest first."""
    ownerless: int
    """Running jobs whose owner is dead or silent."""


async def counts(database: Database) -> list[Count]:
    """Jobs by kind and state."""
    async with database.hot() as connection:
        rows = await connection.fetch(_COUNTS)
    return [Count(row[0], STATES[row[1]], row[2], float(row[3])) for row in rows]


async def workers(database: Database) -> list[Worker]:
    """Every process on the list."""
    async with database.hot() as connection:
        return [Worker(*row) for row in await connection.fetch(_WORKERS)]


async def active(database: Database, *, most: int) -> list[Active]:
    """The interactions under way, those that run first, each kind with its oldest first."""
    async with database.hot() as connection:
        rows = await connection.fetch(_ACTIVE, most)
    return [Active(r[0], r[1], STATES[r[2]], *r[3:]) for r in rows]


async def measure(database: Database) -> None:
    """Set the metrics that only the database knows."""
    queued, alive = await counts(database), await workers(database)
    async with database.hot() as connection:
        oldest_s = await connection.fetchval(_OLDEST)
    metrics.runs_oldest_seconds.set(oldest_s)
    # From here on nothing is awaited: two scrapes at once do not mix.
    metrics.queue_jobs.clear()
    metrics.queue_oldest_seconds.clear()
    metrics.workers_alive.clear()
    for count in queued:
        metrics.queue_jobs.labels(count.kind, count.state).set(count.jobs)
        if count.state == "queued":
            metrics.queue_oldest_seconds.labels(count.kind).set(count.oldest_s)
    for worker in alive:
        if worker.silent_s <= _ALIVE_S:
            metrics.workers_alive.labels(worker.role).inc()


async def overview(database: Database, *, dead_after: timedelta, most: int = 10) -> Overview:
    """Everything that tells whether the queue is well, the worst `most` of each trouble."""
    async with database.hot() as connection:
        troubled = await connection.fetch(_TROUBLED, most)
        stuck = await connection.fetch(_STUCK, most)
        ownerless = await connection.fetchval(_OWNERLESS, dead_after)
    return Overview(
        counts=await counts(database),
        workers=await workers(database),
        troubled=[Troubled(r[0], r[1], STATES[r[2]], *r[3:]) for r in troubled],
        stuck=[Stuck(*row) for row in stuck],
        active=await active(database, most=most),
        ownerless=ownerless,
    )
