"""What an execution has said so far: its output, bounded, and how it ended.

One task fills a record; any number of readers follow it, each from its own position. Positions
count raw bytes of output. Beyond the bound the first and the last part are kept, as a reader of a
log wants them; a reader that has kept up has seen everything.
"""

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TypeAlias, cast

import orjson

from openinteractions.sandbox import messages
from openinteractions.sandbox.pipe import Omitted
from openinteractions.sandbox.port import Exit, Json, Output

_JOINED_BYTES = 16 * 1024


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

    def __init__(self, max_bytes: int) -> None:
        self._half = max(max_bytes // 2, 1)
        self._head: list[_Part] = []
        self._tail: deque[_Part] = deque()
        self._tail_bytes = 0
        self._grown = asyncio.Event()
        self.position = 0
        """Bytes of output so far, kept or not."""
        self.exit: Exit | None = None

    def add(self, output: Output) -> None:
        """Add a piece of output."""
        if isinstance(output, Omitted):
            self.position += output.byte_count
            return
        if not output.data:
            return
        part = _Part(self.position, output)
        self.position = part.end
        if not self._tail and part.end <= self._half:
            _append(self._head, part)
        else:
            _append(self._tail, part)
            self._tail_bytes += len(output.data)
            while self._tail_bytes - len(self._tail[0].output.data) >= self._half:
                self._tail_bytes -= len(self._tail.popleft().output.data)
        self._wake()

    def finish(self, ended: Exit) -> None:
        """It has ended; the first word counts."""
        if self.exit is None:
            self.exit = ended
            self._wake()

    async def follow(self, offset: int) -> AsyncGenerator[Piece]:
        """Everything from a position on, and then the exit."""
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
        record = cls(2 * len(dumped) + 2)
        for kind, payload in messages.Frames().feed(dumped):
            if kind == messages.EVENT:
                record.add(messages.omitted(orjson.loads(payload)["bytes"]))
            else:
                record.add(Output(cast("messages.Stream", kind), payload))
        record.finish(messages.read_exit(fields))
        return record

    def _since(self, offset: int) -> list[_Part]:
        """The kept parts that end after a position."""
        parts = [*self._head, *self._tail]
        return parts[bisect_right(parts, offset, key=lambda part: part.end) :]

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
