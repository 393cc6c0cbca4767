"""What a request shows a model, on any of the three wires: for scripts that answer from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from tests.fakes.upstream import Received

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    """The result of a call, as the model reads it."""

    name: str
    """Of the function that was called."""
    text: str


def results(received: Received) -> list[Shown]:
    """The results of all calls in a conversation, in order."""
    body: Json = received.json
    if "contents" in body:
        return list(_gemini(body["contents"]))
    names = dict(_call_names(body["messages"]))
    found = [*_anthropic(body["messages"]), *_openai(body["messages"])]
    return [Shown(names[key], text) for key, text in found]


def result_of(received: Received, name: str) -> str:
    """What the last call of a function gave.

    Raises:
        LookupError: None has.
    """
    found = [each.text for each in results(received) if each.name == name]
    if not found:
        raise LookupError(f"no result of {name!r}")
    return found[-1]


def declared(received: Received) -> list[str]:
    """The names of the functions that the model can call; vendors' own tools by their keys."""
    names: list[str] = []
    for tool in received.json.get("tools", ()):
        if "functionDeclarations" in tool:
            names += [function["name"] for function in tool["functionDeclarations"]]
        elif "function" in tool:
            names.append(tool["function"]["name"])
        else:
            names.append(tool.get("name") or next(iter(tool)))
    return names


def system(received: Received) -> str:
    """The instructions."""
    body: Json = received.json
    if "contents" in body:
        return _joined(body.get("systemInstruction", {}).get("parts", []))
    if "system" in body:
        return _joined(body["system"])
    first = body["messages"][0]
    return _joined(first["content"]) if first["role"] == "system" else ""


def _joined(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def _call_names(messages: list[Json]) -> Iterator[tuple[str, str]]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            yield call["id"], call["function"]["name"]
        for block in _blocks(message):
            if block["type"] == "tool_use":
                yield block["id"], block["name"]


def _openai(messages: list[Json]) -> Iterator[tuple[str, str]]:
    for message in messages:
        if message["role"] == "tool":
            yield message["tool_call_id"], _joined(message["content"])


def _anthropic(messages: list[Json]) -> Iterator[tuple[str, str]]:
    for message in messages:
        for block in _blocks(message):
            if block["type"] == "tool_result":
                yield block["tool_use_id"], _joined(block.get("content"))


def _blocks(message: Json) -> list[Json]:
    content = message.get("content")
    return [block for block in content if "type" in block] if isinstance(content, list) else []


def _gemini(contents: list[Json]) -> Iterator[Shown]:
    for content in contents:
        for part in content["parts"]:
            if "functionResponse" in part:
                response = part["functionResponse"]
                said = response["response"]
                inside = said.get("output", said.get("error", said.get("result", said)))
                text = inside if isinstance(inside, str) else orjson.dumps(inside).decode()
                yield Shown(response["name"], text)
