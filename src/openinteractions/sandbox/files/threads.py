"""Blocking work on files, off the event loop, in threads of its own.

Its own threads: slow disks and huge folders must not hold up what else uses the loop's default
ones, such as the resolution of host names. And nobody has all of them: each project has a share,
and what takes long leaves some to what does not.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_THREADS: Final = 16
_SHARE: Final = 4
"""Threads that one project has at most."""
_MOST_LONG: Final = 12
"""Threads that long work has at most, of all projects."""
_SHARE_LONG: Final = 3

_Lane: TypeAlias = tuple[str, bool]
"""Whose work, and whether it is long."""

_owner: ContextVar[str] = ContextVar("owner", default="")


@contextmanager
def owned_by(owner: str) -> Generator[None]:
    """Work that is begun in this context is of the owner's share of the threads."""
    before = _owner.get()
    _owner.set(owner)
    try:
        yield
    finally:
        # Not by a token: a generator's end may come in another context than its beginning.
        _owner.set(before)


class Threads:
    """Threads that are shared: a lane waits in order, and lanes take turns."""

    def __init__(self) -> None:
        """They start when they are needed."""
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="files")
        self._lock = threading.Lock()
        self._waiting: dict[_Lane, deque[tuple[Future[Any], Callable[[], Any]]]] = {}
        self._running: Counter[str] = Counter()
        self._long: Counter[str] = Counter()

    def submit(self, work: Callable[[], _T], *, is_long: bool) -> Future[_T]:
        """Run it as soon as its owner's share allows it. It runs, also if nobody waits for it."""
        future: Future[_T] = Future()
        # From now on it cannot be cancelled.
        future.set_running_or_notify_cancel()
        with self._lock:
            lane = self._waiting.setdefault((_owner.get(), is_long), deque())
            lane.append((future, work))
            self._begin()
        return future

    def _begin(self) -> None:
        """Start what may start. The caller holds the lock."""
        while self._running.total() < _THREADS:
            lane = next(filter(self._may, self._waiting), None)
            if lane is None:
                return
            waiting = self._waiting.pop(lane)
            future, work = waiting.popleft()
            if waiting:
                # At the end: the others come first.
                self._waiting[lane] = waiting
            owner, is_long = lane
            self._running[owner] += 1
            self._long[owner] += is_long
            self._pool.submit(self._run, lane, future, work)

    def _may(self, lane: _Lane) -> bool:
        owner, is_long = lane
        if self._running[owner] >= _SHARE:
            return False
        return not is_long or (self._long[owner] < _SHARE_LONG and self._long.total() < _MOST_LONG)

    def _run(self, lane: _Lane, future: Future[Any], work: Callable[[], Any]) -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - whoever waits has it
            self._end(lane)
            future.set_exception(error)
        else:
            self._end(lane)
            future.set_result(result)

    def _end(self, lane: _Lane) -> None:
        owner, is_long = lane
        with self._lock:
            self._running[owner] -= 1
            self._long[owner] -= is_long
            for counter in (self._running, self._long):
                if not counter[owner]:
                    del counter[owner]
            self._begin()


_threads = Threads()


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
    return asyncio.wrap_future(_threads.submit(partial(work, *args, **kwargs), is_long=False))


async def in_thread(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run work in a thread; also if cancelled, return only when it has ended.

    Otherwise the caller would close a descriptor that the thread still uses, and whose number may
    then be another file's. What the work opens must be kept where the caller can find it.
    """
    return await settle(start(work, *args, **kwargs))


async def haltable(halt: Halt, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """`in_thread`, for long work that checks `halt`."""
    work_here = partial(work, *args, **kwargs)
    return await settle(asyncio.wrap_future(_threads.submit(work_here, is_long=True)), halt)


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
