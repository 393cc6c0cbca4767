"""Reading the event log: replay from any position, then follow, from any process.

What was committed in this process reaches its readers through memory (`Hub.publish`); what another
process committed is announced by NOTIFY and fetched by one query for all readers (`Tail`). Memory
is only a short cut: a reader that falls behind, or misses a number, reads the log.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias
from uuid import UUID

import asyncpg
import structlog

from openinteractions.db.engine import LOST, Database
from openinteractions.events.types import Cursor, Event, parse_row

_log = structlog.get_logger(__name__)

CHANNEL = "oi_events"
_BATCH_ROWS = 200
_BACKLOG = 256
_SAFETY_POLL_S = 1.0
_QUIET_S = 30.0
"""Between two words about the same trouble."""
_NOTIFY_BYTES = 7900
_HEX = 32

_TAIL = """
select u.n, e.seq, e.data
  from unnest($1::uuid[], $2::timestamptz[], $3::bigint[]) with ordinality as u(id, born, seq, n)
 cross join lateral (
   select seq, data from (
     (select seq, data from events
       where born = u.born and interaction_id = u.id and seq <= u.seq
       order by seq desc limit 1)
     union all
     (select seq, data from events
       where born = u.born and interaction_id = u.id and seq > u.seq
       order by seq limit $4)
   ) as both_sides
 ) as e
 order by u.n, e.seq
"""


@dataclass(eq=False)
class Subscription:
    """One reader's place in the hub."""

    rows: deque[tuple[int, Sequence[Event]]] = field(default_factory=deque)
    """Committed in this process and not read yet; emptied when the reader falls behind."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Hub:
    """Tells the readers in this process, and those in others, that something was committed."""

    def __init__(self) -> None:
        self._readers: dict[UUID, set[Subscription]] = {}
        self._announced: set[UUID] = set()
        self._announce = asyncio.Event()

    @contextlib.contextmanager
    def subscribe(self, interaction_id: UUID) -> Generator[Subscription]:
        """Receive what is committed for an interaction while the context lasts."""
        subscription = Subscription()
        readers = self._readers.setdefault(interaction_id, set())
        readers.add(subscription)
        try:
            yield subscription
        finally:
            readers.discard(subscription)
            if not readers:
                self._readers.pop(interaction_id, None)

    def publish(self, interaction_id: UUID, seq: int, events: Sequence[Event]) -> None:
        """Hand committed events to the readers in this process."""
        for reader in self._readers.get(interaction_id, ()):
            if len(reader.rows) >= _BACKLOG:
                reader.rows.clear()
            else:
                reader.rows.append((seq, events))
            reader.wake.set()

    def wake(self, interaction_id: UUID) -> None:
        """Make the readers in this process look again."""
        for reader in self._readers.get(interaction_id, ()):
            reader.wake.set()

    def wake_all(self) -> None:
        """Make every reader look again, after wake-ups may have been missed."""
        for interaction_id in list(self._readers):
            self.wake(interaction_id)

    def announce(self, ids: Sequence[UUID]) -> None:
        """Let the other processes know; sent by `Notifier`, in a transaction of its own."""
        if ids:
            self._announced.update(ids)
            self._announce.set()

    async def announced(self) -> set[UUID]:
        """Wait for announcements and take them."""
        await self._announce.wait()
        self._announce.clear()
        taken, self._announced = self._announced, set()
        return taken


class Notifier:
    """Sends announcements as NOTIFY and listens for those of other processes."""

    def __init__(self, database: Database, hub: Hub) -> None:
        self._database = database
        self._hub = hub

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Send and listen in the background until the context ends."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._send(), name="event-notifier"),
                group.create_task(self._listen(), name="event-listener"),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    async def _send(self) -> None:
        # Never in the data's transaction: commits that notify are serialised by PostgreSQL.
        while True:
            ids = await self._hub.announced()
            text = "".join(interaction_id.hex for interaction_id in ids)
            size = _NOTIFY_BYTES // _HEX * _HEX
            parts = [text[i : i + size] for i in range(0, len(text), size)]
            try:
                async with self._database.hot() as connection, connection.transaction():
                    await connection.execute("set local synchronous_commit = off")
                    await connection.execute(
                        "select pg_notify($1, p) from unnest($2::text[]) p", CHANNEL, parts
                    )
            except LOST:
                _log.warning("events.notify_failed", interactions=len(ids))

    async def _listen(self) -> None:
        await listen(self._database, CHANNEL, self._received, self._hub.wake_all)

    def _received(self, payload: str) -> None:
        for start in range(0, len(payload), _HEX):
            self._hub.wake(UUID(payload[start : start + _HEX]))


async def listen(
    database: Database,
    channel: str,
    received: Callable[[str], None],
    reconnected: Callable[[], None],
) -> None:
    """LISTEN for ever, over a connection of its own that is opened again when it breaks.

    Args:
        database: Where.
        channel: What.
        received: Called with each payload.
        reconnected: Called after each connect: what came before may have been missed.
    """
    next_word = 0.0
    while True:
        try:
            connection = await database.dedicated()
        except (*LOST, asyncpg.PostgresError) as error:
            # Also a password that was changed, or a database that is being restored.
            if time.monotonic() >= next_word:
                next_word = time.monotonic() + _QUIET_S
                _log.warning("events.listener_refused", channel=channel, error=type(error).__name__)
            await asyncio.sleep(_SAFETY_POLL_S)
            continue
        closed = asyncio.Event()

        def on_close(_: object, closed: asyncio.Event = closed) -> None:
            closed.set()

        def on_notify(_: object, _pid: int, _channel: str, payload: str) -> None:
            received(payload)

        try:
            connection.add_termination_listener(on_close)
            await connection.add_listener(channel, on_notify)
            reconnected()
            await closed.wait()
            _log.warning("events.listener_lost", channel=channel)
        except LOST:
            await asyncio.sleep(_SAFETY_POLL_S)
        finally:
            connection.terminate()


_Rows: TypeAlias = list[tuple[int, bytes]]
_Question: TypeAlias = tuple[UUID, datetime, int, asyncio.Future[_Rows]]


class Tail:
    """Reads log rows for all readers of the process, one query at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[_Question] = []
        self._wake = asyncio.Event()

    async def read(self, interaction_id: UUID, born: datetime, seq: int) -> _Rows:
        """The row that holds `seq` (it may have more events after it) and those that follow."""
        future: asyncio.Future[_Rows] = asyncio.get_running_loop().create_future()
        self._waiting.append((interaction_id, born, seq, future))
        self._wake.set()
        return await future

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Answer readers in the background until the context ends."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._loop(), name="event-tail")
            try:
                yield
            finally:
                task.cancel()

    async def _loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._waiting = self._waiting, []
            try:
                answers = await self._query(batch)
            except LOST as error:
                for *_, future in batch:
                    if not future.done():
                        future.set_exception(ConnectionResetError(str(error)))
                continue
            for (*_, future), rows in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(rows)

    async def _query(self, batch: Sequence[_Question]) -> list[_Rows]:
        answers = [list[tuple[int, bytes]]() for _ in batch]
        async with self._database.hot() as connection:
            rows = await connection.fetch(
                _TAIL,
                [item[0] for item in batch],
                [item[1] for item in batch],
                [item[2] for item in batch],
                _BATCH_ROWS,
            )
        for row in rows:
            answers[int(row[0]) - 1].append((row[1], row[2]))
        return answers


@dataclass(frozen=True, slots=True)
class Numbered:
    """An event with its number in the log."""

    seq: int
    event: Event


async def follow(
    tail: Tail,
    subscription: Subscription,
    *,
    interaction_id: UUID,
    born: datetime,
    after: Cursor,
    gone: Callable[[], Awaitable[bool]],
) -> AsyncIterator[list[Numbered] | None]:
    """Every event after a cursor, in batches, until the last one of the stream.

    Yields None where nothing came for a while, so that the caller can send a sign of life. A batch
    is never empty. Ends early when `gone` says that the log will not go on.

    Args:
        tail: Reads the log.
        subscription: Opened by the caller before it looked at the interaction's state.
        interaction_id: Whose.
        born: Its `created_at`.
        after: The last event that the reader has.
        gone: Asked when nothing came for a while.
    """
    seq = after.seq
    is_last_look = False
    while True:
        batch = _from_memory(subscription, seq)
        if not batch:
            subscription.wake.clear()
            batch = await _from_log(tail, interaction_id, born, seq)
        if batch:
            seq = batch[-1].seq
            yield batch
            if batch[-1].event.is_last:
                return
            continue
        if is_last_look and batch is not None:
            return
        try:
            async with asyncio.timeout(_SAFETY_POLL_S):
                await subscription.wake.wait()
        except TimeoutError:
            # What was written before it was over may have come since the last look.
            is_last_look = await gone()
            if not is_last_look:
                yield None


def _from_memory(subscription: Subscription, seq: int) -> list[Numbered]:
    """Rows from this process, if they go on exactly where the reader stands."""
    batch: list[Numbered] = []
    while subscription.rows:
        start, events = subscription.rows[0]
        if start > seq + 1:
            break
        subscription.rows.popleft()
        batch += [Numbered(start + n, e) for n, e in enumerate(events) if start + n > seq]
        seq = max(seq, start + len(events) - 1)
    if not batch:
        subscription.rows.clear()
    return batch


async def _from_log(
    tail: Tail, interaction_id: UUID, born: datetime, seq: int
) -> list[Numbered] | None:
    """What the log has; None if it cannot be read now."""
    try:
        rows = await tail.read(interaction_id, born, seq)
    except ConnectionResetError:
        await asyncio.sleep(_SAFETY_POLL_S)
        return None
    batch: list[Numbered] = []
    for start, data in rows:
        batch += [
            Numbered(start + n, event) for n, event in enumerate(parse_row(data)) if start + n > seq
        ]
    return batch
