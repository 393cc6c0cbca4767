"""Schemas of functions as every vendor takes them."""

import pytest

from openinteractions.models.function_schema import as_object
from openinteractions.models.port import Json

A: Json = {"type": "string"}
B: Json = {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "properties", "required"),
    [
        # One of several: what all require is required.
        (
            {
                "oneOf": [
                    {"properties": {"a": A, "x": A}, "required": ["x", "a"]},
                    {"properties": {"b": B, "x": B}, "required": ["x", "b"]},
                    {"type": "null"},
                ]
            },
            {"a": A, "b": B, "x": {"anyOf": [A, B]}},
            ["x"],
        ),
        # All of several.
        (
            {
                "properties": {"a": A},
                "required": ["a"],
                "allOf": [{"properties": {"b": B}, "required": ["b"]}],
            },
            {"a": A, "b": B},
            ["a", "b"],
        ),
        # At least one of several.
        (
            {"properties": {"a": A, "b": B}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            {"a": A, "b": B},
            None,
        ),
        # By reference, and nested.
        (
            {
                "anyOf": [{"$ref": "#/$defs/One"}, {"anyOf": [{"properties": {"b": B}}]}],
                "$defs": {"One": {"properties": {"a": A}}},
            },
            {"a": A, "b": B},
            None,
        ),
    ],
)
def test_the_parts_of_a_choice_are_laid_over_each_other(
    schema: Json, properties: Json, required: list[str] | None
):
    laid, is_less = as_object(schema)
    assert is_less
    assert laid["type"] == "object"
    assert laid["properties"] == properties
    assert laid.get("required") == required
    assert not {"anyOf", "oneOf", "allOf"} & laid.keys()
    assert laid.get("$defs") == schema.get("$defs")


@pytest.mark.parametrize(
    ("schema", "sent"),
    [
        (None, {"type": "object", "properties": {}}),
        ({"properties": {"a": A}}, {"type": "object", "properties": {"a": A}}),
        ({"type": ["object", "null"]}, {"type": "object", "properties": {}}),
        (
            {"$ref": "#/$defs/One", "$defs": {"One": {"type": "object", "properties": {"a": A}}}},
            {
                "type": "object",
                "properties": {"a": A},
                "$defs": {"One": {"type": "object", "properties": {"a": A}}},
            },
        ),
    ],
)
def test_what_can_be_said_in_full_is(schema: Json | None, sent: Json):
    assert as_object(schema) == (sent, False)


def test_a_good_schema_stays_as_it_is():
    schema = {
        "type": "object",
        "properties": {"a": {"anyOf": [A, B]}},
        "additionalProperties": False,
    }
    assert as_object(schema)[0] is schema


def test_a_schema_of_no_object_is_opened():
    assert as_object({"type": "string"}) == ({"type": "object", "properties": {}}, True)


@pytest.mark.parametrize("parts", [1, 50])
def test_a_schema_that_refers_to_itself_comes_to_an_end(parts: int):
    again = {"anyOf": [{"$ref": "#/$defs/A"}] * parts, "properties": {"a": A}}
    laid, _ = as_object({"anyOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": again}})
    assert laid["properties"] == {"a": A}
