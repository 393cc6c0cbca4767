"""How large environments may grow whose file system does not bound them: watched, and acted on.

What comes over the API is counted as it comes, and refused when there is no room. What commands
write cannot be stopped so: it is measured again and again, and a sandbox that has grown well beyond
its bound is stopped. The next command is refused with the reason. Those after it may run, since
only commands can delete files; but they may not let it grow, and after each further stop they have
to wait for longer.
"""

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from openinteractions.errors import TooLarge
from openinteractions.sandbox.disk import Disks, Fill
from openinteractions.sandbox.files.quota import Quota

_EVERY_S: Final = 2.0
_EVERY_WHEN_OVER_S: Final = 0.5
_PAUSES: Final = 4
"""A measurement is followed by so many times its own length without one."""
_FRESH_S: Final = 1.0
_PLENTY: Final = 0.75
_SLACK: Final = 2**20
_FIRST_WAIT_S: Final = 5.0
_MAX_WAIT_S: Final = 600.0
_MAX_DOUBLINGS: Final = 10


@dataclass(eq=False)
class _Bound:
    """What is known of one environment."""

    quota: Quota
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_free: bool = False
    """Its file system bounds it."""
    measured_at: float = -math.inf
    took_s: float = 0.0
    size: int = 0
    hard_size: int = 0
    tolerated: int = 0
    """Its sandbox is stopped when it has more."""
    stops: int = 0
    """Since it was last within its bound."""
    waits_until: float = -math.inf
    is_told: bool = True
    """Somebody has heard why it was stopped."""


class Bounds:
    """Of all environments of a broker."""

    def __init__(self, disks: Disks) -> None:
        self._disks = disks
        self._bounds: dict[UUID, _Bound] = {}

    def quota(self, env: UUID) -> Quota:
        """What may be written to an environment, from outside its sandbox."""
        return self._of(env).quota

    async def admit(self, env: UUID) -> None:
        """Look at an environment whose sandbox is about to start.

        Raises:
            TooLarge: It has grown too far, and this is the first to hear of it, or comes too soon.
        """
        bound = self._of(env)
        if bound.is_free:
            return
        async with bound.lock:
            found = await self._measured(env, bound, most=bound.hard_size or None)
            if found is not None and found.charged > found.hard_size:
                found = await self._measured(env, bound, most=None)
        if found is None:
            return
        bound.tolerated = found.hard_size
        if found.charged <= found.size:
            bound.stops, bound.is_told = 0, True
        elif found.charged > found.hard_size or not bound.is_told:
            self._refuse(bound, found)
            bound.tolerated = max(found.hard_size, found.charged + _SLACK)

    async def is_over(self, env: UUID) -> Fill | None:
        """Look at an environment whose sandbox runs; how full it is, if it has to be stopped."""
        bound = self._of(env)
        every_s = _EVERY_WHEN_OVER_S if bound.tolerated > bound.hard_size else _EVERY_S
        pause_s = max(every_s, _PAUSES * bound.took_s)
        if bound.is_free or time.monotonic() - bound.measured_at < pause_s:
            return None
        async with bound.lock:
            found = await self._measured(env, bound, most=bound.tolerated or None)
        if found is None:
            return None
        # A sandbox of a broker before was not admitted here.
        bound.tolerated = bound.tolerated or found.hard_size
        if found.charged <= bound.tolerated:
            bound.tolerated = max(found.hard_size, min(bound.tolerated, found.charged + _SLACK))
            return None
        wait_s = _FIRST_WAIT_S * 2 ** min(bound.stops - 1, _MAX_DOUBLINGS) if bound.stops else 0.0
        bound.waits_until = time.monotonic() + min(wait_s, _MAX_WAIT_S)
        bound.stops += 1
        bound.is_told = False
        return found

    def forget(self, env: UUID, *, is_deleted: bool = False) -> None:
        """Nobody uses it now; what it was stopped for is remembered until it is deleted."""
        bound = self._bounds.get(env)
        if bound is not None and (is_deleted or not bound.stops):
            del self._bounds[env]

    def _of(self, env: UUID) -> _Bound:
        bound = self._bounds.get(env)
        if bound is None:
            bound = _Bound(Quota(lambda: self._look(env)))
            self._bounds[env] = bound
        return bound

    async def _look(self, env: UUID) -> None:
        """Before something is written: know how full it is, as exactly as is worth while."""
        bound = self._of(env)
        if bound.is_free:
            return
        async with bound.lock:
            is_plenty = bound.quota.used < _PLENTY * bound.size
            fresh_s = _PAUSES * bound.took_s + (_FRESH_S if is_plenty else 0.0)
            if time.monotonic() - bound.measured_at > fresh_s:
                await self._measured(env, bound, most=bound.hard_size or None)

    async def _measured(self, env: UUID, bound: _Bound, *, most: int | None) -> Fill | None:
        before = bound.quota.spent
        found = await self._disks.fill(env.hex, most=most)
        bound.measured_at = time.monotonic()
        if found is None:
            bound.is_free = True
            return None
        bound.took_s, bound.size, bound.hard_size = found.took_s, found.size, found.hard_size
        bound.quota.measured(found.charged, found.size, spent_before=before)
        return found

    def _refuse(self, bound: _Bound, found: Fill) -> None:
        wait_s = bound.waits_until - time.monotonic()
        if bound.is_told and wait_s <= 0:
            return
        bound.is_told = True
        when = f"in {math.ceil(wait_s)} seconds" if wait_s > 0 else "now"
        raise TooLarge(
            f"The environment's files take {found.charged} bytes, and may take {found.size} "
            "(setting sandbox.disk_bytes): its sandbox was stopped. Commands can run again "
            f"{when}, to delete files; it is stopped again if they grow.",
            retry_after_s=wait_s if wait_s > 0 else None,
        )
