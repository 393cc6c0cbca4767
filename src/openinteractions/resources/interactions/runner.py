"""What this resource needs of the execution wing. It is handed in by `app`; nothing here runs."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from openinteractions.events.types import Event
from openinteractions.resources.interactions.store import Interaction, Place, StoredStep
from openinteractions.wire.create import CreateInteraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that the models can serve, resolved."""

    spec: bytes
    """The frozen run spec, JSON."""
    plan: object
    """The runner's own; it goes back to it with the lease."""
    provider: str
    steps: list[dict[str, Any]]
    """The input, with what it refers to fetched where the model needs it."""
    warnings: list[dict[str, Any]]
    needs_environment: bool = False
    needs_sandbox: bool = False
    """It has tools that run in one."""
    environment_id: UUID | None = None
    """The sandbox that it works in; it is then left to the queue."""
    is_environment_new: bool = False
    """It was made for this interaction."""
    secrets: dict[str, Any] | None = field(default=None, repr=False)
    """Those of the request that its run needs: kept sealed, and in no other place."""
    consents: Sequence[str] = ()
    """Calls of the interaction before that it carries out, since a human has said yes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What a new interaction takes from the one that it continues."""

    environment_id: UUID | None
    pending: list[dict[str, Any]]
    """Its calls that wait for a result, which the new one's input answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A stored run that this process owns from its create on."""

    interaction: Interaction
    spec: bytes
    plan: object
    steps: list[dict[str, Any]]
    epoch: int
    events_written: int
    key_id: UUID | None
    is_budgeted: bool
    secrets: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended, as its row now says."""

    status: str
    created_at: datetime
    updated_at: datetime
    steps: Sequence[StoredStep]
    """Those that it generated."""
    usage: bytes | None
    errors: bytes | None
    warnings: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unstored:
    """A request that leaves nothing behind but what it cost (`store=false`)."""

    project_id: UUID
    key_id: UUID | None
    is_budgeted: bool
    model: str | None
    spec: bytes
    steps: list[dict[str, Any]]
    history: Place | None
    history_idx: int | None
    warnings: list[dict[str, Any]]
    stream: bool
    environment_id: UUID | None = None
    """A sandbox of its own, which goes with it."""
    secrets: dict[str, Any] | None = field(default=None, repr=False)


class MemoryRun(Protocol):
    """An unstored run under way. It ends with its caller."""

    def events(self) -> AsyncIterator[list[Event]]:
        """What its stream shows; ends with the run."""
        ...

    async def ended(self) -> Ended:
        """Wait for its end."""
        ...

    async def stop(self) -> None:
        """Stop it; nothing happens if it has ended."""
        ...


class Runner(Protocol):
    """Runs interactions."""

    @property
    def worker_id(self) -> int:
        """This process among the workers: who owns what it starts."""
        ...

    async def prepare(
        self, project_id: UUID, request: CreateInteraction, base_url: str, earlier: Earlier | None
    ) -> Prepared:
        """Resolve a request and make sure that its model or agent can serve it.

        `base_url` is where this server is reached, for URIs that it hands out. `earlier` is the
        interaction that this one continues.

        Raises:
            Invalid: Something in it cannot be honoured; the message names it.
            NotFound: No such model.
        """
        ...

    async def discard(self, project_id: UUID, prepared: Prepared) -> None:
        """Take back what was made for a request that came to nothing."""
        ...

    def start(self, lease: Lease) -> "asyncio.Future[Ended | None]":
        """Run a stored interaction here, whoever goes on listening.

        The future gives None where another worker has taken the run over.
        """
        ...

    def start_in_memory(self, unstored: Unstored) -> MemoryRun:
        """Run an interaction that is not stored."""
        ...

    async def cancel(self, project_id: UUID, interaction_id: UUID) -> None:
        """Stop a run, wherever it is, and write its terminal state; no-op if it has ended."""
        ...
