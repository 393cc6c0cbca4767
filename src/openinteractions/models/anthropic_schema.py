"""JSON schemas as Anthropic's structured output takes them.

https://platform.claude.com/docs/en/build-with-claude/structured-outputs
"""

from typing import Any, Final, cast

from openinteractions.models.port import Json

# Keywords that the vendor refuses; most of them the contract ignores as well.
_REFUSED: Final = frozenset(
    {
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "minProperties",
        "maxProperties",
        "maxItems",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
    }
)
_BY_NAME: Final = ("properties", "$defs", "definitions")
_IN_LISTS: Final = ("anyOf", "oneOf", "allOf")


def closed(schema: Json) -> tuple[Json, list[str]]:
    """A copy whose objects take no further properties, and the keywords that had to go."""
    dropped: set[str] = set()
    return _closed(schema, dropped), sorted(dropped)


def _closed(schema: Any, dropped: set[str]) -> Any:  # noqa: ANN401 - `true` is a schema too
    if not isinstance(schema, dict):
        return schema
    result: Json = {}
    for name, value in cast("Json", schema).items():
        if name in _REFUSED or (name == "minItems" and value > 1):
            dropped.add(name)
        elif name in _BY_NAME:
            result[name] = {key: _closed(inner, dropped) for key, inner in value.items()}
        elif name in _IN_LISTS:
            variants = [_closed(inner, dropped) for inner in value]
            result["anyOf" if name == "oneOf" else name] = variants
        elif name == "items":
            result[name] = _closed(value, dropped)
        else:
            result[name] = value
    if result.get("type") == "object" or "properties" in result:
        if result.get("additionalProperties"):
            dropped.add("additionalProperties")
        result["additionalProperties"] = False
    return result
