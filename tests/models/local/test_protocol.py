import json

import jsonschema
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openinteractions.models.local import protocol
from openinteractions.models.port import TextDelta, ToolCall

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Current weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
    },
}
CLOCK = {"type": "function", "name": "clock"}
PLAIN = protocol.offer([], None, None)


def obeys(reply: object, offered: protocol.Offer) -> bool:
    return jsonschema.Draft202012Validator(protocol.schema(offered)).is_valid(reply)


def call(name: str, **arguments: object) -> dict[str, object]:
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("choice", "calls", "answers"),
    [
        (None, {"get_weather", "clock"}, True),
        ("auto", {"get_weather", "clock"}, True),
        ("validated", {"get_weather", "clock"}, True),
        ("any", {"get_weather", "clock"}, False),
        ("none", set(), True),
        ({"allowed_tools": {"mode": "any", "tools": ["clock"]}}, {"clock"}, False),
        ({"allowed_tools": {"mode": "auto", "tools": ["clock"]}}, {"clock"}, True),
        ({"allowed_tools": {"tools": ["clock"]}}, {"clock"}, True),
        ({"allowed_tools": {"mode": "any", "tools": []}}, set(), True),
    ],
)
def test_tool_choice_decides_what_is_offered(choice, calls, answers):
    offered = protocol.offer([WEATHER, CLOCK], choice, None)

    assert {function["name"] for function in offered.functions} == calls
    assert offered.may_answer is answers


def test_the_schema_lets_one_call_or_one_answer_through_and_nothing_else():
    offered = protocol.offer([WEATHER, CLOCK], "auto", None)

    assert obeys(call("get_weather", city="Oslo"), offered)
    assert obeys(call("clock"), offered)
    assert obeys({"answer": "Hello."}, offered)
    assert not obeys(call("get_weather"), offered)
    assert not obeys(call("get_weather", city="Oslo", mood="?"), offered)
    assert not obeys(call("clock", zone="UTC"), offered)
    assert not obeys(call("rm"), offered)
    assert not obeys({"answer": "Hello.", **call("clock")}, offered)
    assert not obeys({"answer": "Hello."}, protocol.offer([CLOCK], "any", None))


def test_nothing_in_the_schema_is_endless():
    offered = protocol.offer([WEATHER], "auto", None)

    assert not obeys(call("get_weather", city="x" * 100_000), offered)
    assert not obeys({"answer": "x" * 100_000}, offered)


def test_references_of_a_tools_schema_still_resolve():
    parameters = {
        "type": "object",
        "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "INTEGER"}}}},
        "properties": {"at": {"$ref": "#/$defs/Point"}, "any": True},
    }
    offered = protocol.offer([CLOCK, {**CLOCK, "name": "go", "parameters": parameters}], None, None)

    assert obeys(call("go", at={"x": 1}, any=[1]), offered)
    assert not obeys(call("go", at={"x": "one"}), offered)
    assert parameters["properties"]["at"] == {"$ref": "#/$defs/Point"}


def test_a_property_named_like_a_keyword_is_a_property():
    parameters = {"type": "object", "properties": {"enum": {"type": "string"}, "type": {}}}
    offered = protocol.offer([{**CLOCK, "parameters": parameters}], "any", None)

    assert obeys(call("clock", enum="x", type=3), offered)
    assert not obeys(call("clock", enum=3), offered)


def test_structured_output_becomes_the_schema_of_the_answer():
    answer = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    offered = protocol.offer([CLOCK], "auto", answer)

    assert obeys({"answer": {"n": 1}}, offered)
    assert not obeys({"answer": "one"}, offered)


def test_the_system_text_names_functions_and_arguments():
    offered = protocol.offer([WEATHER, CLOCK], "auto", None)

    text = protocol.instructions(offered, "Be kind.")

    assert text.startswith("Be kind.")
    assert "- get_weather(city: string, unit?: C | F): Current weather" in text
    assert "- clock()" in text
    assert '{"answer":' in text
    assert '{"answer":' not in protocol.instructions(protocol.offer([CLOCK], "any", None), None)


def wire(*messages: dict[str, object]) -> list[bytes]:
    return [orjson.dumps(message) for message in messages]


def shown(messages: list[bytes]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in map(orjson.loads, messages)]


def tool_call(identifier: str, name: str, arguments: str) -> dict[str, object]:
    return {"id": identifier, "function": {"name": name, "arguments": arguments}}


def test_history_is_shown_in_the_protocols_own_shape():
    history = wire(
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [tool_call("1", "f", '{"x":1}'), tool_call("2", "g", "{}")],
        },
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "assistant", "content": "Done."},
    )

    assert shown(protocol.render(history, protocol.offer([CLOCK], "any", None))) == [
        ("user", "a\nb"),
        ("assistant", '{"name": "g", "arguments": {}}'),
        ("user", "Output of g:\ntwo"),
        ("assistant", '{"name": "f", "arguments": {"x": 1}}'),
        ("user", "Output of f:\none"),
        ("assistant", '{"answer": "Done."}'),
    ]
    assert shown(protocol.render(history, PLAIN))[-1] == ("assistant", "Done.")


def test_after_an_output_the_model_is_asked_to_answer_where_it_may():
    history = wire(
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [tool_call("1", "f", "{}")]},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
    )

    (*_, last) = shown(protocol.render(history, protocol.offer([CLOCK], "auto", None)))

    assert last[1].startswith("Output of f:\none\n\nReply ")


def turns(*calls: tuple[str, str]) -> list[bytes]:
    messages = wire({"role": "user", "content": "Go."})
    for name, arguments in calls:
        messages += wire(
            {"role": "assistant", "tool_calls": [tool_call("1", name, arguments)]},
            {"role": "tool", "tool_call_id": "1", "content": "ok"},
        )
    return messages


@pytest.mark.parametrize(
    ("history", "stuck"),
    [
        (turns(("f", "{}")), False),
        (turns(("f", "{}"), ("f", "{}")), True),
        (turns(("f", "{}"), ("f", '{"x":1}')), False),
        (turns(("f", "{}"), ("g", "{}"), ("f", "{}")), False),
        (turns(("f", "{}")) + turns(("f", "{}")), False),
    ],
)
def test_who_makes_the_same_call_twice_must_answer(history, stuck):
    auto, forced = protocol.offer([CLOCK], "auto", None), protocol.offer([CLOCK], "any", None)

    assert bool(protocol.unstick(auto, history).functions) is not stuck
    assert protocol.unstick(forced, history) == forced


def read(reply: str, cuts: list[int]) -> tuple[str, TextDelta | ToolCall | None]:
    """The shown text and the last event of a reply that arrives in pieces."""
    reader, text, start = protocol.ReplyReader(), "", 0
    for cut in [*sorted(cuts), len(reply)]:
        text += reader.feed(reply[start:cut])
        start = max(start, cut)
    return text, reader.finish()


CUTS = st.lists(st.integers(0, 200), max_size=20)


@given(st.text(), CUTS, st.booleans(), st.sampled_from([None, 1]))
def test_an_answer_arrives_whole_however_it_is_cut(answer, cuts, ascii_only, indent):
    reply = json.dumps({"answer": answer}, ensure_ascii=ascii_only, indent=indent)

    assert read(reply, cuts) == (answer, None)


@given(st.dictionaries(st.text(), st.integers() | st.text()), CUTS)
def test_a_call_arrives_whole_however_it_is_cut(arguments, cuts):
    reply = json.dumps({"name": "f", "arguments": arguments})

    assert read(reply, cuts) == ("", ToolCall(None, "f", arguments))


@given(st.text(max_size=50), st.integers(0, 400))
def test_a_cut_off_answer_is_a_beginning_of_it(answer, length):
    text, last = read(json.dumps({"answer": answer})[:length], [])

    assert answer.startswith(text)
    assert last is None


def test_the_answer_is_shown_while_it_is_written():
    reader = protocol.ReplyReader()

    assert reader.feed('{"ans') == ""
    assert reader.feed('wer": "Hel') == "Hel"
    assert reader.feed("lo\\") == "lo"
    assert reader.feed('n"') == "\n"
    assert reader.feed("}") == ""


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    assert read('{"answer": "a\\ud83dbc"}', []) == ("a\ufffdbc", None)


def test_a_cut_off_call_is_malformed():
    reply = '{"name": "f", "arguments": {"x": "unfini'

    assert read(reply, [])[1] == ToolCall(None, "f", {}, malformed='{"x": "unfini')


def test_a_structured_answer_comes_whole():
    assert read('{"answer": {"n": 1}}', [])[1] == TextDelta('{"n": 1}')
