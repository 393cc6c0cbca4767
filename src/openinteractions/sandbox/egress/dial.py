"""The way to other hosts: look up once, let the guard judge every answer, connect to one."""

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, cast

from openinteractions.netguard import Guard
from openinteractions.sandbox.egress import hosts
from openinteractions.sandbox.egress.policy import Blocked
from openinteractions.sandbox.egress.tls import TlsStream
from openinteractions.turns import Turns

Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host, for a port; OSError where there are none."""

_HIGH = 256 * 1024
_MAX_ADDRESSES = 8
_EACH_S = 5.0
_THREADS = 64
_LOOKUPS = 4
_LINGER_S = 10.0


class Unreachable(Exception):
    """The host cannot be reached now; the reason is safe to show."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SystemResolver:
    """The operating system's look-up, in threads of its own: a slow name delays nobody else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="egress-dns")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """The addresses of a host.

        Raises:
            OSError: It has none, or could not be looked up.
        """
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Asker:
    """On whose behalf names are looked up."""

    def __init__(self, project: str) -> None:
        """An environment of this project."""
        self.project = project
        self.lookups = asyncio.Semaphore(_LOOKUPS)
        """Bounds how many names the environment looks up at once."""


class SocketStream(asyncio.Protocol):
    """A TCP connection as a `Duplex`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._chunks: deque[bytes] = deque()
        self._held = 0
        self._is_paused = False
        self._is_over = False
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it is open and has said nothing that nobody read."""
        return not self._is_over and not self._held

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_HIGH)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._chunks.append(data)
        self._held += len(data)
        if self._held >= _HIGH and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        _wake(self._reader)

    def eof_received(self) -> bool:
        """Called by the event loop. True keeps the other direction open."""
        self._is_over = True
        _wake(self._reader)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        if not self._is_over:
            self._error = exc or ConnectionResetError("closed")
        self._is_over = True
        self._transport = None
        _wake(self._reader)
        _wake(self._room)

    def pause_writing(self) -> None:
        """Called by the event loop."""
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """Called by the event loop."""
        _wake(self._room)
        self._room = None

    async def read(self, limit: int = _HIGH) -> bytes:
        """Up to `limit` bytes; `b""` at the end.

        Raises:
            ConnectionError: It broke.
        """
        while not self._chunks:
            if self._is_over:
                if self._error is not None:
                    raise ConnectionResetError("closed") from self._error
                return b""
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        taken = self._chunks.popleft()
        if len(taken) > limit:
            self._chunks.appendleft(taken[limit:])
            taken = taken[:limit]
        self._held -= len(taken)
        if self._is_paused and self._held < _HIGH // 2 and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return taken

    async def write(self, data: bytes) -> None:
        """Send; waits while the other side does not read.

        Raises:
            ConnectionError: It is closed.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("closed")
        self._transport.write(data)
        if self._room is not None:
            await asyncio.shield(self._room)
            if self._error is not None:
                raise ConnectionResetError("closed")

    async def end(self) -> None:
        """Close the writing side."""
        if self._transport is not None and not self._transport.is_closing():
            with contextlib.suppress(OSError):
                self._transport.write_eof()

    async def close(self) -> None:
        """Close it; what was not sent yet still is, if that does not take long."""
        if self._transport is not None and not self._transport.is_closing():
            self._is_over, self._error = True, ConnectionResetError("closed")
            self._chunks.clear()
            _wake(self._reader)
            self._transport.close()
            asyncio.get_running_loop().call_later(_LINGER_S, self._transport.abort)


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


class Upstream:
    """A connection to a host that was allowed."""

    def __init__(self, socket_stream: SocketStream, tls: TlsStream | None) -> None:
        self._socket = socket_stream
        self.stream: TlsStream | SocketStream = tls or socket_stream

    @property
    def is_idle(self) -> bool:
        """Whether another request may go over it, as far as can be seen."""
        return self._socket.is_idle


class Dialler:
    """Connects to allowed hosts."""

    def __init__(
        self,
        guard: Guard,
        resolver: Resolver,
        upstream_ssl: ssl.SSLContext,
        *,
        ports: Sequence[int],
        timeout_s: float,
    ) -> None:
        self._guard = guard
        self._resolver = resolver
        self._ssl = upstream_ssl
        self._ports = frozenset(ports)
        self._timeout_s = timeout_s
        self._turns = Turns(_THREADS)

    def check_port(self, host: str, port: int) -> None:
        """Refuse ports that sandboxes may not connect to.

        Raises:
            Blocked: This is one.
        """
        if port not in self._ports:
            allowed = ", ".join(str(each) for each in sorted(self._ports))
            raise Blocked(
                f"port {port} of {host} cannot be reached, only {allowed}; this server's operator "
                "can change that (setting sandbox.ports)."
            )

    async def connect(self, host: str, port: int, *, is_tls: bool, asker: Asker) -> Upstream:
        """Connect to a host in its one spelling.

        Args:
            host: Name or address; the policy has allowed it.
            port: Its port.
            is_tls: Speak TLS, and verify that it is this host.
            asker: Who wants it.

        Raises:
            Blocked: An address of it is not permitted.
            Unreachable: It has no address, or does not answer as it should.
        """
        self.check_port(host, port)
        try:
            async with asyncio.timeout(self._timeout_s):
                addresses = await self._addresses(host, port, asker)
                connected = await self._first(host, addresses, port)
                if not is_tls:
                    return Upstream(connected, None)
                return Upstream(connected, await self._secured(connected, host))
        except TimeoutError as error:
            raise Unreachable(
                f"{host}:{port} did not answer within {self._timeout_s:g} s."
            ) from error

    async def _addresses(self, host: str, port: int, asker: Asker) -> Sequence[str]:
        """All addresses of a host, each of them permitted."""
        if hosts.address(host) is not None:
            found: Sequence[str] = [host]
        else:
            try:
                found = await asyncio.shield(await self._lookup(host, port, asker))
            except (OSError, UnicodeError) as error:
                raise Unreachable(f"the name {host} could not be resolved.") from error
        if not found:
            raise Unreachable(f"the name {host} has no address.")
        if not all(self._guard.permits(each) for each in found):
            raise Blocked(
                f"{host} leads to an address that is not public; private networks and this "
                "server itself cannot be reached from a sandbox."
            )
        return found

    async def _lookup(self, host: str, port: int, asker: Asker) -> "asyncio.Future[Sequence[str]]":
        """A look-up, begun. It goes on when its time is up: until it ends, it counts."""

        def ended(look_up: "asyncio.Future[Sequence[str]]") -> None:
            asker.lookups.release()
            self._turns.give(asker.project)
            if not look_up.cancelled():
                look_up.exception()

        await asker.lookups.acquire()
        try:
            await self._turns.take(asker.project)
        except BaseException:
            asker.lookups.release()
            raise
        begun = asyncio.ensure_future(self._resolver(host, port))
        begun.add_done_callback(ended)
        return begun

    async def _first(self, host: str, addresses: Sequence[str], port: int) -> SocketStream:
        loop = asyncio.get_running_loop()
        for each in addresses[:_MAX_ADDRESSES]:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_EACH_S if len(addresses) > 1 else None):
                    # A numeric address: nothing is looked up again.
                    _, connected = await loop.create_connection(SocketStream, each, port)
                return connected
        raise Unreachable(f"{host}:{port} does not accept connections.")

    async def _secured(self, connected: SocketStream, host: str) -> TlsStream:
        stream = TlsStream(connected, self._ssl, server_hostname=host)
        is_done = False
        try:
            await stream.handshake()
            is_done = True
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(
                f"the certificate of {host} is not good: {error.verify_message}."
            ) from error
        except (ssl.SSLError, ConnectionError) as error:
            raise Unreachable(f"{host} does not speak TLS as it should.") from error
        finally:
            if not is_done:
                await stream.close()
        return stream
