"""Chat-completions chunks to model events: the part of the OpenAI wire that comes out.

A whole (not streamed) completion is read as one chunk whose `message` is its only delta. Inline
`<think>` tags stay text: only the server's own reasoning fields are thoughts.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from openinteractions.errors import ModelError, ModelUnavailable
from openinteractions.models.openai_reasoning import Reasoning
from openinteractions.models.port import (
    Annotations,
    Finished,
    FinishReason,
    Json,
    Media,
    ModelEvent,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
)
from openinteractions.models.transport import classify

_REASONS: dict[str, FinishReason] = {
    "length": "max_tokens",
    "max_tokens": "max_tokens",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
_STATUS_OF = {
    "invalid_request_error": 400,
    "badrequesterror": 400,
    "context_length_exceeded": 400,
    "exceed_context_size_error": 400,
    "content_policy_violation": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
}
_LOWEST_ERROR, _HIGHEST_ERROR = 400, 599


def explain(body: Any) -> str | None:  # noqa: ANN401 - whatever the upstream sent
    """The human message of an error body, with the vendor's error code where it has one."""
    error: Any = _object(body).get("error") or body
    if isinstance(error, str):
        return error
    error = _object(error)
    message: Any = error.get("message") or error.get("detail")
    if not isinstance(message, str):
        return None if message is None else orjson.dumps(message).decode()
    for name in ("code", "type"):
        code: Any = error.get(name)
        if isinstance(code, str) and code and not code.isdigit() and code not in message:
            return f"{message} ({code})"
    return message


@dataclass(slots=True)
class _Call:
    """A tool call that is still being put together."""

    id: str | None = None
    name: str = ""
    parts: list[str] = field(default_factory=list[str])
    whole: Json | None = None

    def add(self, fragment: Any) -> None:  # noqa: ANN401 - whatever the upstream sent
        if isinstance(fragment, str):
            self.parts.append(fragment)
        elif isinstance(fragment, dict):
            self.whole = cast(Json, fragment)

    def event(self, names: Mapping[str, str]) -> ToolCall:
        raw, name = "".join(self.parts), names.get(self.name, self.name)
        arguments: Any = self.whole
        if arguments is None:
            try:
                arguments = orjson.loads(raw) if raw.strip() else {}
            except orjson.JSONDecodeError:
                arguments = raw
        if arguments is None:
            arguments = {}  # some servers say `null` for a call without arguments
        if not isinstance(arguments, dict) or not self.name:
            return ToolCall(self.id, name, {}, malformed=raw)
        return ToolCall(self.id, name, cast(Json, arguments))


class Turn:
    """Reads the chunks of one turn."""

    def __init__(
        self, *, show_thoughts: bool, keeps_reasoning: bool, names: Mapping[str, str]
    ) -> None:
        """Nothing is read yet.

        Args:
            show_thoughts: Whether thoughts are events.
            keeps_reasoning: Whether those before calls are to be given back: a signature.
            names: Functions' own names, where the server knows them by another.
        """
        self._show_thoughts = show_thoughts
        self._keeps_reasoning = keeps_reasoning
        self._reasoning = Reasoning()
        self._names = names
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._audio = bytearray()
        self._refusal: list[str] = []
        self._reason: str | None = None
        self._usage: Json = {}
        self._begun = False
        self._block: list[str] = []
        self._closed_chars = 0

    def feed(self, chunk: Any) -> Sequence[ModelEvent]:  # noqa: ANN401 - whatever was sent
        """Take the next chunk; return what it says.

        Raises:
            ModelError: The chunk is an error, or nothing that this wire knows.
        """
        if not isinstance(chunk, dict):
            raise ModelUnavailable("The upstream sent an unexpected answer.")
        values = cast(Json, chunk)
        if values.get("error"):
            raise _stream_error(values)
        usage = values.get("usage")
        if usage:
            self._usage = _object(usage)
        choices: Any = values.get("choices")
        if not choices or not isinstance(choices, list):
            return ()
        choice = _object(cast("list[Any]", choices)[0])
        self._begun = True
        self._reason = choice.get("finish_reason") or self._reason
        delta = _object(choice.get("delta") or choice.get("message"))
        content = delta.get("content")
        if len(delta) == 1 and content and isinstance(content, str):  # by far the most frequent
            self._block.append(content)
            return (TextDelta(content),)
        return self._delta(delta)

    def finish(self, *, done: bool) -> Sequence[ModelEvent]:
        """The last events, after the last chunk.

        Args:
            done: The stream's end was marked, so that a missing finish reason is only sloppy.

        Raises:
            ModelUnavailable: The turn is not complete.
        """
        if not self._begun or (self._reason is None and not done):
            raise ModelUnavailable("The upstream's answer ended early.")
        if self._reason == "error":
            raise ModelUnavailable("The upstream broke the answer off with an error.")
        reason = _REASONS.get(self._reason or "", "stop")
        calls = [call.event(self._names) for call in self._calls]
        if reason in ("max_tokens", "content_filter"):
            calls = [call for call in calls if call.malformed is None]
        elif calls:
            reason = "tool_calls"  # Ollama and others say "stop" here
        elif reason == "tool_calls":
            reason = "stop"
        events: list[ModelEvent] = []
        if self._audio:
            events.append(Media(_pcm(bytes(self._audio))))
        sealed = self._reasoning.sealed() if self._keeps_reasoning and calls else None
        if sealed is not None:
            events.append(ThoughtSignature(sealed))
        message = "".join(self._refusal) or None
        return [*events, *calls, Finished(reason, usage_of(self._usage), message)]

    def _delta(self, delta: Json) -> list[ModelEvent]:
        events: list[ModelEvent] = []
        thought = self._reasoning.feed(delta)
        if thought:
            self._think(events, thought)
        self._content(events, delta.get("content"))
        refusal = delta.get("refusal")
        if refusal and isinstance(refusal, str):
            self._refusal.append(refusal)
            self._say(events, refusal)
        if delta.get("annotations"):
            self._cite(events, delta["annotations"])
        for image in _objects(delta.get("images")):
            self._close_block()
            events.append(Media(_picture(_object(image.get("image_url")).get("url") or "")))
        if delta.get("audio"):
            self._hear(events, _object(delta["audio"]))
        for part in _objects(delta.get("tool_calls")):
            self._tool(part)
        if delta.get("function_call"):
            self._tool({"index": 0, "function": delta["function_call"]})
        return events

    def _say(self, events: list[ModelEvent], text: str) -> None:
        self._block.append(text)
        events.append(TextDelta(text))

    def _think(self, events: list[ModelEvent], text: str) -> None:
        if self._show_thoughts:
            self._close_block()
            events.append(ThoughtDelta(text))

    def _content(self, events: list[ModelEvent], content: Any) -> None:  # noqa: ANN401 - JSON
        if isinstance(content, str):
            if content:
                self._say(events, content)
            return
        # Mistral sends a list of parts where it thinks.
        for part in _objects(content):
            if part.get("type") == "text" and part.get("text"):
                self._say(events, part["text"])
            elif part.get("type") == "thinking":
                for piece in _objects(part.get("thinking")):
                    self._think(events, piece.get("text") or "")

    def _close_block(self) -> None:
        self._closed_chars += sum(map(len, self._block))
        self._block.clear()

    def _cite(self, events: list[ModelEvent], annotations: Any) -> None:  # noqa: ANN401 - JSON
        text = "".join(self._block)
        found: list[Json] = []
        for annotation in _objects(annotations):
            cited = _object(annotation.get("url_citation"))
            if not cited.get("url"):
                continue
            citation = {"type": "url_citation", "url": cited["url"]}
            if cited.get("title"):
                citation["title"] = cited["title"]
            start, end = cited.get("start_index"), cited.get("end_index")
            if isinstance(start, int) and isinstance(end, int) and end > self._closed_chars:
                citation["start_index"] = self._bytes_before(text, start)
                citation["end_index"] = self._bytes_before(text, end)
            found.append(citation)
        if found:
            events.append(Annotations(found))

    def _bytes_before(self, text: str, index: int) -> int:
        """The vendor counts characters of the whole message, the contract bytes of the block."""
        return len(text[: max(0, index - self._closed_chars)].encode())

    def _hear(self, events: list[ModelEvent], audio: Json) -> None:
        if audio.get("transcript"):
            self._say(events, audio["transcript"])
        if audio.get("data"):
            try:
                self._audio += base64.b64decode(audio["data"])
            except binascii.Error as error:
                raise ModelUnavailable("The upstream sent broken audio.") from error

    def _tool(self, part: Json) -> None:
        function = _object(part.get("function"))
        call = self._slot(part.get("index"), part.get("id") or None, function.get("name") or "")
        call.id = call.id or part.get("id") or None
        call.name = call.name or function.get("name") or ""
        call.add(function.get("arguments"))

    def _slot(self, index: Any, identifier: str | None, name: str) -> _Call:  # noqa: ANN401 - JSON
        """The call that a fragment belongs to; servers differ in what they leave out."""
        last = self._calls[-1] if self._calls else None
        if isinstance(index, int):
            call = self._by_index.get(index)
            # Some give every call the index 0, each with its own id and name.
            if call and not (identifier and name and call.id and identifier != call.id):
                return call
        elif last and ((identifier and identifier == last.id) or not (identifier or name)):
            return last
        call = _Call()
        self._calls.append(call)
        if isinstance(index, int):
            self._by_index[index] = call
        return call


def usage_of(usage: Json) -> Json:
    """The contract's usage. All zeros where the server told nothing: nothing is estimated."""
    told_input, told_output = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    details_in = _object(usage.get("prompt_tokens_details"))
    details_out = _object(usage.get("completion_tokens_details"))
    cached = _count(details_in, "cached_tokens") or _count(usage, "prompt_cache_hit_tokens")
    thought = _count(details_out, "reasoning_tokens")
    # xAI alone counts thinking beside the completion instead of inside; its total shows it.
    beside = _count(usage, "total_tokens") == told_input + told_output + thought
    output = told_output if beside else max(0, told_output - thought)
    return {
        "total_input_tokens": told_input,
        "total_cached_tokens": cached,
        "total_output_tokens": output,
        "total_thought_tokens": thought,
        "total_tool_use_tokens": 0,
        "total_tokens": told_input + output + thought,
        "input_tokens_by_modality": _modalities(told_input, _count(details_in, "audio_tokens")),
        "output_tokens_by_modality": _modalities(output, _count(details_out, "audio_tokens")),
    }


def _modalities(total: int, audio: int) -> list[Json]:
    audio = min(audio, total)
    text = {"modality": "text", "tokens": total - audio}
    return [text, {"modality": "audio", "tokens": audio}] if audio else [text]


def _count(values: Json, name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else 0


def _stream_error(chunk: Json) -> ModelError:
    error: Any = chunk["error"]
    text = explain(chunk) or "no reason given"
    status = 500
    for name in ("status", "code", "type"):
        value: Any = _object(error).get(name)
        if str(value).isdecimal() and _LOWEST_ERROR <= int(value) <= _HIGHEST_ERROR:
            status = int(value)
            break
        if isinstance(value, str) and value.lower() in _STATUS_OF:
            status = _STATUS_OF[value.lower()]
            break
    return classify(f"The upstream failed in mid-answer: {text}", status=status)


def _picture(url: str) -> Json:
    if not url.startswith("data:"):
        return {"type": "image", "mime_type": "image/png", "uri": url}
    head, _, data = url[5:].partition(",")
    return {"type": "image", "mime_type": head.partition(";")[0] or "image/png", "data": data}


def _pcm(samples: bytes) -> Json:
    # What `format: pcm16` means: https://platform.openai.com/docs/guides/audio
    data = base64.b64encode(samples).decode()
    rate = {"mime_type": "audio/l16", "sample_rate": 24000, "channels": 1}
    return {"type": "audio", **rate, "data": data}


def _object(value: Any) -> Json:  # noqa: ANN401 - whatever the upstream sent
    return cast(Json, value) if isinstance(value, dict) else {}


def _objects(value: Any) -> list[Json]:  # noqa: ANN401 - whatever the upstream sent
    if not isinstance(value, list):
        return []
    return [cast(Json, item) for item in cast("list[Any]", value) if isinstance(item, dict)]
