"""What the broker and its clients say to each other: the one place that knows the spelling.

The answer to an execution is a stream of frames: one byte for the kind, four for the length
(big-endian), then the payload.
"""

import struct
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final, Literal, TypeAlias, cast

import orjson

from openinteractions.errors import Invalid
from openinteractions.sandbox.pipe import Omitted
from openinteractions.sandbox.port import Command, Entry, Exit, Json, SandboxError

Stream: TypeAlias = Literal[1, 2]

STDOUT: Final = 1
STDERR: Final = 2
EVENT: Final = 3

MAX_FRAME_BYTES: Final = 1 << 20
END_OF_STREAM: Final = "end"
"""As a text message of a port's WebSocket: nothing more comes from this side."""
OPENED: Final = "open"
"""The first text message of it: the port is reached."""
CLOSE_BASE: Final = 4000
"""Added to an HTTP status, the code with which such a WebSocket is refused."""

_HEAD = struct.Struct("!BI")


class BadFrame(SandboxError):
    """The other side does not keep to the format; the connection is of no more use."""


def frame(kind: int, payload: bytes) -> bytes:
    """One frame."""
    return _HEAD.pack(kind, len(payload)) + payload


def event(name: str, **fields: Any) -> bytes:  # noqa: ANN401 - JSON values
    """A frame with a JSON event."""
    return frame(EVENT, orjson.dumps({"event": name, **fields}))


def omitted(byte_count: int) -> Omitted:
    """The mark in place of output that was not kept."""
    return Omitted(1, f"\n[... {byte_count} bytes of output omitted ...]\n".encode(), byte_count)


class Frames:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Take the next bytes; yield each frame that they complete.

        Raises:
            BadFrame: This is no such stream.
        """
        self._held += data
        start = 0
        while len(self._held) - start >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._held, start)
            if kind not in {STDOUT, STDERR, EVENT} or length > MAX_FRAME_BYTES:
                raise BadFrame("a frame of an unknown kind or size")
            end = start + _HEAD.size + length
            if len(self._held) < end:
                break
            yield kind, bytes(self._held[start + _HEAD.size : end])
            start = end
        del self._held[:start]


def command_body(command: Command) -> Json:
    """A command as the body of its request; its id travels in the path."""
    body: Json = {
        "epoch": command.epoch,
        "argv": list(command.argv),
        "cwd": command.cwd,
        "env": dict(command.env),
        "stdin": command.has_stdin,
        "max_output_bytes": command.max_output_bytes,
    }
    if command.pty is not None:
        body["pty"] = {"rows": command.pty[0], "cols": command.pty[1]}
    if command.timeout_s is not None:
        body["timeout_s"] = command.timeout_s
    if command.session is not None:
        body["session"] = command.session
    return body


def read_command(execution_id: str, body: object) -> Command:
    """The command of a request's body.

    Raises:
        Invalid: It is none.
    """
    if not isinstance(body, dict):
        raise Invalid("The body must be a JSON object.")
    fields: Json = cast("Json", body)
    try:
        pty = fields.get("pty")
        timeout = fields.get("timeout_s")
        session = fields.get("session")
        return Command(
            id=execution_id,
            epoch=int(fields["epoch"]),
            argv=_texts(fields["argv"]),
            cwd=str(fields.get("cwd") or "/workspace"),
            env=_variables(fields.get("env")),
            has_stdin=bool(fields.get("stdin")),
            pty=None if pty is None else (int(pty["rows"]), int(pty["cols"])),
            timeout_s=None if timeout is None else float(timeout),
            max_output_bytes=int(fields.get("max_output_bytes") or 1 << 20),
            session=None if session is None else str(session),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Invalid(f"The command is malformed: {error!r}.") from error


def _texts(value: object) -> list[str]:
    items = cast("list[object]", value)
    if not isinstance(value, list) or not items or not all(isinstance(i, str) for i in items):
        raise ValueError("argv must be a list of strings")
    return [str(item) for item in items]


def _variables(value: object) -> dict[str, str]:
    if value is None:
        return {}
    items = cast("dict[object, object]", value).items()
    return {str(name): str(text) for name, text in items}


def exit_fields(ended: Exit) -> Json:
    """How a command ended, as JSON."""
    return asdict(ended)


def read_exit(fields: Json) -> Exit:
    """How a command ended; fields that this version does not know are left out.

    Raises:
        BadFrame: It does not say how.
    """
    if fields.get("outcome") not in {"exited", "killed", "unknown"}:
        raise BadFrame("an exit without an outcome")
    return Exit(**{name: fields[name] for name in Exit.__slots__ if name in fields})


def read_entry(fields: Json) -> Entry:
    """A file or folder; fields that this version does not know are left out."""
    known: Json = {name: fields.get(name) for name in Entry.__slots__}
    return Entry(**known)
