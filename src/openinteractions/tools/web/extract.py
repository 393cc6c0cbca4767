"""What reading a page gives: alone here, since what reads it is large and stays in children."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extract:
    """The text of a page."""

    text: str = ""
    title: str | None = None
    message: str | None = None
    """What a reader should know about it."""
    is_paid: bool = False
    """Only a teaser of it can be read without paying."""
    is_readable: bool = True
    """Whether it is something that has text, or a picture."""
