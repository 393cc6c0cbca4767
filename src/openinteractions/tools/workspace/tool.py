"""What the file tools have in common: their steps, and how their failures are told."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from openinteractions.errors import Invalid, RequestError, Unready
from openinteractions.models.port import Json, ToolCall
from openinteractions.sandbox.port import SandboxError
from openinteractions.tools import function
from openinteractions.tools.port import Call, Workplace
from openinteractions.tools.workspace import paths

Work: TypeAlias = Callable[[Workplace, Call], Awaitable[Any]]
"""Does a call; the result is a string or content blocks. What the model did wrong is an `Invalid`,
with a message for it to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTool:
    """Implements `tools.port.Tool`."""

    name: str
    description: str
    parameters: Json
    work: Work
    is_pure: bool
    place: Workplace | None
    """None where only the declaration is needed."""
    executions: Callable[[str], list[str]] = lambda _: []
    """The keys of the commands that a call of this key may start."""

    def declaration(self) -> Json:
        """The function that the model sees."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }

    def call_step(self, call: ToolCall) -> Json:
        """A `function_call` step."""
        return function.call_step(call)

    def failure(self, message: str) -> Json:
        """A `function_result` step that says what went wrong."""
        return function.result_step(self.name, message, is_error=True)

    def meant(self, arguments: Json) -> Json:
        """The arguments with the path as the sandbox has it; one that is refused stays as it is."""
        try:
            path = paths.parse(arguments.get("path") or ".")
        except Invalid:
            return arguments
        return {**arguments, "path": path.shown}

    async def run(self, call: Call) -> Json:
        """Do it; a `function_result` step."""
        assert self.place is not None
        try:
            result = await self.work(self.place, call)
        except Unready as error:
            return self.failure(f"The files could not be reached: {error.message} Try it again.")
        except (RequestError, SandboxError) as error:
            return self.failure(error.message)
        return function.result_step(self.name, result)

    async def stop(self, key: str) -> None:
        """Kill what a call has started in the sandbox."""
        assert self.place is not None
        for execution in self.executions(key):
            await self.place.kill(execution)
