"""All SQL of the queue, except the inserts that belong to a business transaction.

A job is queued (0), running (1) or failed for good (3); one that ended well is deleted. A worker
is a process that beats; a running job whose worker fell silent is anybody's. Each claim raises the
job's *epoch*, and every write of a run names the epoch it was claimed under: whoever was declared
dead and wakes up again writes nothing.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from openinteractions.db.engine import Database

WAKE_CHANNEL = "oi_jobs"
CANCEL_CHANNEL = "oi_cancel"
LOST_CHANNEL = "oi_lost"

# Projects take turns: each one's jobs are numbered on from what it has running, and the lowest
# numbers go first. What a full provider would refuse is left where it is. Of the suspects (runs
# whose workers died twice without progress) a worker has one at a time, so that a job that kills
# its worker is told apart from its neighbours (ruling R6).
_CLAIM = """
with recursive tenant as (
  (select project_id from jobs where state = 0 order by project_id limit 1)
  union all
  select (select j.project_id from jobs j
           where j.state = 0 and j.project_id > t.project_id order by j.project_id limit 1)
    from tenant t where t.project_id is not null
), busy as (
  select project_id, provider, count(*) as n from jobs where state = 1
   group by grouping sets ((project_id), (provider))
), candidate as (
  select c.id, c.rank_at, c.is_suspect, c.provider,
         coalesce(b.n, 0)
           + row_number() over (partition by t.project_id order by c.rank_at, c.id) as turn
    from tenant t
    left join busy b on b.project_id = t.project_id
   cross join lateral (
     select j.id, j.rank_at, j.provider, j.kind = 'run' and j.attempt >= 2 as is_suspect
       from jobs j
      where j.project_id = t.project_id and j.state = 0 and j.run_at <= now()
        and j.kind = any($3::text[])
        and not exists (select from busy p where p.project_id is null
                           and p.provider = j.provider and p.n >= $5)
        and (j.key is null or not exists (
              select from jobs o
               where o.key = j.key and o.id <> j.id
                 and (o.state = 1 or (o.state = 0 and o.run_at <= now()
                      and (o.rank_at, o.id) < (j.rank_at, j.id)))))
      order by j.rank_at, j.id
      limit greatest(least($2, $4 - coalesce(b.n, 0)), 0)
   ) c
   where t.project_id is not null
), allowed as (
  select *, row_number() over (partition by provider order by turn, rank_at, id) as load
    from (select *, row_number() over (partition by is_suspect order by turn, rank_at) as n
            from candidate) c
   where not is_suspect
      or (n = 1 and not exists (select from jobs s where s.worker_id = $1 and s.state = 1
                                   and s.kind = 'run' and s.attempt > 2))
), picked as (
  select a.id, a.turn, a.rank_at
    from allowed a
    left join busy p on p.project_id is null and p.provider = a.provider
   where a.provider is null or a.load + coalesce(p.n, 0) <= $5
   order by a.turn, a.rank_at limit $2
), due as (
  select j.id from jobs j join picked p using (id)
   where j.state = 0
   order by p.turn, p.rank_at
     for update of j skip locked
)
update jobs j
   set state = 1, worker_id = $1, epoch = j.epoch + 1, attempt = j.attempt + 1
  from due where j.id = due.id
returning j.id, j.project_id, j.kind, j.args::text, j.epoch, j.attempt, j.max_attempts,
          j.cancel_requested
"""

_BEAT = "update workers set seen = now() where id = $1 returning id"
_OWNED = "select id, epoch, cancel_requested from jobs where worker_id = $1 and state = 1"

# An attempt is charged to the suspects of a dead worker, if it had any, not to their neighbours. A
# foreground run whose process died has lost its caller's answer, as may have every create that the
# process took just before: a retry of the request may join.
_GIVE_BACK = """
, back as (
  update jobs j
     set state = 0, worker_id = null, run_at = now(),
         last_error = 'the worker died or fell silent',
         attempt = case when j.attempt <= 2 and exists (
                          select from jobs s
                           where s.worker_id = j.worker_id and s.state = 1 and s.kind = 'run'
                             and s.attempt > 2)
                        then greatest(j.attempt - 1, 0) else j.attempt end
   where id in (select id from orphans)
  returning id
), lost as (
  insert into lost_responses (project_id, request_hash, interaction_id)
  select i.project_id, i.request_hash, i.id
    from interactions i
   where i.request_hash is not null
     and ((not i.background and i.id in (select id from back))
          or (i.created_by in (select id from dead)
              -- Ids are ordered by time: the creates of the last minute.
              and i.id > (lpad(to_hex((extract(epoch from now() - interval '60 s') * 1000)::bigint),
                               12, '0') || repeat('0', 20))::uuid))
  on conflict do nothing
  returning 1
)
select (select count(*) from back), (select count(*) from lost)
"""

_SWEEP = f"""
with dead as (
  delete from workers
   where seen < now() - $1::interval
     and pg_postmaster_start_time() < now() - $1::interval
  returning id
), orphans as (
  select j.id from jobs j
   where j.state = 1
     and pg_postmaster_start_time() < now() - $1::interval
     and (j.worker_id in (select id from dead)
          or not exists (select from workers w where w.id = j.worker_id))
   order by j.id for update skip locked
){_GIVE_BACK}"""  # noqa: S608 - constants

_BURY = f"""
with dead as (
  delete from workers where id = any($1::bigint[]) returning id
), orphans as (
  select j.id from jobs j
   where j.state = 1 and j.worker_id in (select id from dead)
   order by j.id for update skip locked
){_GIVE_BACK}"""  # noqa: S608 - constants

_RETRY = """
update jobs set state = 0, worker_id = null, last_error = $3, run_at = now() + $4::interval
 where id = $1 and epoch = $2 and state = 1
returning id
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A job that this process owns."""

    id: UUID
    project_id: UUID
    kind: str
    args: dict[str, Any]
    epoch: int
    attempt: int
    max_attempts: int
    cancel_requested: bool


async def register(database: Database, *, host: str, pid: int, role: str) -> int:
    """Enter this process as a worker; its id owns jobs from now on."""
    async with database.hot() as connection:
        return await connection.fetchval(
            "insert into workers (host, pid, role) values ($1, $2, $3) returning id",
            host,
            pid,
            role,
        )


async def leave(database: Database, worker_id: int) -> None:
    """Take this process off the list; what it still owns goes to others at once."""
    async with database.hot() as connection:
        await connection.execute(
            """with gone as (
                 delete from workers where id = $1 returning id
               ), mine as (
                 select id from jobs where worker_id = $1 and state = 1 order by id for update
               ), back as (
                 update jobs set state = 0, worker_id = null, attempt = greatest(attempt - 1, 0)
                  where id in (select id from mine) returning id
               )
               insert into lost_responses (project_id, request_hash, interaction_id)
               select i.project_id, i.request_hash, i.id from interactions i join back using (id)
                where not i.background and i.request_hash is not null
               on conflict do nothing""",
            worker_id,
        )
        await connection.execute(
            "select pg_notify($1, ''), pg_notify($2, '')", WAKE_CHANNEL, LOST_CHANNEL
        )


async def wake(database: Database) -> None:
    """Tell the workers that there is something to claim."""
    async with database.hot() as connection:
        await connection.execute("select pg_notify($1, '')", WAKE_CHANNEL)


async def beat(database: Database, worker_id: int) -> dict[UUID, tuple[int, bool]] | None:
    """Say that this process lives.

    Returns each job it owns with its epoch and whether it is to be cancelled; None if the process
    was declared dead meanwhile.
    """
    async with database.hot() as connection:
        if await connection.fetchval(_BEAT, worker_id) is None:
            return None
        rows = await connection.fetch(_OWNED, worker_id)
    return {row[0]: (row[1], row[2]) for row in rows}


async def sweep(database: Database, dead_after: timedelta) -> int:
    """Give the jobs of dead workers back to the queue; return how many there were.

    Nothing happens within one dead-interval of the database's own start, since nobody could beat
    while it was away (ruling R7).
    """
    return await _give_back(database, _SWEEP, dead_after)


async def bury(database: Database, *, host: str, is_alive: Callable[[int], bool]) -> int:
    """Give back the jobs of this very machine's processes that are no more, without waiting.

    Args:
        database: Where.
        host: As this machine's processes register; see `register`.
        is_alive: Whether a process id is in use here; one that is, is left to `sweep`.
    """
    async with database.hot() as connection:
        rows = await connection.fetch("select id, pid from workers where host = $1", host)
    dead = [row[0] for row in rows if not is_alive(row[1])]
    return await _give_back(database, _BURY, dead) if dead else 0


async def _give_back(database: Database, statement: str, argument: object) -> int:
    async with database.hot() as connection:
        row = await connection.fetchrow(statement, argument)
        back: int = row[0]
        if back or row[1]:
            await connection.execute(
                "select pg_notify($1, ''), pg_notify($2, '')", WAKE_CHANNEL, LOST_CHANNEL
            )
    return back


@dataclass(frozen=True, slots=True)
class Share:
    """How much may run at once, over all workers."""

    of_project: int
    of_provider: int


async def claim(
    database: Database, worker_id: int, *, kinds: Sequence[str], limit: int, share: Share
) -> list[Job]:
    """Take up to `limit` due jobs, a fair share of each project's.

    Two processes that ask at once get different ones.
    """
    async with database.hot() as connection:
        rows: list[Any] = []
        for size in dict.fromkeys((limit, 1)):
            # Another worker started the same key in this instant: it costs that job, not the rest.
            with contextlib.suppress(asyncpg.UniqueViolationError):
                rows = await _claim(connection, worker_id, kinds, size, share)
                break
    return [
        Job(row[0], row[1], row[2], orjson.loads(row[3]), row[4], row[5], row[6], row[7])
        for row in rows
    ]


async def _claim(
    connection: Any,  # noqa: ANN401 - asyncpg ships no types
    worker_id: int,
    kinds: Sequence[str],
    limit: int,
    share: Share,
) -> list[Any]:
    return await connection.fetch(
        _CLAIM, worker_id, limit, list(kinds), share.of_project, share.of_provider
    )


async def drop(database: Database, job: Job) -> None:
    """End a job that has nothing left to do."""
    async with database.hot() as connection:
        await connection.execute(
            "delete from jobs where id = $1 and epoch = $2 and state = 1", job.id, job.epoch
        )


async def fail(database: Database, job: Job, *, error: str) -> None:
    """Give a job up for good; it stays, with its error, for the operator to see."""
    async with database.hot() as connection:
        await connection.execute(
            "update jobs set state = 3, worker_id = null, last_error = $3 "
            "where id = $1 and epoch = $2 and state = 1",
            job.id,
            job.epoch,
            error[:2000],
        )


async def give_up_orphan(database: Database, job_id: UUID, epoch: int) -> None:
    """Put back a job of this process that no task of it runs.

    The attempt counts: what always crashes here must end some time (ruling R6). Its caller, if it
    has one, never had an answer: a retry of the request may join.
    """
    async with database.hot() as connection:
        back = await connection.fetchval(
            """with back as (
                 update jobs set state = 0, worker_id = null, run_at = now(),
                        last_error = 'it ended without an outcome'
                  where id = $1 and epoch = $2 and state = 1 returning id
               ), lost as (
                 insert into lost_responses (project_id, request_hash, interaction_id)
                 select i.project_id, i.request_hash, i.id from interactions i join back using (id)
                  where not i.background and i.request_hash is not null
                 on conflict do nothing
               ) select id from back""",
            job_id,
            epoch,
        )
        if back is not None:
            await connection.execute(
                "select pg_notify($1, ''), pg_notify($2, '')", WAKE_CHANNEL, LOST_CHANNEL
            )


async def retry(database: Database, job: Job, *, error: str, delay: timedelta) -> None:
    """Put a job back after a failure that may pass; the attempt counts."""
    async with database.hot() as connection:
        await connection.fetchval(_RETRY, job.id, job.epoch, error[:2000], delay)


async def request_cancel(database: Database, job_id: UUID) -> bool:
    """Ask a job's owner to stop it; False if there is no such job any more."""
    async with database.hot() as connection:
        found = await connection.fetchval(
            "update jobs set cancel_requested = true where id = $1 returning id", job_id
        )
        if found is not None:
            await connection.execute("select pg_notify($1, $2)", CANCEL_CHANNEL, job_id.hex)
    return found is not None
