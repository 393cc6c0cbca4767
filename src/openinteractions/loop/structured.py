"""Checking what a model wrote against the schema that was asked for."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

from openinteractions.errors import Invalid
from openinteractions.models.port import Json

# The contract ignores these, in function parameters and in response schemas (§12.2).
_IGNORED = frozenset(
    {
        "minLength",
        "maxLength",
        "minProperties",
        "maxProperties",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
    }
)
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"enum", "const", "default", "examples", "example", "required"})
_MESSAGE_CHARS = 300


def enforced(schema: Any) -> Any:  # noqa: ANN401 - any JSON
    """A schema as it is enforced: ignored keywords out, upper-case type names lowered."""
    if isinstance(schema, list):
        return [enforced(item) for item in schema]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(schema, dict):
        return schema
    result: Json = {}
    for key, value in schema.items():  # pyright: ignore[reportUnknownVariableType]
        if key in _IGNORED:
            continue
        if key == "type":
            result[key] = _lower(value)
        elif key in _VALUES:
            result[key] = value
        elif key in _MAPS and isinstance(value, dict):
            result[key] = {name: enforced(item) for name, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        else:
            result[str(key)] = enforced(value)  # pyright: ignore[reportUnknownArgumentType]
    if result.pop("nullable", False) is True and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


def _lower(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, str):
        return value.lower()
    if isinstance(value, list):
        return [_lower(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def require_schema(schema: Json, field: str) -> None:
    """Refuse a schema that is none.

    Raises:
        Invalid: The message names the field and what is wrong.
    """
    try:
        _validator(orjson.dumps(schema, option=orjson.OPT_SORT_KEYS))
    except SchemaError as error:
        where = "".join(f".{part}" for part in error.path)
        raise Invalid(
            f"Invalid value at '{field}{where}': {error.message[:_MESSAGE_CHARS]}"
        ) from None


@lru_cache(maxsize=256)
def _validator(schema: bytes) -> Draft202012Validator:
    document = enforced(orjson.loads(schema))
    Draft202012Validator.check_schema(document)
    # An empty registry: a `$ref` to somewhere else is an error, never a request.
    return Draft202012Validator(document, registry=Registry())


def mismatch(value: Any, schema: Json) -> str | None:  # noqa: ANN401 - any JSON
    """Why a JSON value does not obey a schema, in words a model understands; None if it does."""
    try:
        validator: Any = _validator(orjson.dumps(schema, option=orjson.OPT_SORT_KEYS))
        error = _first(validator.iter_errors(value))
    except Unresolvable as problem:
        return f"the schema refers to something it does not define ({problem})"[:_MESSAGE_CHARS]
    except RecursionError:
        return "the schema, or the value, goes deeper than can be followed"
    if error is None:
        return None
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
    return f"at ${where}: {error.message}"[:_MESSAGE_CHARS]


def _first(errors: Iterable[ValidationError]) -> ValidationError | None:
    return next(iter(errors), None)


def text_mismatch(text: str, schema: Json) -> str | None:
    """Why a text is not one JSON document of this schema; None if it is."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return f"it is not one JSON document ({error})"
    return mismatch(value, schema)


def arguments_mismatch(arguments: Mapping[str, Any], tool: Json | None) -> str | None:
    """Why a call's arguments do not obey its function's parameters; None if they do."""
    if tool is None:
        return "there is no function of this name"
    parameters = tool.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        return None
    return mismatch(dict(arguments), parameters)  # pyright: ignore[reportUnknownArgumentType]
