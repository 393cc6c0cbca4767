"""What `app` hands to the resource as its runner, and the worker calls for jobs of kind `run`."""

import asyncio
import time
from dataclasses import asdict, replace
from uuid import UUID

import orjson
import structlog

from openinteractions import clock, metrics
from openinteractions.db.sealed import interaction_purpose
from openinteractions.errors import Invalid, NotFound, SetupError
from openinteractions.events.types import parse_row
from openinteractions.jobs import queue
from openinteractions.jobs.queue import Job
from openinteractions.loop.spec import RunState
from openinteractions.models.port import Warning  # noqa: A004 - the contract's word
from openinteractions.resources.interactions import store as interactions
from openinteractions.resources.interactions.runner import (
    Earlier,
    Ended,
    Lease,
    MemoryRun,
    Prepared,
    Unstored,
)
from openinteractions.resources.interactions.store import Interaction
from openinteractions.runs import prepare, store, stored
from openinteractions.runs.agents import resolve
from openinteractions.runs.agents.resolve import Agent
from openinteractions.runs.brief import of_model
from openinteractions.runs.house import House
from openinteractions.runs.stored import StoredRun
from openinteractions.runs.unstored import InMemory
from openinteractions.wire.create import CreateInteraction
from openinteractions.wire.fields import Json

_log = structlog.get_logger(__name__)

_CANCEL_GRACE_S = 0.5
_ENDING_S = 10.0
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
        self, project_id: UUID, request: CreateInteraction, base_url: str, earlier: Earlier | None
    ) -> Prepared:
        """Resolve a request and make sure that its model or agent can serve it."""
        house = self._house
        agent = None
        if request.agent is None:
            brief = of_model(request)
        else:
            agent = await resolve.find(house.agents, project_id, request)
            _require_environment(agent, request, earlier)
            brief = resolve.brief(
                agent,
                request,
                default_model=house.agent_model,
                today=clock.now().date(),
                network=_network(request.environment),
            )
        around = prepare.Surroundings(
            catalog=house.catalog,
            inliner=house.inliner(project_id),
            defaults=house.limits,
            base_url=base_url,
            powers=await house.powers(
                project_id,
                brief.tools,
                is_sandbox_optional=agent is not None and not agent.base.needs_environment,
            ),
            pending=() if earlier is None else earlier.pending,
        )
        prepared = await prepare.prepare(request, brief, around)
        if not prepared.needs_environment:
            return prepared
        if prepared.needs_sandbox:
            await house.sandboxes.require_broker()
        environment = await self._environment(project_id, request, agent, earlier)
        inherited = None if earlier is None else earlier.environment_id
        warnings = prepared.warnings
        if (
            request.environment is None
            and agent is None
            and inherited not in (None, environment)
            and await house.sandboxes.was_used(project_id, inherited)
        ):
            text = "The environment of the previous interaction is gone: this one has a new one."
            gone = Warning("environment_gone", "environment", text)
            warnings = [*warnings, asdict(gone)]
        return replace(
            prepared,
            warnings=warnings,
            environment_id=environment,
            is_environment_new=environment != inherited
            and not prepare.names_one(request.environment),
        )

    async def discard(self, project_id: UUID, prepared: Prepared) -> None:
        """Take back what was made for a request that came to nothing."""
        if prepared.environment_id is not None and prepared.is_environment_new:
            await self._house.sandboxes.discard(project_id, prepared.environment_id)

    async def _environment(
        self,
        project_id: UUID,
        request: CreateInteraction,
        agent: Agent | None,
        earlier: Earlier | None,
    ) -> UUID:
        """Where a run works: as it asks, else where the interaction before it did, else anew.

        A custom agent begins anew with each call that names no environment, unless it is to go on
        with what it has begun.
        """
        house = self._house
        inherited = None if earlier is None else earlier.environment_id
        custom = None if agent is None else agent.custom
        if custom is not None and (request.environment is not None or not request.answers):
            return await house.agents.environment_for(project_id, custom, request.environment)
        if request.environment is not None:
            return await house.sandboxes.resolve(project_id, request.environment)
        if inherited is not None:
            try:
                return await house.sandboxes.inherit(project_id, inherited)
            except NotFound as error:
                # Where nothing was done in it, a new one is the same.
                if agent is not None and await house.sandboxes.was_used(project_id, inherited):
                    raise NotFound(
                        f"{error.message} It was the previous interaction's: name another one in "
                        "'environment', or \"remote\" for a new one."
                    ) from error
        if custom is not None:
            return await house.agents.environment_for(project_id, custom, None)
        # Nobody has asked for one, and the model may never need it.
        return await house.sandboxes.derive(project_id, None, is_tentative=True)

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
            secrets=lease.secrets,
        )
        return self._own(run)

    def start_in_memory(self, unstored: Unstored) -> MemoryRun:
        """Run an interaction that is not stored."""
        return InMemory(self._house, unstored)

    async def cancel(self, project_id: UUID, interaction_id: UUID) -> None:
        """Ask the owner to stop; after a short grace, take the run over and end it (ruling R10)."""
        house = self._house
        if not house.member.cancel(interaction_id):
            await queue.request_cancel(house.database, interaction_id)
        patience_s = _CANCEL_GRACE_S
        while not await self._ends_within(patience_s, project_id, interaction_id):
            if house.member.was_cancelled(interaction_id) and patience_s < _ENDING_S:
                # This process is at it; what it ends may take its time.
                patience_s = _ENDING_S
                continue
            epoch = await store.steal(house.database, interaction_id, self.worker_id)
            run = None if epoch is None else await self._load(interaction_id, epoch)
            if run is None:
                return
            run.is_cancelled = True
            if await self._own(run, is_cancelled=True) is not None:
                return
            # Lost to another cancel, or to a worker that claimed it in this instant: look again,
            # and longer, since that one is ending it.
            patience_s *= 2

    def _own(self, run: StoredRun, *, is_cancelled: bool = False) -> "asyncio.Future[Ended | None]":
        """Drive a run as this process's own; the result is None if it was lost or stopped."""
        future: asyncio.Future[Ended | None] = asyncio.get_running_loop().create_future()
        task = self._house.member.own(
            run.interaction.id,
            run.epoch,
            self._drive_for(future, run),
            is_cancelled=is_cancelled,
        )
        # Also where the task was cancelled before it began.
        task.add_done_callback(lambda _: future.done() or future.set_result(None))
        return future

    async def _ends_within(self, seconds: float, project_id: UUID, interaction_id: UUID) -> bool:
        deadline = time.monotonic() + seconds
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

    def _opened(self, row: Interaction, sealed: bytes | None) -> Json | None:
        """The request's secrets; None also where the key that they were sealed with is gone."""
        if sealed is None:
            return None
        purpose = interaction_purpose(row.project_id, row.id)
        try:
            return orjson.loads(self._house.sealer.open(sealed, purpose=purpose))
        except SetupError as error:
            # What needs them is refused by whom it asks, and says so.
            _log.error("run.secrets_unreadable", interaction_id=row.id.hex, why=error.message)
            return None

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
            secrets=self._opened(row, loaded.sealed),
            inputs=parsed[: row.input_count],
            generated=parsed[row.input_count :],
            shown=shown,
        )


def _require_environment(agent: Agent, request: CreateInteraction, earlier: Earlier | None) -> None:
    """The hosted API asks for it, and so does who wants to find the files again."""
    is_there = request.environment is not None or (
        earlier is not None and earlier.environment_id is not None
    )
    if agent.base.needs_environment and agent.custom is None and not is_there:
        raise Invalid(
            f"The agent '{agent.name}' needs an 'environment': give \"remote\" for a new one, or "
            "the id of one that you have."
        )


def _network(environment: str | Json | None) -> str | Json | None:
    """The rules that a request itself gives."""
    return environment.get("network") if isinstance(environment, dict) else None
