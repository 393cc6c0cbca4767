"""`python -m benchmarks.egress`: the way out of sandboxes beside a direct connection, in one run.

Three processes: the server, the proxy (behind a socket, where a sandbox has its pipe), and the
load. The server speaks just enough HTTP over TLS to be no bottleneck. Rounds take turns; what
counts are the medians' differences and ratios.
"""

import argparse
import asyncio
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path

import uvloop

from benchmarks.run import Goal
from openinteractions.netguard import Guard
from openinteractions.sandbox.egress import ca
from openinteractions.sandbox.egress.dial import SocketStream
from openinteractions.sandbox.egress.inject import Bearer, Injection
from openinteractions.sandbox.egress.journal import Decision
from openinteractions.sandbox.egress.policy import Policy, Reach
from openinteractions.sandbox.egress.proxy import Proxy
from openinteractions.sandbox.egress.state import Egress

_HOSTS = {"direct": None, "tunnel": "tunnel.test", "opened": "opened.test"}
_ROUNDS = 7
_REQUESTS = 300
_CONNECTIONS = 20
_SIZE = 100 << 20
_PIECE = bytes(256 * 1024)
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_NETWORK = {
    "allowlist": [{"domain": "tunnel.test"}, {"domain": "opened.test", "credential": "token"}]
}


class _Vault:
    async def credential(self, _environment: str, _credential: str) -> Injection | None:
        return Bearer(token="a-token-of-some-length")


class _Journal:
    def record(self, decision: Decision) -> None:
        pass


async def _serve(home: Path) -> None:
    """The server: `GET /big` has 100 MB."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if not head.startswith(b"GET /big"):
                    writer.write(_ANSWER)
                    continue
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % _SIZE)
                for _ in range(_SIZE // len(_PIECE)):
                    writer.write(_PIECE)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    authority = ca.load_or_make(home / "hosts")
    contexts = {host: await authority.context(host) for host in _HOSTS.values() if host}
    context = contexts["tunnel.test"]

    def choose(one: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        one.context = contexts[name or ""]

    context.sni_callback = choose
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context, limit=1 << 18)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _proxy(home: Path, port: int) -> None:
    async def resolve(_host: str, _port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    trust = ssl.create_default_context(cadata=ca.load_or_make(home / "hosts").pem.decode())
    guard = Guard([ip_network("127.0.0.0/8")])
    proxy = Proxy(
        ca.load_or_make(home / "ca"), guard, _Vault(), _Journal(), ports=(port,),
        resolver=resolve, upstream_ssl=trust,
    )  # fmt: skip
    egress = Egress("bench", Policy(_NETWORK, default=Reach(), ceiling=Reach()))
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    class Gate(SocketStream):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            task = loop.create_task(proxy.serve("proxy", self, egress))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await loop.create_server(Gate, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class _Client:
    """Blocking sockets: the load's own cost is small and the same on every way."""

    def __init__(self, home: Path, server: int, proxy: int) -> None:
        self._context = ssl.create_default_context(
            cadata=ca.load_or_make(home / "hosts").pem.decode()
        )
        self._context.load_verify_locations(cadata=ca.load_or_make(home / "ca").pem.decode())
        self._server = server
        self._proxy = proxy

    def connect(self, host: str | None) -> ssl.SSLSocket:
        at = self._server if host is None else self._proxy
        raw = socket.create_connection(("127.0.0.1", at))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if host is not None:
            raw.sendall(b"CONNECT %b:%d HTTP/1.1\r\n\r\n" % (host.encode(), self._server))
            assert b" 200 " in raw.recv(4096)
        return self._context.wrap_socket(raw, server_hostname=host or "tunnel.test")

    def ask(self, link: ssl.SSLSocket, host: str | None) -> None:
        # `Host` names the port: it is not the usual one here.
        name = f"{host or 'tunnel.test'}:{self._server}".encode()
        link.sendall(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % name)
        got = b""
        while not got.endswith(b"ok"):
            got += link.recv(65536)

    def kept_ms(self, host: str | None) -> float:
        """One request on a kept connection: the median."""
        with self.connect(host) as link:
            self.ask(link, host)
            return statistics.median(self._timed(link, host) for _ in range(_REQUESTS))

    def _timed(self, link: ssl.SSLSocket, host: str | None) -> float:
        began = time.perf_counter()
        self.ask(link, host)
        return (time.perf_counter() - began) * 1000

    def new_ms(self, host: str | None) -> float:
        """A connection with one request: the median."""
        times: list[float] = []
        for _ in range(_CONNECTIONS):
            began = time.perf_counter()
            with self.connect(host) as link:
                self.ask(link, host)
            times.append((time.perf_counter() - began) * 1000)
        return statistics.median(times)

    def rate(self, host: str | None) -> float:
        """100 MB down, in MB/s."""
        buffer = bytearray(1 << 18)
        with self.connect(host) as link:
            name = f"{host or 'tunnel.test'}:{self._server}".encode()
            began = time.perf_counter()
            link.sendall(b"GET /big HTTP/1.1\r\nHost: %b\r\n\r\n" % name)
            seen = 0
            while seen < _SIZE:
                seen += link.recv_into(buffer)
            return _SIZE / (time.perf_counter() - began) / 1e6


def _start(*words: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "benchmarks.egress", *words]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, int(child.stdout.readline())


def _measure(home: Path) -> None:
    server, server_port = _start("server", str(home))
    proxy, proxy_port = _start("proxy", str(home), str(server_port))
    try:
        client = _Client(home, server_port, proxy_port)
        kinds = {"kept": client.kept_ms, "new": client.new_ms, "rate": client.rate}
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(_ROUNDS):
            for kind, measure in kinds.items():
                for way, host in _HOSTS.items():
                    found.setdefault((kind, way), []).append(measure(host))
    finally:
        for child in (proxy, server):
            child.terminate()
            child.wait()
    medians = {key: statistics.median(values) for key, values in found.items()}
    _report(medians)


def _report(medians: dict[tuple[str, str], float]) -> None:
    for kind, unit in (("kept", "ms"), ("new", "ms"), ("rate", "MB/s")):
        direct = medians[kind, "direct"]
        print(f"{kind:5} direct  {direct:8.2f} {unit}")
        for way in ("tunnel", "opened"):
            value = medians[kind, way]
            told = f"{kind:5} {way}  {value:8.2f} {unit}  {value / direct:5.2f} x direct"
            if kind == "kept":
                over = value - direct
                told += f"  +{over:.2f} ms {Goal(most=2.0, unit=' ms over').judge(over)}"
            if (kind, way) == ("rate", "tunnel"):
                told += f"  {Goal(least=150.0, unit=' MB/s').judge(value)}"
            print(told)


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", nargs="?", choices=["server", "proxy"])
    parser.add_argument("home", nargs="?", type=Path)
    parser.add_argument("port", nargs="?", type=int)
    args = parser.parse_args()
    if args.role is None:
        load = " ".join(f"{value:.1f}" for value in os.getloadavg())
        print(f"machine: {os.cpu_count()} cores, load {load}; medians of {_ROUNDS} rounds")
        with tempfile.TemporaryDirectory(prefix="oi-egress-") as home:
            for name in ("hosts", "ca"):
                ca.load_or_make(Path(home) / name)
            _measure(Path(home))
        return
    work = _serve(args.home) if args.role == "server" else _proxy(args.home, args.port)
    uvloop.run(work)


if __name__ == "__main__":
    main()
