"""Turns at something that there is little of, and that cannot be taken back: threads that wait."""

import asyncio
from collections import Counter, deque

_PART = 8


class Turns:
    """Shares so many places that one who keeps all he gets leaves some for everybody else.

    Nobody gets another one while he has an eighth of as many as are free. So the more there are
    who keep theirs, the fewer each of them has; and one is for everybody who has none.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._taken: Counter[str] = Counter()
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    async def take(self, owner: str) -> None:
        """Wait for a place; `give` it back."""
        if self._may(owner):
            self._take(owner)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((owner, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(owner)
            else:
                self._waiting.remove((owner, turn))
            raise

    def give(self, owner: str) -> None:
        """Give a place back."""
        self._free += 1
        self._taken[owner] -= 1
        if not self._taken[owner]:
            del self._taken[owner]
        for each in list(self._waiting):
            if not self._free:
                return
            if self._may(each[0]) and not each[1].done():
                self._waiting.remove(each)
                self._take(each[0])
                each[1].set_result(None)

    def _may(self, owner: str) -> bool:
        return self._free > 0 and self._taken[owner] < max(1, self._free // _PART)

    def _take(self, owner: str) -> None:
        self._free -= 1
        self._taken[owner] += 1
