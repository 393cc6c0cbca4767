"""The SSRF guard: the one way for requests that are made for a user to leave this server.

Every host, also after a redirect, is resolved here and refused unless all of its addresses are
public or in a range that the operator allowed. The connection goes to the very address that was
checked, so a name that changes its mind in between gains nothing.
"""

import asyncio
import base64
import contextlib
import functools
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit, urlunsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from openinteractions.errors import Invalid
from openinteractions.turns import Turns

_MAX_REDIRECTS = 5
_LOOKUP_S = 5.0
_LOOKUP_THREADS = 64
_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10, sock_read=20)
_STREAM_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
_CALLBACK_TIMEOUT = aiohttp.ClientTimeout(total=15, sock_connect=5)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NAT64 = IPv6Network("64:ff9b::/96")
# What Python 3.11 takes for public: site-local addresses, those for documentation, those for
# protocols, and two clouds' metadata (192.0.0.192, 168.63.129.16).
_NOT_PUBLIC = (
    IPv6Network("fec0::/10"),
    IPv6Network("3fff::/20"),
    IPv4Network("192.0.0.0/24"),
    IPv4Network("168.63.129.16/32"),
)
_OK = 200


class Refused(Invalid):
    """The guard does not let this address be reached."""

    code = "forbidden_address"


class Unwelcome(Invalid):
    """What was to be fetched was answered with another status than 200."""

    def __init__(self, message: str, *, answer: int) -> None:
        super().__init__(message)
        self.answer = answer
        """The status."""


class Unreachable(Invalid):
    """There is no connection to be had: nothing was sent."""


class Guard:
    """Decides which addresses users' requests may reach."""

    def __init__(self, allow: Sequence[IPv4Network | IPv6Network] = ()) -> None:
        self._allow = tuple(allow)

    def permits(self, address: str) -> bool:
        """Whether an IP address may be reached."""
        ip = ip_address(address.partition("%")[0])
        if isinstance(ip, IPv6Address):
            ip = _embedded(ip)
        if any(ip.version == net.version and ip in net for net in self._allow):
            return True
        if any(ip.version == net.version and ip in net for net in _NOT_PUBLIC):
            return False
        return ip.is_global and not ip.is_multicast and not ip.is_reserved and not _is_own(str(ip))


def _is_own(address: str) -> bool:
    """Whether this machine has the address: what listens on it may trust whoever is local."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    # Some routers let any address be bound: then it says nothing.
    return not _binds_anything(family)


@functools.cache
def _binds_anything(family: socket.AddressFamily) -> bool:
    example = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((example, 0))
    except OSError:
        return False
    return True


def _embedded(ip: IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one stands for, so that it cannot hide there."""
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip.sixtofour is not None:
        return ip.sixtofour
    if ip in _NAT64:
        return IPv4Address(int(ip) & 0xFFFF_FFFF)
    return ip


class _GuardedResolver(AbstractResolver):
    """Resolves names, and refuses those that lead to an address the guard does not permit.

    In threads of its own: names that are slow on purpose keep no other work of this process.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="fetch-dns")
        self._turns = Turns(_LOOKUP_THREADS)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        look_up = functools.partial(
            socket.getaddrinfo,
            host,
            port,
            family=family,
            type=socket.SOCK_STREAM,
            flags=socket.AI_ADDRCONFIG,
        )
        try:
            async with asyncio.timeout(_LOOKUP_S):
                found = await self._looked_up(_domain(host), look_up)
        except TimeoutError as error:
            raise Unreachable(
                f"The name '{host}' could not be looked up within {_LOOKUP_S:g} seconds."
            ) from error
        addresses = [_resolved(host, port, entry) for entry in found]
        for entry in addresses:
            if not self._guard.permits(entry["host"]):
                raise Refused(f"The host '{host}' leads to an address that is not public.")
        return addresses

    async def _looked_up(self, domain: str, look_up: Callable[[], list[Any]]) -> list[Any]:
        """What a thread finds. It goes on when its time is up: until it ends, it counts."""
        loop = asyncio.get_running_loop()

        def ended(_: object) -> None:
            # The loop may be over by then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._turns.give, domain)

        # Names are slow by their domain's servers: a project would have to have many.
        await self._turns.take(domain)
        begun = self._threads.submit(look_up)
        begun.add_done_callback(ended)
        return await asyncio.wrap_future(begun)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _domain(host: str) -> str:
    return ".".join(host.lower().rstrip(".").split(".")[-2:])


def _resolved(host: str, port: int, entry: Any) -> ResolveResult:  # noqa: ANN401 - getaddrinfo's
    family, _, protocol, _, (address, _, *rest) = entry
    # An address of one link only means something with its interface.
    scope = rest[1] if len(rest) > 1 else 0
    return ResolveResult(
        hostname=host,
        host=f"{address}%{scope}" if scope and "%" not in address else address,
        port=port,
        family=family,
        proto=protocol,
        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
    )


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a URL gave."""

    mime_type: str
    data: bytes
    url: str
    """After redirects."""
    charset: str | None = None
    """Of a text, if the answer's header says so."""

    def base64(self) -> str:
        """The bytes as standard base64 text."""
        return base64.b64encode(self.data).decode()


class Fetcher:
    """Fetches users' URLs through the guard."""

    def __init__(self, guard: Guard, *, max_bytes: int, connections: int = 100) -> None:
        """A fetcher without connections yet.

        Args:
            guard: Decides.
            max_bytes: Of one file.
            connections: At most at once; the next one waits. An owner has a ninth of those that
                nobody has, or less.
        """
        self._guard = guard
        self._turns = Turns(connections)
        self.max_bytes = max_bytes
        """Largest file, and most that one interaction fetches in all."""
        self._connections = connections
        self._resolver: _GuardedResolver | None = None
        self._session: aiohttp.ClientSession | None = None

    async def fetch(
        self,
        url: str,
        *,
        owner: str | None = None,
        permits: Callable[[str], None] | None = None,
        headers: Mapping[str, str] | None = None,
        max_bytes: int | None = None,
        grows: Callable[[int], Awaitable[None]] | None = None,
    ) -> Fetched:
        """GET a URL.

        Args:
            url: Where; redirects are followed.
            owner: For whom, where one may not keep the connections from the others.
            permits: Called with it, and with what each redirect leads to, before anything is sent
                there; refuses by raising.
            headers: Sent there, and wherever a redirect leads.
            max_bytes: Largest answer, if less than the fetcher's own limit.
            grows: Awaited with the size that the answer is about to have, again and again: it may
                wait until there is room for so much.

        Raises:
            Refused: It leads to an address that is not public.
            Unwelcome: It has nothing to give; the error has the status.
            Invalid: It is no http(s) URL, cannot be had, or is too large; the message says so.
        """
        async with self._turn(owner):
            for _ in range(_MAX_REDIRECTS + 1):
                self._check(url)
                if permits is not None:
                    permits(url)
                try:
                    async with self._open().get(
                        url, allow_redirects=False, timeout=_TIMEOUT, headers=headers
                    ) as response:
                        target = response.headers.get("Location")
                        if response.status in _REDIRECTS and target:
                            url = urljoin(url, target)
                            continue
                        return await self._read(response, url, max_bytes, grows)
                except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                    raise _explained(error, url) from error
        raise Invalid(f"Cannot fetch '{_shown(url)}': too many redirects.")

    @asynccontextmanager
    async def _turn(self, owner: str | None) -> AsyncGenerator[None]:
        """A connection's place, for as long as it is used."""
        if owner is None:
            yield
            return
        await self._turns.take(owner)
        try:
            yield
        finally:
            self._turns.give(owner)

    @asynccontextmanager
    async def stream(self, url: str, *, max_bytes: int) -> AsyncGenerator[AsyncIterator[bytes]]:
        """GET a URL piece by piece, whatever `max_bytes` of the fetcher is.

        Raises:
            Refused: It leads to an address that is not public.
            Unwelcome: It has nothing to give; the error has the status.
            Invalid: It is no http(s) URL, cannot be had, or is too large; the pieces raise it too.
        """
        for _ in range(_MAX_REDIRECTS + 1):
            self._check(url)
            try:
                response = await self._open().get(
                    url, allow_redirects=False, timeout=_STREAM_TIMEOUT
                )
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                raise _explained(error, url) from error
            async with response:
                target = response.headers.get("Location")
                if response.status in _REDIRECTS and target:
                    url = urljoin(url, target)
                    continue
                _require_ok(response, url)
                yield _pieces(response, url, max_bytes)
                return
        raise Invalid(f"Cannot fetch '{_shown(url)}': too many redirects.")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """POST to a URL, without following redirects; the answer's status.

        Raises:
            Refused: It leads to an address that is not public.
            Invalid: It is no http(s) URL, or did not answer; the message says so.
        """
        self._check(url)
        try:
            async with self._open().post(
                url, data=body, headers=headers, allow_redirects=False, timeout=_CALLBACK_TIMEOUT
            ) as response:
                return response.status
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise _explained(error, url) from error

    async def post_form(
        self,
        url: str,
        fields: Mapping[str, str],
        headers: Mapping[str, str],
        *,
        max_bytes: int,
        owner: str | None = None,
    ) -> tuple[int, bytes]:
        """POST a form, without following redirects; the answer's status and body.

        Raises:
            Refused: It leads to an address that is not public.
            Invalid: It is no http(s) URL, did not answer, or said too much; the message says so.
        """
        self._check(url)
        try:
            async with (
                self._turn(owner),
                self._open().post(
                    url,
                    data=urlencode(fields).encode(),
                    headers={"Content-Type": "application/x-www-form-urlencoded", **headers},
                    allow_redirects=False,
                    timeout=_CALLBACK_TIMEOUT,
                ) as response,
            ):
                return response.status, await _bounded(response, url, max_bytes)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise _explained(error, url) from error

    async def request(
        self, method: str, url: str, body: bytes, headers: Mapping[str, str], *, silence_s: float
    ) -> aiohttp.ClientResponse:
        """Any request, without following redirects; the caller reads the answer, and closes it.

        A body comes as it was sent: nothing is decompressed.

        Args:
            method: Of HTTP.
            url: Where to.
            body: Sent as it is.
            headers: Sent with it.
            silence_s: How long the answer may pause, before and within its body.

        Raises:
            Refused: It leads to an address that is not public.
            Unreachable: Nothing was sent.
            Invalid: It is no http(s) URL, or did not answer; the message says so.
        """
        self._check(url)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence_s)
        try:
            return await self._open().request(
                method,
                url,
                data=body or None,
                headers=headers,
                allow_redirects=False,
                auto_decompress=False,
                timeout=timeout,
            )
        except (
            aiohttp.ClientConnectorError,
            aiohttp.ConnectionTimeoutError,
            aiohttp.InvalidURL,
        ) as error:
            explained = _explained(error, url)
            if isinstance(explained, Refused):
                raise explained from error
            raise Unreachable(explained.message) from error
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise _explained(error, url) from error

    async def close(self) -> None:
        """Close the connections; a look-up that still goes on ends by itself."""
        if self._session is not None:
            await self._session.close()
        if self._resolver is not None:
            await self._resolver.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._resolver = _GuardedResolver(self._guard)
            connector = aiohttp.TCPConnector(
                resolver=self._resolver,
                socket_factory=self._socket,
                use_dns_cache=False,
                limit=self._connections,
            )
            # No cookies: one project's log-in at a site is not another's.
            self._session = aiohttp.ClientSession(
                connector=connector, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    def _socket(self, address: Any) -> socket.socket:  # noqa: ANN401 - aiohttp's AddrInfoType
        """The last look: whatever spelling the URL had, this is where the connection goes."""
        family, kind, protocol, _, where = address
        if not self._guard.permits(where[0]):
            raise Refused(f"The address '{where[0]}' is not public.")
        return socket.socket(family, kind, protocol)

    def _check(self, url: str) -> None:
        """Names are checked by the resolver; a literal address never reaches it."""
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError:
            host, parts = None, None
        if parts is None or parts.scheme not in {"http", "https"} or not host:
            raise Invalid(f"Cannot fetch '{_shown(url)}': only http and https URLs can be fetched.")
        try:
            literal = ip_address(host)
        except ValueError:
            return
        if not self._guard.permits(str(literal)):
            raise Refused(f"The host '{host}' is an address that is not public.")

    async def _read(
        self,
        response: aiohttp.ClientResponse,
        url: str,
        max_bytes: int | None,
        grows: Callable[[int], Awaitable[None]] | None,
    ) -> Fetched:
        _require_ok(response, url)
        most = self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes)
        data = await _bounded(response, url, most, grows)
        return Fetched(response.content_type, data, url, response.charset)


def _require_ok(response: aiohttp.ClientResponse, url: str) -> None:
    if response.status != _OK:
        message = f"Cannot fetch '{_shown(url)}': it answered {response.status}."
        raise Unwelcome(message, answer=response.status)


async def _pieces(
    response: aiohttp.ClientResponse, url: str, max_bytes: int
) -> AsyncGenerator[bytes]:
    size = 0
    try:
        async for chunk in response.content.iter_chunked(64 * 1024):
            size += len(chunk)
            if size > max_bytes:
                raise Invalid(f"Cannot fetch '{_shown(url)}': it is larger than {max_bytes} bytes.")
            yield chunk
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise _explained(error, url) from error


async def _bounded(
    response: aiohttp.ClientResponse,
    url: str,
    max_bytes: int,
    grows: Callable[[int], Awaitable[None]] | None = None,
) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_chunked(64 * 1024):
        size = len(data) + len(chunk)
        if size > max_bytes:
            raise Invalid(f"Cannot fetch '{_shown(url)}': it is larger than {max_bytes} bytes.")
        if grows is not None:
            await grows(size)
        data += chunk
    return bytes(data)


def _explained(error: Exception, url: str) -> Invalid:
    cause: Any = error
    while cause is not None:
        if isinstance(cause, Refused):
            return cause
        cause = cause.__cause__ or cause.__context__
    return Invalid(f"Cannot fetch '{_shown(url)}': {_reason(error)}.")


def _reason(error: Exception) -> str:  # noqa: PLR0911 - one for each way to fail
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "the name of its host cannot be resolved"
        case aiohttp.ClientConnectorCertificateError():
            return "the host's certificate is not valid"
        case aiohttp.ClientSSLError():
            return "no secure connection to the host could be made"
        case aiohttp.ClientConnectorError():
            # Not `strerror`, which has the address.
            why = os.strerror(error.os_error.errno or 0)
            return f"the host cannot be reached ({why})"
        case TimeoutError():
            return "it took too long"
        case aiohttp.ClientPayloadError():
            return "its answer broke off"
        case aiohttp.ServerDisconnectedError() | OSError():
            return "the connection to the host broke"
        case ValueError():
            return "it is no valid URL"
        case _:
            return "the host's answer is not understood"


def _shown(url: str) -> str:
    """A URL for messages: without user, password and query."""
    try:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, place, parts.path, "", ""))[:200]
    except ValueError:
        return url[:100]
