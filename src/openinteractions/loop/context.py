"""From stored steps to what a model is shown.

Signatures travel in our own envelope, so that a model gets back only what it issued itself
(ruling R22). What a model must not see again (a broken turn and the note that marks it) is left
out here, once, for every adapter.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import orjson

from openinteractions.models.port import Json

NOTE = "note"
"""Key of a `thought` step that is ours: why the turn before it was asked again."""


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


def _dropped(steps: Sequence[Json]) -> set[int]:
    """Which steps are broken turns, or notes about them."""
    dropped: set[int] = set()
    for index, step in enumerate(steps):
        note = step.get(NOTE) if step.get("type") == "thought" else None
        if not isinstance(note, dict):
            continue
        dropped.add(index)
        discards: object = note.get("discards")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        # Counted in steps as they stand, earlier notes included.
        if isinstance(discards, int) and 0 < discards <= index:
            dropped.update(range(index - discards, index))
    return dropped


def visible(steps: Sequence[Json]) -> list[Json]:
    """The steps without broken turns and the notes about them."""
    dropped = _dropped(steps)
    return [
        step
        for index, step in enumerate(steps)
        if index not in dropped and not (step["type"] == "model_output" and step.get("error"))
    ]


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
    """What `Model.compile` gets of one interaction: visible steps, signatures opened or removed."""
    result: list[Json] = []
    for step in visible(steps):
        envelope = step.get("signature")
        if envelope is None:
            result.append(step)
            continue
        signature = open_signature(envelope, provider=provider, model=model)
        rest = {key: value for key, value in step.items() if key != "signature"}
        result.append(rest if signature is None else {**rest, "signature": signature})
    return result
