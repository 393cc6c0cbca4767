"""Request bodies from clients that may be slow or hostile: read whole, or handed on in pieces."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from openinteractions.errors import AppError, Invalid, TooLarge

T = TypeVar("T")


async def read(request: Request, *, max_bytes: int, silence_s: float) -> bytes:
    """The whole body.

    Args:
        request: Whose.
        max_bytes: More than this is refused, before it is read where the client says so.
        silence_s: Longest wait for its next piece.

    Raises:
        TooLarge: It is longer than allowed.
        Invalid: The client stopped sending, or its Content-Length is no number.
    """
    _check_declared(request, max_bytes)
    chunks: list[bytes] = []
    size = 0
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(silence_s) as silence:
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise TooLarge(f"The request body is larger than {max_bytes} bytes.")
                chunks.append(chunk)
                silence.reschedule(clock() + silence_s)
    except TimeoutError:
        raise Invalid(f"The request body paused for more than {silence_s:g} s.") from None
    return b"".join(chunks)


class Pieces(AsyncIterable[bytes]):
    """A stream of bytes on its way to somebody whose client hides why the stream failed."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self._fault: AppError | None = None
        self.over = asyncio.Event()
        """All of it has come."""

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        try:
            async for piece in self._source:
                yield piece
        except AppError as error:
            self._fault = error
            raise
        self.over.set()

    async def sent(self, call: Awaitable[T]) -> T:
        """What the call that reads this stream gives; if the stream failed, that is the error."""
        try:
            return await call
        except AppError:
            if self._fault is not None:
                raise self._fault from None
            raise


def pieces(request: Request, *, max_bytes: int, silence_s: float) -> Pieces:
    """The body as it comes.

    Args:
        request: Whose.
        max_bytes: More than this is refused, at once where the client says so.
        silence_s: Longest wait for its next piece.

    Raises:
        TooLarge: It is longer than allowed; the pieces raise it too.
        Invalid: The Content-Length is no number. The pieces raise it when the client stops sending.
    """
    _check_declared(request, max_bytes)
    return Pieces(_arriving(request, max_bytes, silence_s))


async def _arriving(request: Request, max_bytes: int, silence_s: float) -> AsyncGenerator[bytes]:
    stream = request.stream()
    size = 0
    while True:
        try:
            async with asyncio.timeout(silence_s):
                piece = await anext(stream, None)
        except TimeoutError:
            raise Invalid(f"The request body paused for more than {silence_s:g} s.") from None
        except ClientDisconnect:
            raise Invalid("The connection ended inside the request body.") from None
        if piece is None:
            return
        size += len(piece)
        if size > max_bytes:
            raise TooLarge(f"The request body is larger than {max_bytes} bytes.")
        if piece:
            yield piece


def _check_declared(request: Request, max_bytes: int) -> None:
    declared = request.headers.get("content-length")
    if declared is None:
        return
    if not declared.isascii() or not declared.isdigit():
        raise Invalid("The Content-Length header is not a number.")
    if int(declared) > max_bytes:
        raise TooLarge(f"The request body is larger than {max_bytes} bytes.")
