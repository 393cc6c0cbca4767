"""The sandbox's loopback network: what connects to it leaves through the pipe, if the host lets it.

There is no other network. Names resolve to 127.0.0.1, so that programs which know nothing of a
proxy reach ports 443 and 80 here; what they wanted to reach, the host reads from what they send.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

_CHUNK = 65536
_MAX_CONNECTIONS = 256
_BACKLOG = 128
_DNS_HEAD = struct.Struct(">6H")
_DNS_PREFIX = 2
_MAX_NAME = 255
_TYPE_A, _CLASS_IN = 1, 1
_ANSWER = b"\xc0\x0c" + struct.pack(">HHIH", _TYPE_A, _CLASS_IN, 60, 4) + bytes([127, 0, 0, 1])
_DNS_IDLE_S = 10.0
_DIAL_S = 10.0
_COOKIE_FLAGS = 0x0100


class Stream(Protocol):
    """What is needed of a stream of the pipe."""

    async def read(self, limit: int = 65536) -> bytes:
        """Some bytes, or none at the end."""
        ...

    async def write(self, data: bytes) -> None:
        """Send."""
        ...

    async def end(self) -> None:
        """Nothing more comes."""
        ...

    async def close(self) -> None:
        """Break off."""
        ...


OpenStream = Callable[[str, dict[str, Any]], Awaitable[Stream]]


class Loopback:
    """Listeners on 127.0.0.1 whose connections become streams to the host."""

    def __init__(self, open_stream: OpenStream) -> None:
        self._open_stream = open_stream
        self._listening: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._datagrams: asyncio.DatagramTransport | None = None

    @property
    def listening(self) -> dict[str, int]:
        """Kinds and their ports."""
        return dict(self._listening)

    async def listen(self, kind: str, port: int) -> str | None:
        """Listen on a port unless this kind does already; say why it could not be done."""
        if kind in self._listening:
            return None
        try:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind(("127.0.0.1", port))
            listener.listen(_BACKLOG)
            if kind == "dns":
                self._datagrams, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                    _Names, local_addr=("127.0.0.1", port)
                )
        except OSError as error:
            return f"{kind} on port {port}: {error.strerror or error}"
        self._listening[kind] = port
        self._spawn(self._accept(kind, port, listener))
        return None

    async def _accept(self, kind: str, port: int, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:
                # Out of descriptors: wait for some to come free.
                await asyncio.sleep(0.1)
                continue
            if self._connections >= _MAX_CONNECTIONS:
                connection.close()
                continue
            connection.setblocking(False)
            self._connections += 1
            work = (
                self._answer(connection) if kind == "dns" else self._leave(kind, port, connection)
            )
            self._spawn(self._counted(work, connection))

    async def _counted(self, work: Awaitable[None], connection: socket.socket) -> None:
        try:
            await work
        except (OSError, asyncio.TimeoutError):  # noqa: UP041 - not the same before Python 3.11
            pass
        finally:
            self._connections -= 1
            connection.close()

    async def _leave(self, kind: str, port: int, connection: socket.socket) -> None:
        stream = await self._open_stream(kind, {"port": port})
        await splice(connection, stream)

    async def _answer(self, connection: socket.socket) -> None:
        """Names over TCP: each question and answer has its length before it."""
        loop = asyncio.get_running_loop()
        buffer = b""
        while True:
            while len(buffer) < _DNS_PREFIX + int.from_bytes(buffer[:_DNS_PREFIX], "big"):
                received = await asyncio.wait_for(loop.sock_recv(connection, 4096), _DNS_IDLE_S)
                if not received:
                    return
                buffer += received
            stop = _DNS_PREFIX + int.from_bytes(buffer[:_DNS_PREFIX], "big")
            question, buffer = buffer[_DNS_PREFIX:stop], buffer[stop:]
            answer = dns_answer(question)
            if answer is None:
                return
            await loop.sock_sendall(connection, len(answer).to_bytes(2, "big") + answer)

    def _spawn(self, work: Any) -> None:  # noqa: ANN401 - a coroutine
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Names(asyncio.DatagramProtocol):
    """Names over UDP."""

    _transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - not of its type before 3.12
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:  # noqa: ANN401 - host and port
        answer = dns_answer(data)
        if answer is not None and self._transport is not None:
            self._transport.sendto(answer, addr)


def dns_answer(question: bytes) -> bytes | None:
    """127.0.0.1 for every A question, an empty answer for others, None for what is no question."""
    if len(question) < _DNS_HEAD.size:
        return None
    number, flags, count, _, _, _ = _DNS_HEAD.unpack_from(question)
    if flags & 0xF800 or count != 1:
        return None
    at = start = _DNS_HEAD.size
    while at < len(question) and question[at]:
        # A label of a question is never a pointer.
        if question[at] > 63:  # noqa: PLR2004 - the length of a label
            return None
        at += question[at] + 1
    stop = at + 5
    if stop > len(question) or at - start > _MAX_NAME:
        return None
    kind, family = struct.unpack_from(">HH", question, at + 1)
    found = kind == _TYPE_A and family == _CLASS_IN
    head = _DNS_HEAD.pack(number, 0x8080 | flags & _COOKIE_FLAGS, 1, int(found), 0, 0)
    return head + question[start:stop] + (_ANSWER if found else b"")


async def dial(port: int) -> socket.socket:
    """Connect to a port of the sandbox's own loopback, IPv4 first.

    Raises:
        OSError: Nobody listens there.
    """
    failure: OSError | None = None
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            connection = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            failure = failure or error
            continue
        connection.setblocking(False)
        work = asyncio.get_running_loop().sock_connect(connection, (host, port))
        try:
            await asyncio.wait_for(work, _DIAL_S)
        except asyncio.TimeoutError:  # noqa: UP041 - see above
            connection.close()
            failure = failure or OSError("timed out")
        except OSError as error:
            connection.close()
            failure = failure or error
        else:
            return connection
    raise failure or OSError("no loopback network")


async def splice(connection: socket.socket, stream: Stream) -> None:
    """Carry bytes both ways until both ends are done, or one breaks."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ways = [
        asyncio.ensure_future(_outward(connection, stream)),
        asyncio.ensure_future(_inward(connection, stream)),
    ]
    try:
        await asyncio.gather(*ways)
    except OSError:
        pass
    finally:
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
        await stream.close()
        connection.close()


async def _outward(connection: socket.socket, stream: Stream) -> None:
    loop = asyncio.get_running_loop()
    while received := await loop.sock_recv(connection, _CHUNK):
        await stream.write(received)
    await stream.end()


async def _inward(connection: socket.socket, stream: Stream) -> None:
    loop = asyncio.get_running_loop()
    while received := await stream.read():
        await loop.sock_sendall(connection, received)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
