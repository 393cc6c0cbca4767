"""A proxy between real clients and real servers on loopback, with names and ports of its own."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from aiohttp import web

from openinteractions.netguard import Guard
from openinteractions.sandbox.egress import ca
from openinteractions.sandbox.egress.dial import Dialler, SocketStream
from openinteractions.sandbox.egress.inject import Injection
from openinteractions.sandbox.egress.journal import Decision
from openinteractions.sandbox.egress.policy import Policy, Reach
from openinteractions.sandbox.egress.proxy import Kind, Proxy
from openinteractions.sandbox.egress.state import Core, Egress, Limits

LOOPBACK = Guard([ip_network("127.0.0.0/8")])
GIT = "User-Agent: git/2.39.5\r\n"


class Pipe:
    """Half of an in-memory duplex stream, with back-pressure."""

    def __init__(self) -> None:
        self.other: Pipe = self
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue(4)
        self._rest = b""
        self._is_ended = False
        self._is_over = False

    async def read(self, limit: int = 65536) -> bytes:
        if not self._rest and not self._is_over:
            self._rest = await self._chunks.get()
            self._is_over = not self._rest
        taken, self._rest = self._rest[:limit], self._rest[limit:]
        return taken

    async def write(self, data: bytes) -> None:
        if self._is_ended:
            raise ConnectionResetError("closed")
        if data:
            await self.other._chunks.put(data)

    async def end(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            await self.other._chunks.put(b"")

    async def close(self) -> None:
        self._is_over = True
        with contextlib.suppress(asyncio.QueueFull):
            if not self._is_ended:
                self._is_ended = True
                self.other._chunks.put_nowait(b"")


def pipes() -> tuple[Pipe, Pipe]:
    one, two = Pipe(), Pipe()
    one.other, two.other = two, one
    return one, two


class Journal(list[Decision]):
    """Keeps decisions."""

    def record(self, decision: Decision) -> None:
        self.append(decision)


class Vault(dict[str, Injection]):
    """Credentials of one environment."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    async def credential(self, environment_id: str, credential_id: str) -> Injection | None:
        self.asked.append((environment_id, credential_id))
        return self.get(credential_id)


class Dial(Dialler):
    """Ports of other hosts are where the test has its servers."""

    at: Mapping[int, int]

    async def _first(self, host: str, addresses: Sequence[str], port: int) -> SocketStream:
        return await super()._first(host, addresses, self.at.get(port, port))


@dataclass
class Rig:
    """A proxy, its journal and vault, and a port on loopback for each kind of connection."""

    proxy: Proxy
    egress: Egress
    journal: Journal
    vault: Vault
    dialler: Dial
    authority: ca.Authority
    hosts: ca.Authority
    """Certifies the servers of the test."""
    names: dict[str, list[str]]
    ports: dict[str, int] = field(default_factory=dict)
    """Where each kind of connection is taken."""
    lookups: list[str] = field(default_factory=list)

    def client_ssl(self) -> ssl.SSLContext:
        """What a sandbox trusts: everything, our authority included."""
        context = ssl.create_default_context(cadata=self.hosts.pem.decode())
        context.load_verify_locations(cadata=self.authority.pem.decode())
        return context

    def rules(self, network: Any, *variables: str, ceiling: Reach | None = None) -> None:
        self.egress.swap(policy(network, ceiling=ceiling), variables)

    async def open(self, kind: Kind) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.ports[kind])

    async def say(self, kind: Kind, data: bytes) -> bytes:
        """Send bytes, and read until the proxy closes."""
        reader, writer = await self.open(kind)
        writer.write(data)
        try:
            async with asyncio.timeout(20):
                return await reader.read(-1)
        finally:
            writer.close()

    async def tls(
        self, host: str = "api.example.com", *, alpn: Sequence[str] = ()
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """TLS as of a tool that knows of no proxy."""
        context = self.client_ssl()
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return await asyncio.open_connection(
            "127.0.0.1", self.ports["https"], ssl=context, server_hostname=host
        )

    async def say_tls(self, data: bytes, host: str = "api.example.com") -> bytes:
        reader, writer = await self.tls(host)
        writer.write(data)
        try:
            async with asyncio.timeout(20):
                return await reader.read(-1)
        finally:
            writer.close()

    async def say_through(self, target: str, data: bytes) -> bytes:
        """Send bytes over TLS through a CONNECT, as git does."""
        reader, writer = await self.open("proxy")
        writer.write(f"CONNECT {target} HTTP/1.1\r\n{GIT}\r\n".encode())
        try:
            async with asyncio.timeout(20):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 "), head
                host = target.rpartition(":")[0].strip("[]")
                await writer.start_tls(self.client_ssl(), server_hostname=host)
                writer.write(data)
                return await reader.read(-1)
        finally:
            writer.close()

    async def settled(self, count: int = 1) -> Journal:
        """The journal, once it has so many decisions."""
        await until(lambda: len(self.journal) >= count)
        return self.journal


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for something that nobody tells."""
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 - as said
            await asyncio.sleep(0.01)


def policy(
    network: Any = None, *, default: Reach | None = None, ceiling: Reach | None = None
) -> Policy:
    return Policy(network, default=default or Reach(), ceiling=ceiling or Reach())


def allow(domain: str = "api.example.com", **more: Any) -> dict[str, Any]:
    return {"allowlist": [{"domain": domain, **more}]}


@asynccontextmanager
async def rig(
    folder: Path, *, guard: Guard = LOOPBACK, limits: Limits | None = None
) -> AsyncGenerator[Rig]:
    names: dict[str, list[str]] = {}
    lookups: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        lookups.append(host)
        if host not in names and host.endswith(".invalid"):
            raise OSError("no such host")
        return names.get(host, ["127.0.0.1"])

    authority, servers = ca.load_or_make(folder / "ca"), ca.load_or_make(folder / "hosts")
    journal, vault = Journal(), Vault()
    trust = ssl.create_default_context(cadata=servers.pem.decode())
    limits = limits or Limits()
    proxy = Proxy(
        authority, guard, vault, journal, resolver=resolve, upstream_ssl=trust, limits=limits
    )
    dialler = Dial(guard, resolve, trust, ports=(80, 443), timeout_s=limits.connect_s)
    dialler.at = {}
    proxy._core = Core(
        authority=authority, dialler=dialler, vault=vault, journal=journal, limits=limits
    )
    made = Rig(
        proxy=proxy, egress=Egress("env", policy()), journal=journal, vault=vault,
        dialler=dialler, authority=authority, hosts=servers, names=names, lookups=lookups,
    )  # fmt: skip
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    def gate(kind: Kind) -> Callable[[], SocketStream]:
        class Gate(SocketStream):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                task = loop.create_task(proxy.serve(kind, self, made.egress))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        return Gate

    servers_open: list[asyncio.Server] = []
    kinds: tuple[Kind, ...] = ("proxy", "https", "http")
    for kind in kinds:
        server = await loop.create_server(gate(kind), "127.0.0.1", 0)
        servers_open.append(server)
        made.ports[kind] = server.sockets[0].getsockname()[1]
    yield made
    for server in servers_open:
        server.close()
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert made.egress.connections == 0
    # What was closed on both sides disappears with the next turns of the loop.
    await asyncio.sleep(0.05)


@asynccontextmanager
async def site(
    made: Rig, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> AsyncGenerator[None]:
    """An aiohttp server on ports 80 and 443 of every host."""
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, auto_decompress=False, access_log=None)
    await runner.setup()
    context = await made.hosts.context("api.example.com")
    plain = web.TCPSite(runner, "127.0.0.1", 0)
    secure = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await plain.start()
    await secure.start()
    made.dialler.at = {
        80: plain._server.sockets[0].getsockname()[1],
        443: secure._server.sockets[0].getsockname()[1],
    }
    yield
    await runner.cleanup()


@asynccontextmanager
async def script(
    made: Rig, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncGenerator[list[bytes]]:
    """A server on ports 80 and 443 that does whatever the test says; gives what it got."""
    got: list[bytes] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            tasks.discard(task)

    context = await made.hosts.context("api.example.com")
    plain = await asyncio.start_server(run, "127.0.0.1", 0)
    secure = await asyncio.start_server(run, "127.0.0.1", 0, ssl=context)
    made.dialler.at = {
        80: plain.sockets[0].getsockname()[1],
        443: secure.sockets[0].getsockname()[1],
    }
    yield got
    plain.close()
    secure.close()
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
