"""uvicorn's HTTP protocol with bounds on what a client may send around its requests' bodies.

A request's head must come in time and be of a bounded size. A body is its reader's to bound; once
the request is answered nobody reads it, and its rest has only so long to arrive. What is neither
head nor body (trailers, chunk extensions, blank lines) is bounded in bytes, and trailers are
dropped.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEAD_TIMEOUT_S = 30.0
_REST_TIMEOUT_S = 10.0
_MAX_HEAD_BYTES = 64 * 1024
_MAX_OTHER_BYTES = 64 * 1024


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection whose client does not get to the end of what it sends."""

    _timer: asyncio.TimerHandle | None = None
    _bytes = 0
    """Received since a head began, or since the last piece of a body."""
    _in_head = True
    _in_body = False
    """The head has ended, the request has not."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - as uvicorn's own
        """Start waiting for the first head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to no body; never wait for a client without an end."""
        self._bytes += len(data)
        if self._in_head and self._bytes > _MAX_HEAD_BYTES and not self._ends_head(data):
            self._disarm()
            self.send_400_response("The request head is too large.")
            return
        super().data_received(data)
        if not self._in_head and self._bytes > _MAX_OTHER_BYTES:
            self._close()
        elif self._is_answered() and self.timeout_keep_alive_task is None:
            # uvicorn ends its keep-alive time-out at the first byte, whatever that begins.
            self._arm(_REST_TIMEOUT_S if self._in_body else _HEAD_TIMEOUT_S)

    def on_message_begin(self) -> None:
        """A request begins: its head has so long."""
        super().on_message_begin()
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field of the head; a trailer is none."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._disarm()
        self._in_head = False
        self._in_body = True
        self._bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body: its reader counts these."""
        self._bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there."""
        self._disarm()
        self._in_body = False
        self._bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The request is answered: if it has not ended yet, its rest has so long."""
        super().on_response_complete()
        if self._in_body and self._is_answered():
            self._arm(_REST_TIMEOUT_S)

    def _is_answered(self) -> bool:
        """Nothing that the client asked for is still to be answered."""
        cycle: Any = self.cycle
        return cycle is not None and cycle.response_complete

    def _expect_head(self) -> None:
        self._in_head = True
        self._bytes = 0
        self._arm(_HEAD_TIMEOUT_S)

    def _arm(self, seconds: float) -> None:
        """Close the connection then; a clock that runs already runs on."""
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(seconds, self._close)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._disarm()
        if not self.transport.is_closing():
            self.transport.close()

    def _ends_head(self, data: bytes) -> bool:
        """A body may follow its head in the same packet; only the head is bounded."""
        return b"\r\n\r\n" in data[:_MAX_HEAD_BYTES]
