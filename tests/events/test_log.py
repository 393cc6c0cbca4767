"""Writing the log: in order, coalesced, fenced, and never out of step with the steps."""
# ruff: noqa: ASYNC110 - a test looks again until it is so

import asyncio
from collections.abc import AsyncGenerator
from datetime import timedelta

import asyncpg
import pytest
from tests.events import stage

from openinteractions.db.engine import Database
from openinteractions.errors import LeaseLost
from openinteractions.events.follow import CHANNEL, Hub, Notifier
from openinteractions.events.log import Stream, Writer
from openinteractions.events.types import first_seq, join, parse_row
from openinteractions.resources.interactions.store import StoredStep
from openinteractions.runs import store as runs
from openinteractions.runs.store import Progress

QUICK = timedelta(milliseconds=5)


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
async def writer(database: Database, hub: Hub) -> AsyncGenerator[Writer]:
    opened = Writer(database, hub, interval=QUICK)
    async with opened.running():
        yield opened


async def written(database: Database, key) -> list[int]:
    """The numbers in the events of the log, in its order; asserts that rows leave no gaps."""
    numbers: list[int] = []
    expected = None
    for seq, data in await stage.stored_rows(database, key):
        events = list(parse_row(data))
        assert expected is None or seq == expected
        expected = seq + len(events)
        numbers += [stage.number_of(event) for event in events]
    return numbers


async def settled(stream: Stream) -> None:
    while stream.pending or not stream.is_idle:
        await asyncio.sleep(0.002)


async def test_events_are_written_in_order_and_together(database: Database, writer: Writer):
    staged = await stage.interaction(database)
    stream = Stream.begin(staged.id, 1, staged.born)
    for number in range(200):
        writer.emit(stream, stage.delta(number))
        if number % 20 == 0:
            await asyncio.sleep(0.004)
    await settled(stream)
    assert await written(database, staged.id) == list(range(200))
    rows = await stage.stored_rows(database, staged.id)
    assert rows[0][0] == first_seq(1) + 1
    assert len(rows) <= 30


async def test_the_first_events_do_not_wait(database: Database, hub: Hub):
    slow = Writer(database, hub, interval=timedelta(seconds=20))
    staged = await stage.interaction(database)
    async with slow.running():
        stream = Stream.begin(staged.id, 1, staged.born)
        with hub.subscribe(staged.id) as reader:
            slow.emit(stream, stage.delta(0))
            async with asyncio.timeout(3):
                await reader.wake.wait()
            slow.emit(stream, stage.delta(1))
            await asyncio.sleep(0.1)
            assert len(reader.rows) == 1
    # Closing writes what was still waiting.
    assert await written(database, staged.id) == [0, 1]


async def test_many_streams_share_a_write(database: Database, writer: Writer, hub: Hub):
    streams = []
    for _ in range(40):
        staged = await stage.interaction(database)
        streams.append(Stream.begin(staged.id, 1, staged.born))
    for number in range(10):
        for stream in streams:
            writer.emit(stream, stage.delta(number))
        await asyncio.sleep(0.003)
    for stream in streams:
        await settled(stream)
        assert await written(database, stream.interaction_id) == list(range(10))


# ---- ruling R1: one writer for each interaction


def progress(stream: Stream, index: int, seq: int, events) -> Progress:
    return Progress(
        interaction_id=stream.interaction_id,
        epoch=stream.epoch,
        run_state=b"{}",
        steps=[StoredStep(index, "model_output", media=False, data=b"{}")],
        seq=seq,
        events=join(events) if events else None,
    )


async def test_a_step_commit_carries_what_is_pending(database: Database, hub: Hub):
    """Also while a flush is in flight: nothing that is committed later has a lower number."""
    writer = Writer(database, hub, interval=timedelta(milliseconds=1))
    staged = await stage.interaction(database)
    stream = Stream.begin(staged.id, 1, staged.born)
    number = 0
    async with writer.running(), asyncio.TaskGroup() as group:
        watcher = group.create_task(watch(database, staged.id))
        for index in range(30):
            for _ in range(7):
                writer.emit(stream, stage.delta(number))
                number += 1
                await asyncio.sleep(0.0005)
            async with stream.exclusive() as (seq, events):
                assert stream.pending == []
                await runs.commit(database, progress(stream, index, seq, events))
            shown = await written(database, staged.id)
            assert shown == list(range(number))
        watcher.cancel()
    assert await written(database, staged.id) == list(range(210))


async def watch(database: Database, key) -> None:
    """A reader that polls: what it has seen never grows at the front."""
    seen: list[int] = []
    while True:
        now = await written(database, key)
        assert now[: len(seen)] == seen
        seen = now
        await asyncio.sleep(0)


async def test_only_one_write_of_a_stream_is_outstanding(database: Database, writer: Writer):
    staged = await stage.interaction(database)
    stream = Stream.begin(staged.id, 1, staged.born)
    async with stream.exclusive():
        writer.emit(stream, stage.delta(0))
        await asyncio.sleep(0.05)
        assert await stage.stored_rows(database, staged.id) == []
    await settled(stream)
    assert await written(database, staged.id) == [0]


# ---- ruling R2: the fence is locked


async def test_a_zombie_writes_nothing(database: Database, writer: Writer):
    staged = await stage.interaction(database)
    stream = Stream.begin(staged.id, 1, staged.born)
    writer.emit(stream, stage.delta(0))
    await settled(stream)
    await stage.take_over(database, staged.id)
    writer.emit(stream, stage.delta(1))
    await settled(stream)
    with pytest.raises(LeaseLost):
        writer.emit(stream, stage.delta(2))
    with pytest.raises(LeaseLost):
        async with stream.exclusive():
            pass
    with pytest.raises(LeaseLost):
        await runs.commit(database, progress(stream, 0, 10, [stage.delta(3)]))
    assert await written(database, staged.id) == [0]
    async with database.hot() as connection:
        assert await connection.fetchval("select count(*) from steps") == 0


async def test_a_zombie_beside_a_living_stream_costs_it_nothing(database: Database, hub: Hub):
    writer = Writer(database, hub, interval=timedelta(milliseconds=30))
    first, second = [await stage.interaction(database) for _ in range(2)]
    zombie = Stream.begin(first.id, 1, first.born)
    alive = Stream.begin(second.id, 1, second.born)
    await stage.take_over(database, first.id)
    async with writer.running():
        writer.emit(zombie, stage.delta(0))
        writer.emit(alive, stage.delta(0))
        await settled(zombie)
        await settled(alive)
    assert zombie.lost
    assert not alive.lost
    assert await stage.stored_rows(database, first.id) == []
    assert await written(database, second.id) == [0]


@pytest.mark.parametrize("write", ["flush", "commit"])
async def test_a_takeover_that_is_not_committed_yet_is_waited_for(
    database: Database, database_url: str, writer: Writer, write: str
):
    """The zombie's write comes between the takeover's statement and its commit."""
    staged = await stage.interaction(database)
    stream = Stream.begin(staged.id, 1, staged.born)
    other = await asyncpg.connect(database_url)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("update jobs set epoch = epoch + 1 where id = $1", staged.id)
    if write == "flush":
        writer.emit(stream, stage.delta(0))
        done = asyncio.create_task(settled(stream))
    else:
        done = asyncio.create_task(
            runs.commit(database, progress(stream, 0, first_seq(1) + 1, [stage.delta(0)]))
        )
    await asyncio.sleep(0.1)
    assert not done.done()
    await transaction.commit()
    await other.close()
    if write == "flush":
        await done
        assert stream.lost
    else:
        with pytest.raises(LeaseLost):
            await done
    assert await stage.stored_rows(database, staged.id) == []


@pytest.mark.parametrize("write", ["flush", "commit"])
async def test_a_takeover_waits_for_a_write_that_is_in_flight(
    database: Database, database_url: str, write: str
):
    """FOR SHARE conflicts with the epoch's update; FOR KEY SHARE would not."""
    staged = await stage.interaction(database)
    stream = Stream.begin(staged.id, 1, staged.born)
    from openinteractions.events.log import _APPEND  # noqa: PLC0415 - inspected on purpose

    zombie = await asyncpg.connect(database_url)
    transaction = zombie.transaction()
    await transaction.start()
    if write == "flush":
        await zombie.fetch(_APPEND, [staged.id], [1], [staged.born], [2], [join([stage.delta(0)])])
    else:
        await zombie.fetchval(
            runs._COMMIT, *runs._progress_values(progress(stream, 0, 2, [stage.delta(0)])), True
        )
    takeover = asyncio.create_task(stage.take_over(database, staged.id))
    await asyncio.sleep(0.1)
    assert not takeover.done()
    await transaction.commit()
    await takeover
    await zombie.close()
    assert len(await stage.stored_rows(database, staged.id)) == 1


async def test_racing_takeovers_never_let_a_late_event_in(database: Database, writer: Writer):
    """What the new owner reads when it begins is all that the old one ever wrote."""
    for _ in range(15):
        staged = await stage.interaction(database)
        stream = Stream.begin(staged.id, 1, staged.born)

        async def zombie(stream: Stream = stream) -> None:
            for number in range(40):
                writer.emit(stream, stage.delta(number))
                await asyncio.sleep(0.0005)

        async def heir(key=staged.id) -> list[tuple[int, bytes]]:
            await asyncio.sleep(0.01)
            await stage.take_over(database, key)
            return await stage.stored_rows(database, key)

        _, inherited = await asyncio.gather(zombie(), heir(), return_exceptions=True)
        await settled(stream)
        assert await stage.stored_rows(database, staged.id) == inherited


async def test_a_repeated_write_is_the_same_write(database: Database, hub: Hub):
    """The answer of the first was lost: the second conflicts with itself and is not doubled."""
    staged = await stage.interaction(database)
    stream = Stream.begin(staged.id, 1, staged.born)
    writer = Writer(database, hub, interval=QUICK)
    stream.pending.append(stage.delta(0))
    taken = [stream.take()]
    await writer._write([stream], taken)
    await writer._write([stream], taken)
    assert await written(database, staged.id) == [0]
    for _ in range(2):
        await runs.commit(database, progress(stream, 0, taken[0][0] + 1, [stage.delta(1)]))
    assert await written(database, staged.id) == [0, 1]


async def test_a_lost_connection_is_written_again(database: Database, writer: Writer):
    staged = await stage.interaction(database)
    stream = Stream.begin(staged.id, 1, staged.born)
    for number in range(60):
        writer.emit(stream, stage.delta(number))
        await asyncio.sleep(0.002)
        if number % 20 == 10:
            await kill_everybody(database)
    await settled(stream)
    assert await written(database, staged.id) == list(range(60))


async def kill_everybody(database: Database) -> None:
    raw = await database.dedicated()
    await raw.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid()"
    )
    await raw.close()


# ---- ruling R11


async def test_five_hundred_ids_fit_through_notify(database: Database, database_url: str, hub: Hub):
    heard: set[str] = set()
    sizes: list[int] = []

    def on_notify(_: object, _pid: int, _channel: str, payload: str) -> None:
        sizes.append(len(payload))
        heard.update(payload[i : i + 32] for i in range(0, len(payload), 32))

    listener = await asyncpg.connect(database_url)
    await listener.add_listener(CHANNEL, on_notify)
    staged = [stage.ids.uuid7() for _ in range(500)]
    async with Notifier(database, hub).running():
        hub.announce(staged)
        async with asyncio.timeout(5):
            while len(heard) < 500:
                await asyncio.sleep(0.01)
    await listener.close()
    assert heard == {key.hex for key in staged}
    assert max(sizes) < 8000
    assert len(sizes) == 3
