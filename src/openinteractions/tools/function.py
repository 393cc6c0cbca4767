"""Tools of ours that the contract has no step of its own for: a call and a result of a function.

A client tells them from its own by the result that follows in the same interaction.
"""

from typing import Any

from openinteractions.models.port import Json, ToolCall


def call_step(call: ToolCall) -> Json:
    """A `function_call` step."""
    return {"type": "function_call", "name": call.name, "arguments": call.arguments}


def result_step(name: str, result: Any, *, is_error: bool = False) -> Json:  # noqa: ANN401 - JSON
    """A `function_result` step: a string, an object or a list of content blocks."""
    return {"type": "function_result", "name": name, "result": result, "is_error": is_error}
