"""Owning jobs: one process's heartbeat, claims and running tasks.

Every process that owns jobs has one `Member` (an api process owns its foreground runs, ruling R9).
A worker is a member that also claims. A job that the database says is ours, but that no task here
runs (its insert's answer was lost), is handed back, so that nothing stays without an owner.
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import structlog

from openinteractions import metrics
from openinteractions.db.engine import LOST, Database
from openinteractions.errors import LeaseLost
from openinteractions.events.follow import listen
from openinteractions.jobs import queue
from openinteractions.jobs.queue import Job, Share

_log = structlog.get_logger(__name__)

Handler: TypeAlias = Callable[[Job], Awaitable[None]]
_SAFETY_POLL_S = 5.0
_STOP_GRACE_S = 10.0
_CLAIM_BATCH = 100


@dataclass(eq=False)
class Owned:
    """A job that this process runs."""

    epoch: int
    task: asyncio.Task[None]
    cancelled: bool = False
    """The task was stopped because a caller asked for it, not because the lease went."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How often a member beats, and when one is dead."""

    heartbeat: timedelta
    dead_after: timedelta


class Member:
    """This process among the workers."""

    def __init__(self, database: Database, timing: Timing, *, role: str) -> None:
        self._database = database
        self._timing = timing
        self._role = role
        self._owned: dict[UUID, Owned] = {}
        self._unclaimed: set[UUID] = set()
        self._group: asyncio.TaskGroup | None = None
        self._stopping = False
        self.worker_id = 0

    @property
    def running(self) -> int:
        """How many jobs run here."""
        return len(self._owned)

    @property
    def is_stopping(self) -> bool:
        """Whether the process is on its way out and takes nothing new."""
        return self._stopping

    @asynccontextmanager
    async def joined(self) -> AsyncGenerator["Member"]:
        """Be a worker until the context ends; then let the jobs end, or hand them back."""
        host = machine()
        buried = await queue.bury(self._database, host=host, is_alive=is_alive)
        if buried:
            _log.warning("worker.buried", jobs=buried)
        self.worker_id = await self._register()
        async with asyncio.TaskGroup() as group:
            self._group = group
            background = [
                group.create_task(self._beat_for_ever(), name="heartbeat"),
                group.create_task(self._listen_for_cancels(), name="cancel-listener"),
            ]
            try:
                yield self
            finally:
                self._stopping = True
                await self._drain()
                for task in background:
                    task.cancel()
        try:
            await queue.leave(self._database, self.worker_id)
        except LOST:
            _log.warning("worker.leave_failed", worker_id=self.worker_id)

    def own(
        self,
        job_id: UUID,
        epoch: int,
        work: Coroutine[Any, Any, None],
        *,
        is_cancelled: bool = False,
    ) -> asyncio.Task[None]:
        """Run a job's work as a task of this process, independent of whoever asked for it.

        Args:
            job_id: The job.
            epoch: Under which this process has it.
            work: What is run; stopped by `cancel`, by a lost lease, and when the process stops.
            is_cancelled: The work is to end a job that a caller has cancelled: no `cancel` stops
                it again.
        """
        assert self._group is not None, "the member has not joined"
        task = self._group.create_task(self._guard(job_id, work), name=f"job-{job_id.hex}")
        self._owned[job_id] = Owned(epoch, task, is_cancelled)
        metrics.runs_active.set(len(self._owned))
        return task

    def cancel(self, job_id: UUID) -> bool:
        """Stop a job that runs here, because a caller asked for it; False if it does not."""
        owned = self._owned.get(job_id)
        if owned is None:
            return False
        if not owned.cancelled:
            # Once: what follows is its orderly end.
            owned.cancelled = True
            owned.task.cancel()
        return True

    def was_cancelled(self, job_id: UUID) -> bool:
        """Whether `cancel` stopped this job."""
        owned = self._owned.get(job_id)
        return owned is not None and owned.cancelled

    async def _register(self) -> int:
        return await queue.register(
            self._database, host=machine(), pid=os.getpid(), role=self._role
        )

    async def _guard(self, job_id: UUID, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except LeaseLost:
            metrics.leases_lost.inc()
            _log.warning("job.lease_lost", job_id=job_id.hex)
        except LOST as error:
            # The job stays ours in the database; the next beat finds it unowned and gives it back.
            _log.warning("job.database_lost", job_id=job_id.hex, error=type(error).__name__)
        except asyncio.CancelledError:
            _log.info("job.stopped", job_id=job_id.hex)
        except Exception:  # noqa: BLE001 - the job boundary
            _log.exception("job.crashed", job_id=job_id.hex)
        finally:
            owned = self._owned.get(job_id)
            # A later claim of the same job may run here already.
            if owned is not None and owned.task is asyncio.current_task():
                del self._owned[job_id]
            metrics.runs_active.set(len(self._owned))

    async def _drain(self) -> None:
        tasks = [owned.task for owned in self._owned.values()]
        if not tasks:
            return
        _log.info("worker.draining", jobs=len(tasks))
        _, late = await asyncio.wait(tasks, timeout=_STOP_GRACE_S)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_STOP_GRACE_S)

    async def _beat_for_ever(self) -> None:
        dead_after_s = self._timing.dead_after.total_seconds()
        steady_since = last = time.monotonic()
        while True:
            await asyncio.sleep(self._timing.heartbeat.total_seconds())
            try:
                await self._beat()
                now = time.monotonic()
                if now - last > dead_after_s / 2:
                    steady_since = now
                last = now
                # Who could not reach the database for long does not judge who else could (R7).
                if now - steady_since < dead_after_s:
                    continue
                swept = await queue.sweep(self._database, self._timing.dead_after)
                metrics.jobs_swept.inc(swept)
            except LOST as error:
                metrics.database_errors.labels("heartbeat").inc()
                _log.warning("worker.beat_failed", error=type(error).__name__)

    async def _beat(self) -> None:
        mine = await queue.beat(self._database, self.worker_id)
        if mine is None:
            _log.error("worker.declared_dead", worker_id=self.worker_id, jobs=self.running)
            for owned in list(self._owned.values()):
                owned.task.cancel()
            self.worker_id = await self._register()
            return
        for job_id, (epoch, cancel) in mine.items():
            owned = self._owned.get(job_id)
            if owned is None:
                await self._disown(job_id, epoch)
            elif cancel:
                self.cancel(job_id)
        self._unclaimed &= mine.keys()

    async def _disown(self, job_id: UUID, epoch: int) -> None:
        """Hand back a job that nobody here runs, once it was seen so at two beats in a row."""
        if job_id not in self._unclaimed:
            self._unclaimed.add(job_id)
            return
        _log.warning("job.unowned", job_id=job_id.hex)
        await queue.give_up_orphan(self._database, job_id, epoch)

    async def _listen_for_cancels(self) -> None:
        def received(payload: str) -> None:
            self.cancel(UUID(payload))

        await listen(self._database, queue.CANCEL_CHANNEL, received, lambda: None)


def machine() -> str:
    """Names this machine as far as process ids mean the same on it: name, boot and namespace."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        # Nothing to compare with: another process is never taken for a dead one of this machine.
        parts.append(os.urandom(8).hex())
    return "/".join(parts)


def is_alive(pid: int) -> bool:
    """Whether a process id is in use here; one that was used again counts as alive."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Claimer:
    """Claims due jobs for a member and gives each to the handler of its kind."""

    def __init__(
        self,
        database: Database,
        member: Member,
        handlers: Mapping[str, Handler],
        *,
        concurrency: int,
        share: Share,
    ) -> None:
        self._database = database
        self._member = member
        self._handlers = handlers
        self._concurrency = concurrency
        self._share = share
        self._wake = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Claim in the background until the context ends."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._claim_for_ever(), name="claimer"),
                group.create_task(
                    listen(
                        self._database,
                        queue.WAKE_CHANNEL,
                        lambda _: self._wake.set(),
                        self._wake.set,
                    ),
                    name="job-listener",
                ),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    async def _claim_for_ever(self) -> None:
        while True:
            room = min(self._concurrency - self._member.running, _CLAIM_BATCH)
            got = 0
            if room > 0 and not self._member.is_stopping:
                got = await self._claim(room)
            if got == 0 or got < room:
                try:
                    async with asyncio.timeout(_SAFETY_POLL_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()

    async def _claim(self, room: int) -> int:
        try:
            jobs = await queue.claim(
                self._database,
                self._member.worker_id,
                kinds=list(self._handlers),
                limit=room,
                share=self._share,
            )
        except LOST as error:
            _log.warning("worker.claim_failed", error=type(error).__name__)
            return 0
        for job in jobs:
            metrics.jobs_claimed.labels(job.kind).inc()
            _log.info("job.claimed", job_id=job.id.hex, kind=job.kind, epoch=job.epoch)
            task = self._member.own(
                job.id, job.epoch, self._run(job), is_cancelled=job.cancel_requested
            )
            task.add_done_callback(lambda _: self._wake.set())
        return len(jobs)

    async def _run(self, job: Job) -> None:
        await self._handlers[job.kind](job)
