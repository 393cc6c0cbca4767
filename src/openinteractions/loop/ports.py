"""What the loop needs from outside."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from openinteractions.events.types import Event
from openinteractions.loop.earlier import Found
from openinteractions.loop.spec import RunState
from openinteractions.loop.turn import Show
from openinteractions.models.catalog import Price, Target
from openinteractions.models.port import Json
from openinteractions.tools.toolbox import Toolbox


class Models(Protocol):
    """The configured models."""

    def open(self, target: str) -> Target:
        """Find a model by its `provider/model`.

        Raises:
            NotFound: No such provider is configured any more.
        """
        ...


class History(Protocol):
    """The interactions before this one, oldest first."""

    async def messages(self, target: Target, *, is_bare: bool = False) -> Sequence[bytes]:
        """As this model's messages.

        Args:
            target: Which model.
            is_bare: Without the pictures in results (`loop.pictures`).

        Raises:
            Invalid: Something in it cannot be shown to this model.
        """
        ...

    async def own(self, steps: Sequence[Json], target: Target) -> list[bytes]:
        """The running interaction's steps as this model's messages; raises like `messages`."""
        ...

    async def called(self, call_ids: Sequence[str]) -> set[str]:
        """Which of these ids a call there may have; one too many does no harm."""
        ...

    async def found(self, target: Target) -> Found:
        """What the turns there have found and a handover does not take away."""
        ...

    async def steps(self, max_chars: int) -> list[Json]:
        """What a model sees of the turns before, as steps without media, for a transcript.

        Args:
            max_chars: About how much, as JSON; where there is more, the newest.
        """
        ...


class Journal(Protocol):
    """Where a run's progress is written, under its lease."""

    @property
    def show(self) -> Show | None:
        """Takes events for the stream's readers; None where nobody can be watching."""
        ...

    def hold(self, *events: Event) -> None:
        """Keep events that the next commit shows, and nobody sees before it."""
        ...

    async def commit(self, steps: Sequence[Json], state: RunState) -> None:
        """Make steps durable, after every event that was shown before.

        Raises:
            LeaseLost: Another worker owns the run; nothing was written.
        """
        ...

    async def by_uri(self, content: Json, base_url: str) -> Json:
        """Keep a generated medium and give the block that refers to it by `uri`."""
        ...


class Purse(Protocol):
    """The day's budgets of the key and the project that pay for a run."""

    async def room(self, *, input_tokens: int, price: Price | None) -> int:
        """How many tokens the next answer may have.

        Raises:
            BudgetSpent: Not even one.
        """
        ...

    async def reserve(self, *, tokens: int, nanousd: int) -> None:
        """Set the worst case of one call aside.

        Raises:
            BudgetSpent: It does not fit; nothing was set aside.
        """
        ...

    async def settle(self, *, tokens: int, nanousd: int) -> None:
        """Replace what was set aside by what the call took."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on asking a model that fails."""

    attempts: int
    max_wait: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Everything that one run is connected to."""

    models: Models
    history: History
    journal: Journal
    tools: Toolbox
    """Those that this server runs."""
    purse: Purse | None
    """None where no budget is set for the key or project."""
    patience: Patience
