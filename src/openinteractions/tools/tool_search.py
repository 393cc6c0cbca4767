"""The tool `tool_search`: loads functions that were declared with `defer_loading`.

The model sees their names and short descriptions only, until it asks for them by name.
"""

from collections.abc import Mapping
from typing import Any

from openinteractions.models.port import Json, ToolCall
from openinteractions.tools.port import Call, Means, Tool

NAME = "tool_search"
_MAX_DESCRIPTION = 200
_MAX_NAME = 100
_NAMED = 10


def tools(config: Json, means: Means) -> Mapping[str, Tool]:
    """The one tool that this is; the entry's `functions` are those that it can load."""
    del means
    return {NAME: ToolSearch(config["functions"])}


class ToolSearch:
    """Implements `tools.port.Tool`; pure."""

    is_pure = True

    def __init__(self, functions: list[Json]) -> None:
        self._functions = {function["name"]: function for function in functions}

    def declaration(self) -> Json:
        """The function that the model sees: it names what can be loaded."""
        listed = "\n".join(f"- {name}: {_short(f)}" for name, f in self._functions.items())
        return {
            "type": "function",
            "name": NAME,
            "description": (
                "Loads further functions, which you can call from then on. Load those that the "
                f"task needs, all in one call. There are:\n{listed}"
            ),
            "parameters": {
                "type": "object",
                "properties": {
                    "function_names": {
                        "type": "array",
                        "items": {"type": "string"},
                        "minItems": 1,
                        "description": "Names from the list above.",
                    }
                },
                "required": ["function_names"],
            },
        }

    def call_step(self, call: ToolCall) -> Json:
        """A `tool_search_call` step."""
        return {"type": "tool_search_call", "arguments": call.arguments}

    async def run(self, call: Call) -> Json:
        """The definitions of the functions that were asked for; it says which there are not."""
        names: list[str] = list(dict.fromkeys(call.step["arguments"]["function_names"]))
        found = [self._functions[name] for name in names if name in self._functions]
        unknown = [name for name in names if name not in self._functions]
        result = _result([_public(function) for function in found])
        if not unknown:
            return result
        shown = ", ".join(repr(name[:_MAX_NAME]) for name in unknown[:_NAMED])
        message = f"There is no function {shown}; load only what is listed."
        return {**result, "message": message} if found else self.failure(message)

    def failure(self, message: str) -> Json:
        """A `tool_search_result` step that says what went wrong."""
        return {**_result([]), "is_error": True, "message": message}

    async def stop(self, key: str) -> None:
        """Nothing runs."""


def _short(function: Json) -> str:
    text: str = function.get("short_description") or function.get("description") or ""
    line = text.strip().partition("\n")[0]
    return line[:_MAX_DESCRIPTION]


def _public(function: Json) -> Json:
    return {key: value for key, value in function.items() if key != "defer_loading"}


def _result(functions: list[Any]) -> Json:
    return {"type": "tool_search_result", "result": functions}
