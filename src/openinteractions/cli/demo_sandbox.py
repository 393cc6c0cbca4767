"""Sandboxes of the demo's own: whether there can be any, and that none is left."""

import asyncio
import contextlib
import secrets
import sys
from pathlib import Path
from typing import Final

from openinteractions.broker import engine
from openinteractions.errors import AppError
from openinteractions.sandbox.pool import BROKER_LABEL
from openinteractions.settings import Settings

_CLEAR_S: Final = 30.0


class DemoSandboxes:
    """What a server is told so that its sandboxes are the demo's alone."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is looked at yet."""
        self._settings = settings
        self._broker = f"demo-{secrets.token_hex(4)}"
        self.problem: str | None = None
        """Why there are none."""

    def environment(self, home: Path) -> dict[str, str]:
        """The server's variables, after a look at the engine."""
        self.problem = asyncio.run(_problem(self._settings))
        if self.problem is not None:
            return {"OI_SANDBOX__ENABLED": "off"}
        return {
            "OI_SANDBOX__ENABLED": "on",
            "OI_SANDBOX__BROKER": self._broker,
            "OI_SANDBOX__DATA_DIR": str(home / "sandboxes"),
            "OI_SANDBOX__WARM": "0",
        }

    def clear(self) -> None:
        """Remove what an interrupted demo would leave behind in the engine."""
        if self.problem is None:
            with contextlib.suppress(AppError, TimeoutError):
                asyncio.run(_clear(self._settings, self._broker))


async def _problem(settings: Settings) -> str | None:
    if settings.sandbox.enabled == "off":
        return "Sandboxes are off (setting sandbox.enabled)."
    if sys.platform != "linux":
        return "Sandboxes need Linux."
    try:
        backend = engine.backend(settings.sandbox)
        try:
            await engine.examine(backend, settings.sandbox)
        finally:
            await backend.close()
    except AppError as error:
        return error.message
    return None


async def _clear(settings: Settings, broker: str) -> None:
    backend = engine.backend(settings.sandbox)
    try:
        async with asyncio.timeout(_CLEAR_S):
            for left in await backend.list({BROKER_LABEL: broker}):
                await backend.remove(left.ref)
    finally:
        await backend.close()
