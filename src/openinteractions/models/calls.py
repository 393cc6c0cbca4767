"""Calls and results of a conversation, as every vendor that pairs them wants them."""

import hashlib
import re
from collections.abc import Iterator, Sequence

from openinteractions.models.port import Json

_NO_RESULT = "No result was recorded."
_MAX_NAME = 64
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")


def mcp_function(server: str, tool: str) -> str:
    """The function that a model knows an MCP server's tool by: another one for each tool.

    It is `server__tool` where every vendor takes that and it can be told apart; else what can be
    read of it, and a digest.
    """
    name = f"{server}__{tool}"
    is_plain = len(name) <= _MAX_NAME and _PLAIN_NAME.fullmatch(name) is not None
    if is_plain and "__" not in server and not server.endswith("_"):
        return name
    digest = hashlib.blake2b(f"{server}\0{tool}".encode(), digest_size=6).hexdigest()
    readable = _NOT_IN_NAMES.sub("_", name)
    if not readable[0].isalpha():
        readable = f"_{readable}"
    return f"{readable[: _MAX_NAME - len(digest) - 1]}_{digest}"


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
