"""Requests and responses on one connection from a sandbox."""

import asyncio
import re
from dataclasses import dataclass
from http import HTTPStatus

from openinteractions.sandbox.egress import hosts, http1
from openinteractions.sandbox.egress.dial import Unreachable, Upstream
from openinteractions.sandbox.egress.http1 import BadMessage, Body, Fields, Request, Response, Wire
from openinteractions.sandbox.egress.inject import BodySwap, Hop, Injector
from openinteractions.sandbox.egress.journal import Attempt
from openinteractions.sandbox.egress.policy import Blocked
from openinteractions.sandbox.egress.relay import answer, relay
from openinteractions.sandbox.egress.state import Core, Egress, Idle

_HTTP = 80
_HTTPS = 443
_MAX_INTERIM = 32
_WHOLE_BODY = 256 * 1024
_SWITCHING = 101
_OK = 200
_ABSOLUTE = re.compile(rb"(?:http|ws)://([^/?#]*)([/?][^#]*)?", re.IGNORECASE)
_ORIGIN = re.compile(rb"/[^#]*")
_SAFE = frozenset({b"GET", b"HEAD", b"OPTIONS"})
# TRACE sends back what it was sent, credentials and all.
_NO_METHODS = frozenset({b"TRACE", b"TRACK", b"CONNECT"})


class _Hangup(Exception):
    """The connection ends without an answer, so that the client tries again by its own rules."""


@dataclass(slots=True)
class _Link:
    """The connection to a host, kept for the next request."""

    key: tuple[str, int]
    upstream: Upstream
    wire: Wire


@dataclass(slots=True)
class _Call:
    """A request, ready to go out."""

    request: Request
    injector: Injector
    idle: Idle
    head: bytes
    body: Body
    framing: http1.Framing
    """How its body goes out."""
    swap: BodySwap | None
    is_upgrade: bool
    ready: bytes | None = None
    """Its whole body, where that was read already."""
    has_trailers: bool = False


class _Upload:
    """A request's body on its way up."""

    def __init__(self, call: _Call, wire: Wire) -> None:
        self._call = call
        self._wire = wire
        self.is_done = False
        self.error: Exception | None = None
        """Why the sandbox's side failed."""

    async def run(self) -> None:
        """Send all of it; what fails is kept, and ends the connection to the host."""
        try:
            while piece := await self._next():
                await self._send(piece)
            if self._call.framing == "chunked":
                trailers = self._call.body.trailers if self._call.has_trailers else []
                await self._wire.write(http1.last_chunk(trailers))
            self.is_done = True
        except (Blocked, BadMessage) as error:
            self.error = error
            await self._wire.stream.close()
        except ConnectionError:
            # The host may have answered early; else reading its answer fails, too.
            return

    async def _next(self) -> bytes:
        """What can be sent next; `b""` after the last."""
        call = self._call
        while not call.body.is_done:
            try:
                piece = await call.body.read()
            except ConnectionError as error:
                raise BadMessage("a body that is cut off") from error
            call.idle.touch()
            if call.swap is not None:
                piece = await call.swap.feed(piece, is_last=call.body.is_done)
                # Pieces can be as short as a byte, and all be here already.
                await asyncio.sleep(0)
            if piece:
                return piece
        return b""

    async def _send(self, piece: bytes) -> None:
        data = http1.chunk(piece) if self._call.framing == "chunked" else piece
        await self._wire.write(data)
        self._call.idle.touch()


class Exchange:
    """Serves the requests of one connection, each judged on its own."""

    def __init__(
        self, core: Core, egress: Egress, client: Wire, *, fixed: tuple[str, int] | None = None
    ) -> None:
        """Serve a connection.

        Args:
            core: What all connections share.
            egress: Whose connection it is.
            client: The sandbox's side.
            fixed: Host and port of all its requests, if that is settled.
        """
        self._core = core
        self._egress = egress
        self._client = client
        self._fixed = fixed
        self.is_tls = False
        """Whether it was opened TLS."""
        self.is_proxy = False
        """Whether requests name their host as to a proxy."""
        self._link: _Link | None = None
        self._has_answered = False

    def use(self, upstream: Upstream, host: str, port: int) -> None:
        """Take over a connection to a host."""
        self._link = _Link((host, port), upstream, Wire(upstream.stream))

    async def run(self) -> Request | None:
        """Serve until the connection is over; a CONNECT to a proxy is given back.

        Raises:
            ConnectionError: The sandbox's side broke.
            TimeoutError: It waited too long.
        """
        try:
            while True:
                request = await self._next()
                if request is None:
                    return None
                if self.is_proxy and request.method == b"CONNECT":
                    return request
                if not await self._serve(request):
                    return None
        except _Hangup:
            return None
        finally:
            await self._drop()

    async def _next(self) -> Request | None:
        """The next request; None at the end, or after telling that it is malformed."""
        limits = self._core.limits
        if not self._client.held:
            async with asyncio.timeout(limits.keepalive_s):
                if not await self._client.fill():
                    return None
        try:
            async with asyncio.timeout(limits.head_s):
                head = await self._client.head()
            return None if head is None else http1.parse_request(head)
        except BadMessage as error:
            attempt = self._attempt()
            await self._refuse(attempt, 400, _malformed(error))
            self._core.record(self._egress, attempt)
            return None

    def _attempt(self) -> Attempt:
        host, port = self._fixed or ("", _HTTPS if self.is_tls else _HTTP)
        return Attempt(
            environment_id=self._egress.environment_id,
            host=host,
            port=port,
            kind="https" if self.is_tls else "http",
        )

    async def _serve(self, request: Request) -> bool:
        """Serve one request; whether the connection can go on."""
        attempt = self._attempt()
        attempt.method = request.method.decode()
        self._has_answered = False
        has_body = request.method != b"HEAD"
        try:
            return await self._forward(request, attempt)
        except Blocked as error:
            await self._refuse(attempt, 403, error.reason, has_body=has_body)
        except BadMessage as error:
            await self._refuse(attempt, 400, _malformed(error), has_body=has_body)
        except Unreachable as error:
            await self._fail(attempt, 502, error.reason, has_body=has_body)
        except TimeoutError:
            await self._fail(attempt, 504, "no answer in time.", has_body=has_body)
        except (ConnectionError, _Hangup):
            attempt.reason = attempt.reason or "the connection was cut off"
            raise
        finally:
            self._core.record(self._egress, attempt)
        return False

    async def _refuse(
        self, attempt: Attempt, status: int, reason: str, *, has_body: bool = True
    ) -> None:
        attempt.is_refused = True
        await self._fail(attempt, status, reason, has_body=has_body)

    async def _fail(
        self, attempt: Attempt, status: int, reason: str, *, has_body: bool = True
    ) -> None:
        """Answer ourselves, unless the host's answer has begun: then cut it off."""
        attempt.reason = reason
        if self._has_answered:
            raise _Hangup
        attempt.status = status
        await self._client.write(answer(status, reason, has_body=has_body))

    async def _forward(self, request: Request, attempt: Attempt) -> bool:
        if request.method in _NO_METHODS:
            raise Blocked(f"the method {attempt.method} cannot be used.")
        host, port, target = self._where(request)
        attempt.host, attempt.port = host, port
        attempt.path = target.partition(b"?")[0].decode()
        request.target = target
        self._core.dialler.check_port(host, port)
        hop = Hop(
            environment_id=self._egress.environment_id,
            host=host,
            is_secure=self.is_tls,
            rule=self._egress.policy.decide(host),
        )
        attempt.rule = hop.rule.domain
        response = await self._ask(request, hop, attempt)
        if response is not None:
            return response
        await self._switched(hop, attempt)
        return False

    async def _ask(self, request: Request, hop: Hop, attempt: Attempt) -> bool | None:
        """Send a request with what is added to it; as `_send`."""
        injector = Injector(self._core.vault, self._egress.variables, hop, self._egress.room)
        idle = Idle(self._core.limits.idle_s)
        try:
            async with idle.timeout:
                call = await self._prepared(request, injector, idle, attempt.port)
                return await self._send(call, attempt, (hop.host, attempt.port))
        finally:
            attempt.credential = injector.credential
            injector.close()

    def _where(self, request: Request) -> tuple[str, int, bytes]:
        """Host, port and path that a request is for; what names the host twice must agree."""
        default = _HTTP if self._fixed is None else self._fixed[1]
        named = [hosts.authority(value, default) for value in request.values(b"host")]
        if len(named) > 1 or None in named or (not named and request.minor == 1):
            raise BadMessage("no Host, or one that is malformed")
        target, wanted = request.target, self._fixed
        if self.is_proxy:
            found = _ABSOLUTE.fullmatch(target)
            wanted = None if found is None else hosts.authority(found[1], _HTTP)
            if found is None or wanted is None:
                raise BadMessage("a proxy wants http://host/path, or CONNECT for https")
            path = found[2] or b"/"
            target = path if path.startswith(b"/") else b"/" + path
        elif _ORIGIN.fullmatch(target) is None and (target, request.method) != (b"*", b"OPTIONS"):
            raise BadMessage("a target that is not a path")
        wanted = wanted or (named[0] if named else None)
        if wanted is None:
            raise BadMessage("no Host")
        if named and named[0] != wanted:
            raise Blocked(f"the header Host differs from {wanted[0]}, where the connection goes.")
        return (*wanted, target)

    async def _prepared(self, request: Request, injector: Injector, idle: Idle, port: int) -> _Call:
        framing = request.framing()
        fields = [each for each in request.end_to_end() if each[0].lower() != b"host"]
        target, fields = await injector.apply(request, fields)
        has_content = framing != 0
        call = _Call(
            request=request,
            injector=injector,
            idle=idle,
            head=b"",
            body=Body(self._client, framing),
            framing=framing,
            swap=injector.body(_first(request, b"content-type")) if has_content else None,
            is_upgrade=not has_content and _wants_websocket(request),
            has_trailers=not self._egress.variables and not injector.hop.rule.adds,
        )
        if call.swap is not None:
            fields = await self._look_into_body(call, fields)
        if call.is_upgrade:
            fields += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        elif has_content or request.declared() is not None:
            fields += http1.framed(call.framing)
        default = _HTTPS if self.is_tls else _HTTP
        host = hosts.shown(injector.hop.host, port, default).encode()
        first = b"%b %b HTTP/1.1" % (request.method, target)
        call.head = http1.head(first, [(b"Host", host), *fields])
        return call

    async def _look_into_body(self, call: _Call, fields: Fields) -> Fields:
        """Read a short body before anything goes out; else settle how it goes out."""
        request = call.request
        is_compressed = bool(set(request.tokens(b"content-encoding")) - {b"identity"})
        is_long = not isinstance(call.framing, int) or call.framing > _WHOLE_BODY
        may_swap = (is_compressed or is_long) and await call.injector.may_swap_in_body()
        if is_compressed:
            if may_swap:
                raise Blocked(
                    "a compressed body cannot be searched for the placeholders of credentials "
                    "that may be sent in bodies; send it uncompressed."
                )
            call.swap = None
            return fields
        if is_long:
            call.framing = "chunked" if may_swap else call.framing
            return fields
        if b"100-continue" in request.tokens(b"expect"):
            await self._client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        parts: list[bytes] = []
        while not call.body.is_done:
            parts.append(await call.body.read())
            call.idle.touch()
        assert call.swap is not None
        call.ready = await call.swap.feed(b"".join(parts), is_last=True)
        call.framing = len(call.ready)
        return [each for each in fields if each[0].lower() != b"expect"]

    async def _send(self, call: _Call, attempt: Attempt, key: tuple[str, int]) -> bool | None:
        """Send a request and pass the answer on; None where it switched protocols."""
        while True:
            link, is_reused = await self._linked(key)
            before = link.wire.sent, link.wire.received
            try:
                return await self._exchange(call, attempt, link)
            except _Silent as error:
                await self._drop()
                if not is_reused:
                    raise Unreachable(
                        f"{key[0]} closed the connection without an answer."
                    ) from error
                # It had closed the kept connection, perhaps; only what changes nothing there can
                # be sent again without asking.
                if call.request.method not in _SAFE or call.body.framing != 0:
                    raise _Hangup from error
            finally:
                attempt.bytes_up += link.wire.sent - before[0]
                attempt.bytes_down += link.wire.received - before[1]

    async def _linked(self, key: tuple[str, int]) -> tuple[_Link, bool]:
        kept = self._link
        if kept is not None and kept.key == key and kept.upstream.is_idle and not kept.wire.held:
            return kept, True
        await self._drop()
        upstream = await self._core.dialler.connect(
            *key, is_tls=self.is_tls, asker=self._egress.asker
        )
        self._link = _Link(key, upstream, Wire(upstream.stream))
        return self._link, False

    async def _exchange(self, call: _Call, attempt: Attempt, link: _Link) -> bool | None:
        """One request and its answer on a connection to its host."""
        upload = _Upload(call, link.wire)
        try:
            await link.wire.write(call.head + (call.ready or b""))
        except ConnectionError as error:
            raise _Silent from error
        if call.body.is_done:
            upload.is_done = True
            return await self._answered(call, attempt, link, upload)
        task = asyncio.get_running_loop().create_task(upload.run(), name="egress-upload")
        try:
            return await self._answered(call, attempt, link, upload)
        except (Unreachable, ConnectionError, _Silent):
            if upload.error is not None:
                raise upload.error from None
            raise
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _answered(
        self, call: _Call, attempt: Attempt, link: _Link, upload: _Upload
    ) -> bool | None:
        """Pass the answer on; whether the sandbox's connection can go on."""
        response = await self._response(call, link)
        attempt.status = response.status
        if response.status == _SWITCHING:
            return None
        try:
            body = Body(link.wire, response.framing(call.request.method))
            fields = call.injector.secrets.redacted(response.end_to_end())
        except BadMessage as error:
            raise _bad_answer(call, error) from error
        is_new = call.request.minor == 1
        framing: http1.Framing = body.framing
        if framing in {"chunked", "close"}:
            framing = "chunked" if is_new else "close"
        goes_on = call.request.is_persistent() and upload.is_done and framing != "close"
        fields = [*fields, *_length_fields(call, response, framing)]
        if not goes_on:
            fields.append((b"Connection", b"close"))
        elif not is_new:
            fields.append((b"Connection", b"keep-alive"))
        self._has_answered = True
        head = http1.head(_status_line(call, response), fields)
        await self._pass_on(call, link, body, head, framing)
        if not (response.is_persistent() and upload.is_done and body.framing != "close"):
            await self._drop()
        return goes_on

    async def _response(self, call: _Call, link: _Link) -> Response:
        """The final response's head; those before it are passed on."""
        for _ in range(_MAX_INTERIM):
            try:
                head = await link.wire.head()
            except ConnectionError as error:
                raise _Silent from error
            except BadMessage as error:
                raise _bad_answer(call, error) from error
            if head is None:
                raise _Silent
            call.idle.touch()
            try:
                response = http1.parse_response(head)
                if response.status >= _OK:
                    return response
                if response.status == _SWITCHING:
                    await self._switch(call, response)
                    return response
                fields = call.injector.secrets.redacted(response.end_to_end())
            except BadMessage as error:
                raise _bad_answer(call, error) from error
            if call.request.minor == 1:
                await self._client.write(http1.head(_status_line(call, response), fields))
        raise _bad_answer(call, BadMessage("too many interim responses"))

    async def _switch(self, call: _Call, response: Response) -> None:
        """Pass the agreement to a WebSocket on."""
        if not call.is_upgrade or response.tokens(b"upgrade") != [b"websocket"]:
            raise BadMessage("a switch of protocols that nobody asked for")
        fields = call.injector.secrets.redacted(response.end_to_end())
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        self._has_answered = True
        await self._client.write(http1.head(b"HTTP/1.1 101 Switching Protocols", fields))

    async def _pass_on(
        self, call: _Call, link: _Link, body: Body, head: bytes, framing: http1.Framing
    ) -> None:
        """The answer's head and content, framed for the sandbox."""
        pending = head
        try:
            while not body.is_done:
                if pending and not link.wire.held:
                    await self._client.write(pending)
                    pending = b""
                piece = await body.read()
                call.idle.touch()
                if piece:
                    data = http1.chunk(piece) if framing == "chunked" else piece
                    await self._client.write(pending + data)
                    pending = b""
            if framing == "chunked":
                trailers = call.injector.secrets.redacted(body.trailers)
                pending += http1.last_chunk(trailers)
        except BadMessage as error:
            raise _bad_answer(call, error) from error
        if pending:
            await self._client.write(pending)

    async def _switched(self, hop: Hop, attempt: Attempt) -> None:
        """Copy a WebSocket's bytes until it ends."""
        link = self._link
        assert link is not None
        before = link.wire.sent, link.wire.received
        idle = Idle(self._core.limits.idle_s)
        try:
            with self._egress.keeping(hop.host, hop.rule, idle, is_opaque=False):
                await relay(self._client, link.wire, idle)
        except (ConnectionError, TimeoutError):
            attempt.reason = "the connection was cut off"
        finally:
            attempt.bytes_up += link.wire.sent - before[0]
            attempt.bytes_down += link.wire.received - before[1]

    async def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.upstream.stream.close()


class _Silent(Exception):
    """The host closed the connection before it answered."""


def _malformed(error: BadMessage) -> str:
    return f"the request is malformed: {error.reason}."


def _bad_answer(call: _Call, error: BadMessage) -> Unreachable:
    return Unreachable(f"the answer of {call.injector.hop.host} is malformed: {error.reason}.")


def _first(request: Request, name: bytes) -> bytes:
    return next(iter(request.values(name)), b"")


def _wants_websocket(request: Request) -> bool:
    return (
        request.method == b"GET"
        and request.minor == 1
        and request.tokens(b"upgrade") == [b"websocket"]
        and b"upgrade" in request.tokens(b"connection")
    )


def _status_line(call: _Call, response: Response) -> bytes:
    return b"HTTP/1.1 %d %b" % (response.status, call.injector.secrets.hidden(response.phrase))


def _length_fields(call: _Call, response: Response, framing: http1.Framing) -> Fields:
    """How long the answer is, also where its content is left out."""
    if call.request.method == b"HEAD" or response.status == HTTPStatus.NOT_MODIFIED:
        # No content gives this number the lie: it must not be a secret of digits.
        shown = response.length_shown()
        return shown if call.injector.secrets.redacted(shown) == shown else []
    return [] if response.status == HTTPStatus.NO_CONTENT else http1.framed(framing)
