"""The broker that `serve` runs beside itself: a child process, started again when it dies.

It is a process of its own since it alone holds the container engine, which is as good as root.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog

from openinteractions.broker import engine
from openinteractions.db.engine import Database
from openinteractions.errors import AppError, SetupError
from openinteractions.settings import Settings

_log = structlog.get_logger(__name__)

_LOOK_S: Final = 30.0
_ANSWER_S: Final = 5.0
_STOP_S: Final = 15.0
_FIRST_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 30.0
_STEADY_S: Final = 60.0


@asynccontextmanager
async def beside(
    settings: Settings, database: Database, *, config: Path | None
) -> AsyncGenerator[None]:
    """Have a broker running, as `sandbox.enabled` says, until the context ends.

    Nobody waits for it: an engine that is started later is found then.

    Raises:
        SetupError: It is `on`, and there is no engine.
    """
    enabled = settings.sandbox.enabled
    if enabled == "off":
        yield
        return
    if enabled == "on":
        problem = await engine_problem(settings)
        if problem is not None:
            raise SetupError(f"sandbox.enabled is on, and no sandbox can be run: {problem}")
    own = settings.database_url
    child = _Child(settings, database.url if own is None else own.get_secret_value(), config)
    # No group: what is raised inside must come out as it is, for the command line to explain.
    task = asyncio.get_running_loop().create_task(child.for_ever(), name="broker-child")
    task.add_done_callback(_report)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("broker.not_supervised", exc_info=error)


async def engine_problem(settings: Settings) -> str | None:
    """Why sandboxes cannot be run at all; None: an engine answers."""
    if sys.platform != "linux":
        return "The sandbox broker runs on Linux only."
    try:
        backend = engine.backend(settings.sandbox)
        try:
            async with asyncio.timeout(_ANSWER_S):
                await backend.health()
        finally:
            await backend.close()
    except AppError as error:
        return error.message
    except TimeoutError:
        return "The container engine does not answer."
    return None


class _Child:
    def __init__(self, settings: Settings, url: str, config: Path | None) -> None:
        self._settings = settings
        self._url = url
        self._options = ["--data-dir", str(settings.home())]
        if config is not None:
            self._options += ["--config", str(config.absolute())]

    async def for_ever(self) -> None:
        """Start it, and start it again whenever it has ended."""
        pause_s, is_told = _FIRST_PAUSE_S, False
        while True:
            problem = await engine_problem(self._settings)
            if problem is not None:
                if not is_told:
                    _log.info("sandbox.off", reason=problem)
                is_told = True
                await asyncio.sleep(_LOOK_S)
                continue
            is_told, began = False, time.monotonic()
            code = await self._run()
            if time.monotonic() - began > _STEADY_S:
                pause_s = _FIRST_PAUSE_S
            _log.warning("broker.ended", exit_code=code, again_in_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _MAX_PAUSE_S)

    async def _run(self) -> int:
        """One life of it."""
        parent = os.environ  # noqa: TID251 - handed on, not read
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "openinteractions.cli.tethered", "broker", *self._options),
            # Not an argument: others could read a password in it.
            env={**parent, "OI_DATABASE_URL": self._url},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=2,
            # A Ctrl-C is for us: we stop it.
            start_new_session=True,
        )
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
