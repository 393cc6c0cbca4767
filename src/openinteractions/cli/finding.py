"""What `doctor` has found."""

from dataclasses import dataclass

OK, WARN, BAD = "ok", "warning", "problem"
EXIT = {OK: 0, WARN: 1, BAD: 2}
"""Exit codes, by the worst finding."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: str
    what: str
    advice: str = ""
