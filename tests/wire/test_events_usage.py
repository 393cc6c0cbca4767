import orjson

from openinteractions.wire import events
from openinteractions.wire.create import request_schemas
from openinteractions.wire.interaction import Interaction
from openinteractions.wire.usage import EMPTY_USAGE, add_usage


def test_frames_hold_one_line_and_end_with_a_blank_one():
    data = events.encode(events.step_delta(0, {"type": "text", "text": "a\nb\u2028"}))
    frame = events.sse_frame("step.delta", events.with_event_id(data, "e1"), event_id="e1")
    head, event, line, *rest = frame.split(b"\n")
    assert (head, event, rest) == (b"id: e1", b"event: step.delta", [b"", b""])
    assert orjson.loads(line.removeprefix(b"data: ")) == {
        "event_type": "step.delta",
        "index": 0,
        "delta": {"type": "text", "text": "a\nb\u2028"},
        "event_id": "e1",
    }


def test_created_and_completed_show_the_subset_only():
    interaction = {"id": "v1_a", "status": "completed", "steps": [1], "agent": None, "usage": {}}
    for build in (events.created, events.completed):
        shown = build(interaction)["interaction"]
        assert shown == {"id": "v1_a", "status": "completed", "usage": {}}


def test_optional_parts_of_events_are_left_out():
    assert events.status_update("v1_a", "in_progress") == {
        "event_type": "interaction.status_update",
        "interaction_id": "v1_a",
        "status": "in_progress",
    }
    full = events.status_update("v1_a", "x", usage={}, continuation_token="t")
    assert (full["usage"], full["continuation_token"]) == ({}, "t")
    assert events.step_stop(1) == {"event_type": "step.stop", "index": 1}
    assert events.step_stop(1, usage={}, step_usage={})["step_usage"] == {}
    assert events.step_delta(1, {}, total_usage={})["metadata"] == {"total_usage": {}}
    assert events.step_start(0, {"type": "thought"})["event_type"] == "step.start"
    assert events.error("c", "m")["error"] == {"code": "c", "message": "m"}


def test_usage_adds_up():
    first = {"total_tokens": 3, "initial_input_tokens": 2}
    second = {
        "total_tokens": 4,
        "initial_input_tokens": 9,
        "input_tokens_by_modality": [{"modality": "text", "tokens": 4}],
    }
    total = add_usage(add_usage(first, second), second)
    assert total == {
        **EMPTY_USAGE,
        "total_tokens": 11,
        "initial_input_tokens": 2,
        "input_tokens_by_modality": [{"modality": "text", "tokens": 8}],
    }
    assert EMPTY_USAGE["total_tokens"] == 0
    assert first == {"total_tokens": 3, "initial_input_tokens": 2}


def test_the_types_can_be_documented():
    schemas = request_schemas()
    assert schemas["CreateInteraction"]["description"]
    assert all("$defs" not in schema for schema in schemas.values())
    assert all(schema.get("description") for schema in schemas.values())
    assert Interaction.model_json_schema()["properties"]["steps"]
