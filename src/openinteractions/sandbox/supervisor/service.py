"""What the host can ask of the supervisor, and the program itself."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from openinteractions.sandbox.mux import Mux, MuxStream
from openinteractions.sandbox.supervisor import seccomp
from openinteractions.sandbox.supervisor.execution import Execution, Order, Refusal
from openinteractions.sandbox.supervisor.loopback import Loopback, dial, splice
from openinteractions.sandbox.supervisor.processes import Nursery
from openinteractions.sandbox.supervisor.table import Table

VERSION = 1
OUT, ERR, EXIT, OMITTED, ERROR = 1, 2, 3, 4, 5
"""Kinds of records that `follow` sends: one byte, four bytes of length, content."""

_MAX_BODY = 16 << 20
_LIVE_BYTES_PER_S = 4 << 20
_MAX_PROBLEMS = 20
_EOF_PAUSE_S = 0.25
_LISTENERS = ("proxy", "https", "http", "dns")
_RECORD = struct.Struct(">BI")


class Service:
    """Serves the streams that the host opens."""

    def __init__(self, channel: Channel, notebook: str, guard: str) -> None:
        self._guard = guard
        self._started = time.monotonic()
        self._problems: list[str] = []
        self._nursery = Nursery()
        self._table = Table(self._nursery, notebook, dict(os.environ))  # noqa: TID251 - the container's own
        self._mux = Mux(channel.read, channel.write, False, self._serve)
        self._loopback = Loopback(self._mux.open)
        self._stop = asyncio.Event()
        self._handlers: dict[str, Callable[[MuxStream], Awaitable[object]]] = {
            "ping": self._ping,
            "configure": self._configure,
            "start": self._start,
            "stdin": self._stdin,
            "signal": self._signal,
            "kill": self._kill,
            "resize": self._resize,
            "list": self._list,
            "forget": self._forget,
            "shutdown": self._shutdown,
        }

    async def run(self) -> None:
        """Serve until told to stop, or until the pipe cannot be written to any more."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._note)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, _stay)
        self._nursery.open()
        self._guard = seccomp.install() if self._guard == "on" else "off"
        await self._mux.start()
        waits = [asyncio.ensure_future(one.wait()) for one in (self._stop, self._mux.lost)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        await self._table.kill_all()

    async def _serve(self, stream: MuxStream) -> None:
        if stream.kind == "follow":
            await self._follow(stream)
            return
        if stream.kind == "dial":
            await self._dial(stream)
            return
        handler = self._handlers.get(stream.kind, _refuse)
        try:
            answer = await handler(stream)
        except Refusal as refusal:
            answer = {"error": refusal.code, "message": str(refusal)}
        except (KeyError, TypeError, ValueError) as error:
            answer = {"error": "invalid", "message": f"{type(error).__name__}: {error}"}
        await stream.write(json.dumps(answer).encode())
        await stream.end()

    async def _ping(self, _: MuxStream) -> object:
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "seccomp": self._guard,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "running": self._table.running,
            "kept": self._table.kept,
            "sessions": self._table.sessions.count,
            "streams": self._mux.stream_count,
            "listening": self._loopback.listening,
            "problems": list(self._problems),
        }

    async def _configure(self, stream: MuxStream) -> object:
        problems: list[str] = []
        for kind in _LISTENERS:
            port = stream.header.get(kind)
            if port is not None:
                problem = await self._loopback.listen(kind, int(port))
                problems += [problem] if problem else []
        return {"problems": problems}

    async def _start(self, stream: MuxStream) -> object:
        body = json.loads(await stream.read_all(_MAX_BODY))
        size = body.pop("pty", None)
        order = Order(**body, pty=(int(size[0]), int(size[1])) if size else None)
        if not order.argv or (order.session is not None and order.pty is not None):
            raise Refusal("invalid", "a command needs arguments; a session has no terminal")
        return {"started": self._table.start(order)}

    async def _stdin(self, stream: MuxStream) -> object:
        execution = self._named(stream)
        while data := await stream.read():
            await execution.write_stdin(data)
        if stream.header.get("is_end"):
            await execution.end_stdin()
        return {}

    async def _signal(self, stream: MuxStream) -> object:
        number = signal.Signals(int(stream.header["number"]))
        self._named(stream).signal(number)
        return {}

    async def _kill(self, stream: MuxStream) -> object:
        await self._named(stream).kill()
        return {}

    async def _resize(self, stream: MuxStream) -> object:
        rows, cols = int(stream.header["rows"]), int(stream.header["cols"])
        self._named(stream).resize(rows, cols)
        return {}

    async def _list(self, _: MuxStream) -> object:
        return {"executions": self._table.list()}

    async def _forget(self, stream: MuxStream) -> object:
        self._table.forget(str(stream.header["id"]))
        return {}

    async def _shutdown(self, _: MuxStream) -> object:
        asyncio.get_running_loop().call_later(0.05, self._stop.set)
        return {}

    async def _dial(self, stream: MuxStream) -> None:
        """One zero byte says that it is connected; then the connection's own bytes."""
        try:
            connection = await dial(int(stream.header["port"]))
        except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
            stream.reset(f"port not open: {error}")
            return
        await stream.write(b"\0")
        await splice(connection, stream)

    async def _follow(self, stream: MuxStream) -> None:
        try:
            execution = self._named(stream)
            offset = _offset(stream, execution)
        except Refusal as refusal:
            answer = json.dumps({"error": refusal.code, "message": str(refusal)})
            await _record(stream, ERROR, answer.encode())
        else:
            await _send_output(stream, execution, offset)
            await _record(stream, EXIT, json.dumps(execution.result).encode())
        await stream.end()

    def _named(self, stream: MuxStream) -> Execution:
        return self._table.get(str(stream.header.get("id")))

    def _note(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Keep what went wrong, for `ping`; there is nowhere to print it."""
        error = context.get("exception")
        text = f"{context.get('message', '')}: {type(error).__name__}: {error}"[:300]
        self._problems = [*self._problems, text][-_MAX_PROBLEMS:]


async def _refuse(_: MuxStream) -> object:
    raise Refusal("invalid", "no such request")


def _offset(stream: MuxStream, execution: Execution) -> int:
    offset = int(stream.header.get("offset", 0))
    if not 0 <= offset <= execution.spool.end:
        raise Refusal("invalid", "the offset is beyond the output")
    return offset


async def _send_output(stream: MuxStream, execution: Execution, offset: int) -> None:
    """Everything from `offset` on until the command has ended.

    Beyond its bound a running command's output is sent no faster than a person could use it, so
    that a flood costs the host little: what is overwritten meanwhile is told as omitted.
    """
    spool, bound = execution.spool, offset + execution.order.max_output_bytes
    while True:
        piece = spool.read(offset)
        if piece is None:
            if execution.result is not None:
                return
            await execution.changed.wait()
            continue
        kind, content = piece
        if isinstance(content, int):
            await _record(stream, OMITTED, content.to_bytes(8, "big"))
            offset += content
            continue
        await _record(stream, kind, content)
        offset += len(content)
        if offset > bound and execution.result is None:
            await asyncio.sleep(len(content) / _LIVE_BYTES_PER_S)


async def _record(stream: MuxStream, kind: int, content: bytes) -> None:
    await stream.write(_RECORD.pack(kind, len(content)) + content)


def _stay() -> None:
    """Only the host ends a sandbox. A handler, since what is ignored is ignored in children too."""


class Channel:
    """The pipe to the host: what used to be standard input and output."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    async def read(self, limit: int) -> bytes:
        """Some bytes. At the end it goes on waiting: another host may open the other side."""
        while True:
            try:
                received = os.read(self._read_fd, limit)
                if received:
                    return received
                await asyncio.sleep(_EOF_PAUSE_S)
            except BlockingIOError:
                await self._ready(self._read_fd, is_write=False)
            except OSError:
                await asyncio.sleep(_EOF_PAUSE_S)

    async def write(self, data: bytes) -> None:
        """All of it; while nobody reads, it waits. Lost if the other side is not even open."""
        view = memoryview(data)
        while view.nbytes:
            try:
                view = view[os.write(self._write_fd, view) :]
            except BlockingIOError:
                await self._ready(self._write_fd, is_write=True)
            except OSError:
                await asyncio.sleep(_EOF_PAUSE_S)
                return

    async def _ready(self, fd: int, *, is_write: bool) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        add = loop.add_writer if is_write else loop.add_reader
        remove = loop.remove_writer if is_write else loop.remove_reader
        add(fd, _resolve, future)
        try:
            await future
        finally:
            remove(fd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def main(notebook: str, guard: str = "on") -> None:
    """Be the supervisor; `notebook` is the source of the kept interpreters."""
    ours = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)
    asyncio.run(_run(Channel(*ours), notebook, guard))
    sys.stdout = sys.stderr = None  # pyright: ignore[reportAttributeAccessIssue] - nothing is flushed
    os._exit(0)


async def _run(channel: Channel, notebook: str, guard: str) -> None:
    await Service(channel, notebook, guard).run()
