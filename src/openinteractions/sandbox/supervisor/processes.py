"""Starting processes and ending whole trees of them.

Everything that belongs to a command carries two marks, which children inherit: a variable in the
environment, and a resource limit that nothing uses (CPU time of real-time processes). The second
also finds those who cleared their environment, left their session and lost their parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "OI_EXECUTION"
_LIMIT_BASE = 1 << 48
"""In microseconds: nine years. The limit of a command is this, its supervisor and its number."""
_NUMBERS = 1 << 24
_LIMIT_NAME = b"Max realtime timeout"
_ROUNDS = 200
_PAUSE_S = 0.02
_KILL_EVERY = 16
_EMPTY_ENOUGH = 5
_FREEZE_AFTER = 6
_may_freeze = os.getuid() != 0 and 1 in {os.getpid(), os.getppid()}
"""Only as the main process of a container: then all that could be stopped is the sandbox's."""
_SPAWN_ATTEMPTS = 40
_SPAWN_PAUSE_S = 0.005
_MORE_OOM_SCORE = 300
_MAX_OOM_SCORE = 1000
_OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
"""Of cgroup v2, and of v1."""


def memory_kills() -> int:
    """How many processes of this sandbox were killed for want of memory; 0 if nobody counts."""
    for path in _OOM_COUNTERS:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text("ascii").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0


class Marker:
    """What tells the processes of one command (without a number: of all) from others."""

    def __init__(self, number: int | None, owner: int | None = None) -> None:
        owner = owner or os.getpid()
        self.value = f"{owner}.{number}"
        self.limit = _LIMIT_BASE + owner * _NUMBERS + (number or 0) % _NUMBERS
        self._limits = range(self.limit, self.limit + (1 if number is not None else _NUMBERS))
        mark = f"{self.value}\0" if number is not None else f"{owner}."
        self._in_environ = f"\0{VARIABLE}={mark}".encode()

    def owns(self, pid: str) -> bool:
        """Whether a process carries the mark and is alive.

        Raises:
            OSError: It has just gone.
        """
        state = _read(f"/proc/{pid}/stat").rpartition(b") ")[2][:1]
        if state in b"ZX":
            return False
        if self._has_limit(pid):
            return True
        try:
            return self._in_environ in b"\0" + _read(f"/proc/{pid}/environ")
        except PermissionError:
            return False

    def _has_limit(self, pid: str) -> bool:
        for line in _read(f"/proc/{pid}/limits").splitlines():
            if line.startswith(_LIMIT_NAME):
                soft = line.split()[3]
                return soft.isdigit() and int(soft) in self._limits
        return False


@dataclass
class Plan:
    """A process to start."""

    argv: Sequence[str]
    cwd: str
    env: dict[str, str]
    files: tuple[int, int, int]
    is_terminal: bool = False
    pass_fds: Sequence[int] = ()


class Nursery:
    """Starts processes and tells when they end."""

    def __init__(self) -> None:
        self._ended: dict[int, Callable[[int, resource.struct_rusage], None]] = {}
        self._markers: dict[int, Marker] = {}
        self._count = 0
        self._oom: int | None = None
        self._oom_score = 0

    def open(self) -> None:
        """Begin to listen for the ends of children. Before this process hides itself."""
        with contextlib.suppress(OSError):
            self._oom = os.open("/proc/self/oom_score_adj", os.O_RDWR)
            self._oom_score = int(os.read(self._oom, 16))
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self.reap)

    def marker(self) -> Marker:
        """A mark for one command's processes."""
        self._count += 1
        return Marker(self._count)

    def start(
        self,
        plan: Plan,
        marker: Marker,
        on_end: Callable[[int, resource.struct_rusage], None],
    ) -> int:
        """Start a process as the leader of its own session; return its number.

        Raises:
            OSError: It cannot be started; the message says why.
            ValueError: An argument has a zero byte in it.
        """
        try:
            pid = self._spawn(plan, marker)
        except BlockingIOError:
            if not _may_freeze:
                raise
            pid = self._spawn_after_all(plan, marker)
        self._ended[pid] = on_end
        self._markers[pid] = marker
        return pid

    def _spawn(self, plan: Plan, marker: Marker) -> int:
        with self._marked(marker):
            process = subprocess.Popen(  # noqa: S603 - running commands is what this is for
                list(plan.argv),
                stdin=plan.files[0],
                stdout=plan.files[1],
                stderr=plan.files[2],
                cwd=plan.cwd,
                env={**plan.env, VARIABLE: marker.value},
                start_new_session=True,
                pass_fds=tuple(plan.pass_fds),
                # Only a terminal needs code between fork and exec.
                preexec_fn=_take_terminal if plan.is_terminal else None,  # noqa: PLW1509 - no threads
            )
        # Reaped here, with its use of the processor; Popen shall not wait for it.
        process.returncode = 0
        return process.pid

    def _spawn_after_all(self, plan: Plan, marker: Marker) -> int:
        """Start a process where there is no room for another.

        What commands that are over have left running dies for it: nothing else would end a bomb
        that has forked away from its command.
        """
        _kill_others(list(self._markers.values()))
        for _ in range(_SPAWN_ATTEMPTS):
            self.reap()
            with contextlib.suppress(BlockingIOError):
                return self._spawn(plan, marker)
            time.sleep(_SPAWN_PAUSE_S)
        return self._spawn(plan, marker)

    def reap(self) -> None:
        """Take in the children that have ended."""
        for pid in list(self._ended):
            try:
                found, status, usage = os.wait4(pid, os.WNOHANG)
            except ChildProcessError:
                found, status, usage = pid, 0, resource.getrusage(resource.RUSAGE_CHILDREN)
            if found:
                self._markers.pop(pid, None)
                self._ended.pop(pid)(status, usage)
        if os.getpid() == 1:
            self._reap_orphans()

    def _reap_orphans(self) -> None:
        """As the container's first process: also those whose parents have gone."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitid(os.P_ALL, 0, flags)) is not None:
                if found.si_pid in self._ended:
                    # Its turn comes with its own signal, which is under way.
                    asyncio.get_running_loop().call_soon(self.reap)
                    return
                os.waitpid(found.si_pid, os.WNOHANG)

    @contextlib.contextmanager
    def _marked(self, marker: Marker) -> Generator[None, None, None]:
        """What is started meanwhile inherits the mark, and is killed first when memory is short."""
        soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_RTTIME, (marker.limit, hard))
        self._set_oom_score(min(self._oom_score + _MORE_OOM_SCORE, _MAX_OOM_SCORE))
        try:
            yield
        finally:
            self._set_oom_score(self._oom_score)
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))

    def _set_oom_score(self, score: int) -> None:
        if self._oom is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._oom, str(score).encode(), 0)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


async def kill_tree(marker: Marker, leader: int | None) -> int:
    """Kill everything that carries the mark, until nothing is left; return how many are.

    What is stopped cannot fork any more, so all are stopped first. Those who fork faster than one
    can look are caught by stopping the whole sandbox for a moment.
    """
    if leader is not None:
        signal_group(leader, signal.SIGKILL)
    stopped: set[str] = set()
    empty = 0
    for turn in range(_ROUNDS):
        found, is_certain = _find(marker)
        empty = 0 if found else empty + 1
        if empty and (is_certain or empty >= _EMPTY_ENOUGH):
            return 0
        fresh = found - stopped
        if turn >= _FREEZE_AFTER and fresh and _may_freeze:
            _kill_frozen(marker)
        elif fresh and turn % _KILL_EVERY != _KILL_EVERY - 1:
            _signal(fresh, signal.SIGSTOP)
            stopped |= fresh
            await asyncio.sleep(0)
        else:
            _signal(found, signal.SIGKILL)
            await asyncio.sleep(_PAUSE_S if found else 0)
    return len(_find(marker)[0])


def _kill_frozen(marker: Marker) -> None:
    """Stop all processes at once, kill the marked ones, let the others go on. Never interrupted."""
    everything = ("-1",)
    _signal(everything, signal.SIGSTOP)
    try:
        _signal(_find(marker)[0], signal.SIGKILL)
    finally:
        _signal(everything, signal.SIGCONT)


def _kill_others(spared: Sequence[Marker]) -> None:
    """Kill every process of the sandbox but those of some commands. Never interrupted."""
    everything = ("-1",)
    _signal(everything, signal.SIGSTOP)
    try:
        _signal(_unmarked(spared), signal.SIGKILL)
    finally:
        _signal(everything, signal.SIGCONT)


def _unmarked(spared: Sequence[Marker]) -> set[str]:
    found: set[str] = set()
    for pid in os.listdir("/proc"):  # noqa: PTH208 - no other import for so little
        if pid.isdigit() and int(pid) not in {1, os.getpid()}:
            with contextlib.suppress(OSError):
                if not any(marker.owns(pid) for marker in spared):
                    found.add(pid)
    return found


def signal_group(leader: int, number: int) -> None:
    """Send a signal to a process and those of its group."""
    with contextlib.suppress(OSError):
        os.killpg(leader, number)


def _find(marker: Marker) -> tuple[set[str], bool]:
    """Who carries the mark; and whether nobody can have slipped through, being born meanwhile."""
    own = str(os.getpid())
    found: set[str] = set()
    is_certain = True
    for pid in os.listdir("/proc"):  # noqa: PTH208 - no other import for so little
        if pid.isdigit() and pid != own:
            try:
                if marker.owns(pid):
                    found.add(pid)
            except OSError:
                is_certain = False
    return found, is_certain


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 - as above
        return file.read()


def _signal(pids: Iterable[str], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(int(pid), number)
