"""A server in parts, each of which a test may kill: api and database, a broker, two workers."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from openinteractions import ids
from openinteractions.db import embedded_home, embedded_server
from openinteractions.db.embedded import running_url
from tests.e2e.own import _COMMAND, Own, own_server
from tests.e2e.sandboxed import remove_sandboxes
from tests.e2e.server import Fakes
from tests.fakes.upstream import Received, Reply
from tests.sandbox.engine import SLIM, DockerEngine

WORKERS = 2
_START_S = 90.0
DEAD_AFTER_S = 2.0


@dataclass(eq=False)
class Fleet:
    """The parts, as they run."""

    own: Own
    url: str
    """Of the database."""
    broker: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_broker(self) -> None:
        self.broker = self._spawn("broker", "--data-dir", str(self.own.home / "data"))

    def start_worker(self) -> None:
        self.workers.append(self._spawn("worker"))

    def ready(self, workers: int = 1) -> None:
        """Wait until there are sandboxes, and so many workers; the others come meanwhile."""
        assert self.broker is not None
        pid = self.broker.pid
        assert [p.args for p in (self.broker, *self.workers) if p.poll() is not None] == []
        up = "select from brokers where problem is null and pid = $1"
        listed = "select from workers where role = 'worker' and pid = any($1::int[])"
        pids = [worker.pid for worker in self.workers]
        try:
            until(lambda: self.own.fetch(up, pid), within_s=_START_S)
            until(lambda: len(self.own.fetch(listed, pids)) >= workers, within_s=_START_S)
        except AssertionError:
            log = (self.own.home / "server.log").read_text()
            raise AssertionError(f"it did not start:\n{log[-5000:]}") from None

    def owner(self, interaction: str) -> subprocess.Popen[bytes]:
        """The worker that runs an interaction."""
        found = until(
            lambda: self.own.fetch(
                "select w.pid from jobs j join workers w on w.id = j.worker_id where j.id = $1",
                ids.parse_interaction_id(interaction),
            )
        )
        return next(worker for worker in self.workers if worker.pid == found[0][0])

    def kill_owner(self, interaction: str) -> None:
        """Kill the worker that runs an interaction; another one takes its place."""
        self.kill_worker(self.owner(interaction))

    def kill_worker(self, worker: subprocess.Popen[bytes]) -> None:
        worker.kill()
        worker.wait()
        self.workers.remove(worker)
        self.start_worker()

    def kill_broker(self) -> None:
        """Kill it, and start the next one, as `serve` does."""
        assert self.broker is not None
        self.broker.kill()
        self.broker.wait()
        self.start_broker()

    def signal_broker(self, number: signal.Signals) -> None:
        assert self.broker is not None
        self.broker.send_signal(number)

    def kill_database(self) -> None:
        """Kill PostgreSQL; the api's supervisor starts it again."""
        place = embedded_home.where((self.own.home / "data").absolute()) / "data"
        server = embedded_server.find(place)
        assert server is not None
        os.kill(server.pid, signal.SIGKILL)

    def epoch(self, interaction: str) -> int:
        """How many owners a run has had; 0 if it has ended."""
        rows = self.own.fetch(
            "select epoch from jobs where id = $1", ids.parse_interaction_id(interaction)
        )
        return rows[0][0] if rows else 0

    def stop(self) -> None:
        """End the workers, then the broker; each by itself."""
        for process in (*self.workers, self.broker):
            if process is not None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in (*self.workers, self.broker):
            if process is not None:
                try:
                    process.wait(timeout=40)
                finally:
                    process.kill()

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        home = self.own.home
        with (home / "server.log").open("ab") as log:
            return subprocess.Popen(
                [_COMMAND, *command, "--config", str(home / "config.toml")],
                stdout=log,
                stderr=log,
                cwd=home,
                env={**self.own.environment, "OI_DATABASE_URL": self.url},
            )


@contextmanager
def fleet(fakes: Fakes, engine: DockerEngine, *, name: str, **variables: str) -> Generator[Fleet]:
    """A fleet that runs; its sandboxes are gone when the context ends."""
    broker = engine.broker_name(name)
    settings = {
        "OI_WORKER__HEARTBEAT": "0.5",
        "OI_WORKER__DEAD_AFTER": str(DEAD_AFTER_S),
        "OI_SANDBOX__ENABLED": "on",
        "OI_SANDBOX__BROKER": broker,
        "OI_SANDBOX__IMAGE": SLIM,
        "OI_SANDBOX__MEMORY_BYTES": str(2**29),
        "OI_SANDBOX__TMP_BYTES": str(2**26),
    }
    try:
        with own_server(fakes, "--no-worker", **settings, **variables) as own:
            url = running_url(own.home / "data")
            assert url is not None
            # A command finds the data by its settings, where it has no option for it.
            own.environment["OI_DATA_DIR"] = str(own.home / "data")
            running = Fleet(own, url)
            try:
                running.start_broker()
                for _ in range(WORKERS):
                    running.start_worker()
                running.ready(WORKERS)
                yield running
            finally:
                running.stop()
    finally:
        remove_sandboxes(engine, broker)


class Gate:
    """Stops a run at each of its commits, by a lock on its row, until it is let through.

    What is stopped so can be killed at an instant that is known: the statement has been sent, and
    takes effect when the gate opens, whoever waits for its answer; or never, if its connection is
    ended first.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._turn = asyncio.Lock()
        """The test's thread and the model's both ask."""
        self._look: Any = self._do(asyncpg.connect(url))
        self._locks: list[Any] = [self._do(asyncpg.connect(url)) for _ in range(2)]
        """The first holds the row while the gate is closed."""
        self._row: Any = None
        self._is_closed = False

    def before(self, reply: Reply) -> Callable[[Received], Reply]:
        """A model's reply, just before which the gate is closed for the newest run."""

        def close_and_say(_: Received) -> Reply:
            self._do(self._close())
            return reply

        return close_and_say

    def wait(self) -> int:
        """Wait until the run is at the gate; gives the backend that is held up."""
        return until(lambda: self._do(self._waiting()))

    def step(self, commits: int = 1) -> None:
        """Let so many commits through, and wait for the next one."""
        for _ in range(commits):
            self.wait()
            self._do(self._again())
        self.wait()

    def let_through(self) -> None:
        """Let one commit through; the next one, whenever it comes, is stopped again."""
        self.wait()
        self._do(self._again())

    def open(self) -> None:
        """Let everything through."""
        if self._is_closed:
            self._is_closed = False
            self._do(self._locks[0].execute("commit"))

    def drop(self) -> None:
        """End the connection that waits: its statement has no effect."""
        waiting = self.wait()
        self._do(self._look.execute("select pg_terminate_backend($1)", waiting))
        until(lambda: self._do(self._waiting()) is None)

    @contextmanager
    def no_beats(self) -> Generator[None]:
        """Meanwhile no worker can say that it lives, or finds out that it counts as dead."""
        self._do(self._locks[0].execute("begin; lock table workers in exclusive mode"))
        try:
            yield
        finally:
            self._do(self._locks[0].execute("commit"))

    def end(self) -> None:
        for connection in (*self._locks, self._look):
            self._do(connection.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _close(self) -> None:
        self._row = await self._look.fetchval("select max(id::text)::uuid from interactions")
        await self._take(self._locks[0])
        self._is_closed = True

    async def _take(self, lock: Any) -> None:
        await lock.execute("begin")
        # Foreign keys may still point to the row.
        await lock.fetch("select from interactions where id = $1 for no key update", self._row)

    async def _again(self) -> None:
        """Let one through: the next lock stands in line right behind it."""
        held, following = self._locks
        taking = asyncio.ensure_future(self._take(following))
        while not await self._is_in_line(following):  # noqa: ASYNC110 - the database tells nobody
            await asyncio.sleep(0.01)
        await held.execute("commit")
        await taking
        self._locks.reverse()

    async def _is_in_line(self, lock: Any) -> bool:
        return await self._look.fetchval(
            "select cardinality(pg_blocking_pids($1)) > 0", lock.get_server_pid()
        )

    async def _waiting(self) -> int | None:
        return await self._look.fetchval(
            "select pid from pg_stat_activity where $1 = any(pg_blocking_pids(pid))",
            self._locks[0].get_server_pid(),
        )

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def alone() -> Any:
            async with self._turn:
                return await work

        return asyncio.run_coroutine_threadsafe(alone(), self._loop).result(timeout=30)


@contextmanager
def gate(running: Fleet) -> Generator[Gate]:
    made = Gate(running.url)
    try:
        yield made
    finally:
        made.end()


def until(probe: Callable[[], Any], *, within_s: float = 30.0) -> Any:
    """Ask until the answer is something; gives it."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = probe()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")
