"""The lease queue: who owns a job, when it is given to somebody else, and who may still write."""
# ruff: noqa: ASYNC110 - a test looks again until it is so

import asyncio
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from openinteractions import ids
from openinteractions.db.engine import Database
from openinteractions.jobs import queue
from openinteractions.jobs.queue import Job, Share
from openinteractions.jobs.runner import Member, Timing

PROJECT = UUID(int=3)
DEAD_AFTER = timedelta(seconds=0.5)
PLENTY = Share(of_project=1000, of_provider=1000)


@pytest.fixture(autouse=True)
async def settled(database: Database) -> None:
    """No sweep within one dead-interval of PostgreSQL's own start (ruling R7): wait it out."""
    async with database.hot() as connection:
        age = await connection.fetchval("select now() - pg_postmaster_start_time()")
    await asyncio.sleep(max(0.0, (2 * DEAD_AFTER - age).total_seconds()))


async def register(database: Database) -> int:
    return await queue.register(database, host="h", pid=1, role="all")


async def add(database: Database, count: int = 1, **columns: object) -> list[UUID]:
    keys = [ids.uuid7() for _ in range(count)]
    names = ", ".join(["id", "project_id", "kind", *columns])
    places = ", ".join(f"${n + 1}" for n in range(3 + len(columns)))
    async with database.hot() as connection:
        await connection.executemany(
            f"insert into jobs ({names}) values ({places})",
            [(key, PROJECT, "run", *columns.values()) for key in keys],
        )
    return keys


async def claim(database: Database, worker: int, limit: int = 100) -> list[Job]:
    return await queue.claim(database, worker, kinds=["run"], limit=limit, share=PLENTY)


async def row(database: Database, key: UUID) -> dict[str, object] | None:
    async with database.hot() as connection:
        found = await connection.fetchrow("select * from jobs where id = $1", key)
    return None if found is None else dict(found)


async def silence(database: Database, worker: int, for_s: float = 60) -> None:
    async with database.hot() as connection:
        await connection.execute(
            "update workers set seen = now() - $2::interval where id = $1",
            worker,
            timedelta(seconds=for_s),
        )


async def test_claimers_at_once_get_different_jobs(database: Database):
    keys = await add(database, 60)
    workers = [await register(database) for _ in range(4)]
    batches = await asyncio.gather(*(claim(database, w, 7) for w in workers for _ in range(3)))
    taken = [job.id for batch in batches for job in batch]
    assert len(taken) == len(set(taken)) <= 60
    rest = await claim(database, workers[0])
    assert {*taken, *(job.id for job in rest)} == set(keys)
    assert {job.epoch for batch in batches for job in batch} == {1}


async def test_a_locked_job_is_stepped_over(database: Database, database_url: str):
    first, second = await add(database, 2)
    other = await asyncpg.connect(database_url)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("select from jobs where id = $1 for update", first)
    async with asyncio.timeout(2):
        assert [job.id for job in await claim(database, await register(database))] == [second]
    await transaction.rollback()
    await other.close()


async def test_only_known_kinds_that_are_due_are_claimed(database: Database):
    worker = await register(database)
    (due,) = await add(database)
    async with database.hot() as connection:
        await connection.execute(
            "insert into jobs (id, project_id, kind) values ($1, $2, 'other')", ids.uuid7(), PROJECT
        )
        await connection.execute(
            "insert into jobs (id, project_id, kind, run_at) "
            "values ($1, $2, 'run', now() + interval '1 hour')",
            ids.uuid7(),
            PROJECT,
        )
    assert [job.id for job in await claim(database, worker)] == [due]


async def test_one_job_of_a_key_runs_at_a_time(database: Database):
    keys = await add(database, 3, key="sandbox-1")
    worker = await register(database)
    done = []
    for _ in keys:
        (job,) = await claim(database, worker)
        assert await claim(database, worker) == []
        done.append(job.id)
        await queue.drop(database, job)
    assert done == sorted(keys)


async def test_a_key_that_another_worker_takes_in_this_instant_costs_only_that_job(
    database: Database, database_url: str
):
    """The other's claim is not committed yet, so only the unique index knows."""
    first, second = await add(database, 2, key="k")
    free = await add(database, 3)
    mine, theirs = await register(database), await register(database)
    other = await asyncpg.connect(database_url)
    transaction = other.transaction()
    await transaction.start()
    # Behind `first`'s back: the younger one was started, and `first` is all that we see.
    await other.execute(
        "update jobs set state = 1, worker_id = $2, epoch = 1 where id = $1", second, theirs
    )
    claiming = asyncio.create_task(claim(database, mine))
    await asyncio.sleep(0.1)
    await transaction.commit()
    await other.close()
    got = {job.id for job in await claiming}
    for _ in range(5):
        got |= {job.id for job in await claim(database, mine)}
    assert got == set(free)
    assert (await row(database, first))["state"] == 0


async def test_the_jobs_of_a_silent_worker_go_back_and_the_epoch_rises(database: Database):
    (key,) = await add(database)
    silent, other = await register(database), await register(database)
    (job,) = await claim(database, silent)
    assert await queue.sweep(database, DEAD_AFTER) == 0
    await silence(database, silent)
    assert await queue.sweep(database, DEAD_AFTER) == 1
    (again,) = await claim(database, other)
    assert (again.id, again.epoch, again.attempt) == (key, job.epoch + 1, 2)
    # The first owner can end nothing any more.
    await queue.drop(database, job)
    await queue.retry(database, job, error="x", delay=timedelta(0))
    await queue.fail(database, job, error="x")
    assert (await row(database, key))["worker_id"] == other
    assert await queue.beat(database, silent) is None
    assert await queue.beat(database, other) == {key: (again.epoch, False)}


async def test_a_job_of_a_worker_that_nobody_knows_goes_back(database: Database):
    (key,) = await add(database, state=1, worker_id=12345, epoch=1)
    assert await queue.sweep(database, timedelta(0)) == 1
    assert (await row(database, key))["state"] == 0


async def test_sweeps_at_once_give_a_job_back_once(database: Database):
    await add(database, 30)
    worker = await register(database)
    await claim(database, worker)
    await silence(database, worker)
    counts = await asyncio.gather(*(queue.sweep(database, DEAD_AFTER) for _ in range(6)))
    assert sum(counts) == 30


async def test_no_sweep_right_after_the_database_has_started(database: Database):
    """Ruling R7: nobody could beat while it was away."""
    (key,) = await add(database)
    worker = await register(database)
    await claim(database, worker)
    await silence(database, worker, for_s=90_000)
    assert await queue.sweep(database, timedelta(hours=20)) == 0
    assert (await row(database, key))["worker_id"] == worker


async def test_leaving_does_not_count_as_an_attempt(database: Database):
    (key,) = await add(database)
    for epoch in range(1, 4):
        worker = await register(database)
        (job,) = await claim(database, worker)
        assert (job.attempt, job.epoch) == (1, epoch)
        await queue.leave(database, worker)
        after = await row(database, key)
        assert (after["state"], after["worker_id"], after["attempt"]) == (0, None, 0)


async def test_a_retry_counts_and_waits(database: Database):
    (key,) = await add(database)
    worker = await register(database)
    (job,) = await claim(database, worker)
    await queue.retry(database, job, error="no luck", delay=timedelta(seconds=0.3))
    assert await claim(database, worker) == []
    assert (await row(database, key))["last_error"] == "no luck"
    await asyncio.sleep(0.35)
    (again,) = await claim(database, worker)
    assert again.attempt == 2


async def test_a_cancel_request_reaches_the_owner_and_survives_a_takeover(database: Database):
    (key,) = await add(database)
    worker = await register(database)
    (job,) = await claim(database, worker)
    assert await queue.request_cancel(database, key)
    assert not await queue.request_cancel(database, ids.uuid7())
    assert await queue.beat(database, worker) == {key: (job.epoch, True)}
    await queue.leave(database, worker)
    (again,) = await claim(database, await register(database))
    assert again.cancel_requested


# ---- members

QUICK = Timing(heartbeat=timedelta(milliseconds=60), dead_after=timedelta(seconds=2))


async def forever() -> None:
    await asyncio.sleep(60)


async def test_a_member_that_was_declared_dead_stops_its_work_and_comes_back(database: Database):
    (key,) = await add(database)
    member = Member(database, QUICK, role="all")
    async with member.joined():
        first = member.worker_id
        (job,) = await claim(database, first)
        task = member.own(job.id, job.epoch, forever())
        async with database.hot() as connection:
            await connection.execute("delete from workers")
        async with asyncio.timeout(3):
            await asyncio.wait([task])
            while member.worker_id == first:
                await asyncio.sleep(0.01)
        assert member.running == 0
        assert not member.was_cancelled(key)
    assert (await row(database, key))["worker_id"] in {first, None}


async def test_a_job_that_nobody_here_runs_is_given_back(database: Database):
    """The create's answer was lost: the row is ours, and no task is."""
    member = Member(database, QUICK, role="api")
    async with member.joined():
        (key,) = await add(database, state=1, worker_id=member.worker_id, epoch=1, attempt=1)
        async with asyncio.timeout(3):
            while (await row(database, key))["state"] == 1:
                await asyncio.sleep(0.02)


async def test_a_cancel_stops_the_task_at_its_owner(database: Database):
    member = Member(database, QUICK, role="all")
    async with member.joined():
        await add(database)
        (job,) = await claim(database, member.worker_id)
        cancelled: list[bool] = []

        async def work() -> None:
            try:
                await forever()
            finally:
                cancelled.append(member.was_cancelled(job.id))

        task = member.own(job.id, job.epoch, work())
        await asyncio.sleep(0)
        await queue.request_cancel(database, job.id)
        async with asyncio.timeout(1):
            await asyncio.wait([task])
        assert cancelled == [True]
        await queue.drop(database, job)


async def test_a_job_that_crashes_for_ever_is_not_tried_for_ever(database: Database):
    """A bug in a handler: its attempts count, though its worker lives."""
    member = Member(database, QUICK, role="all")
    (key,) = await add(database)

    async def crash() -> None:
        raise ValueError("a bug")

    seen: list[int] = []
    async with member.joined(), asyncio.timeout(10):
        while len(seen) < 3:
            for job in await claim(database, member.worker_id):
                seen.append(job.attempt)
                member.own(job.id, job.epoch, crash())
            await asyncio.sleep(0.03)
    assert seen == [1, 2, 3], await row(database, key)


@pytest.mark.parametrize("kept", [True, False])
async def test_an_outage_of_the_sweeper_itself_costs_its_neighbours_nothing(
    database: Database, kept: bool
):
    """Ruling R7: who could not reach the database for long does not judge who else could."""
    (key,) = await add(database)
    neighbour = await register(database)
    (job,) = await claim(database, neighbour)
    member = Member(
        database, Timing(timedelta(milliseconds=50), timedelta(seconds=1.2)), role="all"
    )
    async with member.joined():
        # The network was away for everybody; the member comes back a moment before the neighbour.
        await silence(database, neighbour, for_s=30)
        await asyncio.sleep(0.4)
        if kept:
            await queue.beat(database, neighbour)
            await asyncio.sleep(0.4)
            assert (await row(database, key))["epoch"] == job.epoch
            assert (await row(database, key))["worker_id"] == neighbour
        else:
            async with asyncio.timeout(4):
                while (await row(database, key))["state"] == 1:
                    await asyncio.sleep(0.05)
