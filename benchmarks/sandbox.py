"""Sandboxes beside `docker run`, `docker exec` and the bare floor, in one run.

One server with its broker, as `openinteractions serve` starts them; commands go through the
broker's client, as a run's do, files and forks through the public API. `python -m
benchmarks.sandbox` needs root, a container engine and the image openinteractions/sandbox:slim.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import aiohttp
import psutil

from benchmarks import system
from benchmarks.run import Goal, _folder, _line, _load, _server, _show_logs
from openinteractions import crypto, telemetry
from openinteractions.errors import Unready
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.port import Command, Exit, Output

IMAGE = os.environ.get("OI_BENCH_IMAGE", "openinteractions/sandbox:slim")
RUNTIME = os.environ.get("OI_BENCH_RUNTIME")
_ROUNDS = 9
_MANY = 60
_BLOB = 100 * 10**6
_KEY = f"oi_bench_{secrets.token_hex(16)}"
BROKER = f"bench-{secrets.token_hex(4)}"
_ENGINE = "/var/run/docker.sock"
_UNTIL_UP_S = 60


@dataclass(frozen=True, slots=True)
class Place:
    """The server under measurement."""

    client: BrokerClient
    address: str
    base: str
    http: aiohttp.ClientSession
    engine: aiohttp.ClientSession
    server: psutil.Process

    async def make(self) -> UUID:
        """An environment with one file, so that it has its disk."""
        body = {"sources": [{"type": "inline", "target": "workspace/a.txt", "content": "a"}]}
        async with self.http.post(f"{self.base}/environments", json=body) as answer:
            assert answer.status == 200, await answer.text()
            return UUID((await answer.json())["id"])

    async def run(self, environment: UUID, *argv: str) -> tuple[float, float]:
        """Run a command; seconds to its first output, and to its end."""
        command = Command(id=f"{uuid4().hex}.0", epoch=1, argv=argv)
        began = time.perf_counter()
        first = None
        async with self.client.execute(self.address, environment, command) as events:
            async for event in events:
                if isinstance(event, Output) and first is None:
                    first = time.perf_counter() - began
                if isinstance(event, Exit):
                    assert event.code == 0, event
        return first or 0.0, time.perf_counter() - began

    async def warm(self) -> int:
        """How many sandboxes are ready."""
        return int((await self.client.health(self.address))["warm"])

    async def until_warm(self) -> None:
        """Wait until the pool is full again, so that rounds do not disturb each other."""
        for _ in range(300):
            if await self.warm():
                return
            await asyncio.sleep(0.05)
        raise RuntimeError("no warm sandbox appeared")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


async def _timed(action: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await action()
    return time.perf_counter() - began


async def _docker_run() -> float:
    runtime = ["--runtime", RUNTIME] if RUNTIME else []
    arguments = ["run", "--rm", "--network", "none", *runtime, IMAGE, "true"]
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        "docker", *arguments, stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0
    return time.perf_counter() - began


async def _engine_exec(place: Place, container: str) -> float:
    """`docker exec true` as an API client does it: create, start, read to the end."""
    began = time.perf_counter()
    body = {"Cmd": ["true"], "AttachStdout": True}
    path = f"http://engine/containers/{container}/exec"
    async with place.engine.post(path, json=body) as answer:
        execution = (await answer.json())["Id"]
    start = {"Detach": False, "Tty": False}
    async with place.engine.post(f"http://engine/exec/{execution}/start", json=start) as answer:
        await answer.read()
    return time.perf_counter() - began


async def _fork_floor() -> float:
    """A process of this machine, without any sandbox."""
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec("/bin/true")
    await process.wait()
    return time.perf_counter() - began


async def starts(place: Place) -> None:
    """A first command, warm and cold, beside `docker run`."""
    warm: list[float] = []
    cold: list[float] = []
    runs: list[float] = []
    for _ in range(_ROUNDS):
        await place.until_warm()
        first, second = await place.make(), await place.make()
        warm.append((await place.run(first, "echo", "ready"))[0])
        # The pool has one, and the next is not ready yet.
        cold.append((await place.run(second, "echo", "ready"))[0])
        runs.append(await _docker_run())
        for environment in (first, second):
            await place.client.delete(place.address, environment)
    medians = [statistics.median(values) for values in (warm, cold, runs)]
    _line(
        "new sandbox, warm: first output",
        f"{_ms(medians[0])} {Goal(most=50, unit=' ms').judge(medians[0] * 1000)}",
    )
    ratio = medians[1] / medians[2]
    _line(
        "new sandbox, cold: first output",
        f"{_ms(medians[1])}, {ratio:.2f} of `docker run` {Goal(most=1.5).judge(ratio)}",
        f"`docker run --rm true` {_ms(medians[2])}",
    )


async def commands(place: Place) -> None:
    """Further commands, beside `docker exec` through the engine's API and a bare process."""
    environment = await place.make()
    await place.run(environment, "true")
    name = await _container(place)
    ours, theirs, floor = [], [], []
    for _ in range(_MANY):
        ours.append((await place.run(environment, "true"))[1])
        theirs.append(await _engine_exec(place, name))
        floor.append(await _fork_floor())
    mine, exec_, bare = (statistics.median(values) for values in (ours, theirs, floor))
    _line(
        "a further command",
        f"{_ms(mine)} {Goal(most=10, unit=' ms').judge(mine * 1000)}",
        f"{mine / exec_:.2f} of `docker exec` {Goal(most=0.2).judge(mine / exec_)}",
        f"`docker exec` {_ms(exec_)}, a bare process {_ms(bare)}",
    )
    eight = [
        await _timed(lambda: asyncio.gather(*(place.run(environment, "true") for _ in range(8))))
        for _ in range(_ROUNDS)
    ]
    _line("eight commands at once", _ms(statistics.median(eight)))
    await place.client.delete(place.address, environment)


async def _container(place: Place) -> str:
    """Any sandbox of ours: they are all alike to the engine."""
    async with place.engine.get("http://engine/containers/json") as answer:
        found = await answer.json()
    return next(c["Id"] for c in found if c["Labels"].get("openinteractions.broker") == BROKER)


async def files(place: Place) -> None:
    """100 MB up and down through the public API, and a fork of them."""
    environment = await place.make()
    data = os.urandom(_BLOB)
    up, down, forks = [], [], []
    upload = f"{place.base.replace('/v1beta', '/upload/v1beta')}/environments/{environment.hex}"
    path = "files/workspace/blob"
    for _ in range(5):
        began = time.perf_counter()
        async with place.http.put(f"{upload}/{path}?overwrite=true", data=data) as answer:
            assert answer.status == 200, await answer.text()
        up.append(_BLOB / 10**6 / (time.perf_counter() - began))
        began = time.perf_counter()
        size = 0
        url = f"{place.base}/environments/{environment.hex}/{path}?alt=media"
        async with place.http.get(url) as answer:
            async for chunk in answer.content.iter_chunked(1 << 20):
                size += len(chunk)
        assert size == _BLOB
        down.append(_BLOB / 10**6 / (time.perf_counter() - began))
    for _ in range(5):
        began = time.perf_counter()
        body = {"from_environment": environment.hex}
        async with place.http.post(f"{place.base}/environments", json=body) as answer:
            copy = await answer.json()
            assert answer.status == 200, copy
        forks.append(time.perf_counter() - began)
        async with place.http.delete(f"{place.base}/environments/{copy['id']}") as answer:
            await answer.read()
    goal = Goal(least=100, unit=" MB/s")
    for name, values in (("up", up), ("down", down)):
        rate = statistics.median(values)
        _line(f"100 MB {name}, public API", f"{rate:.0f} MB/s {goal.judge(rate)}")
    fork = statistics.median(forks)
    _line("fork of 100 MB, public API", f"{_ms(fork)} {Goal(most=100).judge(fork * 1000)}")
    await place.client.delete(place.address, environment)


async def answers(place: Place) -> None:
    """An answer that needs no tool, with and without `code_execution` on offer."""
    bodies: list[dict[str, object]] = [{"model": "bench/m", "input": "Hello"}]
    bodies.append({**bodies[0], "tools": [{"type": "code_execution"}]})
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(_MANY):
        for body, times in zip(bodies, taken, strict=True):
            began = time.perf_counter()
            async with place.http.post(f"{place.base}/interactions", json=body) as answer:
                assert (await answer.json())["status"] == "completed"
            times.append(time.perf_counter() - began)
    plain, offered = (statistics.median(times) for times in taken)
    _line("an answer without a tool call", _ms(plain), f"with the tool on offer {_ms(offered)}")


async def idle(place: Place) -> None:
    """Fifty environments with a file each that nobody uses."""
    broker = _broker(place.server)
    before, containers = broker.memory_info().rss, await _containers(place)
    made: list[UUID] = []
    for _ in range(50):
        made.append(await place.make())
        await place.client.stop(place.address, made[-1])
    grown = (broker.memory_info().rss - before) / 2**20
    _line(
        "50 idle environments",
        f"{await _containers(place) - containers} containers",
        f"broker +{grown:.1f} MiB",
    )
    for environment in made:
        await place.client.delete(place.address, environment)


async def _containers(place: Place) -> int:
    await place.until_warm()
    async with place.engine.get("http://engine/containers/json") as answer:
        found = await answer.json()
    return sum(c["Labels"].get("openinteractions.broker") == BROKER for c in found)


def _broker(server: psutil.Process) -> psutil.Process:
    return next(p for p in server.children(recursive=True) if "broker" in p.cmdline())


@asynccontextmanager
async def _opened(folder: Path) -> AsyncGenerator[Place]:
    home = folder / "home"
    settings = {
        "OI_BOOTSTRAP_API_KEY": _KEY,
        "OI_SANDBOX__ENABLED": "on",
        "OI_SANDBOX__BROKER": BROKER,
        "OI_SANDBOX__IMAGE": IMAGE,
        "OI_SANDBOX__MEMORY_BYTES": str(2**30),
    }
    if RUNTIME:
        settings["OI_SANDBOX__RUNTIME"] = RUNTIME
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(
            system.child(system.python("upstream"), log=folder / "upstream.log")
        )
        base = f"http://127.0.0.1:{await system.port_of(upstream)}/v1"
        provider = {"kind": "openai", "base_url": base, "api_key": "none"}
        settings["OI_PROVIDERS"] = json.dumps({"bench": provider})
        process, port = await stack.enter_async_context(
            _server(home, folder / "server.log", settings)
        )
        token = crypto.broker_token(crypto.master_key(None, home))
        client = BrokerClient(token)
        stack.push_async_callback(client.close)
        headers = {"x-goog-api-key": _KEY}
        http = await stack.enter_async_context(aiohttp.ClientSession(headers=headers))
        engine = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(_ENGINE))
        )
        place = Place(
            client,
            f"unix://{home / 'sandboxes' / 'broker.sock'}",
            f"http://127.0.0.1:{port}/v1beta",
            http,
            engine,
            psutil.Process(process.pid),
        )
        await _until_up(place)
        yield place


async def _until_up(place: Place) -> None:
    deadline = time.monotonic() + _UNTIL_UP_S
    while time.monotonic() < deadline:
        with contextlib.suppress(Unready):
            if await place.warm():
                return
        await asyncio.sleep(0.2)
    raise RuntimeError("the broker did not come up")


async def main() -> None:
    """Measure, and print a line for each."""
    folder = _folder()
    telemetry.configure(level="warning", form="text")
    print(f"sandboxes: {IMAGE}, runtime {RUNTIME or 'default'}, load {_load()} before")
    try:
        async with _opened(folder) as place:
            await starts(place)
            await commands(place)
            await files(place)
            await answers(place)
            await idle(place)
    except BaseException:
        _show_logs(folder)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    asyncio.run(main())
