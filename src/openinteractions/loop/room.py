"""Making room in an agent's conversation: when to, and how the handover is asked for."""

from collections.abc import Awaitable, Sequence
from typing import Protocol

import structlog

from openinteractions.errors import ContextOverflow, ModelError
from openinteractions.loop import compaction
from openinteractions.loop.limits import estimate_tokens
from openinteractions.loop.meter import Meter
from openinteractions.loop.ports import Ports
from openinteractions.loop.record import Record
from openinteractions.loop.turn import Turn
from openinteractions.models.catalog import Target
from openinteractions.models.port import Json, ModelCall

_log = structlog.get_logger(__name__)

_TRIES = 2


class Account(Protocol):
    """Counts what a call has taken."""

    def __call__(self, target: Target, usage: Json, *, is_metered: bool) -> Awaitable[None]:
        """Add a call's usage to the run's."""
        ...


class Room:
    """Keeps an agent's conversation within its model's window."""

    def __init__(self, record: Record, ports: Ports, account: Account) -> None:
        self._record = record
        self._ports = ports
        self._account = account

    def is_scarce(self, target: Target, messages: Sequence[bytes], system: str | None) -> bool:
        """Whether a handover is due before these messages are sent, and would shorten them."""
        expected = compaction.expected_tokens(self._record.generated)
        tokens = estimate_tokens(messages, system) if expected is None else expected
        return compaction.is_due(tokens, target.context_tokens) and self.can_be_made

    @property
    def can_be_made(self) -> bool:
        """Whether there is anything that a handover could stand for."""
        # Earlier interactions are there unless the input is all: asking for them costs a read.
        return compaction.is_worthwhile(self._record.generated, is_continued=True)

    async def make(self, target: Target) -> None:
        """Have the model write a handover, and commit the step that it stands in.

        Raises:
            BudgetSpent: There is no room for the call.
        """
        window = target.context_tokens
        most = compaction.transcript_chars(window)
        own = [*self._record.inputs, *self._record.generated]
        earlier = await self._ports.history.steps(most)
        text = compaction.transcript(compaction.material(earlier, own), most)
        answer = await self._asked(target, text)
        self._record.add(compaction.note(answer, text=text, window=window))
        await self._record.commit()
        _log.info("run.compacted", model=target.id, steps=len(own), is_written=bool(answer))

    async def _asked(self, target: Target, text: str) -> str:
        """The handover; empty where the model could not be asked."""
        for _ in range(_TRIES):
            try:
                return await self._answer(target, text)
            except ContextOverflow:
                text = compaction.transcript([_as_step(text)], len(text) // 2)
            except ModelError as error:
                _log.warning("run.handover_failed", model=target.id, error=error.message)
        return ""

    async def _answer(self, target: Target, text: str) -> str:
        window = target.context_tokens
        system, steps = compaction.request(text, window=window)
        call = ModelCall(
            model=target.model,
            messages=target.adapter.compile(steps, target.model),
            system=system,
            generation={"max_output_tokens": compaction.handover_tokens(window)},
        )
        given = estimate_tokens(call.messages, system)
        worst = given + compaction.handover_tokens(window)
        purse = self._ports.purse
        if purse is not None:
            price = target.price
            cost = given * price.input + worst * price.output if price else 0
            await purse.reserve(tokens=worst, nanousd=round(cost))
        turn = Turn(None, first_index=0, provider=target.provider, model=target.model)
        usage: Json = {}
        try:
            async with Meter(target) as meter, target.adapter.stream(call) as events:
                async for event in events:
                    meter.event(event)
                    turn.add(event)
        finally:
            is_metered = turn.finished is not None
            if turn.finished is not None:
                usage = turn.finished.usage
            else:
                usage = {"total_input_tokens": given, "total_tokens": given}
            await self._account(target, usage, is_metered=is_metered)
        return turn.text()


def _as_step(text: str) -> Json:
    return {"type": "user_input", "content": [{"type": "text", "text": text}]}
