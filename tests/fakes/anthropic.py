"""A fake Anthropic API: `/v1/messages`, streamed or whole."""

from collections.abc import Sequence
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
    ThoughtSignature,
    ToolCall,
    VendorStep,
)
from tests.fakes.rules import anthropic_fault
from tests.fakes.upstream import FakeUpstream, Received, Reply

SIGNATURE = "ZmFrZQ=="
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "max_tokens": "max_tokens",
    "content_filter": "refusal",
}


class FakeAnthropic(FakeUpstream):
    """Speaks the Messages API. Like the real one it signs every thought, and is strict."""

    def fault(self, received: Received) -> str | None:
        return anthropic_fault(received.json)

    def wants_stream(self, received: Received) -> bool:
        return bool(received.json.get("stream"))

    def render(self, reply: Reply, received: Received) -> list[bytes]:
        return [frame(event) for event in stream_events(reply.events)]

    def render_whole(self, reply: Reply, received: Received) -> bytes:
        message: Json = {}
        for event in stream_events(reply.events):
            match event["type"]:
                case "message_start":
                    message = event["message"]
                case "content_block_start":
                    message["content"].append(event["content_block"])
                    pieces = ""
                case "content_block_delta":
                    pieces = _grow(message["content"][-1], event["delta"], pieces)
                case "message_delta":
                    message |= event["delta"]
                    message["usage"] |= event["usage"]
                case _:
                    pass
        return orjson.dumps(message)

    def render_error(self, reply: Reply) -> bytes:
        return orjson.dumps(error(reply.status, reply.message))

    def render_stream_error(self, reply: Reply) -> bytes:
        return frame(error(reply.error_status, reply.message))


def frame(event: Json) -> bytes:
    """One server-sent event."""
    return b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


def error(status: int, message: str) -> Json:
    """An error body, which is an event in a stream as well."""
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


def stream_events(script: Sequence[ModelEvent]) -> list[Json]:
    """The stream events of a turn."""
    finished = next((one for one in script if isinstance(one, Finished)), None)
    writer = _Script(finished.usage if finished else {})
    for event in script:
        writer.play(event)
    return writer.events


class _Script:
    def __init__(self, usage: Json) -> None:
        cached = usage.get("total_cached_tokens", 0)
        given = {
            "input_tokens": usage.get("total_input_tokens", 0) - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": 1,
        }
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "fake",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": given,
        }
        self.events: list[Json] = [{"type": "message_start", "message": message}]
        self._index = -1
        self._open = ""
        self._signed = False

    def play(self, event: ModelEvent) -> None:
        match event:
            case TextDelta():
                self._in("text", text="")
                self._delta("text_delta", text=event.text)
            case Annotations():
                for note in event.annotations:
                    self._cite(note)
                self._close()
            case ThoughtDelta():
                self._in("thinking", thinking="", signature="")
                self._delta("thinking_delta", thinking=event.text)
            case ThoughtSignature():
                self._in("thinking", thinking="", signature="")
                self._close(signature=event.signature)
            case ToolCall():
                self._tool(event)
            case VendorStep():
                self._vendor_step(event.step)
            case Finished():
                self._finish(event)
            case Media():
                raise AssertionError("Anthropic makes no media")

    def _emit(self, kind: str, **fields: Any) -> None:
        self.events.append({"type": kind, **fields})

    def _in(self, kind: str, **fields: Any) -> None:
        if self._open == kind:
            return
        self._close()
        self._index += 1
        self._open = kind
        block = {"type": kind, **fields}
        self._emit("content_block_start", index=self._index, content_block=block)
        if self._index == 0:
            self._emit("ping")

    def _delta(self, kind: str, **fields: Any) -> None:
        self._emit("content_block_delta", index=self._index, delta={"type": kind, **fields})

    def _close(self, signature: str = SIGNATURE) -> None:
        if self._open == "thinking":
            self._delta("signature_delta", signature=signature)
        if self._open:
            self._emit("content_block_stop", index=self._index)
        self._open = ""

    def _cite(self, note: Json) -> None:
        citation = {
            "type": "web_search_result_location",
            "url": note["url"],
            "title": note.get("title"),
            "cited_text": "…",
            "encrypted_index": "RW5j",
        }
        self._delta("citations_delta", citation=citation)

    def _whole(self, kind: str, **fields: Any) -> None:
        self._close()
        self._in(kind, **fields)

    def _tool(self, call: ToolCall) -> None:
        self._whole("tool_use", id=call.id or f"toolu_{self._index}", name=call.name, input={})
        raw = call.malformed or (orjson.dumps(call.arguments).decode() if call.arguments else "")
        self._delta("input_json_delta", partial_json="")
        for at in range(0, len(raw), 9):
            self._delta("input_json_delta", partial_json=raw[at : at + 9])
        self._close()

    def _vendor_step(self, step: Json) -> None:
        match step["type"]:
            case "google_search_call":
                self._whole("server_tool_use", id=step["id"], name="web_search", input={})
                query = orjson.dumps({"query": step["arguments"]["queries"][0]}).decode()
                self._delta("input_json_delta", partial_json=query)
            case "google_search_result":
                pages = [
                    {"type": "web_search_result", "encrypted_content": "RW5j", **page}
                    for page in step["result"]
                ]
                self._whole("web_search_tool_result", tool_use_id=step["call_id"], content=pages)
            case "url_context_call":
                self._whole("server_tool_use", id=step["id"], name="web_fetch", input={})
                url = orjson.dumps({"url": step["arguments"]["urls"][0]}).decode()
                self._delta("input_json_delta", partial_json=url)
            case "url_context_result":
                source = {"type": "text", "media_type": "text/plain", "data": "page"}
                document = {"type": "document", "source": source}
                url = step["result"][0]["url"]
                page = {"type": "web_fetch_result", "url": url, "content": document}
                self._whole("web_fetch_tool_result", tool_use_id=step["call_id"], content=page)
            case kind:
                raise AssertionError(f"Anthropic has no {kind}")
        self._close()

    def _finish(self, event: Finished) -> None:
        self._close()
        thought = event.usage.get("total_thought_tokens", 0)
        usage: Json = {"output_tokens": event.usage.get("total_output_tokens", 0) + thought}
        if thought:
            usage["output_tokens_details"] = {"thinking_tokens": thought}
        delta: Json = {"stop_reason": _REASONS[event.reason], "stop_sequence": None}
        if event.message is not None:
            delta["stop_details"] = {"type": "refusal", "explanation": event.message}
        self._emit("message_delta", delta=delta, usage=usage)
        self._emit("message_stop")


def _grow(block: Json, delta: Json, pieces: str) -> str:
    match delta["type"]:
        case "text_delta":
            block["text"] += delta["text"]
        case "thinking_delta":
            block["thinking"] += delta["thinking"]
        case "signature_delta":
            block["signature"] = delta["signature"]
        case "citations_delta":
            block.setdefault("citations", []).append(delta["citation"])
        case _:
            pieces += delta["partial_json"]
            if pieces.endswith("}"):
                block["input"] = orjson.loads(pieces)
    return pieces
