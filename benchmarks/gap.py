"""`make gap`: the coordination gap, in one run, side by side.

A run is six model turns, each continuing the one before; three turns in a hundred fail (a 500, a
cut, a stall). The naive chain calls the model itself, one step after the other, and ends where a
step fails: 0.97 ** 6 = 83 %. Ours asks the server for each step in the background, while workers
are killed -9 and started again. Exit status 1 if fewer than 99.9 % of our runs end well, or if any
step was done twice.
"""

import argparse
import asyncio
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import uvloop

from benchmarks import gap_upstream as upstream
from benchmarks import system
from benchmarks.gap_upstream import STEPS, Record, answer, prompt
from benchmarks.run import _folder, _free_port, _load, _show_logs, _until_ready
from openinteractions import telemetry
from openinteractions.db import migrate
from openinteractions.db.embedded import EmbeddedPostgres
from openinteractions.db.engine import Database

_GOAL = 0.999
_SILENCE_S = 1.0
_WORKERS = 2
_KILL_EVERY_S = 10.0
_LONGEST_S = 60
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


# ---- the naive chain


async def naive_step(http: aiohttp.ClientSession, base: str, messages: list[Any]) -> str:
    """One call of the model; whatever goes wrong ends the run."""
    body = {"model": "m", "messages": messages, "stream": True}
    text, is_whole = "", False
    try:
        async with http.post(f"{base}/chat/completions", json=body) as response:
            if response.status != 200:
                raise Failed(f"the model answered {response.status}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choices = orjson.loads(line[6:])["choices"]
                    text += choices[0]["delta"].get("content", "") if choices else ""
                is_whole = is_whole or line.startswith(b"data: [DONE]")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Failed(type(error).__name__) from error
    if not is_whole:
        raise Failed("the answer was cut off")
    return text


async def naive_run(http: aiohttp.ClientSession, base: str, run: int) -> None:
    """Six calls, one after the other."""
    messages: list[Any] = []
    for step in range(STEPS):
        messages.append({"role": "user", "content": prompt(run, step)})
        text = await naive_step(http, base, messages)
        messages.append({"role": "assistant", "content": text})


# ---- ours


async def our_run(http: aiohttp.ClientSession, base: str, run: int, tally: Tally) -> None:
    """Six background interactions, each read as a stream to its end, then looked at."""
    previous: str | None = None
    for step in range(STEPS):
        asked = prompt(run, step)
        body = {"model": "gap/m", "input": asked, "background": True, "stream": True}
        if previous is not None:
            body["previous_interaction_id"] = previous
        previous = await _created(http, base, body)
        async with http.get(f"{base}/{previous}") as response:
            _judge(asked, await response.json(), tally)


async def _created(http: aiohttp.ClientSession, base: str, body: Any) -> str:
    """Make one step and follow its stream to the end; its id."""
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


def _judge(asked: str, shown: Any, tally: Tally) -> None:
    """One step's end: the right answer, once; tries that broke off are marked as such."""
    answers = [step for step in shown["steps"] if step["type"] == "model_output"]
    whole = [_text(step) for step in answers if not step.get("error")]
    if len(whole) > 1:
        tally.doubled.append(asked)
    if shown["status"] != "completed" or whole != [answer(asked)]:
        raise Failed(f"{asked} is {shown['status']} with {whole}")


def _text(step: Any) -> str:
    return "".join(block.get("text", "") for block in step["content"])


# ---- both


async def all_runs(
    runs: int, concurrency: int, one: Callable[[int], Awaitable[None]], tally: Tally
) -> None:
    """Do every run, so many at once."""
    numbers = iter(range(runs))
    began = time.monotonic()

    async def take() -> None:
        for run in numbers:
            try:
                async with asyncio.timeout(_LONGEST_S):
                    await one(run)
            except (Failed, aiohttp.ClientError, TimeoutError, OSError) as error:
                tally.bad.append(f"run {run}: {type(error).__name__} {error}")
            else:
                tally.good += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(take())
    tally.seconds = time.monotonic() - began


def _session(silence_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_read=silence_s),
        connector=aiohttp.TCPConnector(limit=0),
        headers={"x-goog-api-key": _KEY},
    )


async def measure_naive(runs: int, concurrency: int) -> tuple[Tally, Record]:
    """The naive chain."""
    tally, record = Tally(), Record()
    async with upstream.serving(record) as base, _session(_SILENCE_S) as http:
        await all_runs(runs, concurrency, lambda run: naive_run(http, base, run), tally)
    return tally, record


async def measure_ours(runs: int, concurrency: int, folder: Path) -> tuple[Tally, Record, int]:
    """The same through the server; how many workers were killed meanwhile."""
    tally, record = Tally(), Record()
    async with (
        upstream.serving(record) as model,
        EmbeddedPostgres(folder / "home") as postgres,
        _served(folder, postgres.url, model) as (port, fleet),
        _session(_LONGEST_S) as http,
    ):
        base = f"http://127.0.0.1:{port}/v1beta/interactions"
        killer = asyncio.ensure_future(fleet.kill_now_and_then())
        await all_runs(runs, concurrency, lambda run: our_run(http, base, run, tally), tally)
        killer.cancel()
        await asyncio.wait([killer])
        connection = await asyncpg.connect(postgres.url)
        made = await connection.fetchval("select count(*) from interactions")
        await connection.close()
    if made > runs * STEPS:
        tally.doubled.append(f"{made} interactions for {runs * STEPS} steps")
    tally.doubled += [prompt(*late) for late in record.late]
    tally.bad += [f"the model saw a wrong history of {asked}" for asked in record.wrong]
    return tally, record, fleet.kills


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

    async def kill_now_and_then(self) -> None:
        """Kill the oldest worker, and start another, until cancelled."""
        while True:
            await asyncio.sleep(_KILL_EVERY_S)
            victim = self._workers.pop(0)
            victim.kill()
            await victim.wait()
            self.kills += 1
            await self._start()


@asynccontextmanager
async def _served(folder: Path, url: str, model: str) -> AsyncGenerator[tuple[int, Fleet]]:
    """An api process and the workers, on this database."""
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
    }
    log = folder / "api.log"
    command = [_COMMAND, "serve", "--no-worker"]
    async with system.child(command, log=log, environment=environment) as api:
        await _until_ready(api, port, log)
        async with Fleet(folder, environment).running() as fleet:
            yield port, fleet


# ---- the report


def _line(name: str, tally: Tally, runs: int, more: str) -> None:
    share = 100 * tally.good / runs
    print(
        f"{name}: {tally.good} of {runs} runs ended well, {share:.1f} % · {more} · "
        f"{tally.seconds:.0f} s",
        flush=True,
    )


async def _main(runs: int, concurrency: int) -> int:
    telemetry.configure(level="warning", form="text")
    print(
        f"{runs} runs of {STEPS} steps, {100 * upstream.FAULTS:.0f} % of the steps fail, "
        f"{concurrency} at once; machine: {os.cpu_count()} cores, load {_load()}"
    )
    folder = _folder()
    try:
        naive, plain = await measure_naive(runs, concurrency)
        _line("naive chain     ", naive, runs, f"faults {sum(plain.faults.values())}")
        ours, record, kills = await measure_ours(runs, concurrency, folder)
        again = sum(record.whole.values()) - len(record.whole)
        _line(
            "OpenInteractions",
            ours,
            runs,
            f"faults {sum(record.faults.values())} {dict(record.faults)}, "
            f"workers killed {kills}, model calls repeated for them {again}",
        )
        print(f"steps done twice: {len(ours.doubled)}")
        is_good = ours.good >= _GOAL * runs and not ours.doubled and not record.wrong
        for line in [*ours.bad, *ours.doubled][:20]:
            print("  " + line[:500])
        if not is_good:
            _show_logs(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"goal: >= {100 * _GOAL:.1f} %, nothing twice: {'met' if is_good else 'NOT MET'}")
    return 0 if is_good else 1


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make gap")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=50)
    given = parser.parse_args()
    sys.exit(uvloop.run(_main(given.runs, given.concurrency)))


if __name__ == "__main__":
    main()
