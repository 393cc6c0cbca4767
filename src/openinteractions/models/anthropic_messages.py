"""Steps as Anthropic `messages`.

A thought's signature has one of three forms, all made by `anthropic_stream`:

- Anthropic's own text: the block's `thinking` is the step's summary, since that was shown;
- `{"thinking", "signature"}`: the summary was not asked for, but Anthropic verifies the text too;
- `{"redacted"}`: a block that only Anthropic can read.

What Anthropic itself ran (a `VendorStep`) has its own block, as JSON, for a signature, and goes
back verbatim. Every other server-side step is shown as a tool use and its result.
"""

import base64
import binascii
import hashlib
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias, cast

import orjson

from openinteractions.errors import Invalid
from openinteractions.models.calls import FAILED_SILENTLY, closed, function_name, mcp_function
from openinteractions.models.encoded import encoded
from openinteractions.models.port import Json

_Role: TypeAlias = Literal["user", "assistant"]

_IMAGES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
_TEXT_DOCUMENTS: Final = frozenset({"application/json", "application/xml", "application/csv"})
_PDF: Final = "application/pdf"
_CONTENT: Final = frozenset({"text", "image", "document"})
_VERBATIM: Final = frozenset({"server_tool_use", "web_search_tool_result", "web_fetch_tool_result"})
_NOT_IN_IDS: Final = re.compile(r"[^a-zA-Z0-9_-]")
_MAX_ID: Final = 64
_ASSISTANT: Final = b'{"role":"assistant"'
_USER: Final = b'{"role":"user"'
_USE: Final = b'{"type":"tool_use","id":"'
_USE_ID: Final = re.compile(re.escape(_USE) + b'([a-zA-Z0-9_-]+)"')
_URL_SAFE: Final = str.maketrans("-_", "+/")
_SILENT: Final = frozenset({"processing_call", "processing_result"})
RESULTS_PREFIX: Final = b'{"role":"user","content":[{"type":"tool_result"'
_CACHED: Final = b',"cache_control":{"type":"ephemeral"}}]}'


def compile_messages(steps: Sequence[Json]) -> list[bytes]:
    """Turn one interaction's steps into messages, each one JSON object.

    Raises:
        Invalid: Content that Anthropic does not take: audio, video, other files than PDF and text.
    """
    messages = _Messages()
    for step in closed(steps):
        match step["type"]:
            case "user_input":
                for block in _blocks(step):
                    messages.add("user", content(block))
            case "model_output":
                _add_output(messages, step)
            case "thought":
                _add_thought(messages, step)
            case kind if kind in _SILENT:
                pass
            case str() as kind if kind.endswith("_call"):
                _add_call(messages, step)
            case _:
                _add_result(messages, step)
    return messages.close()


def join(messages: Sequence[bytes], *, cache: bool) -> bytes:
    """The elements of the `messages` array.

    Tool results that came in with different interactions are put into one message again, since
    all uses of a turn must be answered together. Each use has an id of its own. With `cache`, the
    conversation so far is marked to be kept in the prompt cache.
    """
    joined: list[bytes] = []
    for message in messages:
        if joined and message.startswith(RESULTS_PREFIX) and joined[-1].startswith(_USER):
            joined[-1] = _answered_together(joined[-1], message)
        else:
            joined.append(message)
    joined = _distinct(joined)
    if cache and joined and joined[-1].startswith(_USER):
        joined[-1] = joined[-1].removesuffix(b"}]}") + _CACHED
    return b",".join(joined)


def tools_used(messages: Sequence[bytes]) -> list[str]:
    """The names of the tools that a conversation uses, each once."""
    names = [
        block["name"]
        for message in messages
        if message.startswith(_ASSISTANT) and _USE in message
        for block in orjson.loads(message)["content"]
        if block["type"] == "tool_use"
    ]
    return list(dict.fromkeys(names))


def _answered_together(first: bytes, second: bytes) -> bytes:
    """Two messages as one, in which all results stand before whatever else is in them."""
    blocks: list[Json] = [*orjson.loads(first)["content"], *orjson.loads(second)["content"]]
    blocks.sort(key=lambda block: block["type"] != "tool_result")
    return orjson.dumps({"role": "user", "content": blocks})


def _distinct(messages: list[bytes]) -> list[bytes]:
    """The messages with no id in two uses: Anthropic refuses that also in different turns.

    Our own calls have ids of their own; those of older rows and of a client's steps may not.
    """
    found = [
        name
        for message in messages
        if message.startswith(_ASSISTANT)
        for name in _USE_ID.findall(message)
    ]
    if len(set(found)) == len(found):
        return messages
    told = {name.decode() for name in found}
    used: set[str] = set()
    waiting: defaultdict[str, deque[str]] = defaultdict(deque)
    parsed: list[Json] = [orjson.loads(message) for message in messages]
    for block in (block for message in parsed for block in message["content"]):
        if block["type"] == "tool_use":
            given: str = block["id"]
            count = 1
            while block["id"] in used:
                count += 1
                fresh = _cut_id(given, f"{given}\0{count}")
                block["id"] = given if fresh in told else fresh
            used.add(block["id"])
            waiting[given].append(block["id"])
        elif block["type"] == "tool_result" and waiting[block["tool_use_id"]]:
            # The oldest use that waits: results come in the order of their calls.
            block["tool_use_id"] = waiting[block["tool_use_id"]].popleft()
    return [orjson.dumps(message) for message in parsed]


def takes_uri(content_type: str, uri: str) -> bool:
    """Anthropic fetches images and PDF files over https."""
    path = uri.partition("?")[0].lower()
    if content_type == "document" and not path.endswith(".pdf"):
        return False
    return content_type in ("image", "document") and uri.startswith("https://")


def content(block: Json) -> Json:
    """A contract content block as Anthropic's."""
    kind = block.get("type", "text")
    if kind not in _CONTENT:
        raise Invalid(f"The content type '{kind}' is not supported by this model.")
    if kind == "text":
        return {"type": "text", "text": block["text"]}
    source = _source(kind, block)
    return {"type": kind, "source": source}


class _Messages:
    """Messages under construction: consecutive blocks of one role share a message."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._role: _Role = "user"
        self._results: list[Json] = []
        self._blocks: list[Json] = []
        self._aside: list[Json] = []

    def add(self, role: _Role, block: Json) -> None:
        self._turn(role)
        self._blocks.append(block)

    def add_result(self, block: Json) -> None:
        """Results come first in their message: Anthropic wants them right behind the uses."""
        self._turn("user")
        self._results.append(block)

    def show(self, block: Json, *, why: str = "The image that you made:") -> None:
        """Keep what cannot stand where it was made for the next user message."""
        self._aside += [{"type": "text", "text": why}, block]

    def drop_thoughts(self) -> None:
        """Take back thoughts that nothing follows: no assistant message may end in one."""
        while self._role == "assistant" and self._blocks and _is_thought(self._blocks[-1]):
            self._blocks.pop()

    def close(self) -> list[bytes]:
        if self._aside:
            self._turn("user")
        self._flush()
        return self._done

    def _turn(self, role: _Role) -> None:
        if role != self._role:
            self._flush()
            self._role = role

    def _flush(self) -> None:
        self.drop_thoughts()
        blocks = [*self._results, *self._blocks]
        if self._role == "user":
            blocks = [*self._results, *self._aside, *self._blocks]
            self._aside = []
        if blocks:
            self._done.append(encoded({"role": self._role, "content": blocks}))
        self._results, self._blocks = [], []


def _is_thought(block: Json) -> bool:
    return block["type"] in ("thinking", "redacted_thinking")


def _blocks(step: Json) -> Iterator[Json]:
    found = step.get("content") or ()
    if isinstance(found, str):
        found = ({"type": "text", "text": found},)
    for block in found:
        # Anthropic refuses text blocks that show nothing.
        if block.get("type", "text") != "text" or block["text"].strip():
            yield block


def _add_output(messages: _Messages, step: Json) -> None:
    if step.get("error") is not None:
        # What led to a broken answer goes with it.
        messages.drop_thoughts()
        return
    for block in _blocks(step):
        if block.get("type", "text") == "text":
            messages.add("assistant", content(block))
        else:
            messages.show(content(block))


def _add_thought(messages: _Messages, step: Json) -> None:
    signature: str = step.get("signature") or ""
    if not signature:
        return
    if not signature.startswith("{"):
        texts = [item.get("text", "") for item in step.get("summary") or ()]
        block: Json = {"type": "thinking", "thinking": "".join(texts), "signature": signature}
    else:
        sealed = _unsealed(signature)
        if "redacted" in sealed:
            block = {"type": "redacted_thinking", "data": sealed["redacted"]}
        elif "signature" in sealed:
            block = {"type": "thinking", "thinking": "", **sealed}
        else:
            return
    messages.add("assistant", block)


def _add_call(messages: _Messages, step: Json) -> None:
    if not _add_verbatim(messages, step):
        messages.add(
            "assistant",
            {
                "type": "tool_use",
                "id": _wire_id(step["id"]),
                "name": _name(step, step["type"].removesuffix("_call")),
                "input": step.get("arguments") or {},
            },
        )


def _name(step: Json, family: str) -> str:
    # The names that the other adapters use for the same steps.
    name: str = step.get("name") or family
    if family == "mcp_server_tool":
        return mcp_function(step.get("server_name") or "mcp", name)
    return function_name(name)


def _add_result(messages: _Messages, step: Json) -> None:
    if _add_verbatim(messages, step):
        return
    identifier = _wire_id(step["call_id"])
    block: Json = {"type": "tool_result", "tool_use_id": identifier}
    told = _result_content(step.get("result"))
    if step.get("is_error"):
        block["is_error"] = True
        told = _error_content(messages, told, identifier)
    if told:
        block["content"] = told
    messages.add_result(block)


def _error_content(
    messages: _Messages, told: str | list[Json], identifier: str
) -> str | list[Json]:
    """What an error says: text, and never nothing. All else is shown behind the results."""
    if isinstance(told, str):
        return told or FAILED_SILENTLY
    for block in told:
        if block["type"] != "text":
            messages.show(block, why=f"From the failed call {identifier}:")
    return [block for block in told if block["type"] == "text"] or FAILED_SILENTLY


def _add_verbatim(messages: _Messages, step: Json) -> bool:
    signature: str = step.get("signature") or ""
    if not signature.startswith("{"):
        return False
    block = _unsealed(signature)
    if block.get("type") in _VERBATIM:
        messages.add("assistant", block)
    return True


def _unsealed(signature: str) -> Json:
    try:
        return cast("Json", orjson.loads(signature))
    except orjson.JSONDecodeError:
        return {}  # A client has put its own words there.


def _wire_id(call_id: str) -> str:
    """An id that the vendor takes, always the same for a call and another one for each."""
    readable = _NOT_IN_IDS.sub("_", call_id)
    if readable == call_id and len(call_id) <= _MAX_ID:
        return call_id
    return _cut_id(readable, call_id)


def _cut_id(readable: str, whole: str) -> str:
    digest = hashlib.blake2b(whole.encode(), digest_size=6).hexdigest()
    return f"{readable[: _MAX_ID - len(digest) - 1]}_{digest}"


def _result_content(result: Any) -> str | list[Json]:  # noqa: ANN401 - any JSON value
    """What a result says; nothing where that is blank: Anthropic refuses it."""
    if result is None or isinstance(result, str):
        return result if result and result.strip() else ""
    if isinstance(result, list):
        items = cast("list[Any]", result)
        if all(isinstance(one, dict) and one.get("type") in _CONTENT for one in items):  # pyright: ignore[reportUnknownMemberType] - any JSON
            return [content(block) for block in _blocks({"content": items})]
    return encoded(result).decode()


def _source(kind: str, block: Json) -> Json:
    mime_type: str | None = block.get("mime_type")
    if block.get("data") is None:
        if kind == "document" and mime_type not in (None, _PDF):
            raise Invalid(f"A document of type '{mime_type}' is not supported by this model.")
        return {"type": "url", "url": block["uri"]}
    data: str = block["data"]
    if kind == "document" and _is_text(mime_type):
        return {"type": "text", "media_type": "text/plain", "data": _decoded(data)}
    if mime_type not in (_IMAGES if kind == "image" else {_PDF}):
        article = "An image" if kind == "image" else "A document"
        raise Invalid(f"{article} of type '{mime_type}' is not supported by this model.")
    if "-" in data or "_" in data:
        data = data.translate(_URL_SAFE)
    return {"type": "base64", "media_type": mime_type, "data": data}


def _is_text(mime_type: str | None) -> bool:
    return mime_type is not None and (mime_type.startswith("text/") or mime_type in _TEXT_DOCUMENTS)


def _decoded(data: str) -> str:
    try:
        return base64.b64decode(data.translate(_URL_SAFE), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise Invalid("A text document is not base64 of UTF-8 text.") from error
