"""Blocking work on files, off the event loop, in threads of its own.

Its own threads: slow disks and huge folders must not hold up what else uses the loop's default
ones, such as the resolution of host names.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="files")


class Halted(Exception):
    """Nobody waits for this piece of work any more."""


class Halt:
    """Asks work in a thread to end early."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def now(self) -> None:
        """Ask."""
        self._event.set()

    def check(self) -> None:
        """Called by the work, often.

        Raises:
            Halted: It should end.
        """
        if self._event.is_set():
            raise Halted


def start(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> asyncio.Future[_T]:
    """Begin work in a thread. The caller must `settle` it before closing what it uses."""
    return asyncio.get_running_loop().run_in_executor(_pool, partial(work, *args, **kwargs))


async def in_thread(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run work in a thread; also if cancelled, return only when it has ended.

    Otherwise the caller would close a descriptor that the thread still uses, and whose number may
    then be another file's. What the work opens must be kept where the caller can find it.
    """
    return await settle(start(work, *args, **kwargs))


async def haltable(halt: Halt, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """`in_thread`, for long work that checks `halt`."""
    return await settle(start(work, *args, **kwargs), halt)


async def settle(future: asyncio.Future[_T], halt: Halt | None = None) -> _T:
    """Wait for work in a thread to end, and only then let a cancellation through."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if halt is not None:
            halt.now()
        while not future.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()
        raise
