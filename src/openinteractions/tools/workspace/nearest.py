"""What a model may have meant by a text that is not in a file."""

import difflib
import re
from collections import Counter, defaultdict
from typing import Final

from openinteractions.tools.workspace import text as words

_NUMBERED: Final = re.compile(r" *[0-9]+\t")
_MAX_SHOWN: Final = 12
_MAX_LINE: Final = 300
_MAX_LINES: Final = 50_000
_MAX_WIDTH: Final = 5000
_MAX_COMPARED: Final = 5000
_MAX_PLACES: Final = 8
_MAX_RATIOS: Final = 300
"""Each costs the square of a line's length."""
_ALIKE: Final = 0.6
_LEAST: Final = 3
"""Shorter lines, such as brackets, are everywhere."""


def nearest(text: str, old: str) -> str:
    """A hint for the model: the lines that are most like it."""
    if not old.strip():
        return "It is only whitespace: add the text around it."
    given = old.strip("\n").split("\n")
    if all(_NUMBERED.match(line) for line in given if line.strip()):
        return "It begins with the line numbers of read_file: leave out each number and its tab."
    wanted = [_joined(line) for line in given]
    lines = text.split("\n", _MAX_LINES)[:_MAX_LINES]
    have = [_joined(line[:_MAX_WIDTH]) for line in lines]
    at = _same(have, wanted)
    if at is not None:
        remark = "These lines differ only in whitespace; copy them as they are:"
    else:
        at = _alike(have, wanted)
        remark = "The nearest lines are:"
    if at is None:
        return "Nothing in it is like it: read the file again."
    shown = [line.removesuffix("\r") for line in lines[at : at + min(len(wanted), _MAX_SHOWN)]]
    excerpt = words.numbered(shown, at + 1, most_characters=_MAX_LINE)
    # A byte that is no UTF-8 must not get into a result.
    return f"{remark}\n{excerpt}".encode(errors="replace").decode()


def _joined(line: str) -> str:
    return " ".join(line.split())


def _same(have: list[str], wanted: list[str]) -> int | None:
    """Where the lines are the same but for whitespace."""
    count = len(wanted)
    if not any(len(line) >= _LEAST for line in wanted):
        return None
    for at, line in enumerate(have):
        if line == wanted[0] and have[at : at + count] == wanted:
            return at
    return None


def _alike(have: list[str], wanted: list[str]) -> int | None:
    """Where most of the lines are, or one that is like the longest of them."""
    places: defaultdict[str, list[int]] = defaultdict(list)
    for index, line in enumerate(wanted):
        if len(line) >= _LEAST and len(places[line]) < _MAX_PLACES:
            places[line].append(index)
    votes: Counter[int] = Counter()
    for at, line in enumerate(have):
        votes.update(max(0, at - index) for index in places.get(line, ()))
    if votes:
        return max(votes, key=lambda at: (votes[at], -at))
    return _like_longest(have, wanted)


def _like_longest(have: list[str], wanted: list[str]) -> int | None:
    index, line = max(enumerate(wanted), key=lambda each: len(each[1]))
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(line[:_MAX_LINE])
    best, found, left = _ALIKE, None, _MAX_RATIOS
    for at, other in enumerate(have[:_MAX_COMPARED]):
        if not other or not left:
            continue
        matcher.set_seq1(other[:_MAX_LINE])
        if matcher.real_quick_ratio() < best or matcher.quick_ratio() < best:
            continue
        left -= 1
        ratio = matcher.ratio()
        if ratio >= best:
            best, found = ratio, max(0, at - index)
    return found
