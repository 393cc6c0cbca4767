"""A fake Gemini API: `models/{model}:streamGenerateContent` and `:generateContent`."""

import base64
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
from tests.fakes.upstream import FakeUpstream, Received, Reply

_RPC = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
_REASONS = {
    "stop": "STOP",
    "tool_calls": "STOP",
    "max_tokens": "MAX_TOKENS",
    "content_filter": "SAFETY",
}
_COUNTS = {
    "total_input_tokens": "promptTokenCount",
    "total_cached_tokens": "cachedContentTokenCount",
    "total_output_tokens": "candidatesTokenCount",
    "total_thought_tokens": "thoughtsTokenCount",
    "total_tool_use_tokens": "toolUsePromptTokenCount",
    "total_tokens": "totalTokenCount",
}
_DETAILS = {
    "input_tokens_by_modality": "promptTokensDetails",
    "cached_tokens_by_modality": "cacheTokensDetails",
    "output_tokens_by_modality": "candidatesTokensDetails",
    "tool_use_tokens_by_modality": "toolUsePromptTokensDetails",
}


class FakeGemini(FakeUpstream):
    """Speaks Gemini. Like the real one it puts signatures on parts, and grounding at the end."""

    def wants_stream(self, received: Received) -> bool:
        return ":streamGenerateContent" in received.path and "alt=sse" in received.path

    def render(self, reply: Reply, received: Received) -> list[bytes]:
        return [frame(chunk) for chunk in chunks(reply.events)]

    def render_whole(self, reply: Reply, received: Received) -> bytes:
        rendered = chunks(reply.events)
        if ":streamGenerateContent" in received.path:
            return orjson.dumps(rendered)
        parts = [
            part
            for chunk in rendered
            for part in chunk["candidates"][0].get("content", {}).get("parts", ())
        ]
        last = rendered[-1]
        last["candidates"][0]["content"] = {"role": "model", "parts": parts}
        return orjson.dumps(last)

    def render_error(self, reply: Reply) -> bytes:
        return orjson.dumps(error(reply.status, reply.message))

    def render_stream_error(self, reply: Reply) -> bytes:
        return frame(error(reply.error_status, reply.message))


def frame(chunk: Json) -> bytes:
    """One server-sent event, with the line ends that Google sends."""
    return b"data: " + orjson.dumps(chunk) + b"\r\n\r\n"


def error(status: int, message: str) -> Json:
    """An error body."""
    return {"error": {"code": status, "message": message, "status": _RPC.get(status, "UNKNOWN")}}


def chunks(events: Sequence[ModelEvent]) -> list[Json]:
    """The `GenerateContentResponse`s of a turn."""
    script = _Script()
    for event in events:
        script.play(event)
    return script.chunks


class _Script:
    def __init__(self) -> None:
        self.chunks: list[Json] = []
        self._signature: str | None = None
        self._length = 0
        self._block = 0
        self._grounding: dict[str, Any] = {}
        self._urls: list[Json] = []

    def play(self, event: ModelEvent) -> None:  # noqa: C901 - one case an event type
        if not isinstance(event, TextDelta | Annotations):
            self._block = self._length
        match event:
            case TextDelta():
                self._length += len(event.text.encode())
                self._part({"text": event.text})
            case Annotations():
                self._support(event.annotations)
            case ThoughtDelta():
                self._part({"text": event.text, "thought": True})
            case ThoughtSignature():
                self._signature = event.signature
            case Media():
                self._media(event.content)
            case ToolCall(malformed=str()):
                self._chunk(finishReason="MALFORMED_FUNCTION_CALL")
            case ToolCall():
                call = {"name": event.name, "args": event.arguments}
                self._signature = event.signature or self._signature
                self._part({"functionCall": call | ({"id": event.id} if event.id else {})})
            case VendorStep():
                self._vendor_step(event.step)
            case Finished():
                self._finish(event)

    def _part(self, part: Json) -> None:
        if self._signature is not None and not part.get("thought"):
            part["thoughtSignature"] = self._signature
            self._signature = None
        self._chunk(content={"role": "model", "parts": [part]})

    def _chunk(self, usage: Json | None = None, **candidate: Any) -> None:
        self.chunks.append(
            {
                "candidates": [{**candidate, "index": 0}],
                "usageMetadata": usage or {"promptTokenCount": 1, "totalTokenCount": 1},
                "modelVersion": "fake",
                "responseId": "r-1",
            }
        )

    def _media(self, content: Json) -> None:
        if content["type"] != "audio":
            blob = {"mimeType": content["mime_type"], "data": content["data"]}
            self._part({"inlineData": blob})
            return
        pcm = base64.b64decode(content["data"])
        half = len(pcm) // 4 * 2
        for piece in (pcm[:half], pcm[half:]):
            mime_type = f"audio/L16;codec=pcm;rate={content.get('sample_rate', 24000)}"
            data = base64.b64encode(piece).decode()
            self._part({"inlineData": {"mimeType": mime_type, "data": data}})

    def _support(self, annotations: list[Json]) -> None:
        found = self._grounding.setdefault("groundingChunks", [])
        supports = self._grounding.setdefault("groundingSupports", [])
        for note in annotations:
            segment = {
                "startIndex": note["start_index"] + self._block,
                "endIndex": note["end_index"] + self._block,
            }
            supports.append({"segment": segment, "groundingChunkIndices": [len(found)]})
            found.append({"web": {"uri": note["url"], "title": note.get("title", "")}})

    def _vendor_step(self, step: Json) -> None:
        match step["type"]:
            case "code_execution_call":
                code = {"language": "PYTHON", "code": step["arguments"]["code"], "id": step["id"]}
                self._part({"executableCode": code})
            case "code_execution_result":
                outcome = "OUTCOME_FAILED" if step.get("is_error") else "OUTCOME_OK"
                result = {"outcome": outcome, "output": step["result"], "id": step["call_id"]}
                self._part({"codeExecutionResult": result})
            case "google_search_call":
                self._grounding["webSearchQueries"] = step["arguments"]["queries"]
            case "google_search_result":
                html = step["result"][0]["search_suggestions"]
                self._grounding["searchEntryPoint"] = {"renderedContent": html}
            case "url_context_result":
                self._urls += [
                    {
                        "retrievedUrl": one["url"],
                        "urlRetrievalStatus": f"URL_RETRIEVAL_STATUS_{one['status'].upper()}",
                    }
                    for one in step["result"]
                ]
            case _:
                pass

    def _finish(self, event: Finished) -> None:
        fields: Json = {"finishReason": _REASONS[event.reason]}
        if event.message is not None:
            fields["finishMessage"] = event.message
        if self._grounding:
            fields["groundingMetadata"] = self._grounding
        if self._urls:
            fields["urlContextMetadata"] = {"urlMetadata": self._urls}
        if self._signature is not None:
            # What the real one does with a signature that no part is left for.
            part = {"text": "", "thoughtSignature": self._signature}
            fields["content"] = {"role": "model", "parts": [part]}
        usage: Json = {theirs: event.usage.get(ours, 0) for ours, theirs in _COUNTS.items()}
        for ours, theirs in _DETAILS.items():
            if ours in event.usage:
                usage[theirs] = [
                    {"modality": one["modality"].upper(), "tokenCount": one["tokens"]}
                    for one in event.usage[ours]
                ]
        self._chunk(usage=usage, **fields)
