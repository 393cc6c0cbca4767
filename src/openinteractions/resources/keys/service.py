"""Keys: made, checked, revoked. Only hashes are stored."""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from openinteractions import ids
from openinteractions.api.scope import Caller
from openinteractions.db.engine import Database
from openinteractions.errors import Invalid
from openinteractions.events.follow import listen
from openinteractions.resources.keys import store

DEFAULT_PROJECT = "default"
PREFIX_CHARS = 10
"""So much of a key is kept and shown."""
_SHORTEST_KEY = 16
_CACHED_S = 30.0
_MOST_CACHED = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DayBudget:
    """What a key or a project may take in one day (UTC)."""

    max_cost_usd: float | None = None
    max_tokens: int | None = None


async def create(
    database: Database,
    *,
    name: str,
    project: str = DEFAULT_PROJECT,
    budget: DayBudget | None = None,
) -> str:
    """Make a key and return it; it is shown this once."""
    key = ids.api_key()
    key_id = await ensure(database, key, name=name, project=project)
    if budget is not None:
        await limit(database, project=project, key_id=key_id, budget=budget)
    return key


async def ensure(
    database: Database, key: str, *, name: str, project: str = DEFAULT_PROJECT
) -> UUID:
    """Make sure that a given key exists; its id.

    Raises:
        Invalid: It is too short to be safe.
    """
    if len(key) < _SHORTEST_KEY:
        raise Invalid(f"An API key needs at least {_SHORTEST_KEY} characters.")
    project_id = await store.ensure_project(database, project)
    return await store.add(
        database,
        project_id=project_id,
        name=name,
        digest=_digest(key),
        prefix=key[:PREFIX_CHARS],
    )


async def limit(
    database: Database, *, project: str, key_id: UUID | None, budget: DayBudget
) -> None:
    """Set a day's budget for a key, or for its whole project."""
    cost = budget.max_cost_usd
    await store.set_budget(
        database,
        project_id=await store.ensure_project(database, project),
        key_id=key_id,
        max_nanousd=None if cost is None else round(cost * 1e9),
        max_tokens=budget.max_tokens,
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Keyring:
    """Checks keys, from memory where it can. A revocation reaches every process by NOTIFY."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[bytes, tuple[float, Caller]] = {}
        self._generation = 0

    async def __call__(self, key: str | None) -> Caller | None:
        """Whom a key speaks for; None if it is missing, unknown or revoked."""
        if not key:
            return None
        digest = _digest(key)
        known = self._known.get(digest)
        if known is not None and time.monotonic() < known[0]:
            return known[1]
        generation = self._generation
        holder = await store.find(self._database, digest)
        if holder is None:
            self._known.pop(digest, None)
            return None
        caller = Caller(holder.project_id, holder.key_id, holder.is_budgeted, holder.retention)
        if len(self._known) >= _MOST_CACHED:
            self._known.clear()
        # What was read while a change came in may be from before it: not kept.
        if generation == self._generation:
            self._known[digest] = (time.monotonic() + _CACHED_S, caller)
        return caller

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """Forget what is known whenever a key or budget changes, until the context ends."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(
                listen(self._database, store.CHANNEL, lambda _: self._forget(), self._forget),
                name="key-listener",
            )
            try:
                yield
            finally:
                task.cancel()

    def _forget(self) -> None:
        self._generation += 1
        self._known.clear()


class OpenDoor:
    """`--no-auth`: everybody is the default project."""

    def __init__(self, project_id: UUID) -> None:
        self._caller = Caller(project_id, None, is_budgeted=False)

    async def __call__(self, key: str | None) -> Caller:
        """The default project, whatever the key."""
        del key
        return self._caller
