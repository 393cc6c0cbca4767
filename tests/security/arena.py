"""A broker for attacks, one for a whole module, with a neighbour; and what must stay well."""

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from openinteractions.db.engine import Database
from tests.broker.stage import Ran, Stage, staged
from tests.sandbox.engine import DockerEngine, docker

IS_ROOT = os.geteuid() == 0
PROGRAMS = Path(__file__).with_name("attacks")

MEMORY = 512 * 2**20
DISK = 64 * 2**20
PIDS = 128
QUICK_S = 5.0
"""A neighbour's command under attack; it takes milliseconds otherwise, and machines are busy."""

_BUSY_RSS = 400 * 2**20
_SPARE_MEMORY = 256 * 2**20
_SPARE_DISK = 256 * 2**20


@dataclass
class Arena:
    """A stage with an environment that nobody attacks from."""

    stage: Stage
    neighbour: UUID

    async def attack(self, env: UUID, program: str, *argv: str, **fields: Any) -> Ran:
        """Run a program of `attacks/` as a command."""
        fields.setdefault("timeout_s", 60)
        return await self.stage.run(env, self.stage.command(*self.argv(program, *argv), **fields))

    async def report(self, env: UUID, program: str, *argv: str, **fields: Any) -> Any:
        """What such a program prints as its last line, JSON."""
        ran = await self.attack(env, program, *argv, **fields)
        assert ran.exit is not None
        assert ran.exit.code == 0, ran
        return json.loads(ran.out.splitlines()[-1])

    def argv(self, program: str, *argv: str) -> tuple[str, ...]:
        source = (PROGRAMS / f"{program}.py").read_text(encoding="utf-8")
        return ("python3", "-c", source, *argv)

    async def healthy(self, *, within_s: float = QUICK_S) -> float:
        """Assert that host, broker and neighbour are well; how long the neighbour took."""
        stage = self.stage
        began = time.monotonic()
        async with asyncio.timeout(within_s):
            assert await stage.sh(self.neighbour, "cat kept") == "mine\n"
        took = time.monotonic() - began
        health = await stage.client.health(stage.address)
        assert health["name"] == stage.name
        assert stage.process is not None
        assert stage.process.poll() is None
        assert rss(stage.process.pid) < _BUSY_RSS
        assert available() > _SPARE_MEMORY
        assert shutil.disk_usage(stage.home).free > _SPARE_DISK
        return took

    async def works(self, env: UUID, *, within_s: float = 30) -> None:
        """Assert that an environment works (again), with the files it had."""
        async with asyncio.timeout(within_s):
            while True:
                ran = await self.stage.run(env, self.stage.shell("cat /workspace/kept"))
                if ran.out == b"mine\n":
                    return
                await asyncio.sleep(0.2)

    async def environment(self, **fields: Any) -> UUID:
        """An environment with a file in it."""
        env = await self.stage.environment(**fields)
        await self.stage.client.write(
            self.stage.address, env, "workspace/kept", b"mine\n", overwrite=True
        )
        return env

    async def stop(self, env: UUID) -> None:
        await self.stage.client.stop(self.stage.address, env)

    def pid(self, env: UUID) -> int:
        """The main process of an environment's sandbox, as the host sees it."""
        container = self.stage.container(env)
        assert container is not None
        shown = docker("inspect", "--format", "{{.State.Pid}}", container)
        return int(shown.stdout)


@asynccontextmanager
async def arena(
    engine: DockerEngine, database: Database, url: str, **settings: str
) -> AsyncGenerator[Arena]:
    """A broker with a neighbour that runs; the host is left as it was found."""
    before = traces()
    home = Path(tempfile.mkdtemp(prefix="oi-attack-", dir="/tmp"))
    limits = {
        "OI_SANDBOX__MEMORY_BYTES": str(MEMORY),
        "OI_SANDBOX__DISK_BYTES": str(DISK),
        "OI_SANDBOX__PIDS": str(PIDS),
    }
    async with staged(engine, database, url, home, **limits, **settings) as stage:
        await stage.start()
        made = Arena(stage, await stage.environment())
        await stage.sh(made.neighbour, "echo mine > kept")
        yield made
        for row in await stage.client.environments(stage.address):
            await stage.client.delete(stage.address, UUID(row["id"]))
        assert await stage.stop() == 0
        # Before the stage tidies up: all of this is the broker's own work.
        left = engine.containers(f"openinteractions.broker={stage.name}")
        assert not left, f"containers are left: {left}"
        await asyncio.to_thread(_no_trace, home, before)


def _no_trace(home: Path, before: set[str]) -> None:
    """No process, mount or loop device of ours is left on the host, a moment later."""
    until = time.monotonic() + 20
    while left := [each for each in traces() - before if str(home) in each]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def traces() -> set[str]:
    """What runs, what is mounted, and what loop devices hold, as text."""
    found = {line.split(" - ")[0] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        found.add(file.read_text().strip())
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.add(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def rss(pid: int) -> int:
    """Memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def available() -> int:
    """Memory that the host still has."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no MemAvailable")
