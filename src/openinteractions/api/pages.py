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
    return base64.urlsafe_b64encode(last.bytes + _mark(filters)).rstrip(b"=").decode()


def parse(text: str | None, filters: Any) -> UUID | None:  # noqa: ANN401 - any JSON
    """Where a page starts; None for the first one.

    Raises:
        Invalid: The token is not one of ours, or belongs to other filters.
    """
    if not text:
        return None
    try:
        raw = base64.b64decode(text.encode() + b"=" * (-len(text) % 4), b"-_", validate=True)
        last = UUID(bytes=raw[:16])
    except (binascii.Error, ValueError):
        raise Invalid("Invalid value for 'page_token': it is not a token of this server.") from None
    if raw[16:] != _mark(filters):
        raise Invalid("Invalid value for 'page_token': it was issued for other filters.")
    return last


def _mark(filters: Any) -> bytes:  # noqa: ANN401 - any JSON
    return hashlib.sha256(orjson.dumps(filters, option=orjson.OPT_SORT_KEYS)).digest()[:8]
