"""The output of one command, kept in bounded memory: its head, its tail, and how much lies between.

Offsets count the bytes that the command wrote, both streams together in the order of arrival.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections import deque

STDOUT, STDERR = 1, 2
_MAX_PIECES = 8192
_PIECE = 48 * 1024

Gap = tuple[int, int]
"""Offset where bytes are missing, and how many."""


class Spool:
    """Append at the end; read from any offset, also while it grows."""

    def __init__(self, capacity: int) -> None:
        self._head_size = capacity // 2
        self._ring_size = capacity - self._head_size
        self._memory: mmap.mmap | None = None
        self._capacity = capacity
        # Where each piece of the head starts, and its stream.
        self._head_starts: list[int] = []
        self._head_streams: list[int] = []
        self._head_end = 0
        self._is_head_full = False
        # Pieces of the tail: start and stream. A piece ends where the next one starts.
        self._tail: deque[tuple[int, int]] = deque()
        self._tail_start = 0
        self.end = 0
        """Bytes written so far."""
        self.is_dropped = False

    @property
    def is_truncated(self) -> bool:
        """Whether bytes are missing between head and tail."""
        return self.is_dropped or (self._is_head_full and self._tail_start > self._head_end)

    @property
    def held(self) -> int:
        """Memory in use."""
        return 0 if self._memory is None else min(self.end, self._capacity)

    def append(self, stream: int, written: bytes) -> None:
        """Add what was written to a stream."""
        if self.is_dropped:
            self.end += len(written)
            return
        view = memoryview(written)
        if not self._is_head_full:
            view = view[self._append_head(stream, view) :]
        while len(view):
            piece = view[: self._ring_size]
            self._append_tail(stream, piece)
            view = view[len(piece) :]

    def drop(self) -> None:
        """Give the memory back; everything before the end is then missing."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self._head_starts.clear()
        self._head_streams.clear()
        self._tail.clear()
        self._head_end = 0
        self._is_head_full = self.is_dropped = True
        self._tail_start = self.end

    def read(self, offset: int) -> tuple[int, bytes] | Gap | None:
        """What follows `offset`: stream and bytes, or the gap there, or None at the end.

        A gap is told from a piece by its second item.
        """
        if offset >= self.end:
            return None
        if offset < self._head_end:
            return self._read_head(offset)
        if offset < self._tail_start or self.is_dropped:
            start = self.end if self.is_dropped else self._tail_start
            return offset, start - offset
        return self._read_tail(offset)

    def _open(self) -> mmap.mmap:
        if self._memory is None:
            self._memory = mmap.mmap(-1, self._capacity)
        return self._memory

    def _append_head(self, stream: int, view: memoryview) -> int:
        size = min(len(view), self._head_size - self.end)
        if not self._head_streams or self._head_streams[-1] != stream:
            if len(self._head_streams) >= _MAX_PIECES:
                size = 0
            else:
                self._head_starts.append(self.end)
                self._head_streams.append(stream)
        if size:
            self._open()[self.end : self.end + size] = bytes(view[:size])
        self.end += size
        self._head_end = self._tail_start = self.end
        self._is_head_full = size < len(view)
        return size

    def _append_tail(self, stream: int, view: memoryview) -> None:
        if not self._tail or self._tail[-1][1] != stream:
            self._tail.append((self.end, stream))
        memory, at = self._open(), self.end % self._ring_size
        first = min(len(view), self._ring_size - at)
        base = self._head_size
        memory[base + at : base + at + first] = bytes(view[:first])
        memory[base : base + len(view) - first] = bytes(view[first:])
        self.end += len(view)
        self._tail_start = max(self._tail_start, self.end - self._ring_size)
        while len(self._tail) > 1 and (
            self._tail[1][0] <= self._tail_start or len(self._tail) > _MAX_PIECES
        ):
            self._tail.popleft()
            self._tail_start = max(self._tail_start, self._tail[0][0])

    def _read_head(self, offset: int) -> tuple[int, bytes]:
        index = bisect_right(self._head_starts, offset) - 1
        last = index + 1 == len(self._head_starts)
        stop = self._head_end if last else self._head_starts[index + 1]
        stop = min(stop, offset + _PIECE)
        return self._head_streams[index], bytes(self._open()[offset:stop])

    def _read_tail(self, offset: int) -> tuple[int, bytes]:
        # A reader is almost always in one of the last few pieces.
        stop, stream = self.end, self._tail[-1][1]
        for start, owner in reversed(self._tail):
            stream = owner
            if start <= offset:
                break
            stop = start
        at = offset % self._ring_size
        size = min(stop - offset, _PIECE, self._ring_size - at)
        base = self._head_size + at
        return stream, bytes(self._open()[base : base + size])
