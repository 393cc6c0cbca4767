"""The server-side tools of one run, found by the name that the model calls, or by a step."""

from collections.abc import Mapping, Sequence

from openinteractions.models.port import Json
from openinteractions.tools.code_execution import CodeExecution
from openinteractions.tools.port import Tool, Workplace

SANDBOXED = frozenset({"code_execution"})
"""Types of tools that run in the run's sandbox."""


def toolbox(tools: Sequence[Json], workplace: Workplace | None) -> "Toolbox":
    """The tools of a run.

    Args:
        tools: Contract tools that this server runs.
        workplace: The run's sandbox; None where only declarations are needed.
    """
    found: dict[str, Tool] = {}
    for tool in tools:
        if tool["type"] == "code_execution":
            found["code_execution"] = CodeExecution(workplace)
    return Toolbox(found)


class Toolbox:
    """Knows each tool by its name."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = dict(tools)

    def declarations(self) -> list[Json]:
        """The functions that the model sees."""
        return [tool.declaration() for tool in self._tools.values()]

    def find(self, name: str) -> Tool | None:
        """The tool that a model's call of this name means; None for a function of the client."""
        return self._tools.get(name)

    def of_step(self, step: Json) -> Tool | None:
        """The tool that made a call step; None if it is no call of a tool of ours."""
        kind: str = step["type"]
        if not kind.endswith("_call"):
            return None
        return self._tools.get(step["name"] if kind == "function_call" else kind[: -len("_call")])
