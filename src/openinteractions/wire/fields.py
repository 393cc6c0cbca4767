"""What the contract's types share: configuration, case folding, unions, refusals.

The types are TypedDicts, so that validation gives back plain dictionaries in normal form (enums in
their canonical case, standard base64) and nothing has to be dumped again.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias, cast

from pydantic import BeforeValidator, ConfigDict, Discriminator, FailFast, Field
from pydantic_core import PydanticCustomError

Json: TypeAlias = dict[str, Any]
"""One JSON object."""

REQUEST = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
"""Objects that a caller writes: unknown keys are refused."""
REPLAYED = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)
"""Objects that a caller sends back as received: unknown keys are kept."""

MAX_INT64 = 2**63 - 1


class _FirstFault(FailFast):
    """pydantic's own, which cannot be hashed and so not be a member of a union."""

    def __hash__(self) -> int:
        return id(self)


FIRST_FAULT = _FirstFault()
"""For lists: only the first bad item is reported, so a long list of them costs no more."""


def fold(*values: str) -> BeforeValidator:
    """Read an enum in any case; the value becomes the spelling given here."""
    canonical = {value.lower(): value for value in values}

    def folded(value: object) -> object:
        return canonical.get(value.lower(), value) if isinstance(value, str) else value

    return BeforeValidator(folded)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _whole_number(value: object) -> object:
    """JSON has no 64-bit integers, so SDKs write them as strings of digits."""
    if (
        isinstance(value, str)
        and value.isascii()
        and value.isdigit()
        and len(value) <= len("9" * 19)
    ):
        return int(value)
    return value


LOWER = BeforeValidator(_lower)

Count: TypeAlias = Annotated[int, Field(gt=0, le=MAX_INT64), BeforeValidator(_whole_number)]
"""A positive 64-bit integer, which may arrive as a string of digits."""
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name: TypeAlias = Annotated[str, Field(min_length=1)]
Duration: TypeAlias = Annotated[str, Field(pattern=r"^[0-9]{1,12}(\.[0-9]{1,9})?s$")]
"""Seconds as the contract writes them: `"1.5s"`."""


def refusal(text: str, *, field: str | None = None) -> PydanticCustomError:
    """An error to raise from a validator.

    Args:
        text: The message for the caller; `{at}` becomes ` at '<path>'`, or nothing at the root.
        field: Completes the path, where the fault lies in one field of the validated object.
    """
    return PydanticCustomError("wire", "{text}", {"text": text, "field": field or ""})


def shape(value: object) -> str | None:
    """Choose a union's member by the JSON type of the value."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, dict):
        return "object"
    return "list" if isinstance(value, list) else None


BY_SHAPE = Discriminator(shape)


def type_of(value: object) -> str | None:
    """Choose a union's member by the object's `type`, in any case."""
    if not isinstance(value, dict):
        return None
    kind = cast("Mapping[str, object]", value).get("type")
    return kind.lower() if isinstance(kind, str) else None


BY_TYPE = Discriminator(type_of)


def type_or(fallback: Callable[[Mapping[str, object]], str | None]) -> Discriminator:
    """Like BY_TYPE, but an object without a `type` is judged by `fallback`."""

    def chosen(value: object) -> str | None:
        if not isinstance(value, dict):
            return None
        fields = cast("Mapping[str, object]", value)
        return type_of(fields) if fields.get("type") is not None else fallback(fields)

    return Discriminator(chosen)
