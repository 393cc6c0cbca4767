"""Whether an answer was lost a moment ago: the rare case in which a create looks for its twin."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from openinteractions.db.engine import Database
from openinteractions.events.follow import listen
from openinteractions.jobs.queue import LOST_CHANNEL

_WINDOW_S = 30.0


class LostResponses:
    """Listens for lost answers, so that every other create is spared the question.

    A process that has just started, or just reconnected, may have missed one, and asks for a while.
    """

    def __init__(self) -> None:
        self._until = 0.0

    @property
    def is_any(self) -> bool:
        """Whether some answer may have been lost within the last half minute."""
        return time.monotonic() < self._until

    @asynccontextmanager
    async def watching(self, database: Database) -> AsyncGenerator[None]:
        """Listen until the context ends."""
        self._extend()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(
                listen(database, LOST_CHANNEL, lambda _: self._extend(), self._extend),
                name="lost-listener",
            )
            try:
                yield
            finally:
                task.cancel()

    def _extend(self) -> None:
        self._until = time.monotonic() + _WINDOW_S
