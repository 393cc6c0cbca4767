"""Text for models: numbered lines, sizes, and where something was cut."""

from collections.abc import Sequence

_STEP = 1000


def numbered(lines: Sequence[str], first: int, *, most_characters: int | None = None) -> str:
    """Lines with their numbers before them, as `cat -n` has them.

    Args:
        lines: Without their ends.
        first: The number of the first.
        most_characters: Longer lines are cut; None: they are short enough.
    """
    return "\n".join(
        f"{number:>6}\t{line if most_characters is None else cut(line, most_characters)}"
        for number, line in enumerate(lines, first)
    )


def cut(line: str, most_characters: int) -> str:
    """A line, or its beginning."""
    if len(line) <= most_characters:
        return line
    return f"{line[:most_characters]} [… line cut: {len(line)} characters]"


def in_line(name: str) -> str:
    """A name in one line: what would not be seen, or seem to be a line, is written as an escape."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode-escape").decode() for c in name)


def size(byte_count: int) -> str:
    """Such as `1.2 kB`; below a thousand exact."""
    if byte_count < _STEP:
        return f"{byte_count} B"
    value = byte_count / _STEP
    for unit in ("kB", "MB"):
        if value < _STEP:
            return f"{value:.1f} {unit}"
        value /= _STEP
    return f"{value:.1f} GB"


def counted(count: int, noun: str) -> str:
    """Such as `1 line` or `3 lines`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def line_count(text: str) -> int:
    """How many lines a text has; one that is not ended counts."""
    return text.count("\n") + (not text.endswith("\n") and bool(text))
