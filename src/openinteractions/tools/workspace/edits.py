"""Replacing a piece of a text that a model has copied, perhaps not quite as it is."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

from openinteractions.errors import Invalid
from openinteractions.tools.workspace import text as words
from openinteractions.tools.workspace.nearest import nearest

MAX_CHARACTERS: Final = 16 * 2**20
"""So long may a text become."""

_AROUND: Final = 3
_MAX_SHOWN: Final = 40
_MAX_LINE: Final = 300
_MAX_PLACES: Final = 10
_MOST_PLACES: Final = 100_000
_BLANK: Final = " \t\r"


@dataclass(frozen=True, slots=True)
class Edited:
    """A text after an edit."""

    text: str
    places: list[tuple[int, int]]
    """Begin and end of the first replaced pieces, in characters."""
    count: int
    """How many pieces were replaced."""
    is_loose: bool
    """Trailing whitespace or line ends were not as the model wrote them."""

    def report(self) -> str:
        """What was done, and the changed lines with some around them."""
        start, end = self.places[0]
        left, right = _around(self.text, start, max(start, end - 1))
        region = self.text[left:right]
        if right == len(self.text):
            region = region.removesuffix("\n")
        count = region.count("\n") + 1
        begin = _line_at(self.text, start) - self.text.count("\n", left, start)
        shown = [line.removesuffix("\r") for line in region.split("\n", _MAX_SHOWN)[:_MAX_SHOWN]]
        excerpt = words.numbered(shown, begin, most_characters=_MAX_LINE)
        left_out = count - len(shown)
        # A byte that is no UTF-8 must not get into a result.
        excerpt = excerpt.encode(errors="replace").decode()
        return (
            f"{self._remark()}\n{excerpt}"
            f"{f'{chr(10)}[… {left_out} more lines]' if left_out > 0 else ''}"
        )

    def _remark(self) -> str:
        remark = words.counted(self.count, "place")
        if self.count > 1:
            some = ", ".join(str(_line_at(self.text, start)) for start, _ in self.places)
            more = ", …" if self.count > len(self.places) else ""
            remark += f" (lines {some}{more}), the first of them now"
        else:
            remark += ", now"
        if self.is_loose:
            remark += " (trailing whitespace or line ends of old_text were not quite the file's)"
        return f"{remark}:"


def replace(text: str, old: str, new: str, *, replace_all: bool) -> Edited:
    """Replace what is there exactly; else what is the same but for line ends and trailing space.

    New lines end as those do that they replace.

    Args:
        text: The whole text.
        old: What to replace.
        new: What to put there.
        replace_all: Every place, instead of the only one.

    Raises:
        Invalid: It is not there, or several times; the message helps the model to do better.
    """
    if not old:
        raise Invalid(
            "'old_text' is empty: give the text to replace, or use write_file to write the whole "
            "file."
        )
    if old == new:
        raise Invalid("'new_text' is the same as 'old_text': nothing would change.")
    matches = _Matches(text, old)
    if not matches.places:
        raise Invalid(f"'old_text' is not in the file. {nearest(text, old)}")
    if matches.count > _MOST_PLACES:
        raise Invalid(f"'old_text' is in the file more than {_MOST_PLACES} times.")
    if not replace_all and matches.count > 1:
        raise Invalid(_ambiguous(text, matches))
    return _replaced(text, new, matches)


class _Matches:
    """Where an old text is."""

    def __init__(self, text: str, old: str) -> None:
        self.old = old
        self.is_loose = False
        self.ends_early = False
        """The text ends without the line end that the old text has at its end."""
        self.has_crlf = _has_crlf(text)
        self.places = _places(text, old)
        if not self.places and old.strip():
            self.is_loose = True
            self._look_loosely(text)
        self.count = len(self.places)

    def _look_loosely(self, text: str) -> None:
        plain = _Plain(text)
        *lines, last = self.old.split("\n")
        old = "\n".join((*(line.rstrip(_BLANK) for line in lines), last.removesuffix("\r")))
        found = _places(plain.text, old)
        if not found:
            bare = old.rstrip(" \t")
            found = [each for each in _places(plain.text, bare) if _ends_line(plain.text, each[1])]
        if not found and old.endswith("\n") and plain.text.endswith(old[:-1]):
            found = [(len(plain.text) - len(old) + 1, len(plain.text))]
            self.ends_early = True
        self.places = [(plain.origin(start), plain.origin(end)) for start, end in found]


class _Plain:
    """A text without whitespace at the ends of its lines, and where each character comes from."""

    def __init__(self, text: str) -> None:
        lines = text.split("\n")
        bare = [line.rstrip(_BLANK) for line in lines]
        self.text = "\n".join(bare)
        self._starts = _starts(bare)
        self._origins = _starts(lines)

    def origin(self, index: int) -> int:
        """Where in the text a place between two characters is; before what was taken out."""
        line = bisect_right(self._starts, index) - 1
        return self._origins[line] + index - self._starts[line]


def _ends_line(text: str, index: int) -> bool:
    return index == len(text) or text[index] == "\n"


def _starts(lines: list[str]) -> list[int]:
    """Where each line begins in the text that they make."""
    starts = [0]
    for line in lines[:-1]:
        starts.append(starts[-1] + len(line) + 1)
    return starts


def _places(text: str, old: str) -> list[tuple[int, int]]:
    """Every place where a text is; where two overlap, the first, but never one place alone."""
    places: list[tuple[int, int]] = []
    at = text.find(old)
    while at >= 0 and len(places) <= _MOST_PLACES:
        places.append((at, at + len(old)))
        at = text.find(old, at + len(old))
    if len(places) == 1:
        again = text.find(old, places[0][0] + 1)
        if again >= 0:
            places.append((again, again + len(old)))
    return places


def _replaced(text: str, new: str, matches: _Matches) -> Edited:
    pieces: list[str] = []
    places: list[tuple[int, int]] = []
    at = length = 0
    for start, end in matches.places:
        if start < at:
            # Overlaps the one before.
            continue
        put = _fitting(text[start:end], new, matches)
        length += start - at
        places.append((length, length + len(put)))
        length += len(put)
        if length > MAX_CHARACTERS:
            raise Invalid("The file would become too long: use code_execution.")
        pieces += (text[at:start], put)
        at = end
    result = "".join((*pieces, text[at:]))
    if result == text:
        raise Invalid("The file has 'new_text' in this place already: nothing would change.")
    return Edited(result, places[:_MAX_PLACES], len(places), matches.is_loose)


def _fitting(piece: str, new: str, matches: _Matches) -> str:
    """The new text with the line ends that belong in the place of a piece."""
    if not matches.is_loose and ("\r" in new or "\r" in matches.old):
        return new
    new = new.replace("\r\n", "\n")
    if matches.ends_early:
        new = new.removesuffix("\n")
    has_crlf = _has_crlf(piece) if "\n" in piece else matches.has_crlf
    return new.replace("\n", "\r\n") if has_crlf else new


def _has_crlf(text: str) -> bool:
    """Whether most lines end so."""
    return 2 * text.count("\r\n") > text.count("\n")


def _ambiguous(text: str, matches: _Matches) -> str:
    lines = ", ".join(str(_line_at(text, start)) for start, _ in matches.places[:_MAX_PLACES])
    more = ", …" if matches.count > _MAX_PLACES else ""
    return (
        f"'old_text' is in the file {matches.count} times, at lines {lines}{more}. Add lines "
        "before or after the one that you mean until it is unique, or set replace_all=true."
    )


def _around(text: str, first: int, last: int) -> tuple[int, int]:
    """From where to where the lines go that have two characters, and a few lines around them."""
    left, right = first, last
    for _ in range(_AROUND + 1):
        left = text.rfind("\n", 0, max(left, 0))
        right = text.find("\n", right) + 1 or len(text) + 1
    return left + 1, right - 1


def _line_at(text: str, index: int) -> int:
    return text.count("\n", 0, index) + 1
