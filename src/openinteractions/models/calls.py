"""Calls and results of a conversation, as every vendor that pairs them wants them."""

from collections.abc import Iterator, Sequence

from openinteractions.models.port import Json

_NO_RESULT = "No result was recorded."


def closed(steps: Sequence[Json]) -> Iterator[Json]:
    """The steps, each server-side call without a result followed by one that says so.

    Gemini and Anthropic refuse a call that is not answered, and the server's own calls get no
    answer later; a `function_call` may be answered in the next interaction.
    """
    answered = {step.get("call_id") for step in steps}
    for step in steps:
        yield step
        kind: str = step["type"]
        if kind.endswith("_call") and kind != "function_call" and step["id"] not in answered:
            result = kind.removesuffix("_call") + "_result"
            yield {"type": result, "call_id": step["id"], "result": _NO_RESULT, "is_error": True}
