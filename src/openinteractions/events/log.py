"""Writing the event log: one INSERT a tick for all streams of a process, fenced, in order.

`Stream` is one interaction's ordered writer (ruling R1): at most one write of it is outstanding,
and a step commit takes what is still pending into its own statement. `Writer` flushes all streams
of the process. A stream whose lease was lost is told so and writes nothing more (ruling R2).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

import structlog

from openinteractions import metrics
from openinteractions.db.engine import LOST, Database
from openinteractions.errors import LeaseLost
from openinteractions.events.follow import Hub
from openinteractions.events.types import Event, first_seq, join

_log = structlog.get_logger(__name__)

_APPEND = """
with fence as (
  select j.id, u.epoch, u.born, u.seq, u.data, j.project_id
    from unnest($1::uuid[], $2::int[], $3::timestamptz[], $4::bigint[], $5::bytea[])
         with ordinality as u(id, epoch, born, seq, data, n)
    join jobs j on j.id = u.id and j.epoch = u.epoch and j.worker_id is not null
   order by j.id
     for share of j
), written as (
  insert into events (born, interaction_id, seq, project_id, data)
  select born, id, seq, project_id, data from fence
  on conflict do nothing
)
select id from fence
"""
_RETRY = timedelta(milliseconds=200)


@dataclass(eq=False)
class Stream:
    """One interaction's events on their way into the log."""

    interaction_id: UUID
    epoch: int
    born: datetime
    seq: int
    """Number of the last event that was handed to a statement."""
    pending: list[Event] = field(default_factory=list[Event])
    flushed: bool = False
    lost: bool = False
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    @classmethod
    def begin(
        cls, interaction_id: UUID, epoch: int, born: datetime, *, written: int = 0
    ) -> "Stream":
        """A stream whose epoch has `written` events in the log already (those of its create)."""
        return cls(interaction_id, epoch, born, first_seq(epoch) + written)

    @asynccontextmanager
    async def exclusive(
        self, last: Sequence[Event] = ()
    ) -> AsyncGenerator[tuple[int, list[Event]]]:
        """Wait for the flush in flight, then own the stream: its pending events go with the caller.

        Gives the number of the first event and the events, for the caller's own statement.

        Args:
            last: Events to put behind those: no flush can take them before the caller.

        Raises:
            LeaseLost: Another worker owns the run.
        """
        while not self._idle.is_set():
            await self._idle.wait()
        if self.lost:
            raise LeaseLost(f"the lease of {self.interaction_id} is lost")
        self._idle.clear()
        try:
            self.pending += last
            yield self.take()
        finally:
            self._idle.set()

    def take(self) -> tuple[int, list[Event]]:
        """Number what is pending and take it; the caller owns the stream."""
        events, self.pending = self.pending, []
        start = self.seq + 1
        self.seq += len(events)
        self.flushed = self.flushed or bool(events)
        return start, events

    @property
    def is_idle(self) -> bool:
        """Whether no write of it is outstanding."""
        return self._idle.is_set()

    def set_busy(self) -> None:
        """A flush is in flight."""
        self._idle.clear()

    def set_idle(self) -> None:
        """The flush has ended."""
        self._idle.set()


class Writer:
    """Flushes every stream of this process."""

    def __init__(self, database: Database, hub: Hub, *, interval: timedelta) -> None:
        self._database = database
        self._hub = hub
        self._interval = interval.total_seconds()
        self._dirty: dict[UUID, Stream] = {}
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()

    def emit(self, stream: Stream, *events: Event) -> None:
        """Queue events of a stream. The first ones of a stream leave at once, later ones gathered.

        Raises:
            LeaseLost: Another worker owns the run.
        """
        if stream.lost:
            raise LeaseLost(f"the lease of {stream.interaction_id} is lost")
        stream.pending.extend(events)
        self._dirty[stream.interaction_id] = stream
        self._wake.set()
        if not stream.flushed:
            self._urgent.set()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Flush in the background until the context ends; then flush what is left, once."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._loop(), name="event-writer")
            try:
                yield
            finally:
                task.cancel()
        with contextlib.suppress(*LOST):
            await self._flush(self._batch())

    async def _loop(self) -> None:
        while True:
            await self._wake.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._urgent.wait()
            self._wake.clear()
            self._urgent.clear()
            batch = self._batch()
            if not batch:
                continue
            await self._flush_until_done(batch)

    def _batch(self) -> list[Stream]:
        batch = [s for s in self._dirty.values() if s.is_idle and s.pending]
        for stream in batch:
            del self._dirty[stream.interaction_id]
        # What a step commit has taken meanwhile is no longer ours to write.
        for key in [key for key, s in self._dirty.items() if not s.pending]:
            del self._dirty[key]
        if self._dirty:
            self._wake.set()
        return batch

    async def _flush_until_done(self, batch: list[Stream]) -> None:
        for stream in batch:
            stream.set_busy()
        taken = [stream.take() for stream in batch]
        try:
            while True:
                try:
                    return await self._write(batch, taken)
                except LOST as error:
                    # The same numbers again: a row that did arrive conflicts with itself.
                    _log.warning("events.write_failed", error=type(error).__name__)
                    await asyncio.sleep(_RETRY.total_seconds())
        finally:
            for stream in batch:
                stream.set_idle()

    async def _flush(self, batch: list[Stream]) -> None:
        if batch:
            await self._write(batch, [stream.take() for stream in batch])

    async def _write(self, batch: list[Stream], taken: list[tuple[int, list[Event]]]) -> None:
        rows = [(start, join(events)) for start, events in taken]
        began = time.perf_counter()
        async with self._database.hot() as connection:
            fenced = await connection.fetch(
                _APPEND,
                [stream.interaction_id for stream in batch],
                [stream.epoch for stream in batch],
                [stream.born for stream in batch],
                [start for start, _ in rows],
                [data for _, data in rows],
            )
        metrics.event_flush_seconds.observe(time.perf_counter() - began)
        metrics.events_written.inc(sum(len(events) for _, events in taken))
        owned = {row[0] for row in fenced}
        for stream, (start, events) in zip(batch, taken, strict=True):
            if stream.interaction_id in owned:
                self._hub.publish(stream.interaction_id, start, events)
            else:
                stream.lost = True
        self._hub.announce([s.interaction_id for s in batch if not s.lost])
