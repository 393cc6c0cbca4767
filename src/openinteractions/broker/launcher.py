"""Containers with a pipe into them, and the way out of each: what the pool gives, made ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast
from uuid import UUID

import structlog

from openinteractions.broker.rules import CA_BUNDLE, STANDARD
from openinteractions.sandbox.egress.proxy import Kind, Proxy
from openinteractions.sandbox.egress.state import Egress
from openinteractions.sandbox.pipe import Pipe, boot_argv
from openinteractions.sandbox.pool import Pool
from openinteractions.sandbox.port import Backend, Duplex, Limits, Mount, SandboxSpec

_log = structlog.get_logger(__name__)

_BUNDLE: Final = "ca-bundle.crt"


class Way:
    """Where a sandbox's connections go: nowhere, until it has an environment."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self.egress: Egress | None = None

    async def connect(self, kind: str, stream: Duplex) -> None:
        """Serve a connection that the sandbox makes."""
        if self.egress is None:
            await stream.close()
        else:
            await self._proxy.serve(cast("Kind", kind), stream, self.egress)


@dataclass(frozen=True, slots=True)
class Line:
    """A pipe into a sandbox, and its way out."""

    pipe: Pipe
    way: Way

    async def ping(self) -> object:
        """Come back when the other side has answered."""
        return await self.pipe.ping()

    async def close(self) -> None:
        """Let it go; the sandbox runs on."""
        await self.pipe.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What sandboxes are made of."""

    image: str
    runtime: str | None
    limits: Limits
    uid: int
    bundle: Path
    """The certificates that they trust, a file on the engine's machine."""

    def spec(self, *, name: str, mounts: Sequence[Mount], labels: Mapping[str, str]) -> SandboxSpec:
        """One of them."""
        return SandboxSpec(
            name=name,
            image=self.image,
            argv=boot_argv(),
            limits=self.limits,
            mounts=[*mounts, Mount(source=self.bundle, target=CA_BUNDLE, is_read_only=True)],
            env=STANDARD,
            labels=labels,
            runtime=self.runtime,
            uid=self.uid,
        )


class Launcher:
    """Starts sandboxes for environments, and finds them again."""

    def __init__(
        self,
        backend: Backend,
        folder: Path,
        proxy: Proxy,
        recipe: Recipe,
        *,
        broker: str,
        warm: int,
    ) -> None:
        self._proxy = proxy
        self.pool: Pool[Line] = Pool(
            backend,
            folder,
            broker=broker,
            make_spec=recipe.spec,
            open_pipe=self._line,
            size=warm,
        )
        """Entered by whoever wants warm ones."""

    async def launch(
        self, env: UUID, root: Path, egress: Egress
    ) -> tuple[str, Pipe, Literal["warm", "cold"]]:
        """A sandbox for an environment that has none; its container, its pipe, and how it came.

        Raises:
            BackendDown: The engine does not answer, or lacks something.
            SandboxError: It does not start.
        """
        started = await self.pool.start(env.hex, root)
        started.pipe.way.egress = egress
        return started.ref, started.pipe.pipe, "warm" if started.is_warm else "cold"

    async def attach(self, ref: str, egress: Egress) -> Pipe:
        """A new pipe into a sandbox that runs.

        Raises:
            BackendDown: The engine does not answer.
            Gone: It has ended.
            SandboxError: It does not answer.
        """
        line = await self.pool.attach(ref)
        line.way.egress = egress
        return line.pipe

    async def remove(self, ref: str) -> None:
        """Kill a sandbox; the environment's files stay.

        Raises:
            BackendDown: The engine does not answer.
            SandboxError: It cannot be removed.
        """
        await self.pool.remove(ref)

    async def _line(self, channel: Duplex, *, is_fresh: bool) -> Line:
        way = Way(self._proxy)
        pipe = await Pipe.open(channel, is_fresh=is_fresh, on_connect=way.connect)
        try:
            for problem in await pipe.configure():
                _log.warning("sandbox.listener_failed", problem=problem)
        except BaseException:
            await pipe.close()
            raise
        return Line(pipe, way)


def write_bundle(folder: Path, bundle: bytes) -> Path:
    """Put the certificates that sandboxes trust where the engine finds them."""
    path = folder / _BUNDLE
    if not path.exists() or path.read_bytes() != bundle:
        fresh = path.with_suffix(".new")
        fresh.write_bytes(bundle)
        fresh.chmod(0o644)
        fresh.replace(path)
    return path
