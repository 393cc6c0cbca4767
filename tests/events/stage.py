"""Bare interactions with a job, for tests of the log: no loop, no models."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import orjson

from openinteractions import ids
from openinteractions.db.engine import Database
from openinteractions.events.types import Event, Position

PROJECT = UUID(int=7)


@dataclass(frozen=True, slots=True)
class Staged:
    """An interaction whose job runs under epoch 1."""

    id: UUID
    born: datetime


async def worker(database: Database) -> int:
    async with database.hot() as connection:
        return await connection.fetchval(
            "insert into workers (host, pid, role) values ('h', 1, 'all') returning id"
        )


async def interaction(database: Database, *, worker_id: int = 1) -> Staged:
    key = ids.uuid7()
    async with database.hot() as connection, connection.transaction():
        born = await connection.fetchval(
            "insert into interactions (id, project_id, segment_id, depth, status, logged, model) "
            "values ($1, $2, $1, 0, 'in_progress', true, 'm') returning created_at",
            key,
            PROJECT,
        )
        await connection.execute(
            "insert into segments (id, project_id) values ($1, $2)", key, PROJECT
        )
        await connection.execute(
            "insert into jobs (id, project_id, kind, state, worker_id, epoch) "
            "values ($1, $2, 'run', 1, $3, 1)",
            key,
            PROJECT,
            worker_id,
        )
    return Staged(key, born)


async def take_over(database: Database, key: UUID) -> None:
    async with database.hot() as connection:
        await connection.execute("update jobs set epoch = epoch + 1 where id = $1", key)


def delta(number: int, text: str | None = None) -> Event:
    """Event number n, told apart by its text."""
    value = {"event_type": "step.delta", "n": number, "text": text or f"t{number}"}
    return Event("d", Position(0, number), orjson.dumps(value))


def last(number: int) -> Event:
    return Event("f", Position(2**31 - 1, 0), orjson.dumps({"n": number}))


def number_of(event: Event) -> int:
    return orjson.loads(event.data)["n"]


async def stored_rows(database: Database, key: UUID) -> list[tuple[int, bytes]]:
    async with database.hot() as connection:
        rows = await connection.fetch(
            "select seq, data from events where interaction_id = $1 order by seq", key
        )
    return [(row[0], row[1]) for row in rows]
