"""Schemas are enforced as the contract says, and never make a request."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openinteractions.errors import Invalid
from openinteractions.loop.structured import (
    arguments_mismatch,
    enforced,
    mismatch,
    require_schema,
    text_mismatch,
)

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=12,
)


def test_ignored_keywords_are_taken_out_everywhere():
    schema = {
        "type": "OBJECT",
        "minProperties": 1,
        "properties": {
            "minLength": {"type": "STRING", "maxLength": 3, "nullable": True},
            "l": {"type": "array", "uniqueItems": True, "items": {"type": ["STRING", "NULL"]}},
        },
        "required": ["minLength"],
        "enum": [{"minLength": 1}],
        "anyOf": [{"minContains": 1, "type": "INTEGER"}],
    }
    assert enforced(schema) == {
        "type": "object",
        "properties": {
            "minLength": {"type": ["string", "null"]},
            "l": {"type": "array", "items": {"type": ["string", "null"]}},
        },
        "required": ["minLength"],
        "enum": [{"minLength": 1}],
        "anyOf": [{"type": "integer"}],
    }


@given(JSON)
def test_enforcing_twice_changes_nothing(schema: object):
    assert enforced(enforced(schema)) == enforced(schema)


def test_a_mismatch_names_the_place():
    schema = {
        "type": "object",
        "properties": {"l": {"type": "array", "items": {"type": "integer"}}},
    }
    assert mismatch({"l": [1, 2]}, schema) is None
    assert str(mismatch({"l": [1, "x"]}, schema)).startswith("at $.l[1]: ")
    assert len(str(mismatch({"l": ["x" * 5000]}, schema))) <= 300


def test_texts_are_one_json_document():
    assert text_mismatch('{"a": 1}', {}) is None
    for text in ("", "x", '{"a": 1} and more', "```json\n{}\n```", '{"a": NaN}'):
        assert "not one JSON document" in str(text_mismatch(text, {}))


def test_arguments_are_those_of_a_known_function():
    tool = {"type": "function", "name": "f", "parameters": {"required": ["q"]}}
    assert arguments_mismatch({"q": 1}, tool) is None
    assert arguments_mismatch({}, tool)
    assert arguments_mismatch({"x": 1}, {"type": "function", "name": "f"}) is None
    assert "no function" in str(arguments_mismatch({}, None))


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"required": "q"}, {"enum": 3}])
def test_what_is_no_schema_is_refused_with_its_place(schema: dict):
    with pytest.raises(Invalid, match=r"tools\[0\].parameters"):
        require_schema(schema, "tools[0].parameters")


@pytest.mark.parametrize(
    "schema", [{"type": "string", "pattern": "("}, {"patternProperties": {"(": {}}}]
)
def test_a_pattern_that_is_no_pattern_is_refused_and_never_crashes(schema: dict):
    with pytest.raises(Invalid):
        require_schema(schema, "response_format.schema")


async def test_a_reference_to_somewhere_else_is_never_fetched():
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for reference in (f"http://127.0.0.1:{port}/s.json", "file:///etc/passwd", "#/$defs/none"):
        schema = {"$ref": reference}
        require_schema(schema, "x")
        found = await asyncio.to_thread(mismatch, {"a": 1}, schema)
        assert "refers to something it does not define" in str(found)
    server.close()
    assert asked == []


def test_local_references_work_also_in_circles():
    tree = {
        "$defs": {"t": {"type": "object", "properties": {"c": {"$ref": "#/$defs/t"}}}},
        "$ref": "#/$defs/t",
    }
    assert mismatch({"c": {"c": {}}}, tree) is None
    assert mismatch({"c": {"c": 1}}, tree) is not None


@pytest.mark.parametrize("value", [{}, {"a": 1}])
def test_a_reference_that_leads_to_itself_is_an_answer(value: object):
    schema = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    assert mismatch(value, schema) is not None
