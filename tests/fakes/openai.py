"""A fake of OpenAI's chat completions, streamed and whole."""

from collections.abc import Iterator
from typing import Any

import orjson

from openinteractions.models.port import (
    Annotations,
    Finished,
    Json,
    Media,
    ModelEvent,
    TextDelta,
    ThoughtDelta,
    ToolCall,
)
from tests.fakes.rules import openai_fault
from tests.fakes.upstream import FakeUpstream, Received, Reply

_REASONS = {
    "stop": "stop",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}
_FRAGMENT = 5


class FakeOpenAI(FakeUpstream):
    """`POST /v1/chat/completions` of OpenAI and its many likenesses."""

    base_path = "/v1"

    def fault(self, received: Received) -> str | None:
        return openai_fault(received.json)

    def wants_stream(self, received: Received) -> bool:
        return bool(received.json.get("stream"))

    def render(self, reply: Reply, received: Received) -> list[bytes]:
        chunks = [_delta(received, {"role": "assistant", "content": "", "refusal": None})]
        calls = 0
        for event in reply.events:
            if isinstance(event, ToolCall):
                chunks += [_delta(received, part) for part in _call_deltas(event, calls)]
                calls += 1
            elif isinstance(event, Finished):
                chunks += list(_ending(event, received))
            else:
                chunks.append(_delta(received, _plain_delta(event)))
        return chunks

    def render_whole(self, reply: Reply, received: Received) -> bytes:
        return whole(reply.events, received)

    def render_error(self, reply: Reply) -> bytes:
        kind = "invalid_request_error" if reply.status < 500 else "server_error"
        error = {"message": reply.message, "type": kind, "param": None, "code": None}
        return orjson.dumps({"error": error})

    def render_stream_error(self, reply: Reply) -> bytes:
        kind = "invalid_request_error" if reply.error_status < 500 else "server_error"
        error = {"message": reply.message, "type": kind, "param": None, "code": None}
        return sse({"error": error})


def sse(value: Any) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def chunk(received: Received, choices: list[Json], **fields: Any) -> bytes:
    """One `chat.completion.chunk` event."""
    return sse(
        {
            "id": "chatcmpl-fake",
            "object": "chat.completion.chunk",
            "created": 1_790_000_000,
            "model": received.json.get("model"),
            "system_fingerprint": "fp_fake",
            "choices": choices,
            **fields,
        }
    )


def whole(events: tuple[ModelEvent, ...], received: Received) -> bytes:
    """A completion that was not streamed."""
    message: Json = {"role": "assistant", "content": None, "refusal": None}
    finished = Finished("stop", {})
    for event in events:
        match event:
            case TextDelta(text):
                message["content"] = (message["content"] or "") + text
            case ThoughtDelta(text):
                message["reasoning_content"] = message.get("reasoning_content", "") + text
            case ToolCall():
                calls = message.setdefault("tool_calls", [])
                function = {"name": event.name, "arguments": orjson.dumps(event.arguments).decode()}
                calls.append({"id": event.id, "type": "function", "function": function})
            case Finished():
                finished = event
            case _:
                message |= _plain_delta(event)
    choice = {"index": 0, "message": message, "finish_reason": _REASONS[finished.reason]}
    return orjson.dumps(
        {
            "id": "chatcmpl-fake",
            "object": "chat.completion",
            "created": 1_790_000_000,
            "model": received.json.get("model"),
            "choices": [choice],
            "usage": _usage(finished.usage),
        }
    )


def _delta(received: Received, delta: Json, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return chunk(received, [choice], usage=None)


def _plain_delta(event: ModelEvent) -> Json:
    match event:
        case TextDelta(text):
            return {"content": text}
        case ThoughtDelta(text):
            return {"reasoning_content": text}
        case Annotations(annotations):
            return {"annotations": [_citation(entry) for entry in annotations]}
        case Media({"type": "image"} as content):
            url = f"data:{content['mime_type']};base64,{content['data']}"
            return {"images": [{"type": "image_url", "image_url": {"url": url}}]}
        case Media({"type": "audio"} as content):
            return {"audio": {"id": "audio_1", "data": content["data"]}}
        case _:
            raise NotImplementedError(event)


def _citation(entry: Json) -> Json:
    """Indices are passed as they are: a test says what the vendor counts."""
    fields = {name: value for name, value in entry.items() if name != "type"}
    return {"type": "url_citation", "url_citation": fields}


def _call_deltas(call: ToolCall, index: int) -> Iterator[Json]:
    opening = {"name": call.name, "arguments": ""}
    first = {"index": index, "id": call.id, "type": "function", "function": opening}
    yield {"tool_calls": [first]}
    raw = call.malformed or orjson.dumps(call.arguments).decode()
    for at in range(0, len(raw), _FRAGMENT):
        fragment = {"arguments": raw[at : at + _FRAGMENT]}
        yield {"tool_calls": [{"index": index, "function": fragment}]}


def _ending(event: Finished, received: Received) -> Iterator[bytes]:
    yield _delta(received, {}, _REASONS[event.reason])
    if (received.json.get("stream_options") or {}).get("include_usage"):
        yield chunk(received, [], usage=_usage(event.usage))
    yield b"data: [DONE]\n\n"


def _usage(usage: Json) -> Json:
    def count(name: str) -> int:
        return usage.get(f"total_{name}_tokens", 0)

    completion = count("output") + count("thought")
    return {
        "prompt_tokens": count("input"),
        "completion_tokens": completion,
        "total_tokens": count("input") + completion,
        "prompt_tokens_details": {"cached_tokens": count("cached"), "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": count("thought"), "audio_tokens": 0},
    }
