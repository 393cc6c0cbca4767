"""Stream events: their JSON and their frames.

The SDKs read `event_type` and `event_id` from the JSON only, and take one JSON document a frame.
"""

from typing import Final

import orjson

from openinteractions.wire.fields import Json

DONE: Final = b"event: done\ndata: [DONE]\n\n"
"""The last frame of every stream."""
PING: Final = b": ping\n\n"
"""Keeps a quiet connection open; parsers skip it."""

_SUBSET = (
    "id",
    "object",
    "model",
    "agent",
    "status",
    "created",
    "updated",
    "service_tier",
    "environment_id",
    "usage",
    "warnings",
    "continuation_token",
)


def created(interaction: Json) -> Json:
    """The first event of every stream. Only the contract's subset of fields is sent."""
    return {"event_type": "interaction.created", "interaction": _subset(interaction)}


def status_update(
    interaction_id: str,
    status: str,
    *,
    usage: Json | None = None,
    continuation_token: str | None = None,
) -> Json:
    """The interaction has another status now."""
    event: Json = {
        "event_type": "interaction.status_update",
        "interaction_id": interaction_id,
        "status": status,
    }
    if usage is not None:
        event["usage"] = usage
    if continuation_token is not None:
        event["continuation_token"] = continuation_token
    return event


def step_start(index: int, skeleton: Json) -> Json:
    """A generated step begins; see `deltas.step_skeleton`."""
    return {"event_type": "step.start", "index": index, "step": skeleton}


def step_delta(index: int, delta: Json, *, total_usage: Json | None = None) -> Json:
    """A piece of the step that is open."""
    event: Json = {"event_type": "step.delta", "index": index, "delta": delta}
    if total_usage is not None:
        event["metadata"] = {"total_usage": total_usage}
    return event


def step_stop(index: int, *, usage: Json | None = None, step_usage: Json | None = None) -> Json:
    """The step is complete. `usage` is that of the interaction so far."""
    event: Json = {"event_type": "step.stop", "index": index}
    if usage is not None:
        event["usage"] = usage
    if step_usage is not None:
        event["step_usage"] = step_usage
    return event


def completed(interaction: Json) -> Json:
    """The end of every stream that does not end in an error, whatever the status. No steps."""
    return {"event_type": "interaction.completed", "interaction": _subset(interaction)}


def error(code: str, message: str) -> Json:
    """The end of a stream that broke off; nothing but DONE follows."""
    return {"event_type": "error", "error": {"code": code, "message": message}}


def encode(event: Json) -> bytes:
    """The event as one line of JSON."""
    return orjson.dumps(event)


def with_event_id(data: bytes, event_id: str) -> bytes:
    """Add `event_id` to an encoded event, which has none yet, without parsing it."""
    return b'%b,"event_id":%b}' % (data[:-1], orjson.dumps(event_id))


def sse_frame(event_type: str, data: bytes, *, event_id: str | None = None) -> bytes:
    """One frame. `data` is one line (JSON never holds a raw line break)."""
    head = b"" if event_id is None else b"id: %b\n" % event_id.encode()
    return b"%bevent: %b\ndata: %b\n\n" % (head, event_type.encode(), data)


def _subset(interaction: Json) -> Json:
    return {name: interaction[name] for name in _SUBSET if interaction.get(name) is not None}
