"""Texts that are too long, cut so that their reader can tell."""

from typing import Final

_HEAD: Final = 2 / 3
_MARK_CHARS: Final = 48


def cut_middle(text: str, max_chars: int) -> str:
    """The text, or its beginning and end around a mark that says how much is missing.

    Never longer than `max_chars`; where not even the mark fits, the beginning alone.
    """
    if len(text) <= max_chars:
        return text
    room = max_chars - _MARK_CHARS
    if room <= 0:
        return text[: max(0, max_chars)]
    head = int(room * _HEAD)
    tail = room - head
    missing = len(text) - room
    return f"{text[:head]}\n[… {missing} characters left out …]\n{text[-tail:]}"
