"""The ports of the execution wing: what a backend, a byte stream and a way out have to give.

A backend only starts containers and hands out one duplex byte stream to each one's main process.
Everything else (commands, files, egress, forwarded ports) is the same code over that stream and
over the environment's disk, so a second backend is small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias
from uuid import UUID

from openinteractions.errors import Conflict, EngineError, NotFound, Unready

Json: TypeAlias = dict[str, Any]

FOLDERS = ("workspace", ".agents", "home")
"""What every environment's tree has at its top; see `tops` for what may lie beside them."""

MOUNTS: Mapping[str, str] = {
    "workspace": "/workspace",
    ".agents": "/.agents",
    "home": "/home/agent",
}
"""Where each of them lies in the sandbox."""

UID = 1000
"""User and group of everything in a sandbox."""


class SandboxError(EngineError):
    """A sandbox could not be had, or broke."""

    code = "sandbox_error"


class BackendDown(Unready):
    """The container engine does not answer, or refuses to work; the message says what to do."""


class NotBegun(Unready):
    """No sandbox is to be had now: the command was not started, and was not before."""

    code = "not_begun"


class Gone(NotFound):
    """No such container, execution or environment (any more)."""


class Displaced(Conflict):
    """Who asks owns the run no more; nothing was changed."""

    code = "displaced"


@dataclass(frozen=True, slots=True)
class Owner:
    """One owner of a stored run, as its job's row has it while the lease lasts (ruling R9)."""

    interaction_id: UUID
    epoch: int


class Duplex(Protocol):
    """One ordered, binary-clean stream of bytes in each direction."""

    async def read(self, limit: int = 65536) -> bytes:
        """Up to `limit` bytes; waits for the first one; `b""` at the end."""
        ...

    async def write(self, data: bytes) -> None:
        """Send; waits while the other side does not read.

        Raises:
            ConnectionError: The stream is closed.
        """
        ...

    async def end(self) -> None:
        """Say that nothing more will be written; reading goes on."""
        ...

    async def close(self) -> None:
        """Close both directions; what was not sent yet may be lost. Never raises."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one sandbox may take."""

    cpus: float = 2.0
    memory_bytes: int = 2 * 2**30
    pids: int = 512
    disk_bytes: int = 4 * 2**30
    tmp_bytes: int = 512 * 2**20
    """All tmpfs together; they count as memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A folder of the broker's host inside the sandbox."""

    source: Path
    target: str
    is_late: bool = False
    """A shared mount point: what is mounted on `source` later appears in the running sandbox."""
    is_read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """One container to start."""

    name: str
    image: str
    argv: Sequence[str]
    """Its main process; standard input stays open."""
    limits: Limits = Limits()
    mounts: Sequence[Mount] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    runtime: str | None = None
    """Such as `runsc`; None is the engine's default."""
    uid: int = UID


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A container as `Backend.list` finds it."""

    ref: str
    labels: Mapping[str, str]
    is_running: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a backend says of itself."""

    version: str
    runtimes: Sequence[str]
    """Container runtimes that can be asked for."""
    problems: Sequence[str] = ()
    """What is missing or weak, each with its fix, for the operator."""


class Backend(Protocol):
    """Starts containers and opens the stream to each one's main process."""

    name: str

    async def health(self) -> Health:
        """Whether the engine can be used.

        Raises:
            BackendDown: It does not answer.
        """
        ...

    async def create(self, spec: SandboxSpec) -> str:
        """Create and start a container; return its reference.

        Raises:
            BackendDown: The engine does not answer, or has no such image or runtime.
            SandboxError: It would not start.
        """
        ...

    async def attach(self, ref: str) -> Duplex:
        """The main process's standard input and output. Can be called again after a loss.

        Raises:
            Gone: No such container, or it has ended.
        """
        ...

    async def remove(self, ref: str) -> None:
        """Kill and remove; nothing happens where it is gone already."""
        ...

    async def list(self, labels: Mapping[str, str]) -> Sequence[Sandbox]:
        """All containers with these labels, stopped ones too."""
        ...

    async def close(self) -> None:
        """Let the engine's connections go; containers run on."""
        ...


Outcome: TypeAlias = Literal["exited", "killed", "unknown"]
StoppedFor: TypeAlias = Literal["deleted", "size", "other"]
"""Its environment was deleted, or had become larger than it may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One execution to start."""

    id: str
    """Minted by the caller, never by a model: the same id is never started twice (ruling R4)."""
    epoch: int
    """The caller's fencing token; a lower one than any seen before is refused."""
    argv: Sequence[str]
    cwd: str = "/workspace"
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    has_stdin: bool = False
    pty: tuple[int, int] | None = None
    """Rows and columns of a terminal; standard error then joins standard output."""
    timeout_s: float | None = None
    max_output_bytes: int = 1 << 20
    session: str | None = None
    """A kept Python interpreter of this name; `argv[0]` is then the code to run in it."""


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of what a command wrote."""

    stream: Literal[1, 2]
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a command ended."""

    outcome: Outcome
    """`unknown`: it was started, and its sandbox was lost before it could say how it ended."""
    code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    truncated: bool = False
    """Its output was longer than the bound; the middle is missing, and marked."""
    is_fresh_session: bool = False
    """The session had to be started for it: no variables of earlier calls."""
    has_ended_session: bool = False
    """The session ended with it: its variables are gone."""
    out_of_memory: bool = False
    """A process of the sandbox was seen to be killed meanwhile, for want of memory."""
    stopped_for: StoppedFor | None = None
    """Why its sandbox was stopped, which ended it."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    max_rss_bytes: int = 0
    output_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file or folder of an environment."""

    path: str
    """From the environment's root, without a leading slash: `workspace/a.txt`."""
    type: Literal["file", "directory", "symlink"]
    size_bytes: int
    mime_type: str | None
    created: float
    modified: float
    """Unix seconds."""
    link: str | None = None
    """Where it leads, as the link itself says it, if it is one: the rest is of what is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadState:
    """How far an upload in parts has come."""

    size_bytes: int = 0
    """What has arrived; nothing once it is over."""
    is_over: bool = False
    written: Sequence[Entry] | None = None
    """What it became; None where it was thrown away, or is not over."""
