"""Bytes between the event loop and files: what arrives goes to a thread in large pieces."""

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterable, Callable, Sequence
from typing import Final

from openinteractions.errors import TooLarge
from openinteractions.sandbox.files.threads import settle, start

_PIECE_BYTES: Final = 1 << 20
_MAX_CHUNKS: Final = 512
"""In one piece; the kernel takes 1024 at once."""


async def pour(
    chunks: AsyncIterable[bytes],
    write: Callable[[Sequence[bytes]], None],
    *,
    max_bytes: int | None = None,
) -> int:
    """Write what arrives, one piece in a thread while the next one arrives; how much it was.

    Whatever happens, no thread writes any more when this returns.

    Raises:
        TooLarge: More arrived than `max_bytes`.
    """
    total = waiting_bytes = 0
    most = math.inf if max_bytes is None else max_bytes
    waiting: list[bytes] = []
    writing: asyncio.Future[None] | None = None
    try:
        async for chunk in chunks:
            total += len(chunk)
            waiting_bytes += len(chunk)
            _check_size(total, most)
            waiting.append(chunk)
            if waiting_bytes >= _PIECE_BYTES or len(waiting) >= _MAX_CHUNKS:
                if writing is not None:
                    await settle(writing)
                writing, waiting, waiting_bytes = start(write, waiting), [], 0
        if writing is not None:
            await settle(writing)
        writing = start(write, waiting)
        await settle(writing)
    except BaseException:
        if writing is not None:
            with contextlib.suppress(Exception):
                await settle(writing)
        raise
    return total


def _check_size(total: int, most: float) -> None:
    if total > most:
        raise TooLarge(f"More than {most} bytes cannot be taken here.")


def write_chunks(fd: int, chunks: Sequence[bytes]) -> None:
    """Write all of them at the descriptor's position."""
    size = sum(len(chunk) for chunk in chunks)
    done = os.writev(fd, chunks) if chunks else 0
    if done < size:
        write_all(fd, memoryview(b"".join(chunks))[done:])


def write_all(fd: int, piece: bytes | memoryview) -> None:
    """Write all of it at the descriptor's position."""
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(fd, rest) :]
