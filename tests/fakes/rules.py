"""What vendors refuse of a request, for their fakes to refuse it as well.

Each gives the 400's message, or None. The words are the vendors' own.
"""

import re
from collections.abc import Iterator
from typing import Any

from openinteractions.models.port import Json

_CHOICES = {"anyOf", "oneOf", "allOf"}
_ID = re.compile(r"[a-zA-Z0-9_-]+")
_ANTHROPIC_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_OPENAI_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MAX_OPENAI_TOOLS = 128
_MAX_OPENAI_ID = 40


def anthropic_fault(request: Json) -> str | None:
    """What Anthropic, or a gateway to it, says of a request to `/v1/messages`."""
    return next(_anthropic_tools(request.get("tools", [])), None) or next(_turns(request), None)


def openai_fault(request: Json) -> str | None:
    """What OpenAI says of a request to `/v1/chat/completions`."""
    return next(_openai_tools(request.get("tools", [])), None) or next(
        _chat(request["messages"]), None
    )


def _openai_tools(tools: list[Json]) -> Iterator[str]:
    if len(tools) > _MAX_OPENAI_TOOLS:
        yield f"Invalid 'tools': array too long. Expected at most 128, got {len(tools)}."
    for at, tool in enumerate(tools):
        function = tool["function"]
        schema = function.get("parameters", {})
        if not _OPENAI_NAME.fullmatch(function["name"]):
            yield f"Invalid 'tools[{at}].function.name': string does not match pattern."
        if schema.get("type") != "object" or (_CHOICES | {"enum", "const", "not"}) & schema.keys():
            yield (
                f"Invalid schema for function '{function['name']}': schema must have type 'object' "
                "and not have 'oneOf'/'anyOf'/'allOf'/'enum'/'const'/'not' at the top level."
            )
        if "properties" not in schema:
            yield f"Invalid schema for function '{function['name']}': missing properties."


def _chat(messages: list[Json]) -> Iterator[str]:
    waiting: list[str] = []
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                yield "messages with role 'tool' must be a response to a preceding 'tool_calls'."
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            break
        for call in message.get("tool_calls", ()):
            if not _OPENAI_NAME.fullmatch(call["function"]["name"]):
                yield f"Invalid 'messages[{at}].tool_calls[0].function.name': does not match."
            if len(call["id"]) > _MAX_OPENAI_ID:
                yield f"Invalid 'messages[{at}].tool_calls[0].id': string too long."
            waiting.append(call["id"])
    if waiting:
        yield f"These tool_call_ids did not have response messages: {waiting}"


def _anthropic_tools(tools: list[Json]) -> Iterator[str]:
    names = [tool["name"] for tool in tools]
    if len(set(names)) < len(names):
        yield "tools: Tool names must be unique."
    for at, tool in enumerate(tools):
        if "type" in tool:
            continue
        schema = tool["input_schema"]
        if not _ANTHROPIC_NAME.fullmatch(tool["name"]):
            yield f"tools.{at}.custom.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'"
        if schema.get("type") != "object":
            yield f"tools.{at}.custom.input_schema.type: Input should be 'object'"
        if _CHOICES & schema.keys():
            yield (
                f"tools.{at}.custom.input_schema: input_schema does not support oneOf, allOf, or "
                "anyOf at the top level"
            )


def _turns(request: Json) -> Iterator[str]:
    uses: list[str] = []
    waiting: list[str] = []
    for at, message in enumerate(request["messages"]):
        blocks = _blocks(message)
        if not blocks:
            yield f"messages.{at}: all messages must have non-empty content"
        answered = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        first = [block.get("tool_use_id") for block in blocks[: len(waiting)]]
        if sorted(waiting) != sorted(map(str, first)):
            yield (
                f"messages.{at - 1}: `tool_use` ids were found without `tool_result` blocks "
                f"immediately after: {', '.join(waiting)}."
            )
        if len(answered) > len(waiting):
            yield f"messages.{at}: unexpected `tool_use_id` found in `tool_result` blocks"
        waiting = [block["id"] for block in blocks if block["type"] == "tool_use"]
        uses += waiting
        if (waiting or answered) and not request.get("tools"):
            yield "Requests which include `tool_use` or `tool_result` blocks must define tools"
        for block in blocks:
            yield from (f"messages.{at}: {fault}" for fault in _block(block))
    if len(set(uses)) < len(uses):
        yield "messages: `tool_use` ids must be unique"


def _block(block: Json) -> Iterator[str]:
    match block["type"]:
        case "text" if not block["text"].strip():
            yield "text content blocks must contain non-whitespace text"
        case "tool_use" if not _ANTHROPIC_NAME.fullmatch(block["name"]):
            yield "tool_use.name: String should match pattern '^[a-zA-Z0-9_-]{1,128}$'"
        case "tool_use" if not _ID.fullmatch(block["id"]):
            yield "tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'"
        case "tool_result":
            told = _blocks(block)
            if block.get("is_error") and not told:
                yield "content cannot be empty if is_error is true"
            if block.get("is_error") and any(inner["type"] != "text" for inner in told):
                yield 'all content must be type "text" if is_error is true'
            for inner in told:
                yield from _block(inner)
        case _:
            pass


def _blocks(holder: Json) -> list[Json]:
    content: Any = holder.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
