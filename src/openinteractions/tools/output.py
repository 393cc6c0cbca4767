"""What a model is shown of a long output, and where the rest of it is kept."""

import asyncio
import hashlib
from typing import Final

import structlog

from openinteractions.errors import RequestError
from openinteractions.sandbox.port import MOUNTS, Exit, SandboxError
from openinteractions.tools.port import Done, Workplace

MAX_BYTES: Final = 24 * 1024
"""So much of an output a model is shown: its beginning and its end."""
KEPT_BYTES: Final = 2**20
"""So much of it is kept in a file."""

_HOME: Final = "home"
_FOLDER: Final = "outputs"
_DIGITS: Final = 8
_PATIENCE_S: Final = 15.0
"""The output itself is worth more than its file."""

_log = structlog.get_logger(__name__)


def stopped(end: Exit) -> str:
    """Why a command did not come to its own end."""
    match end.stopped_for:
        case "deleted":
            return "Stopped: its environment was deleted."
        case "size":
            return "Stopped: the environment holds more than it may."
        case None:
            return "Stopped, since its end was asked for."
        case _:
            return "Stopped: its sandbox was stopped."


async def shown(place: Workplace, done: Done, key: str) -> str:
    """What a command wrote; of a long output two parts, and the file that has it whole.

    Args:
        place: Where the file goes.
        done: The command; it was asked for `KEPT_BYTES` of output.
        key: The call's: the same output of the same call is kept once.
    """
    data = done.text.encode(errors="replace")
    if len(data) <= MAX_BYTES:
        return done.text
    head, tail = _ends(data)
    path = await _kept(place, data, key)
    left_out = f"{len(data) - len(head) - len(tail)} bytes left out"
    if path is None:
        mark = left_out
    elif done.exit.truncated:
        mark = f"{left_out}; what was kept of the output, 1 MiB of it, is in {path}"
    else:
        mark = f"{left_out}; the whole output is in {path}"
    return f"{head.decode(errors='replace')}\n[… {mark} …]\n{tail.decode(errors='replace')}"


def _ends(data: bytes) -> tuple[bytes, bytes]:
    """The beginning and the end, cut between lines where there are such."""
    half = MAX_BYTES // 2
    head, tail = data[:half], data[-half:]
    cut = head.rfind(b"\n", half // 2)
    if cut >= 0:
        head = head[:cut]
    cut = tail.find(b"\n", 0, half // 2)
    return head, tail[cut + 1 :]


async def _kept(place: Workplace, data: bytes, key: str) -> str | None:
    """Where the output is now, as a path in the sandbox; None if it could not be kept."""
    # Calls of earlier turns had the same keys, and their files may still be read.
    name = f"{key}-{hashlib.sha256(data).hexdigest()[:_DIGITS]}.txt"
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await place.write(f"{_HOME}/{_FOLDER}/{name}", data)
    except (RequestError, SandboxError, TimeoutError) as error:
        _log.warning("output.not_kept", error=str(error))
        return None
    return f"{MOUNTS[_HOME]}/{_FOLDER}/{name}"
