"""A supervisor as a plain process, and a line to it that can be cut anywhere."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from openinteractions.sandbox.pipe import OnConnect, Pipe, boot_argv
from openinteractions.sandbox.port import Command, Duplex, Exit, Output
from openinteractions.sandbox.supervisor.processes import Marker, kill_tree

_serial = itertools.count(1)


class Line:
    """One attachment; passes on only so many bytes each way, then it is dead."""

    def __init__(self, host: "Host", inbound: int | None, outbound: int | None) -> None:
        self._host = host
        self._inbound = inbound
        self._outbound = outbound
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(4)
        self._rest = b""
        self.is_dead = False

    async def read(self, limit: int = 65536) -> bytes:
        if not self._rest:
            self._rest = await self._queue.get()
        piece, self._rest = self._rest[:limit], self._rest[limit:]
        if self._inbound is not None:
            piece = piece[: self._inbound]
            self._inbound -= len(piece)
            if not self._inbound:
                await self.close()
        return piece

    async def write(self, data: bytes) -> None:
        if self.is_dead:
            raise ConnectionResetError("cut")
        if self._outbound is not None:
            data = data[: self._outbound]
            self._outbound -= len(data)
        await self._host.send(data)
        if self._outbound == 0:
            await self.close()
            raise ConnectionResetError("cut")

    async def end(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        self.is_dead = True
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(b"")

    async def deliver(self, received: bytes) -> None:
        put = asyncio.ensure_future(self._queue.put(received))
        while not put.done() and not self.is_dead:
            await asyncio.wait([put], timeout=0.05)
        put.cancel()

    def inject(self, rubbish: bytes) -> None:
        """Bytes that the supervisor never sent."""
        self._queue.put_nowait(rubbish)


class Host:
    """What a container engine is: keeps the process, drops output while nobody is attached."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.line: Line | None = None
        self._turn = asyncio.Lock()

    def attach(self, inbound: int | None = None, outbound: int | None = None) -> Line:
        self.line = Line(self, inbound, outbound)
        return self.line

    async def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        async with self._turn:
            self.process.stdin.write(data)
            await self.process.stdin.drain()

    async def pump(self) -> None:
        assert self.process.stdout is not None
        while received := await self.process.stdout.read(65536):
            if self.line is not None and not self.line.is_dead:
                await self.line.deliver(received)
        if self.line is not None:
            await self.line.close()


async def refuse(kind: str, connection: Duplex) -> None:
    """Egress that lets nothing out."""


@asynccontextmanager
async def host(python: str = "python3") -> AsyncGenerator[Host]:
    """A main process that waits for the supervisor's source."""
    argv = [python, *boot_argv()[1:]]
    process = await asyncio.create_subprocess_exec(*argv, stdin=-1, stdout=-1, limit=1 << 20)
    running = Host(process)
    pump = asyncio.ensure_future(running.pump())
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        # A test that failed may have left commands running.
        await kill_tree(Marker(None, process.pid), None)
        pump.cancel()
        await asyncio.wait([pump])
        process._transport.close()  # pyright: ignore[reportAttributeAccessIssue]


@asynccontextmanager
async def opened(
    running: Host, *, is_fresh: bool = True, on_connect: OnConnect = refuse
) -> AsyncGenerator[Pipe]:
    pipe = await Pipe.open(running.attach(), is_fresh=is_fresh, on_connect=on_connect)
    try:
        yield pipe
    finally:
        await pipe.close()


@asynccontextmanager
async def supervisor(on_connect: OnConnect = refuse) -> AsyncGenerator[Pipe]:
    """A fresh supervisor and a pipe to it; it has killed everything when this ends."""
    async with host() as running, opened(running, on_connect=on_connect) as pipe:
        yield pipe
        if not pipe.lost.is_set():
            await pipe.shutdown()
            await asyncio.wait_for(running.process.wait(), 20)


def command(argv: Sequence[str], **fields: Any) -> Command:
    fields = {"id": f"x.{next(_serial)}", "epoch": 1, "cwd": "/tmp", **fields}
    return Command(argv=argv, **fields)


def shell(script: str, **fields: Any) -> Command:
    return command(["bash", "-c", script], **fields)


async def collect(pipe: Pipe, name: str, offset: int = 0) -> tuple[bytes, bytes, Exit]:
    """Both streams from an offset on, and the result."""
    streams: dict[int, list[bytes]] = {1: [], 2: []}
    async for item in pipe.follow(name, offset):
        if isinstance(item, Output):
            streams[item.stream].append(item.data)
        else:
            return b"".join(streams[1]), b"".join(streams[2]), item
    raise AssertionError("the command has no result")


async def run(pipe: Pipe, given: Command) -> tuple[bytes, bytes, Exit]:
    assert await pipe.start(given)
    return await asyncio.wait_for(collect(pipe, given.id), 60)


async def first_output(pipe: Pipe, name: str) -> bytes:
    """What comes first; the command runs on."""
    follower = pipe.follow(name)
    try:
        async for item in follower:
            assert isinstance(item, Output), item
            return item.data
    finally:
        await follower.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    raise AssertionError("no output")
