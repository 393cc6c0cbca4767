"""Processes under measurement: started, asked for CPU time and memory, ended."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import psutil

ROOT = Path(__file__).parents[1]
_STOP_S = 20


@asynccontextmanager
async def child(
    arguments: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """A child process while the context lasts; its errors go to a file."""
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            cwd=ROOT,
            env={**_environment(), **(environment or {})},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=2**26,
        )
    try:
        yield process
    finally:
        await _end(process)


def python(module: str, *arguments: str) -> list[str]:
    """The command of one of our own modules."""
    return [sys.executable, "-m", f"benchmarks.{module}", *arguments]


def _environment() -> dict[str, str]:
    """Ours, without what would configure the server."""
    dropped = ("OI_", "DATABASE_URL", "GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def port_of(process: asyncio.subprocess.Process) -> int:
    """The port that a child prints as its first line."""
    assert process.stdout is not None
    return int(await process.stdout.readline())


class Load:
    """The load generator's other end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def order(self, kind: str, **order: Any) -> dict[str, Any]:
        """Have something done; the report."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(orjson.dumps({"kind": kind, **order}) + b"\n")
        report: dict[str, Any] = orjson.loads(await process.stdout.readline())
        if "failed" in report:
            raise RuntimeError(f"the load generator failed: {report['failed']}")
        return report


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all its children, also those that have ended."""
    root = psutil.Process(pid)
    times = root.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            mine = process.cpu_times()
            total += mine.user + mine.system
    return total


def postgres_pid() -> int:
    """The embedded PostgreSQL that this process has started."""
    return next(p.pid for p in psutil.Process().children() if p.name() == "postgres")


def memory_mib(pid: int) -> tuple[float, float]:
    """RSS and PSS of one process, without its children."""
    info = psutil.Process(pid).memory_full_info()
    return info.rss / 2**20, info.pss / 2**20
