"""Pictures in results that a model's vendor refuses: the run goes on without them.

A result stays in the conversation. One picture that is refused would end this run, and every later
turn, though the model only has to know that it cannot see it.
"""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final, cast

from openinteractions.errors import ContextOverflow, ModelError, ModelRejected
from openinteractions.models.port import Json

LEFT_OUT: Final = (
    "[A picture was here. It is left out, since this model's vendor refused a request with it.]"
)
_STATUSES: Final = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY})
_NAMES_ONE: Final = re.compile(r"images?\b|image_|inline_?data|picture", re.IGNORECASE)


def are_refused(error: ModelError) -> bool:
    """Whether a vendor has refused a request for a picture in it, as far as it says so."""
    if not isinstance(error, ModelRejected) or isinstance(error, ContextOverflow):
        return False
    return error.upstream_status in _STATUSES and _NAMES_ONE.search(error.message) is not None


def without(steps: Sequence[Json]) -> list[Json]:
    """The steps, a text in place of each picture in a result; those of an input stay."""
    return [_without(step) if step["type"].endswith("_result") else step for step in steps]


def _without(step: Json) -> Json:
    result: Any = step.get("result")
    if not isinstance(result, list):
        return step
    return {**step, "result": [_text(block) for block in cast("list[Any]", result)]}


def _text(block: Any) -> Any:  # noqa: ANN401 - any JSON
    if not isinstance(block, dict):
        return block
    fields = cast("Json", block)
    return {"type": "text", "text": LEFT_OUT} if fields.get("type") == "image" else fields
