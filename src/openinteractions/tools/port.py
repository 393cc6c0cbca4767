"""The ports of server-side tools: towards the loop, the sandbox, the web and MCP servers.

A tool is shown to the model as a function. Its call becomes the contract's own step for it, is
committed, and only then runs; whoever takes a run over finds a committed call without a result and
calls `run` again with the same key. What that means is the tool's class (ruling R5): a pure tool
runs again; a keyed one finds the execution of that key, or its own note of what it was about to do;
an unsafe one finds its note, and says that the outcome is unknown.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from openinteractions.models.port import Json, ToolCall
from openinteractions.sandbox.port import Entry, Exit


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A committed call that is to be executed now."""

    step: Json
    """The call's step; its arguments obey the tool's declaration."""
    key: str
    """The same whenever this very call is run again, and of no other call of the interaction."""
    begun: Json | None
    """What an earlier owner of the run noted by `begin`, before it was lost; None if nothing."""
    begin: Callable[[Json], Awaitable[None]]
    """Make a note durable, before anything happens that must not happen twice."""


class Tool(Protocol):
    """One tool that this server runs."""

    @property
    def is_pure(self) -> bool:
        """Whether it changes nothing: calls beside each other then run at the same time."""
        ...

    def declaration(self) -> Json:
        """A contract `function` tool: name, description and parameters, as the model sees it."""
        ...

    def call_step(self, call: ToolCall) -> Json:
        """The step that shows a call: its type and what belongs to it, without id and signature."""
        ...

    async def run(self, call: Call) -> Json:
        """Execute a committed call.

        Returns:
            The result's step without `call_id`. A failure is a result too (`is_error`), for the
            model to read.
        """
        ...

    def failure(self, message: str) -> Json:
        """The result's step, without `call_id`, of a call that did not run or did not end."""
        ...

    async def stop(self, key: str) -> None:
        """End an execution that nobody waits for any more, with all that it has started."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    exit: Exit
    text: str
    """What it wrote, standard output and error as they came."""


class Workplace(Protocol):
    """The sandbox of one run, and the files of its environment.

    Paths are from the environment's root, without a leading slash: `workspace/a.txt`,
    `.agents/AGENTS.md`, `home/x` (in the sandbox: /workspace, /.agents, /home/agent); a folder
    `data` that a source made beside them is /data.
    """

    async def execute(
        self,
        key: str,
        argv: Sequence[str],
        *,
        session: str | None = None,
        timeout_s: float,
        max_output_bytes: int,
    ) -> Done:
        """Run a command and wait for its end; one of the same key is not started twice.

        Raises:
            Unready: The sandbox cannot be had now; the message says why.
            RequestError: It cannot be had at all: the environment is gone, or has no room.
        """
        ...

    async def kill(self, key: str) -> None:
        """Kill a command and everything it has started; nothing happens if it has ended."""
        ...

    async def has_files(self) -> bool:
        """Whether the environment has any files yet; looking makes none."""
        ...

    async def stat(self, path: str) -> Entry:
        """One file or folder.

        Raises:
            NotFound: There is none. (All methods on files also raise Unready and RequestError.)
        """
        ...

    async def list(
        self, path: str, *, recursive: bool = False, limit: int = 1000, after: str | None = None
    ) -> tuple[Sequence[Entry], str | None]:
        """What a folder holds, by path, and where the next page starts."""
        ...

    async def read(self, path: str, *, offset: int = 0, max_bytes: int) -> tuple[bytes, int]:
        """At most `max_bytes` of a file from `offset` on, and the whole file's size in bytes."""
        ...

    async def write(self, path: str, data: bytes) -> None:
        """Write a file, whole or not at all, over what is there; folders above it are made."""
        ...

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or folder."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a URL gave."""

    url: str
    """After redirects."""
    mime_type: str
    data: bytes
    charset: str | None = None
    """Of a text, if the answer's header says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One result of a web search."""

    title: str
    url: str
    snippet: str


class Web(Protocol):
    """The web, as far as this run may reach it."""

    async def fetch(
        self, url: str, *, grows: Callable[[int], Awaitable[None]] | None = None
    ) -> Page:
        """GET a URL, past the SSRF guard and the network rules of the run's environment.

        Args:
            url: Where.
            grows: Awaited with the size that the page is about to have, before it has it.

        Raises:
            Invalid: It cannot be had; the message says why (`netguard.Refused` where the guard or
                the rules forbid it, `netguard.Unwelcome` where it answered with another status).
        """
        ...

    async def search(self, query: str, *, kind: str, limit: int) -> Sequence[Hit]:
        """Ask the search backend; `kind` is a contract `search_type`.

        Raises:
            RequestError: It failed; the message says why.
        """
        ...


class McpServer(Protocol):
    """One MCP server that a run may call."""

    async def call(self, tool: str, arguments: Json, *, timeout_s: float) -> tuple[object, bool]:
        """Call one of its tools: the result (string, object or content blocks), and `is_error`.

        Raises:
            RequestError: It could not be reached, or broke off; the message says so.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What the tools of one run work with; where only declarations are needed, nothing."""

    workplace: Workplace | None = None
    web: Web | None = None
    servers: Mapping[str, McpServer] = field(default_factory=dict[str, McpServer])
    """By the names that the request gives them."""
