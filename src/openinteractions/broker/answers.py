"""The answers that stay open: an execution's output as frames, and a port as a WebSocket."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from aiohttp import WSMsgType, web

from openinteractions.broker.errors import begin
from openinteractions.broker.executions import Joined
from openinteractions.broker.record import Piece
from openinteractions.errors import RequestError
from openinteractions.sandbox import messages
from openinteractions.sandbox.pipe import Omitted
from openinteractions.sandbox.port import Duplex, Exit

_SILENCE_S: Final = 15.0
_CHUNK: Final = 64 * 1024
_MAX_REASON: Final = 120


async def stream(request: web.Request, joined: Joined, offset: int) -> web.StreamResponse:
    """Send an execution's output from a position on, and how it ended.

    A reader that is slow slows down only its own answer.
    """
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    response.headers["Cache-Control"] = "no-store"
    await begin(request, response)
    with contextlib.suppress(ConnectionError):
        await response.write(messages.event(joined.event))
        async with aclosing(_with_pings(joined.record.follow(offset))) as pieces:
            async for piece in pieces:
                await response.write(_encoded(piece))
        await response.write_eof()
    return response


async def _with_pings(pieces: AsyncGenerator[Piece]) -> AsyncGenerator[Piece | None]:
    """The pieces, and None after each time of silence."""
    following: asyncio.Future[Piece] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(pieces))
            while not (await asyncio.wait({following}, timeout=_SILENCE_S))[0]:
                yield None
            try:
                piece = following.result()
            except StopAsyncIteration:
                return
            yield piece
    finally:
        if following is not None:
            following.cancel()
            await asyncio.wait({following})
        await pieces.aclose()


def _encoded(piece: Piece | None) -> bytes:
    if piece is None:
        return messages.event("ping")
    if isinstance(piece, Exit):
        return messages.event("exit", **messages.exit_fields(piece))
    if isinstance(piece, Omitted):
        return messages.event("omitted", bytes=piece.byte_count)
    return messages.frame(piece.stream, piece.data)


async def refuse(socket: web.WebSocketResponse, error: RequestError) -> None:
    """Close a WebSocket with the reason."""
    reason = error.message.encode()[:_MAX_REASON]
    await socket.close(code=messages.CLOSE_BASE + error.status, message=reason)


async def bridge(socket: web.WebSocketResponse, port: Duplex) -> None:
    """Copy bytes both ways until both sides have ended, or one is gone."""
    await socket.send_str(messages.OPENED)
    async with asyncio.TaskGroup() as group:
        group.create_task(_up(socket, port), name="port-up")
        group.create_task(_down(socket, port), name="port-down")


async def _up(socket: web.WebSocketResponse, port: Duplex) -> None:
    """Until the client is gone: it may send after the sandbox has said its last word."""
    try:
        async for message in socket:
            if message.type is WSMsgType.BINARY:
                await port.write(message.data)
            elif message.type is WSMsgType.TEXT and message.data == messages.END_OF_STREAM:
                await port.end()
    except ConnectionError:
        await socket.close()
    finally:
        await port.close()


async def _down(socket: web.WebSocketResponse, port: Duplex) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await port.read(_CHUNK):
            await socket.send_bytes(data)
        await socket.send_str(messages.END_OF_STREAM)
        return
    await socket.close()
