"""Schemas of functions as OpenAI and Anthropic take them: an object, with no choice at its top.

OpenAI answers a schema with `anyOf`, `oneOf`, `allOf`, `enum`, `const` or `not` at the top, or with
another type than `object`, with a 400; so does Anthropic for the first three and for the type.
"""

from typing import Any, Final, cast

from openinteractions.models.port import Json

LAID_OPEN: Final = (
    "This vendor takes one object, without a choice at its top: the model is shown all properties."
)
"""What a caller is told of a schema that had to be changed."""
_EITHER: Final = ("anyOf", "oneOf")
_REFUSED: Final = frozenset({*_EITHER, "allOf", "enum", "const", "not"})
_MOST_PARTS: Final = 200
"""Of one schema: what refers to itself would go on for ever."""


def as_object(schema: Json | None) -> tuple[Json, bool]:
    """The schema as it may be sent, and whether that says less than the schema does.

    Parts of a choice are laid over each other: what one of them knows is known, what each of them
    requires is required. The loop checks a call against the caller's own schema all the same.
    """
    if not schema:
        return {"type": "object", "properties": {}}, False
    if "$ref" in schema:
        rest = {name: value for name, value in schema.items() if name != "$ref"}
        return as_object({**_target(schema["$ref"], schema), **rest})
    if not _may_be_object(schema):
        return {"type": "object", "properties": {}}, True
    if not _REFUSED & schema.keys():
        is_whole = schema.get("type") == "object" and "properties" in schema
        whole: Json = {"properties": {}, **schema, "type": "object"}
        return (schema if is_whole else whole), False
    kept = {name: value for name, value in schema.items() if name not in _REFUSED}
    # What closes one part would shut out the properties of the others.
    kept.pop("additionalProperties", None)
    return {**kept, "type": "object", **_Layers(schema).of(schema)}, True


def _may_be_object(schema: Json) -> bool:
    kinds: Any = schema.get("type", "object")
    return kinds == "object" or (isinstance(kinds, list) and "object" in kinds)


class _Layers:
    """Lays the parts of a schema over each other."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._left = _MOST_PARTS

    def of(self, node: Json) -> Json:
        """The properties of a schema and of its parts; what each way through it requires."""
        self._left -= 1
        node = {**_target(node.get("$ref"), self._root), **node}
        properties: Json = dict(_object(node.get("properties")))
        named: Any = node.get("required")
        required: list[str] = list(named) if isinstance(named, list) else []  # pyright: ignore[reportUnknownArgumentType] - any JSON
        for keyword in (*_EITHER, "allOf"):
            parts = self._parts(node.get(keyword))
            for name, schema in (pair for part in parts for pair in part["properties"].items()):
                properties[name] = _either(properties.get(name, schema), schema)
            each = [part.get("required", []) for part in parts]
            if keyword == "allOf":
                required += [name for names in each for name in names]
            elif each:
                required += [name for name in each[0] if all(name in names for names in each)]
        found: Json = {"properties": properties}
        return {**found, "required": list(dict.fromkeys(required))} if required else found

    def _parts(self, value: Any) -> list[Json]:  # noqa: ANN401 - any JSON
        parts = cast("list[Any]", value) if isinstance(value, list) else []
        return [
            self.of(cast("Json", part))
            for part in parts
            if isinstance(part, dict) and self._left > 0 and _may_be_object(cast("Json", part))
        ]


def _either(one: Any, other: Any) -> Any:  # noqa: ANN401 - `true` is a schema too
    if one == other:
        return one
    known = cast("Json", one).get("anyOf") if isinstance(one, dict) and len(one) == 1 else None  # pyright: ignore[reportUnknownArgumentType] - any JSON
    parts: list[Any] = list(known) if known else [one]
    return {"anyOf": parts if other in parts else [*parts, other]}


def _target(reference: Any, root: Json) -> Json:  # noqa: ANN401 - any JSON
    """What a reference within the schema means; nothing where it means nothing, or itself."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return {}
    node: Any = root
    for name in reference[2:].split("/"):
        node = _object(node).get(name.replace("~1", "/").replace("~0", "~"))
    found = _object(node)
    return {name: value for name, value in found.items() if name != "$ref"}


def _object(value: Any) -> Json:  # noqa: ANN401 - any JSON
    return cast("Json", value) if isinstance(value, dict) else {}
