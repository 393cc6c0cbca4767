"""One process's own list of what it runs."""

import asyncio
from datetime import timedelta

from openinteractions import ids
from openinteractions.db.engine import Database
from openinteractions.jobs.runner import Member, Timing


async def test_a_job_claimed_again_is_not_forgotten_when_its_first_claim_ends(database: Database):
    """A zombie whose last write was in flight ends after its own process has claimed the job."""
    timing = Timing(timedelta(hours=1), timedelta(hours=2))
    async with Member(database, timing, role="worker").joined() as member:
        job = ids.uuid7()
        last_write, stopped = asyncio.Event(), asyncio.Event()

        async def run_until_stopped() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                stopped.set()

        first = member.own(job, 1, _wait(last_write))
        member.own(job, 2, run_until_stopped())
        await asyncio.sleep(0)
        last_write.set()
        await first
        assert member.running == 1
        assert member.cancel(job)
        await stopped.wait()
    assert member.running == 0


async def test_what_ends_a_cancelled_job_is_not_stopped_by_its_cancel(database: Database):
    timing = Timing(timedelta(hours=1), timedelta(hours=2))
    async with Member(database, timing, role="worker").joined() as member:
        job = ids.uuid7()
        last_write = asyncio.Event()
        ending = member.own(job, 1, _wait(last_write), is_cancelled=True)
        await asyncio.sleep(0)
        for _ in range(2):
            assert member.cancel(job)
            await asyncio.sleep(0)
        assert member.was_cancelled(job)
        assert not ending.done()
        last_write.set()
        await ending
        assert not ending.cancelled()


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
