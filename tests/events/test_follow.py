"""Reading the log: from any cursor, in any process, every event once, in order, to the end."""
# ruff: noqa: ASYNC110 - a test looks again until it is so

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from tests.events import stage
from tests.events.stage import Staged

from openinteractions.db.engine import Database
from openinteractions.events.follow import Hub, Notifier, Tail, follow
from openinteractions.events.log import Stream, Writer
from openinteractions.events.types import Cursor, Position, first_seq, parse_row

QUICK = timedelta(milliseconds=3)


class Reading:
    """One process's way to the log."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.hub = Hub()
        self.tail = Tail(database)
        self.writer = Writer(database, self.hub, interval=QUICK)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator["Reading"]:
        async with (
            Notifier(self.database, self.hub).running(),
            self.tail.running(),
            self.writer.running(),
        ):
            yield self

    async def read(
        self, staged: Staged, *, after: int = 0, pause_s: float = 0.0, is_gone: bool = False
    ) -> list[tuple[int, int]]:
        """Number in the log and content of every event after a number, up to the end."""

        async def gone() -> bool:
            return is_gone

        seen: list[tuple[int, int]] = []
        with self.hub.subscribe(staged.id) as subscription:
            async for batch in follow(
                self.tail,
                subscription,
                interaction_id=staged.id,
                born=staged.born,
                after=Cursor(after, Position(0, 0)),
                gone=gone,
            ):
                if batch is not None:
                    assert batch
                    seen += [(item.seq, stage.number_of(item.event)) for item in batch]
                    await asyncio.sleep(pause_s)
        return seen


@asynccontextmanager
async def elsewhere(url: str) -> AsyncGenerator[Reading]:
    """Another process: it shares the database only."""
    database = Database(url, pool_size=4)
    try:
        async with Reading(database).running() as there:
            yield there
    finally:
        await database.close()


@pytest.fixture
async def here(database: Database) -> AsyncGenerator[Reading]:
    async with Reading(database).running() as reading:
        yield reading


async def write(
    reading: Reading, staged: Staged, count: int, *, pause_s: float = 0.001, ends: bool = True
) -> Stream:
    stream = Stream.begin(staged.id, 1, staged.born)
    for number in range(count):
        reading.writer.emit(stream, stage.delta(number))
        await asyncio.sleep(pause_s * random.random() * 2)
    if ends:
        reading.writer.emit(stream, stage.last(count))
    return stream


def whole(count: int, *, after: int = 0) -> list[tuple[int, int]]:
    start = first_seq(1) + 1
    everything = [(start + number, number) for number in range(count + 1)]
    return [item for item in everything if item[0] > after]


async def test_readers_here_and_elsewhere_see_everything_once(here: Reading, database_url: str):
    staged = await stage.interaction(here.database)
    start = first_seq(1)
    async with elsewhere(database_url) as there, asyncio.timeout(20), asyncio.TaskGroup() as group:
        afters = [0, start, start + 1, start + 37, start + 150]
        tasks = [
            (after, group.create_task(process.read(staged, after=after)))
            for after, process in itertools.product(afters, (here, there))
        ]
        late = []
        writing = group.create_task(write(here, staged, 150))
        for _ in range(10):
            await asyncio.sleep(0.015)
            late += [group.create_task(process.read(staged)) for process in (here, there)]
        await writing
    for after, task in tasks:
        assert task.result() == whole(150, after=after)
    assert [task.result() for task in late] == [whole(150)] * 20


async def test_every_cursor_gives_exactly_the_rest(here: Reading):
    staged = await stage.interaction(here.database)
    await write(here, staged, 60)
    await here.read(staged)
    for after in range(first_seq(1), first_seq(1) + 61):
        assert await here.read(staged, after=after) == whole(60, after=after)


async def test_many_interactions_at_once_are_not_mixed_up(here: Reading, database_url: str):
    staged = [await stage.interaction(here.database) for _ in range(20)]
    async with elsewhere(database_url) as there, asyncio.timeout(20):
        answers = await asyncio.gather(
            *(there.read(one) for one in staged),
            *(here.read(one) for one in staged),
            *(write(here, one, 30, pause_s=0.004) for one in staged),
        )
    assert answers[:40] == [whole(30)] * 40


async def test_a_slow_reader_costs_bounded_memory_and_misses_nothing(here: Reading):
    staged = await stage.interaction(here.database)
    stream = Stream.begin(staged.id, 1, staged.born)
    most = 0
    with here.hub.subscribe(staged.id) as stuck:
        reading = asyncio.create_task(here.read(staged, pause_s=0.05))
        for number in range(900):
            # One row each: far more of them than a reader may have waiting.
            async with stream.exclusive() as (_, events):
                assert events == []
            here.hub.publish(staged.id, stream.seq + 1, [stage.delta(number)])
            stream.seq += 1
            most = max(most, len(stuck.rows))
            async with here.database.hot() as connection:
                await connection.execute(
                    "insert into events values ($1, $2, $3, $4, $5)",
                    staged.born, staged.id, stream.seq, stage.PROJECT, stage.delta(number).line(),
                )  # fmt: skip
        here.writer.emit(stream, stage.last(900))
        async with asyncio.timeout(20):
            assert await reading == whole(900)
    assert most <= 256


async def test_a_reader_that_comes_between_commit_and_publish_misses_nothing(here: Reading):
    """The row is in the log, and its publication arrives after the reader has read it there."""
    staged = await stage.interaction(here.database)
    events = [[stage.delta(0)], [stage.delta(1)], [stage.last(2)]]
    seq = first_seq(1)
    reading = None
    for row in events:
        async with here.database.hot() as connection:
            await connection.execute(
                "insert into events values ($1, $2, $3, $4, $5)",
                staged.born, staged.id, seq + 1, stage.PROJECT, row[0].line(),
            )  # fmt: skip
        if reading is None:
            reading = asyncio.create_task(here.read(staged))
        await asyncio.sleep(0.05)
        here.hub.publish(staged.id, seq + 1, row)
        seq += 1
    async with asyncio.timeout(5):
        assert await reading == whole(2)


async def test_a_publication_that_was_missed_is_read_from_the_log(here: Reading):
    staged = await stage.interaction(here.database)
    reading = asyncio.create_task(here.read(staged))
    await asyncio.sleep(0.05)
    for number in range(5):
        async with here.database.hot() as connection:
            await connection.execute(
                "insert into events values ($1, $2, $3, $4, $5)",
                staged.born, staged.id, first_seq(1) + 1 + number, stage.PROJECT,
                stage.delta(number).line(),
            )  # fmt: skip
        if number % 2:
            here.hub.publish(staged.id, first_seq(1) + 1 + number, [stage.delta(number)])
        await asyncio.sleep(0.01)
    stream = Stream.begin(staged.id, 1, staged.born, written=5)
    here.writer.emit(stream, stage.last(5))
    async with asyncio.timeout(5):
        assert await reading == whole(5)


async def test_a_takeover_goes_on_in_the_next_epoch(here: Reading, database_url: str):
    staged = await stage.interaction(here.database)
    async with elsewhere(database_url) as there, asyncio.timeout(10):
        reading = [asyncio.create_task(process.read(staged)) for process in (here, there)]
        first = await write(there, staged, 10, ends=False)
        while first.pending or not first.is_idle:
            await asyncio.sleep(0.01)
        await stage.take_over(here.database, staged.id)
        second = Stream.begin(staged.id, 2, staged.born)
        here.writer.emit(second, stage.delta(10), stage.last(11))
        expected = [*whole(9), (first_seq(2) + 1, 10), (first_seq(2) + 2, 11)]
        assert await asyncio.gather(*reading) == [expected] * 2


async def test_a_killed_listener_comes_back(here: Reading, database_url: str):
    staged = await stage.interaction(here.database)
    async with elsewhere(database_url) as there, asyncio.timeout(15):
        reading = asyncio.create_task(there.read(staged))
        writing = asyncio.create_task(write(here, staged, 60, pause_s=0.01))
        for _ in range(4):
            await asyncio.sleep(0.12)
            await kill(there.database, "LISTEN%")
        await writing
        assert await reading == whole(60)


async def test_every_connection_killed_and_still_complete(here: Reading, database_url: str):
    staged = await stage.interaction(here.database)
    async with elsewhere(database_url) as there, asyncio.timeout(20):
        reading = [asyncio.create_task(process.read(staged)) for process in (here, there)]
        writing = asyncio.create_task(write(here, staged, 60, pause_s=0.01))
        for _ in range(3):
            await asyncio.sleep(0.15)
            await kill(there.database, "%")
        await writing
        assert await asyncio.gather(*reading) == [whole(60)] * 2


async def kill(database: Database, query: str) -> None:
    raw = await database.dedicated()
    await raw.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid() and query ilike $1",
        query,
    )
    await raw.close()


async def test_a_log_that_ends_early_lets_its_readers_go(here: Reading):
    staged = await stage.interaction(here.database)
    await write(here, staged, 3, ends=False)
    async with asyncio.timeout(5):
        assert await here.read(staged, is_gone=True) == whole(2)


async def test_a_long_log_is_read_in_parts(here: Reading):
    """More rows than one query gives."""
    staged = await stage.interaction(here.database)
    async with here.database.hot() as connection:
        await connection.executemany(
            "insert into events values ($1, $2, $3, $4, $5)",
            [
                (staged.born, staged.id, first_seq(1) + 1 + n, stage.PROJECT, stage.delta(n).line())
                for n in range(650)
            ],
        )
    stream = Stream.begin(staged.id, 1, staged.born, written=650)
    here.writer.emit(stream, stage.last(650))
    async with asyncio.timeout(10):
        assert await here.read(staged) == whole(650)
        rows = await here.tail.read(staged.id, staged.born, first_seq(1) + 5)
    assert len(rows) == 201
    assert stage.number_of(next(iter(parse_row(rows[0][1])))) == 4


async def test_nobody_is_remembered_after_the_last_reader_left(here: Reading):
    staged = await stage.interaction(here.database)
    await write(here, staged, 3)
    await here.read(staged)
    assert here.hub._readers == {}
