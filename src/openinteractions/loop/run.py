"""The loop itself: ask the model until nothing is left to do.

What to do next follows from the committed steps alone, so any worker can take a run over by
reading them. There is no second journal.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from openinteractions.errors import Invalid, ModelError, ModelRejected, ModelUnavailable, NotFound
from openinteractions.loop.context import NOTE, open_calls, resumption_note
from openinteractions.loop.limits import (
    BudgetSpent,
    cost_nanousd,
    estimate_tokens,
    room_for_output,
    spent_tokens,
)
from openinteractions.loop.meter import Meter
from openinteractions.loop.ports import Ports
from openinteractions.loop.spec import RunSpec, RunState
from openinteractions.loop.structured import arguments_mismatch, text_mismatch
from openinteractions.loop.turn import RPC_UNAVAILABLE, Turn, whole_step_events
from openinteractions.models.catalog import Target
from openinteractions.models.port import Json, Media, ModelCall, ToolCall, Warning  # noqa: A004 - the contract's word
from openinteractions.tools.port import Tool
from openinteractions.tools.toolbox import toolbox
from openinteractions.wire.usage import add_usage

_log = structlog.get_logger(__name__)

_MAX_REPAIRS = 2
_FIRST_WAIT_S = 0.5
_RPC_INVALID = 3
_MALFORMED_CHARS = 200
_OTHER_MODEL_MAY_HELP = frozenset({401, 403, 404})


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    status: str
    errors: list[Json] = field(default_factory=list[Json])
    warnings: list[Warning] = field(default_factory=list[Warning])


class Failed(Exception):
    """The run cannot go on."""

    def __init__(self, status: str, code: str, message: str) -> None:
        super().__init__(message)
        self.outcome = Outcome(status, [{"code": code, "message": message}])


class Run:
    """One interaction, driven from wherever its committed steps stand."""

    def __init__(
        self,
        spec: RunSpec,
        state: RunState,
        *,
        inputs: Sequence[Json],
        generated: Sequence[Json],
        ports: Ports,
    ) -> None:
        self.spec = spec
        self.state = state
        self.generated: list[Json] = list(generated)
        """Every step that this interaction has generated, committed or not."""
        self.uncommitted: list[Json] = []
        """Those at its end that the finish has to write."""
        self._inputs = list(inputs)
        self._ports = ports
        self._turn: Turn | None = None
        self._feedback: list[Json] = []
        self._clamped = False
        self._began = time.monotonic()
        self._earlier_s = state.seconds

    async def drive(self) -> Outcome:
        """Run to the end, or to the run's limit of time.

        Cancelling leaves what was begun for `interrupt`.
        """
        limit = self.spec.limits.max_seconds
        scope = asyncio.timeout(None if limit is None else max(0.0, limit - self._earlier_s))
        try:
            async with scope:
                return await self._drive()
        except TimeoutError:
            if not scope.expired():
                raise
            await self.interrupt("The run's time limit is reached.")
            message = f"The limit max_seconds = {limit:g} is reached."
            return Outcome("budget_exceeded", [{"code": "budget_exceeded", "message": message}])

    async def _drive(self) -> Outcome:
        try:
            return await self._turns()
        except Failed as end:
            return end.outcome
        except BudgetSpent as spent:
            return Outcome("budget_exceeded", [{"code": spent.code, "message": spent.message}])
        finally:
            self.state.seconds = self._earlier_s + time.monotonic() - self._began

    async def _turns(self) -> Outcome:
        outcome = await self._take_up()
        while outcome is None:
            outcome = await self._judge(await self._ask())
        return outcome

    async def interrupt(self, message: str, *, code: int = 1) -> None:
        """Close what was under way: what it has shown stays, marked, and what runs is stopped."""
        turn, self._turn = self._turn, None
        if turn is not None:
            self._keep(turn.break_off(code, message, starts_anew=False))
        for index, step, tool in self._own_open_calls():
            await tool.stop(self._key(index))
            self._add(_answered(tool.failure(message), step))

    # ---- asking

    async def _ask(self) -> Turn:
        """One whole turn of the model, or of the next in the chain while it stays down."""
        failures: list[str] = []
        chain = self.spec.chain
        if self._is_out_of_steps:
            raise BudgetSpent(self._steps_reached())
        while self.state.fallback < len(chain):
            name = chain[self.state.fallback]
            try:
                target = self._ports.models.open(name)
                return await self._ask_patiently(target, failures)
            except (ModelError, NotFound, Invalid) as error:
                failures.append(f"{name}: {error.message}")
                if self._is_final(error):
                    break
            self.state.fallback += 1
        raise Failed("failed", "model_error", " · ".join(dict.fromkeys(failures)))

    @property
    def _is_out_of_steps(self) -> bool:
        most = self.spec.limits.max_steps
        return most is not None and len(self.generated) >= most

    def _steps_reached(self) -> str:
        return f"The limit max_steps = {self.spec.limits.max_steps} is reached."

    def _is_final(self, error: Exception) -> bool:
        if isinstance(error, ModelRejected):
            return error.upstream_status not in _OTHER_MODEL_MAY_HELP
        return False

    async def _ask_patiently(self, target: Target, failures: list[str]) -> Turn:
        attempt = 0
        while True:
            attempt += 1
            turn = Turn(
                self._ports.journal.show,
                first_index=len(self.generated),
                provider=target.provider,
                model=target.model,
            )
            try:
                await self._stream(target, turn)
            except ModelUnavailable as error:
                await self._broke_off(turn, error)
                _log.warning(
                    "model.unavailable",
                    model=target.id,
                    attempt=attempt,
                    status=error.upstream_status,
                    reason=error.message if error.upstream_status is None else None,
                )
                if attempt >= self._ports.patience.attempts:
                    raise
                failures.append(f"{target.id}: {error.message}")
                await asyncio.sleep(self._wait(attempt, error.retry_after_s))
            except ModelError:
                await self._broke_off(turn, None)
                raise
            else:
                return turn

    def _wait(self, attempt: int, asked: float | None) -> float:
        longest = self._ports.patience.max_wait.total_seconds()
        backoff = _FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        return min(longest, max(backoff, asked or 0.0))

    async def _stream(self, target: Target, turn: Turn) -> None:
        call, worst = await self._call(target)
        if self._ports.purse is not None:
            await self._ports.purse.reserve(**worst)
        self._turn = turn
        usage: Json = {}
        meter = Meter(target)
        try:
            async with meter, target.adapter.stream(call) as events:
                async for event in events:
                    meter.event(event)
                    turn.add(await self._delivered(event) if isinstance(event, Media) else event)
            if turn.finished is None:
                raise ModelUnavailable("The upstream's answer ended early.")
            usage = turn.finished.usage
        finally:
            is_metered = bool(usage) or not meter.has_begun
            await self._account(
                target, usage if is_metered else _about(call, turn), is_metered=is_metered
            )
        self._turn = None

    async def _delivered(self, event: Media) -> Media:
        """A medium as the caller asked for it: inline, or by `uri`."""
        kind = event.content["type"]
        wanted = (f for f in self.spec.response_formats if f["type"] == kind)
        if not any(entry.get("delivery") == "uri" for entry in wanted):
            return event
        return Media(await self._ports.journal.by_uri(event.content, self.spec.media_url))

    async def _call(self, target: Target) -> tuple[ModelCall, dict[str, int]]:
        messages = [
            *await self._ports.history.messages(target),
            *await self._ports.history.own(
                [*self._inputs, *self.generated, *self._repair(), *self._feedback], target
            ),
        ]
        generation = dict(self.spec.generation)
        tokens = estimate_tokens(messages, self.spec.system) if self._is_limited else 0
        room = room_for_output(
            self.spec.limits, self.state, input_tokens=tokens, price=target.price
        )
        if self._ports.purse is not None:
            granted = await self._ports.purse.room(input_tokens=tokens, price=target.price)
            room = granted if room is None else min(room, granted)
        asked = generation.get("max_output_tokens")
        self._clamped = room is not None and (asked is None or room < asked)
        if self._clamped:
            generation["max_output_tokens"] = room
        call = call_for(self.spec, target, messages, generation, is_free=self._has_called)
        output = int(generation.get("max_output_tokens") or 0)
        price = target.price
        worst = round(tokens * price.input + output * price.output) if price else 0
        return call, {"tokens": tokens + output, "nanousd": worst}

    @property
    def _has_called(self) -> bool:
        return any(self._ports.tools.of_step(step) for step in self.generated)

    @property
    def _is_limited(self) -> bool:
        limits = self.spec.limits
        return (
            self._ports.purse is not None
            or limits.max_total_tokens is not None
            or limits.max_cost_nanousd is not None
        )

    async def _account(self, target: Target, usage: Json, *, is_metered: bool) -> None:
        cost = cost_nanousd(usage, target.price) if usage else 0
        if is_metered:
            self.state.usage = add_usage(self.state.usage, usage)
        else:
            # It was billed all the same: it counts against limits, and is never shown as usage.
            self.state.unmetered_tokens += spent_tokens(usage)
        if cost is None or self.state.cost_nanousd is None:
            self.state.cost_nanousd = None
        else:
            self.state.cost_nanousd += cost
        if self._ports.purse is not None:
            await self._ports.purse.settle(tokens=spent_tokens(usage), nanousd=cost or 0)

    async def _broke_off(self, turn: Turn, error: ModelUnavailable | None) -> None:
        """Invariant 3: what was shown stays, closed and marked; the answer starts anew."""
        self._turn = None
        if not turn.has_shown:
            return
        message = error.message if error is not None else "The model refused to go on."
        turn.break_off(RPC_UNAVAILABLE, message, starts_anew=True)
        await self._start_anew(
            turn, "resumed", "The answer was interrupted; it starts again below."
        )

    async def _start_anew(self, turn: Turn, kind: str, text: str) -> None:
        """Put the note after a broken turn, and make both durable before the model is asked."""
        turn.add_whole(resumption_note(kind=kind, text=text, discards=len(turn.steps)))
        await self._commit(turn.steps)

    # ---- executing

    async def _take_up(self) -> Outcome | None:
        """Go on with the calls that an earlier owner has committed; None to ask the model."""
        if not self.generated:
            return None
        await self._run_calls()
        return self._parked()

    async def _run_calls(self) -> None:
        """Execute the committed calls that have no result yet, and commit each result."""
        for index, step, tool in self._own_open_calls():
            problem = arguments_mismatch(step["arguments"], tool.declaration())
            if problem is not None:
                result = tool.failure(f"Not executed: {problem}.")
            elif self._is_out_of_steps:
                result = tool.failure(f"Not executed: {self._steps_reached()}")
            else:
                result = await tool.run(step, self._key(index))
            self._add(_answered(result, step))
            await self._commit(())

    def _parked(self) -> Outcome | None:
        """The run waits for its caller, where a function of the caller's was called."""
        waits = any(step["type"] == "function_call" for _, step in open_calls(self.generated))
        return Outcome("requires_action") if waits else None

    def _own_open_calls(self) -> list[tuple[int, Json, Tool]]:
        found = [(i, s, self._ports.tools.of_step(s)) for i, s in open_calls(self.generated)]
        return [(index, step, tool) for index, step, tool in found if tool is not None]

    def _key(self, index: int) -> str:
        """Names a call for good: its step, as GET numbers the interaction's steps (ruling R4)."""
        return str(len(self._inputs) + index)

    def _add(self, step: Json) -> None:
        """Add a whole step, which is shown when it is committed."""
        if self._ports.journal.show is not None:
            self._ports.journal.hold(*whole_step_events(len(self.generated), step))
        self._keep([step])

    # ---- judging

    async def _judge(self, turn: Turn) -> Outcome | None:
        """What a whole turn means: an outcome, or None to ask again."""
        finished = turn.finished
        assert finished is not None
        if turn.calls:
            return await self._judge_calls(turn)
        if finished.reason == "max_tokens":
            self._keep(turn.close())
            if self._clamped:
                message = "The answer reached the room that the run's limits left."
                raise Failed("budget_exceeded", "budget_exceeded", message)
            return Outcome("incomplete")
        if finished.reason == "content_filter":
            self._keep(turn.close())
            status = "incomplete" if turn.steps else "failed"
            message = finished.message or "The model's vendor filtered the content."
            raise Failed(status, "content_filter", message)
        schema = self.spec.json_schema
        problem = text_mismatch(turn.text(), schema) if schema is not None else None
        if problem is None:
            self._keep(turn.close())
            return Outcome("completed")
        return await self._repair_answer(turn, problem)

    async def _judge_calls(self, turn: Turn) -> Outcome | None:
        declared = [*self.spec.tools, *self._ports.tools.declarations()]
        functions = {tool["name"]: tool for tool in declared if tool["type"] == "function"}
        problems = [self._problem(call, functions) for call in turn.calls]
        if any(problems) and self.state.repairs < _MAX_REPAIRS:
            self._ask_for_better_calls(turn, problems)
            return None
        hopeless = next(
            (c for c in turn.calls if c.malformed is not None or c.name not in functions), None
        )
        if hopeless is not None:
            self._keep(turn.close())
            what = "a function that does not exist"
            if hopeless.malformed is not None:
                what = "arguments that are not a JSON object"
            message = f"The model called {hopeless.name!r}: {what}."
            raise Failed("failed", "invalid_tool_call", message)
        turn.reveal_calls(self._ports.tools, self._ports.journal.hold)
        warnings = [
            Warning("arguments_mismatch", f"steps.{call.name}.arguments", problem)
            for call, problem in zip(turn.calls, problems, strict=True)
            if problem is not None
        ]
        return await self._act(turn, warnings)

    async def _act(self, turn: Turn, warnings: list[Warning]) -> Outcome | None:
        """Do what a turn's calls ask for; None to ask the model again."""
        if all(self._ports.tools.find(call.name) is None for call in turn.calls):
            self._keep(turn.steps)
            return Outcome("requires_action", warnings=warnings)
        self.state.repairs = 0
        await self._commit(turn.steps)
        await self._run_calls()
        outcome = self._parked()
        if outcome is not None:
            outcome.warnings += warnings
        return outcome

    def _problem(self, call: ToolCall, functions: Mapping[str, Json]) -> str | None:
        """What is wrong with a call; what is wrong with a tool's of ours is its result."""
        if call.malformed is not None:
            return f"the arguments are not a JSON object: {call.malformed[:_MALFORMED_CHARS]}"
        if self._ports.tools.find(call.name) is not None:
            return None
        return arguments_mismatch(call.arguments, functions.get(call.name))

    def _ask_for_better_calls(self, turn: Turn, problems: Sequence[str | None]) -> None:
        """Tell the model what is wrong with its calls. No reader has seen them."""
        self.state.repairs += 1
        self._keep(turn.close())
        calls = turn.call_steps()
        self._feedback += calls
        for call, problem in zip(calls, problems, strict=True):
            text = "Not executed, since another call beside it was wrong. Repeat it."
            if problem is not None:
                text = f"Not executed: {problem}. Call it again, correctly."
            self._feedback.append(
                {
                    "type": "function_result",
                    "call_id": call["id"],
                    "name": call["name"],
                    "result": text,
                    "is_error": True,
                }
            )

    async def _repair_answer(self, turn: Turn, problem: str) -> None:
        if self.state.repairs >= _MAX_REPAIRS:
            self._keep(turn.close())
            message = f"The answer does not obey response_format: {problem}"
            raise Failed("failed", "schema_mismatch", message)
        self.state.repairs += 1
        turn.break_off(_RPC_INVALID, problem, starts_anew=True)
        text = "The answer did not obey its schema; it is asked for again."
        await self._start_anew(turn, "repair", text)

    def _repair(self) -> list[Json]:
        """What the model is told after an answer that broke its schema."""
        end = len(self.generated) - 1
        # A repair that broke off is still one: back over what its own note discards.
        note: Json = {}
        while end >= 0:
            note = self.generated[end].get(NOTE) or {}
            if note.get("kind") != "resumed":
                break
            end -= 1 + note["discards"]
        if note.get("kind") != "repair":
            return []
        broken = self.generated[end - note["discards"] : end]
        bad = [step for step in broken if step["type"] == "model_output"]
        said = [block for step in bad for block in step["content"] if block["type"] == "text"]
        problem = bad[-1]["error"]["message"]
        ask = f"That answer does not obey the schema: {problem}. Answer again with only the JSON."
        return [
            {"type": "model_output", "content": said},
            {"type": "user_input", "content": [{"type": "text", "text": ask}]},
        ]

    # ---- keeping

    def _keep(self, steps: Sequence[Json]) -> None:
        self.generated += steps
        self.uncommitted += steps

    async def _commit(self, steps: Sequence[Json]) -> None:
        self._keep(steps)
        fresh, self.uncommitted = self.uncommitted, []
        await self._ports.journal.commit(fresh, self.state)


def _answered(result: Json, call: Json) -> Json:
    """A result's step, bound to its call."""
    return {**result, "call_id": call["id"]}


def _freed(choice: str | Json | None) -> str | Json | None:
    """The choice of tools without the demand to call one: it would never come to an answer."""
    if choice == "any":
        return "auto"
    if isinstance(choice, dict) and choice["allowed_tools"].get("mode") == "any":
        return {"allowed_tools": {**choice["allowed_tools"], "mode": "auto"}}
    return choice


def _about(call: ModelCall, turn: Turn) -> Json:
    """About what a call took that broke off before it said so."""
    given = estimate_tokens(call.messages, call.system)
    written = len(turn.text()) // 4 + 1
    return {
        "total_input_tokens": given,
        "total_output_tokens": written,
        "total_tokens": given + written,
    }


def call_for(
    spec: RunSpec,
    target: Target,
    messages: Sequence[bytes],
    generation: Json,
    *,
    is_free: bool = False,
) -> ModelCall:
    """The call that a spec makes of a model.

    Args:
        spec: What the run was told.
        target: Which model.
        messages: The conversation.
        generation: The generation config.
        is_free: The model has called a tool, so it need not be made to call one again.
    """
    return ModelCall(
        model=target.model,
        messages=messages,
        system=spec.system,
        tools=[*spec.tools, *toolbox(spec.own_tools, None).declarations()],
        tool_choice=_freed(spec.tool_choice) if is_free else spec.tool_choice,
        generation=generation,
        json_schema=spec.json_schema,
        response_formats=spec.response_formats,
        modalities=spec.modalities,
        safety_settings=spec.safety_settings,
        service_tier=spec.service_tier,
    )
