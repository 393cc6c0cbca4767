"""Many streams over one byte stream: the pipe between the broker and a sandbox's supervisor.

Every stream has its own credit, so that a slow reader of one never holds up the others; data of
several streams is sent in turns. The host (the broker) greets, and may greet again at any time,
also from another process: the other side then drops all streams and starts anew. A frame that is
missing is noticed by its number, and leads to such a greeting too; nothing is ever lost in silence.

What the peer sends is bounded: streams, bytes not read yet, frames that are wrong.
Standard library only, Python 3.9: this file also runs inside the sandbox.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, cast

from openinteractions.sandbox.frames import MAX_PAYLOAD, PADDING, Decoder, Encoder, Frame, following

OPEN, DATA, WINDOW, END, RESET, HELLO, WELCOME, GAP = range(1, 9)

MAX_STREAMS = 512
"""Streams that the peer may have open at once."""
_WINDOW = 128 * 1024
_MAX_WINDOW = 1024 * 1024
_BUDGET = MAX_STREAMS * _WINDOW
"""All windows together: what a peer can make us hold at most."""
_BATCH = 256 * 1024
_READ = 256 * 1024
_SMALL = 4096
_MAX_CONTROL = _MAX_PARTING = 4096
_MAX_GRANT = 1 << 31
_MAX_REASON = 200
_MAX_BAD = 256
_MAX_SKIPPED = 64 << 20
_MAX_RESYNCS = 30
_RESYNC_PERIOD_S = 60.0
_GREET_AGAIN_S = 3.0
_NONCE = 8

OnOpen = Callable[["MuxStream"], Awaitable[None]]


class MuxStream:
    """One stream; obeys `port.Duplex`. One reader at a time; writers take turns."""

    def __init__(self, mux: Mux, number: int, kind: str, header: dict[str, Any]) -> None:
        self._mux = mux
        self.number = number
        self.kind = kind
        self.header = header
        self._chunks: deque[bytes | bytearray | memoryview] = deque()
        self._readable = asyncio.Event()
        self._is_remote_ended = False
        self._window = self._allowed = _WINDOW
        self._consumed = 0
        self.grant = 0
        self._outgoing: deque[tuple[int, bytes | memoryview]] = deque()
        self._queued = 0
        self._credit = _WINDOW
        self._writable = asyncio.Event()
        self._turn = asyncio.Lock()
        self._is_local_ended = False
        self._error: str | None = None

    async def read(self, limit: int = 65536) -> bytes:
        """Up to `limit` bytes, or `b""` at the end.

        Raises:
            ConnectionError: The stream was reset.
        """
        while not self._chunks:
            if self._is_remote_ended:
                return b""
            if self._error is not None:
                raise ConnectionResetError(self._error)
            self._readable.clear()
            await self._readable.wait()
        piece = self._take(limit)
        self._consumed += len(piece)
        if self._consumed * 2 >= self._window and not self._is_remote_ended:
            self._widen()
        return piece

    async def read_all(self, limit: int) -> bytes:
        """Everything up to the end.

        Raises:
            ConnectionError: The stream was reset, or is longer than `limit` bytes.
        """
        whole = bytearray()
        while piece := await self.read():
            whole += piece
            if len(whole) > limit:
                self.reset("too long")
                raise ConnectionAbortedError(f"more than {limit} bytes came")
        return bytes(whole)

    async def write(self, data: bytes) -> None:
        """Send; waits while the other side does not read.

        Raises:
            ConnectionError: The stream is closed, or was reset.
        """
        view = memoryview(bytes(data))
        async with self._turn:
            while view.nbytes:
                while not self._credit or self._queued >= _WINDOW:
                    self._check_writable()
                    self._writable.clear()
                    await self._writable.wait()
                self._check_writable()
                size = min(len(view), self._credit, MAX_PAYLOAD)
                self._credit -= size
                self._queued += size
                self._send(DATA, view[:size])
                view = view[size:]

    async def end(self) -> None:
        """Say that nothing more will be written; reading goes on."""
        async with self._turn:
            if not self._is_local_ended and self._error is None:
                self._is_local_ended = True
                self._send(END)
                self._drop_if_done()

    async def close(self) -> None:
        """Close both directions. What was written before `end()` is still sent."""
        self.reset("closed")

    def reset(self, reason: str) -> None:
        """Close both directions at once and tell the other side why."""
        if self._error is None:
            if not self._is_local_ended:
                self._outgoing.clear()
            if self._mux.owns(self):
                self._send(RESET, reason.encode()[:_MAX_REASON])
            self._drop()
            self.fail(reason)
        self._chunks.clear()

    def fail(self, reason: str) -> None:
        """The stream is gone: wake everybody who waits for it."""
        if not self._is_remote_ended:
            self._chunks.clear()
        self._error = reason if self._error is None else self._error
        self._readable.set()
        self._writable.set()

    def _take(self, limit: int) -> bytes:
        chunk = self._chunks.popleft()
        if len(chunk) <= limit:
            return bytes(chunk)
        view = chunk if isinstance(chunk, memoryview) else memoryview(bytes(chunk))
        self._chunks.appendleft(view[limit:])
        return bytes(view[:limit])

    def _widen(self) -> None:
        """Give back the credit of what was read; more of it to those who read quickly."""
        more = self._mux.widened(self._window) if self._window < _MAX_WINDOW else 0
        self._window += more
        self._allowed += self._consumed + more
        self.grant += self._consumed + more
        self._consumed = 0
        self._mux.tell_window(self)

    def _check_writable(self) -> None:
        if self._error is not None:
            raise ConnectionResetError(self._error)
        if self._is_local_ended:
            raise BrokenPipeError("the stream has been ended")

    def _send(self, kind: int, payload: bytes | memoryview = b"") -> None:
        self._outgoing.append((kind, payload))
        self._mux.ready(self)

    def next_frame(self) -> tuple[int, bytes | memoryview] | None:
        """What to send next; for the writer."""
        if not self._outgoing:
            return None
        kind, payload = self._outgoing.popleft()
        if kind == DATA:
            self._queued -= len(payload)
            self._writable.set()
        return kind, payload

    @property
    def has_outgoing(self) -> bool:
        """Whether there is more to send; for the writer."""
        return bool(self._outgoing)

    def receive(self, frame: Frame) -> None:
        """Take a frame for this stream; for the reader."""
        if frame.kind == DATA:
            self._receive_bytes(frame.payload)
        elif frame.kind == WINDOW:
            grant = int.from_bytes(frame.payload[:4], "big")
            self._credit = min(self._credit + grant, _MAX_GRANT)
            self._writable.set()
        elif frame.kind == END:
            self._is_remote_ended = True
            self._readable.set()
            self._drop_if_done()
        elif frame.kind == RESET:
            self._drop()
            self.fail(frame.payload[:_MAX_REASON].decode("utf-8", "replace"))

    def _receive_bytes(self, payload: bytes) -> None:
        self._allowed -= len(payload)
        if self._allowed < 0 or self._is_remote_ended:
            self.reset("more was sent than allowed")
            return
        last = self._chunks[-1] if self._chunks else None
        if len(payload) > _SMALL or not payload:
            if payload:
                self._chunks.append(payload)
        elif isinstance(last, bytearray) and len(last) < MAX_PAYLOAD:
            # Thousands of tiny frames must not cost an object each.
            last += payload
        else:
            self._chunks.append(bytearray(payload) if last is not None else payload)
        self._readable.set()

    def _drop_if_done(self) -> None:
        if self._is_local_ended and self._is_remote_ended:
            self._drop()

    def _drop(self) -> None:
        if self._mux.drop(self):
            self._mux.widened(-self._window)


class Mux:
    """Both ends of the pipe. `start` it, then `open` streams; `close` lets go."""

    def __init__(
        self,
        channel_read: Callable[[int], Awaitable[bytes]],
        channel_write: Callable[[bytes], Awaitable[None]],
        is_host: bool,
        on_open: OnOpen,
        kinds: Collection[str] | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            channel_read: Up to so many bytes; none at the end.
            channel_write: Takes all that it is given.
            is_host: Whether this side greets.
            on_open: Gets each stream that the other side opens.
            kinds: Those that it may open; all if left out.
        """
        self._channel_read = channel_read
        self._channel_write = channel_write
        self._is_host = is_host
        self._on_open = on_open
        self._kinds = kinds
        self._encoder = Encoder()
        self._decoder = Decoder(_MAX_BAD if is_host else None)
        self._expected = 0
        self._streams: dict[int, MuxStream] = {}
        self._next_number = 1 if is_host else 2
        self._granted = 0
        self._control: deque[tuple[int, int, bytes]] = deque()
        self._granting: dict[int, MuxStream] = {}
        self._ready: deque[MuxStream] = deque()
        self._is_ready: set[MuxStream] = set()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._visitors = 0
        self._nonces: deque[bytes] = deque(maxlen=16)
        self._synced = asyncio.Event()
        self._resyncs: deque[float] = deque()
        self.lost = asyncio.Event()
        """Set when the pipe is gone for good; `why` says how."""
        self.why = ""

    async def start(self, *, is_resync: bool = False, timeout_s: float = 20.0) -> None:
        """Begin to read and write; the host greets and waits for the answer.

        Raises:
            ConnectionError: The other side did not answer in time, or the channel ended.
        """
        self._spawn(self._read_for_ever(), "mux-read")
        self._spawn(self._write_for_ever(), "mux-write")
        if not self._is_host:
            return
        self._greet(is_padded=is_resync)
        deadline = time.monotonic() + timeout_s
        while not await self._settled(min(_GREET_AGAIN_S, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                await self.close()
                raise ConnectionAbortedError("the supervisor does not answer")
            self._greet(is_padded=True)
        if self.lost.is_set():
            raise ConnectionAbortedError(self.why)

    async def open(self, kind: str, header: dict[str, Any] | None = None) -> MuxStream:
        """A new stream; the other side's `on_open` gets it.

        Raises:
            ConnectionError: The pipe is lost, or nobody has greeted yet.
        """
        payload = json.dumps([kind, header or {}]).encode()
        if len(payload) > MAX_PAYLOAD:
            raise ValueError("the header of a stream is too long")
        if self._is_host and not self._synced.is_set() and not self.lost.is_set():
            await self._settled(_GREET_AGAIN_S * 2)
        if self.lost.is_set() or not self._synced.is_set():
            raise ConnectionAbortedError(self.why or "the other side is not there")
        stream = MuxStream(self, self._free_number(), kind, header or {})
        self._adopt(stream)
        self._tell(OPEN, stream.number, payload)
        return stream

    async def close(self) -> None:
        """Let go of the channel without a word; every stream fails."""
        self._lose("the pipe was closed")
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)

    @property
    def stream_count(self) -> int:
        """Streams open at this moment."""
        return len(self._streams)

    # What streams need of their pipe.

    def owns(self, stream: MuxStream) -> bool:
        """Whether the other side still knows this stream."""
        return self._streams.get(stream.number) is stream

    def ready(self, stream: MuxStream) -> None:
        """A stream has something to send."""
        if stream not in self._is_ready:
            self._is_ready.add(stream)
            self._ready.append(stream)
            self._wake.set()

    def tell_window(self, stream: MuxStream) -> None:
        """A stream's reader has made room."""
        self._granting[stream.number] = stream
        self._wake.set()

    def widened(self, size: int) -> int:
        """Take `size` from the budget of all windows if there is so much (negative: give back)."""
        if size > 0 and self._granted + size > _BUDGET:
            return 0
        self._granted += size
        return size

    def drop(self, stream: MuxStream) -> bool:
        """Forget a stream; False if it was not known."""
        self._granting.pop(stream.number, None)
        if not self.owns(stream):
            return False
        del self._streams[stream.number]
        return True

    # Greeting.

    def _greet(self, *, is_padded: bool) -> None:
        self._drop_all("the pipe started anew")
        self._synced.clear()
        self._nonces.append(os.urandom(_NONCE))
        if is_padded:
            self._tell(0, 0, PADDING)
        self._tell(HELLO, 0, self._nonces[-1])

    async def _settled(self, timeout_s: float) -> bool:
        """Wait until greeted or lost; False when neither came in time."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._synced, self.lost)]
        try:
            done, _ = await asyncio.wait(
                waits, timeout=max(timeout_s, 0.001), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for wait in waits:
                wait.cancel()
        return bool(done)

    def _resync(self) -> None:
        """A frame is missing: whatever the streams carry now cannot be trusted."""
        if not self._is_host:
            self._synced.clear()
            self._tell(GAP, 0)
            return
        now = time.monotonic()
        while self._resyncs and self._resyncs[0] < now - _RESYNC_PERIOD_S:
            self._resyncs.popleft()
        self._resyncs.append(now)
        if len(self._resyncs) > _MAX_RESYNCS:
            self._lose("too many frames were missing")
            return
        self._greet(is_padded=True)
        self._spawn(self._greet_until_answered(self._nonces[-1]), "mux-greet")

    async def _greet_until_answered(self, nonce: bytes) -> None:
        for _ in range(5):
            if await self._settled(_GREET_AGAIN_S) or self._nonces[-1] != nonce:
                return
            self._greet(is_padded=True)
            nonce = self._nonces[-1]
        self._lose("the supervisor does not answer")

    def _welcome(self, frame: Frame) -> None:
        """A host has come, perhaps another one."""
        self._drop_all("another host has come")
        self._expected = following(frame.sequence)
        self._synced.set()
        self._tell(0, 0, PADDING)
        self._tell(WELCOME, 0, frame.payload)

    def _welcomed(self, frame: Frame) -> None:
        if self._synced.is_set():
            if frame.payload not in self._nonces:
                self._lose("another host has taken over")
        elif frame.payload == self._nonces[-1]:
            self._expected = following(frame.sequence)
            self._decoder.bad = self._decoder.skipped = 0
            self._synced.set()

    # Reading.

    async def _read_for_ever(self) -> None:
        try:
            while not self.lost.is_set() and (received := await self._channel_read(_READ)):
                for frame in self._decoder.feed(received):
                    self._receive(frame)
                if self._is_host:
                    self._check_peer()
                # The channel may always have more at hand; others want to run too.
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - without its reader the pipe is lost
            self._lose(f"reading from the pipe failed: {error}")
        self._lose("the pipe has ended")

    def _check_peer(self) -> None:
        if self._decoder.bad > _MAX_BAD or self._decoder.skipped > _MAX_SKIPPED:
            self._lose("too much of what came was rubbish")
        elif len(self._ready) - len(self._streams) > _MAX_PARTING:
            # Streams that have ended, and wait for a peer that does not read to be told of it.
            self._lose("the other side opens streams and does not read")

    def _receive(self, frame: Frame) -> None:
        if self.lost.is_set():
            return
        if frame.kind == HELLO and not self._is_host:
            self._welcome(frame)
        elif frame.kind == WELCOME and self._is_host:
            self._welcomed(frame)
        elif self._synced.is_set():
            if frame.sequence != self._expected or frame.kind == GAP:
                self._resync()
                return
            self._expected = following(frame.sequence)
            self._dispatch(frame)

    def _dispatch(self, frame: Frame) -> None:
        if frame.kind == OPEN:
            self._receive_open(frame)
            return
        stream = self._streams.get(frame.stream)
        if stream is not None:
            stream.receive(frame)

    def _receive_open(self, frame: Frame) -> None:
        number = frame.stream
        if number in self._streams or number % 2 == (1 if self._is_host else 0):
            return
        opened = _parsed(frame.payload)
        is_known = opened is not None and (self._kinds is None or opened[0] in self._kinds)
        if opened is None or not is_known or self._visitors >= MAX_STREAMS:
            # Who does not read gets no answer.
            if len(self._control) < _MAX_CONTROL:
                self._tell(RESET, number, b"refused")
            return
        stream = MuxStream(self, number, *opened)
        self._adopt(stream)
        self._visitors += 1
        self._spawn(self._visit(stream), f"mux-{stream.kind}")

    async def _visit(self, stream: MuxStream) -> None:
        try:
            await self._on_open(stream)
        except ConnectionError:
            stream.reset("broken off")
        except Exception as error:  # noqa: BLE001 - one stream's failure is not the pipe's
            stream.reset(type(error).__name__)
            self._report(error, stream.kind)
        finally:
            self._visitors -= 1
            await stream.close()

    def _report(self, error: Exception, kind: str) -> None:
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"a stream of kind {kind[:40]!r} failed", "exception": error}
        )

    # Writing.

    async def _write_for_ever(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while not self.lost.is_set() and (parts := self._batch()):
                    await self._channel_write(b"".join(parts))
        except Exception as error:  # noqa: BLE001 - without its writer the pipe is lost
            self._lose(f"writing to the pipe failed: {error}")

    def _batch(self) -> list[bytes | memoryview]:
        """The next frames: control first, then one of each stream in turns."""
        parts: list[bytes | memoryview] = []
        while self._control:
            kind, number, payload = self._control.popleft()
            parts += (self._encoder.pack(kind, number, payload), payload) if kind else (payload,)
        self._batch_windows(parts)
        size = 0
        while self._ready and size < _BATCH:
            stream = self._ready.popleft()
            frame = stream.next_frame()
            if frame is not None:
                kind, payload = frame
                parts += (self._encoder.pack(kind, stream.number, payload), payload)
                size += len(payload) + 64
            if stream.has_outgoing:
                self._ready.append(stream)
            else:
                self._is_ready.discard(stream)
        return parts

    def _batch_windows(self, parts: list[bytes | memoryview]) -> None:
        for number, stream in self._granting.items():
            # More has gathered only for a peer that sends without asking how much it may.
            payload = min(stream.grant, _MAX_GRANT).to_bytes(4, "big")
            stream.grant = 0
            parts += (self._encoder.pack(WINDOW, number, payload), payload)
        self._granting.clear()

    def _tell(self, kind: int, number: int, payload: bytes = b"") -> None:
        self._control.append((kind, number, payload))
        self._wake.set()

    # Bookkeeping.

    def _free_number(self) -> int:
        number = self._next_number
        while number in self._streams:
            number = (number + 2) % (1 << 32)
        self._next_number = (number + 2) % (1 << 32) or 2
        return number

    def _adopt(self, stream: MuxStream) -> None:
        self._streams[stream.number] = stream
        self._granted += _WINDOW

    def _drop_all(self, reason: str) -> None:
        streams = list(self._streams.values())
        self._streams.clear()
        self._granted = 0
        self._control.clear()
        self._granting.clear()
        self._ready.clear()
        self._is_ready.clear()
        for stream in streams:
            stream.fail(reason)

    def _lose(self, reason: str) -> None:
        if not self.lost.is_set():
            self.why = reason
            self.lost.set()
            self._drop_all(reason)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _parsed(payload: bytes) -> tuple[str, dict[str, Any]] | None:
    """Kind and header of a new stream, or None if it is neither."""
    try:
        opened: Any = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    try:
        kind, header = opened
    except (TypeError, ValueError):
        return None
    if not isinstance(kind, str) or not isinstance(header, dict):
        return None
    return kind, cast("dict[str, Any]", header)
