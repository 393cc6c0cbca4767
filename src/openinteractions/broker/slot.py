"""One environment's place with its broker: what runs there, who uses it, and since when nobody."""

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from openinteractions.broker.live import Live, Running

_CLEAN_S: Final = 3600.0


@dataclass(eq=False)
class Slot:
    """One environment's place."""

    id: UUID
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    live: Live | None = None
    running: dict[str, Running] = field(default_factory=dict[str, Running])
    """Executions without a stored result."""
    leftover: str | None = None
    """A container that could not be removed."""
    is_open: bool = False
    """Its disk was opened, and not released since."""
    cleaned_at: float | None = None
    """When what nobody goes on with was removed from beside its files."""
    uses: int = 0
    last_used: float = field(default_factory=time.monotonic)
    file_uses: int = 0
    """Who only reads or writes its files: their disk is needed, and no sandbox."""
    files_last_used: float = field(default_factory=time.monotonic)
    landing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a run changes a file."""

    @contextmanager
    def used(self) -> Generator[None]:
        """It is in use until the context ends."""
        self.uses += 1
        try:
            yield
        finally:
            self.uses -= 1
            self.touch()

    @contextmanager
    def files_used(self) -> Generator[None]:
        """Its disk is in use until the context ends."""
        self.file_uses += 1
        try:
            yield
        finally:
            self.file_uses -= 1
            self.files_last_used = time.monotonic()

    def touch(self) -> None:
        """It has just been used."""
        self.last_used = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether somebody uses its sandbox now, or it is about to change."""
        return bool(self.uses or self.running or self.lock.locked())

    @property
    def is_at_work(self) -> bool:
        """Whether somebody uses its sandbox, beyond storing how something ended."""
        return bool(self.uses) or any(one.record.exit is None for one in self.running.values())

    @property
    def idle_s(self) -> float:
        """How long nobody has used its sandbox."""
        return 0.0 if self.uses or self.running else time.monotonic() - self.last_used

    @property
    def disk_idle_s(self) -> float:
        """How long nobody has used anything of it."""
        return 0.0 if self.file_uses else min(self.idle_s, time.monotonic() - self.files_last_used)

    @property
    def is_to_be_cleaned(self) -> bool:
        """Whether it was long ago, or never."""
        return self.cleaned_at is None or time.monotonic() - self.cleaned_at > _CLEAN_S
