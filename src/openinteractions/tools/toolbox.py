"""The server-side tools of one run, found by the name that the model calls, or by a step."""

from collections.abc import Callable, Mapping, Sequence

from openinteractions.models.calls import mcp_function
from openinteractions.models.port import Json
from openinteractions.tools import code_execution, mcp, tool_search
from openinteractions.tools.browser import tool as browser
from openinteractions.tools.port import Means, Tool
from openinteractions.tools.web import search, url_context
from openinteractions.tools.workspace import tools as workspace

_MAKERS: Mapping[str, Callable[[Json, Means], Mapping[str, Tool]]] = {
    "browser": browser.tools,
    "code_execution": code_execution.tools,
    "google_search": search.tools,
    "mcp_server": mcp.tools,
    "tool_search": tool_search.tools,
    "url_context": url_context.tools,
    "workspace": workspace.tools,
}

SANDBOXED = frozenset({"browser", "code_execution", "workspace"})
"""Types of tools that run in the run's sandbox."""


def toolbox(tools: Sequence[Json], means: Means) -> "Toolbox":
    """The tools of a run.

    Args:
        tools: The run spec's `own_tools`.
        means: What they work with.
    """
    found: dict[str, Tool] = {}
    for tool in tools:
        found |= _MAKERS[tool["type"]](tool, means)
    return Toolbox(found)


class Toolbox:
    """Knows each tool by its name."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = dict(tools)

    def all(self) -> Mapping[str, Tool]:
        """Every tool, by its name."""
        return dict(self._tools)

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
        match kind:
            case "function_call":
                name: str = step["name"]
            case "mcp_server_tool_call":
                name = mcp_function(step["server_name"], step["name"])
            case _:
                name = kind[: -len("_call")]
        return self._tools.get(name)
