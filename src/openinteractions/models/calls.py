"""Calls and results of a conversation, as every vendor that pairs them wants them."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from openinteractions.models.port import Json

FAILED_SILENTLY = "Failed, without a message."
"""What a model reads of a call that failed and says nothing: vendors refuse an empty error."""
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


def function_name(name: str) -> str:
    """The name as OpenAI and Anthropic, and what stands between them and us, take it.

    Ours may have dots, colons and 128 characters. One that they would refuse becomes what can be
    read of it, and a digest: another one for each. `own_names` leads back.
    """
    if len(name) <= _MAX_NAME and _NOT_IN_NAMES.search(name) is None:
        return name
    digest = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
    return f"{_NOT_IN_NAMES.sub('_', name)[: _MAX_NAME - len(digest) - 1]}_{digest}"


def own_names(tools: Sequence[Json]) -> Mapping[str, str]:
    """The functions' own names, by those that `function_name` has given them in their place."""
    names = [tool["name"] for tool in tools if tool["type"] == "function"]
    return {function_name(name): name for name in names if function_name(name) != name}


def closed(steps: Sequence[Json]) -> Iterator[Json]:
    """The steps, each server-side call without a result followed by one that says so.

    Gemini and Anthropic refuse a call that is not answered, and the server's own calls get no
    answer later; a `function_call` may be answered in the next interaction.
    """
    answers = Counter(step.get("call_id") for step in steps)
    for step in steps:
        yield step
        kind: str = step["type"]
        if not kind.endswith("_call"):
            continue
        # Counted, since calls of different turns may have one id.
        answers[step["id"]] -= 1
        if kind != "function_call" and answers[step["id"]] < 0:
            result = kind.removesuffix("_call") + "_result"
            yield {"type": result, "call_id": step["id"], "result": _NO_RESULT, "is_error": True}
