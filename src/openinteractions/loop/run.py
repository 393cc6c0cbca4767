"""The loop itself: ask the model until nothing is left to do.

What to do next follows from the committed steps alone, so any worker can take a run over by
reading them. There is no second journal.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from openinteractions import ids
from openinteractions.errors import (
    ContextOverflow,
    Invalid,
    ModelError,
    ModelRejected,
    ModelUnavailable,
    NotFound,
)
from openinteractions.loop import deferred, pictures, repeats
from openinteractions.loop.approval import Asking, Supervised
from openinteractions.loop.asking import asked, call_for
from openinteractions.loop.calls import Calls
from openinteractions.loop.citations import annotations, sources
from openinteractions.loop.context import NOTE, compacts, open_calls, resumption_note
from openinteractions.loop.earlier import Found, joined
from openinteractions.loop.limits import (
    BudgetSpent,
    cost_nanousd,
    estimate_tokens,
    room_for_output,
    spent_tokens,
    worst_case,
)
from openinteractions.loop.ports import Ports
from openinteractions.loop.record import Record
from openinteractions.loop.room import Room
from openinteractions.loop.spec import RunSpec, RunState
from openinteractions.loop.structured import arguments_mismatch, text_mismatch
from openinteractions.loop.turn import RPC_UNAVAILABLE, Turn
from openinteractions.models.catalog import Target
from openinteractions.models.port import Json, Media, ModelCall, ToolCall, Warning  # noqa: A004 - the contract's word
from openinteractions.wire.usage import add_usage

_log = structlog.get_logger(__name__)

_MAX_REPAIRS = 2
_FIRST_WAIT_S = 0.5
_RPC_INVALID = 3
_MALFORMED_CHARS = 200
_NO_ANSWER: Json = {
    "type": "user_input",
    "content": [
        {
            "type": "text",
            "text": "You ended without an answer. If something is left to do, do it now; else say "
            "what was done, what came out, where files lie, and what is uncertain.",
        }
    ],
}
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
        self._ports = ports
        self._tools = Supervised(ports.tools, spec.approve) if spec.approve else ports.tools
        self._record = Record(
            ports.journal,
            state,
            inputs=inputs,
            generated=generated,
            is_counted=spec.agent is not None,
        )
        self._calls = Calls(self._record, state, self._tools)
        self._room = (
            None if spec.agent is None else Room(spec, state, self._record, ports, self._account)
        )
        self._turn: Turn | None = None
        self._feedback: list[Json] = []
        self._clamped = False
        self._is_continued = False
        self._earlier: Found | None = None
        """What the turns before have found; None: nobody has looked."""
        self._bare = 0
        """So many own steps, and all before them, are shown without their results' pictures."""
        self._began = time.monotonic()
        self._earlier_s = state.seconds

    @property
    def generated(self) -> list[Json]:
        """Every step that this interaction has generated, committed or not."""
        return self._record.generated

    @property
    def uncommitted(self) -> list[Json]:
        """Those at its end that the finish has to write."""
        return self._record.uncommitted

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
            self._record.keep(turn.break_off(code, message, starts_anew=False))
        await self._calls.stop_open(message)

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
                status = error.upstream_status if isinstance(error, ModelError) else None
                _log.warning("model.failed", model=name, code=error.code, status=status)
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
        has_overflown = is_bare = False
        while True:
            attempt += 1
            messages = await self._messages(target)
            turn = self._new_turn(target)
            try:
                await self._stream(target, turn, messages)
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
            except ModelError as error:
                await self._broke_off(turn, None)
                if not is_bare and pictures.are_refused(error):
                    is_bare = await self._takes_out(messages, target)
                    if is_bare:
                        _log.warning("model.refused_picture", model=target.id, error=error.message)
                        continue
                room = self._room
                is_long = isinstance(error, ContextOverflow) and not has_overflown
                if room is None or not is_long:
                    raise
                if not room.can_be_made(is_continued=self._is_continued):
                    raise
                has_overflown = True
                await room.make(target)
            else:
                return turn

    async def _messages(self, target: Target) -> list[bytes]:
        """What the model is shown; an agent's conversation is shortened where it has to be."""
        messages = await self._all_messages(target)
        room = self._room
        if room is None:
            return messages
        fixed = estimate_tokens((), self.spec.system, self._declared())
        tokens = fixed + estimate_tokens(messages, None)
        if not room.is_scarce(target, tokens, fixed=fixed, is_continued=self._is_continued):
            return messages
        await room.make(target)
        return await self._all_messages(target)

    async def _all_messages(self, target: Target) -> list[bytes]:
        own = [*self._record.inputs, *self.generated]
        bare, history = self._bare, self._ports.history
        earlier = () if compacts(own) else await history.messages(target, is_bare=bare > 0)
        self._is_continued = bool(earlier)
        if self._earlier is None:
            self._earlier = await history.found(target)
        own[:bare] = pictures.without(own[:bare])
        own += [*self._repair(), *self._feedback]
        return [*earlier, *await self._ports.history.own(own, target)]

    async def _takes_out(self, refused: Sequence[bytes], target: Target) -> bool:
        """Take the pictures out of all results so far; False where that changes nothing."""
        self._bare = len(self._record.inputs) + len(self.generated)
        return await self._all_messages(target) != refused

    def _new_turn(self, target: Target) -> Turn:
        own = Found(sources([*self._record.inputs, *self.generated]))
        pages = joined((self._earlier or Found(), own)).pages
        return Turn(
            self._ports.journal.show,
            first_index=len(self.generated),
            provider=target.provider,
            model=target.model,
            cite=partial(annotations, pages=pages) if pages else None,
            usage_before=None if self.spec.agent is None else self.state.usage,
        )

    def _wait(self, attempt: int, asked: float | None) -> float:
        longest = self._ports.patience.max_wait.total_seconds()
        backoff = _FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        return min(longest, max(backoff, asked or 0.0))

    async def _stream(self, target: Target, turn: Turn, messages: Sequence[bytes]) -> None:
        call, worst = await self._call(target, messages)
        if self._ports.purse is not None:
            await self._ports.purse.reserve(**worst)
        self._turn = turn
        await asked(target, call, turn, self._account, delivered=self._delivered)
        self._turn = None

    async def _delivered(self, event: Media) -> Media:
        """A medium as the caller asked for it: inline, or by `uri`."""
        kind = event.content["type"]
        wanted = (f for f in self.spec.response_formats if f["type"] == kind)
        if not any(entry.get("delivery") == "uri" for entry in wanted):
            return event
        return Media(await self._ports.journal.by_uri(event.content, self.spec.media_url))

    async def _call(
        self, target: Target, messages: Sequence[bytes]
    ) -> tuple[ModelCall, dict[str, int]]:
        generation = dict(self.spec.generation)
        tools = self._declared()
        tokens = estimate_tokens(messages, self.spec.system, tools) if self._is_limited else 0
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
        call = call_for(
            self.spec,
            target,
            messages,
            generation,
            tools=tools,
            is_free=self._has_called,
        )
        output = int(generation.get("max_output_tokens") or 0)
        return call, worst_case(tokens, output, target.price)

    def _declared(self) -> list[Json]:
        """What the model can call now."""
        steps = [*self._record.inputs, *self.generated]
        earlier = None if self._earlier is None else self._earlier.functions
        own = self._tools.declarations()
        return [*deferred.declared(self.spec.tools, steps, earlier), *own]

    @property
    def _has_called(self) -> bool:
        return any(self._tools.of_step(step) for step in self.generated)

    @property
    def _is_limited(self) -> bool:
        limits = self.spec.limits
        return (
            self._ports.purse is not None
            or limits.max_total_tokens is not None
            or limits.max_cost_nanousd is not None
        )

    async def _account(self, target: Target, usage: Json) -> None:
        cost = cost_nanousd(usage, target.price) if usage else 0
        self.state.usage = add_usage(self.state.usage, usage)
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
        note = resumption_note(kind=kind, text=text, discards=len(turn.steps))
        turn.add_whole(note, is_last=True)
        await self._record.commit(turn.steps)

    # ---- executing

    async def _take_up(self) -> Outcome | None:
        """Go on with the calls that are committed, or approved; None to ask the model."""
        if not self.generated and self.spec.approved:
            await self._carry_out_approved()
        if not self.generated:
            return None
        return await self._run_calls()

    async def _carry_out_approved(self) -> None:
        for approved in self.spec.approved:
            tool = self._ports.tools.find(approved["tool"])
            if tool is None:
                raise Failed("failed", "tool_missing", f"There is no tool '{approved['tool']}'.")
            call = ToolCall(ids.call_id(), approved["tool"], approved["arguments"])
            self._record.add({**tool.call_step(call), "id": call.id})
        await self._record.commit()

    async def _run_calls(self) -> Outcome | None:
        """Execute what is open; an outcome where the run waits for its caller, or runs in circles.

        A function call of the caller's is answered by another interaction.
        """
        await self._calls.run_open(self._refusal)
        if any(step["type"] == "function_call" for _, step in open_calls(self.generated)):
            return Outcome("requires_action")
        if repeats.is_stuck(self.generated):
            message = "The same call had the same result again and again: the run was ended."
            return Outcome("incomplete", [{"code": "loop_detected", "message": message}])
        return None

    def _refusal(self) -> str | None:
        return self._steps_reached() if self._is_out_of_steps else None

    # ---- judging

    async def _judge(self, turn: Turn) -> Outcome | None:
        """What a whole turn means: an outcome, or None to ask again."""
        finished = turn.finished
        assert finished is not None
        if turn.calls:
            return await self._judge_calls(turn)
        if finished.reason == "max_tokens":
            self._record.keep(turn.close())
            if self._clamped:
                message = "The answer reached the room that the run's limits left."
                raise Failed("budget_exceeded", "budget_exceeded", message)
            return Outcome("incomplete")
        if finished.reason == "content_filter":
            self._record.keep(turn.close())
            status = "incomplete" if turn.steps else "failed"
            message = finished.message or "The model's vendor filtered the content."
            raise Failed(status, "content_filter", message)
        if self._says_nothing(turn):
            self._ask_for_an_answer(turn)
            return None
        schema = self.spec.json_schema
        problem = text_mismatch(turn.text(), schema) if schema is not None else None
        if problem is None:
            self._record.keep(turn.close())
            return Outcome("completed")
        return await self._repair_answer(turn, problem)

    def _says_nothing(self, turn: Turn) -> bool:
        """Whether an agent has ended without a word."""
        is_silent = not turn.text().strip() and not any(
            step["type"] == "model_output" for step in turn.steps
        )
        return self.spec.agent is not None and is_silent

    def _ask_for_an_answer(self, turn: Turn) -> None:
        self._record.keep(turn.close())
        if self.state.repairs >= _MAX_REPAIRS:
            raise Failed("incomplete", "no_answer", "The model ended without an answer.")
        self.state.repairs += 1
        self._feedback.append(_NO_ANSWER)

    async def _judge_calls(self, turn: Turn) -> Outcome | None:
        # One that was loaded in an earlier interaction may be called too: the model has seen it.
        declared = [*self.spec.tools, *self._declared()]
        functions = {tool["name"]: tool for tool in declared if tool["type"] == "function"}
        problems = [self._problem(call, functions) for call in turn.calls]
        await self._name_calls(turn)
        if any(problems) and self.state.repairs < _MAX_REPAIRS:
            self._ask_for_better_calls(turn, problems)
            return None
        hopeless = next(
            (c for c in turn.calls if c.malformed is not None or c.name not in functions), None
        )
        if hopeless is not None:
            self._record.keep(turn.close())
            what = "a function that does not exist"
            if hopeless.malformed is not None:
                what = "arguments that are not a JSON object"
            message = f"The model called {hopeless.name!r}: {what}."
            raise Failed("failed", "invalid_tool_call", message)
        turn.reveal_calls(self._tools, self._ports.journal.hold)
        warnings = [
            Warning("arguments_mismatch", f"steps.{call.name}.arguments", problem)
            for call, problem in zip(turn.calls, problems, strict=True)
            if problem is not None
        ]
        return await self._act(turn, warnings)

    async def _name_calls(self, turn: Turn) -> None:
        """Give the calls of a turn ids that no other call of the conversation has."""
        steps = [*self._record.inputs, *self.generated, *turn.steps, *self._feedback]
        taken = {step["id"] for step in steps if step["type"].endswith("_call")}
        wanted = [call.id for call in turn.calls if call.id and call.id not in taken]
        if wanted:
            taken |= await self._ports.history.called(wanted)
        turn.name_calls(taken)

    async def _act(self, turn: Turn, warnings: list[Warning]) -> Outcome | None:
        """Do what a turn's calls ask for; None to ask the model again."""
        if all(self._tools.find(call.name) is None for call in turn.calls):
            self._record.keep(turn.steps)
            return Outcome("requires_action", warnings=warnings)
        self.state.repairs = 0
        # Behind these calls it would ask for others a second time.
        self._feedback.clear()
        await self._record.commit(turn.steps)
        outcome = await self._run_calls()
        if outcome is not None:
            outcome.warnings += warnings
        return outcome

    def _problem(self, call: ToolCall, functions: Mapping[str, Json]) -> str | None:
        """What is wrong with a call; what is wrong with a tool's of ours is its result."""
        if call.malformed is not None:
            return f"the arguments are not a JSON object: {call.malformed[:_MALFORMED_CHARS]}"
        tool = self._tools.find(call.name)
        if tool is not None and not isinstance(tool, Asking):
            return None
        arguments = call.arguments if tool is None else tool.meant(call)
        return arguments_mismatch(arguments, functions.get(call.name))

    def _ask_for_better_calls(self, turn: Turn, problems: Sequence[str | None]) -> None:
        """Tell the model what is wrong with its calls. No reader has seen them."""
        self.state.repairs += 1
        self._record.keep(turn.close())
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
            self._record.keep(turn.close())
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
            if note.get("kind") not in ("resumed", "compacted"):
                break
            end -= 1 + note.get("discards", 0)
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
