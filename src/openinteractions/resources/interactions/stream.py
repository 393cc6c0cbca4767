"""An interaction as server-sent events: from the log, from its steps, or from memory.

While the log is there, every reader reads it. What has no log (it was not streamed when created, or
its retention is over) is read from its steps, with positions of the same order, so that a cursor
from one source goes on in the other.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace

import orjson

from openinteractions import ids
from openinteractions.db.engine import LOST
from openinteractions.events.follow import Subscription, follow
from openinteractions.events.steps import step_events
from openinteractions.events.types import (
    CREATED,
    ENDED,
    IN_PROGRESS,
    KINDS,
    START,
    Cursor,
    Event,
    Position,
    encode_cursor,
)
from openinteractions.resources.interactions import render, service, store
from openinteractions.resources.interactions.runner import MemoryRun
from openinteractions.resources.interactions.service import Service, Started
from openinteractions.resources.interactions.store import Interaction, StoredStep
from openinteractions.wire.deltas import rest
from openinteractions.wire.events import (
    DONE,
    PING,
    completed,
    created,
    encode,
    error,
    sse_frame,
    status_update,
    step_delta,
    with_event_id,
)

_KEEP_ALIVE_S = 15.0
_POLL_S = 1.0
_PIECE_CHARS = 16 * 1024
_MAX_INDEX = 2**15 - 1  # of a step in the database; a cursor's may lie beyond


def frame(row: Interaction, event: Event, seq: int) -> bytes:
    """A stored event's frame, its id in the JSON and on a line of its own."""
    event_id = encode_cursor(row.id, seq, event.position)
    return sse_frame(KINDS[event.kind], with_event_id(event.data, event_id), event_id=event_id)


async def fresh(service_: Service, started: Started) -> AsyncIterator[bytes]:
    """The stream of an interaction that this process has just created and runs.

    Its first events are sent at once (they are committed); the rest comes through the log's hub.
    """
    events = started.first_events
    first = started.first_seq
    yield b"".join(frame(started.row, event, first + n) for n, event in enumerate(events))
    after = Cursor(first + len(events) - 1, events[-1].position)
    async for chunk in _logged(service_, started.row, after):
        yield chunk


async def resumed(
    service_: Service, row: Interaction, after: Cursor | None
) -> AsyncIterator[bytes]:
    """The stream of any stored interaction, strictly after a cursor; None: from its start."""
    cursor = after or START
    source = _logged if row.logged else _from_steps
    async for chunk in source(service_, row, cursor):
        yield chunk


async def unstored(run: MemoryRun) -> AsyncIterator[bytes]:
    """The stream of an unstored interaction. Who stops reading stops the run."""
    try:
        async for events in run.events():
            yield b"".join(sse_frame(KINDS[event.kind], event.data) for event in events) or PING
        yield DONE
    finally:
        await run.stop()


# ---- from the log


async def _logged(service_: Service, row: Interaction, after: Cursor) -> AsyncIterator[bytes]:
    if after.position >= ENDED:
        # Who reconnects after the last event goes on until one ends the stream: send it again.
        after = replace(after, seq=after.seq - 1)
    quiet_since = time.monotonic()
    with service_.hub.subscribe(row.id) as subscription:
        async for batch in _follow(service_, row, subscription, after):
            if batch is not None:
                quiet_since = time.monotonic()
                yield batch
            elif time.monotonic() - quiet_since >= _KEEP_ALIVE_S:
                quiet_since = time.monotonic()
                yield PING
    yield DONE


async def _follow(
    service_: Service, row: Interaction, subscription: Subscription, after: Cursor
) -> AsyncIterator[bytes | None]:
    async def gone() -> bool:
        try:
            now = await store.get(service_.database, row.project_id, row.id)
        except LOST:
            return False
        return now is None or not now.logged or not now.is_running

    async for batch in follow(
        service_.tail,
        subscription,
        interaction_id=row.id,
        born=row.created_at,
        after=after,
        gone=gone,
    ):
        yield None if batch is None else b"".join(frame(row, n.event, n.seq) for n in batch)


# ---- from the steps


async def _from_steps(service_: Service, row: Interaction, after: Cursor) -> AsyncIterator[bytes]:
    position = after.position
    quiet_since = time.monotonic()
    with service_.hub.subscribe(row.id) as subscription:
        while True:
            subscription.wake.clear()
            try:
                shown = await store.get(service_.database, row.project_id, row.id)
                if shown is None:
                    break
                index = min(shown.input_count + max(position.index, 0), _MAX_INDEX)
                stored = await service.steps_of(service_, shown, start=index)
            except LOST:
                # As with the log: a database that went away comes back, and the stream goes on.
                await asyncio.sleep(_POLL_S)
                continue
            events = list(_after(_events(shown, stored), position))
            if events:
                position = events[-1].position
                quiet_since = time.monotonic()
                yield b"".join(frame(row, event, 0) for event in events)
            if not shown.is_running:
                break
            if time.monotonic() - quiet_since >= _KEEP_ALIVE_S:
                quiet_since = time.monotonic()
                yield PING
            await _wait(subscription)
    yield DONE


async def _wait(subscription: Subscription) -> None:
    try:
        async with asyncio.timeout(_POLL_S):
            await subscription.wake.wait()
    except TimeoutError:
        return


def _events(row: Interaction, stored: Sequence[StoredStep]) -> Iterator[Event]:
    """Everything that the stream of an interaction shows, as far as it has come."""
    fields = render.head(row)
    if row.echo is not None:
        fields["service_tier"] = orjson.loads(row.echo).get("service_tier")
    yield Event("c", CREATED, encode(created({**fields, "status": "in_progress"})))
    public = ids.interaction_id(row.id)
    yield Event("u", IN_PROGRESS, encode(status_update(public, "in_progress")))
    for item in stored:
        index = item.index - row.input_count
        yield from step_events(index, orjson.loads(item.data), max_chars=_PIECE_CHARS)
    if row.status == "failed" and row.errors is not None:
        fault = orjson.loads(row.errors)[0]
        yield Event("e", ENDED, encode(error(fault["code"], fault["message"])))
    elif not row.is_running:
        if row.status == "cancelled":
            update = encode(status_update(public, "cancelled"))
            yield Event("u", ENDED._replace(offset=-1), update)
        if row.usage is not None:
            fields["usage"] = orjson.loads(row.usage)
        yield Event("f", ENDED, encode(completed(fields)))


def _after(events: Iterator[Event], position: Position) -> Iterator[Event]:
    """The events after a position; a text that the reader has begun goes on where it stopped."""
    for event in events:
        if event.position >= ENDED and position >= ENDED:
            yield event
        elif event.position > position:
            yield _rest(event, position)


def _rest(event: Event, position: Position) -> Event:
    """What the reader lacks of a text delta that begins before its position."""
    if event.kind != "d" or event.position.index != position.index or position.offset <= 0:
        return event
    delta = orjson.loads(event.data)["delta"]
    lacking = rest(delta, event.position.offset - position.offset)
    return replace(event, data=encode(step_delta(position.index, lacking)))
