"""A real PostgreSQL for tests: one throw-away cluster per process, one database per test.

No fixtures here, so that each suite decides how long its own live:

    async with cluster() as postgres:
        template = await postgres.create("template")        # migrate it once
        url = await postgres.create(template="template")    # then clone it for each test
"""

import asyncio
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGKILL

import asyncpg

from openinteractions.db import embedded_server
from openinteractions.db.embedded import EmbeddedPostgres

PREFIX = "oi-test-"
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
_STALE_AFTER_S = 600


class Cluster:
    """A running PostgreSQL without safety: what it writes is worth nothing after a crash."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self.server = server

    def url(self, name: str) -> str:
        return self.server.url.replace("/openinteractions?", f"/{name}?")

    async def create(self, name: str | None = None, *, template: str = "template0") -> str:
        """Create a database, by default under a fresh name, and return its URL.

        Nothing may be connected to the template meanwhile.
        """
        name = name or f"test_{uuid.uuid4().hex}"
        await self.execute(f'create database "{name}" template "{template}" strategy file_copy')
        return self.url(name)

    async def drop(self, url: str) -> None:
        name = url.split("@/")[1].split("?", maxsplit=1)[0]
        await self.execute(f'drop database if exists "{name}" with (force)')

    async def execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url("postgres"))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@asynccontextmanager
async def cluster() -> AsyncGenerator[Cluster]:
    """Start a cluster in a folder of its own; it is gone afterwards."""
    await asyncio.to_thread(_sweep)
    with scratch() as home:
        async with EmbeddedPostgres(home, settings=FAST, system_folder=home / "system") as server:
            yield Cluster(server)


class scratch:  # noqa: N801 - reads as a function
    """A short folder that `nobody` can enter too; pytest's own is neither."""

    def __enter__(self) -> Path:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
        self.path.chmod(0o711 if os.geteuid() == 0 else 0o700)
        return self.path

    def __exit__(self, *_: object) -> None:
        end(self.path / "postgres/data")
        shutil.rmtree(self.path, ignore_errors=True)


def end(data: Path) -> None:
    """Kill whatever still runs on this cluster."""
    while embedded_server.stragglers(data):
        embedded_server.end(data, SIGKILL)
        time.sleep(0.01)


def _sweep() -> None:
    """Remove what killed test sessions left behind: nobody holds the lock of those any more."""
    for home in Path("/tmp").glob(f"{PREFIX}*"):
        lock = home / "postgres.lock"
        try:
            if home.stat().st_uid != os.geteuid() or _age_s(lock) < _STALE_AFTER_S:
                continue
            with lock.open() as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end(home / "postgres/data")
                shutil.rmtree(home, ignore_errors=True)
        except OSError:
            continue


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime
