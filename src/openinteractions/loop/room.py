"""Making room in an agent's conversation: when to, and how the handover is asked for."""

from collections.abc import Sequence

import structlog

from openinteractions.errors import ContextOverflow, ModelError
from openinteractions.loop import compaction
from openinteractions.loop.asking import Account, asked
from openinteractions.loop.limits import estimate_tokens, room_for_output, worst_case
from openinteractions.loop.ports import Ports
from openinteractions.loop.record import Record
from openinteractions.loop.spec import RunSpec, RunState
from openinteractions.loop.turn import Turn
from openinteractions.models.catalog import Target
from openinteractions.models.port import Json, ModelCall

_log = structlog.get_logger(__name__)

_TRIES = 2


class Room:
    """Keeps an agent's conversation within its model's window."""

    def __init__(
        self, spec: RunSpec, state: RunState, record: Record, ports: Ports, account: Account
    ) -> None:
        self._spec = spec
        self._state = state
        self._record = record
        self._ports = ports
        self._account = account

    def is_scarce(self, target: Target, tokens: int, *, fixed: int, is_continued: bool) -> bool:
        """Whether a handover is due before the next call, and would shorten it.

        Args:
            target: Who is asked.
            tokens: About how many the input has, where no call was counted yet.
            fixed: How many of them instructions and tools have, which stay.
            is_continued: Whether earlier interactions are part of the input.
        """
        if fixed > target.context_tokens // 2:
            # It would be due again at once.
            return False
        expected = compaction.expected_tokens(self._record.generated)
        most = tokens if expected is None else expected
        is_due = compaction.is_due(most, target.context_tokens)
        return is_due and self.can_be_made(is_continued=is_continued)

    def can_be_made(self, *, is_continued: bool) -> bool:
        """Whether there is anything that a handover could stand for."""
        return compaction.is_worthwhile(self._record.generated, is_continued=is_continued)

    async def make(self, target: Target) -> None:
        """Have the model write a handover, and commit the step that it stands in.

        Raises:
            BudgetSpent: There is no room for the call.
        """
        window = target.context_tokens
        most = compaction.transcript_chars(window)
        own = [*self._record.inputs, *self._record.generated]
        earlier = await self._ports.history.steps(most)
        material = compaction.material(earlier, own)
        text = compaction.transcript(material, most)
        answer = await self._asked(target, material, text)
        self._record.add(compaction.note(answer, text=text, window=window))
        await self._record.commit()
        _log.info("run.compacted", model=target.id, steps=len(own), is_written=bool(answer))

    async def _asked(self, target: Target, material: Sequence[Json], text: str) -> str:
        """The handover of a transcript; empty where the model could not be asked."""
        for _ in range(_TRIES):
            try:
                return await self._answer(target, text)
            except ContextOverflow:
                text = compaction.transcript(material, len(text) // 2)
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
        # The run's own limits hold for this call too.
        room_for_output(self._spec.limits, self._state, input_tokens=given, price=target.price)
        if self._ports.purse is not None:
            output = compaction.handover_tokens(window)
            await self._ports.purse.reserve(**worst_case(given, output, target.price))
        turn = Turn(None, first_index=0, provider=target.provider, model=target.model)
        await asked(target, call, turn, self._account)
        return turn.text()
