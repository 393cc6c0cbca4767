"""The steps of a run that is under way, and how they become durable."""

from collections.abc import Sequence

from openinteractions.loop.context import open_calls
from openinteractions.loop.ports import Journal
from openinteractions.loop.spec import RunState
from openinteractions.loop.turn import whole_step_events, with_usage
from openinteractions.models.port import Json
from openinteractions.tools.port import Tool
from openinteractions.tools.toolbox import Toolbox


class Record:
    """What one interaction was given and has generated so far."""

    def __init__(
        self,
        journal: Journal,
        state: RunState,
        *,
        inputs: Sequence[Json],
        generated: Sequence[Json],
        is_counted: bool = False,
    ) -> None:
        """Begin where the steps stand.

        Args:
            journal: Where they become durable.
            state: Written with them.
            inputs: What the interaction was given.
            generated: What it has generated so far.
            is_counted: Its steps say what it has taken so far.
        """
        self._journal = journal
        self._is_counted = is_counted
        self._state = state
        self.inputs = list(inputs)
        self.generated: list[Json] = list(generated)
        """Every step that this interaction has generated, committed or not."""
        self.uncommitted: list[Json] = []
        """Those at its end that the finish has to write."""

    def keep(self, steps: Sequence[Json]) -> None:
        """Add steps that the stream has shown, or is shown elsewhere."""
        self.generated += steps
        self.uncommitted += steps

    def add(self, step: Json) -> None:
        """Add a whole step, which is shown when it is committed."""
        if self._is_counted:
            step = with_usage(step, self._state.usage)
        if self._journal.show is not None:
            self._journal.hold(*whole_step_events(len(self.generated), step))
        self.keep([step])

    async def commit(self, steps: Sequence[Json] = ()) -> None:
        """Make everything so far durable, the state too."""
        self.keep(steps)
        fresh, self.uncommitted = self.uncommitted, []
        await self._journal.commit(fresh, self._state)

    def key(self, index: int) -> str:
        """Names a call for good: its step, as GET numbers the interaction's steps (ruling R4)."""
        return str(len(self.inputs) + index)

    def own_open_calls(self, tools: Toolbox) -> list[tuple[int, Json, Tool]]:
        """Calls of this server's tools that have no result yet, with their places."""
        found = [(i, s, tools.of_step(s)) for i, s in open_calls(self.generated)]
        return [(index, step, tool) for index, step, tool in found if tool is not None]
