"""Whose turn it is where there are fewer sandboxes than projects want.

What runs is never stopped for another project. But who has been refused is remembered for a while,
and what becomes free meanwhile is not for those who have their share already.
"""

import time
from collections.abc import Callable, Mapping
from typing import Final
from uuid import UUID

_WANTS_S: Final = 10.0
"""Who is refused asks again within a few seconds, or wants none any more."""
_TELL_S: Final = 60.0


class Shares:
    """Of one broker's sandboxes."""

    def __init__(self, most: int, *, now: Callable[[], float] = time.monotonic) -> None:
        """Nobody wants one.

        Args:
            most: How many sandboxes may run.
            now: The time in seconds.
        """
        self._most = most
        self._now = now
        self._wanted: dict[UUID, float] = {}
        self._told: float | None = None

    def may_have(self, project: UUID, busy: Mapping[UUID, int]) -> bool:
        """Whether a project may have one more, as long as there is one.

        Args:
            project: Who asks.
            busy: How many sandboxes work for each project.
        """
        since = self._now() - _WANTS_S
        self._wanted = {one: at for one, at in self._wanted.items() if at > since}
        others = self._wanted.keys() - {project}
        if len(others) < self._most - sum(busy.values()):
            return True
        return busy.get(project, 0) < max(1, self._most // len({project, *others, *busy}))

    def note_refusal(self, project: UUID) -> bool:
        """Remember who did not get one; whether it is time to tell the operator."""
        now = self._now()
        self._wanted[project] = now
        is_news = self._told is None or now - self._told > _TELL_S
        if is_news:
            self._told = now
        return is_news

    def note_start(self, project: UUID) -> None:
        """It got one."""
        self._wanted.pop(project, None)
