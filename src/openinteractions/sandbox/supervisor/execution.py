"""One command: its process, its output, its result."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import pty
import signal
import struct
import termios
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from openinteractions.sandbox.supervisor import processes
from openinteractions.sandbox.supervisor.spool import STDERR, STDOUT, Spool

_READ = 65536
_DRAIN_READS = 32
_GRACE_S = 0.15
"""How long output may still come after a command's own process has ended."""
_STUBBORN_S = 10.0
_MAX_LINGERING = 64
_MIN_OUTPUT, _MAX_OUTPUT = 4096, 64 << 20
_NOT_FOUND, _NOT_RUNNABLE = 127, 126
_END_OF_INPUT = b"\x04"


class Refusal(Exception):
    """What was asked for cannot be done; `code` is for programs, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Order:
    """A command as the host asked for it."""

    id: str
    argv: list[str]
    cwd: str = "/workspace"
    env: dict[str, str] = field(default_factory=dict)  # pyright: ignore[reportUnknownVariableType] - 3.9 cannot say it
    epoch: int = 0
    has_stdin: bool = False
    pty: tuple[int, int] | None = None
    timeout_s: float | None = None
    max_output_bytes: int = 1 << 20
    session: str | None = None


class Bell:
    """Wakes all who wait for something to change."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        """Return at the next `ring`."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    def ring(self) -> None:
        """Something has changed."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)


class Lingering:
    """Output pipes of ended commands that background processes still hold: read, and thrown away.

    Closing them would end a server that was left running at its next line of output.
    """

    def __init__(self) -> None:
        self._fds: dict[int, None] = {}

    def adopt(self, fd: int) -> None:
        """Read it from now on; the oldest one is closed when there are too many."""
        while len(self._fds) >= _MAX_LINGERING:
            self._close(next(iter(self._fds)))
        self._fds[fd] = None
        asyncio.get_running_loop().add_reader(fd, self._discard, fd)

    def _discard(self, fd: int) -> None:
        try:
            if not os.read(fd, _READ):
                self._close(fd)
        except BlockingIOError:
            pass
        except OSError:
            self._close(fd)

    def _close(self, fd: int) -> None:
        del self._fds[fd]
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)


class Execution:
    """What all kinds of commands share: output that can be followed, and a result."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.spool = Spool(min(max(order.max_output_bytes, _MIN_OUTPUT), _MAX_OUTPUT))
        self.changed = Bell()
        self.result: dict[str, Any] | None = None
        self.started_at = time.monotonic()
        self.timed_out = self.was_killed = False
        self._memory_kills = processes.memory_kills()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def write(self, stream: int, written: bytes) -> None:
        """Take output."""
        self.spool.append(stream, written)
        self.changed.ring()

    async def write_stdin(self, data: bytes) -> None:
        """Hand input to the command; waits while it does not read."""
        raise Refusal("ended", f"it takes no input, {len(data)} bytes are not wanted")

    async def end_stdin(self) -> None:
        """Tell the command that no more input comes."""

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""

    def resize(self, rows: int, cols: int) -> None:
        """Tell the command that its terminal has another size."""

    async def kill(self) -> None:
        """Kill it and everything it started."""
        raise NotImplementedError

    def _limit_time(self) -> None:
        if self.order.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.order.timeout_s, self._time_out)

    def _time_out(self) -> None:
        if self.result is None:
            self.timed_out = True
            self._spawn(self.kill())

    def _finish(self, status: int, **more: object) -> None:
        """Fix the result; `status` as from `waitpid`."""
        if self.result is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        by_signal = os.WIFSIGNALED(status)
        self.result = {
            "outcome": "killed" if self.was_killed or self.timed_out else "exited",
            "code": None if by_signal else os.WEXITSTATUS(status),
            "signal": os.WTERMSIG(status) if by_signal else None,
            "timed_out": self.timed_out,
            "out_of_memory": processes.memory_kills() > self._memory_kills,
            "truncated": self.spool.is_truncated,
            "wall_s": round(time.monotonic() - self.started_at, 6),
            "output_bytes": self.spool.end,
            **more,
        }
        self.changed.ring()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Command(Execution):
    """A process of its own."""

    def __init__(
        self,
        order: Order,
        nursery: processes.Nursery,
        lingering: Lingering,
        base_env: dict[str, str],
    ) -> None:
        super().__init__(order)
        self._nursery = nursery
        self._lingering = lingering
        self._base_env = base_env
        self._marker = nursery.marker()
        self._pid: int | None = None
        self._outputs: dict[int, int] = {}
        self._stdin: int | None = None
        self._terminal: int | None = None
        self._input_turn = asyncio.Lock()
        self._ended: asyncio.Future[tuple[int, float, int]] | None = None
        self._killing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the process. What cannot be started ends as a shell would say it: 127 or 126."""
        self._ended = asyncio.get_running_loop().create_future()
        given: list[int] = []
        try:
            files = self._open_files(given)
            self._pid = self._start(files)
        except (OSError, ValueError) as error:
            self._close_files()
            self._fail(error)
            return
        finally:
            for fd in set(given):
                os.close(fd)
        for fd in self._outputs:
            os.set_blocking(fd, False)
            asyncio.get_running_loop().add_reader(fd, self._read, fd)
        self._limit_time()
        self._spawn(self._supervise())

    def _start(self, files: tuple[int, int, int]) -> int:
        order = self.order
        env = {**self._base_env, **order.env}
        if order.pty:
            env.setdefault("TERM", "xterm-256color")
        plan = processes.Plan(order.argv, order.cwd, env, files, order.pty is not None)
        return self._nursery.start(plan, self._marker, self._on_end)

    def _open_files(self, given: list[int]) -> tuple[int, int, int]:
        """Open what the process gets (into `given`, to be closed here after the start)."""
        if self.order.pty is not None:
            self._terminal, inner = pty.openpty()
            given.append(inner)
            self._outputs[self._terminal] = STDOUT
            self.resize(*self.order.pty)
            return inner, inner, inner
        if self.order.has_stdin:
            stdin, self._stdin = os.pipe()
            os.set_blocking(self._stdin, False)
        else:
            stdin = os.open(os.devnull, os.O_RDONLY)
        given.append(stdin)
        for stream in (STDOUT, STDERR):
            ours, inner = os.pipe()
            self._outputs[ours] = stream
            given.append(inner)
        return given[0], given[1], given[2]

    def _close_files(self) -> None:
        for fd in self._outputs:
            os.close(fd)
        self._outputs.clear()
        self._terminal = None
        self._close_stdin()

    def _fail(self, error: OSError | ValueError) -> None:
        name = self.order.argv[0] if self.order.argv else ""
        reason: str = str(error)
        if isinstance(error, OSError):
            reason = error.strerror or reason
            if error.filename == self.order.cwd and error.filename != name:
                name = self.order.cwd
        is_absent = isinstance(error, FileNotFoundError)
        self.write(STDERR, f"{name}: {reason}\n".encode("utf-8", "replace"))
        self._finish((_NOT_FOUND if is_absent else _NOT_RUNNABLE) << 8)

    async def write_stdin(self, data: bytes) -> None:
        """Hand input to its pipe or terminal; waits while it does not read."""
        view = memoryview(data)
        async with self._input_turn:
            while view.nbytes:
                fd = self._stdin if self._terminal is None else self._terminal
                if fd is None or self.result is not None:
                    raise Refusal("ended", "it takes no input any more")
                try:
                    view = view[os.write(fd, view) :]
                except BlockingIOError:
                    await self._until_writable(fd)
                except OSError:
                    self._close_stdin()

    async def end_stdin(self) -> None:
        """Close its standard input, or press Ctrl-D."""
        if self._terminal is not None:
            await self.write_stdin(_END_OF_INPUT)
            return
        async with self._input_turn:
            self._close_stdin()

    async def _until_writable(self, fd: int) -> None:
        """Wait for room in the pipe, or for the command's end."""
        loop, writable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_writer(fd, writable.set)
        assert self._ended is not None
        waits: set[asyncio.Future[Any]] = {asyncio.ensure_future(writable.wait())}
        try:
            await asyncio.wait({*waits, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_writer(fd)
            for wait in waits:
                wait.cancel()
        if self._ended.done():
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin is not None:
            asyncio.get_running_loop().remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = None

    def signal(self, number: int) -> None:
        """Send a signal to its process group, while its own process lives."""
        if self._pid is not None and self._ended is not None and not self._ended.done():
            processes.signal_group(self._pid, number)

    def resize(self, rows: int, cols: int) -> None:
        """Tell its terminal's programs about the new size."""
        if self._terminal is not None:
            size = struct.pack("HHHH", rows, cols, 0, 0)
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    async def kill(self) -> None:
        """Kill it and everything it started, in the background too; return when that is done."""
        self.was_killed = self.was_killed or self.result is None
        if self._killing is None:
            self._killing = self._spawn(self._kill())
            self._killing.add_done_callback(lambda _: setattr(self, "_killing", None))
        await asyncio.shield(self._killing)

    async def _kill(self) -> None:
        is_running = self._ended is not None and not self._ended.done()
        await processes.kill_tree(self._marker, self._pid if is_running else None)
        if self._ended is not None and not self._ended.done():
            await asyncio.wait({self._ended}, timeout=_STUBBORN_S)
            if not self._ended.done():
                self._ended.set_result((signal.SIGKILL, 0.0, 0))

    def _on_end(self, status: int, usage: Any) -> None:  # noqa: ANN401 - struct_rusage
        if self._ended is not None and not self._ended.done():
            cpu_s = usage.ru_utime + usage.ru_stime
            self._ended.set_result((status, cpu_s, usage.ru_maxrss * 1024))

    async def _supervise(self) -> None:
        assert self._ended is not None
        status, cpu_s, max_rss_bytes = await self._ended
        try:
            await self._take_the_rest()
        finally:
            self._finish(status, cpu_s=round(cpu_s, 6), max_rss_bytes=max_rss_bytes)

    async def _take_the_rest(self) -> None:
        if self._killing is not None:
            await asyncio.wait({self._killing})
        for fd in list(self._outputs):
            for _ in range(_DRAIN_READS):
                if not self._read(fd):
                    break
        deadline = time.monotonic() + _GRACE_S
        while self._outputs and (left := deadline - time.monotonic()) > 0:
            await _ring_or_timeout(self.changed, left)
        self._let_go()

    def _let_go(self) -> None:
        loop = asyncio.get_running_loop()
        for fd in self._outputs:
            loop.remove_reader(fd)
            self._lingering.adopt(fd)
        if self._terminal is not None and self._terminal not in self._outputs:
            os.close(self._terminal)
        self._outputs.clear()
        self._terminal = None
        self._close_stdin()

    def _read(self, fd: int) -> bool:
        """Take what is there; False when nothing was."""
        if fd not in self._outputs:
            return False
        try:
            written = os.read(fd, _READ)
        except BlockingIOError:
            return False
        except OSError as error:
            # A terminal's other side is closed.
            if error.errno != errno.EIO:
                raise
            written = b""
        if written:
            self.write(self._outputs[fd], written)
            return True
        asyncio.get_running_loop().remove_reader(fd)
        del self._outputs[fd]
        if fd != self._terminal:
            # A terminal stays open until the command has ended: closing it hangs up on those
            # that have closed their side and are about to exit.
            os.close(fd)
        self.changed.ring()
        return False


async def _ring_or_timeout(bell: Bell, timeout_s: float) -> None:
    wait = asyncio.ensure_future(bell.wait())
    await asyncio.wait({wait}, timeout=timeout_s)
    wait.cancel()
