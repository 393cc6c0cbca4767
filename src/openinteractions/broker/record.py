"""What an execution has said so far: its output, bounded, and how it ended.

One task fills a record; any number of readers follow it, each from its own position. Positions
count raw bytes of output. Beyond the bound the first and the last part are kept, as a reader of a
log wants them. The first part is shown while it comes, the last one at the end, so that nobody gets
more than the bound, however fast he reads.
"""

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

import orjson

from openinteractions.sandbox import messages
from openinteractions.sandbox.pipe import Omitted
from openinteractions.sandbox.port import Exit, Json, Output

_JOINED_BYTES = 16 * 1024
_MAX_PARTS = 8192
_MAX_POSITION = 1 << 62

Piece: TypeAlias = Output | Exit
"""What was not kept is shown as an `Omitted`."""


@dataclass(frozen=True, slots=True)
class _Part:
    offset: int
    output: Output

    @property
    def end(self) -> int:
        return self.offset + len(self.output.data)


class Record:
    """The output of one execution."""

    def __init__(self, max_bytes: int, *, max_parts: int = _MAX_PARTS) -> None:
        self._head_size = max(max_bytes // 2, 1)
        self._tail_size = max(max_bytes - self._head_size, 1)
        self._max_parts = max_parts
        self._head: list[_Part] = []
        self._tail: deque[_Part] = deque()
        self._tail_bytes = 0
        self._is_cut = False
        self._grown = asyncio.Event()
        self.position = 0
        """Bytes of output so far, kept or not."""
        self.exit: Exit | None = None

    def add(self, output: Output) -> None:
        """Add a piece of output."""
        if isinstance(output, Omitted):
            self._pass(output.byte_count)
            return
        room = 0
        if not self._tail and len(self._head) < self._max_parts:
            room = max(self._head_size - self.position, 0)
        first, rest = output.data[:room], output.data[room:]
        if first:
            _append(self._head, _Part(self.position, replace(output, data=first)))
            self._pass(len(first))
            self._wake()
        if rest:
            _append(self._tail, _Part(self.position, replace(output, data=rest)))
            self._pass(len(rest))
            self._tail_bytes += len(rest)
            self._drop_oldest()

    def finish(self, ended: Exit) -> None:
        """It has ended; the first word counts."""
        if self.exit is None:
            self._cut_tail()
            self.exit = replace(ended, truncated=True) if self._is_cut else ended
            self._wake()

    async def follow(self, offset: int) -> AsyncGenerator[Piece]:
        """Everything that is kept from a position on, and then the exit."""
        at = offset
        while True:
            grown = self._grown
            for part in self._since(at):
                if part.offset > at:
                    yield messages.omitted(part.offset - at)
                    at = part.offset
                yield Output(part.output.stream, part.output.data[at - part.offset :])
                at = part.end
            if grown is not self._grown:
                continue
            if self.exit is not None:
                if self.position > at:
                    yield messages.omitted(self.position - at)
                yield self.exit
                return
            await grown.wait()

    def dump(self) -> bytes:
        """The kept output, for storage."""
        data: list[bytes] = []
        at = 0
        for part in (*self._head, *self._tail):
            if part.offset > at:
                data.append(messages.event("omitted", bytes=part.offset - at))
            data.append(messages.frame(part.output.stream, part.output.data))
            at = part.end
        return b"".join(data)

    @classmethod
    def load(cls, dumped: bytes, fields: Json) -> "Record":
        """A record that was stored, with how it ended."""
        record = cls(2 * len(dumped) + 2, max_parts=len(dumped) + 1)
        for kind, payload in messages.Frames().feed(dumped):
            if kind == messages.EVENT:
                record.add(messages.omitted(orjson.loads(payload)["bytes"]))
            else:
                record.add(Output(cast("messages.Stream", kind), payload))
        record.finish(messages.read_exit(fields))
        return record

    def _since(self, offset: int) -> list[_Part]:
        """The parts to show that end after a position."""
        parts = self._head if self.exit is None else [*self._head, *self._tail]
        return parts[bisect_right(parts, offset, key=lambda part: part.end) :]

    def _pass(self, byte_count: int) -> None:
        # What a sandbox says of its output may be any number, again and again.
        self.position = min(self.position + byte_count, _MAX_POSITION)

    def _drop_oldest(self) -> None:
        """Leave out the parts of the tail that are too many."""
        tail = self._tail
        while (
            len(tail) > self._max_parts
            or self._tail_bytes - len(tail[0].output.data) >= self._tail_size
        ):
            self._tail_bytes -= len(tail.popleft().output.data)
            self._is_cut = True

    def _cut_tail(self) -> None:
        """Leave out what is still too much: a piece of the oldest part."""
        excess = self._tail_bytes - self._tail_size
        if excess > 0:
            first = self._tail.popleft()
            rest = replace(first.output, data=first.output.data[excess:])
            self._tail.appendleft(_Part(first.offset + excess, rest))
            self._tail_bytes -= excess
            self._is_cut = True

    def _wake(self) -> None:
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()


def _append(parts: list[_Part] | deque[_Part], part: _Part) -> None:
    """Add a part; a small one is joined with the one before it."""
    if parts:
        last = parts[-1]
        is_next = last.end == part.offset and last.output.stream == part.output.stream
        if is_next and len(last.output.data) + len(part.output.data) <= _JOINED_BYTES:
            joined = Output(part.output.stream, last.output.data + part.output.data)
            parts[-1] = _Part(last.offset, joined)
            return
    parts.append(part)
