"""Noticing that a caller went away while its answer is still being made."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request

from openinteractions.api.body import Pieces
from openinteractions.errors import Invalid

_T = TypeVar("_T")

_NOT_BEFORE_S = 0.5
"""Most answers are ready sooner, and are spared the watching."""


@asynccontextmanager
async def noticing(request: Request, gone: Callable[[], Awaitable[None]]) -> AsyncGenerator[None]:
    """Call `gone` if the client disconnects, or the server stops, while the context lasts.

    Args:
        request: Whose client. Its body has been read.
        gone: What to do; the context goes on all the same.
    """
    loop = asyncio.get_running_loop()
    watch: asyncio.Task[None] | None = None

    def begin() -> None:
        nonlocal watch
        watch = loop.create_task(_watch(request, gone), name="presence")

    timer = loop.call_later(_NOT_BEFORE_S, begin)
    try:
        yield
    except asyncio.CancelledError:
        # The server stops before the answer is there: the client is left without it as well.
        await asyncio.shield(gone())
        raise
    finally:
        timer.cancel()
        if watch is not None:
            watch.cancel()
            await asyncio.wait([watch])


async def unless_gone(request: Request, body: Pieces, call: Coroutine[Any, Any, _T]) -> _T:
    """What a call gives that reads the request's body; it is cancelled when the client has gone.

    Raises:
        Invalid: It has. Nobody reads that.
    """
    loop = asyncio.get_running_loop()
    calling = loop.create_task(call, name="attended")
    watching = loop.create_task(_gone(request, body), name="presence")
    try:
        await asyncio.wait({calling, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not calling.done():
            raise Invalid("The connection ended before the answer.")
        return await calling
    finally:
        for task in (calling, watching):
            task.cancel()
        await asyncio.wait({calling, watching})


async def _gone(request: Request, body: Pieces) -> None:
    # Until then, whoever reads the body is told.
    await body.over.wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _watch(request: Request, gone: Callable[[], Awaitable[None]]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    await asyncio.shield(gone())
