"""Keyset pages: an opaque token holds the last id shown and the filters it belongs to."""

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, TypeVar
from uuid import UUID

import orjson
from fastapi import Depends, Request

from openinteractions.errors import Invalid

DEFAULT_SIZE = 50
MAX_SIZE = 1000
_MARK_BYTES = 8
_MAX_DIGITS = 9
_FOREIGN = "Invalid value for 'page_token': it is not a token of this server."

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Page:
    """The part of a list that a client asks for."""

    size: int
    """How many items it has at most."""
    token: str | None
    """Where it starts, as the page before it said; None for the first one."""

    @property
    def limit(self) -> int:
        """How many rows to fetch: one more than is shown tells whether more follow."""
        return self.size + 1

    def cut(self, rows: Sequence[_Row]) -> tuple[Sequence[_Row], _Row | None]:
        """The rows to show, and the last of them where more follow."""
        if len(rows) <= self.size:
            return rows, None
        return rows[: self.size], rows[self.size - 1]

    def after(self, filters: Any) -> UUID | None:  # noqa: ANN401 - any JSON
        """The id that this page follows; None for the first one.

        Raises:
            Invalid: The token is not one of ours, or belongs to other filters.
        """
        last = self._last(filters)
        if last is None:
            return None
        if len(last) != len(UUID(int=0).bytes):
            raise Invalid(_FOREIGN)
        return UUID(bytes=last)

    def after_text(self, filters: Any) -> str | None:  # noqa: ANN401 - any JSON
        """Like `after`, for a token of `text_token`."""
        last = self._last(filters)
        try:
            return None if last is None else last.decode()
        except UnicodeDecodeError:
            raise Invalid(_FOREIGN) from None

    def after_moment(self, filters: Any) -> tuple[datetime, str] | None:  # noqa: ANN401 - any JSON
        """Like `after`, for a token of `moment_token`."""
        mark = self.after_text(filters)
        if mark is None:
            return None
        moment, _, name = mark.partition(" ")
        try:
            after = datetime.fromisoformat(moment)
        except ValueError:
            raise Invalid(_FOREIGN) from None
        if after.tzinfo is None or not (name.isascii() and name.isprintable()):
            raise Invalid(_FOREIGN)
        return after, name

    def after_number(self, filters: Any) -> int | None:  # noqa: ANN401 - any JSON
        """Like `after`, for the `text_token` of a number."""
        mark = self.after_text(filters)
        if mark is None:
            return None
        if not (mark.isascii() and mark.isdigit() and len(mark) <= _MAX_DIGITS):
            raise Invalid(_FOREIGN)
        return int(mark)

    def _last(self, filters: Any) -> bytes | None:  # noqa: ANN401 - any JSON
        return _parsed(self.token, filters) if self.token else None


def _asked(request: Request, page_size: str | None = None, page_token: str | None = None) -> Page:
    query = request.query_params
    return Page(_size(page_size or query.get("pageSize")), page_token or query.get("pageToken"))


PageDep = Annotated[Page, Depends(_asked)]
"""The page that a request asks for, in either spelling."""


def token(last: UUID, filters: Any) -> str:  # noqa: ANN401 - any JSON
    """The token of the page after `last`, for these filters only."""
    return _token(last.bytes, filters)


def text_token(last: str, filters: Any) -> str:  # noqa: ANN401 - any JSON
    """Like `token`, where an item's place in the order is a text."""
    return _token(last.encode(), filters)


def moment_token(last: datetime, name: str, filters: Any) -> str:  # noqa: ANN401 - any JSON
    """Like `token`, where an item's place in the order is a time, with its zone, and a name."""
    return text_token(f"{last.isoformat()} {name}", filters)


def _size(text: str | None) -> int:
    """How many items a page has; too many are cut to the most allowed."""
    if text is None or text in {"", "0"}:
        return DEFAULT_SIZE
    if not (text.isascii() and text.isdigit()):
        raise Invalid(f"Invalid value for 'page_size': {text[:20]!r} is not a positive number.")
    return min(int(text[:9]), MAX_SIZE)


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
