"""Runs whose owner is gone, written as the owner would have left them."""
# ruff: noqa: ASYNC110 - a test looks again until it is so

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import UUID

import orjson
from tests import house
from tests.fakes.upstream import FakeUpstream, Reply
from tests.house import Server

from openinteractions import ids
from openinteractions.db.engine import Database
from openinteractions.events.types import Event, first_seq, join, parse_row
from openinteractions.jobs.queue import Job
from openinteractions.loop.turn import Turn
from openinteractions.models.port import Json, ModelEvent


async def dead_worker(database: Database, *, silent_for: timedelta = timedelta(hours=1)) -> int:
    async with database.hot() as connection:
        return await connection.fetchval(
            "insert into workers (host, pid, role, seen) "
            "values ('gone', 1, 'all', now() - $1::interval) returning id",
            silent_for,
        )


async def stalled_worker(database: Database) -> int:
    """One that does not act, but is not declared dead for a while."""
    return await dead_worker(database, silent_for=-timedelta(hours=1))


async def project_of(database: Database) -> UUID:
    async with database.hot() as connection:
        return await connection.fetchval("select id from projects where name = 'default'")


async def leave(
    server: Server,
    fake: FakeUpstream,
    *,
    owner: int | None = None,
    given: str = "x",
    stream: bool = True,
    shown: Sequence[ModelEvent] = (),
    committed: Sequence[Json] = (),
    **fields: object,
) -> str:
    """Start a run and let its owner die of it, as its rows and its readers can tell.

    Args:
        server: Whose run it is at first.
        fake: Its upstream; it falls silent after `shown`.
        owner: The worker whose job it is then; None makes a dead one.
        given: Its input.
        stream: Whether it has a log.
        shown: What the model said in the turn that was cut off.
        committed: Steps that were committed; only without `shown`.
        fields: Of the request.
    """
    database = server.database
    owner = owner or await dead_worker(database)
    before = len(fake.requests)
    fake.replies.insert(0, Reply(tuple(shown), stall_after=1 + len(shown)))
    body = {"model": house.MODEL, "input": given, "stream": stream, **fields}
    async with asyncio.TaskGroup() as group:
        client = group.create_task(server.call("POST", "interactions", body))

        async def is_shown() -> bool:
            if len(fake.requests) == before:
                return False
            events = [e async for e in logged(database, await newest(database))]
            text = sum(len(_text_of(e)) for e in events if e.kind == "d")
            return not stream or text == sum(len(event.text) for event in shown)

        await house.eventually(is_shown)
        key = await newest(database)
        async with database.hot() as connection:
            await connection.execute("update jobs set worker_id = $2 where id = $1", key, owner)
        server.process.member._owned[key].task.cancel()
        while key in server.process.member._owned:
            await asyncio.sleep(0.005)
        client.cancel()
    fake.requests.clear()
    if committed:
        await commit(database, key, committed)
    return ids.interaction_id(key)


async def newest(database: Database) -> UUID:
    async with database.hot() as connection:
        return await connection.fetchval("select id from interactions order by id desc limit 1")


async def logged(database: Database, key: UUID) -> AsyncGenerator[Event]:
    async with database.hot() as connection:
        rows = await connection.fetch(
            "select data from events where interaction_id = $1 order by seq", key
        )
    for row in rows:
        for event in parse_row(row[0]):
            yield event


def _text_of(event: Event) -> str:
    delta = orjson.loads(event.data)["delta"]
    return delta.get("text") or delta.get("content", {}).get("text", "")


async def commit(database: Database, key: UUID, steps: Sequence[Json]) -> None:
    """Add finished steps and their events behind what is there."""
    async with database.hot() as connection, connection.transaction():
        for number, step in enumerate(steps):
            await connection.execute(
                "insert into steps (segment_id, depth, idx, project_id, type, data) "
                "select segment_id, depth, input_count + $2, project_id, $3, $4 "
                "from interactions where id = $1",
                key, number, step["type"], orjson.dumps(step),
            )  # fmt: skip
    await append(database, key, events_of((), steps))


def events_of(shown: Sequence[ModelEvent], committed: Sequence[Json] = ()) -> list[Event]:
    """What a stream has shown of committed steps and of a turn that was cut off."""
    events: list[Event] = []
    turn = Turn(lambda *e: events.extend(e), first_index=0, provider="fake", model="m")
    for step in committed:
        turn.add_whole(step)
    for event in shown:
        turn.add(event)
    return events


async def append(database: Database, key: UUID, events: Sequence[Event]) -> None:
    """Put events behind the log, under the epoch that wrote last."""
    count = len([event async for event in logged(database, key)])
    async with database.hot() as connection:
        await connection.execute(
            "insert into events (born, interaction_id, seq, project_id, data) "
            "select created_at, id, $2, project_id, $3 from interactions where id = $1",
            key, first_seq(1) + count + 1, join(events),
        )  # fmt: skip


async def claim(database: Database, key: UUID, worker_id: int) -> Job:
    """Take over one run, as a worker's claim does."""
    async with database.hot() as connection:
        row = await connection.fetchrow(
            "update jobs set state = 1, worker_id = $2, epoch = epoch + 1, attempt = attempt + 1 "
            "where id = $1 returning id, project_id, kind, args, epoch, attempt, max_attempts, "
            "cancel_requested",
            key,
            worker_id,
        )
    return Job(row[0], row[1], row[2], {}, row[4], row[5], row[6], row[7])


async def sweep(database: Database, key: UUID) -> None:
    """Give one run back to the queue, as the sweep does when its worker died."""
    async with database.hot() as connection:
        await connection.execute(
            "update jobs set state = 0, worker_id = null, run_at = now() where id = $1", key
        )
        await connection.execute("select pg_notify('oi_jobs', '')")


async def ended(server: Server, public: str, *, within_s: float = 8.0) -> Json:
    async def look() -> Json | None:
        now = await server.get(public)
        return None if now["status"] in {"in_progress", "queued"} else now

    return await house.eventually(look, within_s=within_s)


@asynccontextmanager
async def following(server: Server, public: str):
    """Read a stream in the background; gives a task with all its frames."""
    async with asyncio.TaskGroup() as group:
        yield group.create_task(server.read(public))
