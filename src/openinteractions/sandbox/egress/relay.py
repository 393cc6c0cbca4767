"""Bytes both ways between two streams, and the words that a refusal is told in."""

import asyncio
import contextlib
from http import HTTPStatus

from openinteractions.sandbox.egress import http1
from openinteractions.sandbox.egress.http1 import Wire
from openinteractions.sandbox.egress.state import Idle

_LINGER_S = 2.0
_LINGER_BYTES = 1 << 20
_PHRASE_CHARS = 300


async def relay(client: Wire, upstream: Wire, idle: Idle) -> None:
    """Copy both ways until both sides have ended; half-closes are passed on.

    Raises:
        ConnectionError: A side broke.
        TimeoutError: Nothing has moved for too long.
    """
    loop = asyncio.get_running_loop()
    ways = [
        loop.create_task(_copy(client, upstream, idle), name="egress-up"),
        loop.create_task(_copy(upstream, client, idle), name="egress-down"),
    ]
    try:
        async with idle.timeout:
            ended, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
        for each in ended:
            each.result()
    finally:
        for each in ways:
            each.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _copy(source: Wire, sink: Wire, idle: Idle) -> None:
    while piece := await source.some():
        idle.touch()
        await sink.write(piece)
        idle.touch()
    await sink.stream.end()


def answer(status: int, reason: str, *, has_body: bool = True, is_phrase: bool = False) -> bytes:
    """A whole response of our own, after which the connection closes.

    Args:
        status: 403 for what is blocked; others for what failed.
        reason: For the model that reads it: what, why, and who can change it.
        has_body: False in answers to HEAD.
        is_phrase: Say why in the first line too: of an answer to CONNECT, programs show no more.
    """
    word = "blocked" if status == HTTPStatus.FORBIDDEN else "failed"
    text = f"egress {word}: {reason}\n".encode()
    phrase = HTTPStatus(status).phrase
    if is_phrase:
        said = text.decode("ascii", "replace").strip()[:_PHRASE_CHARS]
        phrase = "".join(char if char.isprintable() else "?" for char in said)
    first = f"HTTP/1.1 {status} {phrase}".encode("ascii", "replace")
    fields = [
        (b"Content-Type", b"text/plain; charset=utf-8"),
        (b"Content-Length", b"%d" % len(text)),
        (b"X-Egress", word.encode()),
        (b"Connection", b"close"),
    ]
    return http1.head(first, fields) + (text if has_body else b"")


async def finish(wire: Wire) -> None:
    """End a connection so that the other side still gets what was sent to it last."""
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            await wire.stream.end()
            left = _LINGER_BYTES
            # Closing with bytes unread would reset the connection, and the answer with it.
            while left > 0 and (taken := await wire.stream.read()):
                left -= len(taken)
