"""A broker in a process of its own, on a real engine and a real database, and its client."""

import asyncio
import base64
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from openinteractions import ids
from openinteractions.crypto import Sealer, broker_token
from openinteractions.db.engine import LOST, Database
from openinteractions.db.sealed import environment_purpose
from openinteractions.resources.environments import store
from openinteractions.resources.environments.schemas import Configuration
from openinteractions.resources.environments.store import NewEnvironment
from openinteractions.resources.keys.store import ensure_project
from openinteractions.sandbox import mounts
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.pipe import Omitted
from openinteractions.sandbox.port import Command, Exit, Output
from tests.sandbox.engine import SLIM, DockerEngine, docker

READY_S = 60


@dataclass
class Ran:
    """What an execution gave."""

    out: bytes = b""
    err: bytes = b""
    exit: Exit | None = None
    omitted: int = 0

    def add(self, piece: Output | Exit) -> None:
        if isinstance(piece, Exit):
            self.exit = piece
        elif isinstance(piece, Omitted):
            self.omitted += piece.byte_count
        elif piece.stream == 1:
            self.out += piece.data
        else:
            self.err += piece.data


@dataclass
class Stage:
    """Everything that a test of the broker needs."""

    engine: DockerEngine
    database: Database
    url: str
    home: Path
    name: str
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    project_id: UUID = field(default_factory=ids.uuid7)

    def __post_init__(self) -> None:
        self.client = BrokerClient(broker_token(self.key), patience_s=20)
        self.sealer = Sealer(self.key)
        self.address = f"unix://{self.home}/sandboxes/broker.sock"

    @property
    def log_path(self) -> Path:
        return self.home / "broker.log"

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [each for each in found if name is None or each["event"] == name]

    def spawn(self, **settings: str) -> subprocess.Popen[bytes]:
        """Start a broker, without waiting for it."""
        environment = {
            "OI_DATABASE_URL": self.url,
            "OI_MASTER_KEY": base64.b64encode(self.key).decode(),
            "OI_LOG__FORMAT": "json",
            "OI_LOG__LEVEL": "debug",
            "OI_SANDBOX__BROKER": self.name,
            "OI_SANDBOX__IMAGE": SLIM,
            "OI_SANDBOX__WARM": "0",
            "OI_SANDBOX__DISK_BYTES": str(64 * 2**20),
            "OI_SANDBOX__MEMORY_BYTES": str(512 * 2**20),
            "OI_SANDBOX__TMP_BYTES": str(64 * 2**20),
            **self.settings,
            **settings,
        }
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "openinteractions.cli.tethered"),
                    *("broker", "--data-dir", str(self.home)),
                ],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def start(self, **settings: str) -> None:
        """Start the broker, and wait until it is ready."""
        before = len(self.events("broker.ready")) if self.log_path.exists() else 0
        self.process = self.spawn(**settings)
        deadline = time.monotonic() + READY_S
        while len(self.events("broker.ready")) == before:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(self.log_path.read_text(errors="replace")[-3000:])
            await asyncio.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    async def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, 20)

    async def environment(self, *, network: Any = None, env: Any = None) -> UUID:
        """A row, with this broker."""
        key = ids.uuid7()
        wanted = Configuration(network=network, env=env or {})
        new = NewEnvironment(
            id=key,
            project_id=self.project_id,
            public=wanted.public(),
            sealed=self.seal(key, wanted),
            broker=self.name,
        )
        await store.create(self.database, new, ttl=timedelta(days=1))
        return key

    def seal(self, key: UUID, wanted: Configuration) -> bytes:
        return self.sealer.seal(wanted.secret(), purpose=environment_purpose(self.project_id, key))

    def command(self, *argv: str, **fields: Any) -> Command:
        fields.setdefault("id", f"{ids.uuid7().hex}.1")
        fields.setdefault("epoch", 1)
        return Command(argv=argv, **fields)

    def shell(self, script: str, **fields: Any) -> Command:
        return self.command("sh", "-c", script, **fields)

    async def run(self, env: UUID, command: Command, *, offset: int = 0) -> Ran:
        """Run a command to its end."""
        ran = Ran()
        async with self.client.execute(self.address, env, command, offset=offset) as pieces:
            async for piece in pieces:
                ran.add(piece)
        return ran

    async def sh(self, env: UUID, script: str) -> str:
        """What a shell says; it must end well."""
        ran = await self.run(env, self.shell(script))
        assert ran.exit is not None
        assert ran.exit.code == 0, (ran, self.log_path.read_text(errors="replace")[-3000:])
        return ran.out.decode()

    def container(self, env: UUID) -> str | None:
        """The running container of an environment, cold-started."""
        found = self.engine.containers(f"openinteractions.environment={env.hex}")
        return found[0] if found else None

    async def fetch(self, statement: str, *arguments: object) -> list[Any]:
        for _ in range(20):
            with contextlib.suppress(*LOST):
                async with self.database.hot() as connection:
                    return await connection.fetch(statement, *arguments)
        raise AssertionError("the database does not come back")


@asynccontextmanager
async def staged(
    engine: DockerEngine, database: Database, url: str, home: Path, **settings: str
) -> AsyncGenerator[Stage]:
    """A stage whose broker is not started; nothing is left of it."""
    stage = Stage(engine, database, url, home, engine.broker_name(secrets.token_hex(4)))
    stage.settings = settings
    stage.project_id = await ensure_project(database, "default")
    try:
        yield stage
    finally:
        await stage.client.close()
        if stage.process is not None and stage.process.poll() is None:
            stage.kill()
        for container in engine.containers(f"openinteractions.broker={stage.name}"):
            docker("rm", "--force", "--volumes", container, check=False)
        await asyncio.to_thread(_clear, home)


def _clear(home: Path) -> None:
    if os.geteuid() == 0:
        for _ in range(3):
            mounts.unmount_all(home)
    with contextlib.suppress(OSError):
        shutil.rmtree(home, ignore_errors=True)
