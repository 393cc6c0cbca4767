"""What turns have found that later turns build on: pages to cite, and functions that were loaded.

It is kept apart from what a model is shown, so no handover takes it away.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson

from openinteractions.loop import citations, deferred
from openinteractions.models.port import Json

_MAX_PAGES: Final = 1_000
_MAX_FUNCTIONS: Final = 128
_MARKS: Final = (
    b'"url_context_result"', b'"google_search_result"', b'"tool_search_result"',
    b'"browser"', b'"function"',
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """What some turns have found."""

    pages: Mapping[str, str] = field(default_factory=dict[str, str])
    """URL → title, which may be empty."""
    functions: Mapping[str, Json] = field(default_factory=dict[str, Json])
    """Declarations, by name."""

    def __bool__(self) -> bool:
        return bool(self.pages or self.functions)

    def size(self) -> int:
        """About how many bytes it keeps."""
        pages = sum(len(url) + len(title) for url, title in self.pages.items())
        return pages + len(orjson.dumps(self.functions))


def found_in(steps: Sequence[Json]) -> Found:
    """What the steps of one interaction have found."""
    return Found(citations.sources(steps), deferred.loaded(steps))


def found_in_rows(rows: Iterable[bytes]) -> Found:
    """The same of steps as JSON; only those are parsed that may have found anything."""
    return found_in([orjson.loads(row) for row in rows if any(mark in row for mark in _MARKS)])


def joined(parts: Iterable[Found]) -> Found:
    """What they have found together, the oldest first; of too much, the newest."""
    pages: dict[str, str] = {}
    functions: dict[str, Json] = {}
    for part in parts:
        for url, title in part.pages.items():
            before = pages.pop(url, "")
            pages[url] = title or before
        for name, function in part.functions.items():
            functions.pop(name, None)
            functions[name] = function
    return Found(
        dict(list(pages.items())[-_MAX_PAGES:]), dict(list(functions.items())[-_MAX_FUNCTIONS:])
    )
