"""What `app` hands to the resource as its runner, and the worker calls for jobs of kind `run`."""

import asyncio
import contextlib
import time
from dataclasses import replace
from uuid import UUID

import orjson
import structlog

from openinteractions import metrics
from openinteractions.errors import LeaseLost, NotFound
from openinteractions.events.types import parse_row
from openinteractions.jobs import queue
from openinteractions.jobs.queue import Job
from openinteractions.loop.spec import RunState
from openinteractions.resources.interactions import store as interactions
from openinteractions.resources.interactions.runner import (
    Ended,
    Lease,
    MemoryRun,
    Prepared,
    Unstored,
)
from openinteractions.runs import prepare, store, stored
from openinteractions.runs.house import House
from openinteractions.runs.stored import StoredRun
from openinteractions.runs.unstored import InMemory
from openinteractions.wire.create import CreateInteraction
from openinteractions.wire.environments import environment_id

_log = structlog.get_logger(__name__)

_CANCEL_GRACE_S = 0.5
_LOOK_S = 0.02


class Executor:
    """Runs interactions. Implements `resources.interactions.runner.Runner`."""

    def __init__(self, house: House) -> None:
        self._house = house

    @property
    def worker_id(self) -> int:
        """This process among the workers."""
        return self._house.member.worker_id

    async def prepare(
        self, project_id: UUID, request: CreateInteraction, base_url: str, inherited: UUID | None
    ) -> Prepared:
        """Resolve a request and make sure that its model can serve it."""
        house = self._house
        prepared = await prepare.prepare(
            request,
            house.catalog,
            house.inliner(project_id),
            defaults=house.limits,
            base_url=base_url,
            vendor_runs_code=house.vendor_runs_code,
        )
        if prepared.needs_environment:
            if prepared.needs_sandbox:
                await house.sandboxes.require_broker()
            environment_id = await self._environment(project_id, request, inherited)
            return replace(prepared, environment_id=environment_id)
        return prepared

    async def _environment(
        self, project_id: UUID, request: CreateInteraction, inherited: UUID | None
    ) -> UUID:
        """Where a run works: as it asks, else where the interaction before it did, else anew."""
        sandboxes = self._house.sandboxes
        if request.environment is not None:
            return await sandboxes.resolve(project_id, request.environment)
        if inherited is not None:
            # It may have expired meanwhile.
            with contextlib.suppress(NotFound):
                return await sandboxes.resolve(project_id, environment_id(inherited))
        return await sandboxes.resolve(project_id, "remote")

    def start(self, lease: Lease) -> "asyncio.Future[Ended | None]":
        """Run a stored interaction that this process has owned since its create."""
        run = StoredRun(
            interaction=lease.interaction,
            spec=lease.spec,
            state=RunState(),
            epoch=lease.epoch,
            key_id=lease.key_id,
            is_budgeted=lease.is_budgeted,
            inputs=lease.steps,
            plan=lease.plan if isinstance(lease.plan, prepare.Plan) else None,
            events_written=lease.events_written,
        )
        future: asyncio.Future[Ended | None] = asyncio.get_running_loop().create_future()
        task = self._house.member.own(
            lease.interaction.id, lease.epoch, self._drive_for(future, run)
        )
        # Also where the task was cancelled before it began.
        task.add_done_callback(lambda _: future.done() or future.set_result(None))
        return future

    def start_in_memory(self, unstored: Unstored) -> MemoryRun:
        """Run an interaction that is not stored."""
        return InMemory(self._house, unstored)

    async def cancel(self, project_id: UUID, interaction_id: UUID) -> None:
        """Ask the owner to stop; after a short grace, take the run over and end it (ruling R10)."""
        house = self._house
        if not house.member.cancel(interaction_id):
            await queue.request_cancel(house.database, interaction_id)
        while not await self._ends_within_grace(project_id, interaction_id):
            epoch = await store.steal(house.database, interaction_id, self.worker_id)
            run = None if epoch is None else await self._load(interaction_id, epoch)
            if run is None:
                return
            run.is_cancelled = True
            # Lost to another cancel, or to a worker that claimed it in this instant: look again.
            with contextlib.suppress(LeaseLost):
                await stored.drive(house, run)
                return

    async def _ends_within_grace(self, project_id: UUID, interaction_id: UUID) -> bool:
        deadline = time.monotonic() + _CANCEL_GRACE_S
        while time.monotonic() < deadline:
            row = await interactions.get(self._house.database, project_id, interaction_id)
            if row is None or not row.is_running:
                return True
            await asyncio.sleep(_LOOK_S)
        return False

    async def run_job(self, job: Job) -> None:
        """Take over a run whose owner was lost, and see it to its end."""
        if job.attempt > job.max_attempts + 1:
            # Not even its end could be written: its rows are more than this version understands.
            await stored.give_up(self._house, job.id, job.epoch)
            return
        run = await self._load(job.id, job.epoch)
        if run is None:
            await queue.drop(self._house.database, job)
            return
        run.trace = job.args
        if job.epoch > 1:
            metrics.takeovers.inc()
        run.is_cancelled = job.cancel_requested
        run.is_hopeless = job.attempt > job.max_attempts
        await stored.drive(self._house, run)

    async def _drive_for(self, future: "asyncio.Future[Ended | None]", run: StoredRun) -> None:
        ended: Ended | None = None
        try:
            ended = await stored.drive(self._house, run)
        finally:
            if not future.done():
                future.set_result(ended)

    async def _load(self, interaction_id: UUID, epoch: int) -> StoredRun | None:
        """A run as its rows stand; None if there is nothing left to run."""
        database = self._house.database
        loaded = await store.load(database, interaction_id)
        if loaded is None or not loaded.interaction.is_running:
            return None
        row = loaded.interaction
        steps = await interactions.steps(database, row)
        shown = []
        if row.logged:
            rows = await store.takeover_events(database, row)
            shown = [event for data in rows for event in parse_row(data)]
        parsed = [orjson.loads(step.data) for step in steps]
        return StoredRun(
            interaction=row,
            spec=loaded.spec,
            state=RunState.load(loaded.run_state),
            epoch=epoch,
            key_id=loaded.key_id,
            is_budgeted=loaded.is_budgeted,
            webhook=loaded.webhook,
            inputs=parsed[: row.input_count],
            generated=parsed[row.input_count :],
            shown=shown,
        )
