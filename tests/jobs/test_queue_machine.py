"""Whatever workers do, in whatever order: no job is lost, none ends twice, no zombie writes."""

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.jobs.model import DONE, FAILED, QUEUED, RUNNING, Expected, Model, Process

from openinteractions import ids
from openinteractions.db.engine import Database
from openinteractions.errors import LeaseLost
from openinteractions.jobs import queue
from openinteractions.jobs.queue import Job, Share
from openinteractions.resources.interactions.store import StoredStep
from openinteractions.runs import store
from openinteractions.runs.store import Ending, Progress, Spend

_T = TypeVar("_T")

CI = settings(
    max_examples=100,
    stateful_step_count=45,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
SHARE = Share(of_project=3, of_provider=3)
DEAD_AFTER = timedelta(seconds=1)
PROJECTS = [UUID(int=n) for n in (1, 2, 3)]
PROVIDERS = ["a", "b"]
KEYS = [None, None, "k", "l"]
HOST = "here"
PROCESSES = 4
KIND = "run"
STATES = {0: QUEUED, 1: RUNNING, 3: FAILED}
TABLES = ("jobs", "workers", "interactions", "segments", "steps", "spend", "lost_responses")
PICK = st.integers(0, 10**6)

_ENQUEUE = """
with turn as (
  insert into interactions (id, project_id, segment_id, depth, status, background)
  values ($1, $2, $1, 0, 'in_progress', true)
)
insert into jobs (id, project_id, kind, provider, key, run_at)
values ($1, $2, $3, $4, $5, now() + $6::interval)
"""


class Stage:
    """Real connections, one pool a process, and the loop that they live on."""

    def __init__(self, runner: asyncio.Runner, url: str) -> None:
        self._runner = runner
        self.pools = [self.run(_opened(url)) for _ in range(PROCESSES)]
        self.admin = self.run(_opened(url))

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self._runner.run(work)

    def close(self) -> None:
        for database in (*self.pools, self.admin):
            self.run(database.close())

    def sql(self, statement: str, *values: object) -> list[Any]:
        async def ask() -> list[Any]:
            async with self.admin.hot() as connection:
                return await connection.fetch(statement, *values)

        return self.run(ask())


async def _opened(url: str) -> Database:
    database = Database(url, pool_size=2)
    await database.ping()
    return database


class QueueMachine(RuleBasedStateMachine):
    """Several worker processes, some of them dying, stalling or confused, on one queue."""

    stage: Stage

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.processes: list[Process] = []
        self.zombies: list[Process] = []
        """Stalled ones that were declared dead and do not know it."""
        for table in TABLES:
            self.stage.sql(f"delete from {table}")

    @initialize(count=st.integers(1, PROCESSES))
    def begin(self, count: int) -> None:
        for _ in range(count):
            self.start()

    # ---- work arrives

    @rule(
        project=st.sampled_from(PROJECTS),
        provider=st.sampled_from(PROVIDERS),
        key=st.sampled_from(KEYS),
        is_due=st.sampled_from([True, True, True, False]),
        count=st.integers(1, 4),
    )
    def enqueue(
        self, project: UUID, provider: str, key: str | None, is_due: bool, count: int
    ) -> None:
        for _ in range(count):
            job = Expected(ids.uuid7(), project, provider, key, is_due)
            delay = timedelta(0) if is_due else timedelta(hours=1)
            self.stage.sql(_ENQUEUE, job.id, project, KIND, provider, key, delay)
            self.model.jobs[job.id] = job

    @precondition(lambda self: any(not job.is_due for job in self.model.jobs.values()))
    @rule()
    def its_time_comes(self) -> None:
        self.stage.sql("update jobs set run_at = now() where run_at > now()")
        for job in self.model.jobs.values():
            job.is_due = True

    # ---- processes come and go

    @precondition(lambda self: len(self.processes) < PROCESSES)
    @rule()
    def start(self) -> None:
        number = min(set(range(PROCESSES)) - {p.number for p in self.processes})
        process = Process(number, 0)
        self.processes.append(process)
        self._register(process)

    def _register(self, process: Process) -> None:
        process.worker_id = self.stage.run(
            queue.register(self._pool(process), host=HOST, pid=0, role="worker")
        )
        # Its number in the list stands for its process id: each start has one of its own.
        self.stage.sql("update workers set pid = $1 where id = $1::bigint", process.worker_id)
        self.model.listed.add(process.worker_id)
        process.is_silent = False
        process.held.clear()

    @precondition(lambda self: self.processes)
    @rule(pick=PICK, kind=st.sampled_from(["crash", "stall", "stall", "leave"]))
    def go(self, pick: int, kind: str) -> None:
        process = self._pick(pick, self.processes)
        if kind == "stall":
            process.is_awake = False
        elif kind == "crash":
            self.processes.remove(process)
        elif process.is_awake:
            self.processes.remove(process)
            self.stage.run(queue.leave(self._pool(process), process.worker_id))
            self.model.leave(process.worker_id)

    @precondition(lambda self: any(not p.is_awake for p in self.processes))
    @rule(pick=PICK)
    def wake_up(self, pick: int) -> None:
        self._pick(pick, [p for p in self.processes if not p.is_awake]).is_awake = True

    @rule()
    def time_passes(self) -> None:
        """Those who cannot beat have been silent for too long."""
        awake = [p.worker_id for p in self.processes if p.is_awake]
        self.stage.sql(
            "update workers set seen = now() - interval '1 hour' where id <> all($1::bigint[])",
            awake,
        )
        for process in self.processes:
            process.is_silent = process.is_silent or not process.is_awake

    @precondition(lambda self: self.processes)
    @rule(pick=PICK)
    def beat(self, pick: int) -> None:
        process = self._pick(pick, self.processes)
        if not process.is_awake:
            return
        mine = self.stage.run(queue.beat(self._pool(process), process.worker_id))
        if process.worker_id not in self.model.listed:
            assert mine is None
            self._register(process)
            return
        process.is_silent = False
        assert mine == {
            job.id: (job.epoch, job.is_cancelled) for job in self.model.of(process.worker_id)
        }

    # ---- work is taken

    @precondition(lambda self: self.processes)
    @rule(pick=PICK, limit=st.integers(1, 8))
    def claim(self, pick: int, limit: int) -> None:
        self._claim([self._pick(pick, self.processes)], limit)

    @precondition(lambda self: len(self.processes) > 1)
    @rule(limit=st.integers(1, 8))
    def claim_at_once(self, limit: int) -> None:
        self._claim(self.processes, limit)

    def _claim(self, processes: list[Process], limit: int) -> list[Job]:
        awake = [process for process in processes if process.is_awake]

        async def all_of_them() -> list[list[Job]]:
            return await asyncio.gather(*(self._ask(process, limit) for process in awake))

        taken: list[Job] = []
        for process, jobs in zip(awake, self.stage.run(all_of_them()), strict=True):
            assert len(jobs) <= limit
            for job in jobs:
                expected = self.model.jobs[job.id]
                assert self.model.can_claim(expected), expected
                expected.run(process.worker_id)
                assert (job.epoch, job.attempt) == (expected.epoch, expected.attempt)
                assert job.cancel_requested == expected.is_cancelled
            process.held += jobs
            taken += jobs
        return taken

    async def _ask(self, process: Process, limit: int) -> list[Job]:
        return await queue.claim(
            self._pool(process), process.worker_id, kinds=[KIND], limit=limit, share=SHARE
        )

    @rule()
    def sweep(self) -> None:
        # Simulated time passes only for those who were silent in `time_passes`.
        self.stage.sql("update workers set seen = now() where seen > now() - interval '10 min'")
        old = "select id from workers where seen < now() - interval '10 min'"
        silent = {row[0] for row in self.stage.sql(old)}
        gone = {j.owner for j in self.model.jobs.values() if j.owner not in self.model.listed}
        swept = self.stage.run(queue.sweep(self.stage.admin, DEAD_AFTER))
        assert swept == self.model.give_back(silent | {owner for owner in gone if owner})

    @rule()
    def bury(self) -> None:
        alive = {process.worker_id for process in self.processes}
        dead = self.model.listed - alive
        buried = self.stage.run(
            queue.bury(self.stage.admin, host=HOST, is_alive=lambda pid: pid in alive)
        )
        assert buried == self.model.give_back(dead)

    # ---- work is done, by its owner or by one who takes itself for it

    @precondition(lambda self: any(p.held for p in self.processes))
    @rule(
        pick=PICK,
        what=st.sampled_from(["commit", "record", "finish", "finish", "retry", "fail"]),
    )
    def work(self, pick: int, what: str) -> None:
        holders = [p for p in self.processes if p.held and p.is_awake]
        if not holders:
            return
        process = self._pick(pick, holders)
        job = self._pick(pick // 7, process.held)
        is_owner = self.model.owns(job)
        expected = self.model.jobs[job.id]
        database = self._pool(process)
        if what in {"commit", "record"}:
            progress = self._progress(job, expected.steps, is_progress=what == "commit")
            assert self._write(store.commit(database, progress)) == is_owner
            if is_owner:
                expected.steps += 1
                expected.attempt = 0 if what == "commit" else expected.attempt
            return
        process.held.remove(job)
        self._end(database, job, what)
        if is_owner:
            self._expect_end(expected, what)

    def _end(self, database: Database, job: Job, what: str) -> None:
        expected = self.model.jobs[job.id]
        if what == "finish":
            progress = self._progress(job, expected.steps)
            is_owner = self.model.owns(job)
            assert self._write(store.finish(database, progress, _ending())) == is_owner
        elif what == "retry":
            delay = timedelta(hours=1)
            self.stage.run(queue.retry(database, job, error="it may pass", delay=delay))
        else:
            self.stage.run(queue.fail(database, job, error="it will not pass"))

    def _expect_end(self, expected: Expected, what: str) -> None:
        if what == "finish":
            expected.state, expected.owner = DONE, None
            expected.steps += 1
        elif what == "fail":
            expected.state, expected.owner = FAILED, None
        else:
            expected.queue()
            expected.is_due = False

    # ---- work is unwanted

    @precondition(lambda self: self.model.jobs)
    @rule(pick=PICK)
    def ask_to_cancel(self, pick: int) -> None:
        job = self._pick(pick, list(self.model.jobs.values()))
        found = self.stage.run(queue.request_cancel(self.stage.admin, job.id))
        assert found == (job.state != DONE)
        job.is_cancelled = job.is_cancelled or found

    @precondition(lambda self: self.processes and self.model.jobs)
    @rule(pick=PICK)
    def steal(self, pick: int) -> None:
        """The end of a cancel that nobody obeyed."""
        process = self._pick(pick, self.processes)
        live = [j for j in self.model.jobs.values() if j.state in {QUEUED, RUNNING}]
        if not process.is_awake or not live:
            return
        job = self._pick(pick // 7, live)
        epoch = self.stage.run(store.steal(self._pool(process), job.id, process.worker_id))
        if job.state == QUEUED:
            job.key = None
        attempt = job.attempt
        job.run(process.worker_id)
        job.attempt, job.is_stolen = attempt, True
        assert epoch == job.epoch
        process.held.append(
            Job(job.id, job.project, KIND, {}, epoch, attempt, 5, cancel_requested=True)
        )

    # ---- what always holds

    @invariant()
    def the_database_is_as_expected(self) -> None:
        rows = self.stage.sql("select id, state, epoch, attempt, worker_id, key from jobs")
        found = {r[0]: (STATES[r[1]], r[2], r[3], r[4], r[5]) for r in rows}
        assert found == {
            job.id: (job.state, job.epoch, job.attempt, job.owner, job.key)
            for job in self.model.jobs.values()
            if job.state != DONE
        }

    @invariant()
    def each_ended_once_and_no_zombie_wrote(self) -> None:
        rows = self.stage.sql(
            """select i.id, i.status,
                      (select count(*) from spend s where s.interaction_id = i.id),
                      (select count(*) from steps t
                        where t.segment_id = i.segment_id and t.depth = i.depth)
                 from interactions i"""
        )
        assert {row[0]: tuple(row[1:]) for row in rows} == {
            job.id: (
                "completed" if job.state == DONE else "in_progress",
                int(job.state == DONE),
                job.steps,
            )
            for job in self.model.jobs.values()
        }

    @invariant()
    def limits_are_kept(self) -> None:
        running = [job for job in self.model.jobs.values() if job.state == RUNNING]
        keys = Counter(job.key for job in running if job.key)
        assert all(count == 1 for count in keys.values()), keys
        claimed = [job for job in running if not job.is_stolen]
        projects = Counter(job.project for job in claimed)
        assert all(count <= SHARE.of_project for count in projects.values()), projects
        providers = Counter(job.provider for job in claimed)
        assert all(count <= SHARE.of_provider for count in providers.values()), providers
        suspects = Counter(job.owner for job in claimed if job.is_suspect)
        assert all(count == 1 for count in suspects.values()), suspects

    def teardown(self) -> None:
        """Once the trouble is over, one worker that lives gets everything done."""
        if not self.model.jobs:
            return
        self.its_time_comes()
        self.processes.clear()
        self.bury()
        self.sweep()
        self.start()
        process = self.processes[0]
        while any(job.state == QUEUED for job in self.model.jobs.values()):
            taken = self._claim([process], 8)
            left = [job for job in self.model.jobs.values() if job.state == QUEUED]
            assert taken, left
            for job in taken:
                self._end(self._pool(process), job, "finish")
                self._expect_end(self.model.jobs[job.id], "finish")
            process.held.clear()
        self.the_database_is_as_expected()
        self.each_ended_once_and_no_zombie_wrote()

    # ---- small things

    def _pool(self, process: Process) -> Database:
        return self.stage.pools[process.number]

    def _pick(self, number: int, among: list[_T]) -> _T:
        return among[number % len(among)]

    def _write(self, write: Coroutine[Any, Any, object]) -> bool:
        try:
            self.stage.run(write)
        except LeaseLost:
            return False
        return True

    def _progress(self, job: Job, steps: int, *, is_progress: bool = True) -> Progress:
        return Progress(
            interaction_id=job.id,
            epoch=job.epoch,
            run_state=b"{}",
            steps=[StoredStep(steps, "model_output", media=False, data=b"{}")],
            seq=1,
            events=None,
            is_progress=is_progress,
        )


def _ending() -> Ending:
    spend = Spend(
        key_id=None, model="m", input_tokens=1, cached_tokens=0, output_tokens=1, cost_nanousd=None
    )
    return Ending(status="completed", usage=None, errors=None, warnings=None, spend=spend)


@pytest.fixture
def stage(database_url: str) -> Iterator[Stage]:
    with asyncio.Runner() as runner:
        opened = Stage(runner, database_url)
        # No sweep before one dead-interval after PostgreSQL's own start (ruling R7).
        opened.sql("select pg_sleep_until(pg_postmaster_start_time() + interval '1.5 s')")
        yield opened
        opened.close()


@pytest.mark.timeout(300)
def test_whatever_happens_every_job_ends_once(stage: Stage) -> None:
    class Machine(QueueMachine):
        pass

    Machine.stage = stage
    # No sweep within one dead-interval of PostgreSQL's own start (ruling R7): wait it out.
    ((age,),) = stage.sql("select now() - pg_postmaster_start_time()")
    time.sleep(max(0.0, (2 * DEAD_AFTER - age).total_seconds()))
    run_state_machine_as_test(Machine, settings=CI)
