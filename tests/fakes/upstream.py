"""A fake upstream model server: real HTTP on loopback, one vendor's protocol, scripted replies.

The script is vendor-neutral (the model port's own events); a subclass renders it on its wire. This
is the one mock of the test suite, and it stands at the network's edge.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from openinteractions.models.port import ModelEvent


@dataclass(frozen=True, slots=True)
class Reply:
    """What the upstream does with one request."""

    events: tuple[ModelEvent, ...] = ()
    """The turn, ending in `Finished` unless it should end short of its proper end."""
    status: int = 200
    message: str = "upstream says no"
    """Error text, for a status other than 200."""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    """Before the status line."""
    gap_s: float = 0.0
    """Between streamed chunks."""
    cut_after: int | None = None
    """Drop the connection, uncleanly, after so many chunks."""
    stall_after: int | None = None
    """Say nothing more after so many chunks, with the connection open."""
    error_after: int | None = None
    """After so many chunks, send the vendor's in-stream error event (see `message`) and end."""
    error_status: int = 503
    """The status or type class that the in-stream error stands for."""
    raw: bytes | None = None
    """Send these bytes as the whole event stream, instead of a rendering of `events`."""


@dataclass(frozen=True, slots=True)
class Received:
    """One request that arrived."""

    path: str
    """With its query string."""
    headers: dict[str, str]
    """Names in lower case."""
    json: Any


class FakeUpstream:
    """Base of the vendors' fakes. Subclasses render; this class serves and misbehaves."""

    def __init__(self) -> None:
        self.replies: list[Reply | Callable[[Received], Reply]] = []
        """Served in order; then `default`."""
        self.default: Reply | Callable[[Received], Reply] = Reply()
        self.requests: list[Received] = []
        self.open = 0
        """Connections that are being answered right now."""
        self.url = ""
        """Base URL for a provider's settings, with what path the vendor wants (e.g. `/v1`)."""

    base_path = ""

    def wants_stream(self, received: Received) -> bool:
        """Whether the request asked for an event stream."""
        raise NotImplementedError

    def render(self, reply: Reply, received: Received) -> list[bytes]:
        """The event stream of a reply, one item a chunk, framing included."""
        raise NotImplementedError

    def render_whole(self, reply: Reply, received: Received) -> bytes:
        """The plain JSON body of a reply, for a request without streaming."""
        raise NotImplementedError

    def render_error(self, reply: Reply) -> bytes:
        """The JSON body of an error status."""
        raise NotImplementedError

    def render_stream_error(self, reply: Reply) -> bytes:
        """The event that reports an error inside a stream, framing included."""
        raise NotImplementedError

    def fault(self, received: Received) -> str | None:
        """Why the vendor answers a request with a 400, whatever the script says."""
        return None

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator["FakeUpstream"]:
        """Listen on a free loopback port until the context ends."""
        app = web.Application(client_max_size=512 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._answer)
        # Who goes away is not answered any more: `open` counts those that are there.
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server = site._server
        assert server is not None
        port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}{self.base_path}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        received = Received(
            path=request.path_qs,
            headers={name.lower(): value for name, value in request.headers.items()},
            json=orjson.loads(body) if body else None,
        )
        self.requests.append(received)
        fault = self.fault(received) if received.json else None
        if fault is not None:
            refused = Reply(status=400, message=fault)
            return web.Response(
                status=400, body=self.render_error(refused), content_type="application/json"
            )
        script = self.replies.pop(0) if self.replies else self.default
        reply = script(received) if callable(script) else script
        self.open += 1
        try:
            return await self._play(request, reply, received)
        finally:
            self.open -= 1

    async def _play(
        self, request: web.Request, reply: Reply, received: Received
    ) -> web.StreamResponse:
        await asyncio.sleep(reply.delay_s)
        if reply.status != 200:
            return web.Response(
                status=reply.status,
                body=self.render_error(reply),
                headers={"Content-Type": "application/json", **reply.headers},
            )
        if not self.wants_stream(received) and reply.raw is None:
            return web.Response(
                body=self.render_whole(reply, received), content_type="application/json"
            )
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", **reply.headers}
        )
        await response.prepare(request)
        chunks = [reply.raw] if reply.raw is not None else self.render(reply, received)
        with contextlib.suppress(ConnectionError):
            for number, chunk in enumerate(chunks):
                if await self._misbehave(request, response, reply, number):
                    return response
                await response.write(chunk)
                if reply.gap_s:
                    await asyncio.sleep(reply.gap_s)
            if not await self._misbehave(request, response, reply, len(chunks)):
                await response.write_eof()
        return response

    async def _misbehave(
        self, request: web.Request, response: web.StreamResponse, reply: Reply, number: int
    ) -> bool:
        if number == reply.error_after:
            await response.write(self.render_stream_error(reply))
            return True
        if number == reply.stall_after:
            await asyncio.sleep(3600)
        if number == reply.cut_after:
            if request.transport is not None:  # else the caller has cut it
                request.transport.abort()
            return True
        return False
