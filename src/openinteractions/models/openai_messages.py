"""Steps to chat-completions messages: the part of the OpenAI wire that goes in.

Consecutive model steps become one assistant message (text first, then its tool calls), since the
wire wants each call answered by a `tool` message before anything else is said. Media that a tool
or the model itself made cannot stand in those messages; they follow in a user message. What the
model thought before a call goes with it, see `openai_reasoning`.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from openinteractions.errors import Invalid
from openinteractions.models.calls import FAILED_SILENTLY, function_name, mcp_function
from openinteractions.models.encoded import encoded
from openinteractions.models.openai_reasoning import opened
from openinteractions.models.port import Json

_MAX_CALL_ID = 40
_BLOCKS = frozenset({"text", "image", "audio", "document", "video"})
_AUDIO_FORMATS = {
    "audio/wav": "wav",
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/mp3": "mp3",
    "audio/mpeg": "mp3",
}
_TEXT_DOCUMENTS = frozenset({"application/json", "application/xml", "application/csv"})
_DETAIL = {"low": "low", "high": "high", "ultra_high": "high"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What servers of this wire differ in."""

    takes_reasoning: bool = True
    """Whether the model's own reasoning may go back."""
    blank_reasoning: str | None = None
    """What a message without any must have instead; see `openai_reasoning.blank_for`."""
    name: Callable[[str], str] = function_name
    """What a function is called there."""


_COMMON = Dialect()


def compile_steps(steps: Sequence[Json], dialect: Dialect = _COMMON) -> list[bytes]:
    """The messages of one interaction, each one JSON object.

    Raises:
        Invalid: A content type that this wire has no place for.
    """
    writer = _Writer(steps, dialect)
    for step in steps:
        writer.add(step)
    return writer.close()


def call_id(contract_id: str) -> str:
    """An id that the vendor takes (at most 40 characters), always the same for the same call."""
    if len(contract_id) <= _MAX_CALL_ID:
        return contract_id
    return "call_" + hashlib.blake2b(contract_id.encode(), digest_size=16).hexdigest()


class _Writer:
    """Collects messages; `_turn` is the assistant message that is still being written."""

    def __init__(self, steps: Sequence[Json], dialect: Dialect) -> None:
        self._dialect = dialect
        self._answered = {step.get("call_id") for step in steps if _is_result(step)}
        self._messages: list[Json] = []
        self._turn: Json | None = None
        # In order, and one id as often as it is called: not all are unique.
        self._open_calls: list[str] = []
        self._aside: list[Json] = []
        self._reasoning: Json = {}

    def add(self, step: Json) -> None:
        kind: str = step.get("type", "")
        if kind == "user_input":
            self._end_turn()
            self._reasoning = {}
            self._flush_aside()
            self._messages.append({"role": "user", "content": _user_content(_blocks(step))})
        elif kind == "model_output":
            if step.get("error"):
                # What led to a broken answer goes with it.
                self._reasoning = {}
            else:
                self._say(_blocks(step))
        elif kind == "thought":
            if self._dialect.takes_reasoning:
                self._reasoning = opened(step.get("signature")) or self._reasoning
        elif kind.endswith("_call"):
            self._call(step, kind.removesuffix("_call"))
        elif kind.endswith("_result"):
            self._result(step, kind.removesuffix("_result"))

    def close(self) -> list[bytes]:
        self._end_turn()
        # A call that the next interaction answers must stay last: media would come in between.
        if not self._open_calls:
            self._flush_aside()
        return [encoded(message) for message in self._messages]

    def _say(self, blocks: Sequence[Json]) -> None:
        kinds = ((block.get("type"), block) for block in blocks)
        shown = (block.get("text", "") if kind == "text" else f"[{kind}]" for kind, block in kinds)
        self._append("".join(shown))
        for block in blocks:
            if block.get("type") == "image":
                self._aside += [_text("The image of the assistant's last answer:"), _part(block)]

    def _append(self, text: str) -> None:
        """Add the text of one step to the assistant's message."""
        if text:
            turn = self._assistant()
            turn["content"] = f"{turn['content']}\n{text}" if turn["content"] else text

    def _assistant(self) -> Json:
        if self._turn is None:
            if not self._open_calls:
                self._flush_aside()
            self._turn = {"role": "assistant", "content": None}
        return self._turn

    def _call(self, step: Json, family: str) -> None:
        known: str = step.get("id") or ""
        name = self._name(step, family)
        arguments = encoded(step.get("arguments") or {}).decode()
        if family != "function" and known not in self._answered:
            self._append(f"[Called {name} with {arguments}; no result is known.]")
            return
        identifier = call_id(known)
        self._open_calls.append(identifier)
        call = {"name": name, "arguments": arguments}
        calls: list[Json] = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": identifier, "type": "function", "function": call})

    def _result(self, step: Json, family: str) -> None:
        identifier = call_id(step.get("call_id") or "")
        text, media = _result_content(step)
        if family != "function" and identifier not in self._open_calls:
            self._append(f"[Result of {self._name(step, family)}: {text}]")
            return
        self._end_turn()
        if identifier in self._open_calls:
            self._open_calls.remove(identifier)
        message = {"role": "tool", "tool_call_id": identifier, "content": text}
        self._messages.append(message)
        if media:
            self._aside += [_text(f"From the result of tool call {identifier}:"), *media]

    def _end_turn(self) -> None:
        if self._turn is None:
            return
        blank = self._dialect.blank_reasoning
        if "tool_calls" in self._turn:
            self._turn |= self._reasoning
        if blank is not None and "reasoning_content" not in self._turn:
            self._turn["reasoning_content"] = blank
        self._messages.append(self._turn)
        self._turn, self._reasoning = None, {}

    def _name(self, step: Json, family: str) -> str:
        """A tool name that the model understands, in the vendor's alphabet."""
        name: str = step.get("name") or family
        if family == "mcp_server_tool":
            return mcp_function(step.get("server_name") or "mcp", name)
        return self._dialect.name(name)

    def _flush_aside(self) -> None:
        if self._aside:
            self._messages.append({"role": "user", "content": self._aside})
            self._aside = []


def _is_result(step: Json) -> bool:
    return str(step.get("type", "")).endswith("_result")


def _blocks(step: Json) -> list[Json]:
    content: Any = step.get("content") or []
    return [_text(content)] if isinstance(content, str) else content


def _result_content(step: Json) -> tuple[str, list[Json]]:
    """What the `tool` message says, and the parts that must follow in a user message."""
    result: Any = step.get("result")
    media: list[Json] = []
    if result is None or result == []:
        text = "" if step.get("is_error") else "(no output)"
    elif isinstance(result, str):
        text = result
    elif _is_content(result):
        parts = [_part(block) for block in result]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        media = [part for part in parts if part["type"] != "text"]
    else:
        text = encoded(result).decode()
    if not step.get("is_error"):
        return text, media
    return f"Error: {text}" if text.strip() else FAILED_SILENTLY, media


def _is_content(result: object) -> bool:
    if not isinstance(result, list) or not result:
        return False
    blocks = cast("list[object]", result)
    return all(
        isinstance(block, dict) and cast(Json, block).get("type") in _BLOCKS for block in blocks
    )


def _user_content(blocks: Sequence[Json]) -> str | list[Json]:
    # A bare string where possible: the simplest servers' chat templates take nothing else.
    if len(blocks) == 1 and blocks[0].get("type") == "text":
        return blocks[0].get("text", "")
    return [_part(block) for block in blocks]


def _text(text: str) -> Json:
    return {"type": "text", "text": text}


def _part(block: Json) -> Json:
    """One content block as a part of a user message."""
    match block.get("type"):
        case "text":
            return _text(block.get("text", ""))
        case "image":
            return _image(block)
        case "audio":
            return _audio(block)
        case "document":
            return _document(block)
        case other:
            raise _unsupported("type", str(other))


def _image(block: Json) -> Json:
    data, mime = block.get("data"), block.get("mime_type") or "image/png"
    image = {"url": f"data:{mime};base64,{data}" if data else block.get("uri", "")}
    detail = _DETAIL.get(block.get("resolution") or "")
    if detail:
        image["detail"] = detail
    return {"type": "image_url", "image_url": image}


def _audio(block: Json) -> Json:
    mime, data = _bare_mime(block), block.get("data")
    if mime not in _AUDIO_FORMATS:
        raise _unsupported("mime_type", mime or "audio")
    if not data:
        raise _unsupported("uri", "audio")
    return {"type": "input_audio", "input_audio": {"data": data, "format": _AUDIO_FORMATS[mime]}}


def _document(block: Json) -> Json:
    mime, data = _bare_mime(block), block.get("data")
    if not data:
        raise _unsupported("uri", "document")
    if mime == "application/pdf":
        name = block.get("name") or "document.pdf"
        file = {"filename": name, "file_data": f"data:{mime};base64,{data}"}
        return {"type": "file", "file": file}
    if mime.startswith("text/") or mime in _TEXT_DOCUMENTS:
        try:
            text = base64.b64decode(data).decode(errors="replace")
        except binascii.Error as error:
            raise Invalid("The 'data' of a document is not base64.") from error
        return _text(f'<document mime_type="{mime}">\n{text}\n</document>')
    raise _unsupported("mime_type", mime or "document")


def _bare_mime(block: Json) -> str:
    mime: str = block.get("mime_type") or ""
    return mime.partition(";")[0].strip().lower()


def _unsupported(field: str, value: str) -> Invalid:
    return Invalid(f"The value '{value}' is not supported for 'content.{field}' with this model.")
