"""What the egress proxy needs of the rest: credentials, and a record of what it decided."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import structlog

from openinteractions import clock, ids, metrics
from openinteractions.broker import store
from openinteractions.db.engine import LOST, Database
from openinteractions.resources.credentials.service import HeaderInjection, Vault
from openinteractions.sandbox.egress.inject import Bearer, Injection, Location, Placeholder
from openinteractions.sandbox.egress.journal import Decision

_log = structlog.get_logger(__name__)

_FLUSH_S: Final = 1.0
_BATCH: Final = 500
_MAX_WAITING: Final = 20_000
_RATE: Final = 50.0
"""Decisions of one environment that are kept in a second, over time."""
_BURST: Final = 500.0
_MAX_SHARE: Final = 2000
"""Of those that wait, one environment's."""
_SUM_UP_S: Final = 10.0
_LOCATIONS: Final[tuple[Location, ...]] = ("header", "query", "body")


class Projects:
    """Whose the environments are that run here."""

    def __init__(self) -> None:
        self._of: dict[str, UUID] = {}

    def add(self, environment_id: UUID, project_id: UUID) -> None:
        """Note an environment that is about to run."""
        self._of[environment_id.hex] = project_id

    def find(self, environment_id: str) -> UUID | None:
        """The project of an environment that runs, or ran, here."""
        return self._of.get(environment_id)

    def drop(self, environment_id: UUID) -> None:
        """Forget an environment that was deleted."""
        self._of.pop(environment_id.hex, None)


class Credentials:
    """The stored credentials, for the proxy; an environment gets those of its own project."""

    def __init__(self, vault: Vault, projects: Projects) -> None:
        self._vault = vault
        self._projects = projects

    async def credential(self, environment_id: str, credential_id: str) -> Injection | None:
        """The credential as it is now.

        Raises:
            AppError: It is not to be had.
        """
        project_id = self._projects.find(environment_id)
        if project_id is None:
            return None
        found = await self._vault.injection(project_id, credential_id)
        if isinstance(found, HeaderInjection):
            return Bearer(token=found.token, header_name=found.header_name, prefix=found.prefix)
        return Placeholder(
            value=found.value,
            # Without any, nobody may have it.
            trusted_domains=found.trusted_domains or (),
            locations=frozenset(each for each in _LOCATIONS if each in found.locations),
        )


@dataclass(slots=True)
class _Share:
    """One environment's part of the log."""

    project_id: UUID
    allowance: float = _BURST
    at: float = field(default_factory=time.monotonic)
    waiting: int = 0
    omitted: int = 0

    def take(self) -> bool:
        """Whether one more may be kept."""
        now = time.monotonic()
        self.allowance = min(_BURST, self.allowance + (now - self.at) * _RATE)
        self.at = now
        if self.allowance < 1 or self.waiting >= _MAX_SHARE:
            self.omitted += 1
            return False
        self.allowance -= 1
        self.waiting += 1
        return True

    @property
    def is_quiet(self) -> bool:
        """It has nothing to remember."""
        is_rested = time.monotonic() - self.at > _BURST / _RATE
        return is_rested and not self.waiting and not self.omitted


class EgressLog:
    """Writes the proxy's decisions to the database, in batches.

    While the database is away they wait, up to a bound; what is dropped beyond it is counted. An
    environment that makes too many takes no room from others: a row says how many were left out.
    """

    def __init__(self, database: Database, projects: Projects) -> None:
        self._database = database
        self._projects = projects
        self._waiting: list[store.EgressRow] = []
        self._full = asyncio.Event()
        self._dropped = 0
        self._shares: dict[UUID, _Share] = {}
        self._summed_up_at = -_SUM_UP_S

    def record(self, decision: Decision) -> None:
        """Keep a decision; neither blocks nor raises."""
        metrics.child(metrics.egress, decision.decision).inc()
        project_id = self._projects.find(decision.environment_id)
        if project_id is None or len(self._waiting) >= _MAX_WAITING:
            self._dropped += 1
            return
        environment_id = UUID(decision.environment_id)
        share = self._shares.setdefault(environment_id, _Share(project_id))
        if not share.take():
            return
        self._waiting.append(_row(decision, project_id))
        if len(self._waiting) >= _BATCH:
            self._full.set()

    @asynccontextmanager
    async def writing(self) -> AsyncGenerator[None]:
        """Write in the background until the context ends, and then the rest."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._write_for_ever(), name="egress-log")
            try:
                yield
            finally:
                task.cancel()
        self._sum_up()
        await self._flush()

    async def _write_for_ever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_FLUSH_S):
                    await self._full.wait()
            except TimeoutError:
                pass
            self._full.clear()
            if time.monotonic() - self._summed_up_at >= _SUM_UP_S:
                self._sum_up()
            if not await self._flush():
                await asyncio.sleep(_FLUSH_S)

    def _sum_up(self) -> None:
        """Add a row for each environment of whose decisions some were left out."""
        self._summed_up_at = time.monotonic()
        for environment_id, share in list(self._shares.items()):
            if share.omitted:
                _log.warning(
                    "egress.log_dropped", rows=share.omitted, environment_id=environment_id.hex
                )
                self._waiting.append(_omitted(environment_id, share))
                share.waiting += 1
                share.omitted = 0
            elif share.is_quiet:
                del self._shares[environment_id]

    def _written(self, batch: list[store.EgressRow]) -> None:
        """They do not wait any more."""
        for row in batch:
            share = self._shares.get(row[0])
            if share is not None:
                share.waiting -= 1

    async def _flush(self) -> bool:
        """Write what waits; False where the database is away."""
        if self._dropped:
            _log.warning("egress.log_dropped", rows=self._dropped)
            self._dropped = 0
        while self._waiting:
            batch = self._waiting[:_BATCH]
            try:
                await store.log_egress(self._database, batch)
            except LOST as error:
                _log.warning("egress.log_failed", error=type(error).__name__)
                return False
            except Exception:  # noqa: BLE001 - one bad row must not end the log
                _log.exception("egress.log_refused", rows=len(batch))
                self._dropped += len(batch)
            del self._waiting[: len(batch)]
            self._written(batch)
        return True


def _row(decision: Decision, project_id: UUID) -> store.EgressRow:
    return (
        UUID(decision.environment_id),
        ids.uuid7(),
        project_id,
        decision.at,
        _clean(decision.host),
        decision.port,
        decision.kind,
        _clean(decision.method),
        _clean(decision.path),
        decision.decision,
        _clean(decision.reason),
        decision.rule,
        decision.credential,
        decision.status,
        decision.bytes_up,
        decision.bytes_down,
        decision.duration_ms,
    )


def _omitted(environment_id: UUID, share: _Share) -> store.EgressRow:
    """A row that stands for those that were left out."""
    reason = (
        f"{share.omitted} decisions were not kept: an environment's log takes {_RATE:.0f} a second."
    )
    decided = ("", 0, "tunnel", None, None, "omitted", reason)
    found = (None, None, None, 0, 0, 0)
    return (environment_id, ids.uuid7(), share.project_id, clock.now(), *decided, *found)


def _clean(text: str | None) -> str | None:
    """Text as PostgreSQL takes it: a sandbox chooses hosts, methods and paths."""
    if text is None:
        return None
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
