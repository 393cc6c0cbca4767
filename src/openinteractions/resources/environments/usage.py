"""How many files environments have: counted by their brokers, when somebody looks.

A broker notes that it has let an environment's files be changed (`changed_at`); what was counted
before that is out of date.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from openinteractions.db.engine import Database
from openinteractions.errors import AppError
from openinteractions.resources.environments import store
from openinteractions.resources.environments.store import Environment
from openinteractions.sandbox.client import BrokerClient

_PATIENCE_S: Final = 2.0
_AT_ONCE: Final = 8


class Counts:
    """Has files counted anew where that may give something else."""

    def __init__(self, database: Database, client: BrokerClient) -> None:
        """Nothing is opened.

        Args:
            database: Where the rows are.
            client: Reaches the brokers.
        """
        self._database = database
        self._client = client

    async def of(self, row: Environment) -> Environment:
        """The row with what its files are now, where the broker can say so soon."""
        place = await store.locate(self._database, row.id)
        if place is None or place.address is None:
            return row
        try:
            async with asyncio.timeout(_PATIENCE_S):
                count, size = await self._client.usage(place.address, row.id)
        except (AppError, TimeoutError):
            return row
        await store.set_usage(self._database, row, file_count=count, size_bytes=size)
        return replace(row, file_count=count, size_bytes=size)

    async def of_all(self, rows: Sequence[Environment]) -> Sequence[Environment]:
        """The rows; those whose files have changed are counted, as many as can be soon."""
        due = [row for row in rows if row.is_outdated and not row.is_expired]
        if not due:
            return rows
        at_once = asyncio.Semaphore(_AT_ONCE)
        found: dict[Environment, Environment] = {}

        async def count(row: Environment) -> None:
            async with at_once:
                found[row] = await self.of(row)

        try:
            async with asyncio.timeout(_PATIENCE_S), asyncio.TaskGroup() as tasks:
                for row in due:
                    tasks.create_task(count(row), name=f"count-{row.id.hex}")
        except TimeoutError:
            pass
        return [found.get(row, row) for row in rows]
