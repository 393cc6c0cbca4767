import copy

import orjson
import pytest
from google.genai._gaos.types import interactions as sdk
from hypothesis import example, given, settings
from pydantic import TypeAdapter

from openinteractions.wire.deltas import joined, merge, step_deltas, step_skeleton
from openinteractions.wire.events import step_delta, step_start
from tests.wire.strategies import STEP

SDK_EVENT = TypeAdapter(sdk.InteractionSSEEvent)
TEXT = {"type": "text", "text": "t\n"}
IMAGE = {"type": "image", "mime_type": "image/png", "data": "AAAA"}
CITED = {"type": "url_citation", "url": "u", "start_index": 0, "end_index": 2}


def replayed(step):
    copied = copy.deepcopy(step_skeleton(step))
    for delta in step_deltas(step):
        merge(copied, orjson.loads(orjson.dumps(delta)))
    return copied


@settings(max_examples=600, deadline=None)
@given(STEP)
@example({"type": "function_call", "id": "a", "name": "f", "arguments": {}})
@example({"type": "code_execution_result", "call_id": "a", "result": [], "is_error": False})
def test_a_steps_start_and_deltas_make_the_step_again(step):
    before = copy.deepcopy(step)
    assert replayed(step) == joined(step)
    assert joined(joined(step)) == joined(step)
    assert step == before


def test_a_text_is_one_delta_and_its_citations_another():
    step = {
        "type": "model_output",
        "content": [
            {"type": "text", "text": "Rome", "annotations": [CITED]},
            {"type": "image", "mime_type": "image/png", "data": "AAAA"},
        ],
    }
    assert step_skeleton(step) == {"type": "model_output"}
    assert step_deltas(step) == [
        {"type": "text", "text": "Rome"},
        {"type": "text_annotation_delta", "annotations": [CITED]},
        {"type": "image", "mime_type": "image/png", "data": "AAAA"},
    ]


def test_steps_begin_as_the_contract_shows():
    call = {"type": "function_call", "id": "a", "name": "f", "arguments": {"x": "é"}}
    assert step_skeleton(call) == {"type": "function_call", "id": "a", "name": "f", "arguments": {}}
    assert step_deltas(call) == [{"type": "arguments_delta", "arguments": '{"x":"é"}'}]
    thought = {"type": "thought", "signature": "s", "summary": [{"type": "text", "text": "t"}]}
    assert step_skeleton(thought) == {"type": "thought"}
    assert step_deltas(thought) == [
        {"type": "thought_summary", "content": {"type": "text", "text": "t"}},
        {"type": "thought_signature", "signature": "s"},
    ]
    code = {"type": "code_execution_call", "id": "a", "arguments": {"code": "1"}, "signature": "s"}
    assert step_skeleton(code) == {
        "type": "code_execution_call",
        "id": "a",
        "arguments": {},
        "signature": "",
    }
    result = {"type": "function_result", "call_id": "a", "name": "f", "result": "r"}
    assert step_deltas(result) == [
        {"type": "function_result", "call_id": "a", "name": "f", "result": "r"}
    ]


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ("printed", {"result": "printed"}),
        ([TEXT, IMAGE, TEXT], {"result": "t\nt\n", "content": [TEXT, IMAGE, TEXT]}),
        ([IMAGE], {"result": "", "content": [IMAGE]}),
        ([], {"result": "", "content": []}),
    ],
)
def test_a_code_results_delta_is_a_string_and_has_its_blocks_beside_it(result, shown):
    kind = "code_execution_result"
    step = {"type": kind, "call_id": "a", "result": result, "is_error": False, "signature": "QQ=="}
    assert step_skeleton(step) == {"type": kind, "call_id": "a", "result": "", "signature": ""}
    assert step_deltas(step) == [{"type": kind, "is_error": False, "signature": "QQ==", **shown}]
    assert replayed(step) == step


def test_what_an_earlier_release_has_logged_is_read_as_before():
    start = {"type": "code_execution_result", "call_id": "a", "result": [TEXT, IMAGE]}
    merge(start, {"type": "code_execution_result", "is_error": False})
    assert start["result"] == [TEXT, IMAGE]


BY_SERVER = {"name": "f", "server_name": "s"}


@pytest.mark.parametrize(
    "step",
    [
        *(
            {"type": kind, "call_id": "a", "result": result, "is_error": False, **more}
            for kind, more in (
                ("function_result", {"name": "f"}),
                ("mcp_server_tool_result", BY_SERVER),
            )
            for result in ("r", {"r": 1}, [TEXT, IMAGE], [])
        ),
        *(
            {"type": "code_execution_result", "call_id": "a", "result": result, "is_error": True}
            for result in ("r", [TEXT, IMAGE], [])
        ),
        {"type": "code_execution_call", "id": "a", "arguments": {"language": "bash", "code": "ls"}},
        {"type": "google_search_call", "id": "a", "arguments": {"queries": ["q"]}},
        {"type": "google_search_result", "call_id": "a", "result": [{"title": "t", "url": "u"}]},
        {"type": "google_maps_call", "id": "a", "arguments": {"queries": ["q"]}},
        {"type": "google_maps_result", "call_id": "a", "result": [{"places": [{"name": "n"}]}]},
        {"type": "url_context_call", "id": "a", "arguments": {"urls": ["u"]}},
        {
            "type": "url_context_result",
            "call_id": "a",
            "result": [{"url": "u", "status": "error", "message": "m"}],
        },
        {"type": "tool_search_call", "id": "a", "arguments": {"function_names": ["f"]}},
        {
            "type": "tool_search_result",
            "call_id": "a",
            "result": [{"type": "function", "name": "f"}],
        },
        {"type": "retrieval_call", "id": "a", "arguments": {"queries": ["q"]}},
        {"type": "retrieval_result", "call_id": "a"},
        {"type": "file_search_call", "id": "a"},
        {"type": "file_search_result", "call_id": "a", "signature": "QQ=="},
        {"type": "processing_call", "id": "a"},
        {"type": "processing_result", "call_id": "a"},
        {"type": "mcp_server_tool_call", "id": "a", "arguments": {"x": 1}, **BY_SERVER},
    ],
)
def test_the_sdks_types_take_every_event_of_a_call_and_its_result(step):
    """Strictly: a client that reads a stream is given less than that, a field that is None."""
    start = SDK_EVENT.validate_python(step_start(0, step_skeleton(step))).step
    (sent,) = step_deltas(step)
    delta = SDK_EVENT.validate_python(step_delta(0, sent)).delta
    for part, wire in ((start, step_skeleton(step)), (delta, sent)):
        assert type(part).__name__.lower().startswith(step["type"].replace("_", ""))
        assert part.model_dump(mode="json", exclude_none=True) == wire
    assert replayed(step) == step


def test_neighbouring_texts_join_and_their_citations_move_by_bytes():
    step = {
        "type": "model_output",
        "content": [
            {"type": "text", "text": "é", "annotations": [CITED]},
            {"type": "text", "text": "ab", "annotations": [CITED]},
        ],
    }
    moved = {**CITED, "start_index": 2, "end_index": 4}
    assert replayed(step)["content"] == [
        {"type": "text", "text": "éab", "annotations": [CITED, moved]}
    ]


def test_live_pieces_add_up():
    step = {"type": "model_output"}
    for piece in ("Hel", "lo"):
        merge(step, {"type": "text", "text": piece})
    merge(step, {"type": "text_annotation_delta", "annotations": [CITED]})
    for piece in ("AAAA", "AA==", "AAAA"):
        merge(step, {"type": "audio", "mime_type": "audio/l16", "data": piece})
    assert step["content"] == [
        {"type": "text", "text": "Hello", "annotations": [CITED]},
        {"type": "audio", "mime_type": "audio/l16", "data": "AAAAAAAAAA=="},
    ]
    call = {"type": "function_call", "id": "a", "name": "f", "arguments": {}}
    for piece in ('{"a": "}', '{"', "}"):
        merge(call, {"type": "arguments_delta", "arguments": piece})
    assert call["arguments"] == {"a": "}{"}
    thought = {"type": "thought"}
    for signature in ("s", ""):
        merge(thought, {"type": "thought_signature", "signature": signature})
    assert thought == {"type": "thought", "signature": "s"}


def test_deltas_out_of_place_do_no_harm():
    step = {"type": "model_output"}
    merge(step, {"type": "text_annotation_delta", "annotations": [CITED]})
    assert step["content"] == [{"type": "text", "text": "", "annotations": [CITED]}]
    thought = {"type": "thought"}
    merge(thought, {"type": "thought_summary"})
    call = {"type": "function_call", "arguments": {"a": 1}}
    merge(call, {"type": "arguments_delta", "arguments": " "})
    assert (thought, call["arguments"]) == ({"type": "thought"}, {"a": 1})
