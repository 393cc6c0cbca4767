"""Reading pages beside the event loop, in processes that can be killed.

A thread would not do: what a page's author makes slow holds the interpreter's lock or never ends,
and a crash of a parser in C would be the server's. Starting a process for each page costs a third
of a second, so a few of them stay, each with one job at a time; one that takes too long or dies is
replaced. They start when they are needed, and end by themselves.
"""

import asyncio
import atexit
import functools
import os
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import orjson

from openinteractions.tools.port import Page
from openinteractions.tools.web.extract import Extract

DEADLINE_S: Final = 20.0
"""Longest that one page is read."""

PROCESSES: Final = min(4, max(2, os.cpu_count() or 2))
"""Pages that are read at once."""

_MAX_ANSWER: Final = 64 * 2**20
_TOO_SLOW: Final = Extract(
    message=f"Reading it took longer than {DEADLINE_S:g} seconds.", is_readable=False
)
_DIED: Final = Extract(message="Reading it failed: it may be malformed.", is_readable=False)
_NO_PROCESS: Final = Extract(
    message="This server has no room to read it now: try again later.", is_readable=False
)


class Extractor:
    """Turns pages into text."""

    def __init__(self, *, processes: int = PROCESSES, deadline_s: float = DEADLINE_S) -> None:
        """Nothing is started.

        Args:
            processes: How many pages are read at once.
            deadline_s: How long one may take.
        """
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="pages")
        self._mine = threading.local()
        self._all: set[_Child] = set()
        self._deadline_s = deadline_s

    async def extract(self, page: Page) -> Extract:
        """The text of a page; one that cannot be read is told in its message.

        Who is cancelled keeps no process from others.
        """
        loop = asyncio.get_running_loop()
        job = _Job(page)
        try:
            return await loop.run_in_executor(self._threads, self._extract, job)
        except asyncio.CancelledError:
            job.cancel()
            raise

    def close(self) -> None:
        """End the processes, and what they are at."""
        for child in tuple(self._all):
            child.end()
        self._threads.shutdown(cancel_futures=True)

    def _extract(self, job: "_Job") -> Extract:
        child: _Child | None = getattr(self._mine, "child", None)
        if child is None or not child.is_alive:
            self._drop(child)
            try:
                child = _Child()
            except OSError:
                return _NO_PROCESS
            self._mine.child = child
            self._all.add(child)
        found = job.run(child, self._deadline_s)
        if not child.is_alive:
            self._drop(child)
        return found

    def _drop(self, child: "_Child | None") -> None:
        self._mine.child = None
        if child is not None:
            child.end()
            self._all.discard(child)


class _Job:
    """One page, which may be given up by another thread than that which reads it."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._is_cancelled = False

    def run(self, child: "_Child", deadline_s: float) -> Extract:
        with self._lock:
            if self._is_cancelled:
                return _DIED
            self._child = child
        try:
            return child.extract(self._page, deadline_s)
        finally:
            # From here on it may be at another page.
            with self._lock:
                self._child = None

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            if self._child is not None:
                self._child.kill()


class _Child:
    """One process, used by one thread."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "openinteractions.tools.web.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def extract(self, page: Page, deadline_s: float) -> Extract:
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(deadline_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            answer = self._ask(page)
        finally:
            timer.cancel()
        if answer is not None:
            return Extract(**orjson.loads(answer))
        self._process.kill()
        self._process.wait()
        return _TOO_SLOW if is_late.is_set() else _DIED

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Kill it; this may be called more than once, and by another thread."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:  # What was still to be written.
                continue

    def _ask(self, page: Page) -> bytes | None:
        """Hand over a page and wait for the answer; None if the process dies of it."""
        sink, source = self._process.stdin, self._process.stdout
        assert sink is not None
        assert source is not None
        job = orjson.dumps({"mime_type": page.mime_type, "charset": page.charset, "url": page.url})
        try:
            sink.write(struct.pack(">II", len(job), len(page.data)) + job)
            sink.write(page.data)
            sink.flush()
            length = source.read(4)
            if len(length) < 4:  # noqa: PLR2004 - the pipe has ended
                return None
            size: int = struct.unpack(">I", length)[0]
            answer = source.read(size) if size <= _MAX_ANSWER else b""
        except (OSError, ValueError):
            return None
        return answer if len(answer) == size else None


@functools.cache
def shared() -> Extractor:
    """The one of this process; it ends with it."""
    extractor = Extractor()
    atexit.register(extractor.close)
    return extractor
