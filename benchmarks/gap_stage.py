"""What both experiments of `make gap` stand on: servers whose workers are killed, and a count."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from benchmarks import system
from benchmarks.run import _free_port, _until_ready
from openinteractions.db import migrate
from openinteractions.db.engine import Database

LONGEST_S = 60
"""For one step."""
_WORKERS = 2
_KEY = f"oi_gap_{secrets.token_hex(16)}"
_COMMAND = str(system.ROOT / ".venv/bin/openinteractions")


@dataclass(slots=True)
class Tally:
    """How one side did."""

    good: int = 0
    bad: list[str] = field(default_factory=list[str])
    doubled: list[str] = field(default_factory=list[str])
    seconds: float = 0.0


class Failed(Exception):
    """A run ended before its last step."""


async def all_runs(
    runs: int,
    concurrency: int,
    one: Callable[[int], Awaitable[None]],
    tally: Tally,
    *,
    longest_s: float = LONGEST_S,
) -> None:
    """Do every run, so many at once."""
    numbers = iter(range(runs))
    began = time.monotonic()

    async def take() -> None:
        for run in numbers:
            try:
                async with asyncio.timeout(longest_s):
                    await one(run)
            except (Failed, aiohttp.ClientError, TimeoutError, OSError) as error:
                tally.bad.append(f"run {run}: {type(error).__name__} {error}")
            else:
                tally.good += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(take())
    tally.seconds = time.monotonic() - began


def session(silence_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_read=silence_s),
        connector=aiohttp.TCPConnector(limit=0),
        headers={"x-goog-api-key": _KEY},
    )


async def created(http: aiohttp.ClientSession, base: str, body: Any) -> str:
    """Make an interaction and follow its stream to the end; its id."""
    key: str | None = None
    async with http.post(base, json=body) as response:
        if response.status != 200:
            raise Failed(f"the create was answered {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = orjson.loads(line[6:])
            if event["event_type"] == "interaction.created":
                key = event["interaction"]["id"]
            elif event["event_type"] == "error":
                raise Failed(str(event))
            elif event["event_type"] == "interaction.completed":
                assert key is not None
                return key
    raise Failed("the stream ended early")


class Fleet:
    """The workers: each is replaced when it is killed."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._workers: list[asyncio.subprocess.Process] = []
        self._stack = AsyncExitStack()
        self.kills = 0

    @asynccontextmanager
    async def running(self) -> AsyncGenerator["Fleet"]:
        """Run the workers while the context lasts."""
        async with self._stack:
            for _ in range(_WORKERS):
                await self._start()
            yield self

    async def _start(self) -> None:
        log = self._folder / f"worker-{self.kills}-{len(self._workers)}.log"
        child = system.child([_COMMAND, "worker"], log=log, environment=self._environment)
        self._workers.append(await self._stack.enter_async_context(child))

    async def kill_now_and_then(self, every_s: float) -> None:
        """Kill the oldest worker, and start another, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            victim = self._workers.pop(0)
            victim.kill()
            await victim.wait()
            self.kills += 1
            await self._start()


@asynccontextmanager
async def served(
    folder: Path, url: str, model: str, more: Mapping[str, str] | None = None
) -> AsyncGenerator[tuple[int, Fleet]]:
    """An api process and the workers, on this database; with a broker, if `more` sets one up."""
    database = Database(url, pool_size=2)
    await migrate.upgrade(database)
    await database.close()
    provider = {"kind": "openai", "base_url": model, "api_key": "none", "idle_timeout": "1s"}
    port = _free_port()
    environment = {
        "DATABASE_URL": url,
        "OI_PORT": str(port),
        "OI_DATA_DIR": str(folder / "data"),
        "OI_BOOTSTRAP_API_KEY": _KEY,
        "OI_PROVIDERS": json.dumps({"gap": provider}),
        "OI_LOG__LEVEL": "warning",
        **(more or {}),
    }
    log = folder / "api.log"
    command = [_COMMAND, "serve", "--no-worker"]
    async with system.child(command, log=log, environment=environment) as api:
        await _until_ready(api, port, log)
        async with AsyncExitStack() as stack:
            if more:
                command = [_COMMAND, "broker"]
                log = folder / "broker.log"
                broker = system.child(command, log=log, environment=environment)
                await stack.enter_async_context(broker)
            yield port, await stack.enter_async_context(Fleet(folder, environment).running())
