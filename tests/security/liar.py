"""A supervisor that has gone over: it speaks the protocol, and nothing that it says is true.

No sandboxed code can become one (`attacks/warden.py` tries). Here the host's root stops the real
one and speaks in its place, over its own pipe: what the broker makes of it must not depend on that.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from openinteractions.sandbox.frames import MAGIC
from openinteractions.sandbox.mux import Mux, MuxStream
from openinteractions.sandbox.supervisor.service import Channel

_READ, _WRITE = 0, 1
BOMB = 11
"""The shortest distance of two heads that overlap, each of a frame of the greatest length."""


def pipe_end(pid: int, mode: int) -> int:
    """A descriptor of our own for the supervisor's way in, or out."""
    for each in Path(f"/proc/{pid}/fd").iterdir():
        if str(each.readlink()).startswith("pipe:"):
            flags = (
                Path(f"/proc/{pid}/fdinfo/{each.name}").read_text().split("flags:")[1].split()[0]
            )
            if int(flags, 8) & os.O_ACCMODE == mode:
                return os.open(each, (os.O_RDONLY, os.O_WRONLY)[mode] | os.O_NONBLOCK)
    raise AssertionError("no pipe")


@asynccontextmanager
async def stopped(pid: int) -> AsyncGenerator[tuple[int, int]]:
    """The real supervisor does nothing meanwhile; its pipe's ends."""
    ends = pipe_end(pid, _READ), pipe_end(pid, _WRITE)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield ends
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        for end in ends:
            os.close(end)


@asynccontextmanager
async def lying(pid: int, lie: str) -> AsyncGenerator["Liar"]:
    """Its place is taken by a liar."""
    async with stopped(pid) as ends:
        channel = Channel(*ends)
        liar = Liar(lie)
        mux = liar.mux = Mux(channel.read, channel.write, False, liar.serve)
        await mux.start()
        # Whatever this is, it has no right number: the host greets anew.
        os.write(ends[1], MAGIC)
        mux._tell(8, 0)
        try:
            yield liar
        finally:
            await mux.close()


class Liar:
    """Answers requests."""

    mux: Mux

    def __init__(self, lie: str) -> None:
        self.lie = lie
        self.sent = 0

    async def serve(self, stream: MuxStream) -> None:
        if stream.kind == "follow":
            await getattr(self, f"follow_{self.lie}")(stream)
        else:
            answer = {"start": {"started": True}, "list": {"executions": 5}}.get(stream.kind, {})
            await stream.write(json.dumps(answer).encode())
        await stream.end()

    async def record(self, stream: MuxStream, kind: int, content: bytes, size: int | None = None):
        length = len(content) if size is None else size
        await stream.write(bytes([kind]) + length.to_bytes(4, "big") + content)
        self.sent += len(content)

    async def follow_giant(self, stream: MuxStream) -> None:
        """A record of 4 GiB."""
        await self.record(stream, 1, b"x", 0xFFFFFFFF)

    async def follow_nonsense(self, stream: MuxStream) -> None:
        await self.record(stream, 3, b"[" * 60000)

    async def follow_unheard(self, stream: MuxStream) -> None:
        await self.record(stream, 77, b"{}")

    async def follow_nothing(self, stream: MuxStream) -> None:
        """No result, ever."""

    async def follow_forged(self, stream: MuxStream) -> None:
        """A result that cannot be, where it is not plainly false."""
        await self.record(stream, 1, b"all is well\n")
        await self.record(stream, 4, b"\xff" * 100)
        result = (
            '{"outcome": {"a": []}, "code": 99999, "signal": -5, "timed_out": "yes",'
            '"cpu_s": 1e999,'
            '"wall_s": NaN, "max_rss_bytes": ' + "9" * 400 + ', "output_bytes": "5", "extra": 1}'
        )
        await self.record(stream, 3, result.encode())

    async def follow_endless(self, stream: MuxStream) -> None:
        """Output until nobody wants it."""
        block = b"z" * 60000
        while True:
            await self.record(stream, 1, block)

    async def follow_crowd(self, stream: MuxStream) -> None:
        """More connections to the outside than there may be, each of them begun and left."""
        others = []
        with contextlib.suppress(ConnectionError):
            for number in range(3000):
                kind = ("proxy", "http", "https", "dns", "x" * 1000)[number % 5]
                other = await self.mux.open(kind, {"port": number})
                await other.write(b"CONNECT ")
                others.append(other)
                if number % 50 == 0:
                    await asyncio.sleep(0)
        await asyncio.sleep(1)
        self.sent = len(others)
        for other in others:
            await other.close()
        await self.record(stream, 3, b'{"outcome": "exited", "code": 0}')


async def pour(end: int, block: bytes, seconds: float) -> int:
    """Write the same again and again, as fast as it is taken; how much that was."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    total = 0
    while loop.time() < until:
        try:
            total += os.write(end, block)
        except BlockingIOError:
            await asyncio.sleep(0.001)
        except BrokenPipeError:
            return total
        await asyncio.sleep(0)
    return total


def rubbish(kind: str) -> bytes:
    """What no supervisor sends."""
    if kind == "random":
        return os.urandom(1 << 18)
    if kind == "zeros":
        return bytes(1 << 18)
    if kind == "text":
        return b"Traceback (most recent call last):\n" * 8000
    # Every head begins inside the frame before it, and each frame's sum is wrong.
    head = bytearray(BOMB)
    head[: len(MAGIC)] = MAGIC
    head[17 % BOMB : 17 % BOMB + 4] = (65535).to_bytes(4, "big")
    return bytes(head) * ((1 << 18) // BOMB)
