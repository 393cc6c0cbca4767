"""Functions that were declared with `defer_loading`: which of them the model has loaded."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from openinteractions.models.port import Json

_OURS = ("defer_loading", "short_description", "loads")


def declared(tools: Sequence[Json], steps: Sequence[Json]) -> list[Json]:
    """The tools that the model sees now.

    Args:
        tools: The run spec's.
        steps: The interaction's, its input first.
    """
    if not any(tool.get("defer_loading") for tool in tools) and not _searches(tools):
        return list(tools)
    loaded = {tool["name"]: tool for tool in _loaded(steps)}
    shown = [tool for tool in tools if not tool.get("defer_loading") or tool["name"] in loaded]
    names = {tool.get("name") for tool in tools}
    shown += [tool for name, tool in loaded.items() if name not in names]
    return [{key: value for key, value in tool.items() if key not in _OURS} for tool in shown]


def _searches(tools: Sequence[Json]) -> bool:
    return any(tool.get("loads") for tool in tools)


def _loaded(steps: Sequence[Json]) -> Iterator[Json]:
    """Functions that the results of tool searches have given."""
    for step in steps:
        result: Any = step.get("result")
        if step["type"] not in ("tool_search_result", "function_result"):
            continue
        if not isinstance(result, list):
            continue
        for item in cast("list[Any]", result):
            if isinstance(item, dict) and item.get("type") == "function" and item.get("name"):  # pyright: ignore[reportUnknownMemberType] - any JSON
                yield cast("Json", item)
