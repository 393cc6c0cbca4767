"""One Gemini answer, chunk by chunk, as model events."""

import base64
from collections.abc import Iterator
from typing import Final

import orjson

from openinteractions import ids
from openinteractions.errors import ModelRejected, ModelUnavailable
from openinteractions.models.gemini_grounding import Grounding, citations
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
    VendorStep,
)
from openinteractions.models.transport import classify

# The model stumbled over its own syntax; a second try usually works.
_STUMBLES: Final = frozenset(
    {"MALFORMED_FUNCTION_CALL", "MALFORMED_RESPONSE", "UNEXPECTED_TOOL_CALL"}
)
# The request itself leads there, so it would again.
_FINAL: Final = frozenset({"TOO_MANY_TOOL_CALLS", "MISSING_THOUGHT_SIGNATURE"})
_REASONS: Final[dict[str, FinishReason]] = {
    "STOP": "stop",
    "MAX_TOKENS": "max_tokens",
    "CONTINUATION": "max_tokens",
}
_TOOLS: Final = {
    "GOOGLE_SEARCH_WEB": "google_search",
    "GOOGLE_SEARCH_IMAGE": "google_search",
    "URL_CONTEXT": "url_context",
    "GOOGLE_MAPS": "google_maps",
    "FILE_SEARCH": "file_search",
    "MEDIA_PROCESSING": "processing",
}
_COUNTS: Final = {
    "promptTokenCount": "total_input_tokens",
    "cachedContentTokenCount": "total_cached_tokens",
    "candidatesTokenCount": "total_output_tokens",
    "thoughtsTokenCount": "total_thought_tokens",
    "toolUsePromptTokenCount": "total_tool_use_tokens",
}
_DETAILS: Final = {
    "promptTokensDetails": "input_tokens_by_modality",
    "cacheTokensDetails": "cached_tokens_by_modality",
    "candidatesTokensDetails": "output_tokens_by_modality",
    "toolUsePromptTokensDetails": "tool_use_tokens_by_modality",
}
_DEFAULT_STATUS: Final = 500


class Turn:
    """The state of one answer. Offsets are UTF-8 bytes."""

    def __init__(self, *, show_thoughts: bool) -> None:
        self._show_thoughts = show_thoughts
        self._usage: Json = {}
        self._grounding = Grounding()
        self._annotations: list[Json] = []
        self._part_starts: list[int] = []
        self._length = 0
        self._block_start = 0
        self._in_text = False
        self._held: list[str] = []
        self._audio: list[bytes] = []
        self._audio_type = ""
        self._code_id = ""
        self._called = False
        self._reason: FinishReason | None = None
        self._message: str | None = None

    def feed(self, chunk: Json) -> Iterator[ModelEvent]:
        """Take the next chunk; give the events that it completes.

        Raises:
            ModelUnavailable: An error in the stream, or a turn that the model bungled.
            ModelRejected: A final error in the stream.
        """
        if "error" in chunk:
            error = chunk["error"]
            status: int = error.get("code") or _DEFAULT_STATUS
            raise classify(f"The upstream failed: {error.get('message')}", status=status)
        if usage := chunk.get("usageMetadata"):
            self._usage.update(usage)
        candidates = chunk.get("candidates")
        if not candidates:
            self._blocked(chunk.get("promptFeedback") or {})
            return
        candidate: Json = candidates[0]
        self._absorb(candidate)
        self._part_starts.clear()
        content: Json = candidate.get("content") or {}
        for part in content.get("parts") or ():
            self._part_starts.append(self._length)
            yield from self._part(part)
        if self._annotations:
            yield from self._annotate()
        if reason := candidate.get("finishReason"):
            self._stop(reason, candidate.get("finishMessage"))

    def finish(self) -> Iterator[ModelEvent]:
        """The events at the stream's end, `Finished` the last.

        Raises:
            ModelUnavailable: The stream ended before the answer did.
        """
        if self._reason is None:
            raise ModelUnavailable("The upstream's answer broke off.")
        yield from self._annotate()
        yield from self._flush_audio()
        yield from self._grounding.steps(final=True)
        yield from self._close_text()
        reason = "tool_calls" if self._called and self._reason == "stop" else self._reason
        yield Finished(reason, self._contract_usage(), self._message)

    # Parts ------------------------------------------------------------------------------------

    def _part(self, part: Json) -> Iterator[ModelEvent]:
        text: str | None = part.get("text")
        signature: str | None = part.get("thoughtSignature")
        if text is None:
            yield from self._other(part, signature)
        elif part.get("thought"):
            yield from self._thought(text, signature)
        else:
            yield from self._text(text, signature)

    def _text(self, text: str, signature: str | None) -> Iterator[ModelEvent]:
        if self._audio:
            yield from self._flush_audio()
        if signature is not None:
            if self._in_text:
                # A thought here would cut the answer's text in two, so it waits for the end.
                self._held.append(signature)
            else:
                yield ThoughtSignature(signature)
        if not text:
            return
        if not self._in_text:
            yield from self._grounding.steps(final=False)
            self._in_text = True
        self._length += len(text) if text.isascii() else len(text.encode())
        yield TextDelta(text)

    def _thought(self, text: str, signature: str | None) -> Iterator[ModelEvent]:
        if text and self._show_thoughts:
            yield from self._interrupt()
            yield ThoughtDelta(text)
        if signature is not None:
            yield from self._interrupt()
            yield ThoughtSignature(signature)

    def _other(self, part: Json, signature: str | None) -> Iterator[ModelEvent]:
        if "inlineData" in part or "fileData" in part:
            yield from self._media(part, signature)
            return
        yield from self._interrupt()
        if "functionCall" in part:
            call = part["functionCall"]
            self._called = True
            yield ToolCall(call.get("id"), call["name"], call.get("args") or {}, signature)
        elif (step := self._vendor_step(part)) is not None:
            yield VendorStep({**step, "signature": orjson.dumps(part).decode()})
        elif signature is not None:
            yield ThoughtSignature(signature)

    def _interrupt(self) -> Iterator[ModelEvent]:
        yield from self._annotate()
        yield from self._flush_audio()
        yield from self._close_text()

    def _close_text(self) -> Iterator[ModelEvent]:
        self._in_text = False
        self._block_start = self._length
        for signature in self._held:
            yield ThoughtSignature(signature)
        self._held.clear()

    # Media ------------------------------------------------------------------------------------

    def _media(self, part: Json, signature: str | None) -> Iterator[ModelEvent]:
        if part.get("thought"):
            return  # A sketch on the way to the image.
        blob: Json = part.get("inlineData") or part["fileData"]
        mime_type: str = blob.get("mimeType") or "application/octet-stream"
        if self._audio and mime_type != self._audio_type:
            yield from self._flush_audio()
        yield from self._annotate()
        yield from self._close_text()
        if signature is not None:
            yield ThoughtSignature(signature)
        if "data" in blob and mime_type.lower().startswith(("audio/l16", "audio/pcm")):
            self._audio_type = mime_type
            self._audio.append(base64.b64decode(blob["data"]))
            return
        kind = mime_type.partition("/")[0]
        content: Json = {
            "type": kind if kind in ("image", "audio", "video") else "document",
            "mime_type": mime_type.lower(),
        }
        content |= {"data": blob["data"]} if "data" in blob else {"uri": blob["fileUri"]}
        yield Media(content)

    def _flush_audio(self) -> Iterator[ModelEvent]:
        if not self._audio:
            return
        pairs = (field.strip().partition("=") for field in self._audio_type.lower().split(";")[1:])
        fields = {name: value for name, _, value in pairs}
        content: Json = {
            "type": "audio",
            "mime_type": "audio/l16",
            "sample_rate": int(fields.get("rate") or 24_000),
            "channels": int(fields.get("channels") or 1),
            "data": base64.b64encode(b"".join(self._audio)).decode(),
        }
        self._audio.clear()
        yield Media(content)

    # Built-in tools ---------------------------------------------------------------------------

    def _vendor_step(self, part: Json) -> Json | None:
        if "executableCode" in part:
            code = part["executableCode"]
            self._code_id = code.get("id") or ids.call_id()
            language = (code.get("language") or "python").lower()
            arguments = {"language": language, "code": code.get("code") or ""}
            return {"type": "code_execution_call", "id": self._code_id, "arguments": arguments}
        if "codeExecutionResult" in part:
            result = part["codeExecutionResult"]
            return {
                "type": "code_execution_result",
                "call_id": result.get("id") or self._code_id,
                "result": result.get("output") or "",
                "is_error": result.get("outcome") != "OUTCOME_OK",
            }
        if "toolCall" in part:
            return self._tool_call(part["toolCall"])
        if "toolResponse" in part:
            return self._tool_response(part["toolResponse"])
        return None

    def _tool_call(self, call: Json) -> Json | None:
        tool = _TOOLS.get(call.get("toolType") or "")
        if tool is None:
            return None
        # What the grounding metadata will repeat of this tool is no second call.
        self._grounding.told.add(tool)
        step: Json = {"type": f"{tool}_call", "id": call.get("id") or ids.call_id()}
        if tool == "google_search":
            image = call["toolType"] == "GOOGLE_SEARCH_IMAGE"
            self._grounding.told.add("image_search")
            step["search_type"] = "image_search" if image else "web_search"
        if tool not in ("file_search", "processing"):
            step["arguments"] = call.get("args") or {}
        return step

    def _tool_response(self, response: Json) -> Json | None:
        tool = _TOOLS.get(response.get("toolType") or "")
        if tool is None:
            return None
        step: Json = {"type": f"{tool}_result", "call_id": response.get("id") or ""}
        if tool not in ("file_search", "processing"):
            result = response.get("response")
            step["result"] = [result] if result else []
        return step

    def _absorb(self, candidate: Json) -> None:
        if grounding := candidate.get("groundingMetadata"):
            self._annotations += self._grounding.absorb(grounding)
        if urls := candidate.get("urlContextMetadata"):
            self._grounding.absorb_urls(urls)
        if cited := candidate.get("citationMetadata"):
            self._annotations += citations(cited)

    def _annotate(self) -> Iterator[ModelEvent]:
        if not (self._annotations and self._in_text):
            return
        ready: list[Json] = []
        later: list[Json] = []
        for found in self._annotations:
            annotation = {**found}
            # Chunks of one text part count as that part, so only a whole answer has more.
            part: int = annotation.pop("part")
            base = self._part_starts[part] if 0 < part < len(self._part_starts) else 0
            annotation["start_index"] += base - self._block_start
            annotation["end_index"] += base - self._block_start
            if annotation["end_index"] > self._length - self._block_start:
                later.append(found)
            elif annotation["start_index"] >= 0 and annotation not in ready:
                ready.append(annotation)
        self._annotations = later
        if ready:
            yield Annotations(ready)

    # The end ----------------------------------------------------------------------------------

    def _blocked(self, feedback: Json) -> None:
        if reason := feedback.get("blockReason"):
            self._reason = "content_filter"
            self._message = (
                feedback.get("blockReasonMessage") or f"The prompt was blocked: {reason}."
            )

    def _stop(self, reason: str, message: str | None) -> None:
        text = message or f"The model stopped: {reason}."
        if reason in _STUMBLES:
            raise ModelUnavailable(text)
        if reason in _FINAL:
            raise ModelRejected(text)
        self._reason = _REASONS.get(reason, "content_filter")
        self._message = text if self._reason == "content_filter" else message

    def _contract_usage(self) -> Json:
        raw = self._usage
        usage: Json = {ours: raw.get(theirs) or 0 for theirs, ours in _COUNTS.items()}
        apart = ("total_input_tokens", "total_output_tokens")
        apart += ("total_thought_tokens", "total_tool_use_tokens")
        usage["total_tokens"] = raw.get("totalTokenCount") or sum(usage[name] for name in apart)
        for theirs, ours in _DETAILS.items():
            if details := raw.get(theirs):
                usage[ours] = [
                    {"modality": one["modality"].lower(), "tokens": one.get("tokenCount") or 0}
                    for one in details
                ]
        if counts := self._grounding.counts():
            usage["grounding_tool_count"] = counts
        return usage
