"""Telling at a glance that a schema is one.

The meta-schema takes about a millisecond for each object of a schema, this a microsecond. Nearly
all schemas of tools are as plain as it takes.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, cast

_Todo: TypeAlias = list[tuple[Any, int]]
"""Schemas that are still to be looked at, and how deep they stand."""

_MAX_DEPTH: Final = 12
"""Deeper ones are the meta-schema's matter, which knows when to give up."""
_TYPES: Final = frozenset(
    {"array", "boolean", "integer", "null", "number", "object", "string"},
)


def plain_size(schema: Any) -> int | None:  # noqa: ANN401 - any JSON
    """How many schemas are in it, if the meta-schema of 2020-12 certainly accepts it.

    Returns:
        None where it has to be asked.
    """
    count = 0
    todo: _Todo = [(schema, 0)]
    while todo:
        node, depth = todo.pop()
        count += 1
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict) or depth > _MAX_DEPTH:
            return None
        for key, value in cast("dict[str, Any]", node).items():
            check = _KEYWORDS.get(key)
            if check is None or not check(value, todo, depth + 1):
                return None
    return count


def _schema(value: Any, todo: _Todo, depth: int) -> bool:  # noqa: ANN401
    todo.append((value, depth))
    return True


def _schemas(value: Any, todo: _Todo, depth: int) -> bool:  # noqa: ANN401
    if not isinstance(value, list) or not value:
        return False
    todo += [(item, depth) for item in cast("list[Any]", value)]
    return True


def _map(value: Any, todo: _Todo, depth: int) -> bool:  # noqa: ANN401
    if not isinstance(value, dict):
        return False
    todo += [(item, depth) for item in cast("dict[str, Any]", value).values()]
    return True


def _type(value: Any, _todo: _Todo, _depth: int) -> bool:  # noqa: ANN401
    if isinstance(value, str):
        return value in _TYPES
    return bool(value) and _names(value, _todo, _depth) and _TYPES.issuperset(value)


def _names(value: Any, _todo: _Todo, _depth: int) -> bool:  # noqa: ANN401
    if not isinstance(value, list):
        return False
    items = cast("list[Any]", value)
    return all(isinstance(item, str) for item in items) and len(set(items)) == len(items)


def _text(value: Any, _todo: _Todo, _depth: int) -> bool:  # noqa: ANN401
    return isinstance(value, str)


def _flag(value: Any, _todo: _Todo, _depth: int) -> bool:  # noqa: ANN401
    return isinstance(value, bool)


def _list(value: Any, _todo: _Todo, _depth: int) -> bool:  # noqa: ANN401
    return isinstance(value, list)


def _number(value: Any, _todo: _Todo, _depth: int) -> bool:  # noqa: ANN401
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any, _todo: _Todo, _depth: int) -> bool:  # noqa: ANN401
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _any(_value: Any, _todo: _Todo, _depth: int) -> bool:  # noqa: ANN401
    return True


_KINDS: Final[Mapping[Callable[[Any, _Todo, int], bool], str]] = {
    _schema: "additionalProperties contains contentSchema else if items not propertyNames then "
    "unevaluatedItems unevaluatedProperties",
    _schemas: "allOf anyOf oneOf prefixItems",
    _map: "$defs definitions dependentSchemas patternProperties properties",
    _type: "type",
    _names: "required",
    _text: "$comment $ref $schema contentEncoding contentMediaType description format pattern "
    "title",
    _flag: "deprecated readOnly uniqueItems writeOnly",
    _list: "enum examples",
    _number: "exclusiveMaximum exclusiveMinimum maximum minimum",
    _count: "maxContains maxItems maxLength maxProperties minContains minItems minLength "
    "minProperties",
    _any: "const default",
}
_KEYWORDS: Final = {key: check for check, keys in _KINDS.items() for key in keys.split()}
