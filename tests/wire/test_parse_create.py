import copy

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openinteractions.errors import Invalid
from openinteractions.wire.create import CreateInteraction, parse_create
from tests.wire.bodies import BODIES, PNG
from tests.wire.strategies import JSON, STEP, mutated


def parse(**body) -> CreateInteraction:
    return parse_create(orjson.dumps({"model": "m", **body}), max_depth=64)


def refused(**body) -> str:
    with pytest.raises(Invalid) as caught:
        parse(**body)
    return caught.value.message


@pytest.mark.parametrize("body", BODIES)
def test_valid_bodies_parse_to_json_that_can_be_written(body):
    parsed = parse_create(orjson.dumps(body), max_depth=64)
    again = parse_create(copy.deepcopy(body), max_depth=64)
    assert parsed == again
    assert orjson.dumps(parsed)


def test_a_plain_request_has_defaults():
    parsed = parse(input="Hi")
    assert (parsed.model, parsed.agent, parsed.stream, parsed.store) == ("m", None, False, True)
    assert parsed.steps == [{"type": "user_input", "content": [{"type": "text", "text": "Hi"}]}]
    assert parsed.echo == {"service_tier": "standard"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "The request body is not valid JSON: "),
        (b'{"model":', "The request body is not valid JSON: "),
        (b'{"model":"\xff"}', "The request body is not valid JSON: "),
        (b'{"a":' * 5000, "The request body is not valid JSON: "),
        (b"[" * 900 + b"]" * 900, "The request body must be a JSON object."),
        (b"[]", "The request body must be a JSON object."),
        (b"null", "The request body must be a JSON object."),
        (b'{"a":1e999}', "The request body is not valid JSON: "),
        (
            b'{"model":"m","input":' + b"[" * 64 + b"]" * 64 + b"}",
            "The request body is nested deeper than 64 levels.",
        ),
    ],
)
def test_bodies_that_are_no_usable_json_are_refused(raw, message):
    with pytest.raises(Invalid) as caught:
        parse_create(raw, max_depth=64)
    assert caught.value.message.startswith(message)


def test_depth_is_capped_where_json_could_not_be_written_again():
    deep: dict = {}
    for _ in range(220):
        deep = {"a": deep}
    step = {"type": "function_call", "id": "a", "name": "b", "arguments": deep}
    raw = orjson.dumps({"model": "m", "input": [step]})
    with pytest.raises(Invalid, match="deeper than 200 levels"):
        parse_create(raw, max_depth=10_000)
    with pytest.raises(Invalid, match="not valid JSON"):
        parse_create({"model": "m", "input": float("nan"), "x": {1}}, max_depth=64)


def test_as_many_levels_as_allowed_are_read():
    arguments: dict = {}
    for _ in range(60):
        arguments = {"a": arguments}
    steps = [
        {"type": "function_call", "id": "a", "name": "b", "arguments": arguments},
        {"type": "function_result", "call_id": "a", "result": "x"},
    ]
    parse_create({"model": "m", "input": steps}, max_depth=64)
    with pytest.raises(Invalid, match="deeper than 63 levels"):
        parse_create({"model": "m", "input": steps}, max_depth=63)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"headerName": 1}, "Unknown parameter 'headerName'."),
        (
            {"generationConfig": {}},
            "Unknown parameter 'generationConfig'. Did you mean 'generation_config'?",
        ),
        ({"sytem_instruction": ""}, "Unknown parameter 'sytem_instruction'. Did you mean "),
        (
            {
                "input": [
                    {"type": "text", "text": "a"},
                    {"type": "text", "text": "b", "processing": 1},
                ]
            },
            "Unknown parameter 'processing' at 'input[1]'.",
        ),
        (
            {"input": [{"type": "function_result", "callId": "a", "result": ""}]},
            "Unknown parameter 'callId' at 'input[0]'. Did you mean 'call_id'?",
        ),
        (
            {
                "input": [
                    {
                        "type": "user_input",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "video", "uri": "u", "processing": "X"},
                        ],
                    }
                ]
            },
            "Invalid enum value 'X' at 'input[0].content[1].processing'. Expected one of: static, ",
        ),
        (
            {"input": [{"type": "function_result", "result": "x"}]},
            "Missing required parameter 'call_id' at 'input[0]'.",
        ),
        ({"input": [{"a": 1}]}, "Missing required parameter 'type' at 'input[0]'."),
        ({"input": [1]}, "Invalid value at 'input[0]': expected an object."),
        ({"input": 1}, "Invalid value at 'input': expected a string, an object or a list."),
        (
            {"input": {"type": "nope"}},
            "Invalid enum value 'nope' at 'input.type'. Expected one of: user_input, ",
        ),
        ({"input": [{"type": 5}]}, "Invalid value at 'input[0].type': expected one of "),
        (
            {"input": [{"role": "system", "content": ""}]},
            "Invalid enum value 'system' at 'input[0].role'.",
        ),
        (
            {"tools": [{"type": "foo"}]},
            "Invalid enum value 'foo' at 'tools[0].type'. Expected one of: function, ",
        ),
        ({"tools": [{"type": "function"}]}, "Missing required parameter 'name' at 'tools[0]'."),
        ({"tools": {}}, "Invalid value at 'tools': expected a list."),
        (
            {"generation_config": {"seed": "1"}},
            "Invalid value at 'generation_config.seed': expected an integer.",
        ),
        (
            {"generation_config": {"seed": True}},
            "Invalid value at 'generation_config.seed': expected an integer.",
        ),
        (
            {"generation_config": {"temperature": 9}},
            "Invalid value at 'generation_config.temperature': expected a number that is at ",
        ),
        (
            {"generation_config": {"thinking_level": "x"}},
            "Invalid enum value 'x' at 'generation_config.thinking_level'. Expected one of: ",
        ),
        (
            {"generation_config": {"tool_choice": 1}},
            "Invalid value at 'generation_config.tool_choice': expected a string or an object.",
        ),
        ({"stream": "true"}, "Invalid value at 'stream': expected a boolean."),
        (
            {"system_instruction": {"parts": []}},
            "Invalid value at 'system_instruction': expected a string.",
        ),
        (
            {"limits": {"max_steps": 0}},
            "Invalid value at 'limits.max_steps': expected a number greater than 0.",
        ),
        (
            {"limits": {"max_total_tokens": "x"}},
            "Invalid value at 'limits.max_total_tokens': expected an integer.",
        ),
        ({"labels": {"a": 1}}, "Invalid value at 'labels.a': expected a string."),
        (
            {"response_format": {"type": "txt"}},
            "Invalid enum value 'txt' at 'response_format.type'. Expected one of: text, ",
        ),
        (
            {"response_format": [{"type": "video", "duration": "8"}]},
            "Invalid value at 'response_format[0].duration': expected a string that matches ",
        ),
        (
            {"environment": {"type": "remote", "sources": [{"type": "inline"}]}},
            "Missing required parameter 'target' at 'environment.sources[0]'.",
        ),
        ({"environment": ""}, "Invalid value at 'environment': expected a non-empty string."),
        (
            {"safety_settings": [{"type": "harassment"}]},
            "Missing required parameter 'threshold' at 'safety_settings[0]'.",
        ),
        (
            {"response_mime_type": "text/plain", "response_format": {"type": "object"}},
            "'response_mime_type' text/plain does not go with a JSON response_format.",
        ),
        ({"x\u0000\n": 1}, "Unknown parameter 'x\ufffd\ufffd'."),
        ({"y" * 200: 1}, f"Unknown parameter '{'y' * 80}…'."),
    ],
)
def test_messages_name_the_place_and_the_fault(fields, message):
    assert refused(**{"input": "Hi", **fields}).startswith(message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": "x"}, "Missing required parameter 'model' or 'agent'."),
        (
            {"model": "m", "agent": "a", "input": "x"},
            "Only one of 'model' and 'agent' may be given.",
        ),
        ({"model": "m"}, "Missing input."),
        ({"model": "m", "input": None}, "Missing input."),
        ({"model": "m", "input": ""}, "Request has empty input."),
        ({"model": "m", "input": []}, "Request has empty input."),
        (
            {"model": "m", "input": [{"type": "user_input", "content": []}]},
            "Request has empty input.",
        ),
        ({"agent": "", "input": "x"}, "Agent '' is invalid or not found."),
        ({"model": "models/", "input": "x"}, "Model '' is invalid or not found."),
        (
            {"model": "m" * 257, "input": "x"},
            "Invalid value at 'model': expected at most 256 characters.",
        ),
        ({"model": "a\nb", "input": "x"}, "Invalid value at 'model': it holds control characters."),
        (
            {"agent": "a", "input": "x", "generation_config": {}},
            "'generation_config' needs a 'model'",
        ),
        ({"agent": "a", "input": "x", "cached_content": "c"}, "'cached_content' needs a 'model'"),
        (
            {"model": "m", "input": "x", "agent_config": {"type": "dynamic"}},
            "'agent_config' needs an 'agent'",
        ),
        ({"model": "m", "input": "x", "background": True, "store": False}, "'background' needs"),
        ({"model": "m", "input": "x", "webhook_config": {}}, "'webhook_config' needs 'background'"),
        ({"model": "m", "input": "x", "labels": {"A": ""}}, "Invalid label key 'A' at 'labels'"),
        ({"model": "m", "input": "x", "labels": {"a": "B"}}, "Invalid value at 'labels.a'"),
        ({"model": "m", "input": "x", "labels": {"1": ""}}, "Invalid label key '1'"),
        (
            {"model": "m", "input": "x", "labels": {f"a{i}": "" for i in range(65)}},
            "Invalid value at 'labels'",
        ),
        (
            {"model": "m", "input": "x", "tools": [{"type": "function", "name": "f"}] * 2},
            "Duplicate function name 'f' at 'tools[1]'.",
        ),
        (
            {
                "model": "m",
                "input": "x",
                "tools": [{"type": "google_search"}, {"type": "file_search"}],
            },
            "The tools 'google_search' and 'file_search'",
        ),
        (
            {
                "model": "m",
                "input": "x",
                "generation_config": {"tool_choice": {"allowed_tools": {"tools": ["f"]}}},
            },
            "Unknown tool 'f' at ",
        ),
        (
            {"model": "m", "input": "x", "previous_interaction_id": "a@b"},
            "Invalid value at 'previous_interaction_id'",
        ),
        (
            {"model": "m", "input": "x", "response_format": [{"type": "text"}, {"type": "text"}]},
            "Only one text format",
        ),
        (
            {
                "model": "m",
                "input": "x",
                "response_format": {"type": "text", "mime_type": "text/plain", "schema": {}},
            },
            "'schema' needs",
        ),
        (
            {"model": "m", "input": "x", "response_mime_type": "text/html"},
            "Invalid enum value 'text/html' at 'response_mime_type'.",
        ),
    ],
)
def test_combinations_that_mean_nothing_are_refused(body, message):
    with pytest.raises(Invalid) as caught:
        parse_create(orjson.dumps(body), max_depth=64)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"type": "image"}, "Missing required parameter 'data' or 'uri' at 'input[0]'."),
        (
            {"type": "image", "data": PNG, "uri": "u"},
            "Only one of 'data' and 'uri' may be given at 'input[0]'.",
        ),
        ({"type": "image", "data": "A"}, "Invalid value at 'input[0].data': expected base64."),
        ({"type": "image", "data": "ÄÖ"}, "Invalid value at 'input[0].data': expected base64."),
        ({"type": "image", "data": ""}, "Invalid value at 'input[0].data': expected base64."),
        (
            {"type": "image", "data": "data:image/png;base64,AA"},
            "Invalid value at 'input[0].data': expected base64, not a data: URL.",
        ),
        (
            {"type": "image", "data": "AAAA"},
            "Missing required parameter 'mime_type' at 'input[0]'.",
        ),
        (
            {"type": "image", "data": PNG, "mime_type": "audio/wav"},
            "Invalid value at 'input[0].mime_type': expected a MIME type image/*.",
        ),
        (
            {"type": "document", "uri": "u", "mime_type": "image/png"},
            "Invalid value at 'input[0].mime_type': expected a MIME type application/* or text/*.",
        ),
    ],
)
def test_media_are_checked(block, message):
    assert refused(input=[block]) == message


@pytest.mark.parametrize(
    ("data", "standard"),
    [("_-8", "/+8="), ("-_-_", "+/+/"), ("AA==", "AA=="), ("AA", "AA=="), ("AA\nAA", "AAAA")],
)
def test_base64_becomes_standard(data, standard):
    parsed = parse(input={"type": "document", "data": data, "mime_type": "Text/CSV"})
    block = parsed.steps[0]["content"][0]
    assert (block["data"], block["mime_type"]) == (standard, "text/csv")


def test_a_missing_mime_type_is_told_from_the_bytes():
    parsed = parse(input={"type": "image", "data": PNG})
    assert parsed.steps[0]["content"][0]["mime_type"] == "image/png"


def test_enums_are_read_in_any_case():
    parsed = parse(
        input={"type": "Video", "uri": "u", "processing": "AGENTIC", "resolution": "LOW"},
        generation_config={"thinking_level": "HIGH"},
        response_format={"type": "IMAGE", "image_size": "2k"},
    )
    block = parsed.steps[0]["content"][0]
    assert (block["type"], block["processing"], block["resolution"]) == ("video", "agentic", "low")
    assert parsed.generation_config == {"thinking_level": "high"}
    assert parsed.media_formats == [{"type": "image", "image_size": "2K"}]


def test_null_stands_for_absent_but_stays_in_free_form_parts():
    steps = [
        {"type": "function_call", "id": "a", "name": "f", "arguments": {"x": None}},
        {"type": "function_result", "call_id": "a", "name": None, "result": {"y": None}},
    ]
    parsed = parse(input=steps, tools=None, generation_config={"seed": None, "top_p": 1})
    assert parsed.steps[0]["arguments"] == {"x": None}
    assert parsed.steps[1] == {"type": "function_result", "call_id": "a", "result": {"y": None}}
    assert parsed.generation_config == {"top_p": 1}
    assert not parsed.tools_given


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "text", "mime_type": "application/json"}}, {}),
        ({"response_format": {"type": "text", "schema": {"type": "array"}}}, {"type": "array"}),
        (
            {"response_format": {"type": "object", "properties": {}}},
            {"type": "object", "properties": {}},
        ),
        ({"response_format": {"type": ["object", "null"]}}, {"type": ["object", "null"]}),
        ({"response_format": {"anyOf": []}}, {"anyOf": []}),
        ({"response_format": [{"type": "image"}, {"type": "text", "schema": {"a": 1}}]}, {"a": 1}),
        ({"response_mime_type": "application/json"}, {}),
        (
            {"response_mime_type": "application/json", "response_format": {"type": "string"}},
            {"type": "string"},
        ),
        ({"response_format": []}, None),
        ({"response_mime_type": "TEXT/PLAIN"}, None),
    ],
)
def test_response_formats_have_one_form(fields, expected):
    assert parse(input="x", **fields).json_schema == expected


def test_a_branch_is_an_id_and_a_step():
    parsed = parse(input="x", previous_interaction_id="v1_a@3")
    assert (parsed.previous_interaction_id, parsed.branch_step) == ("v1_a", 3)
    assert parsed.echo["previous_interaction_id"] == "v1_a@3"


def test_tool_choice_is_taken_out_of_the_generation_config():
    parsed = parse(input="x", generation_config={"tool_choice": "ANY", "seed": 1})
    assert (parsed.tool_choice, parsed.generation_config) == ("any", {"seed": 1})
    assert parsed.echo["generation_config"] == {"tool_choice": "any", "seed": 1}


def test_prefixes_of_collections_are_dropped():
    assert parse_create({"model": "models/x", "input": "a"}, max_depth=9).model == "x"
    assert parse_create({"agent": "agents/x", "input": "a"}, max_depth=9).agent == "x"


@pytest.mark.parametrize("body", BODIES)
def test_secrets_are_not_echoed(body):
    parsed = parse_create(orjson.dumps(body), max_depth=64)
    written = orjson.dumps(parsed.echo)
    for secret in (b"secret", b'"credential"', b'"transform"', b'"headers"', b'"env"'):
        assert secret not in written


def test_credentials_in_urls_are_not_echoed():
    parsed = parse(
        input="x",
        environment={
            "type": "remote",
            "sources": [{"type": "repository", "source": "https://u:tok@gh/x", "target": "a"}],
        },
        tools=[
            {"type": "mcp_server", "name": "a", "url": "https://u:tok@h/x?key=tok"},
            {"type": "retrieval", "exa_ai_search_config": {"api_key": "tok"}},
        ],
    )
    assert b"tok" not in orjson.dumps(parsed.echo)
    assert parsed.tools[1]["exa_ai_search_config"] == {"api_key": "tok"}


def test_a_flood_of_faults_is_refused_cheaply():
    assert refused(input=[5] * 100_000) == "Invalid value at 'input[0]': expected an object."
    many = {f"k{i}": 1 for i in range(5_000)}
    assert refused(input="x", **many) == "The request has more than 1000 faults."


@settings(max_examples=400, deadline=None)
@given(JSON)
def test_any_json_is_read_or_refused(value):
    read_or_refused(value)


@settings(max_examples=1500, deadline=None)
@given(mutated(BODIES))
def test_any_mutated_body_is_read_or_refused(value):
    read_or_refused(value)


@settings(max_examples=400, deadline=None)
@given(st.lists(STEP, max_size=4), st.booleans())
def test_any_steps_are_read_or_refused(steps, chained):
    body = {"model": "m", "input": steps}
    read_or_refused({**body, "previous_interaction_id": "p"} if chained else body)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(raw):
    with pytest.raises(Invalid):
        parse_create(raw, max_depth=64)


def read_or_refused(value):
    raw = orjson.dumps(value)
    try:
        parsed = parse_create(raw, max_depth=64)
    except Invalid as refusal:
        message = refusal.message
    else:
        orjson.dumps(parsed)
        if parsed.steps:
            reading_again_changes_nothing(parsed.steps)
        return
    assert len(message) < 2000
    assert "pydantic" not in message
    orjson.dumps(message)


def reading_again_changes_nothing(steps):
    again = {"model": "m", "previous_interaction_id": "p", "input": steps}
    assert parse_create(again, max_depth=200).steps == steps
