"""What a reader sees of an HTML page, as Markdown: nothing is judged to be unimportant.

Extraction that looks for an article loses what shops, listings and price tables are made of. This
keeps every visible word, links and tables with them, and leaves out only navigation and its like.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast
from urllib.parse import urljoin

from lxml import html

_MAX_DEPTH = 150
_MAX_SPAN = 50
"""Columns or rows that one cell may claim."""
_MAX_COLUMNS = 100
_MAX_CELLS = 100_000
"""Of one table; what comes after is left out."""
_MAX_CHARS = 3_000_000
"""Of one page, likewise."""
_MAX_LINK = 300
"""A longer address is data or tracking; its words are kept without it."""
_INVISIBLE = frozenset(
    {
        "audio", "canvas", "datalist", "dialog", "embed", "head", "iframe", "map", "noscript",
        "object", "script", "select", "style", "svg", "template", "video",
    }
)  # fmt: skip
_FRAME = frozenset({"aside", "footer", "nav"})
_FRAME_ROLES = frozenset({"banner", "contentinfo", "navigation", "search"})
_CONSENT = re.compile(r"cookie|consent|gdpr", re.IGNORECASE)
_MAX_CONSENT = 3000
_HIDING = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_BLOCKS = frozenset(
    {
        "address", "article", "blockquote", "body", "center", "dd", "details", "div", "dl", "dt",
        "fieldset", "figcaption", "figure", "form", "header", "hr", "html", "legend", "li", "main",
        "ol", "option", "p", "section", "summary", "table", "tbody", "td", "tfoot", "th", "thead",
        "tr", "ul",
    }
)  # fmt: skip
_SPACED = frozenset({"blockquote", "dl", "figure", "ol", "p", "section", "table", "ul"})
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
_GLUED = frozenset({"a", "b", "button", "data", "del", "ins", "label", "s", "small", "span"})


class Element(Protocol):
    """What is used of lxml's elements, which have no types."""

    tag: Any
    text: str | None
    tail: str | None
    attrib: Mapping[str, str]

    def __iter__(self) -> Iterator["Element"]: ...

    def get(self, key: str, default: str = ..., /) -> str:
        """An attribute."""
        ...

    def iter(self, *tags: str) -> Iterator["Element"]:
        """This and all below it that have one of these tags."""
        ...

    def iterancestors(self, *tags: str) -> Iterator["Element"]:
        """Those around it, the nearest first."""
        ...

    def itertext(self, *tags: str) -> Iterator[str]:
        """The pieces of text in it."""
        ...

    def find(self, path: str, /) -> "Element | None":
        """The first one at a path below it."""
        ...


_parse = cast("Callable[..., Element | None]", html.document_fromstring)
_ParseError = cast("type[Exception]", cast("Any", html).etree.LxmlError)


def parsed(text: str) -> Element | None:
    """The tree of an HTML page; None if there is nothing in it."""
    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        return _parse(text.encode("utf-8", "replace"), parser=parser)
    except _ParseError:
        return None


def markdown(tree: Element, base_url: str) -> str:
    """The visible text of a page.

    Args:
        tree: From `parsed`.
        base_url: What links are relative to.
    """
    body = tree.find("body")
    root = tree if body is None else body
    text = _rendered(root, base_url, framed=False)
    # A page may be nothing but a header or a navigation.
    return text or _rendered(root, base_url, framed=True)


def flat(element: Element) -> str:
    """All text in an element, on one line."""
    return " ".join(" ".join(element.itertext()).split())


def _rendered(root: Element, base_url: str, *, framed: bool) -> str:
    writer = _Writer(base_url, framed=framed)
    writer.walk(root, 0)
    return writer.text()


class _Writer:
    """Collects lines; what is inline flows together until the next block."""

    def __init__(self, base_url: str, *, framed: bool) -> None:
        """Nothing yet.

        Args:
            base_url: What links are relative to.
            framed: Whether navigation, footers and their like are kept.
        """
        self._base = base_url
        self._framed = framed
        self._lines: list[str] = []
        self._flow: list[str] = []
        self._lead = ""
        self._lists = 0
        self._size = 0

    def text(self) -> str:
        self._end()
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self._lines)).strip()

    def cell(self, element: Element, depth: int) -> str:
        """An element's content on one line."""
        inner = _Writer(self._base, framed=self._framed)
        inner.walk_children(element, depth)
        return " ".join(inner.text().split()).replace("|", "\\|")

    def walk(self, element: Element, depth: int) -> None:
        """Add an element, without the text behind it."""
        tag = element.tag
        is_full = self._size > _MAX_CHARS
        if is_full or not isinstance(tag, str) or self._is_left_out(element, tag):
            return
        if depth > _MAX_DEPTH:
            self._flow.append(flat(element))
            return
        if tag == "a":
            self._flow.append(self._link(element))
        elif tag == "br":
            self._end()
        elif tag == "pre":
            self._pre(element)
        elif tag == "table" and (rows := _data_rows(element)):
            self._table(element, rows, depth)
        elif tag in _HEADINGS:
            self._block(element, depth, lead=_HEADINGS[tag] + " ", is_spaced=True)
        elif tag in _BLOCKS:
            self._listed(element, tag, depth)
        else:
            self.walk_children(element, depth)

    def walk_children(self, element: Element, depth: int) -> None:
        self._flow.append(element.text or "")
        before: str | None = None
        for child in element:
            # `<span>Lamp</span><span>9 €</span>` is two words to who looks at it.
            if before == "" and child.tag in _GLUED:
                self._flow.append(" ")
            self.walk(child, depth + 1)
            self._flow.append(child.tail or "")
            before = child.tail or ""

    def _listed(self, element: Element, tag: str, depth: int) -> None:
        is_list = tag in ("ol", "ul")
        self._lists += is_list
        lead = "  " * max(0, self._lists - 1) + "- " if tag == "li" else ""
        lead = ": " if tag == "dd" else lead
        self._block(element, depth, lead=lead, is_spaced=tag in _SPACED and self._lists <= 1)
        self._lists -= is_list

    def _block(self, element: Element, depth: int, *, lead: str, is_spaced: bool) -> None:
        self._end()
        if is_spaced:
            self._lines.append("")
        self._lead = lead or self._lead
        self.walk_children(element, depth)
        self._end()
        self._lead = ""
        if is_spaced:
            self._lines.append("")

    def _end(self) -> None:
        """End the line that flows, if there is anything in it."""
        line = " ".join("".join(self._flow).split())
        self._flow.clear()
        if line:
            self._size += len(line)
            self._lines.append(self._lead + line)
            self._lead = ""

    def _pre(self, element: Element) -> None:
        self._end()
        self._lines += ["", "```", *"".join(element.itertext()).strip("\n").splitlines(), "```", ""]

    def _link(self, element: Element) -> str:
        words = flat(element) or _picture(element)
        target = element.get("href", "").strip()
        if not words or not target or target.startswith("#"):
            return words
        try:
            target = urljoin(self._base, target)
        except ValueError:
            return words
        if not target.startswith(("http://", "https://")) or len(target) > _MAX_LINK:
            return words
        return f"[{words}]({target.replace(' ', '%20').replace(')', '%29')})"

    def _table(self, element: Element, rows: list[Element], depth: int) -> None:
        self._end()
        caption = element.find("caption")
        grid = self._grid(rows, depth)
        width = max(len(row) for row in grid)
        self._size += sum(len(text) for row in grid for text in row)
        lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in grid]
        lines.insert(1, "|" + "---|" * width)
        self._lines += ["", *([flat(caption)] if caption is not None else []), *lines, ""]

    def _grid(self, rows: list[Element], depth: int) -> list[list[str]]:
        """Cells by row; one that spans several rows stands in each of them."""
        grid: list[list[str]] = []
        held: dict[int, tuple[str, int]] = {}
        count = 0
        for row in rows:
            if count > _MAX_CELLS:
                grid.append(["(more rows are left out)"])
                break
            line: list[str] = []
            for cell in (each for each in row if each.tag in ("td", "th")):
                _fill(line, held)
                text = self.cell(cell, depth + 1)
                down, across = _span(cell, "rowspan"), _span(cell, "colspan")
                for extra in range(min(across, _MAX_COLUMNS - len(line))):
                    if down > 1:
                        held[len(line)] = (text if extra == 0 else "", down - 1)
                    line.append(text if extra == 0 else "")
            _fill(line, held)
            count += len(line) + 1
            grid.append(line)
        return [line for line in grid if any(line)] or [[""]]

    def _is_left_out(self, element: Element, tag: str) -> bool:
        if tag in _INVISIBLE or "hidden" in element.attrib:
            return True
        if element.get("aria-hidden", "") == "true" or _HIDING.search(element.get("style", "")):
            return True
        return not self._framed and _is_frame(element, tag)


def _is_frame(element: Element, tag: str) -> bool:
    """Whether this is what surrounds the content of every page of a site."""
    if tag in _FRAME or element.get("role", "") in _FRAME_ROLES:
        return True
    if tag == "header":
        is_of_content = next(element.iterancestors("article", "main", "section"), None) is not None
        return not is_of_content and next(element.iter("h1"), None) is None
    named = f"{element.get('id', '')} {element.get('class', '')}"
    if tag not in ("div", "section") or not _CONSENT.search(named):
        return False
    size = 0
    for text in element.itertext():
        size += len(text)
        if size > _MAX_CONSENT:
            return False
    return True


def _picture(element: Element) -> str:
    """What the first picture in an element says that it shows."""
    return next((each.get("alt", "").strip() for each in element.iter("img")), "")


def _data_rows(table: Element) -> list[Element]:
    """The rows of a table of data; none for one that only lays out a page."""
    if sum(1 for _ in table.iter("table")) > 1 or table.get("role", "") == "presentation":
        return []
    rows = list(table.iter("tr"))
    widest = max((sum(each.tag in ("td", "th") for each in row) for row in rows), default=0)
    return rows if widest > 1 else []


def _fill(line: list[str], held: dict[int, tuple[str, int]]) -> None:
    """Add the cells that rows above hold at the next places."""
    while len(line) in held:
        at = len(line)
        text, left = held.pop(at)
        if left > 1:
            held[at] = (text, left - 1)
        line.append(text)


def _span(cell: Element, name: str) -> int:
    text = cell.get(name, "1").strip()
    return min(max(int(text), 1), _MAX_SPAN) if text.isdecimal() and len(text) < 5 else 1  # noqa: PLR2004 - digits
