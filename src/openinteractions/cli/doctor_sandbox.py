"""The part of `doctor` that looks at sandboxes: the engine, the image, disks, brokers."""

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from openinteractions.broker import engine
from openinteractions.cli.finding import BAD, OK, WARN, Finding
from openinteractions.db.engine import Database
from openinteractions.errors import AppError
from openinteractions.sandbox.disk import Disks
from openinteractions.sandbox.docker import DockerBackend
from openinteractions.sandbox.port import Health
from openinteractions.settings import SandboxSettings, Settings

_ANSWER_S: Final = 10.0
_SILENT_S: Final = 15.0
_LEAST_FREE_BYTES: Final = 2 * 2**30


async def sandboxes(settings: Settings) -> list[Finding]:
    """What stands between this machine and sandboxes."""
    sandbox = settings.sandbox
    if sandbox.enabled == "off":
        return [Finding(OK, "sandboxes are off (setting sandbox.enabled)")]
    level = BAD if sandbox.enabled == "on" else WARN
    if sys.platform != "linux":
        return [
            Finding(
                level,
                "sandboxes need Linux: code execution and agents have no sandbox on this machine",
                "run `openinteractions broker` on a Linux machine with Docker",
            )
        ]
    try:
        backend = engine.backend(sandbox)
        try:
            async with asyncio.timeout(_ANSWER_S):
                return [
                    *await _engine(backend, sandbox, level),
                    *await _disks(settings),
                ]
        finally:
            await backend.close()
    except (AppError, TimeoutError) as error:
        text = error.message if isinstance(error, AppError) else "the engine does not answer"
        return [
            Finding(
                level,
                f"no sandbox can be run: {text}",
                "install Docker 20.10 or newer and start it, or set sandbox.enabled = off; a "
                "running `serve` finds it within half a minute",
            )
        ]


async def _engine(backend: DockerBackend, sandbox: SandboxSettings, level: str) -> list[Finding]:
    health = await backend.health()
    found = [Finding(OK, f"the container engine answers: {health.version}")]
    found += [_weakness(problem) for problem in health.problems]
    if await backend.image_id(sandbox.image) is None:
        found.append(
            Finding(
                level,
                f"the engine has no image {sandbox.image}",
                "build it with `scripts/sandbox-image`, or set sandbox.image to one that is there",
            )
        )
    else:
        found.append(Finding(OK, f"the sandbox image {sandbox.image} is there"))
    found.append(_runtime(sandbox, health, level))
    return found


def _weakness(problem: str) -> Finding:
    what, _, advice = problem.rstrip(".").partition(": ")
    return Finding(WARN, what, advice)


def _runtime(sandbox: SandboxSettings, health: Health, level: str) -> Finding:
    if sandbox.runtime is not None and sandbox.runtime not in health.runtimes:
        return Finding(
            level,
            f"the engine has no runtime {sandbox.runtime}",
            "install it and name it in the engine's daemon.json, or clear sandbox.runtime",
        )
    if sandbox.runtime is None and "runsc" in health.runtimes:
        return Finding(
            OK, "gVisor (runsc) is installed and not used: set sandbox.runtime = runsc to use it"
        )
    kind = sandbox.runtime or "the engine's default"
    return Finding(OK, f"sandboxes run under {kind}; gVisor is for code that is hostile")


async def _disks(settings: Settings) -> list[Finding]:
    home = settings.sandbox.home(settings.home())
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    found = [_free(home, there)]
    if settings.sandbox.disk == "folder":
        return [*found, Finding(OK, "environments are plain folders (setting sandbox.disk)")]
    if not os.access(there, os.W_OK):
        return [
            *found,
            Finding(
                WARN,
                f"{there} cannot be written by this user: a broker run by it would not start",
                "run it as another user, or set sandbox.data_dir",
            ),
        ]
    return [*found, *await _tried(settings, there)]


def _free(home: Path, there: Path) -> Finding:
    free = shutil.disk_usage(there).free
    if free > _LEAST_FREE_BYTES:
        return Finding(OK, f"{free / 2**30:.1f} GiB are free for environments in {home}")
    return Finding(
        WARN,
        f"only {free / 2**30:.1f} GiB are free for environments in {home}",
        "make room, or set sandbox.data_dir to a larger disk",
    )


async def _tried(settings: Settings, there: Path) -> list[Finding]:
    """Try what disks do, beside a broker that may run."""
    with tempfile.TemporaryDirectory(prefix=".oi-doctor-", dir=there) as folder:
        disks = Disks(Path(folder), kind="auto", size_bytes=settings.sandbox.disk_bytes)
        try:
            await disks.recover()
            kind, problems = disks.kind, await disks.problems()
        finally:
            await disks.close()
    if kind == "image" and settings.sandbox.engine_url().startswith("unix://"):
        return [
            Finding(OK, "environments get file systems of their own, of a fixed size"),
            Finding(OK, "sandboxes can be kept ready: this is root, beside its engine"),
        ]
    found = [_weakness(problem) for problem in problems if "size of environments" in problem]
    return [
        *found,
        Finding(
            WARN,
            "no sandbox can be kept ready, so that a first command waits for a start",
            "run the broker as root on the engine's own machine",
        ),
    ]


async def brokers(database: Database) -> list[Finding]:
    """The brokers that the database knows."""
    async with database.hot() as connection:
        rows = await connection.fetch(
            "select name, address, host, pid, running, capacity, problem, "
            "extract(epoch from now() - seen)::float8 as silent_s, "
            "(select count(*) from environments e where e.broker = b.name and e.has_disk) as kept "
            "from brokers b order by name"
        )
    found: list[Finding] = []
    for row in rows:
        name, kept = row["name"], f"keeps {row['kept']} environments"
        if row["silent_s"] > _SILENT_S:
            found.append(
                Finding(
                    WARN,
                    f"broker {name} (pid {row['pid']} on {row['host'].split('/')[0]}) has been "
                    f"silent for {row['silent_s']:.0f} s and {kept}",
                    "if it still runs, it hangs: `kill -9` it; then start it again under the same "
                    "name and with the same sandbox.data_dir, where its environments are",
                )
            )
        elif row["problem"] is not None:
            found.append(Finding(WARN, f"broker {name} ({row['address']}): {row['problem']}"))
        else:
            found.append(
                Finding(
                    OK,
                    f"broker {name} beats, runs {row['running']} of {row['capacity']} sandboxes "
                    f"and {kept}",
                )
            )
    return found
