"""The browser's own protocol (CDP), over a WebSocket, one thing after another.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]

_MAX_MESSAGE = 64 << 20
_TEXT, _CLOSE, _PING, _PONG = 1, 8, 9, 10
_LONG, _LONGER = 126, 127
_SWITCHED = b"HTTP/1.1 101"


class Lost(Exception):
    """The browser has ended, or has closed the connection."""


class Refused(Exception):
    """The browser says no; the message says why."""


class Late(Exception):
    """There was no answer in time."""


class Socket:
    """A WebSocket to a port of this sandbox."""

    def __init__(self, port: int, path: str, *, timeout_s: float) -> None:
        """Open it.

        Raises:
            Lost: Nothing listens there.
        """
        self._read = bytearray()
        self._parts = bytearray()
        try:
            self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
            self._shake_hands(port, path, time.monotonic() + timeout_s)
        except OSError as error:
            raise Lost(str(error)) from error

    def close(self) -> None:
        """Close it."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def send(self, text: str) -> None:
        """Send a message."""
        self._send(_TEXT, text.encode())

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message; None if none comes in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            frame = self._frame(deadline)
            if frame is None:
                return None
            is_last, kind, body = frame
            if kind == _PING:
                self._send(_PONG, body)
            elif kind == _CLOSE:
                raise Lost("the browser has closed the connection")
            elif kind != _PONG:
                self._parts += body
                if is_last:
                    message, self._parts = bytes(self._parts), bytearray()
                    return message

    def _shake_hands(self, port: int, path: str, deadline: float) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        fields = (
            f"GET {path} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
        )
        self._socket.sendall("\r\n".join((*fields, "", "")).encode())
        while b"\r\n\r\n" not in self._read:
            if not self._fill(deadline):
                raise Lost("the browser does not answer")
        head, _, rest = bytes(self._read).partition(b"\r\n\r\n")
        if not head.startswith(_SWITCHED):
            raise Lost(head.split(b"\r\n")[0].decode(errors="replace"))
        self._read = bytearray(rest)

    def _send(self, kind: int, body: bytes) -> None:
        # Masked, as clients have to, with a mask that changes nothing.
        head = bytes([0x80 | kind])
        if len(body) < _LONG:
            head += bytes([0x80 | len(body)])
        elif len(body) < 1 << 16:
            head += bytes([0x80 | _LONG]) + struct.pack(">H", len(body))
        else:
            head += bytes([0x80 | _LONGER]) + struct.pack(">Q", len(body))
        try:
            self._socket.settimeout(10)
            self._socket.sendall(head + bytes(4) + body)
        except OSError as error:
            raise Lost(str(error)) from error

    def _frame(self, deadline: float) -> tuple[bool, int, bytes] | None:
        """The next frame, whether it is a message's last, and its kind; None if it is not there."""
        while True:
            found = self._whole_frame()
            if found is not None:
                return found
            if not self._fill(deadline):
                return None

    def _whole_frame(self) -> tuple[bool, int, bytes] | None:
        read = self._read
        if len(read) < 2:  # noqa: PLR2004 - a frame's head
            return None
        size, begin = read[1] & 0x7F, 2
        if size == _LONG:
            size, begin = int.from_bytes(read[2:4], "big"), 4
        elif size == _LONGER:
            size, begin = int.from_bytes(read[2:10], "big"), 10
        if len(read) < begin:
            return None
        if size > _MAX_MESSAGE:
            raise Lost("a message is too long")
        if len(read) < begin + size:
            return None
        head, body = read[0], bytes(read[begin : begin + size])
        del read[: begin + size]
        return bool(head & 0x80), head & 0x0F, body

    def _fill(self, deadline: float) -> bool:
        """Read on; False when it is too late."""
        left = deadline - time.monotonic()
        try:
            self._socket.settimeout(max(left, 0.001))
            data = self._socket.recv(1 << 18)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError as error:
            raise Lost(str(error)) from error
        if not data:
            raise Lost("the browser has ended")
        self._read += data
        return True


def _ignored(method: str, params: Json, session: str) -> None:
    del method, params, session


class Connection:
    """Commands to the browser and its tabs, and the events that come meanwhile."""

    def __init__(self, port: int, path: str, *, timeout_s: float = 5.0) -> None:
        """Open it; raises `Lost` as `Socket` does."""
        self._socket = Socket(port, path, timeout_s=timeout_s)
        self._number = 0
        self._answers: dict[int, Json | None] = {}
        self.on_event: Callable[[str, Json, str], None] = _ignored
        """Gets each event's name, its content and the tab's session."""

    def close(self) -> None:
        """Close it; the browser and its tabs go on."""
        self._socket.close()

    def send(self, method: str, session: str = "", **params: object) -> int:
        """Send a command whose answer nobody needs now; its number."""
        self._number += 1
        message: Json = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        self._socket.send(json.dumps(message))
        return self._number

    def ask(self, method: str, session: str = "", **params: object) -> int:
        """Send a command whose answer will be taken by `answer`; its number."""
        number = self.send(method, session, **params)
        self._answers[number] = None
        return number

    def is_open(self, number: int) -> bool:
        """Whether an answer is still to come."""
        return self._answers.get(number, {}) is None

    def answer(self, number: int, *, timeout_s: float) -> Json:
        """The answer to a command.

        Raises:
            Late: It does not come in time.
            Refused: It is an error.
            Lost: The connection has ended.
        """
        deadline = time.monotonic() + timeout_s
        while self._answers[number] is None:
            left = deadline - time.monotonic()
            if left <= 0:
                del self._answers[number]
                raise Late
            self.pump(left)
        answer = self._answers.pop(number) or {}
        if "error" in answer:
            raise Refused(str(answer["error"].get("message")))
        return answer.get("result") or {}

    def call(self, method: str, session: str = "", *, timeout_s: float, **params: object) -> Json:
        """Send a command and wait for its answer; raises as `answer` does."""
        return self.answer(self.ask(method, session, **params), timeout_s=timeout_s)

    def pump(self, timeout_s: float) -> bool:
        """Take the next message; False if none comes in time."""
        text = self._socket.receive(timeout_s)
        if text is None:
            return False
        message = json.loads(text)
        if "method" in message:
            self.on_event(
                message["method"], message.get("params") or {}, message.get("sessionId") or ""
            )
        elif message.get("id") in self._answers:
            self._answers[message["id"]] = message
        return True
