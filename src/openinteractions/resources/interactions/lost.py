"""Whether an answer was lost a moment ago: the rare case in which a create looks for its twin."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from openinteractions.db.engine import LOST, Database
from openinteractions.events.follow import listen
from openinteractions.jobs.queue import LOST_CHANNEL
from openinteractions.resources.interactions import store

_WINDOW_S = 30.0


class LostResponses:
    """Listens for lost answers, so that every other create is spared the question.

    What came before it listened, or while its connection was broken, it looks up once.
    """

    def __init__(self) -> None:
        self._until = 0.0
        self._look = asyncio.Event()

    @property
    def is_any(self) -> bool:
        """Whether some answer may have been lost within the last half minute."""
        return time.monotonic() < self._until

    @asynccontextmanager
    async def watching(self, database: Database) -> AsyncGenerator[None]:
        """Listen until the context ends."""
        await self._look_up(database)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    listen(database, LOST_CHANNEL, lambda _: self._extend(), self._reconnected),
                    name="lost-listener",
                ),
                group.create_task(self._look_up_again(database), name="lost-look-up"),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    def _extend(self) -> None:
        self._until = time.monotonic() + _WINDOW_S

    def _reconnected(self) -> None:
        self._look.set()

    async def _look_up_again(self, database: Database) -> None:
        while True:
            await self._look.wait()
            self._look.clear()
            await self._look_up(database)

    async def _look_up(self, database: Database) -> None:
        try:
            if await store.any_lost(database):
                self._extend()
        except LOST:
            # Unknown: ask for a while.
            self._extend()
