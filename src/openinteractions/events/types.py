"""Events as the log keeps them, and the positions by which a stream is resumed.

A row of the log is one flush: its events, joined by line feeds, each

    <kind> <index> <offset> <JSON without event_id>

`kind` is one letter; `index` and `offset` are the event's position (below). JSON from orjson has
no raw line feed, so a row needs no escaping and is cut apart without parsing.

A position orders everything that a stream can show, also where it is read back from the steps after
the log is gone (ruling R3):

    created (-1, 0) · in_progress (-1, 1) · step i: start (i, -1), payload (i, units so far),
    stop (i, STOP) · the end (END, 0)

A unit is one character of streamed text, or one whole delta of any other kind.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from openinteractions.errors import Invalid

EPOCH_BITS = 20
_MAX_SEQ = 2**63
STOP = 2**31 - 1
END = 2**31 - 1

KINDS = {
    "c": "interaction.created",
    "u": "interaction.status_update",
    "s": "step.start",
    "d": "step.delta",
    "t": "step.stop",
    "f": "interaction.completed",
    "e": "error",
}


class Position(NamedTuple):
    """Where in an interaction's stream an event stands."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - the contract's word
    offset: int


CREATED = Position(-1, 0)
IN_PROGRESS = Position(-1, 1)
ENDED = Position(END, 0)


@dataclass(frozen=True, slots=True)
class Event:
    """One event, as written."""

    kind: str
    """A key of KINDS."""
    position: Position
    data: bytes
    """The JSON object, without its `event_id`."""

    @classmethod
    def stop(cls, index: int, data: bytes) -> "Event":
        """The end of a step."""
        return cls("t", Position(index, STOP), data)

    def line(self) -> bytes:
        """As it stands in a row of the log."""
        return b"%b %d %d %b" % (self.kind.encode(), *self.position, self.data)

    @property
    def is_last(self) -> bool:
        """Whether the stream ends with it."""
        return self.kind in "fe"


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last event that a reader has seen."""

    seq: int
    """Its number in the log; 0 where it was read back from the steps."""
    position: Position


START = Cursor(seq=0, position=Position(-1, -1))


def first_seq(epoch: int) -> int:
    """The number before an epoch's first event."""
    return epoch << EPOCH_BITS


def parse_row(data: bytes) -> Iterator[Event]:
    """Cut a row of the log into its events."""
    for line in data.split(b"\n"):
        kind, index, offset, payload = line.split(b" ", 3)
        yield Event(kind.decode(), Position(int(index), int(offset)), payload)


def join(events: Sequence[Event]) -> bytes:
    """The row that holds these events."""
    return b"\n".join(event.line() for event in events)


def encode_cursor(interaction_id: UUID, seq: int, position: Position) -> str:
    """The public, opaque `event_id` of an event."""
    text = b"%d.%d.%d.%x" % (seq, *position, _mark(interaction_id))
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def decode_cursor(interaction_id: UUID, text: str) -> Cursor:
    """Read an `event_id` back.

    Raises:
        Invalid: It is not one of this interaction's.
    """
    try:
        raw = base64.b64decode(text.encode() + b"=" * (-len(text) % 4), b"-_", validate=True)
        seq, index, offset, mark = raw.split(b".")
        cursor = Cursor(int(seq), Position(int(index), int(offset)))
        is_ours = int(mark, 16) == _mark(interaction_id)
    except (ValueError, binascii.Error):
        is_ours, cursor = False, START
    in_range = -1 <= cursor.position.index <= END and -1 <= cursor.position.offset <= STOP
    if not is_ours or not in_range or not 0 <= cursor.seq < _MAX_SEQ:
        raise Invalid(
            f"Invalid value for 'last_event_id': {text[:80]!r} is no event of this interaction."
        )
    return cursor


def _mark(interaction_id: UUID) -> int:
    """A few bits of the interaction's id, so that another one's cursor is told apart."""
    return interaction_id.int & 0xFFFF_FFFF
