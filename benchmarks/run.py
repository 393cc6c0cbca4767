"""`make bench`: the server against the floor, on this machine, now.

Machines differ and are shared, so what counts are ratios of runs that take turns, CPU time before
wall time, and medians of rounds. The goals are those of ruling R14 and of docs/decisions.
"""

import asyncio
import json
import os
import secrets
import shutil
import socket
import statistics
import tempfile
import time
import traceback
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import system
from benchmarks.system import Load
from openinteractions import telemetry
from openinteractions.db import migrate
from openinteractions.db.embedded import EmbeddedPostgres
from openinteractions.db.engine import Database

_ROUNDS = 9
_ROUND_S = 2.0
_WARM_UP_S = 3.0
_CONCURRENCY = 16
_STREAMS = 200
_TURN = 1000
_BLOCKS = 8
_BLOCK = 25
_KEY = f"oi_bench_{secrets.token_hex(16)}"
_PATH = "/v1beta/interactions"
_ASK = "How quick is the brown fox? Answer in one sentence, and say where it is going today."
_BODY = {"model": "bench/m", "input": _ASK}
_HEALTHY_S = 60
_SETTLE_S = 35
"""Within its first half minute, a server looks for answers that an earlier one may have lost."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A number and what it should be."""

    most: float | None = None
    least: float | None = None
    unit: str = ""

    def judge(self, value: float) -> str:
        """The goal in words, and whether the value meets it."""
        is_met = (self.most is None or value <= self.most) and (
            self.least is None or value >= self.least
        )
        text = f"<= {self.most:g}" if self.most is not None else f">= {self.least:g}"
        return f"(goal {text}{self.unit}: {'met' if is_met else 'NOT MET'})"


@dataclass(frozen=True, slots=True)
class Round:
    """One round of load on one server."""

    rate: float
    errors: int
    server_ms: float
    """CPU a request, of the server alone."""
    postgres_ms: float

    @property
    def all_ms(self) -> float:
        """CPU a request, the database's included."""
        return self.server_ms + self.postgres_ms


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that runs while it is measured."""

    load: Load
    postgres: int
    ours: int
    ours_port: int
    floor: int
    floor_port: int
    upstream: str

    async def press(self, *, ours: bool, seconds: float) -> Round:
        """One round."""
        pid, port = (self.ours, self.ours_port) if ours else (self.floor, self.floor_port)
        server, postgres = system.cpu_s(pid), system.cpu_s(self.postgres)
        report = await self.load.order(
            "press",
            port=port,
            path=_PATH,
            key=_KEY,
            body=_BODY,
            concurrency=_CONCURRENCY,
            seconds=seconds,
        )
        count = report["requests"]
        return Round(
            rate=count / report["seconds"],
            errors=report["errors"],
            server_ms=1000 * (system.cpu_s(pid) - server) / count,
            postgres_ms=1000 * (system.cpu_s(self.postgres) - postgres) / count,
        )

    async def talk(self, count: int, *, previous: str | None, goes_on: bool) -> tuple[float, Any]:
        """Turns one after another; the server's CPU milliseconds a turn, and the last turn."""
        began = system.cpu_s(self.ours)
        report = await self.load.order(
            "talk",
            port=self.ours_port,
            path=_PATH,
            key=_KEY,
            body=_BODY,
            count=count,
            previous=previous,
            goes_on=goes_on,
        )
        if report["errors"]:
            print(f"  {report['errors']} of {count} turns FAILED")
        return 1000 * (system.cpu_s(self.ours) - began) / count, report["previous"]

    async def send(self, size: int, count: int) -> float:
        """CPU milliseconds to send so many bytes to the upstream, and read its answer."""
        began = system.cpu_s(self.floor)
        await self.load.order(
            "talk",
            port=self.floor_port,
            path=f"/send/{size}",
            key=_KEY,
            body={},
            count=count,
            previous=None,
            goes_on=False,
        )
        return 1000 * (system.cpu_s(self.floor) - began) / count

    async def last_size(self) -> int:
        """Bytes of the last request that the upstream got."""
        async with aiohttp.ClientSession() as session, session.get(self.upstream) as answer:
            return int(await answer.text())


def _line(what: str, *parts: str) -> None:
    print(f"{what}: {' · '.join(parts)}", flush=True)


def _median(values: list[float]) -> float:
    return statistics.median(values)


# ---- what is measured


async def against_the_floor(bench: Bench) -> None:
    """Requests a second and CPU a request, ours and the floor's, in rounds that take turns."""
    for ours in (False, True):
        await bench.press(ours=ours, seconds=_WARM_UP_S)
    floors: list[Round] = []
    turns: list[Round] = []
    for number in range(_ROUNDS):
        order = (False, True) if number % 2 == 0 else (True, False)
        for ours in order:
            (turns if ours else floors).append(await bench.press(ours=ours, seconds=_ROUND_S))
    pairs = list(zip(turns, floors, strict=True))
    rate = _median([a.rate / b.rate for a, b in pairs])
    alone = _median([a.server_ms / b.server_ms for a, b in pairs])
    whole = _median([a.all_ms / b.all_ms for a, b in pairs])
    cost = _median([a.all_ms for a in turns])
    _line(
        f"stored turn, c={_CONCURRENCY}",
        f"requests/s {rate:.2f} of the floor {Goal(least=0.5).judge(rate)}",
        f"CPU {whole:.2f}x {Goal(most=2.1).judge(whole)}",
        f"server alone {alone:.2f}x",
    )
    _line(
        "CPU a turn, server + PostgreSQL",
        f"{cost:.2f} ms {Goal(most=5, unit=' ms').judge(cost)}",
        f"server {_median([a.server_ms for a in turns]):.2f}"
        f" + PostgreSQL {_median([a.postgres_ms for a in turns]):.2f} ms",
        f"floor {_median([b.server_ms for b in floors]):.2f}"
        f" + {_median([b.postgres_ms for b in floors]):.2f} ms",
    )
    _line(
        "in absolute numbers",
        f"{_median([a.rate for a in turns]):.0f} turns/s",
        f"floor {_median([b.rate for b in floors]):.0f} requests/s",
        f"errors {sum(r.errors for r in turns)} and {sum(r.errors for r in floors)}",
    )


async def first_event(bench: Bench) -> None:
    """How soon a stream shows something, one stream at a time."""
    order = {"port": bench.ours_port, "path": _PATH, "key": _KEY, "body": {**_BODY, "stream": True}}
    await bench.load.order("stream", count=20, **order)
    report = await bench.load.order("stream", count=_STREAMS, **order)

    def spread(name: str) -> tuple[float, float]:
        times = sorted(report[name])
        return _median(times), times[int(0.95 * len(times))]

    middle, high = spread("first_event_ms")
    delta, end = spread("first_delta_ms"), spread("end_ms")
    _line(
        "first event of a stream, c=1",
        f"median {middle:.1f} ms {Goal(most=10, unit=' ms').judge(middle)}",
        f"p95 {high:.1f} ms",
        f"first delta {delta[0]:.1f} / {delta[1]:.1f} ms",
        f"end {end[0]:.1f} / {end[1]:.1f} ms",
        f"errors {report['errors']}",
    )


async def deep_conversation(bench: Bench) -> None:
    """The CPU of turn 1 and of turn 1000, in blocks that take turns."""
    await bench.talk(_BLOCK, previous=None, goes_on=False)
    small = await bench.last_size()
    middle = _TURN - _BLOCKS * _BLOCK // 2
    _, previous = await bench.talk(middle, previous=None, goes_on=True)
    first: list[float] = []
    deep: list[float] = []
    for _ in range(_BLOCKS):
        first.append((await bench.talk(_BLOCK, previous=None, goes_on=False))[0])
        cost, previous = await bench.talk(_BLOCK, previous=previous, goes_on=True)
        deep.append(cost)
    large = await bench.last_size()
    sending: list[float] = []
    for _ in range(_BLOCKS):
        light = await bench.send(small, _BLOCK * 2)
        sending.append(await bench.send(large, _BLOCK * 2) - light)
    # Means, since the kernel counts CPU in ticks of 10 ms, which is coarse for one block.
    shallow, depth = statistics.mean(first), statistics.mean(deep)
    transport = statistics.mean(sending)
    ratio = (depth - transport) / shallow
    _line(
        f"turn {_TURN} against turn 1, server CPU",
        f"{ratio:.2f}x {Goal(most=1.2).judge(ratio)}",
        f"with its transport {depth / shallow:.2f}x",
        f"turn 1 {shallow:.2f} ms, turn {_TURN} {depth:.2f} ms, of which {transport:.2f} ms send "
        f"{large / 1024:.0f} KiB of history",
    )


async def start_and_idle(home: Path, logs: Path) -> None:
    """Start on an empty and on a warm data folder; memory when idle."""
    cold, _ = await _start_once(home, logs / "cold.log", rest_s=0)
    warm: list[float] = []
    sizes: list[tuple[float, float]] = []
    for _ in range(3):
        seconds, memory = await _start_once(home, logs / "warm.log", rest_s=2)
        warm.append(seconds)
        sizes.append(memory)
    seconds = _median(warm)
    _line(
        "start to ready, warm data folder",
        f"{seconds:.2f} s {Goal(most=4, unit=' s').judge(seconds)}",
        f"empty data folder {cold:.2f} s",
    )
    rss, pss = (_median([size[n] for size in sizes]) for n in (0, 1))
    _line(
        "memory of the idle server process",
        f"RSS {rss:.0f} MiB {Goal(most=150, unit=' MiB').judge(rss)}",
        f"PSS {pss:.0f} MiB",
    )


# ---- what runs meanwhile


async def _start_once(home: Path, log: Path, *, rest_s: float) -> tuple[float, tuple[float, float]]:
    began = time.perf_counter()
    async with _server(home, log, {}) as (process, _):
        seconds = time.perf_counter() - began
        await asyncio.sleep(rest_s)
        return seconds, system.memory_mib(process.pid)


@asynccontextmanager
async def _server(
    home: Path, log: Path, environment: dict[str, str]
) -> AsyncGenerator[tuple[asyncio.subprocess.Process, int]]:
    """Our server, once it is ready, and its port."""
    port = _free_port()
    command = [str(system.ROOT / ".venv/bin/openinteractions"), "serve"]
    settings = {
        "OI_PORT": str(port),
        "OI_DATA_DIR": str(home),
        "OI_BOOTSTRAP_API_KEY": _KEY,
        # Sandboxes have a benchmark of their own.
        "OI_SANDBOX__ENABLED": "off",
    }
    async with system.child(command, log=log, environment={**settings, **environment}) as process:
        await _until_ready(process, port, log)
        yield process, port


async def _until_ready(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    deadline = time.monotonic() + _HEALTHY_S
    async with aiohttp.ClientSession() as session:
        while process.returncode is None and time.monotonic() < deadline:
            try:
                async with session.get(f"http://127.0.0.1:{port}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.01)
    raise RuntimeError("the server is not ready; its log is " + log.name)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@asynccontextmanager
async def _opened(home: Path, logs: Path) -> AsyncGenerator[Bench]:
    """A database, the upstream, both servers and the load generator."""
    async with AsyncExitStack() as stack:
        postgres = await stack.enter_async_context(EmbeddedPostgres(home))
        database = Database(postgres.url, pool_size=2)
        await migrate.upgrade(database)
        await database.close()

        async def start(module: str, *arguments: str) -> asyncio.subprocess.Process:
            command = system.python(module, *arguments)
            return await stack.enter_async_context(
                system.child(command, log=logs / f"{module}.log")
            )

        upstream = f"http://127.0.0.1:{await system.port_of(await start('upstream'))}"
        floor = await start("floor", postgres.url, f"{upstream}/v1/chat/completions")
        floor_port = await system.port_of(floor)
        providers = {"bench": {"kind": "openai", "base_url": f"{upstream}/v1", "api_key": "none"}}
        ours, ours_port = await stack.enter_async_context(
            _server(
                home,
                logs / "server.log",
                {"DATABASE_URL": postgres.url, "OI_PROVIDERS": json.dumps(providers)},
            )
        )
        yield Bench(
            load=Load(await start("load")),
            postgres=system.postgres_pid(),
            ours=ours.pid,
            ours_port=ours_port,
            floor=floor.pid,
            floor_port=floor_port,
            upstream=upstream,
        )


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="oi-bench-", dir="/tmp"))
    # PostgreSQL runs as another account where we are root, and has to get in.
    folder.chmod(0o711)
    return folder


def _show_logs(folder: Path) -> None:
    for log in sorted(folder.glob("*.log")):
        print(f"---- {log.name}", log.read_text()[-2000:], sep="\n")


async def _main() -> None:
    began = time.monotonic()
    folder = _folder()
    telemetry.configure(level="warning", form="text")
    print(f"machine: {os.cpu_count()} cores, load {_load()} before; medians of {_ROUNDS} rounds")
    try:
        async with _opened(folder / "home", folder) as bench:
            settled = time.monotonic() + _SETTLE_S
            await start_and_idle(folder / "own", folder)
            await asyncio.sleep(max(0.0, settled - time.monotonic()))
            await first_event(bench)
            await against_the_floor(bench)
            await deep_conversation(bench)
            rss, pss = system.memory_mib(bench.ours)
            _line("memory after all this", f"RSS {rss:.0f} MiB", f"PSS {pss:.0f} MiB")
    except Exception:  # noqa: BLE001 - as said
        # The exit status is 0 all the same: a benchmark reports, it does not judge a build.
        traceback.print_exc()
        _show_logs(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"machine: load {_load()} after; took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    asyncio.run(_main())
