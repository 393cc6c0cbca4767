"""Functions that were declared with `defer_loading`: which of them the model has loaded."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from openinteractions.models.port import Json

_OURS = ("defer_loading", "short_description", "loads")


def defers(tools: Sequence[Json]) -> bool:
    """Whether some functions are declared only once they are loaded."""
    return _searches(tools) or any(tool.get("defer_loading") for tool in tools)


def declared(
    tools: Sequence[Json], steps: Sequence[Json], earlier: Mapping[str, Json] | None = None
) -> list[Json]:
    """The tools that the model sees now.

    Args:
        tools: The run spec's.
        steps: The interaction's, its input first.
        earlier: What the turns before have loaded, by name.
    """
    if not defers(tools):
        return list(tools)
    known = {**(earlier or {}), **loaded(steps)}
    shown = [tool for tool in tools if not tool.get("defer_loading") or tool["name"] in known]
    if _searches(tools):
        names = {tool.get("name") for tool in tools}
        shown += [tool for name, tool in known.items() if name not in names]
    return [{key: value for key, value in tool.items() if key not in _OURS} for tool in shown]


def loaded(steps: Sequence[Json]) -> dict[str, Json]:
    """Functions that the results of tool searches, and of functions, have given: by name."""
    return {tool["name"]: tool for tool in _loaded(steps)}


def _searches(tools: Sequence[Json]) -> bool:
    return any(tool.get("loads") for tool in tools)


def _loaded(steps: Sequence[Json]) -> Iterator[Json]:
    for step in steps:
        result: Any = step.get("result")
        if step["type"] not in ("tool_search_result", "function_result"):
            continue
        if not isinstance(result, list):
            continue
        for item in cast("list[Any]", result):
            if isinstance(item, dict) and item.get("type") == "function" and item.get("name"):  # pyright: ignore[reportUnknownMemberType] - any JSON
                yield cast("Json", item)
