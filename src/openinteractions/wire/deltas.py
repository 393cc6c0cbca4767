"""A step as the start and deltas of a stream, and back.

The deltas of a finished step are as few as they can be: a text is one delta. Merging joins what
follows without a boundary on the wire (texts, chunks of raw audio), so `joined` says which form of
a step comes back.
"""

import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

import orjson

from openinteractions.wire.fields import Json

_MEDIA = frozenset({"image", "audio", "document", "video"})
_SPOKEN = frozenset({"model_output", "user_input"})
_CARRIED = ("arguments", "result", "is_error", "signature")
# The delta types of these steps also need the names. The schema of this one has no `call_id`, but
# google-adk 2.13 reads it from there, and breaks off without (`models/interactions_utils.py`).
_NAMED = {
    "function_result": ("name", "call_id"),
    "mcp_server_tool_call": ("name", "server_name"),
    "mcp_server_tool_result": ("name", "server_name"),
}
_CODE_RESULT = "code_execution_result"
# The SDK's delta types of these steps require a result, whatever the step has.
_RESULT_REQUIRED: Mapping[str, object] = {_CODE_RESULT: "", "file_search_result": []}
AT_STOP: Final = ("usage", "step_usage")
"""Keys of a step that a stream shows with its `step.stop`: they are known only then."""
# Formats whose chunks can be put one behind the other; a WAV file has a header.
_CHUNKED_AUDIO = ("audio/l16", "audio/pcm", "audio/alaw", "audio/mulaw", "audio/mp3", "audio/mpeg")


def step_skeleton(step: Json) -> Json:
    """The step as `step.start` shows it: all that its deltas and its end do not bring."""
    step = {key: value for key, value in step.items() if key not in AT_STOP}
    kind = step["type"]
    if kind in _SPOKEN:
        return _without_list(step, "content")
    if kind == "thought":
        return _without_list({k: v for k, v in step.items() if k != "signature"}, "summary")
    if kind == "function_call":
        return {**step, "arguments": {}}
    return {
        key: _emptied(kind, key, value) if key in _CARRIED else value
        for key, value in step.items()
        if key != "is_error"
    }


def step_deltas(step: Json) -> list[Json]:
    """The whole step as deltas, for replay of a finished one."""
    kind = step["type"]
    if kind in _SPOKEN:
        return _content_deltas(_blocks(step, "content"))
    if kind == "thought":
        deltas = [
            {"type": "thought_summary", "content": block}
            for block in joined_blocks(_blocks(step, "summary"))
        ]
        if "signature" in step:
            deltas.append({"type": "thought_signature", "signature": step["signature"]})
        return deltas
    if kind == "function_call":
        arguments = orjson.dumps(step["arguments"]).decode()
        return [{"type": "arguments_delta", "arguments": arguments}]
    keys = (*_CARRIED, *_NAMED.get(kind, ()))
    carried = {key: step[key] for key in keys if key in step}
    if kind in _RESULT_REQUIRED:
        carried = {"result": _RESULT_REQUIRED[kind], **carried}
    return [{"type": kind, **_with_blocks_apart(kind, carried)}]


def units(delta: Json) -> int:
    """How far a delta moves the position in its step: characters of streamed text, else one."""
    text = _streamed_text(delta)
    return 1 if text is None else len(text)


def pieces(delta: Json, max_chars: int) -> Iterator[Json]:
    """A delta in pieces that a reader can resume between; only an answer's text is cut."""
    text = _streamed_text(delta) if delta["type"] == "text" else None
    if text is None or len(text) <= max_chars:
        yield delta
        return
    for start in range(0, len(text), max_chars):
        yield {**delta, "text": text[start : start + max_chars]}


def rest(delta: Json, chars: int) -> Json:
    """What a reader still lacks of a delta: the last so many characters of its text."""
    text = _streamed_text(delta)
    if text is None or chars >= len(text):
        return delta
    lacking = text[-chars:]
    if delta["type"] == "text":
        return {**delta, "text": lacking}
    return {**delta, "content": {**delta["content"], "text": lacking}}


def _streamed_text(delta: Json) -> str | None:
    """The text of a delta that counts by its characters."""
    holder = cast(
        "Json", delta.get("content") or {} if delta["type"] == "thought_summary" else delta
    )
    text = holder.get("text")
    return text if holder.get("type") == "text" and isinstance(text, str) else None


def merge(step: Json, delta: Json) -> None:
    """Add a delta to the step that began as a skeleton, in place. The delta is not changed.

    Fragments of arguments are kept as text until they are a whole JSON object.
    """
    match delta["type"]:
        case "text" | "image" | "audio" | "document" | "video" if step["type"] in _SPOKEN:
            _append(_list_of(step, "content"), delta)
        case "text_annotation_delta":
            _annotate(_list_of(step, "content"), delta.get("annotations", []))
        case "thought_summary":
            if "content" in delta:
                _append(_list_of(step, "summary"), delta["content"])
        case "arguments_delta":
            _add_arguments(step, delta.get("arguments", ""))
        case _:
            _overwrite(step, delta)


def joined(step: Json) -> Json:
    """The step with what merging cannot keep apart put together: neighbouring texts, raw audio."""
    for key in ("content", "summary"):
        if key in step and isinstance(step[key], list):
            step = {**step, key: joined_blocks(step[key])}
    return step


def joined_blocks(blocks: Sequence[Json]) -> list[Json]:
    """Content blocks with neighbouring texts, and chunks of raw audio, put together.

    Annotations move with their text.
    """
    together: list[Json] = []
    for block in blocks:
        annotations = block.get("annotations")
        if block["type"] == "text" and annotations and together and _is_text(together[-1]):
            shift = len(together[-1]["text"].encode())
            block = {**block, "annotations": [_moved(item, shift) for item in annotations]}  # noqa: PLW2901
        _append(together, block)
    return together


def _is_text(block: Json) -> bool:
    return block["type"] == "text"


def _blocks(step: Json, key: str) -> list[Json]:
    value = step.get(key)
    return cast("list[Json]", value) if isinstance(value, list) else []


def _without_list(step: Json, key: str) -> Json:
    """The step without the list, unless it is empty: no delta would bring that back."""
    return {k: v for k, v in step.items() if k != key or not isinstance(v, list) or not v}


def _emptied(kind: str, key: str, value: Any) -> Any:  # noqa: ANN401 - any JSON
    if value is None or (kind == _CODE_RESULT and key == "result"):
        return ""
    return type(value)()


def _with_blocks_apart(kind: str, carried: Json) -> Json:
    """The fields of a delta whose `result` can be a string only, its blocks beside it."""
    result = carried.get("result")
    if kind != _CODE_RESULT or not isinstance(result, list):
        return carried
    blocks = cast("list[Json]", result)
    text = "".join(block.get("text", "") for block in blocks if _is_text(block))
    return {**carried, "result": text, "content": blocks}


def _content_deltas(blocks: Sequence[Json]) -> list[Json]:
    deltas: list[Json] = []
    for block in joined_blocks(blocks):
        if "annotations" not in block:
            deltas.append(block)
            continue
        deltas.append({key: value for key, value in block.items() if key != "annotations"})
        deltas.append({"type": "text_annotation_delta", "annotations": block["annotations"]})
    return deltas


def _list_of(step: Json, key: str) -> list[Json]:
    return step.setdefault(key, [])


def _append(blocks: list[Json], piece: Json) -> None:
    last = blocks[-1] if blocks else None
    if last is not None and piece["type"] == "text" == last["type"]:
        _extend_text(last, piece)
    elif last is not None and _continues(last, piece):
        last["data"] = _joined_base64(last["data"], piece["data"])
    else:
        copy = dict(piece)
        if "annotations" in copy:
            copy["annotations"] = list(copy["annotations"])
        blocks.append(copy)


def _extend_text(last: Json, piece: Json) -> None:
    text = last["text"] + piece["text"]
    if "annotations" in piece:
        _list_of(last, "annotations").extend(piece["annotations"])
    extra = {key: value for key, value in piece.items() if key != "annotations"}
    last.update(extra)
    last["text"] = text


def _continues(last: Json, piece: Json) -> bool:
    same = all(
        last.get(key) == piece.get(key) for key in ("type", "mime_type", "sample_rate", "channels")
    )
    chunked = str(last.get("mime_type")).startswith(_CHUNKED_AUDIO)
    return same and chunked and last["type"] == "audio" and "data" in last and "data" in piece


def _joined_base64(first: str, second: str) -> str:
    if not first.endswith("="):
        return first + second
    whole = binascii.a2b_base64(first) + binascii.a2b_base64(second)
    return binascii.b2a_base64(whole, newline=False).decode()


def _annotate(blocks: list[Json], annotations: Sequence[Json]) -> None:
    if not blocks or blocks[-1]["type"] != "text":
        blocks.append({"type": "text", "text": ""})
    _list_of(blocks[-1], "annotations").extend(annotations)


def _moved(annotation: Json, shift: int) -> Json:
    indices = {
        key: annotation[key] + shift for key in ("start_index", "end_index") if key in annotation
    }
    return {**annotation, **indices}


def _add_arguments(step: Json, fragment: str) -> None:
    so_far: object = step.get("arguments")
    if isinstance(so_far, dict) and so_far:
        return
    text = so_far + fragment if isinstance(so_far, str) else fragment
    try:
        step["arguments"] = orjson.loads(text)
    except orjson.JSONDecodeError:
        step["arguments"] = text


def _overwrite(step: Json, delta: Json) -> None:
    if delta["type"] == _CODE_RESULT and "content" in delta:
        delta = {key: value for key, value in delta.items() if key != "content"} | {
            "result": delta["content"]
        }
    for key, value in delta.items():
        if key == "type" or (key == "signature" and not value and step.get("signature")):
            continue
        if key == "result" and not value and key not in step:
            # The delta has to have one; the step has none, or its start would show it.
            continue
        step[key] = value
