"""Steps as Gemini `contents`.

A thought's signature belongs to the part that follows it. What Gemini itself ran (a `VendorStep`)
carries its own part, as JSON, for a signature: it goes back verbatim, and `{}` means that Gemini
wants nothing back. Every other server-side step is shown as a function call and its response.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias, cast

import orjson

from openinteractions.errors import Invalid
from openinteractions.models.calls import closed, mcp_function
from openinteractions.models.encoded import encoded
from openinteractions.models.gemini_models import is_old
from openinteractions.models.port import Json

_Kind: TypeAlias = Literal["user", "model", "results"]

# Gemini 3 refuses a call without a signature. This value is its documented way to replay a history
# of other origin: https://ai.google.dev/gemini-api/docs/thought-signatures
_NO_SIGNATURE: Final = "skip_thought_signature_validator"
_NOT_IN_NAMES: Final = re.compile(r"[^a-zA-Z0-9_-]")
_MEDIA: Final = frozenset({"image", "audio", "video", "document"})
_VERBATIM: Final = frozenset({"executableCode", "codeExecutionResult", "toolCall", "toolResponse"})
# https://ai.google.dev/gemini-api/docs/function-calling#multimodal
_RESPONSE_MEDIA: Final = frozenset({"image/png", "image/jpeg", "image/webp", "application/pdf"})
# Nothing that a model could use: the marks of agentic video processing.
_SILENT: Final = frozenset({"processing_call", "processing_result"})
RESULTS_PREFIX: Final = b'{"role":"user","parts":[{"functionResponse":'


def compile_contents(steps: Sequence[Json], model: str) -> list[bytes]:
    """Turn one interaction's steps into contents, each one JSON object.

    Raises:
        Invalid: A content block of a type that Gemini does not know, or without a MIME type.
    """
    old = is_old(model)
    contents = _Contents(wants_signatures="gemini" in model and not old)
    names: dict[str, str] = {}
    for step in closed(steps):
        match step["type"]:
            case "user_input":
                for block in _blocks(step):
                    contents.add("user", _part(block))
            case "model_output":
                _add_output(contents, step)
            case "thought":
                contents.think(step.get("signature"))
            case kind if kind in _SILENT:
                pass
            case str() as kind if kind.endswith("_call"):
                names[step["id"]] = _name(step, kind.removesuffix("_call"))
                _add_call(contents, step, names[step["id"]])
            case _:
                _add_result(contents, step, names, inline_media=not old)
    return contents.close()


def join(messages: Sequence[bytes]) -> bytes:
    """The elements of the `contents` array.

    Gemini counts the responses in the content after a turn of calls, so responses that came in
    with different interactions are put into one content again.
    """
    joined: list[bytes] = []
    for message in messages:
        if joined and message.startswith(RESULTS_PREFIX) and joined[-1].startswith(RESULTS_PREFIX):
            parts = message[RESULTS_PREFIX.index(b"[") + 1 :]
            joined[-1] = joined[-1][:-2] + b"," + parts
        else:
            joined.append(message)
    return b",".join(joined)


def _blocks(step: Json) -> Iterator[Json]:
    """The content blocks of a step; a plain string counts as one text block."""
    content = step.get("content") or ()
    if isinstance(content, str):
        content = ({"type": "text", "text": content},)
    for block in content:
        if block.get("type", "text") != "text" or block["text"]:
            yield block


def _name(step: Json, family: str) -> str:
    # The names that the other adapters use for the same steps; a client's own stays as it is.
    name: str = step.get("name") or family
    if family == "function":
        return name
    if family == "mcp_server_tool":
        return mcp_function(step.get("server_name") or "mcp", name)
    return _NOT_IN_NAMES.sub("_", name)[:64]


class _Contents:
    """Contents under construction: consecutive parts of one kind share a content."""

    def __init__(self, *, wants_signatures: bool) -> None:
        self._wants_signatures = wants_signatures
        self._done: list[bytes] = []
        self._kind: _Kind = "user"
        self._parts: list[Json] = []
        self._after: list[Json] = []
        self._signature: str | None = None

    def add(self, kind: _Kind, part: Json, *, after: Iterable[Json] = ()) -> None:
        """Append a part; `after` goes behind all parts of its content."""
        if kind != "model":
            self._end_thought()
        if kind != self._kind:
            self._flush()
            self._kind = kind
        self._parts.append(part)
        self._after.extend(after)

    def add_signed(self, part: Json, signature: str | None = None) -> None:
        """Append a part of the model; an open thought's signature goes to it or before it."""
        if signature is None:
            signature, self._signature = self._signature, None
        elif self._signature is not None:
            self.add("model", {"text": "", "thoughtSignature": self._signature})
            self._signature = None
        if signature is None and "functionCall" in part and not self._in_calls():
            signature = _NO_SIGNATURE if self._wants_signatures else None
        self.add("model", part if signature is None else {**part, "thoughtSignature": signature})

    def think(self, signature: str | None) -> None:
        """Keep a thought's signature for the part that follows."""
        if signature is not None:
            self._end_thought()
            self._signature = signature

    def drop_thought(self) -> None:
        """Forget the open thought: what it led to is left out."""
        self._signature = None

    def close(self) -> list[bytes]:
        """All contents, as JSON."""
        self._end_thought()
        self._flush()
        return self._done

    def _in_calls(self) -> bool:
        # Only the first of parallel calls carries a signature.
        return self._kind == "model" and bool(self._parts) and "functionCall" in self._parts[-1]

    def _end_thought(self) -> None:
        # A signature may come after the text it belongs to; Gemini takes it in an empty part.
        if self._signature is not None and self._kind == "model" and self._parts:
            self._parts.append({"text": "", "thoughtSignature": self._signature})
        self._signature = None

    def _flush(self) -> None:
        if self._parts:
            role = "model" if self._kind == "model" else "user"
            parts = [*self._parts, *self._after]
            self._done.append(encoded({"role": role, "parts": parts}))
        self._parts, self._after = [], []


def _add_output(contents: _Contents, step: Json) -> None:
    if step.get("error") is not None:
        contents.drop_thought()
        return
    for block in _blocks(step):
        contents.add_signed(_part(block))


def _add_call(contents: _Contents, step: Json, name: str) -> None:
    signature: str | None = step.get("signature") or None
    if signature is not None and signature.startswith("{"):
        _add_verbatim(contents, signature)
        return
    call: Json = {"id": step["id"], "name": name, "args": step.get("arguments") or {}}
    contents.add_signed({"functionCall": call}, signature)


def _add_verbatim(contents: _Contents, signature: str) -> None:
    try:
        part = cast("Json", orjson.loads(signature))
    except orjson.JSONDecodeError:
        return  # A client has put its own words there.
    if _VERBATIM & part.keys():
        contents.add("model", part)


def _add_result(
    contents: _Contents, step: Json, names: dict[str, str], *, inline_media: bool
) -> None:
    signature: str | None = step.get("signature") or None
    if signature is not None and signature.startswith("{"):
        _add_verbatim(contents, signature)
        return
    call_id: str = step["call_id"]
    output, media = _output(step.get("result"))
    name = names.get(call_id) or _name(step, step["type"].removesuffix("_result"))
    response: Json = {
        "id": call_id,
        "name": name,
        "response": {"error" if step.get("is_error") else "output": output},
    }
    inside = [part for part in media if inline_media and _fits_response(part)]
    if inside:
        response["parts"] = inside
    outside = [part for part in media if part not in inside]
    contents.add("results", {"functionResponse": response}, after=outside)


def _output(result: Any) -> tuple[Any, list[Json]]:  # noqa: ANN401 - any JSON value
    if not isinstance(result, list):
        return ("" if result is None else result), []
    items = cast("list[Any]", result)
    if not all(isinstance(item, dict) and item.get("type") in _MEDIA | {"text"} for item in items):  # pyright: ignore[reportUnknownMemberType] - any JSON
        return items, []
    found = cast("list[Json]", items)
    texts = [item["text"] for item in found if item["type"] == "text"]
    return "\n".join(texts), [_part(item) for item in found if item["type"] != "text"]


def _fits_response(part: Json) -> bool:
    return part.get("inlineData", {}).get("mimeType") in _RESPONSE_MEDIA


def _part(block: Json) -> Json:
    kind = block.get("type", "text")
    if kind == "text":
        return _text(block)
    if kind not in _MEDIA:
        raise Invalid(f"The content type '{kind}' is not supported by this model.")
    mime_type = _mime_type(block)
    uri = block.get("uri")
    if block.get("data") is None and uri is not None:
        where = {"fileUri": uri, **({"mimeType": mime_type} if mime_type else {})}
        return {"fileData": where, **_hints(block)}
    if mime_type is None:
        raise Invalid(f"Content of type '{kind}' needs a 'mime_type' for this model.")
    return {"inlineData": {"mimeType": mime_type, "data": block["data"]}, **_hints(block)}


def _text(block: Json) -> Json:
    part: Json = {"text": block["text"]}
    for note in block.get("annotations") or ():
        if note.get("type") == "speech_metadata":
            part["speechMetadata"] = {
                name: note[name] for name in ("speaker", "style") if name in note
            }
    return part


def _mime_type(block: Json) -> str | None:
    mime_type: str | None = block.get("mime_type")
    if mime_type == "audio/l16":
        rate = block.get("sample_rate") or 24_000
        return f"audio/l16;rate={rate};channels={block.get('channels') or 1}"
    return mime_type


def _hints(block: Json) -> Json:
    hints: Json = {}
    if resolution := block.get("resolution"):
        hints["mediaResolution"] = {"level": f"MEDIA_RESOLUTION_{resolution.upper()}"}
    processing = block.get("processing")
    if isinstance(processing, str) and block["type"] == "video":
        hints["mediaProcessing"] = processing.upper()
    elif isinstance(processing, dict):
        options = cast("Json", processing)
        if block["type"] in ("audio", "video"):
            hints[f"{block['type']}Metadata"] = _camel(options)
        if pages := options.get("page_options"):
            hints["documentMetadata"] = _camel(pages)
        if cells := options.get("spreadsheet_options"):
            hints["spreadsheetMetadata"] = _camel(cells)
    return hints


def _camel(options: Json) -> Json:
    camel: Json = {}
    for name, value in options.items():
        if name == "type":
            continue
        head, *tail = name.split("_")
        layers = cast("list[str]", value) if name == "content_layers" else None
        camel[head + "".join(word.title() for word in tail)] = (
            value if layers is None else [layer.upper() for layer in layers]
        )
    return camel
