"""Request bodies: from bytes to a JSON object of bounded size and depth."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import orjson
from pydantic import TypeAdapter

from openinteractions.errors import Invalid
from openinteractions.wire.explain import drop_nulls, likeness, shown
from openinteractions.wire.fields import Json

MAX_CONTAINERS = 300_000
MAX_DEPTH = 200
"""orjson writes 254 levels; a request is stored and shown inside other objects."""


def read(adapter: TypeAdapter[Any], raw: bytes | Json, *, max_depth: int) -> Json:
    """A body's object, of which nothing is known yet; its null fields are left out.

    Args:
        adapter: What it is meant to be: says which nulls are fields.
        raw: The body, or an object that stands for one.
        max_depth: How deep the JSON may be nested; never more than MAX_DEPTH.

    Raises:
        Invalid: It is no JSON object, or nested too deep.
    """
    max_depth = min(max_depth, MAX_DEPTH)
    try:
        text = raw if isinstance(raw, bytes) else orjson.dumps(raw)
        containers = text.count(b"{") + text.count(b"[")
        if containers > MAX_CONTAINERS:
            # Building them takes far longer than their few bytes suggest.
            raise Invalid(f"The request body has more than {MAX_CONTAINERS} objects and arrays.")
        value: object = orjson.loads(text)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        raise Invalid(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise Invalid("The request body must be a JSON object.")
    body = cast("Json", value)
    # No body is nested deeper than it has opening brackets, and counting them is cheap.
    if containers > max_depth:
        _check_depth(body, max_depth)
    if b"null" in text:
        drop_nulls(adapter, body)
    return body


def chosen(mask: str, *, known: Sequence[str], body: Json) -> frozenset[str]:
    """The fields that an update mask names.

    Args:
        mask: Names, with commas between them.
        known: The fields that can be changed.
        body: What the mask is for.

    Raises:
        Invalid: It names another one, or one that the body does not have.
    """
    names = [part.strip() for part in mask.split(",")]
    for name in names:
        if name not in known:
            raise Invalid(f"Unknown path '{shown(name)}' in 'update_mask'.{likeness(name, known)}")
        if name not in body:
            raise Invalid(f"'update_mask' names '{shown(name)}', which the body does not have.")
    return frozenset(names)


def _check_depth(body: Json, max_depth: int) -> None:
    level: list[object] = [body]
    for _ in range(max_depth):
        level = [item for container in level for item in _inside(container)]
        if not level:
            return
    raise Invalid(f"The request body is nested deeper than {max_depth} levels.")


def _inside(container: object) -> Iterator[object]:
    """The containers that are directly in this one."""
    if isinstance(container, dict):
        items: Iterable[object] = cast("dict[str, object]", container).values()
    else:
        items = cast("list[object]", container)
    for item in items:
        if isinstance(item, (dict, list)):
            yield cast("object", item)
