"""The container engine's health, watched: why no sandbox can be started now, if none can."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from openinteractions.broker.engine import examine
from openinteractions.broker.house import House
from openinteractions.db.engine import LOST
from openinteractions.errors import AppError
from openinteractions.sandbox.docker import DockerBackend
from openinteractions.settings import SandboxSettings

_log = structlog.get_logger(__name__)

_EVERY_S: Final = 5.0


class Watch:
    """Looks every few seconds."""

    def __init__(
        self,
        engine: DockerBackend,
        settings: SandboxSettings,
        on_up: Callable[[], Awaitable[None]],
        house: House,
    ) -> None:
        """Nothing is looked at yet.

        Args:
            engine: To be watched.
            settings: The broker's.
            on_up: Called whenever the engine has come (back); until it has returned, the engine
                counts as away.
            house: Told why it can start nothing, if it cannot.
        """
        self._engine = engine
        self._settings = settings
        self._on_up = on_up
        self._house = house
        self.version = ""

    async def look(self) -> None:
        """Look once."""
        house = self._house
        try:
            health = await examine(self._engine, self._settings)
            if house.problem is not None:
                await self._on_up()
                _log.info("broker.engine_up", version=health.version)
                for problem in health.problems:
                    _log.warning("broker.engine_weak", problem=problem)
        except AppError as error:
            self._down(error.message)
        except LOST:
            self._down("The database is not reachable.")
        else:
            house.problem, self.version = None, health.version

    def _down(self, problem: str) -> None:
        if self._house.problem != problem:
            _log.warning("broker.engine_down", problem=problem)
        self._house.problem = problem

    async def for_ever(self) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.look()
            except Exception:  # noqa: BLE001 - whatever it was, the next look may be better
                _log.exception("broker.watch_failed")
