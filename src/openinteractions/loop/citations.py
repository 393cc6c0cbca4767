"""Where an answer rests on pages that the run has read or found.

A citation is a link in the answer to such a page, or a mark like `[1]` or `[^1]` that a line of
the answer explains by such a link. It covers the sentence that the link stands in, or the list item
or table row; where a sentence is nothing but links, the one before it too. All of it takes time in
proportion to the text's length, whatever the text is.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from openinteractions.models.port import Json

_MAX_URL: Final = 4_096
_URL: Final = re.compile(r"https?://[^\s<>\[\]\"`|\\^{}]+", re.IGNORECASE)
# The look-behind and the possessive runs keep a search from trying each place of a run again.
_SENTENCE_END: Final = re.compile(
    r"(?:(?<![.!?…])[.!?…]++[\"'”’)\]*_]*+(?:[ ]?\[(?:\^[\w-]{1,40}|\d{1,4})\](?!\())*+(?=\s)"  # noqa: RUF001 - quotation marks
    r"|[。！？](?:\[(?:\^[\w-]{1,40}|\d{1,4})\](?!\())*+)"  # noqa: RUF001 - East Asian sentences
)
_ITEM: Final = re.compile(r"[ \t]{0,40}(?:\||(?:[-*+•]|\d{1,9}[.)]|#{1,6})[ \t])")
_FENCE: Final = re.compile(r"[ \t]{0,40}(?:```|~~~)")
_BRACKET: Final = re.compile(r"[\[\]]")
_TRAILING: Final = ".,;:!?'*_~”’"  # noqa: RUF001 - quotation marks
_WIDE: Final = re.compile(r"[（）［］｛｝「」『』【】〔〕《》〈〉、。，．；：！？…]")  # noqa: RUF001 - likewise
_LABEL: Final = r"\^?[\w-]{1,40}"
_DEFINITION: Final = re.compile(
    rf"^[ \t]{{0,3}}(?:[-*+][ \t]{{1,3}})?\[({_LABEL})\](?:([:：])[ \t]{{0,9}}|[ \t]{{1,9}})",  # noqa: RUF001 - likewise
    re.MULTILINE,
)
_REFERENCE: Final = re.compile(rf"\[({_LABEL}(?:[ ]?,[ ]?{_LABEL}){{0,9}})\](?!\()")
_TRACKING: Final = re.compile(
    r"utm_\w+|gclid|fbclid|msclkid|mc_[ce]id|igshid|ref_src", re.IGNORECASE
)
_PORTS: Final = {"http": 80, "https": 443}
_SUCCESS: Final = "success"


def sources(steps: Sequence[Json]) -> dict[str, str]:
    """The pages that steps have read or found: URL → title, which may be empty."""
    found: dict[str, str] = {}
    opened: dict[str, str] = {}
    for step in steps:
        match step["type"]:
            case "function_call" if step["name"] == "browser":
                arguments: object = step["arguments"]
                url = cast("Json", arguments).get("url") if isinstance(arguments, dict) else None
                if isinstance(url, str) and url:
                    opened[step["id"]] = url
            case "function_result" if not step.get("is_error") and step["call_id"] in opened:
                found.setdefault(opened[step["call_id"]], "")
            case "url_context_result" | "google_search_result":
                _add_pages(found, step.get("result"))
            case _:
                pass
    return found


def _add_pages(found: dict[str, str], result: object) -> None:
    for item in cast("list[object]", result) if isinstance(result, list) else ():
        page = cast("Json", item) if isinstance(item, dict) else {}
        url, title = page.get("url"), page.get("title")
        if isinstance(url, str) and url and page.get("status", _SUCCESS) == _SUCCESS:
            named = " ".join(title.split()) if isinstance(title, str) else ""
            found[url] = found.get(url) or named


def annotations(text: str, pages: Mapping[str, str]) -> list[Json]:
    """The `url_citation` annotations of an answer's text.

    Args:
        text: The text of one content block.
        pages: What it may rest on: URL → title.

    Returns:
        In the order of the text; offsets are UTF-8 bytes, the end exclusive.
    """
    if not pages or "://" not in text:
        return []
    known = _by_form(pages)
    code = _Ranges(_code_blocks(text))
    links = list(_links(text, code))
    cited = [known.get(normalised(text[link.start : link.end])) for link in links]
    if not any(cited):
        return []
    links, urls = _resolved(
        text, links, [None if page is None else page[0] for page in cited], code
    )
    spans = _spans(_segments(text, links, code), links, urls)
    titles = dict(known.values())
    offsets = _byte_offsets(text, {at for span in spans for at in (span.start, span.end)})
    return [
        {
            "type": "url_citation",
            "url": span.url,
            **({"title": titles[span.url]} if titles[span.url] else {}),
            "start_index": offsets[span.start],
            "end_index": offsets[span.end],
        }
        for span in spans
    ]


def _by_form(pages: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Normal form → a page's URL as it was first met, and its title if any spelling has one."""
    known: dict[str, tuple[str, str]] = {}
    for url, title in pages.items():
        first, earlier = known.get(normalised(url), (url, ""))
        known[normalised(url)] = (first, earlier or title)
    return known


def normalised(url: str) -> str:
    """A URL in the form in which two spellings of one page are equal.

    Scheme and host in lower case, without the scheme's own port; no fragment, no trailing slash,
    no parameters that only track; characters escaped alike. A text that is no URL is itself.
    """
    if len(url) > _MAX_URL:
        return url
    try:
        parts = urlsplit(url.strip())
        port = parts.port
        pairs = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return url
    scheme = parts.scheme.lower()
    host = (parts.hostname or "").rstrip(".")
    if port is not None and port != _PORTS.get(scheme):
        host = f"{host}:{port}"
    query = urlencode([pair for pair in pairs if not _TRACKING.fullmatch(pair[0])])
    path = quote(unquote(parts.path, errors="surrogateescape"), errors="surrogateescape")
    return urlunsplit((scheme, host, path.rstrip("/"), query, ""))


def _byte_offsets(text: str, places: set[int]) -> dict[int, int]:
    """Characters → UTF-8 bytes."""
    offsets: dict[int, int] = {}
    before, count = 0, 0
    for place in sorted(places):
        count += len(text[before:place].encode())
        offsets[place], before = count, place
    return offsets


# ---- links


@dataclass(frozen=True, slots=True)
class _Link:
    """A URL in a text: where it stands, and where the link that it belongs to does."""

    start: int
    end: int
    outer_start: int
    outer_end: int


def _links(text: str, code: "_Ranges") -> Iterator[_Link]:
    """Every URL that a reader could follow; code blocks are left out."""
    words = _LinkWords(text)
    for match in _URL.finditer(text):
        start, end = match.start(), _url_end(text, *match.span())
        if code.holds(start):
            continue
        if text.endswith(("](", "](<"), 0, start):
            yield _Link(start, end, words.begin(start), _closing(text, end))
        else:
            # Where nothing else ends it, the punctuation of a text without blanks does.
            wide = _WIDE.search(text, start, end)
            end = end if wide is None else _url_end(text, start, wide.start())
            yield _Link(start, end, start, end)


def _url_end(text: str, start: int, end: int) -> int:
    """Where a URL ends: before a parenthesis that it has not opened, and before punctuation."""
    depth = 0
    for at in range(start, end):
        if text[at] == "(":
            depth += 1
        elif text[at] == ")":
            depth -= 1
            if depth < 0:
                end = at
                break
    while text[end - 1] in _TRAILING:
        end -= 1
    return end


def _closing(text: str, end: int) -> int:
    """Behind the parenthesis that ends a Markdown link, on the same line."""
    close = text.find(")", end, end + _MAX_URL)
    return end if close < 0 or "\n" in text[end:close] else close + 1


class _LinkWords:
    """Finds where the words of Markdown links begin, going through the text once."""

    def __init__(self, text: str) -> None:
        self._brackets = _BRACKET.finditer(text)
        self._next = next(self._brackets, None)
        self._open: list[int] = []
        self._begin: int | None = None

    def begin(self, url_start: int) -> int:
        """The bracket that opens the words before a URL; ask for URLs in their order."""
        while self._next is not None and self._next.start() < url_start:
            if self._next[0] == "[":
                self._open.append(self._next.start())
            else:
                self._begin = self._open.pop() if self._open else None
            self._next = next(self._brackets, None)
        return url_start if self._begin is None else self._begin


def _code_blocks(text: str) -> list[tuple[int, int]]:
    """Where fenced code stands; one that is not closed goes to the end."""
    fences = [(start, end) for start, end in _lines(text) if _FENCE.match(text, start, end)]
    fences += [(len(text), len(text))] * (len(fences) % 2)
    return [(fences[at][0], fences[at + 1][1]) for at in range(0, len(fences), 2)]


def _lines(text: str) -> Iterator[tuple[int, int]]:
    """Where each line begins and ends, without its line feed."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield start, end
        start = end + 1
    yield start, len(text)


class _Ranges:
    """Ranges of a text, those that touch put together."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        for start, end in sorted(ranges):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)

    def holds(self, place: int) -> bool:
        """Whether one of them covers this character."""
        at = bisect_right(self.starts, place) - 1
        return at >= 0 and place < self.ends[at]

    def outside(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What they leave free between two places."""
        at = bisect_right(self.ends, start)
        while at < len(self.starts) and self.starts[at] < end:
            if start < self.starts[at]:
                yield start, self.starts[at]
            start = self.ends[at]
            at += 1
        if start < end:
            yield start, end


# ---- references


def _resolved(
    text: str, links: Sequence[_Link], urls: Sequence[str | None], code: "_Ranges"
) -> tuple[list[_Link], list[str | None]]:
    """The links with the marks that refer to them, in order; a line that explains one is no claim.

    Args:
        text: The text.
        links: Its URLs, in order.
        urls: The page that each cites; None: none.
        code: Where no link is one.
    """
    starts = [link.start for link in links]
    meant: dict[str, str] = {}
    explained: dict[str, int] = {}
    opened: set[int] = set()
    for match in _DEFINITION.finditer(text):
        label = match[1].casefold()
        end = text.find("\n", match.end())
        at = bisect_left(starts, match.end())
        is_on_line = at < len(links) and (end < 0 or starts[at] < end)
        url = urls[at] if is_on_line else None
        # Without a colon, words in brackets may be anything.
        if url is None or not (match[2] or label.lstrip("^").isdecimal()):
            continue
        meant.setdefault(label, url)
        explained.setdefault(label, at)
        opened.add(match.start(1))
    if not meant:
        return list(links), list(urls)
    found = list(zip(links, urls, strict=True))
    for match in _REFERENCE.finditer(text):
        if match.start(1) in opened or code.holds(match.start()):
            continue
        for label in {part.strip().casefold(): None for part in match[1].split(",")}:
            if label in meant:
                place = _Link(*match.span(), *match.span())
                found.append((place, meant[label]))
                at = explained[label]
                found[at] = (found[at][0], None)
    found.sort(key=lambda pair: pair[0].start)
    return [link for link, _ in found], [url for _, url in found]


# ---- what a link covers


@dataclass(slots=True)
class _Span:
    """What a citation covers: characters, and the segments from and to which it goes."""

    url: str
    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Segment:
    """A sentence, list item or table row, without the blanks around it."""

    start: int
    end: int
    claim: int
    """The number of the segment that it belongs to: where it is only links, one before it."""


def _spans(
    segments: Sequence[_Segment], links: Sequence[_Link], cited: Sequence[str | None]
) -> list[_Span]:
    """What each cited link covers; the same page cited by neighbours is one span."""
    spans: list[_Span] = []
    latest: dict[str, _Span] = {}
    at = 0
    for link, url in zip(links, cited, strict=True):
        while segments[at].end <= link.start:
            at += 1
        if url is None:
            continue
        first = segments[at].claim
        span = latest.get(url)
        if span is not None and first <= span.last + 1:
            span.end, span.last = segments[at].end, at
            continue
        span = _Span(url, segments[first].start, segments[at].end, first, at)
        latest[url] = span
        spans.append(span)
    return sorted(spans, key=lambda span: (span.start, span.end))


def _segments(text: str, links: Sequence[_Link], code: _Ranges) -> list[_Segment]:
    """All segments of a text, in order; none ends inside a link."""
    ranges = _Ranges([(link.outer_start, link.outer_end) for link in links])
    segments: list[_Segment] = []
    for start, end, is_item in _blocks(text, code):
        opening = len(segments)
        pieces = [(start, end)] if is_item else _sentences(text, start, end, ranges)
        for begin, stop in pieces:
            said = text[begin:stop]
            if not said.strip():
                continue
            begin += len(said) - len(said.lstrip())  # noqa: PLW2901 - without its blanks
            stop -= len(said) - len(said.rstrip())  # noqa: PLW2901
            number = len(segments)
            outside = ranges.outside(begin, stop)
            says_nothing = not any(_has_word(text[a:b]) for a, b in outside)
            claim = segments[-1].claim if says_nothing and number > opening else number
            segments.append(_Segment(begin, stop, claim))
    return segments


def _has_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def _blocks(text: str, code: _Ranges) -> Iterator[tuple[int, int, bool]]:
    """Paragraphs, list items and table rows: where they are, and whether they stand as a whole."""
    begun: int | None = None
    last = 0
    for start, end in _lines(text):
        is_code = code.holds(start)
        is_item = not is_code and _ITEM.match(text, start, end) is not None
        is_blank = is_code or (not is_item and not text[start:end].strip())
        if begun is not None and (is_item or is_blank):
            yield begun, last, False
            begun = None
        if is_item:
            yield start, end, True
        elif not is_blank:
            begun = start if begun is None else begun
            last = end
    if begun is not None:
        yield begun, last, False


def _sentences(text: str, start: int, end: int, links: _Ranges) -> Iterator[tuple[int, int]]:
    begin = start
    for match in _SENTENCE_END.finditer(text, start, end):
        if not links.holds(match.start()):
            yield begin, match.end()
            begin = match.end()
    yield begin, end
