"""What is taken for a schema at a glance has to be one."""

import pytest
from jsonschema import Draft202012Validator

from openinteractions.errors import Invalid
from openinteractions.loop import structured
from openinteractions.loop.plain_schema import _KEYWORDS, plain_size
from openinteractions.loop.structured import require_schema

VALUES = [
    None, True, False, 0, 1, -1, 1.5, 2.0, "", "a", "string", "#/$defs/a", [], [1], [True], ["a"],
    ["a", "a"], ["string"], ["string", "string"], [{}], [{"type": "x"}], [{}, 1], {}, {"a": {}},
    {"a": 1}, {"a": True}, {"type": "string"}, {"type": "x"}, {"a": {"type": "x"}},
]  # fmt: skip
META = Draft202012Validator(Draft202012Validator.META_SCHEMA)
# Keywords that only the meta-schema judges.
OTHERS = ["$anchor", "$dynamicRef", "$id", "$vocabulary", "dependencies", "multipleOf", "x-mine"]


@pytest.mark.parametrize("keyword", [*sorted(_KEYWORDS), *OTHERS])
def test_nothing_is_taken_that_the_meta_schema_refuses(keyword):
    for value in VALUES:
        for schema in ({keyword: value}, {"items": {"properties": {"a": {keyword: value}}}}):
            if plain_size(schema) is not None:
                assert META.is_valid(schema), schema


def test_the_schemas_of_tools_are_taken():
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "title": "Find",
        "required": ["q"],
        "additionalProperties": False,
        "properties": {
            "q": {"type": ["string", "null"], "description": "What.", "maxLength": 9},
            "n": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "default": None},
            "kinds": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1},
            "more": {"$ref": "#/$defs/more"},
        },
        "$defs": {"more": {"type": "object", "additionalProperties": {"type": "number"}}},
    }
    assert plain_size(schema) == 11


def test_in_the_common_case_the_meta_schema_is_not_asked(monkeypatch):
    inner = {"type": "object", "properties": {"a": {"type": "string"}}}
    schema = {"type": "object", "properties": {f"p{n}": inner for n in range(2_000)}}
    monkeypatch.setattr(structured, "_META", None)
    require_schema(schema, "f")


def test_a_check_keeps_to_its_steps():
    schema = {"properties": {f"a{n}": {"type": "string"} for n in range(100)}}
    require_schema(schema, "f", steps=1_000)
    for costly in (schema, {"$id": "x", "properties": {"a": {}}}):
        with pytest.raises(Invalid, match="too large or too deep"):
            require_schema(costly, "f", steps=40)
