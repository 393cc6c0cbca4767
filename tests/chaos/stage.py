"""The processes under test: two apis and three workers on one PostgreSQL, each replaceable."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openinteractions.db import migrate
from openinteractions.db.embedded import EmbeddedPostgres
from openinteractions.db.engine import Database
from tests.db.postgres import scratch

KEY = "oi_chaos-key-0123456789-abcdefghijklmnopqrstuv"
SOURCES = Path(__file__).parents[2] / "src"
DEAD_AFTER_S = 2.0
_APIS, _WORKERS = 2, 3
_READY_S = 60
_STOP_S = 45


@dataclass(eq=False)
class Slot:
    """One process that is started again whenever it ends."""

    name: str
    command: list[str]
    port: int | None
    log: Path
    process: asyncio.subprocess.Process | None = None
    is_killed: bool = False
    is_stopped: bool = False
    starts: int = 0
    log_start: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether the process that runs now has said so."""
        mark = b"server.ready" if self.port else b"process.ready"
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return mark in file.read()

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def kill(self) -> None:
        """As `kill -9`."""
        self.is_killed = True
        self.send(signal.SIGKILL)


@dataclass(eq=False)
class Stage:
    """Everything that can be killed."""

    postgres: EmbeddedPostgres
    slots: list[Slot]
    url: str
    deaths: list[str] = field(default_factory=list[str])
    """Processes that were ready and ended though nobody killed them."""
    is_closing: bool = False

    @property
    def apis(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.port]

    @property
    def workers(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.port]

    def kill_postgres(self) -> None:
        """Kill the postmaster; the supervisor starts it again."""
        server = self.postgres._server
        assert server is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGKILL)

    async def all_ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while not all(slot.process and slot.is_ready for slot in self.slots):
            assert time.monotonic() < deadline, [(s.name, s.is_ready) for s in self.slots]
            await asyncio.sleep(0.1)

    async def keep(self, slot: Slot, environment: dict[str, str]) -> None:
        """Run one slot's process, again and again."""
        while not self.is_closing:
            slot.is_killed = False
            slot.starts += 1
            slot.log_start = slot.log.stat().st_size if slot.log.exists() else 0
            with slot.log.open("ab") as log:
                slot.process = await asyncio.create_subprocess_exec(
                    *slot.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=slot.log.parent,
                    env={**environment, "OI_PORT": str(slot.port or 0)},
                )
            try:
                code = await slot.process.wait()
            except asyncio.CancelledError:
                slot.send(signal.SIGKILL)
                raise
            if slot.is_killed or self.is_closing:
                continue
            if slot.is_ready:
                self.deaths.append(f"{slot.name} ended with {code}")
            # One that finds no database at its start gives up, and its supervisor tries again.
            await asyncio.sleep(0.5)

    async def close(self) -> list[str]:
        """Stop everything as an operator would; what did not end well."""
        self.is_closing = True
        for slot in self.slots:
            slot.send(signal.SIGCONT)
            slot.send(signal.SIGTERM)
        bad: list[str] = []
        for slot in self.slots:
            assert slot.process is not None
            try:
                async with asyncio.timeout(_STOP_S):
                    code = await slot.process.wait()
            except TimeoutError:
                slot.kill()
                bad.append(f"{slot.name} does not stop")
                continue
            if code != 0:
                bad.append(f"{slot.name} stopped with {code}")
        return bad

    def crashes(self) -> list[str]:
        """Lines of any log that tell of a bug."""
        found: list[str] = []
        for slot in self.slots:
            lines = slot.log.read_text(errors="replace").splitlines()
            found += [
                f"{slot.name}: {line[:2000]}"
                for line in lines
                if "crashed" in line or "Traceback" in line or '"level": "critical"' in line
            ]
        return found

    def copy_logs(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for slot in self.slots:
            (folder / slot.log.name).write_bytes(slot.log.read_bytes())

    def count(self, event: str) -> int:
        """How often any process has logged an event."""
        return sum(slot.log.read_text(errors="replace").count(event) for slot in self.slots)


@asynccontextmanager
async def opened(upstream_url: str, *, keep_logs: Path | None = None) -> AsyncGenerator[Stage]:
    """Start everything; the stage is gone afterwards."""
    with scratch() as home:
        # Not the unsafe settings of other tests: what is committed has to outlive `kill -9`.
        postgres = EmbeddedPostgres(
            home / "pg", settings={"fsync": "off"}, system_folder=home / "system"
        )
        async with postgres:
            database = Database(postgres.url, pool_size=1)
            await migrate.upgrade(database)
            await database.close()
            async with _running(home, postgres, upstream_url) as stage:
                try:
                    yield stage
                finally:
                    if keep_logs is not None:
                        stage.copy_logs(keep_logs)


@asynccontextmanager
async def _running(
    home: Path, postgres: EmbeddedPostgres, upstream_url: str
) -> AsyncGenerator[Stage]:
    program = str(Path(sys.executable).with_name("openinteractions"))
    slots = [
        Slot(f"api-{n}", [program, "serve", "--no-worker"], _free_port(), home / f"api-{n}.log")
        for n in range(_APIS)
    ]
    slots += [
        Slot(f"worker-{n}", [program, "worker"], None, home / f"worker-{n}.log")
        for n in range(_WORKERS)
    ]
    stage = Stage(postgres, slots, postgres.url)
    environment = _environment(home, postgres.url, upstream_url)
    async with asyncio.TaskGroup() as group:
        keepers = [group.create_task(stage.keep(slot, environment)) for slot in slots]
        try:
            await stage.all_ready()
            yield stage
        finally:
            stage.is_closing = True
            for keeper in keepers:
                keeper.cancel()


def _environment(home: Path, database_url: str, upstream_url: str) -> dict[str, str]:
    provider = {
        "kind": "openai",
        "base_url": upstream_url,
        "api_key": "none",
        "idle_timeout": "1s",
        "connect_timeout": "5s",
    }
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONPATH": str(SOURCES),
        "DATABASE_URL": database_url,
        "OI_DATA_DIR": str(home / "data"),
        "OI_BOOTSTRAP_API_KEY": KEY,
        "OI_PROVIDERS": json.dumps({"fake": provider}),
        "OI_DATABASE_POOL": "6",
        "OI_WORKER__HEARTBEAT": "0.5",
        "OI_WORKER__DEAD_AFTER": str(DEAD_AFTER_S),
        "OI_WORKER__MAX_ATTEMPTS": "50",
        "OI_MODELS__ATTEMPTS": "20",
        "OI_MODELS__MAX_RETRY_WAIT": "0.3",
        "OI_LOG__FORMAT": "json",
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
