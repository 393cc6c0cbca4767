"""The broker's row: its name taken, its sign of life, and why it cannot serve at present."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

import structlog

from openinteractions.broker import store
from openinteractions.broker.store import Card
from openinteractions.db.engine import LOST, Database
from openinteractions.errors import SetupError
from openinteractions.jobs.runner import is_alive

_log = structlog.get_logger(__name__)

_BEAT_S: Final = 3.0
_LOOK_S: Final = 0.25
_DEAD_AFTER: Final = timedelta(seconds=10)
_PATIENCE_S: Final = 15.0
_RETRY_S: Final = 1.0


class NameTaken(SetupError):
    """Another broker lives under this name."""


class Registry:
    """This broker among the brokers."""

    def __init__(self, database: Database, card: Card) -> None:
        self._database = database
        self._card = card

    @asynccontextmanager
    async def entered(
        self, running: Callable[[], int], problem: Callable[[], str | None]
    ) -> AsyncGenerator[asyncio.Task[None]]:
        """Hold the name until the context ends; what it gives ends only where the name is lost.

        Args:
            running: How many sandboxes run.
            problem: Why none can be started now; with the next beat everybody knows.

        Raises:
            NameTaken: Another broker lives under it.
        """
        await self._enter(problem)
        async with asyncio.TaskGroup() as group:
            beating = group.create_task(
                self._beat_for_ever(running, problem), name="broker-heartbeat"
            )
            try:
                yield beating
            finally:
                beating.cancel()
        try:
            await store.leave(self._database, self._card)
        except LOST as error:
            _log.warning("broker.leave_failed", error=type(error).__name__)

    async def _enter(self, problem: Callable[[], str | None]) -> None:
        """A broker that was killed on another machine is waited for until it counts as dead."""
        deadline = time.monotonic() + _PATIENCE_S
        while not await self._claim(problem()):
            if time.monotonic() > deadline:
                raise NameTaken(
                    f"another broker is running under the name {self._card.name!r}: stop it, or "
                    "give this one another name (setting sandbox.broker)"
                )
            await asyncio.sleep(_RETRY_S)

    async def _claim(self, problem: str | None) -> bool:
        found = await store.owner(self._database, self._card.name)
        dead: list[int] = []
        if found is not None and found[0] == self._card.host and not is_alive(found[1]):
            dead.append(found[1])
        return await store.claim_name(
            self._database, self._card, problem=problem, dead=dead, dead_after=_DEAD_AFTER
        )

    async def _beat_for_ever(
        self, running: Callable[[], int], problem: Callable[[], str | None]
    ) -> None:
        told, beat_at = None, 0.0
        while True:
            await asyncio.sleep(_LOOK_S)
            said = (running(), problem())
            now = time.monotonic()
            # What changes is told at once: new environments go where there is room.
            if said == told and now - beat_at < _BEAT_S:
                continue
            told, beat_at = said, now
            try:
                if await store.beat(self._database, self._card, running=said[0], problem=said[1]):
                    continue
                _log.warning("broker.row_lost", name=self._card.name)
                if not await self._claim(said[1]):
                    _log.error("broker.name_lost", name=self._card.name)
                    return
            except LOST as error:
                _log.warning("broker.beat_failed", error=type(error).__name__)
