"""From stored steps to what a model is shown.

Signatures travel in our own envelope, so that a model gets back only what it issued itself
(ruling R22). What a model must not see again (a broken turn and the note that marks it) is left
out here, once, for every adapter.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, cast

import orjson

from openinteractions.loop.excerpt import cut_middle
from openinteractions.loop.findings import readable
from openinteractions.models.port import Json

NOTE = "note"
"""Key of a `thought` step that is ours: why the turn before it was asked again, or that everything
before it has given way to a handover."""
HANDOVER = "handover"
"""Key of the user message that stands for what a handover has replaced: `{request, text}`."""
_COMPACTED = "compacted"

_LEFT_OUT = (
    "Earlier messages of this conversation were left out, to make room. Below stand the request "
    "as it was given, and the handover that you wrote before they were left out."
)
_GO_ON = "Go on from where the handover ends. Do not do again what it says is done."


def seal_signature(signature: str, *, provider: str, model: str) -> str:
    """Put a vendor's signature into an envelope that names who issued it: base64 text."""
    return base64.b64encode(orjson.dumps({"p": provider, "m": model, "s": signature})).decode()


def open_signature(envelope: object, *, provider: str, model: str) -> str | None:
    """The signature inside, if this provider and model issued it; else None."""
    if not isinstance(envelope, str) or not envelope:
        return None
    try:
        inside: Any = orjson.loads(base64.b64decode(envelope, validate=True))
    except (binascii.Error, ValueError):
        return None
    if not isinstance(inside, dict) or inside.get("p") != provider or inside.get("m") != model:  # pyright: ignore[reportUnknownMemberType]
        return None
    signature: object = inside.get("s")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return signature if isinstance(signature, str) else None


def resumption_note(*, kind: str, text: str, discards: int) -> Json:
    """The short thought step between a turn that was broken off and the answer that starts anew.

    Args:
        kind: `resumed` (the upstream broke off) or `repair` (the answer broke its schema).
        text: What a reader of the stream sees.
        discards: How many steps before it no model is to see.
    """
    return {
        "type": "thought",
        "summary": [{"type": "text", "text": text}],
        NOTE: {"kind": kind, "discards": discards},
    }


def compaction_note(handover: str, *, request_chars: int, images: int) -> Json:
    """The thought step from which on a model sees a handover, and nothing that came before.

    Args:
        handover: What the model is to know of the steps before; a reader of the stream sees it too.
        request_chars: How much of the user's own request a model still sees, in characters.
        images: How many images of the request it still sees.
    """
    return {
        "type": "thought",
        "summary": [{"type": "text", "text": handover}],
        NOTE: {"kind": _COMPACTED, "request_chars": request_chars, "images": images},
    }


def cut_mark() -> Json:
    """The block that ends the text of a broken turn.

    SDKs gather `output_text` backwards over thoughts, up to a block that is no text. Without one at
    the end of what was broken off, they would glue it to the answer that follows.
    """
    note = b"The answer above was broken off. It starts again below."
    return {
        "type": "document",
        "mime_type": "text/plain",
        "data": base64.b64encode(note).decode(),
    }


def _note(step: Json) -> Mapping[str, object] | None:
    note: object = step.get(NOTE) if step.get("type") == "thought" else None
    return cast("Mapping[str, object]", note) if isinstance(note, dict) else None


def _dropped(steps: Sequence[Json]) -> set[int]:
    """Which steps are broken turns, or notes about them."""
    dropped: set[int] = set()
    for index, step in enumerate(steps):
        note = _note(step)
        if note is None:
            continue
        dropped.add(index)
        discards = note.get("discards")
        # Counted in steps as they stand, earlier notes included.
        if isinstance(discards, int) and 0 < discards <= index:
            dropped.update(range(index - discards, index))
    return dropped


def _last_compaction(steps: Sequence[Json]) -> int | None:
    """Where the last handover stands. One that a broken turn took with it holds all the same."""
    for index in range(len(steps) - 1, -1, -1):
        note = _note(steps[index])
        if note is not None and note.get("kind") == _COMPACTED:
            return index
    return None


def compacts(steps: Sequence[Json]) -> bool:
    """Whether everything before this interaction is left out, since it holds a handover."""
    return _last_compaction(steps) is not None


def visible(steps: Sequence[Json]) -> list[Json]:
    """What a model sees of one interaction's steps.

    Broken turns and the notes about them are left out; what stands before a handover is replaced
    by it. A result never stands without its call: where the handover took the call, the result is
    told in words.
    """
    dropped = _dropped(steps)
    kept = [
        (index, step)
        for index, step in enumerate(steps)
        if index not in dropped and not (step["type"] == "model_output" and step.get("error"))
    ]
    at = _last_compaction(steps)
    if at is None:
        return [step for _, step in kept]
    earlier = [step for index, step in kept if index < at]
    later = [step for index, step in kept if index > at]
    without_call = _without_call(later)
    asked = _without_call(earlier)
    requests = [s for at, s in enumerate(earlier) if s["type"] == "user_input" or at in asked]
    requests += [step for at, step in enumerate(later) if at in without_call]
    rest = [step for at, step in enumerate(later) if at not in without_call]
    return [_handed_over(steps[at], requests), *rest]


def _without_call(steps: Sequence[Json]) -> set[int]:
    """Where results stand whose call is not among the steps before them."""
    called: set[str] = set()
    found: set[int] = set()
    for index, step in enumerate(steps):
        if step["type"].endswith("_call"):
            called.add(step["id"])
        elif step["type"].endswith("_result") and step["call_id"] not in called:
            found.add(index)
    return found


def _handed_over(note_step: Json, requests: Sequence[Json]) -> Json:
    """The user message that stands for everything before a handover."""
    note = _note(note_step) or {}
    told: list[str] = []
    images: list[Json] = []
    most = _bound(note, "images", 4)
    for block in (block for step in requests for block in _said(step)):
        if block.get("type") == "text":
            told.append(str(block.get("text", "")))
        elif block.get("type") == "image" and len(images) < most:
            images.append(block)
        else:
            told.append(f"[{block.get('mime_type') or block.get('type')}: no longer shown]")
    request = cut_middle("\n\n".join(told), _bound(note, "request_chars", 16_000))
    summary = cast("Sequence[Json]", note_step.get("summary") or ())
    handover = "".join(str(block.get("text", "")) for block in summary)
    text = f"{_LEFT_OUT}\n\n# Request\n\n{request}\n\n# Handover\n\n{handover}\n\n{_GO_ON}"
    return {
        "type": "user_input",
        "content": [{"type": "text", "text": text}, *images],
        HANDOVER: {"request": request, "text": handover},
    }


def _bound(note: Mapping[str, object], key: str, default: int) -> int:
    value = note.get(key)
    return value if isinstance(value, int) else default


def _said(step: Json) -> list[Json]:
    """A request's content blocks; a result's as words."""
    if step["type"] == "user_input":
        content: Any = step.get("content") or []
        return [{"type": "text", "text": content}] if isinstance(content, str) else content
    result: Any = readable(step).get("result")
    if isinstance(result, list) and all(isinstance(b, dict) and "type" in b for b in result):  # pyright: ignore[reportUnknownVariableType]
        blocks = cast("list[Json]", result)
    else:
        text = result if isinstance(result, str) else orjson.dumps(result).decode()
        blocks = [{"type": "text", "text": text}]
    name = step.get("name") or step["type"].removesuffix("_result")
    failed = " (it failed)" if step.get("is_error") else ""
    return [{"type": "text", "text": f"Result of {name}{failed}:"}, *blocks]


def open_calls(steps: Sequence[Json]) -> list[tuple[int, Json]]:
    """Calls that have no result yet, in order, with their place; those of broken turns left out."""
    dropped = _dropped(steps)
    calls: dict[str, tuple[int, Json]] = {}
    for index, step in enumerate(steps):
        if index in dropped:
            continue
        if step["type"].endswith("_call"):
            calls[step["id"]] = (index, step)
        elif step["type"].endswith("_result"):
            calls.pop(step["call_id"], None)
    return list(calls.values())


def for_model(steps: Sequence[Json], *, provider: str, model: str) -> list[Json]:
    """What `Model.compile` gets of one interaction.

    Visible steps, signatures opened or removed, what our own web tools found as text.
    """
    result: list[Json] = []
    for step in map(readable, visible(steps)):
        envelope = step.get("signature")
        if envelope is None:
            result.append(step)
            continue
        signature = open_signature(envelope, provider=provider, model=model)
        rest = {key: value for key, value in step.items() if key != "signature"}
        result.append(rest if signature is None else {**rest, "signature": signature})
    return result
