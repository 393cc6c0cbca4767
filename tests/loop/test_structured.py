"""Schemas are enforced as the contract says, and never make a request."""

import asyncio
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

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


def test_a_mismatch_says_what_is_wrong_however_long_the_value_is():
    urls = [f"https://shop.example/a/rather/long/path/{n}" for n in range(25)]
    schema = {"type": "object", "properties": {"urls": {"type": "array", "maxItems": 20}}}
    assert mismatch({"urls": urls}, schema) == (
        "at $.urls: it has 25 items, and may have at most 20"
    )
    schema = {"type": "object", "properties": {"urls": {"type": "string"}}}
    told = str(mismatch({"urls": urls}, schema))
    assert told.startswith("at $.urls: ['https://shop.example")
    assert told.endswith("is not of type 'string'")
    assert len(told) <= 300


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
        with pytest.raises(Invalid, match=r"Invalid value at 'x\.\$ref': .*does not define"):
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


def test_schemas_and_values_may_be_twenty_levels_deep():
    schema: dict = {"type": "integer"}
    value: object = "x"
    for _ in range(20):
        schema = {"type": "object", "properties": {"a": schema}}
        value = {"a": value}
    require_schema(schema, "x")
    assert "not of type 'integer'" in str(mismatch(value, schema))


@pytest.mark.parametrize("value", [{}, {"a": 1}])
def test_a_reference_that_leads_to_itself_is_an_answer(value: object):
    schema = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    assert mismatch(value, schema) is not None


def _doubling(last: dict, *, key: str = "allOf") -> dict:
    levels = {f"d{n}": {key: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(25)}
    return {"$defs": {**levels, "d25": last}, "$ref": "#/$defs/d0"}


COSTLY = {
    "doubling": (_doubling({"type": "integer"}), 1),
    "any of": (_doubling({"type": "integer"}, key="anyOf"), "x"),
    "another dialect": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            **_doubling({"$schema": "http://json-schema.org/draft-07/schema#"}),
        },
        1,
    ),
    "each item has all names": (
        {"items": {"required": [], "properties": {f"p{n}": True for n in range(3000)}}},
        [{}] * 20_000,
    ),
    "long messages": ({"anyOf": [{"type": "integer"}] * 2000}, "x" * 1_000_000),
    "large enum, many items": ({"items": {"enum": list(range(20_000))}}, [19_999] * 20_000),
    "many unevaluated": (
        {"anyOf": [{"required": ["p0"]}], "unevaluatedProperties": {"type": "integer"}},
        {f"p{n}": 1 for n in range(20_000)},
    ),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", COSTLY)
def test_what_is_too_costly_to_check_is_accepted_and_logged(name: str):
    schema, value = COSTLY[name]
    require_schema(schema, "x")
    with capture_logs() as logs:
        assert mismatch(value, schema) is None
    assert [line["event"] for line in logs] == ["schema.too_costly"]


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("^(a+)+$", "a" * 29 + "!"),
        ("^(?:a|a)*$", "a" * 29 + "!"),
        ("a?" * 29 + "a" * 29 + "!", "a" * 29),
        ("(a|a)" * 29 + "!", "a" * 29),
        ("a{0,999}" * 9 + "!", "a" * 999),
        ("a*a*!", "a" * 2000),
        ("^a*a*a*!", "a" * 2000),
        (r"^(a+)\1$", "b"),
        ("^(?=a)a$", "b"),
        ("(?i)^a$", "b"),
        ("^a$", "b" * 2001),
        ("^" + "a" * 500, "b"),
    ],
)
def test_a_costly_pattern_is_not_enforced(pattern: str, text: str):
    by_name = {"patternProperties": {pattern: False}, "additionalProperties": False}
    for schema, value in (
        ({"type": "string", "pattern": pattern}, text),
        (by_name, {text: 1}),
        ({**by_name, "unevaluatedProperties": False}, {text: 1}),
    ):
        require_schema(schema, "x")
        assert mismatch(value, schema) is None


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("^[a-z]+@[a-z]+$", "ab@cd"),
        (r"^\d{4}-\d{2}-\d{2}$", "2026-01-31"),
        ("^(red|green|blue)$", "green"),
        ("^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$", str(UUID(int=7))),
        ("^[(a+)+|]{1,3}$", "+a|"),
        (r"^\(a\)+?$", "(a)"),
    ],
)
def test_a_cheap_pattern_is_enforced(pattern: str, text: str):
    assert mismatch(text, {"pattern": pattern}) is None
    assert "does not match" in str(mismatch("?!", {"pattern": pattern}))
    names = {"patternProperties": {pattern: {"type": "integer"}}, "additionalProperties": False}
    assert mismatch({text: 1}, names) is None
    assert mismatch({text: "x"}, names) is not None
    assert "unexpected" in str(mismatch({"?!": 1}, names))


def _deep(levels: int) -> dict:
    schema: dict = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "schema",
    [
        {"description": "x" * 256_000},
        {"allOf": [{}] * 60_000},
        {"type": [1, "a"] * 30_000},
        {"anyOf": [{"pattern": f"[{n}-\U0010ffff]"} for n in range(1, 9000)]},
        _deep(200),
        _deep(400),
    ],
    ids=["large", "wide", "mixed", "patterns", "deep", "deeper"],
)
def test_a_schema_that_cannot_be_checked_is_refused(schema: dict):
    with pytest.raises(Invalid, match=r"Invalid value at 'tools\[3\]\.parameters"):
        require_schema(schema, "tools[3].parameters")


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"$ref": "other.json"}}},
        {"properties": {"a": {"$ref": "https://json-schema.org/draft/2020-12/schema"}}},
        {"properties": {"a": {"$ref": "#/title/0"}}, "title": "abc"},
        {"properties": {"a": {"$ref": "#/minimum/x"}}, "minimum": 3},
        {"properties": {"a": {"$ref": "#nowhere"}}},
        {"properties": {"a": {"$dynamicRef": "#nowhere"}}},
        {"properties": {"a": {"$ref": "#/enum/0"}}, "enum": [{"type": 3}]},
    ],
)
def test_a_reference_to_no_schema_of_the_document_is_refused_with_its_place(schema: dict):
    with pytest.raises(Invalid, match=r"Invalid value at 'x\.properties\.a\.\$"):
        require_schema(schema, "x")


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"c": {"$ref": "#"}}, "type": "object"},
        {"$id": "https://x.test/s", "properties": {"c": {"$ref": "#"}}, "type": "object"},
        {"$anchor": "t", "properties": {"c": {"$ref": "#t"}}, "type": "object"},
        {"$dynamicAnchor": "t", "properties": {"c": {"$dynamicRef": "#t"}}, "type": "object"},
    ],
)
def test_recursive_schemas_are_followed(schema: dict):
    require_schema(schema, "x")
    assert mismatch({"c": {"c": {}}}, schema) is None
    assert str(mismatch({"c": {"c": 1}}, schema)).startswith("at $.c.c: ")


def test_a_large_but_plain_value_and_schema_are_checked():
    names = {f"p{n}": {"type": "string", "description": "d" * 40} for n in range(500)}
    schema = {"items": {"properties": names, "required": ["p0"], "additionalProperties": False}}
    require_schema(schema, "x")
    assert mismatch([{"p0": "a"}] * 300, schema) is None
    assert mismatch([{"p0": "a"}] * 300 + [{"p0": 1}], schema) is not None
    assert mismatch(["x" * 3_000_000], {"items": {"type": "integer"}}) is not None


@pytest.mark.parametrize("key", ["not", "allOf", "anyOf", "if", "unevaluatedProperties"])
def test_no_circle_reaches_the_limit_of_the_interpreter(key: str):
    below = [{"$ref": "#"}] if key in {"allOf", "anyOf"} else {"$ref": "#"}
    schema = {"items": {"$ref": "#"}, "unevaluatedProperties": False, key: below}
    require_schema(schema, "x")
    value: object = {"a": {}}
    for _ in range(250):
        value = [value] if key == "unevaluatedProperties" else {"a": value}
    assert "deeper" in str(mismatch(value, schema))


@pytest.mark.timeout(5)
def test_the_value_is_not_written_out_for_each_schema_that_allows_nothing():
    schema = {"oneOf": [False] * 3000}
    assert mismatch("x" * 10_000_000, schema) is not None
