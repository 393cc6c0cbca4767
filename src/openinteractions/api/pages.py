"""Keyset pages: an opaque token holds the last id shown and the filters it belongs to."""

import base64
import binascii
import hashlib
from typing import Any
from uuid import UUID

import orjson

from openinteractions.errors import Invalid

DEFAULT_SIZE = 50
MAX_SIZE = 1000
_MARK_BYTES = 8
_FOREIGN = "Invalid value for 'page_token': it is not a token of this server."


def size(text: str | None) -> int:
    """How many items a page has; too many are cut to the most allowed.

    Raises:
        Invalid: It is not a positive number.
    """
    if text is None or text in {"", "0"}:
        return DEFAULT_SIZE
    if not (text.isascii() and text.isdigit()):
        raise Invalid(f"Invalid value for 'page_size': {text[:20]!r} is not a positive number.")
    return min(int(text[:9]), MAX_SIZE)


def token(last: UUID, filters: Any) -> str:  # noqa: ANN401 - any JSON
    """The token of the page after `last`, for these filters only."""
    return _token(last.bytes, filters)


def text_token(last: str, filters: Any) -> str:  # noqa: ANN401 - any JSON
    """Like `token`, where an item's place in the order is a text."""
    return _token(last.encode(), filters)


def parse(text: str | None, filters: Any) -> UUID | None:  # noqa: ANN401 - any JSON
    """Where a page starts; None for the first one.

    Raises:
        Invalid: The token is not one of ours, or belongs to other filters.
    """
    if not text:
        return None
    last = _parsed(text, filters)
    if len(last) != len(UUID(int=0).bytes):
        raise Invalid(_FOREIGN)
    return UUID(bytes=last)


def parse_text(text: str | None, filters: Any) -> str | None:  # noqa: ANN401 - any JSON
    """Like `parse`, for a token of `text_token`."""
    if not text:
        return None
    try:
        return _parsed(text, filters).decode()
    except UnicodeDecodeError:
        raise Invalid(_FOREIGN) from None


def _token(last: bytes, filters: Any) -> str:  # noqa: ANN401 - any JSON
    return base64.urlsafe_b64encode(last + _mark(filters)).rstrip(b"=").decode()


def _parsed(text: str, filters: Any) -> bytes:  # noqa: ANN401 - any JSON
    try:
        raw = base64.b64decode(text.encode() + b"=" * (-len(text) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise Invalid(_FOREIGN) from None
    if len(raw) <= _MARK_BYTES:
        raise Invalid(_FOREIGN)
    if raw[-_MARK_BYTES:] != _mark(filters):
        raise Invalid("Invalid value for 'page_token': it was issued for other filters.")
    return raw[:-_MARK_BYTES]


def _mark(filters: Any) -> bytes:  # noqa: ANN401 - any JSON
    return hashlib.sha256(orjson.dumps(filters, option=orjson.OPT_SORT_KEYS)).digest()[:_MARK_BYTES]
