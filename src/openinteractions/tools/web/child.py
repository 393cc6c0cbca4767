"""The process that reads pages: jobs by its standard input, texts by its standard output.

It has no environment, and whoever started it ends it when a page takes too long. It ends by itself
when the pipe does, or when there was nothing to do for a while.

A job is two lengths of four bytes, then a JSON object and the page; an answer one length and JSON.
"""

import contextlib
import dataclasses
import os
import resource
import select
import struct

import orjson

from openinteractions.tools.web.extract import Extract
from openinteractions.tools.web.pages import extract

_IDLE_S = 120.0
_MEMORY_BYTES = 2 * 2**30
_NICENESS = 5


def serve(jobs: int, answers: int) -> None:
    """Answer jobs until there are no more.

    Args:
        jobs: Descriptor that they come by.
        answers: Descriptor that the answers go by.
    """
    while select.select([jobs], [], [], _IDLE_S)[0]:
        lengths = _exactly(jobs, 8)
        if lengths is None:
            return
        about, size = struct.unpack(">II", lengths)
        job, data = _exactly(jobs, about), _exactly(jobs, size)
        if job is None or data is None:
            return
        answer = orjson.dumps(dataclasses.asdict(_read(data, orjson.loads(job))))
        _send(answers, struct.pack(">I", len(answer)) + answer)


def _exactly(descriptor: int, size: int) -> bytes | None:
    """So many bytes; None if the pipe ends before."""
    found = bytearray()
    while len(found) < size:
        part = os.read(descriptor, min(size - len(found), 2**20))
        if not part:
            return None
        found += part
    return bytes(found)


def _send(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(data: bytes, job: dict[str, str | None]) -> Extract:
    try:
        return extract(
            data,
            mime_type=job["mime_type"] or "",
            charset=job["charset"],
            url=job["url"] or "",
        )
    except MemoryError:
        return Extract(message="Reading it takes too much memory.", is_readable=False)
    except Exception as error:  # noqa: BLE001 - the page's doing; it is told to the model
        kind = type(error).__name__
        return Extract(message=f"It could not be read ({kind}).", is_readable=False)


def main() -> None:
    """Bound this process, then serve."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # The server's own work goes first.
    os.nice(_NICENESS)
    answers = os.dup(1)
    # Libraries may print.
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        serve(0, answers)


if __name__ == "__main__":
    main()
