"""TLS over any stream of bytes."""

import asyncio
import contextlib
import ssl
from collections import deque

from openinteractions.sandbox.port import Duplex

_CHUNK = 64 * 1024


class TlsStream:
    """One end of a TLS connection; itself a `Duplex`.

    One reader and one writer may use it at the same time.
    """

    def __init__(
        self,
        inner: Duplex,
        context: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
        early: bytes = b"",
    ) -> None:
        """Wrap a stream; call `handshake` before anything else.

        Args:
            inner: What the encrypted bytes go over. Closed with this.
            context: Certificates and rules. Must forbid renegotiation.
            server_hostname: The host to verify: this is then the client's end.
            early: Bytes that were read from `inner` already.
        """
        self._inner = inner
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._sending = asyncio.Lock()
        self._is_ended = False
        self._early: deque[bytes] = deque()
        if early:
            self._incoming.write(early)
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_hostname is None,
            server_hostname=server_hostname,
        )

    async def handshake(self) -> None:
        """Agree on keys, and verify the other side where the context says so.

        Raises:
            ssl.SSLError: They do not agree, or the certificate is not good.
            ConnectionError: The other side left.
        """
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
                await self._receive()
            except ssl.SSLError:
                # The other side is told why, if it still listens.
                with contextlib.suppress(ConnectionError):
                    await self._flush()
                raise
        await self._flush()

    async def read(self, limit: int = _CHUNK) -> bytes:
        """Up to `limit` bytes; `b""` after the other side said that it ends.

        Raises:
            ConnectionError: It broke, or was cut off without a word.
        """
        if self._early:
            part = self._early.popleft()
            if len(part) > limit:
                self._early.appendleft(part[limit:])
            return part[:limit]
        parts: list[bytes] = []
        left = limit
        while left > 0:
            try:
                part = self._tls.read(left)
            except ssl.SSLWantReadError:
                if parts:
                    break
                await self._answer()
                await self._receive()
                continue
            except ssl.SSLZeroReturnError:
                break
            except ssl.SSLError as error:
                if parts:
                    break
                raise ConnectionResetError(f"TLS: {error.reason}") from error
            if not part:
                break
            parts.append(part)
            left -= len(part)
        await self._answer()
        return b"".join(parts) if len(parts) != 1 else parts[0]

    async def write(self, data: bytes) -> None:
        """Send; waits while the other side does not read.

        Raises:
            ConnectionError: It is closed.
        """
        view = memoryview(data)
        for start in range(0, len(view), _CHUNK):
            if self._is_ended:
                raise ConnectionResetError("TLS: ended")
            try:
                self._tls.write(view[start : start + _CHUNK])
            except ssl.SSLError as error:
                raise ConnectionResetError(f"TLS: {error.reason}") from error
            await self._flush()

    async def end(self) -> None:
        """Say that nothing more will be written (`close_notify`)."""
        if self._is_ended:
            return
        self._is_ended = True
        # OpenSSL sends ours and asks for the other side's at once, which must not meet data.
        with contextlib.suppress(ssl.SSLError):
            while part := self._tls.read(_CHUNK):
                self._early.append(part)
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()

    async def close(self) -> None:
        """Close both directions at once."""
        self._is_ended = True
        await self._inner.close()

    async def _receive(self) -> None:
        received = await self._inner.read(_CHUNK)
        if received:
            self._incoming.write(received)
        else:
            self._incoming.write_eof()

    async def _answer(self) -> None:
        """Send what reading gave rise to, unless a writer is about to do it."""
        if self._outgoing.pending and not self._sending.locked():
            await self._flush()

    async def _flush(self) -> None:
        # Whoever holds the lock sends all there is: a reader need not wait for a slow writer.
        async with self._sending:
            while self._outgoing.pending:
                await self._inner.write(self._outgoing.read())
