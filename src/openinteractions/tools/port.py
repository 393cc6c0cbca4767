"""The ports of server-side tools: towards the loop, and towards the sandbox.

A tool is shown to the model as a function. Its call becomes the contract's own step for it, is
committed, and only then runs; whoever takes a run over finds a committed call without a result and
calls `run` again with the same key. What that means is the tool's class (ruling R5): a pure tool
runs again, a keyed one finds the execution of that key and waits for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from openinteractions.models.port import Json, ToolCall
from openinteractions.sandbox.port import Exit


class Tool(Protocol):
    """One tool that this server runs."""

    def declaration(self) -> Json:
        """A contract `function` tool: name, description and parameters, as the model sees it."""
        ...

    def call_step(self, call: ToolCall) -> Json:
        """The step that shows a call: its type and what belongs to it, without id and signature."""
        ...

    async def run(self, step: Json, key: str) -> Json:
        """Execute a committed call.

        Args:
            step: The call's step.
            key: The same whenever this very call is run again, and of no other call.

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
    """The sandbox of one run."""

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
