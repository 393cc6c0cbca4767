"""Validation with messages for the caller.

pydantic says where and what; this module says it in the contract's words. The place is found by
walking the schema and the data together, since pydantic's own location also names the chosen
members of unions.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from openinteractions.errors import Invalid
from openinteractions.wire.fields import Json

T = TypeVar("T")

_SHOWN_CHARS = 80
_MAX_FAULTS = 1000
_ANY: Json = {"type": "any"}
_CAMEL = re.compile(r"(?<=[a-z0-9])([A-Z])")
_SHAPES = {"string": "a string", "list": "a list", "object": "an object"}

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "a smaller integer",
    "bool_type": "a boolean",
    "float_type": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "dict_type": "an object",
    "string_too_short": "a non-empty string",
    "string_pattern_mismatch": "a string that matches {pattern}",
    "string_too_long": "at most {max_length} characters",
    "too_long": "at most {max_length} items",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number that is at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number that is at most {le}",
}


@dataclass(frozen=True, slots=True)
class _Place:
    path: str
    parent: str
    key: str | int | None
    value: object
    known: Sequence[str]
    """The keys that the containing object may have."""


def validated(adapter: TypeAdapter[T], value: Json) -> T:
    """Validate, or refuse with the most useful error.

    Raises:
        Invalid: The value is not of the type; the message names the place.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        if error.error_count() > _MAX_FAULTS:
            # Listing them would cost far more than the body itself.
            raise Invalid(f"The request has more than {_MAX_FAULTS} faults.") from None
        details = error.errors(include_url=False)
    raise Invalid(_explanation(adapter, details, value))


def drop_nulls(adapter: TypeAdapter[Any], value: Json) -> None:
    """Take the known fields that are null out of a value, in place: null stands for absent.

    What the type does not describe (arguments, schemas, metadata) keeps its nulls.
    """
    schema = cast("Json", adapter.core_schema)
    _drop(schema, _definitions(schema), value)


def _drop(schema: Json, named: Mapping[str, Json], value: object) -> None:
    schema = _bare(schema, named)
    if schema["type"] == "tagged-union":
        member = schema["choices"].get(schema["discriminator"](value))
        if member is not None:
            _drop(member, named, value)
    elif schema["type"] == "list" and isinstance(value, list):
        items = schema.get("items_schema", _ANY)
        for item in cast("list[object]", value):
            _drop(items, named, item)
    elif schema["type"] == "typed-dict" and isinstance(value, dict):
        fields = cast("Json", value)
        for key in schema["fields"].keys() & fields.keys():
            if fields[key] is None:
                del fields[key]
            else:
                _drop(schema["fields"][key], named, fields[key])


def _explanation(adapter: TypeAdapter[Any], details: list[ErrorDetails], value: Json) -> str:
    # A misspelt key explains the missing one that it was meant to be.
    detail = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    place = _locate(adapter, detail["loc"], value)
    kind, context = detail["type"], cast("Mapping[str, Any]", detail.get("ctx", {}))
    match kind:
        case "extra_forbidden":
            text = _unknown(place)
        case "missing":
            text = f"Missing required parameter '{place.key}'{_at(place.parent)}."
        case "literal_error":
            text = _bad_enum(place.path, place.value, context["expected"])
        case "union_tag_invalid" | "union_tag_not_found":
            text = _bad_member(place, _tags(adapter, detail["loc"]))
        case "wire":
            field = context["field"]
            path = f"{place.path}.{field}" if field and place.path else field or place.path
            text = context["text"].replace("{at}", _at(path))
        case _:
            expected = _EXPECTED.get(kind, "another value").format_map(context)
            text = f"Invalid value{_at(place.path)}: expected {expected}."
    return text


def _at(path: str) -> str:
    return f" at '{path}'" if path else ""


def _unknown(place: _Place) -> str:
    key = str(place.key)
    return f"Unknown parameter '{shown(key)}'{_at(place.parent)}.{likeness(key, place.known)}"


def likeness(name: str, known: Sequence[str]) -> str:
    """What to add to a message about an unknown name: the known one that it was meant to be."""
    # Looking for it costs more than the name's length: none is longer.
    if len(name) > _SHOWN_CHARS:
        return ""
    snake = _CAMEL.sub(r"_\1", name).lower()
    near = [snake] if snake in known else difflib.get_close_matches(snake, known, n=1, cutoff=0.7)
    return f" Did you mean '{near[0]}'?" if near else ""


def _bad_enum(path: str, value: object, expected: str) -> str:
    options = expected.replace("'", "").replace(" or ", ", ")
    if isinstance(value, str):
        return f"Invalid enum value '{shown(value)}'{_at(path)}. Expected one of: {options}."
    return f"Invalid value{_at(path)}: expected one of {options}."


def _bad_member(place: _Place, tags: list[str]) -> str:
    if set(tags) <= _SHAPES.keys():
        wanted = ", ".join(_SHAPES[tag] for tag in tags[:-1]) + f" or {_SHAPES[tags[-1]]}"
        return f"Invalid value{_at(place.path)}: expected {wanted}."
    if not isinstance(place.value, dict):
        return f"Invalid value{_at(place.path)}: expected an object."
    kind = cast("Json", place.value).get("type")
    if kind is None:
        return f"Missing required parameter 'type'{_at(place.path)}."
    path = f"{place.path}.type" if place.path else "type"
    options = ", ".join(tag for tag in tags if tag not in ("turn", "schema"))
    return _bad_enum(path, kind, options)


def shown(text: str) -> str:
    """A caller's text, short enough for a message and without control characters."""
    text = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _tags(adapter: TypeAdapter[Any], loc: Sequence[str | int]) -> list[str]:
    schema = cast("Json", adapter.core_schema)
    named = _definitions(schema)
    for key in loc:
        schema = _child(_bare(schema, named), key)
    return [str(tag) for tag in _bare(schema, named).get("choices", {})]


def _locate(adapter: TypeAdapter[Any], loc: Sequence[str | int], value: object) -> _Place:
    schema = cast("Json", adapter.core_schema)
    named = _definitions(schema)
    place = _Place("", "", None, value, ())
    for key in loc:
        schema = _bare(schema, named)
        if schema["type"] != "tagged-union" and key != "[key]":
            place = _step_into(place, key, tuple(schema.get("fields", ())))
        schema = _child(schema, key)
    return place


def _step_into(place: _Place, key: str | int, known: Sequence[str]) -> _Place:
    if isinstance(key, int):
        path = f"{place.path}[{key}]"
    else:
        path = f"{place.path}.{shown(key)}" if place.path else shown(key)
    return _Place(path, place.path, key, _item(place.value, key), known)


def _item(container: object, key: str | int) -> object:
    if isinstance(container, dict):
        return cast("dict[object, object]", container).get(key)
    if isinstance(container, list) and isinstance(key, int):
        items = cast("list[object]", container)
        return items[key] if key < len(items) else None
    return None


def _definitions(schema: Json) -> dict[str, Json]:
    return {item["ref"]: item for item in schema.get("definitions", ())}


def _bare(schema: Json, named: Mapping[str, Json]) -> Json:
    """The schema under validators, defaults, definitions and references."""
    while True:
        if schema["type"] == "definition-ref":
            schema = named[schema["schema_ref"]]
        elif "schema" in schema:
            schema = schema["schema"]
        else:
            return schema


def _child(schema: Json, key: str | int) -> Json:
    match schema["type"]:
        case "tagged-union":
            return schema["choices"].get(key, _ANY)
        case "typed-dict":
            return schema["fields"].get(key, _ANY)
        case "list":
            return schema.get("items_schema", _ANY)
        case "dict":
            return schema.get("values_schema", _ANY)
        case _:
            return _ANY
