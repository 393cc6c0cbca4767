"""Where a run's progress goes: under its lease into the database, or into memory only."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any, TypeVar

import orjson
import structlog

from openinteractions.db.engine import LOST, Database
from openinteractions.errors import LeaseLost
from openinteractions.events.follow import Hub
from openinteractions.events.log import Stream, Writer
from openinteractions.events.types import Event, join
from openinteractions.loop.spec import RunState
from openinteractions.loop.turn import Show
from openinteractions.models.port import Json, Warning  # noqa: A004 - the contract's word
from openinteractions.resources.files import media
from openinteractions.resources.files import store as files
from openinteractions.resources.interactions.store import Interaction, StoredStep
from openinteractions.runs import store
from openinteractions.runs.store import Ending, Progress

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
_PATIENCE_S = 60.0
"""How long a commit waits for a database that went away."""


class DatabaseJournal:
    """Commits steps under the run's epoch. Implements `loop.ports.Journal`."""

    def __init__(
        self,
        database: Database,
        writer: Writer,
        hub: Hub,
        *,
        interaction: Interaction,
        stream: Stream,
        next_index: int,
    ) -> None:
        self._database = database
        self._writer = writer
        self._hub = hub
        self._row = interaction
        self._stream = stream
        self._next = next_index
        self._held: list[Event] = []
        self.stored: list[StoredStep] = []
        """Generated steps that are committed, as their rows hold them."""

    @property
    def show(self) -> Show | None:
        """Takes events; None where the interaction has no log."""
        return self._emit if self._row.logged else None

    def _emit(self, *events: Event) -> None:
        self._writer.emit(self._stream, *events)

    async def commit(self, steps: Sequence[Json], state: RunState) -> None:
        """Make steps durable, after every event that was shown before."""
        await _whole(self._commit(steps, state))

    async def record(self, steps: Sequence[Json], state: RunState) -> None:
        """Make durable what a dead owner has left: no progress of the run's own."""
        await _whole(self._commit(steps, state, is_progress=False))

    async def warn(self, warnings: Sequence[Warning]) -> bytes | None:
        """Add to the interaction's `warnings`, which readers see at once; returns all of them."""
        row = self._row
        known: list[Json] = orjson.loads(row.warnings or b"[]")
        # Who takes a run over finds what its last owner has found.
        fresh = [each for each in dict.fromkeys(warnings) if asdict(each) not in known]
        if not fresh:
            return row.warnings
        data = orjson.dumps([*known, *map(asdict, fresh)])
        epoch = self._stream.epoch
        await _whole(
            _until_back(lambda: store.warn(self._database, row.id, epoch=epoch, warnings=data))
        )
        return data

    async def finish(self, steps: Sequence[Json], state: RunState, ending: Ending) -> datetime:
        """Write the run's end; returns the interaction's `updated_at`."""
        return await _whole(self._finish(steps, state, ending))

    def hold(self, *events: Event) -> None:
        """Keep events that the next commit or finish writes, and nobody sees before it."""
        if self._row.logged:
            self._held += events

    async def by_uri(self, content: Json, base_url: str) -> Json:
        """Keep a generated medium and give the block that refers to it by `uri`."""
        block, blob = media.keep_by_uri(content, base_url)
        await self._keep([blob])
        return block

    def _take_held(self) -> list[Event]:
        held, self._held = self._held, []
        return held

    async def _commit(
        self, steps: Sequence[Json], state: RunState, *, is_progress: bool = True
    ) -> None:
        rows = await self._prepare(steps)
        async with self._stream.exclusive(self._take_held()) as (seq, events):
            progress = replace(self._progress(rows, state, seq, events), is_progress=is_progress)
            await _until_back(lambda: store.commit(self._database, progress))
            self._committed(rows, seq, events)

    async def _finish(self, steps: Sequence[Json], state: RunState, ending: Ending) -> datetime:
        rows = await self._prepare(steps)
        async with self._stream.exclusive(self._take_held()) as (seq, events):
            progress = self._progress(rows, state, seq, events)
            updated_at = await _until_back(
                lambda: store.finish(self._database, progress, ending),
                settled=lambda: store.ended_by(
                    self._database, progress.interaction_id, progress.epoch
                ),
            )
            self._committed(rows, seq, events)
        return updated_at

    async def _prepare(self, steps: Sequence[Json]) -> list[StoredStep]:
        rows: list[StoredStep] = []
        blobs: list[media.Blob] = []
        for step in steps:
            bare, taken = media.take_out(step)
            blobs += taken
            rows.append(
                StoredStep(
                    self._next + len(rows),
                    step["type"],
                    bool(media.hashes([bare])),
                    orjson.dumps(bare),
                )
            )
        if blobs:
            await self._keep(blobs)
        return rows

    async def _keep(self, blobs: Sequence[media.Blob]) -> None:
        row = self._row
        await _until_back(
            lambda: files.put(
                self._database,
                row.project_id,
                blobs,
                segment_id=row.segment_id,
                depth=row.depth,
            )
        )

    def _progress(
        self, rows: Sequence[StoredStep], state: RunState, seq: int, events: Sequence[Event]
    ) -> Progress:
        return Progress(
            interaction_id=self._row.id,
            epoch=self._stream.epoch,
            run_state=state.dump(),
            steps=rows,
            seq=seq,
            events=join(events) if events else None,
        )

    def _committed(self, rows: Sequence[StoredStep], seq: int, events: Sequence[Event]) -> None:
        self.stored += rows
        self._next += len(rows)
        if events:
            self._hub.publish(self._row.id, seq, events)
            self._hub.announce([self._row.id])
        else:
            self._hub.wake(self._row.id)


async def _whole(write: Coroutine[Any, Any, _T]) -> _T:
    """See a write through. A cancel that comes meanwhile is delivered when it is done.

    Cut off in the middle, it would be unknown whether the write took effect.
    """
    task = asyncio.get_running_loop().create_task(write, name="run-write")
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    result = task.result()
    if cancelled:
        raise asyncio.CancelledError
    return result


async def _until_back(
    write: Callable[[], Awaitable[_T]],
    *,
    settled: Callable[[], Awaitable[_T | None]] | None = None,
) -> _T:
    """Write, and write again while the database is away.

    Args:
        write: The statement; writing it twice is harmless.
        settled: Asked when a repeated write finds the lease gone: the first may have arrived.
    """
    wait = _FIRST_WAIT_S
    waited = 0.0
    is_repeated = False
    while True:
        try:
            return await write()
        except LeaseLost:
            done = await settled() if settled is not None and is_repeated else None
            if done is None:
                raise
            return done
        except LOST as error:
            if waited >= _PATIENCE_S:
                raise
            _log.warning("run.database_lost", error=type(error).__name__)
            is_repeated = True
            await asyncio.sleep(wait)
            waited += wait
            wait = min(wait * 2, _LONGEST_WAIT_S)


class MemoryJournal:
    """Keeps nothing: an unstored run's events go to its one reader. A `loop.ports.Journal`."""

    def __init__(self, *, stream: bool) -> None:
        self._wants_events = stream
        self.events: list[Event] = []
        self.wake = asyncio.Event()

    @property
    def show(self) -> Show | None:
        """Takes events; None where the caller waits for the whole answer."""
        return self.emit if self._wants_events else None

    def emit(self, *events: Event) -> None:
        """Queue events for the reader."""
        self.events.extend(events)
        self.wake.set()

    def hold(self, *events: Event) -> None:
        """Queue events for the reader: nothing here is ever taken back."""
        if self._wants_events:
            self.emit(*events)

    async def commit(self, steps: Sequence[Json], state: RunState) -> None:
        """Nothing is durable."""

    async def by_uri(self, content: Json, base_url: str) -> Json:
        """Nothing is kept, so it stays inline; `prepare` refuses to be asked for anything else."""
        del base_url
        return content
