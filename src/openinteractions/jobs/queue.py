"""All SQL of the queue, except the inserts that belong to a business transaction.

A job is queued (0), running (1) or failed for good (3); one that ended well is deleted. A worker
is a process that beats; a running job whose worker fell silent is anybody's. Each claim raises the
job's *epoch*, and every write of a run names the epoch it was claimed under: whoever was declared
dead and wakes up again writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from openinteractions.db.engine import Database

WAKE_CHANNEL = "oi_jobs"
CANCEL_CHANNEL = "oi_cancel"

_CLAIM = """
with due as (
  select j.id from jobs j
   where j.state = 0 and j.run_at <= now() and j.kind = any($3::text[])
     and (j.key is null or not exists (
           select 1 from jobs o
            where o.key = j.key and o.id <> j.id
              and (o.state = 1 or (o.state = 0 and o.run_at <= now()
                   and (o.priority, j.id) > (j.priority, o.id)))))
   order by j.priority desc, j.run_at, j.id
   limit $2
     for update skip locked
)
update jobs j
   set state = 1, worker_id = $1, epoch = j.epoch + 1, attempt = j.attempt + 1
  from due where j.id = due.id
returning j.id, j.project_id, j.kind, j.args, j.epoch, j.attempt, j.max_attempts,
          j.cancel_requested
"""

_BEAT = "update workers set seen = now() where id = $1 returning id"
_OWNED = "select id, epoch, cancel_requested from jobs where worker_id = $1 and state = 1"

_SWEEP = """
with dead as (
  delete from workers
   where seen < now() - $1::interval
     and pg_postmaster_start_time() < now() - $1::interval
  returning id
), orphans as (
  select id from jobs
   where state = 1 and worker_id in (select id from dead)
   order by id for update skip locked
), strays as (
  select j.id from jobs j
   where j.state = 1 and not exists (select 1 from workers w where w.id = j.worker_id)
     and pg_postmaster_start_time() < now() - $1::interval
   order by j.id for update skip locked
), back as (
  update jobs set state = 0, worker_id = null, run_at = now(),
         last_error = 'the worker died or fell silent'
   where id in (select id from orphans union select id from strays)
  returning id
)
select (select count(*) from dead), (select count(*) from back)
"""

_HAND_BACK = """
update jobs set state = 0, worker_id = null, attempt = greatest(attempt - 1, 0),
       run_at = now() + $3::interval
 where id = $1 and epoch = $2 and state = 1
returning id
"""

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
            """with gone as (delete from workers where id = $1 returning id)
               update jobs set state = 0, worker_id = null, attempt = greatest(attempt - 1, 0)
                where worker_id = $1 and state = 1""",
            worker_id,
        )
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
    async with database.hot() as connection:
        _, back = await connection.fetchrow(_SWEEP, dead_after)
        if back:
            await connection.execute("select pg_notify($1, '')", WAKE_CHANNEL)
    return back


async def claim(
    database: Database, worker_id: int, *, kinds: Sequence[str], limit: int
) -> list[Job]:
    """Take up to `limit` due jobs. Two processes that ask at once get different ones."""
    async with database.hot() as connection:
        try:
            rows = await connection.fetch(_CLAIM, worker_id, limit, list(kinds))
        except asyncpg.UniqueViolationError:
            # Another worker started the same key in this instant: it costs that job, not the rest.
            if limit == 1:
                return []
            rows = await connection.fetch(_CLAIM, worker_id, 1, list(kinds))
    return [
        Job(row[0], row[1], row[2], orjson.loads(row[3]), row[4], row[5], row[6], row[7])
        for row in rows
    ]


async def hand_back(database: Database, job: Job, delay: timedelta = timedelta(0)) -> None:
    """Put a job back as if it had not been claimed (the process is stopping)."""
    async with database.hot() as connection:
        await connection.fetchval(_HAND_BACK, job.id, job.epoch, delay)
        await connection.execute("select pg_notify($1, '')", WAKE_CHANNEL)


async def drop(database: Database, job: Job) -> None:
    """End a job that has nothing left to do."""
    async with database.hot() as connection:
        await connection.execute(
            "delete from jobs where id = $1 and epoch = $2 and state = 1", job.id, job.epoch
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
