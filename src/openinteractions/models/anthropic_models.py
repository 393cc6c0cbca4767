"""What the generations of Claude differ in, told from a model's name.

Names that are not Claude's belong to other vendors behind the same wire: they get the oldest and
most widely understood form of each option.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal

_VERSION: Final = re.compile(r"claude-(?:[a-z]+-)?(\d+)(?:[-.](\d{1,2}))?(?!\d)")
_FIRST_THINKING: Final = (3, 7)
_FIRST_SCHEMAS: Final = (4, 1)
_FIRST_ADAPTIVE: Final = (4, 6)
_FIRST_WITHOUT_SAMPLING: Final = (4, 7)
_FIRST_ROOMY: Final = (4, 0)
_FIRST_THOUGHTFUL: Final = (5, 0)
_ROOM: Final = 32_000
_SMALL_ROOM: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a model takes."""

    thinking: Literal["adaptive", "budget", "none"]
    """`adaptive`: with `output_config.effort`, from 4.6 on, and from 4.7 on the only way.
    `budget`: `budget_tokens`, from 3.7 to 4.5, and elsewhere."""
    thinks: bool
    """Whether it thinks where nothing asks for it, from 5 on; without showing it, that is."""
    schemas: bool
    """Whether `output_config.format` may be sent."""
    sampling: bool
    """Whether `temperature` and `top_p` may be sent; from 4.7 on they are refused."""
    both_samplings: bool
    """Whether `temperature` and `top_p` may stand together; from 4.1 on they may not."""
    xhigh: bool
    """Whether the effort `xhigh` exists."""
    max_tokens: int
    """The output limit where the caller names none: the wire wants one. 32,000 is the least of
    what any Claude since 4 takes, 8,192 suits older and other models."""


def traits(model: str) -> Traits:
    """The traits of a model."""
    if "claude" not in model:
        return _OTHERS
    version = _version(model)
    return Traits(
        thinking=_thinking(version),
        thinks=version >= _FIRST_THOUGHTFUL,
        schemas=version >= _FIRST_SCHEMAS,
        sampling=version < _FIRST_WITHOUT_SAMPLING,
        both_samplings=version < _FIRST_SCHEMAS,
        xhigh=version >= _FIRST_WITHOUT_SAMPLING,
        max_tokens=_ROOM if version >= _FIRST_ROOMY else _SMALL_ROOM,
    )


def _version(model: str) -> tuple[int, int]:
    match = _VERSION.search(model)
    # An alias without a number means the latest.
    return (int(match[1]), int(match[2] or 0)) if match else (99, 0)


def _thinking(version: tuple[int, int]) -> Literal["adaptive", "budget", "none"]:
    if version >= _FIRST_ADAPTIVE:
        return "adaptive"
    return "budget" if version >= _FIRST_THINKING else "none"


_OTHERS: Final = Traits(
    thinking="budget",
    thinks=False,
    schemas=True,
    sampling=True,
    both_samplings=True,
    xhigh=False,
    max_tokens=_SMALL_ROOM,
)
