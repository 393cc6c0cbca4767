"""How much may still be written to a disk whose size only we can bound."""

import threading
from collections.abc import Awaitable, Callable

from openinteractions.errors import TooLarge


class Quota:
    """Of one environment. What was measured last counts, and what was written since.

    What was written and removed again counts until the next measurement.
    """

    def __init__(self, look: Callable[[], Awaitable[None]] | None = None) -> None:
        """Nothing is known.

        Args:
            look: Measures, where that is due, and calls `measured`.
        """
        self._look = look
        self._lock = threading.Lock()
        self._size: int | None = None
        self._used = 0
        self._spent = 0

    @property
    def spent(self) -> int:
        """All that was ever spent here; read it before measuring."""
        return self._spent

    @property
    def used(self) -> int:
        """What counts now."""
        return self._used

    def measured(self, used: int, size: int, *, spent_before: int) -> None:
        """Take a measurement in.

        Args:
            used: What there is.
            size: What there may be.
            spent_before: `spent`, when the measurement began.
        """
        with self._lock:
            self._size = size
            self._used = used + self._spent - spent_before

    async def check(self) -> None:
        """Before anything is written: whether there is any room.

        Raises:
            TooLarge: There is none.
        """
        if self._look is not None:
            await self._look()
        self.spend(0)

    def spend(self, size: int) -> None:
        """Count bytes that are about to be written.

        Raises:
            TooLarge: There is no room for them.
        """
        with self._lock:
            if self._size is not None and self._used + size > self._size:
                raise full(self._size)
            self._used += size
            self._spent += size


class Boundless(Quota):
    """Where the file system itself says when it is full."""

    def spend(self, size: int) -> None:
        """Nothing has to be counted."""


def full(size: int) -> TooLarge:
    """413: it has no room for more."""
    return TooLarge(
        f"The environment's disk is full: it may hold {size} bytes (setting sandbox.disk_bytes), "
        "and nothing more can be written until files are deleted."
    )
