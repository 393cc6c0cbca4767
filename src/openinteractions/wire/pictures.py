"""What a vendor would refuse of a picture, told by its headers alone: nothing is decoded.

One bad picture costs a conversation its every later request, so none is shown to a model that is
cut off, or larger than vendors take.
"""

import struct
from typing import Final, TypeAlias

MAX_SIDE: Final = 8000
"""Pixels; Anthropic refuses more."""

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG: Final = b"\xff\xd8\xff"
_BARE: Final = frozenset({0x01, *range(0xD0, 0xD8)})
"""JPEG's markers that nothing belongs to."""
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Those that have a picture's size."""
_MARK: Final = 0xFF
_SCAN: Final = 0xDA
_END: Final = 0xD9
_EOI: Final = bytes((_MARK, _END))
_IMAGE: Final = 0x2C
_EXTENSION: Final = 0x21
_TRAILER: Final = 0x3B
_MAX_STEPS: Final = 300_000
"""Of looking through one; it may be made to be slow."""

_Size: TypeAlias = tuple[int, int]


class _Cut(Exception):
    """It ends before its format says that it does."""


def kind_of(data: bytes) -> str | None:
    """The MIME type of a PNG, JPEG, GIF or WebP by how it begins; None for anything else."""
    if data.startswith(_PNG):
        return "image/png"
    if data.startswith(_JPEG):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def problem(data: bytes) -> str | None:
    """What is wrong with a picture, such as `is cut off`; None: a model may see it."""
    try:
        match kind_of(data):
            case "image/png":
                width, height = _png(data)
            case "image/jpeg":
                width, height = _jpeg(data)
            case "image/gif":
                width, height = _gif(data)
            case "image/webp":
                width, height = _webp(data)
            case _:
                return "is no PNG, JPEG, WebP or GIF"
    except (_Cut, IndexError, struct.error):
        return "is cut off or damaged"
    if max(width, height) > MAX_SIDE:
        return f"has {width} x {height} pixels, and {MAX_SIDE} a side are the most"
    return None if min(width, height) > 0 else "is cut off or damaged"


def _png(data: bytes) -> _Size:
    size = struct.unpack_from(">II", data, 16)
    at = len(_PNG)
    for _ in range(_MAX_STEPS):
        is_end = data[at + 4 : at + 8] == b"IEND"
        at += 12 + int(struct.unpack_from(">I", data, at)[0])
        if is_end and at <= len(data):
            return size
    raise _Cut


def _jpeg(data: bytes) -> _Size:
    size: _Size = 0, 0
    at = 2
    for _ in range(_MAX_STEPS):
        marker = data[at + 1]
        # What a scan is made of never has the end's marker in it.
        if data[at] != _MARK or marker == _END or (marker == _SCAN and data.find(_EOI, at) < 0):
            raise _Cut
        if marker == _SCAN:
            return size
        if marker == _MARK:
            at += 1
        elif marker in _BARE:
            at += 2
        else:
            if marker in _FRAMES:
                height, width = struct.unpack_from(">HH", data, at + 5)
                size = width, height
            at += 2 + int(struct.unpack_from(">H", data, at + 2)[0])
    raise _Cut


def _gif(data: bytes) -> _Size:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, steps = 13 + _table(flags), 0
    has_image = False
    # Some have no trailer, and are read all the same.
    while at < len(data) and (block := data[at]) != _TRAILER:
        if block == _IMAGE:
            has_image = True
            left, top, wide, high, flags = struct.unpack_from("<HHHHB", data, at + 1)
            width, height = max(width, left + wide), max(height, top + high)
            at += 11 + _table(flags)
        elif block == _EXTENSION:
            at += 2
        else:
            raise _Cut
        while length := data[at]:
            at += 1 + length
            steps += 1
        at += 1
        steps += 1
        if steps > _MAX_STEPS:
            raise _Cut
    if not has_image or at > len(data):
        raise _Cut
    return width, height


def _table(flags: int) -> int:
    """Bytes of a GIF's table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _webp(data: bytes) -> _Size:
    if len(data) < 8 + int(struct.unpack_from("<I", data, 4)[0]):
        raise _Cut
    match data[12:16]:
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            bits = int(struct.unpack_from("<I", data, 21)[0])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            width, height = (int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
            return width + 1, height + 1
        case _:
            raise _Cut
