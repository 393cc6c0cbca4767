"""One Anthropic answer, event by event, as model events."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import orjson

from openinteractions.errors import ModelUnavailable
from openinteractions.models.port import (
    Annotations,
    Finished,
    FinishReason,
    Json,
    ModelEvent,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
    VendorStep,
)
from openinteractions.models.transport import classify

# https://platform.claude.com/docs/en/api/errors
_STATUS: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_REASONS: Final[dict[str, FinishReason]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "max_tokens",
    "model_context_window_exceeded": "max_tokens",
    "refusal": "content_filter",
}
_MESSAGES: Final = {
    "model_context_window_exceeded": "The model's context window is full.",
    "refusal": "The model refused to answer.",
}
_CALLS: Final = {"web_search": "google_search", "web_fetch": "url_context"}
_INPUTS: Final = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)


class Turn:
    """The state of one answer, over all the messages of it that Anthropic paused."""

    def __init__(self, *, show_thoughts: bool, keep_blocks: bool, names: Mapping[str, str]) -> None:
        """Nothing is read yet.

        Args:
            show_thoughts: Whether thoughts are events, or only their signatures.
            keep_blocks: Whether the vendor may want its own words back.
            names: Functions' own names, where the vendor knows them by another.
        """
        self._names = names
        self._show_thoughts = show_thoughts
        self._keep_blocks = keep_blocks
        self._blocks: list[Json] = []
        self._spent: Json = {}
        self._usage: Json = {}
        self._stop: Json = {}
        self._ended = False
        self._length = 0
        self._block: Json = {}
        self._pieces: list[str] = []
        self._citations: list[Json] = []
        self._block_start = 0

    def feed(self, event: Json) -> Iterator[ModelEvent]:
        """Take the next stream event; give the model events that it completes.

        Raises:
            ModelUnavailable: A transient error in the stream.
            ModelRejected: A final error in the stream.
        """
        match event.get("type"):
            case "content_block_delta":
                yield from self._delta(event["delta"])
            case "content_block_start":
                yield from self._open(event["content_block"])
            case "content_block_stop":
                yield from self._close()
            case "message_start":
                self._count(event["message"].get("usage") or {})
            case "message_delta":
                self._count(event.get("usage") or {})
                self._stop = event["delta"]
            case "message_stop":
                self._ended = True
            case "message":
                yield from self._whole(event)
            case "error":
                error = event["error"]
                status = _STATUS.get(error.get("type") or "", 500)
                raise classify(f"The upstream failed: {error.get('message')}", status=status)
            case _:
                pass  # `ping`, and what may be added.

    def is_paused(self) -> bool:
        """Whether Anthropic paused a long turn of its own tools, and wants its words back.

        Raises:
            ModelUnavailable: The stream ended before the answer did.
        """
        self._check_end()
        return self._stop.get("stop_reason") == "pause_turn" and bool(self._blocks)

    def resume(self) -> list[Json]:
        """Begin the next message of this turn; give the assistant's blocks until here."""
        for name, count in self._usage.items():
            self._spent[name] = self._spent.get(name, 0) + count
        self._ended, self._usage, self._stop = False, {}, {}
        return self._blocks

    def finish(self) -> Finished:
        """The last event.

        Raises:
            ModelUnavailable: The stream ended before the answer did.
        """
        self._check_end()
        stop: str = self._stop.get("stop_reason") or ""
        details: Json = self._stop.get("stop_details") or {}
        message = details.get("explanation") or _MESSAGES.get(stop)
        # A turn that is paused over and over is cut there.
        reason = "max_tokens" if stop == "pause_turn" else _REASONS.get(stop, "stop")
        return Finished(reason, self._contract_usage(), message)

    def _check_end(self) -> None:
        if not self._ended:
            raise ModelUnavailable("The upstream's answer broke off.")

    # Blocks -----------------------------------------------------------------------------------

    def _open(self, block: Json) -> Iterator[ModelEvent]:
        self._block = block
        self._pieces = []
        if block["type"] == "text":
            self._citations = list(block.get("citations") or ())
            self._block_start = self._length
            if block.get("text"):
                yield from self._text(block["text"])
        elif block["type"] == "thinking" and block.get("thinking"):
            yield from self._think(block["thinking"])

    def _delta(self, delta: Json) -> Iterator[ModelEvent]:
        match delta["type"]:
            case "text_delta":
                yield from self._text(delta["text"])
            case "thinking_delta":
                yield from self._think(delta["thinking"])
            case "input_json_delta":
                self._pieces.append(delta["partial_json"])
            case "signature_delta":
                self._block["signature"] = delta["signature"]
            case "citations_delta":
                self._citations.append(delta["citation"])
            case _:
                pass

    def _text(self, text: str) -> Iterator[ModelEvent]:
        if text:
            self._length += len(text) if text.isascii() else len(text.encode())
            if self._keep_blocks:
                self._pieces.append(text)
            yield TextDelta(text)

    def _think(self, text: str) -> Iterator[ModelEvent]:
        if self._keep_blocks or not self._show_thoughts:
            self._pieces.append(text)
        if text and self._show_thoughts:
            self._length = 0
            yield ThoughtDelta(text)

    def _close(self) -> Iterator[ModelEvent]:
        block, self._block = self._block, {}
        if block.get("type") == "text":
            yield from self._close_text(block)
        else:
            for event in self._closing(block):
                self._length = 0
                yield event
        if self._keep_blocks and block.get("text") != "":
            self._blocks.append(block)

    def _closing(self, block: Json) -> Iterator[ModelEvent]:
        match block.get("type"):
            case "thinking":
                yield from self._close_thinking(block)
            case "redacted_thinking":
                yield ThoughtSignature(orjson.dumps({"redacted": block["data"]}).decode())
            case "tool_use":
                block["input"], malformed = self._input(block)
                name = self._names.get(block["name"], block["name"])
                yield ToolCall(block.get("id"), name, block["input"], malformed=malformed)
            case _ if (step := self._vendor_step(block)) is not None:
                yield VendorStep({**step, "signature": orjson.dumps(block).decode()})
            case _:
                pass

    def _close_text(self, block: Json) -> Iterator[ModelEvent]:
        if self._keep_blocks:
            block["text"] = "".join(self._pieces)
        if self._citations:
            block["citations"] = self._citations
            yield Annotations([self._annotation(citation) for citation in self._citations])

    def _close_thinking(self, block: Json) -> Iterator[ModelEvent]:
        thinking = block["thinking"] = "".join(self._pieces)
        signature: str = block.get("signature") or ""
        if not signature:
            return
        if not self._show_thoughts:
            # The text is not in the step, but belongs to what the vendor verifies.
            sealed = {"thinking": thinking, "signature": signature}
            signature = orjson.dumps(sealed).decode()
        yield ThoughtSignature(signature)

    def _input(self, block: Json) -> tuple[Json, str | None]:
        raw = "".join(self._pieces)
        if not raw.strip():
            return block.get("input") or {}, None
        try:
            value: Any = orjson.loads(raw)
        except orjson.JSONDecodeError:
            value = None
        return (cast("Json", value), None) if isinstance(value, dict) else ({}, raw)

    # Tools that Anthropic ran -----------------------------------------------------------------

    def _vendor_step(self, block: Json) -> Json | None:
        kind = block.get("type")
        if kind == "server_tool_use" and block.get("name") in _CALLS:
            given = block["input"] = self._input(block)[0]
            step: Json = {"type": f"{_CALLS[block['name']]}_call", "id": block["id"]}
            if block["name"] == "web_search":
                queries = [given["query"]] if "query" in given else []
                return {**step, "search_type": "web_search", "arguments": {"queries": queries}}
            urls = [given["url"]] if "url" in given else []
            return {**step, "arguments": {"urls": urls}}
        if kind == "web_search_tool_result":
            return _search_result(block)
        if kind == "web_fetch_tool_result":
            return _fetch_result(block)
        return None

    def _annotation(self, citation: Json) -> Json:
        where = {"start_index": self._block_start, "end_index": self._length}
        url = citation.get("url") or citation.get("source")
        if url:
            note: Json = {"type": "url_citation", "url": url}
            if citation.get("title"):
                note["title"] = citation["title"]
            return {**note, **where}
        note = {"type": "file_citation", "source": citation.get("cited_text") or ""}
        if citation.get("document_title"):
            note["file_name"] = citation["document_title"]
        if "start_page_number" in citation:
            note["page_number"] = citation["start_page_number"]
        return {**note, **where}

    def _whole(self, message: Json) -> Iterator[ModelEvent]:
        # An upstream that does not stream answers with the message itself.
        self._count(message.get("usage") or {})
        for block in message["content"]:
            yield from self._open(block)
            yield from self._close()
        self._stop = message
        self._ended = True

    # Usage ------------------------------------------------------------------------------------

    def _count(self, usage: Json) -> None:
        # Counts are cumulative over one message.
        for name in (*_INPUTS, "output_tokens"):
            if usage.get(name) is not None:
                self._usage[name] = usage[name]
        details: Json = usage.get("output_tokens_details") or {}
        if details.get("thinking_tokens") is not None:
            self._usage["thinking_tokens"] = details["thinking_tokens"]

    def _contract_usage(self) -> Json:
        def total(name: str) -> int:
            return self._spent.get(name, 0) + self._usage.get(name, 0)

        given, output = sum(map(total, _INPUTS)), total("output_tokens")
        thought = min(total("thinking_tokens"), output)
        return {
            "total_input_tokens": given,
            "total_cached_tokens": total("cache_read_input_tokens"),
            "total_output_tokens": output - thought,
            "total_thought_tokens": thought,
            "total_tool_use_tokens": 0,
            "total_tokens": given + output,
        }


def _search_result(block: Json) -> Json:
    found = block.get("content")
    failed = not isinstance(found, list)
    # The contract knows only Google's suggestions; further keys are ignored by its clients.
    pages = [] if failed else [_page(page) for page in cast("list[Json]", found)]
    return {
        "type": "google_search_result",
        "call_id": block["tool_use_id"],
        "result": pages,
        "is_error": failed,
    }


def _page(page: Json) -> Json:
    return {"title": page.get("title") or "", "url": page.get("url") or ""}


def _fetch_result(block: Json) -> Json:
    found: Json = block.get("content") or {}
    failed = found.get("type") != "web_fetch_result"
    status = "error" if failed else "success"
    return {
        "type": "url_context_result",
        "call_id": block["tool_use_id"],
        "result": [{"url": found.get("url") or "", "status": status}],
        "is_error": failed,
    }
