"""The one who breaks things, at the seed's whim."""

import asyncio
import random
import signal
from collections import Counter

from tests.chaos.stage import DEAD_AFTER_S, Slot, Stage

_PAUSE_S = (1.0, 2.5)
_WHIMS = {
    "kill a worker": 6,
    "kill an api": 3,
    "stall a worker": 3,
    "stall an api": 1,
    "terminate a worker": 1,
    "kill PostgreSQL": 2,
}


class Monkey:
    """Kills, stalls and restarts until it is told to stop; then lets everything heal."""

    def __init__(self, stage: Stage, seed: int, *, log: bool) -> None:
        self._stage = stage
        self._rng = random.Random(f"monkey {seed}")
        self._log = log
        self.deeds: Counter[str] = Counter()

    async def play(self, enough: asyncio.Event) -> None:
        """Do one thing after another until `enough`."""
        stalls: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            # Each kind of harm is done once before chance decides.
            deeds = self._rng.sample(list(_WHIMS), len(_WHIMS))
            while not enough.is_set():
                deed = deeds.pop() if deeds else self._whim()
                stall = self._do(deed)
                if stall is not None:
                    stalls.add(group.create_task(stall))
                await asyncio.sleep(self._rng.uniform(*_PAUSE_S))
        for slot in self._stage.slots:
            slot.send(signal.SIGCONT)

    def _whim(self) -> str:
        return self._rng.choices(list(_WHIMS), list(_WHIMS.values()))[0]

    def _do(self, deed: str):
        self.deeds[deed] += 1
        victim: Slot | None = None
        if deed != "kill PostgreSQL":
            pool = self._stage.workers if deed.endswith("worker") else self._stage.apis
            victim = self._rng.choice([s for s in pool if not s.is_stopped] or pool)
        if self._log:
            print(f"monkey: {deed} {victim.name if victim else ''}", flush=True)
        if victim is None:
            self._stage.kill_postgres()
        elif deed.startswith("kill"):
            victim.kill()
        elif deed.startswith("terminate"):
            victim.is_killed = True
            victim.send(signal.SIGTERM)
        else:
            return self._stall(victim)
        return None

    async def _stall(self, victim: Slot) -> None:
        """Let it sleep past its lease, and wake up believing that it owns its runs."""
        victim.is_stopped = True
        victim.send(signal.SIGSTOP)
        await asyncio.sleep(DEAD_AFTER_S + self._rng.uniform(0.5, 2.5))
        victim.send(signal.SIGCONT)
        victim.is_stopped = False
