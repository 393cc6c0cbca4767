"""Media blocks inside steps: taken out before they are stored, put back before they are used.

A stored block has `blob` (SHA-256, hexadecimal) in place of `data`. A block that came by `uri` and
was fetched has both; whoever reads the interaction sees the `uri`, the model gets the bytes.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

KEEP_INLINE_BYTES = 16 * 1024
"""Shorter `data` stays in its step: a row of its own would cost more."""

_KINDS = ("image", "audio", "video", "document")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Blob:
    """Some bytes and what they are."""

    sha256: bytes
    mime_type: str
    data: bytes


def blocks(step: Json) -> Iterator[Json]:
    """The content blocks of a step, wherever its type keeps them."""
    for key in ("content", "result", "summary"):
        value = step.get(key)
        if isinstance(value, list):
            for block in value:  # pyright: ignore[reportUnknownVariableType]
                if isinstance(block, dict):
                    yield block


def take_out(step: Json) -> tuple[Json, list[Blob]]:
    """A copy of the step without its large media, and those media.

    What is no base64 becomes a text that says so: a tool's result is worth more than an error.
    """
    if not any(_is_large(block) for block in blocks(step)):
        return step, []
    copy: Json = orjson.loads(orjson.dumps(step))
    taken: list[Blob] = []
    for block in blocks(copy):
        if _is_large(block):
            try:
                data = base64.b64decode(block["data"], validate=True)
            except ValueError:
                _explain(block)
                continue
            del block["data"]
            blob = Blob(
                hashlib.sha256(data).digest(),
                block.get("mime_type", "application/octet-stream"),
                data,
            )
            block["blob"] = blob.sha256.hex()
            taken.append(blob)
    return copy, taken


def _explain(block: Json) -> None:
    """Put a text in the place of a block whose data cannot be read."""
    kind = block["type"]
    block.clear()
    block |= {"type": "text", "text": f"[{kind} left out: its data was not base64.]"}


def keep_by_uri(content: Json, base_url: str) -> tuple[Json, Blob]:
    """A block that shows a `uri` of this server instead of its `data`, and the data."""
    data = base64.b64decode(content["data"])
    blob = Blob(hashlib.sha256(data).digest(), content["mime_type"], data)
    rest = {key: value for key, value in content.items() if key != "data"}
    name = blob.sha256.hex()
    return {**rest, "uri": f"{base_url}/v1beta/media/{name}", "blob": name}, blob


def _is_large(block: Json) -> bool:
    data = block.get("data")
    if block.get("type") not in _KINDS:
        return False
    return isinstance(data, str) and (len(data) > KEEP_INLINE_BYTES or "uri" in block)


def hashes(steps: Sequence[Json]) -> list[bytes]:
    """The blobs that these steps refer to."""
    return [
        bytes.fromhex(block["blob"])
        for step in steps
        for block in blocks(step)
        if isinstance(block.get("blob"), str)
    ]


def put_back(step: Json, blobs: Mapping[bytes, Blob], *, for_model: bool) -> Json:
    """The step with its media inline: a model gets the bytes, a reader the `uri` if it has."""
    for block in blocks(step):
        reference = block.pop("blob", None)
        if reference is None or ("uri" in block and not for_model):
            continue
        blob = blobs.get(bytes.fromhex(reference))
        if blob is not None:
            block.pop("uri", None)
            block["data"] = base64.b64encode(blob.data).decode()
    return step
