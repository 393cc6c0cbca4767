"""What the generations of Gemini differ in, told from a model's name."""

import re
from typing import Final

_OLD: Final = re.compile(r"gemini-[12](?!\d)")


def is_old(model: str) -> bool:
    """Whether it is a Gemini before 3.

    Those want no signatures, take no media in the results of functions, and refuse functions
    beside tools that Google runs: https://ai.google.dev/gemini-api/docs/tool-combination
    """
    return _OLD.search(model) is not None
