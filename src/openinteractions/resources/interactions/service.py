"""What can be done with interactions. Routes call this; this calls the store and the runner."""

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from uuid import UUID

import orjson
import structlog

from openinteractions import ids, tracing
from openinteractions.api import pages
from openinteractions.api.pages import Page
from openinteractions.api.scope import Caller
from openinteractions.crypto import Sealer
from openinteractions.db.engine import LOST, Database
from openinteractions.db.sealed import interaction_purpose
from openinteractions.errors import Conflict, Invalid, NotFound, RequestError, Unready
from openinteractions.events.follow import Hub, Tail
from openinteractions.events.types import CREATED, IN_PROGRESS, Event, first_seq, join
from openinteractions.jobs import queue
from openinteractions.resources.files import media
from openinteractions.resources.files import store as files
from openinteractions.resources.interactions import pending, render, store
from openinteractions.resources.interactions.lost import LostResponses
from openinteractions.resources.interactions.recent import RecentRows
from openinteractions.resources.interactions.runner import (
    Earlier,
    Ended,
    Lease,
    MemoryRun,
    Prepared,
    Runner,
    Unstored,
)
from openinteractions.resources.interactions.store import (
    Interaction,
    NewInteraction,
    Place,
    StoredStep,
)
from openinteractions.wire.create import CreateInteraction
from openinteractions.wire.environments import environment_id
from openinteractions.wire.events import created, encode, status_update
from openinteractions.wire.fields import Json

_log = structlog.get_logger(__name__)

_OWNED = 1
"""The epoch of a run that its creator owns; one that is left to the queue begins at 0."""
_LOST_WITHIN = timedelta(seconds=30)
_RANK = {
    "priority": timedelta(seconds=-60),
    "standard": timedelta(0),
    "flex": timedelta(minutes=2),
    "deferred": timedelta(minutes=10),
}
"""How far a service tier moves a job in its project's line."""
_POLL_S = 1.0
_LOOKS = 20
_LOOK_AGAIN_S = 0.25


@dataclass(frozen=True, slots=True)
class Service:
    """The resource's connections to the rest of the house."""

    database: Database
    hub: Hub
    tail: Tail
    runner: Runner
    lost: LostResponses
    recent: RecentRows
    retention: timedelta
    sealer: Sealer
    max_attempts: int
    """Deaths of its workers without progress after which a run is failed."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The interaction that a new one continues."""

    row: Interaction
    cut: int | None
    """The last of its steps that counts; None: all."""
    pending: list[Json] = field(default_factory=list[Json])
    """Its calls without a result."""

    @property
    def earlier(self) -> Earlier:
        """What the runner has to know of it."""
        return Earlier(environment_id=self.row.environment_id, pending=self.pending)


async def get(service: Service, caller: Caller, interaction_id: str) -> Interaction:
    """Find an interaction by its public id.

    Raises:
        NotFound: It is absent, deleted, or another project's.
    """
    key = ids.parse_interaction_id(interaction_id)
    row = None if key is None else await store.get(service.database, caller.project_id, key)
    if row is None:
        raise NotFound(f"Interaction '{interaction_id[:80]}' not found.")
    return row


async def steps_of(service: Service, row: Interaction, *, start: int = 0) -> list[StoredStep]:
    """An interaction's steps with their media inline."""
    return await inline(
        service, row.project_id, await store.steps(service.database, row, start=start)
    )


async def inline(
    service: Service, project_id: UUID, steps: Sequence[StoredStep]
) -> list[StoredStep]:
    """Steps with their media put back, for a reader."""
    if not any(step.media for step in steps):
        return list(steps)
    parsed = {step.index: orjson.loads(step.data) for step in steps if step.media}
    blobs = await files.get(service.database, project_id, media.hashes(list(parsed.values())))
    return [
        replace(
            step,
            media=False,
            data=orjson.dumps(media.put_back(parsed[step.index], blobs, for_model=False)),
        )
        if step.media
        else step
        for step in steps
    ]


@dataclass(frozen=True, slots=True)
class Started:
    """A stored interaction that was just created and runs."""

    row: Interaction
    ended: Awaitable[Ended | None] | None
    """Its end, where this process runs it."""
    first_events: list[Event]
    """Empty where no stream was asked for."""
    first_seq: int
    """The number of the first of them in the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A create as it came, beside what it says."""

    request: CreateInteraction
    digest: bytes
    """SHA-256 of the body."""
    idempotency_key: str | None
    base_url: str
    """Where the caller reaches this server."""


async def find_earlier(service: Service, caller: Caller, asked: Asked) -> Interaction | None:
    """The interaction that this very request has made before, if it is to be joined.

    That is one with the same Idempotency-Key; without a key, one whose answer is known to have been
    lost a moment ago, as when an SDK repeats a create over a new connection (ruling R15).

    Raises:
        Conflict: The key was used for another request.
    """
    key = asked.idempotency_key
    if key is None:
        if not service.lost.is_any:
            return None
        return await store.take_lost(
            service.database, caller.project_id, caller.key_id, asked.digest, within=_LOST_WITHIN
        )
    found = await store.find_idempotent(service.database, caller.project_id, key)
    if found is None:
        return None
    row, digest = found
    if digest != asked.digest:
        raise Conflict("The Idempotency-Key was used for another request already.")
    return row


async def create_stored(service: Service, caller: Caller, asked: Asked) -> Started:
    """Write an interaction with its input, and start its run here or leave it to the queue."""
    request = asked.request
    parent = await _parent(service, caller, request, remembered=True)
    prepared = await service.runner.prepare(
        caller.project_id,
        request,
        asked.base_url,
        None if parent is None else parent.earlier,
    )
    try:
        return await _created(service, caller, asked, prepared, parent)
    except (RequestError, store.KeyTaken):
        await service.runner.discard(caller.project_id, prepared)
        raise


async def _created(
    service: Service, caller: Caller, asked: Asked, prepared: Prepared, parent: Parent | None
) -> Started:
    # At the end of its line is where most turns go; who finds that place taken opens a new line.
    for branch in (False, True, True):
        if branch:
            parent = await _parent(service, caller, asked.request)
        place = _place(parent, branch=branch)
        started = await _try_create(service, caller, asked, prepared, parent, place)
        if started is not None:
            return started
        if parent is not None:
            service.recent.forget(caller.project_id, parent.row.id)
    raise Unready("Too many interactions continue the same one at once.", retry_after_s=1)


async def result(service: Service, caller: Caller, started: Started) -> bytes:
    """Wait for a new interaction's end and render it, with the steps that it generated.

    Should another worker take the run over, its end is waited for all the same.
    """
    ended = None if started.ended is None else await started.ended
    if ended is not None:
        row = _finished(started.row, ended)
        service.recent.keep(row)
        return render.interaction(row, await inline(service, row.project_id, ended.steps))
    return await later_result(service, caller, started.row)


async def later_result(service: Service, caller: Caller, row: Interaction) -> bytes:
    """Wait for the end of an interaction that runs elsewhere, and render it as its create would."""
    row = await _wait_for_end(service, caller, row)
    return render.interaction(row, await steps_of(service, row, start=row.input_count))


async def _wait_for_end(service: Service, caller: Caller, row: Interaction) -> Interaction:
    with service.hub.subscribe(row.id) as subscription:
        while row.is_running:
            subscription.wake.clear()
            # A 503 would make the SDK repeat the create while its run is alive.
            with contextlib.suppress(*LOST):
                row = await get(service, caller, ids.interaction_id(row.id))
            if row.is_running:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await subscription.wake.wait()
    return row


async def lost(service: Service, row: Interaction, asked: Asked) -> None:
    """The caller of a create went away before its answer; a retry of the request joins it."""
    with contextlib.suppress(*LOST):
        await store.record_lost(service.database, row, asked.digest)


async def listing(
    service: Service,
    caller: Caller,
    narrow: store.Filter,
    page: Page,
) -> bytes:
    """One page of a project's interactions."""
    marks = asdict(narrow)
    before = page.after(marks)
    found = await store.page(
        service.database, caller.project_id, narrow, before=before, limit=page.limit
    )
    rows, last = page.cut(found)
    token = None if last is None else pages.token(last.id, marks)
    return render.page([render.interaction(row, None) for row in rows], token)


async def create_unstored(
    service: Service, caller: Caller, request: CreateInteraction, base_url: str
) -> MemoryRun:
    """Start an interaction that leaves nothing behind but what it cost (ruling R16)."""
    parent = await _parent(service, caller, request)
    row = None if parent is None else parent.row
    prepared = await service.runner.prepare(
        caller.project_id,
        request,
        base_url,
        None if parent is None else replace(parent.earlier, environment_id=None),
    )
    place = None
    if row is not None:
        place = Place(segment_id=row.segment_id, depth=row.depth)
    return service.runner.start_in_memory(
        Unstored(
            project_id=caller.project_id,
            key_id=caller.key_id,
            is_budgeted=caller.is_budgeted,
            model=request.model,
            spec=prepared.spec,
            steps=prepared.steps,
            history=place,
            history_idx=None if parent is None else parent.cut,
            warnings=prepared.warnings,
            stream=request.stream,
            environment_id=prepared.environment_id,
            secrets=prepared.secrets,
        )
    )


async def cancel(service: Service, caller: Caller, interaction_id: str) -> Interaction:
    """Stop an interaction; one that has ended is returned as it is."""
    row = await get(service, caller, interaction_id)
    if row.is_running:
        await service.runner.cancel(caller.project_id, row.id)
        row = await get(service, caller, interaction_id)
    return row


async def delete(service: Service, caller: Caller, interaction_id: str) -> None:
    """Delete an interaction for good; one that runs is cancelled first."""
    row = await get(service, caller, interaction_id)
    if row.is_running:
        await service.runner.cancel(caller.project_id, row.id)
    if not await store.delete(service.database, caller.project_id, row.id):
        raise NotFound(f"Interaction '{interaction_id[:80]}' not found.")
    service.recent.forget(caller.project_id, row.id)
    service.hub.wake(row.id)
    _log.info("interaction.deleted", interaction_id=row.id.hex)


# ---- continuing a conversation


async def _parent(
    service: Service, caller: Caller, request: CreateInteraction, *, remembered: bool = False
) -> Parent | None:
    """The interaction to continue, if there is one, in a state that can be continued.

    `remembered` allows a row from memory; the create statement then makes sure of it.
    """
    if request.previous_interaction_id is None:
        return None
    key = ids.parse_interaction_id(request.previous_interaction_id) if remembered else None
    row = None if key is None else service.recent.find(caller.project_id, key)
    if row is None:
        row = await get(service, caller, request.previous_interaction_id)
    if row.is_running:
        raise Invalid(
            f"Interaction '{request.previous_interaction_id}' is still {row.status}: "
            "wait for its end, or cancel it, before continuing it."
        )
    cut = request.branch_step
    waiting: list[Json] = []
    if cut is not None or row.status == "requires_action" or request.answers:
        waiting = await _pending_calls(service, row, cut)
    pending.require_answers([call["id"] for call in waiting], request.answers)
    return Parent(row, cut, waiting)


async def _pending_calls(service: Service, row: Interaction, cut: int | None) -> list[Json]:
    rows = await store.steps(service.database, row)
    if cut is not None and cut >= len(rows):
        raise Invalid(
            f"Invalid value for 'previous_interaction_id': the interaction has {len(rows)} steps, "
            f"so there is no step {cut}."
        )
    steps = [orjson.loads(stored.data) for stored in rows]
    return pending.at(steps, cut, given=row.input_count)


# ---- creating


async def _try_create(
    service: Service,
    caller: Caller,
    asked: Asked,
    prepared: Prepared,
    parent: Parent | None,
    place: Place,
) -> Started | None:
    """One try; None if another turn took the place, or the parent was deleted, meanwhile."""
    request = asked.request
    interaction_id = ids.uuid7()
    # What works in a sandbox waits for its turn there, and may outlive its caller.
    is_queued = request.background or prepared.environment_id is not None
    epoch = 0 if is_queued else _OWNED
    steps = await _store_media(service, caller.project_id, prepared, place)
    first_events = _first_events(interaction_id, request, prepared) if request.stream else []
    start = first_seq(epoch) + 1
    new = NewInteraction(
        id=interaction_id,
        project_id=caller.project_id,
        key_id=caller.key_id,
        place=place,
        previous_id=None if parent is None else parent.row.id,
        model=request.model,
        agent=request.agent,
        background=request.background,
        logged=request.stream,
        input_form=request.input_form,
        steps=steps,
        labels=orjson.dumps(request.labels).decode() if request.labels else None,
        echo=orjson.dumps(_echo(request, parent)),
        spec=prepared.spec,
        warnings=orjson.dumps(prepared.warnings) if prepared.warnings else None,
        retention=caller.retention or service.retention,
        provider=prepared.provider,
        created_by=service.runner.worker_id,
        worker_id=None if is_queued else service.runner.worker_id,
        first_seq=start,
        first_events=join(first_events),
        rank=_RANK[request.service_tier or "standard"],
        max_attempts=service.max_attempts,
        webhook=None if request.webhook_config is None else orjson.dumps(request.webhook_config),
        idempotency_key=asked.idempotency_key,
        request_hash=asked.digest,
        environment_id=prepared.environment_id,
        trace=orjson.dumps(tracing.carrier()).decode(),
        sealed=_sealed(service, caller.project_id, interaction_id, prepared),
        consents=prepared.consents,
    )
    try:
        created_at = await store.create(service.database, new)
    except store.ConsentUsed:
        raise Invalid(
            "What was approved has been carried out already, by another interaction that continues "
            f"'{request.previous_interaction_id}'. Continue that one."
        ) from None
    except LOST:
        created_at = await _find_out(service, new)
    if created_at is None:
        return None
    row = _row(new, created_at)
    if is_queued:
        await queue.wake(service.database)
        return Started(row, None, first_events, start)
    lease = Lease(
        interaction=row,
        spec=prepared.spec,
        plan=prepared.plan,
        steps=prepared.steps,
        epoch=epoch,
        events_written=len(first_events),
        key_id=caller.key_id,
        is_budgeted=caller.is_budgeted,
        secrets=prepared.secrets,
    )
    return Started(row, service.runner.start(lease), first_events, start)


async def _find_out(service: Service, new: NewInteraction) -> datetime:
    """Whether a create took effect whose answer was lost with the database connection.

    Raises one of `LOST` if it did not, or if nobody can tell yet; nothing was accepted then, or
    the next heartbeat finds the run without an owner and sees to it.
    """
    for _ in range(_LOOKS):
        await asyncio.sleep(_LOOK_AGAIN_S)
        with contextlib.suppress(*LOST):
            row = await store.get(service.database, new.project_id, new.id)
            if row is not None:
                return row.created_at
            break
    raise ConnectionResetError("the database was lost while an interaction was created")


def _sealed(
    service: Service, project_id: UUID, interaction_id: UUID, prepared: Prepared
) -> bytes | None:
    """The request's secrets as the row keeps them (ruling R22)."""
    if prepared.secrets is None:
        return None
    purpose = interaction_purpose(project_id, interaction_id)
    return service.sealer.seal(orjson.dumps(prepared.secrets), purpose=purpose)


def _place(parent: Parent | None, *, branch: bool) -> Place:
    if parent is None:
        return Place(segment_id=ids.uuid7(), depth=0)
    row = parent.row
    if parent.cut is None and not branch:
        return Place(segment_id=row.segment_id, depth=row.depth + 1)
    return Place(
        segment_id=ids.uuid7(),
        depth=row.depth + 1,
        parent_id=row.segment_id,
        parent_depth=row.depth,
        parent_idx=parent.cut,
    )


async def _store_media(
    service: Service, project_id: UUID, prepared: Prepared, place: Place
) -> list[StoredStep]:
    steps: list[StoredStep] = []
    blobs: list[media.Blob] = []
    for index, step in enumerate(prepared.steps):
        bare, taken = media.take_out(step)
        blobs += taken
        steps.append(
            StoredStep(index, step["type"], bool(media.hashes([bare])), orjson.dumps(bare))
        )
    await files.put(
        service.database, project_id, blobs, segment_id=place.segment_id, depth=place.depth
    )
    return steps


def _first_events(
    interaction_id: UUID, request: CreateInteraction, prepared: Prepared
) -> list[Event]:
    public = ids.interaction_id(interaction_id)
    shown = {
        "id": public,
        "object": "interaction",
        "status": "in_progress",
        "model": request.model,
        "agent": request.agent,
        "service_tier": request.echo.get("service_tier"),
    }
    if prepared.environment_id is not None:
        shown["environment_id"] = environment_id(prepared.environment_id)
    return [
        Event("c", CREATED, encode(created(shown))),
        Event("u", IN_PROGRESS, encode(status_update(public, "in_progress"))),
    ]


def _echo(request: CreateInteraction, parent: Parent | None) -> dict[str, object]:
    """What responses repeat. The previous id has a column of its own, which knows of no step."""
    rest = {k: v for k, v in request.echo.items() if k != render.PREVIOUS}
    if parent is None or parent.cut is None:
        return rest
    return {render.PREVIOUS: f"{ids.interaction_id(parent.row.id)}@{parent.cut}", **rest}


def _row(new: NewInteraction, created_at: datetime) -> Interaction:
    return Interaction(
        id=new.id,
        project_id=new.project_id,
        segment_id=new.place.segment_id,
        depth=new.place.depth,
        previous_id=new.previous_id,
        status="in_progress",
        model=new.model,
        agent=new.agent,
        background=new.background,
        logged=new.logged,
        input_form=new.input_form,
        input_count=len(new.steps),
        echo=new.echo,
        usage=None,
        errors=None,
        warnings=new.warnings,
        created_at=created_at,
        updated_at=created_at,
        environment_id=new.environment_id,
    )


def _finished(row: Interaction, ended: Ended) -> Interaction:
    """An interaction's row as its run left it, without reading it again."""
    return replace(
        row,
        status=ended.status,
        updated_at=ended.updated_at,
        usage=ended.usage,
        errors=ended.errors,
        warnings=ended.warnings,
    )
