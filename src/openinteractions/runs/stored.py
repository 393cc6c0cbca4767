"""Driving one stored run: from its rows, through the loop, to its end."""

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field, replace
from uuid import UUID

import orjson
import structlog

from openinteractions import clock, ids, metrics, tracing
from openinteractions.db.engine import LOST
from openinteractions.errors import EngineError, LeaseLost, RequestError
from openinteractions.events.log import Stream
from openinteractions.events.types import ENDED, Event, Position, first_seq, join
from openinteractions.jobs import queue
from openinteractions.loop.context import cut_mark, resumption_note
from openinteractions.loop.run import Outcome, Run
from openinteractions.loop.spec import RunSpec, RunState
from openinteractions.loop.turn import RPC_UNAVAILABLE, fold, whole_step_events
from openinteractions.models.port import Json
from openinteractions.resources.interactions.runner import Ended
from openinteractions.resources.interactions.store import Interaction
from openinteractions.resources.webhooks.service import EVENTS
from openinteractions.runs import equip, store
from openinteractions.runs.equip import Kit
from openinteractions.runs.history import Ready
from openinteractions.runs.house import House
from openinteractions.runs.journal import DatabaseJournal
from openinteractions.runs.prepare import Plan
from openinteractions.runs.purse import DayPurse
from openinteractions.runs.store import Ending, Line, Progress, Spend
from openinteractions.wire.environments import environment_id
from openinteractions.wire.events import (
    completed,
    encode,
    error,
    status_update,
    step_delta,
    step_stop,
)
from openinteractions.wire.usage import EMPTY_USAGE

_log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class StoredRun:
    """A run that this process owns, as its rows stand."""

    interaction: Interaction
    spec: bytes
    state: RunState
    epoch: int
    key_id: UUID | None
    is_budgeted: bool
    inputs: list[Json]
    generated: list[Json] = field(default_factory=list[Json])
    """Committed steps that it has generated so far."""
    events_written: int = 0
    """By this epoch, before the run began."""
    shown: list[Event] = field(default_factory=list[Event])
    """Everything that readers have seen, where an earlier owner was cut off."""
    plan: Plan | None = None
    """What its preparation in this process has worked out."""
    webhook: bytes | None = None
    """The request's `webhook_config`, JSON."""
    secrets: Json | None = field(default=None, repr=False)
    """Those of the request, opened."""
    trace: dict[str, str] | None = None
    """The trace to continue, where the run was not started by a request in this process."""
    is_cancelled: bool = False
    """It is to end at once."""
    is_hopeless: bool = False
    """Its workers died of it too often: it is to end as failed (ruling R6)."""


async def drive(house: House, stored: StoredRun) -> Ended:
    """Run to the end and write it.

    Raises:
        LeaseLost: Another worker owns the run.
        CancelledError: The process stops; the run goes on elsewhere.
    """
    row = stored.interaction
    # So that whatever its tools log can be found by it.
    structlog.contextvars.bind_contextvars(interaction_id=row.id.hex)
    with tracing.span(
        "interaction",
        parent=stored.trace,
        attributes={
            "oi.interaction_id": ids.interaction_id(row.id),
            "oi.epoch": stored.epoch,
            "gen_ai.request.model": row.model or "",
        },
    ) as span:
        ended = await _drive(house, stored)
        span.set_attribute("oi.status", ended.status)
        return ended


async def give_up(house: House, interaction_id: UUID, epoch: int) -> None:
    """End a run as failed without looking at what it has done (ruling R6)."""
    message = "The run could not be taken up again."
    failure = [{"code": "worker_lost", "message": message}]
    event = Event("e", ENDED, encode(error("worker_lost", message)))
    progress = Progress(
        interaction_id=interaction_id,
        epoch=epoch,
        run_state=b"{}",
        steps=(),
        seq=first_seq(epoch) + 1,
        events=join([event]),
    )
    paid = Spend(
        key_id=None, model="", input_tokens=0, cached_tokens=0, output_tokens=0, cost_nanousd=None
    )
    ending = Ending(
        status="failed",
        usage=orjson.dumps(EMPTY_USAGE),
        errors=orjson.dumps(failure),
        warnings=None,
        spend=paid,
    )
    await store.finish(house.database, progress, ending)
    house.hub.announce([interaction_id])
    _log.error("run.given_up", interaction_id=interaction_id.hex)


async def _drive(house: House, stored: StoredRun) -> Ended:
    row = stored.interaction
    stream = Stream.begin(row.id, stored.epoch, row.created_at, written=stored.events_written)
    journal = DatabaseJournal(
        house.database,
        house.writer,
        house.hub,
        interaction=row,
        stream=stream,
        next_index=row.input_count + len(stored.generated),
    )
    line = None
    if row.depth > 0:
        line = Line(project_id=row.project_id, segment_id=row.segment_id, depth=row.depth - 1)
    plan = stored.plan
    ready = None if plan is None else Ready(plan.target, len(stored.inputs), plan.compiled)
    history = house.history(row.project_id, line, ready)
    purse = DayPurse(house.database, row.project_id, stored.key_id) if stored.is_budgeted else None
    await _close_broken(stored, journal)
    spec = RunSpec.load(stored.spec) if plan is None else plan.spec
    async with _equipped(house, stored, spec) as kit:
        stored.interaction = replace(row, warnings=await journal.warn(kit.warnings))
        run = Run(
            kit.spec,
            stored.state,
            inputs=stored.inputs,
            generated=stored.generated,
            ports=house.ports(history, journal, purse, kit.tools),
        )
        outcome = await _outcome(house, stored, run, kit.failure)
    ended = await _finish(stored, run, journal, outcome)
    if stored.webhook is not None:
        await queue.wake(house.database)
    _remember(house, stored, run)
    return ended


def _equipped(house: House, stored: StoredRun, spec: RunSpec) -> AbstractAsyncContextManager[Kit]:
    row = stored.interaction
    return house.equipment.kit(
        equip.Run(
            spec=spec,
            project_id=row.project_id,
            interaction_id=row.id,
            environment_id=row.environment_id,
            epoch=stored.epoch,
            secrets=stored.secrets,
            is_ending=stored.is_cancelled or stored.is_hopeless,
        )
    )


async def _outcome(  # noqa: PLR0911 - one for each way to end
    house: House, stored: StoredRun, run: Run, failure: RequestError | None
) -> Outcome:
    """Drive the loop; a limit of time, a cancel and a bug are outcomes too."""
    interaction_id = stored.interaction.id
    if stored.is_cancelled:
        await run.interrupt("The interaction was cancelled.")
        return Outcome("cancelled")
    if stored.is_hopeless:
        message = "The run's workers died too often without progress."
        await run.interrupt(message)
        return Outcome("failed", [{"code": "worker_lost", "message": message}])
    if failure is not None:
        await run.interrupt(failure.message)
        return Outcome("failed", [{"code": failure.code, "message": failure.message}])
    try:
        return await run.drive()
    except asyncio.CancelledError:
        if not house.member.was_cancelled(interaction_id):
            raise
        await run.interrupt("The interaction was cancelled.")
        return Outcome("cancelled")
    except (LeaseLost, *LOST):
        raise
    except EngineError as fault:
        await run.interrupt(fault.message)
        return Outcome("failed", [{"code": fault.code, "message": fault.message}])
    except Exception:  # noqa: BLE001 - a bug ends its run, not its worker
        _log.exception("run.crashed", interaction_id=interaction_id.hex)
        await run.interrupt("Internal error.")
        message = "Internal error. The server's log has the details."
        return Outcome("failed", [{"code": "internal", "message": message}])


async def _close_broken(stored: StoredRun, journal: DatabaseJournal) -> None:
    """Invariant 3 after a takeover: what readers saw of an unfinished turn stays, marked."""
    shown = fold(stored.shown)[len(stored.generated) :]
    if not shown:
        return
    goes_on = not (stored.is_cancelled or stored.is_hopeless)
    fault = {"code": RPC_UNAVAILABLE, "message": "The worker that ran this was lost."}
    steps = [step for step, _ in shown]
    answers = [step for step in steps if step["type"] == "model_output"]
    for step in answers:
        step["error"] = fault
    first = len(stored.generated)
    last, is_finished = shown[-1]
    if not is_finished:
        index = first + len(steps) - 1
        if goes_on and last["type"] == "model_output":
            last["content"] = [*last.get("content", ()), cut_mark()]
            position = Position(index, stored.shown[-1].position.offset + 1)
            delta = encode(step_delta(index, cut_mark()))
            journal.hold(Event("d", position, delta))
        journal.hold(Event.stop(index, encode(step_stop(index))))
    if goes_on:
        if answers and (is_finished or last["type"] != "model_output"):
            steps.append({"type": "model_output", "content": [cut_mark()], "error": fault})
            journal.hold(*whole_step_events(first + len(steps) - 1, steps[-1]))
        note = resumption_note(
            kind="resumed",
            text="The answer was interrupted; it starts again below.",
            discards=len(steps),
        )
        steps.append(note)
        journal.hold(*whole_step_events(first + len(steps) - 1, note))
    await journal.record(steps, stored.state)
    stored.generated += steps


async def _finish(stored: StoredRun, run: Run, journal: DatabaseJournal, outcome: Outcome) -> Ended:
    row = stored.interaction
    state = run.state
    usage = state.usage or dict(EMPTY_USAGE)
    warnings = [*orjson.loads(row.warnings or b"[]"), *map(asdict, outcome.warnings)]
    if row.logged:
        journal.hold(*_last_events(row, outcome, usage, warnings))
    ending = Ending(
        status=outcome.status,
        usage=orjson.dumps(usage),
        errors=orjson.dumps(outcome.errors) if outcome.errors else None,
        warnings=orjson.dumps(warnings) if warnings else None,
        spend=spend_of(run, stored.key_id),
        deliveries=_deliveries(stored, outcome),
    )
    updated_at = await journal.finish(run.uncommitted, state, ending)
    metrics.runs.labels(outcome.status).inc()
    metrics.run_seconds.observe(state.seconds)
    log = _log.warning if outcome.status == "failed" else _log.info
    log(
        "interaction.ended",
        interaction_id=row.id.hex,
        id=ids.interaction_id(row.id),
        model=run.spec.chain[min(state.fallback, len(run.spec.chain) - 1)],
        agent=row.agent,
        project_id=row.project_id.hex,
        status=outcome.status,
        steps=len(run.generated),
        tokens=usage.get("total_tokens", 0),
        seconds=round(state.seconds, 3),
        error=outcome.errors[0]["code"] if outcome.errors else None,
    )
    return Ended(
        status=outcome.status,
        created_at=row.created_at,
        updated_at=updated_at,
        steps=journal.stored,
        usage=ending.usage,
        errors=ending.errors,
        warnings=ending.warnings,
    )


def _deliveries(stored: StoredRun, outcome: Outcome) -> list[str]:
    """The callbacks that this end fires."""
    if stored.webhook is None:
        return []
    config: Json = orjson.loads(stored.webhook)
    args = {
        "event": EVENTS[outcome.status],
        "interaction_id": ids.interaction_id(stored.interaction.id),
        "ended_at": clock.rfc3339(clock.now()),
        "error": outcome.errors[0] if outcome.status == "failed" else None,
        "user_metadata": config.get("user_metadata"),
    }
    return [orjson.dumps({**args, "uri": uri}).decode() for uri in config.get("uris") or ()]


def spend_of(run: Run, key_id: UUID | None) -> Spend:
    """What a run took, for the ledger."""
    usage = run.state.usage
    chain = run.spec.chain
    return Spend(
        key_id=key_id,
        model=chain[min(run.state.fallback, len(chain) - 1)],
        input_tokens=int(usage.get("total_input_tokens", 0)),
        cached_tokens=int(usage.get("total_cached_tokens", 0)),
        output_tokens=int(usage.get("total_output_tokens", 0))
        + int(usage.get("total_thought_tokens", 0)),
        cost_nanousd=run.state.cost_nanousd,
    )


def _last_events(
    row: Interaction, outcome: Outcome, usage: Json, warnings: list[Json]
) -> list[Event]:
    """How the stream of a run that ended so ends."""
    if outcome.status == "failed":
        fault = outcome.errors[0]
        return [Event("e", ENDED, encode(error(fault["code"], fault["message"])))]
    public = ids.interaction_id(row.id)
    fields = {
        "id": public,
        "object": "interaction",
        "status": outcome.status,
        "model": row.model,
        "agent": row.agent,
        "created": clock.rfc3339(row.created_at),
        "updated": clock.rfc3339(clock.now()),
        "usage": usage,
        "warnings": warnings or None,
    }
    if row.environment_id is not None:
        fields["environment_id"] = environment_id(row.environment_id)
    if row.echo is not None:
        fields["service_tier"] = orjson.loads(row.echo).get("service_tier")
    events = [Event("f", ENDED, encode(completed(fields)))]
    if outcome.status == "cancelled":
        update = encode(status_update(public, "cancelled"))
        events.insert(0, Event("u", ENDED._replace(offset=-1), update))
    return events


def _remember(house: House, stored: StoredRun, run: Run) -> None:
    """Keep the ended turn compiled, for the next one."""
    row = stored.interaction
    chain = run.spec.chain
    if run.state.fallback >= len(chain):
        return
    house.cache.remember(
        row.segment_id, row.depth, [*stored.inputs, *run.generated], chain[run.state.fallback]
    )
