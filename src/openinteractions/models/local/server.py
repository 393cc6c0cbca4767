"""Supervision of one llama.cpp server: a child process that serves one model on loopback.

It starts at the first request, starts again when it has died, and ends with its parent whatever
happens to that. Native code never runs in this process.
"""

import asyncio
import contextlib
import importlib.util
import os
import platform
import secrets
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import aiohttp
import orjson
import structlog

from openinteractions.errors import ModelUnavailable, SetupError
from openinteractions.models.transport import Upstream

_CHILD: Final = Path(__file__).with_name("child.py")
_START_S = 180.0
_PROBE_S = 5.0
_STOP_S = 3.0
_MAX_PAUSE_S = 30.0
_QUICK_DEATH_S = 60.0
_MAX_LOG_BYTES = 5 * 2**20
# A full prompt takes minutes on one slow core, and requests wait for a free slot.
_IDLE_TIMEOUT = timedelta(minutes=10)
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "TMPDIR")

_log = structlog.stdlib.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """What a child serves, and with which means."""

    name: str
    path: Path
    """The GGUF file."""
    log: Path
    """Where the child's own complaints go; never prompt text."""
    threads: int
    parallel: int
    context_tokens: int
    """Shared by the parallel slots: each gets its part."""
    template: str | None = None
    """Text of the chat template; None means the file's own."""


@dataclass(slots=True)
class _Child:
    process: asyncio.subprocess.Process
    api_key: str
    started: float = field(default_factory=time.monotonic)
    base_url: str | None = None
    """None until the child has said that it is ready."""


class LocalServer:
    """One model's server process. Leaving the context stops it."""

    def __init__(
        self,
        spec: ServerSpec,
        session: aiohttp.ClientSession,
        *,
        idle_stop: timedelta | None = None,
    ) -> None:
        self.spec = spec
        self.users = 0
        """Requests that are using the server right now."""
        self.last_used = time.monotonic()
        self._session = session
        self._idle_stop = idle_stop
        self._timer: asyncio.TimerHandle | None = None
        self._child: _Child | None = None
        self._leaving: list[asyncio.subprocess.Process] = []
        self._deaths = 0
        self._not_before = 0.0
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.retire()
        for process in self._leaving:
            await _reap(process)
        self._leaving.clear()

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is a child."""
        return self._child.process.pid if self._child else None

    @asynccontextmanager
    async def use(self) -> AsyncGenerator[Upstream]:
        """The running server, for one request; it is not stopped for idleness meanwhile.

        Raises:
            SetupError: It cannot run on this machine or installation.
            ModelUnavailable: It died, or does not start in time; see the log file.
        """
        self.users += 1
        try:
            yield await self.ensure()
        finally:
            self.users -= 1
            self._touch()

    async def ensure(self) -> Upstream:
        """Have the server running and healthy; start it if need be. Errors as in `use`."""
        async with self._lock:
            child = self._child
            if child is not None and child.base_url and not await self._answers(child):
                await self._bury(child)
                child = None
            if child is None:
                child = await self._spawn()
            if child.base_url is None:
                await self._await_ready(child)
            return self._upstream(child)

    def retire(self) -> None:
        """Ask the child to end, without waiting; the next `ensure` starts another."""
        if self._timer is not None:
            self._timer.cancel()
        child, self._child = self._child, None
        if child is not None:
            assert child.process.stdin is not None
            child.process.stdin.close()
            alive = [process for process in self._leaving if process.returncode is None]
            self._leaving = [*alive, child.process]
            _log.info("local.stopped", model=self.spec.name, pid=child.process.pid)

    def _upstream(self, child: _Child) -> Upstream:
        assert child.base_url is not None
        return Upstream(
            self._session,
            base_url=f"{child.base_url}/v1",
            headers={"Authorization": f"Bearer {child.api_key}"},
            connect_timeout=timedelta(seconds=_PROBE_S),
            idle_timeout=_IDLE_TIMEOUT,
        )

    async def _answers(self, child: _Child) -> bool:
        """Whether the server is alive. Slowness is no proof of death; a refused connection is."""
        if child.process.returncode is not None:
            return False
        timeout = aiohttp.ClientTimeout(total=_PROBE_S)
        try:
            async with self._session.get(f"{child.base_url}/health", timeout=timeout) as response:
                await response.read()
        except TimeoutError:
            return True
        except aiohttp.ClientError:
            return False
        return True

    async def _spawn(self) -> _Child:
        pause = self._not_before - time.monotonic()
        if pause > 0:
            raise ModelUnavailable(
                f"The local model {self.spec.name} died and is about to be started again.",
                retry_after_s=pause,
            )
        await asyncio.to_thread(check_platform)
        spec = self.spec
        _log.info("local.starting", model=spec.name, threads=spec.threads, parallel=spec.parallel)
        with await asyncio.to_thread(_open_log, spec.log) as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", str(_CHILD)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=_environment(),
            )
        self._child = _Child(process, secrets.token_urlsafe(32))
        assert process.stdin is not None
        process.stdin.write(_arguments(spec, self._child.api_key))
        return self._child

    async def _await_ready(self, child: _Child) -> None:
        """Wait for the ready line. Cancelled, it leaves the child to whoever asks next."""
        assert child.process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(child.started + _START_S - time.monotonic()):
                line = await child.process.stdout.readline()
        if not line:
            await self._bury(child)
            raise ModelUnavailable(
                f"The local model {self.spec.name} did not start; see {self.spec.log}.",
                retry_after_s=max(0.0, self._not_before - time.monotonic()),
            )
        child.base_url = orjson.loads(line)["base_url"]
        _log.info(
            "local.ready",
            model=self.spec.name,
            pid=child.process.pid,
            seconds=round(time.monotonic() - child.started, 2),
        )

    async def _bury(self, child: _Child) -> None:
        """Make sure that a child is gone.

        The first death costs no pause; from the second quick one on, pauses double.
        """
        self._child = None
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
        await child.process.wait()
        now = time.monotonic()
        self._deaths = self._deaths + 1 if now - child.started < _QUICK_DEATH_S else 1
        pause = min(2.0 ** (self._deaths - 2), _MAX_PAUSE_S) if self._deaths > 1 else 0.0
        self._not_before = now + pause
        _log.warning(
            "local.died",
            model=self.spec.name,
            pid=child.process.pid,
            exit_code=child.process.returncode,
        )

    def _touch(self) -> None:
        self.last_used = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        if self._idle_stop is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._idle_stop.total_seconds(), self._stop_if_idle)

    def _stop_if_idle(self) -> None:
        if not self.users:
            self.retire()


def check_platform(cpu: str | None = None) -> None:
    """Make sure that a child can run here.

    Args:
        cpu: The text of `/proc/cpuinfo`, if not this machine's.

    Raises:
        SetupError: xllamacpp is not installed, or the processor lacks AVX2.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise SetupError(
            "the local model needs the package xllamacpp: pip install 'openinteractions[local]'"
        )
    if cpu is None and platform.machine() in {"x86_64", "AMD64"}:
        with contextlib.suppress(OSError):
            cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if cpu and "avx2" not in cpu.split():
        raise SetupError(
            "the local model needs a processor with AVX2, which this one lacks: configure a"
            " provider instead"
        )


def default_threads() -> int:
    """How many threads a model gets where nothing is configured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 4)


def _arguments(spec: ServerSpec, api_key: str) -> bytes:
    arguments = {
        "path": str(spec.path.absolute()),
        "name": spec.name,
        "api_key": api_key,
        "threads": spec.threads,
        "parallel": spec.parallel,
        "context_tokens": spec.context_tokens,
        "template": spec.template,
    }
    return orjson.dumps(arguments) + b"\n"


def _environment() -> dict[str, str]:
    """What a child inherits: no secrets of this program. OpenMP may be tuned from outside."""
    parent = os.environ  # noqa: TID251 - handed on, not read
    kept = {
        name: value
        for name, value in parent.items()
        if name in _KEPT_VARIABLES or name.startswith(("OMP_", "GOMP_"))
    }
    # By default idle OpenMP threads spin, which on a busy machine costs nine tenths of the speed.
    return {"GOMP_SPINCOUNT": "1000", **kept}


def _open_log(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        if path.stat().st_size > _MAX_LOG_BYTES:
            path.replace(path.with_suffix(".old.log"))
    try:
        return path.open("ab")
    except PermissionError:
        # The folder belongs to somebody else, who pulled the models for all.
        return Path(os.devnull).open("ab")


async def _reap(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
