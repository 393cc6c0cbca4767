"""The way out of sandboxes: every connection that one opens ends here, as a stream of bytes.

There is no socket on the sandbox's side, so nothing to find and nobody to mistake for another:
which environment a stream belongs to is known from the pipe that it came over.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from typing import Literal, TypeAlias

import structlog

from openinteractions.netguard import Guard
from openinteractions.sandbox.egress import hello, hosts
from openinteractions.sandbox.egress.ca import Authority
from openinteractions.sandbox.egress.dial import (
    Dialler,
    Resolver,
    SystemResolver,
    Unreachable,
    Upstream,
)
from openinteractions.sandbox.egress.exchange import Exchange
from openinteractions.sandbox.egress.hello import Hello, NotTls
from openinteractions.sandbox.egress.http1 import BadMessage, Request, Wire
from openinteractions.sandbox.egress.inject import Vault
from openinteractions.sandbox.egress.journal import Attempt, Journal
from openinteractions.sandbox.egress.policy import Blocked, Rule
from openinteractions.sandbox.egress.relay import answer, finish, relay
from openinteractions.sandbox.egress.state import Core, Egress, Idle, Limits
from openinteractions.sandbox.egress.tls import TlsStream
from openinteractions.sandbox.port import Duplex

Kind: TypeAlias = Literal["proxy", "https", "http"]

_HTTPS = 443
_TLS_HANDSHAKE = 22
_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
_SHOW_PAGES = (b"git/", b"Mozilla/")
"""Who shows nothing of a refused CONNECT, and always the page that a host answers with."""
_log = structlog.get_logger(__name__)


class Proxy:
    """Serves the connections of all sandboxes of a broker."""

    def __init__(  # noqa: PLR0913 - one for each collaborator
        self,
        ca: Authority,
        guard: Guard,
        vault: Vault,
        journal: Journal,
        *,
        ports: Sequence[int] = (80, _HTTPS),
        resolver: Resolver | None = None,
        upstream_ssl: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        """A proxy that opens TLS with this authority.

        Args:
            ca: Trusted inside sandboxes.
            guard: Judges every address.
            vault: Gives credentials, at each request.
            journal: Takes each decision.
            ports: Those of other hosts that may be reached.
            resolver: Looks names up; the system's, if left out.
            upstream_ssl: Verifies hosts; with the system's roots, if left out.
            limits: Bounds on each environment.
        """
        trust = upstream_ssl or ssl.create_default_context()
        assert trust.verify_mode is ssl.CERT_REQUIRED
        assert trust.check_hostname
        trust.set_alpn_protocols(["http/1.1"])
        trust.options |= ssl.OP_NO_RENEGOTIATION
        chosen = limits or Limits()
        self._own_resolver = SystemResolver() if resolver is None else None
        dialler = Dialler(
            guard,
            resolver or self._own_resolver or SystemResolver(),
            trust,
            ports=ports,
            timeout_s=chosen.connect_s,
        )
        self._core = Core(
            authority=ca, dialler=dialler, vault=vault, journal=journal, limits=chosen
        )

    async def serve(self, kind: Kind, stream: Duplex, sandbox: Egress) -> None:
        """Serve one connection to its end, and close its stream.

        Args:
            kind: `proxy`: it speaks to a proxy; `https` and `http`: it believes to be connected
                to port 443 or 80 of some host.
            stream: The sandbox's side.
            sandbox: Whose it is.
        """
        wire = Wire(stream)
        sandbox.connections += 1
        try:
            await self._serve(kind, wire, sandbox)
        except (ConnectionError, TimeoutError, ssl.SSLError):
            pass
        except Exception:  # noqa: BLE001 - a boundary
            # One broken connection must not take the others of its sandbox along.
            _log.exception("egress.failed", environment_id=sandbox.environment_id, kind=kind)
        finally:
            sandbox.connections -= 1
            await stream.close()

    def close(self) -> None:
        """Let go of the look-up's threads."""
        if self._own_resolver is not None:
            self._own_resolver.close()

    async def _serve(self, kind: Kind, wire: Wire, egress: Egress) -> None:
        most = self._core.limits.connections
        if egress.connections > most:
            if kind != "https":
                reason = f"this environment has {most} connections open; close some."
                await wire.write(answer(503, reason))
        elif kind == "https":
            await self._transparent(wire, egress)
        else:
            await self._http(wire, egress, is_proxy=kind == "proxy")
        await finish(wire)

    async def _http(self, wire: Wire, egress: Egress, *, is_proxy: bool) -> None:
        exchange = Exchange(self._core, egress, wire)
        exchange.is_proxy = is_proxy
        request = await exchange.run()
        if request is not None:
            await self._connect(wire, egress, request)

    async def _transparent(self, wire: Wire, egress: Egress) -> None:
        """TLS from a tool that knows of no proxy: the host is the one that it names."""
        attempt = self._attempt(egress, "", _HTTPS)
        try:
            said = await self._hello(wire)
        except NotTls:
            said = Hello(None, is_encrypted=False)
        if said.host is None:
            attempt.is_refused = True
            attempt.reason = "a connection to port 443 that names no host in TLS"
            self._core.record(egress, attempt)
            return
        attempt.host = said.host
        try:
            rule = egress.policy.decide(said.host)
            if self._must_open(egress, rule, said):
                await self._opened(wire, egress, said.host, _HTTPS)
                return
            attempt.rule = rule.domain
            upstream = await self._dial(egress, said.host, _HTTPS)
        except (Blocked, Unreachable) as error:
            await self._explain(wire, egress, attempt, error)
            return
        await self._tunnel(wire, egress, upstream, attempt, rule)

    async def _connect(self, wire: Wire, egress: Egress, request: Request) -> None:
        """A CONNECT to the proxy: TLS to a host, as a rule."""
        attempt = self._attempt(egress, "", 0)
        attempt.method = "CONNECT"
        try:
            rule, upstream = await self._reached(egress, request, attempt)
        except (Blocked, Unreachable, BadMessage) as error:
            if not isinstance(error, BadMessage) and _shows_pages(request):
                await wire.write(_ESTABLISHED)
                await self._explain(wire, egress, attempt, error)
                return
            status = _status(error)
            self._refused(egress, attempt, error, status)
            await wire.write(answer(status, error.reason, is_phrase=True))
            return
        try:
            await wire.write(_ESTABLISHED)
            await self._connected(wire, egress, upstream, attempt, rule)
        finally:
            if upstream is not None:
                await upstream.stream.close()

    async def _reached(
        self, egress: Egress, request: Request, attempt: Attempt
    ) -> tuple[Rule, Upstream | None]:
        """The rule for a CONNECT, and the connection to its host where it will be a tunnel."""
        where = hosts.authority(request.target, 0)
        if where is None or request.framing() != 0:
            raise BadMessage("CONNECT wants host:port, and no body")
        attempt.host, attempt.port = where
        self._core.dialler.check_port(*where)
        rule = egress.policy.decide(attempt.host)
        attempt.rule = rule.domain
        return rule, None if egress.opens(rule) else await self._dial(egress, *where)

    async def _connected(
        self,
        wire: Wire,
        egress: Egress,
        upstream: Upstream | None,
        attempt: Attempt,
        rule: Rule,
    ) -> None:
        """What follows a CONNECT: TLS, or plain requests."""
        host, port = attempt.host, attempt.port
        try:
            async with asyncio.timeout(self._core.limits.head_s):
                is_plain = await self._speaks_first(wire) != _TLS_HANDSHAKE
                said = None if is_plain else await self._hello(wire)
        except (NotTls, TimeoutError, ConnectionError):
            attempt.is_refused = True
            attempt.reason = "neither TLS nor HTTP followed the CONNECT"
            self._core.record(egress, attempt)
            return
        if said is None:
            exchange = Exchange(self._core, egress, wire, fixed=(host, port))
            if upstream is not None:
                exchange.use(upstream, host, port)
            await exchange.run()
        elif said.host != host and (said.host is not None or hosts.address(host) is None):
            reason = f"TLS names {said.host or 'no host'}, where the connection is to {host}."
            await self._explain(wire, egress, attempt, Blocked(reason))
        elif upstream is None or self._must_open(egress, rule, said):
            await self._opened(wire, egress, host, port)
        else:
            await self._tunnel(wire, egress, upstream, attempt, rule)

    async def _speaks_first(self, wire: Wire) -> int:
        """The first byte that comes."""
        if not wire.held and not await wire.fill():
            raise NotTls
        return wire.peek()[0]

    def _must_open(self, egress: Egress, rule: Rule, said: Hello) -> bool:
        """Whether TLS is to be opened: to add something, or to see which host is meant.

        A tunnel would carry an encrypted name (ECH) on to the host that can read it. Opened, only
        the name that is shown counts. Refusing would be too much: browsers that have nothing to
        hide pretend to (GREASE).
        """
        is_hidden = said.is_encrypted and not egress.policy.is_any_host_fine(rule)
        return is_hidden or egress.opens(rule)

    async def _hello(self, wire: Wire) -> Hello:
        async with asyncio.timeout(self._core.limits.handshake_s):
            while True:
                said = hello.parse(wire.peek())
                if said is not None:
                    return said
                if not await wire.fill():
                    raise NotTls

    async def _dial(self, egress: Egress, host: str, port: int) -> Upstream:
        return await self._core.dialler.connect(host, port, is_tls=False, asker=egress.asker)

    async def _tunnel(
        self, wire: Wire, egress: Egress, upstream: Upstream, attempt: Attempt, rule: Rule
    ) -> None:
        """Copy bytes that nobody here can read."""
        other = Wire(upstream.stream)
        idle = Idle(self._core.limits.idle_s)
        try:
            with egress.keeping(attempt.host, rule, idle, is_opaque=True):
                await relay(wire, other, idle)
        except (ConnectionError, TimeoutError):
            attempt.reason = "the connection was cut off"
        finally:
            attempt.bytes_up, attempt.bytes_down = other.sent, other.received
            self._core.record(egress, attempt)
            await upstream.stream.close()

    async def _opened(self, wire: Wire, egress: Egress, host: str, port: int) -> None:
        """Be the host to the sandbox, and serve its requests."""
        opened = await self._accepted(wire, egress, host, port)
        if opened is None:
            return
        exchange = Exchange(self._core, egress, Wire(opened), fixed=(host, port))
        exchange.is_tls = True
        await exchange.run()
        await opened.end()

    async def _accepted(self, wire: Wire, egress: Egress, host: str, port: int) -> TlsStream | None:
        """The TLS handshake with the sandbox; None, and recorded, where that fails."""
        context = await self._core.authority.context(host)
        opened = TlsStream(wire.stream, context, early=wire.peek())
        try:
            async with asyncio.timeout(self._core.limits.handshake_s):
                await opened.handshake()
        except (ssl.SSLError, ConnectionError, TimeoutError) as error:
            attempt = self._attempt(egress, host, port)
            attempt.kind = "https"
            said = error.reason if isinstance(error, ssl.SSLError) else "cut off"
            attempt.reason = f"the program in the sandbox does not accept opened TLS: {said}"
            self._core.record(egress, attempt)
            return None
        return opened

    async def _explain(
        self, wire: Wire, egress: Egress, attempt: Attempt, error: Blocked | Unreachable
    ) -> None:
        """Say why as the host would, within TLS if that is what comes.

        No other answer reaches the program.
        """
        status = _status(error)
        self._refused(egress, attempt, error, status)
        try:
            async with asyncio.timeout(self._core.limits.handshake_s):
                is_tls = await self._speaks_first(wire) == _TLS_HANDSHAKE
        except (NotTls, TimeoutError):
            return
        if not is_tls:
            await self._told(wire, status, error.reason)
            return
        opened = await self._accepted(wire, egress, attempt.host, attempt.port)
        if opened is not None:
            await self._told(Wire(opened), status, error.reason)
            await opened.end()

    async def _told(self, wire: Wire, status: int, reason: str) -> None:
        """Answer a request without a look at it."""
        with contextlib.suppress(BadMessage, TimeoutError):
            async with asyncio.timeout(self._core.limits.head_s):
                await wire.head()
        await wire.write(answer(status, reason))

    def _refused(
        self,
        egress: Egress,
        attempt: Attempt,
        error: Blocked | Unreachable | BadMessage,
        status: int,
    ) -> None:
        attempt.is_refused = not isinstance(error, Unreachable)
        attempt.reason, attempt.status = error.reason, status
        self._core.record(egress, attempt)

    def _attempt(self, egress: Egress, host: str, port: int) -> Attempt:
        return Attempt(environment_id=egress.environment_id, host=host, port=port, kind="tunnel")


def _status(error: Blocked | Unreachable | BadMessage) -> int:
    if isinstance(error, Blocked):
        return 403
    return 502 if isinstance(error, Unreachable) else 400


def _shows_pages(request: Request) -> bool:
    return any(value.startswith(_SHOW_PAGES) for value in request.values(b"user-agent"))
