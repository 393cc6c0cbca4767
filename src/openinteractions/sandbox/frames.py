"""Frames on a byte stream that may be cut anywhere, or have rubbish between them.

A frame is a magic number, a CRC-32 of all that follows it, type, stream, sequence number and
length, then at most 64 KiB. A reader finds the next frame in any bytes: what is no whole frame is
skipped.
Standard library only, Python 3.9: this file also runs inside the sandbox.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from zlib import crc32

MAGIC = b"\xf5oi\x01"
"""Not valid UTF-8, so that text never looks like the start of a frame."""

MAX_PAYLOAD = 1 << 16
_HEAD = struct.Struct(">4sIBIII")
_AFTER_CRC = 8
HEAD_SIZE = _HEAD.size
PADDING = bytes(HEAD_SIZE + MAX_PAYLOAD)
"""Completes any frame that was cut off, so that its reader looks for the next one."""

_SEQUENCES = 1 << 32


class Frame(NamedTuple):
    """One frame, checked."""

    kind: int
    stream: int
    sequence: int
    payload: bytes


class Encoder:
    """Numbers and packs the frames of one direction."""

    def __init__(self) -> None:
        self._sequence = 0

    def pack(self, kind: int, stream: int, payload: bytes | memoryview = b"") -> bytes:
        """The head of a frame; the payload is to be sent right after it."""
        head = _HEAD.pack(MAGIC, 0, kind, stream, self._sequence, len(payload))[_AFTER_CRC:]
        self._sequence = following(self._sequence)
        return MAGIC + crc32(payload, crc32(head)).to_bytes(4, "big") + head


def following(sequence: int) -> int:
    """The sequence number after this one."""
    return (sequence + 1) % _SEQUENCES


class Decoder:
    """Finds frames in what arrives. Holds back less than one frame."""

    def __init__(self, most_bad: int | None = None) -> None:
        """Nothing has come yet.

        Args:
            most_bad: After more bad frames than this nothing is looked for: each of them can make
                us add up 64 KiB, and the next one begins within it.
        """
        self._rest = b""
        self._most_bad = most_bad
        self.bad = 0
        """Frames with a wrong CRC, so far."""
        self.skipped = 0
        """Bytes that belonged to no frame, so far."""

    def feed(self, received: bytes) -> list[Frame]:
        """All frames that are complete now."""
        buffer = self._rest + received if self._rest else received
        frames: list[Frame] = []
        at = 0
        with memoryview(buffer) as view:
            while len(buffer) - at >= HEAD_SIZE:
                magic, crc, kind, stream, sequence, length = _HEAD.unpack_from(buffer, at)
                if magic != MAGIC or length > MAX_PAYLOAD:
                    at = self._skip(buffer, at)
                    continue
                start = at + HEAD_SIZE
                if start + length > len(buffer):
                    break
                payload = view[start : start + length]
                if crc32(payload, crc32(view[at + _AFTER_CRC : start])) != crc:
                    self.bad += 1
                    if self._most_bad is not None and self.bad > self._most_bad:
                        self._rest = b""
                        return frames
                    at = self._skip(buffer, at)
                    continue
                frames.append(Frame(kind, stream, sequence, bytes(payload)))
                at = start + length
        self._rest = buffer[at:]
        return frames

    def _skip(self, buffer: bytes, at: int) -> int:
        """Where the next frame may start; a magic number may be cut at the end."""
        found = buffer.find(MAGIC, at + 1)
        after = found if found >= 0 else max(at + 1, len(buffer) - len(MAGIC) + 1)
        self.skipped += after - at
        return after
