"""`read_file` and `view_image`."""

import base64
import codecs
from typing import Any, Final

from openinteractions.errors import Invalid
from openinteractions.models.port import Json
from openinteractions.sandbox.port import Entry
from openinteractions.tools.port import Call, Workplace
from openinteractions.tools.workspace import paths, text
from openinteractions.tools.workspace.paths import Path
from openinteractions.wire import pictures

MAX_LINES: Final = 2000
MAX_CHARACTERS: Final = 40_000
MAX_LINE: Final = 2000
"""Characters of one line."""
MAX_IMAGE_BYTES: Final = 3_900_000
"""As base64 it has 5.2 MB: what Anthropic takes as one image at most."""

READ_FILE: Final = f"""\
Reads a text file. Returns its lines as `number<tab>line`; number and tab are not part of the file.

- Gives {MAX_LINES} lines or {MAX_CHARACTERS // 1000} kB at most, and says at its end how to read \
on (`offset`). Lines longer than {MAX_LINE} characters are cut.
- Read a file before you edit it. To find something in many files or in a long one, use \
search_files.
- For pictures use view_image. For PDF, archives and other binary files use code_execution."""

READ_FILE_PARAMETERS: Final[Json] = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": paths.PATH_HELP},
        "offset": {
            "type": "integer",
            "description": "Number of the first line to read, from 1. Default: 1.",
        },
        "limit": {
            "type": "integer",
            "description": f"How many lines to read. Default and most: {MAX_LINES}.",
        },
    },
    "required": ["path"],
}

VIEW_IMAGE: Final = f"""\
Shows you a picture: PNG, JPEG, WebP or GIF, up to 3.9 MB and {pictures.MAX_SIDE} pixels a side. \
Use it to look at plots, screenshots and photos that lie in the workspace. Make larger ones \
smaller with code_execution first, and convert other formats there."""

VIEW_IMAGE_PARAMETERS: Final[Json] = {
    "type": "object",
    "properties": {"path": {"type": "string", "description": paths.PATH_HELP}},
    "required": ["path"],
}

_CHUNK_BYTES: Final = 512 * 1024
_MAX_SCAN_BYTES: Final = 64 * 2**20
"""So much of a file is read at most to find a line in it."""
_COUNT_BYTES: Final = 4 * 2**20
"""So much of one is read to know how many lines it has."""
_SNIFF_BYTES: Final = 8192
_HELD_BYTES: Final = 4 * MAX_LINE
"""So many have all the characters of a line that are shown."""


async def read_file(place: Workplace, call: Call) -> str:
    """Numbered lines of a text file."""
    arguments: Json = call.step["arguments"]
    path = paths.parse(arguments["path"])
    first = max(1, int(arguments.get("offset") or 1))
    limit = min(max(1, int(arguments.get("limit") or MAX_LINES)), MAX_LINES)
    entry = await paths.found_file(place, path)
    lines = _Lines(first, limit)
    is_whole = await _scan(place, path, entry, lines)
    if not lines.shown:
        return _nothing(path, lines, is_whole=is_whole)
    return "\n".join((text.numbered(lines.shown, first), *_remarks(lines, is_whole=is_whole)))


async def _scan(place: Workplace, path: Path, entry: Entry, lines: "_Lines") -> bool:
    """Read as much as is needed; whether that was the whole file."""
    offset, size = 0, entry.size_bytes
    while offset < size:
        most = _COUNT_BYTES if lines.is_full else _MAX_SCAN_BYTES
        if offset >= most:
            # A line that is still going on is shown as far as it was read.
            lines.end()
            return False
        data, size = await place.read(path.stored, offset=offset, max_bytes=_CHUNK_BYTES)
        if not offset and b"\0" in data[:_SNIFF_BYTES]:
            raise Invalid(_binary(path, entry, data))
        if not data:
            break
        lines.feed(data)
        offset += len(data)
    lines.end()
    return True


def _binary(path: Path, entry: Entry, data: bytes) -> str:
    kind = entry.mime_type or "application/octet-stream"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"{path.shown} is UTF-16: make a copy with code_execution, `iconv -f UTF-16`."
    if kind.startswith("text/"):
        kind = "it has NUL characters"
    if kind.startswith("image/"):
        advice = "use view_image."
    elif kind == "application/pdf":
        advice = "use code_execution, for instance `pdftotext`."
    else:
        advice = "use code_execution."
    return f"{path.shown} is no text ({kind}, {text.size(entry.size_bytes)}): {advice}"


def _nothing(path: Path, lines: "_Lines", *, is_whole: bool) -> str:
    if not is_whole:
        raise Invalid(
            f"Line {lines.first} is more than {_MAX_SCAN_BYTES // 2**20} MiB into {path.shown}: "
            f"use code_execution, such as `sed -n '{lines.first},+100p'`."
        )
    if lines.total:
        raise Invalid(f"{path.shown} has only {text.counted(lines.total, 'line')}.")
    return f"{path.shown} is empty."


def _remarks(lines: "_Lines", *, is_whole: bool) -> list[str]:
    last = lines.first + len(lines.shown) - 1
    remarks: list[str] = []
    if not is_whole or last < lines.total or lines.first > 1:
        of = f" of {lines.total}" if is_whole else ""
        more = f"; read on with offset={last + 1}" if not is_whole or last < lines.total else ""
        remarks.append(f"[lines {lines.first}-{last}{of}{more}]")
    if lines.has_crlf:
        remarks.append("[lines end with CRLF]")
    if lines.has_other_bytes:
        remarks.append(
            "[not all of it is UTF-8: other bytes are shown as \N{REPLACEMENT CHARACTER}]"
        )
    return remarks


class _Lines:
    """Picks some lines out of a file that comes in pieces."""

    def __init__(self, first: int, limit: int) -> None:
        self.first = first
        self.shown: list[str] = []
        self.is_full = False
        self.total = 0
        """How many lines there were; an unended one counts once `end` was called."""
        self.has_crlf = False
        self.has_other_bytes = False
        self._limit = limit
        self._room = MAX_CHARACTERS
        self._held = bytearray()
        self._length = 0
        """Bytes of the line that is being read."""

    def feed(self, data: bytes) -> None:
        """Take the next piece."""
        ends = data.count(b"\n")
        if self.is_full or self.total + ends + 1 < self.first:
            self.total += ends
            self._length = len(data) - data.rfind(b"\n") - 1 + (0 if ends else self._length)
            return
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._hold(piece)
            self._close()
        self._hold(rest)

    def end(self) -> None:
        """There is nothing more."""
        if self._length:
            self._close()

    def _hold(self, piece: bytes) -> None:
        self._length += len(piece)
        self._held += piece[: max(0, _HELD_BYTES - len(self._held))]

    def _close(self) -> None:
        self.total += 1
        if self.total >= self.first and not self.is_full:
            self._show()
        self._held.clear()
        self._length = 0

    def _show(self) -> None:
        line = self._held.decode(errors="replace")
        if self._length > len(self._held):
            line = f"{line[:MAX_LINE]} [… line cut: {self._length} bytes]"
        else:
            self.has_crlf |= line.endswith("\r")
            line = text.cut(line.removesuffix("\r"), MAX_LINE)
        taken = len(text.numbered([line], self.total)) + 1
        if taken > self._room and self.shown:
            self.is_full = True
            return
        self.has_other_bytes |= "\N{REPLACEMENT CHARACTER}" in line
        self._room -= taken
        self.shown.append(line)
        self.is_full = len(self.shown) >= self._limit


async def view_image(place: Workplace, call: Call) -> Any:  # noqa: ANN401 - content blocks
    """A picture, as content blocks."""
    path = paths.parse(call.step["arguments"]["path"])
    entry = await paths.found_file(place, path)
    if entry.size_bytes > MAX_IMAGE_BYTES:
        raise Invalid(
            f"{path.shown} has {text.size(entry.size_bytes)}, and {text.size(MAX_IMAGE_BYTES)} is "
            "the most: make it smaller with code_execution (Python, Pillow) and view the copy."
        )
    data, _ = await place.read(path.stored, max_bytes=MAX_IMAGE_BYTES)
    kind = pictures.kind_of(data)
    if kind is None:
        raise Invalid(
            f"{path.shown} is no PNG, JPEG, WebP or GIF: convert it with code_execution, or use "
            "read_file if it is text (SVG is)."
        )
    problem = pictures.problem(data)
    if problem is not None:
        raise Invalid(
            f"{path.shown} cannot be shown: it {problem}. Look at it with code_execution (Python, "
            "Pillow), and view a copy that is whole and small enough."
        )
    return [
        {"type": "text", "text": f"{path.shown} ({kind}, {text.size(len(data))})"},
        {"type": "image", "mime_type": kind, "data": base64.b64encode(data).decode()},
    ]
