"""How a small model calls functions: one JSON object a turn, held to a schema by the decoder.

Models of this size do not manage their templates' native tool calls. So the functions are put into
the system text, the answer is constrained to `{"name", "arguments"}` of one of them or to
`{"answer"}`, and earlier calls are shown in that same shape. Everything here is pure.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import orjson

from openinteractions.models.port import Json, TextDelta, ToolCall

_MAX_STRING: Final = 1000
_MAX_ANSWER: Final = 4000
_MAX_ITEMS: Final = 50
_MAX_DESCRIPTION: Final = 300

# Without it the smallest models make the same call again and again.
_NUDGE: Final = (
    '\n\nReply {"answer": your text for the user} now, unless another function is needed.'
)

_ANSWER_HEAD = re.compile(r'\s*\{\s*"answer"\s*:\s*"')
_CALL_NAME = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')
_STRING_UNIT = re.compile(r'[^"\\]+|\\u[0-9a-fA-F]{4}|\\[^u]', re.DOTALL)
_HIGH_SURROGATE = re.compile(r"\\u[dD][89abAB]")


@dataclass(frozen=True, slots=True)
class Offer:
    """What the model may do in this turn."""

    functions: Sequence[Json]
    """Contract `function` tools; none means that the protocol is not in use."""
    may_answer: bool
    answer: Json | None = None
    """The schema of the answer, where structured output is wanted; None means a string."""


def offer(tools: Sequence[Json], choice: str | Json | None, answer: Json | None) -> Offer:
    """What tools and a `tool_choice` leave to the model."""
    mode, names = _mode(choice)
    functions = [tool for tool in tools if names is None or tool["name"] in names]
    if mode == "none":
        return Offer((), may_answer=True, answer=answer)
    return Offer(functions, may_answer=mode != "any" or not functions, answer=answer)


def unstick(offered: Offer, messages: Sequence[bytes]) -> Offer:
    """The same offer, or only an answer where the model's last two calls were one and the same.

    Args:
        offered: What the turn allows by itself.
        messages: The conversation, as chat completions messages.
    """
    last: list[Json] = []
    for raw in messages[::-1]:
        message: Json = orjson.loads(raw)
        if message["role"] == "assistant":
            last.extend(call["function"] for call in reversed(_calls(message)))
        if message["role"] == "user" or len(last) > 1:
            break
    stuck = len(last) > 1 and last[0] == last[1]
    return replace(offered, functions=()) if stuck and offered.may_answer else offered


def schema(offered: Offer) -> Json:
    """The JSON schema that every reply of the turn obeys."""
    choices = [
        _object(
            name={"const": function["name"]},
            arguments=_arguments(function, f"#/anyOf/{index}/properties/arguments"),
        )
        for index, function in enumerate(offered.functions)
    ]
    if offered.may_answer:
        prefix = f"#/anyOf/{len(choices)}/properties/answer"
        text = {"type": "string", "maxLength": _MAX_ANSWER}
        choices.append(
            _object(answer=text if offered.answer is None else _bounded(offered.answer, prefix))
        )
    return {"anyOf": choices}


def instructions(offered: Offer, system: str | None) -> str:
    """The system text: the caller's own, then the functions and how to reply."""
    lines = [system, ""] if system else []
    lines.append("You act by calling exactly one function per turn.")
    lines.append("Functions:")
    lines.extend(_signature(function) for function in offered.functions)
    lines.append('Reply with one JSON object: {"name": the function, "arguments": {...}}.')
    lines.append("Take argument values from the user's message.")
    if offered.may_answer:
        lines.append(
            "Only if no function fits, or after its output has come,"
            ' reply {"answer": your text for the user} instead.'
        )
    return "\n".join(lines)


def render(messages: Iterable[bytes], offered: Offer) -> list[bytes]:
    """Chat completions messages in this protocol's shape: plain text, no tool roles.

    A call is shown right before its output, so parallel calls become one after the other; a call
    without an output is left out.
    """
    nudge = offered.functions and offered.may_answer
    calls: dict[str, Json] = {}
    shown: list[bytes] = []

    def show(role: str, text: str) -> None:
        shown.append(orjson.dumps({"role": role, "content": text}))

    for raw in messages:
        message: Json = orjson.loads(raw)
        text = _text(message.get("content"))
        match message["role"]:
            case "assistant":
                if text:
                    answer = offered.functions and offered.answer is None
                    show("assistant", _dump({"answer": text}) if answer else text)
                calls.update({call["id"]: call["function"] for call in _calls(message)})
            case "tool":
                call = calls.get(message["tool_call_id"], {"name": "function", "arguments": "{}"})
                name = call["name"]
                show("assistant", _dump({"name": name, "arguments": _object_of(call["arguments"])}))
                show("user", f"Output of {name}:\n{text}{_NUDGE if nudge else ''}")
            case "developer":
                show("system", text)
            case role:
                show(role, text)
    return shown


class ReplyReader:
    """Reads a constrained reply as it arrives: text to show at once, a call when it is whole."""

    def __init__(self) -> None:
        self._raw = ""
        self._next = 0
        """Where in the raw text the answer's string goes on; 0 while it has not begun."""

    def feed(self, piece: str) -> str:
        """Take the next piece of the reply; return what of the answer can be shown."""
        self._raw += piece
        if not self._next:
            head = _ANSWER_HEAD.match(self._raw)
            if head is None:
                return ""
            self._next = head.end()
        return self._decode()

    def finish(self) -> TextDelta | ToolCall | None:
        """What the whole reply amounts to beyond the text that `feed` returned."""
        if self._next:
            return None
        try:
            reply = json.loads(self._raw, strict=False)
        except json.JSONDecodeError:
            return self._broken()
        match reply:
            case {"name": str(name), "arguments": dict()}:
                return ToolCall(id=None, name=name, arguments=reply["arguments"])
            case {"answer": answer}:
                return TextDelta(_dump(answer))
            case _:
                return TextDelta(self._raw)

    def _broken(self) -> TextDelta | ToolCall | None:
        head = _CALL_NAME.match(self._raw)
        if head is None:
            # Of a reply that was cut off in its first words there is nothing to show.
            return None if self._raw.lstrip()[:1] in {"", "{"} else TextDelta(self._raw)
        rest = self._raw[head.end() :]
        return ToolCall(id=None, name=json.loads(head[1]), arguments={}, malformed=rest)

    def _decode(self) -> str:
        end = self._next
        while unit := _STRING_UNIT.match(self._raw, end):
            # Half of a surrogate pair waits for the other half.
            if _HIGH_SURROGATE.match(unit[0]) and len(self._raw) < unit.end() + 6:
                if self._raw[unit.end() : unit.end() + 1] not in {"", "\\"}:
                    end = unit.end()
                    continue
                break
            end = unit.end()
        text = json.loads(f'"{self._raw[self._next : end]}"', strict=False)
        self._next = end
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _mode(choice: str | Json | None) -> tuple[str, frozenset[str] | None]:
    """The mode, and the names that it is limited to (None: all)."""
    match choice:
        case None:
            return "auto", None
        case str():
            return choice, None
        case _:
            allowed: Json = choice.get("allowed_tools") or {}
            names = allowed.get("tools")
            return allowed.get("mode") or "auto", None if names is None else frozenset(names)


def _object(**properties: Json) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _arguments(function: Json, pointer: str) -> Json:
    parameters = _bounded(function.get("parameters") or {}, pointer)
    parameters.setdefault("type", "object")
    if "$ref" not in parameters:
        parameters.setdefault("properties", {})
        # Small models invent arguments where the schema does not forbid them.
        parameters.setdefault("additionalProperties", False)
    return parameters


def _bounded(node: Any, pointer: str) -> Any:  # noqa: ANN401 - a JSON schema's nodes are any JSON
    """A copy of a schema in which nothing is endless and references hold at its new place.

    Args:
        node: The schema, or any part of one.
        pointer: JSON pointer of where the schema's root comes to lie.
    """
    if isinstance(node, list):
        return [_bounded(item, pointer) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    copy: Json = {}
    for key, value in cast("Json", node).items():
        if key in {"enum", "const", "default", "examples", "required"}:
            copy[key] = value
        elif key == "$ref" and isinstance(value, str):
            copy[key] = re.sub(r"^#", pointer, value)
        elif key == "properties" and isinstance(value, dict):
            # The decoder's converter knows no `true` for "anything".
            fields = cast("Json", value)
            copy[key] = {k: {} if v is True else _bounded(v, pointer) for k, v in fields.items()}
        else:
            copy[key] = _bounded(value, pointer)
    _limit(copy)
    return copy


def _limit(node: Json) -> None:
    kind = node.get("type")
    if isinstance(kind, str):
        node["type"] = kind = kind.lower()
    if kind == "string" and not node.keys() & {"enum", "const", "maxLength", "pattern", "format"}:
        node["maxLength"] = max(_MAX_STRING, int(node.get("minLength", 0)))
    if kind == "array" and "maxItems" not in node:
        node["maxItems"] = max(_MAX_ITEMS, int(node.get("minItems", 0)))


def _signature(function: Json) -> str:
    parameters = cast("Json", function.get("parameters") or {})
    required = cast("list[str]", parameters.get("required") or [])
    fields = cast("dict[str, Any]", parameters.get("properties") or {})
    parts = [_field(name, field, name in required) for name, field in fields.items()]
    about = (function.get("description") or "")[:_MAX_DESCRIPTION]
    return f"- {function['name']}({', '.join(parts)})" + (f": {about}" if about else "")


def _field(name: str, field: Any, required: bool) -> str:  # noqa: ANN401 - a JSON schema
    schema_: Mapping[str, Any] = cast("Json", field) if isinstance(field, dict) else {}
    mark = name if required else f"{name}?"
    if "enum" in schema_:
        return f"{mark}: {' | '.join(map(str, schema_['enum']))}"
    about = str(schema_.get("description") or schema_.get("type") or "any")
    return f"{mark}: {about[:_MAX_DESCRIPTION]}"


def _text(content: Any) -> str:  # noqa: ANN401 - a string, a list of parts, or null
    if content is None or isinstance(content, str):
        return content or ""
    parts = cast("list[Json]", content)
    return "\n".join(part["text"] for part in parts if part.get("type") == "text")


def _calls(message: Json) -> list[Json]:
    return message.get("tool_calls") or []


def _object_of(text: str) -> Json:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return cast("Json", value) if isinstance(value, dict) else {}


def _dump(value: Any) -> str:  # noqa: ANN401 - any JSON
    """JSON as models write it: with blanks after commas and colons."""
    return json.dumps(value, ensure_ascii=False)
