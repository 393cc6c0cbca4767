"""Kept Python interpreters, and the cells that run in them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from openinteractions.sandbox.supervisor import processes
from openinteractions.sandbox.supervisor.execution import Bell, Execution, Order, Refusal
from openinteractions.sandbox.supervisor.spool import STDERR, STDOUT

_READ = 65536
_DRAIN_READS = 32
_MAX_SESSIONS = 16
_MAX_ANSWER = 65536
_MAX_NUMBER = 1 << 53
_HEAD = 4


class Session:
    """One interpreter process."""

    def __init__(self, nursery: processes.Nursery, source: str) -> None:
        self._nursery = nursery
        self._source = source
        self.marker = nursery.marker()
        self.pid = 0
        self.cell: Execution | None = None
        self.has_run = False
        self.status: int | None = None
        self.cpu_s = 0.0
        """Used by cells that have ended; by all that ever ran once the process has ended."""
        self._ended = Bell()
        self._outputs: dict[int, int] = {}
        self._channel: socket.socket | None = None

    def start(self, order: Order, base_env: dict[str, str]) -> None:
        """Start the interpreter.

        Raises:
            OSError: It cannot be started.
        """
        loop = asyncio.get_running_loop()
        self._channel, theirs = socket.socketpair()
        self._channel.setblocking(False)
        given = [os.open(os.devnull, os.O_RDONLY)]
        try:
            for stream in (STDOUT, STDERR):
                ours, inner = os.pipe()
                self._outputs[ours] = stream
                given.append(inner)
            plan = processes.Plan(
                argv=["python3", "-c", self._source, str(theirs.fileno())],
                cwd=order.cwd,
                env={**base_env, **order.env},
                files=(given[0], given[1], given[2]),
                pass_fds=[theirs.fileno()],
            )
            self.pid = self._nursery.start(plan, self.marker, self._on_end)
        except OSError:
            self._close()
            raise
        finally:
            theirs.close()
            for fd in given:
                os.close(fd)
        for fd in self._outputs:
            os.set_blocking(fd, False)
            loop.add_reader(fd, self._read, fd)

    async def run(self, cell: Execution) -> dict[str, Any] | None:
        """Run a cell; None when the interpreter ended before it answered."""
        self.cell = cell
        self.has_run = True
        request = {"code": cell.order.argv[0], "env": cell.order.env}
        asking = asyncio.ensure_future(self._ask(json.dumps(request).encode()))
        ending = asyncio.ensure_future(self._ended.wait())
        if self.status is None:
            await asyncio.wait({asking, ending}, return_when=asyncio.FIRST_COMPLETED)
        answer = asking.result() if asking.done() and not asking.cancelled() else None
        asking.cancel()
        ending.cancel()
        self._drain()
        self.cell = None
        return answer

    async def end(self) -> None:
        """Kill it and all it started."""
        await processes.kill_tree(self.marker, self.pid if self.status is None else None)
        for _ in range(500):
            if self.status is not None:
                break
            await asyncio.sleep(0.01)
        else:
            self._set_ended(signal.SIGKILL)

    async def _ask(self, request: bytes) -> dict[str, Any] | None:
        assert self._channel is not None
        loop = asyncio.get_running_loop()
        try:
            head = len(request).to_bytes(_HEAD, "big")
            await loop.sock_sendall(self._channel, head + request)
            size = int.from_bytes(await self._receive(_HEAD), "big")
            answer: Any = json.loads(await self._receive(min(size, _MAX_ANSWER)))
            return cast("dict[str, Any]", answer) if isinstance(answer, dict) else None
        except (OSError, ValueError, RecursionError):
            # A cell's code can write to this channel too: what comes may be anything.
            return None

    async def _receive(self, size: int) -> bytes:
        assert self._channel is not None
        whole = b""
        while len(whole) < size:
            piece = await asyncio.get_running_loop().sock_recv(self._channel, size - len(whole))
            if not piece:
                raise ConnectionResetError("the interpreter has closed its channel")
            whole += piece
        return whole

    def _drain(self) -> None:
        for fd in list(self._outputs):
            for _ in range(_DRAIN_READS):
                if not self._read(fd):
                    break

    def _read(self, fd: int) -> bool:
        if fd not in self._outputs:
            return False
        written = b""
        with contextlib.suppress(OSError):
            try:
                written = os.read(fd, _READ)
            except BlockingIOError:
                return False
        if not written:
            asyncio.get_running_loop().remove_reader(fd)
            del self._outputs[fd]
            os.close(fd)
            return False
        if self.cell is not None:
            self.cell.write(STDOUT if self._outputs[fd] == STDOUT else STDERR, written)
        return True

    def _on_end(self, status: int, usage: Any) -> None:  # noqa: ANN401 - struct_rusage
        self.cpu_s = max(usage.ru_utime + usage.ru_stime, self.cpu_s)
        self._set_ended(status)

    def _set_ended(self, status: int) -> None:
        if self.status is None:
            self._drain()
            self.status = status
            self._ended.ring()
            self._close()

    def _close(self) -> None:
        for fd in self._outputs:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        self._outputs.clear()
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class Sessions:
    """The interpreters by name; the one unused for longest makes room for a new one."""

    def __init__(self, nursery: processes.Nursery, source: str, base_env: dict[str, str]) -> None:
        self._nursery = nursery
        self._source = source
        self._base_env = base_env
        self._sessions: dict[str, Session] = {}
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}

    @property
    def count(self) -> int:
        """Interpreters that run."""
        return len(self._sessions)

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncGenerator[None, None]:
        """Cells of one name wait for each other."""
        lock, users = self._turns.get(name, (asyncio.Lock(), 0))
        self._turns[name] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._turns.pop(name)
            if users > 1:
                self._turns[name] = lock, users - 1

    async def of(self, order: Order) -> Session:
        """The interpreter of this name, started if need be.

        Raises:
            Refusal: All places are taken by interpreters that are at work.
            OSError: It cannot be started.
        """
        name = order.session or ""
        session = self._sessions.pop(name, None)
        if session is None or session.status is not None:
            await self._make_room()
            session = Session(self._nursery, self._source)
            session.start(order, self._base_env)
        self._sessions[name] = session
        return session

    async def end(self, name: str, session: Session) -> None:
        """Kill an interpreter; the next cell of this name starts a fresh one."""
        if self._sessions.get(name) is session:
            del self._sessions[name]
        await session.end()

    async def _make_room(self) -> None:
        if len(self._sessions) < _MAX_SESSIONS:
            return
        for name, session in self._sessions.items():
            if session.cell is None:
                await self.end(name, session)
                return
        raise Refusal("busy", f"{_MAX_SESSIONS} interpreters are at work already")


class Cell(Execution):
    """Code that runs in a kept interpreter. Cells of one interpreter run one after the other."""

    def __init__(self, order: Order, sessions: Sessions) -> None:
        super().__init__(order)
        self._sessions = sessions
        self._name = order.session or ""
        self._session: Session | None = None

    def start(self) -> None:
        """Run it when its turn comes."""
        self._spawn(self._run())

    async def _run(self) -> None:
        try:
            async with self._sessions.turn(self._name):
                await self._run_now()
        finally:
            # Whatever went wrong: whoever follows learns of an end.
            self._finish(signal.SIGKILL)

    async def _run_now(self) -> None:
        if self.was_killed:
            return
        try:
            self._session = await self._sessions.of(self.order)
        except (OSError, Refusal) as error:
            self.write(STDERR, f"python3: {error}\n".encode())
            self._finish(127 << 8)
            return
        await self._run_in(self._session)

    async def _run_in(self, session: Session) -> None:
        is_fresh, before_s = not session.has_run, session.cpu_s
        self.started_at = time.monotonic()
        self._limit_time()
        answer = await session.run(self)
        is_over = answer is None or bool(answer.get("is_over"))
        if is_over:
            await self._sessions.end(self._name, session)
        answer = answer or {"cpu_s": session.cpu_s - before_s}
        session.cpu_s = before_s + _number(answer.get("cpu_s"))
        code = answer.get("code")
        is_ended = not isinstance(code, int)
        status = session.status or 0 if is_ended else (code & 255) << 8
        self._finish(
            status,
            is_fresh_session=is_fresh,
            has_ended_session=is_over,
            cpu_s=_number(answer.get("cpu_s")),
            max_rss_bytes=int(_number(answer.get("max_rss_bytes"))),
        )

    def signal(self, number: int) -> None:
        """Send a signal to the interpreter's process group; an interrupt ends the session."""
        session = self._session
        if self.result is None and session is not None and session.status is None:
            processes.signal_group(session.pid, number)

    async def kill(self) -> None:
        """End the interpreter, or skip the cell if it has not begun."""
        if self.result is None:
            self.was_killed = True
            if self._session is not None:
                await self._sessions.end(self._name, self._session)


def _number(value: object) -> float:
    """What an interpreter says it used, if that can be."""
    if not isinstance(value, (int, float)) or not 0 <= value <= _MAX_NUMBER:
        return 0.0
    return round(float(value), 6)
