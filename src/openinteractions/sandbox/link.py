"""Requests to sandbox brokers: connections, errors, and waiting for one that restarts."""

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import aiohttp
import orjson
from yarl import URL

from openinteractions.errors import (
    AppError,
    Conflict,
    Invalid,
    NotFound,
    RequestError,
    TooLarge,
    TooMany,
    Unready,
)
from openinteractions.sandbox import messages
from openinteractions.sandbox.port import Displaced, NotBegun, SandboxError

Body: TypeAlias = bytes | AsyncIterable[bytes]

BROKEN: Final = (aiohttp.ClientError, OSError, TimeoutError)
"""What a broker that is away, or goes away, makes of a request."""

_UNIX: Final = "unix://"
_PAUSE_S: Final = 0.2
_MAX_PAUSE_S: Final = 2.0
_CONNECT_S: Final = 5.0
# The broker breaks the silence of an open answer long before.
_SILENCE_S: Final = 60.0
_SLOW_S: Final = 900.0
"""For what copies or unpacks."""
_KINDS: Final[Mapping[int, type[RequestError]]] = {
    400: Invalid,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    429: TooMany,
    503: Unready,
}
_CODES: Final[Mapping[str, type[RequestError]]] = {
    kind.code: kind for kind in (Displaced, NotBegun)
}
"""What a status does not tell apart."""


class Away(Unready):
    """The broker does not answer, or stopped in the middle of an answer."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"The sandbox broker does not answer ({type(cause).__name__}).", retry_after_s=1
        )
        self.cause = cause


class Patience:
    """Waits longer and longer, and not for ever."""

    def __init__(self, limit_s: float) -> None:
        self._until = time.monotonic() + limit_s
        self._pause_s = _PAUSE_S

    async def wait(self) -> bool:
        """Pause, unless the time is up."""
        left = self._until - time.monotonic()
        if left <= 0:
            return False
        await asyncio.sleep(min(self._pause_s, left))
        self._pause_s = min(self._pause_s * 1.5, _MAX_PAUSE_S)
        return True


class Link:
    """The connections to all brokers."""

    def __init__(
        self, token: str | Callable[[], str], *, tls: ssl.SSLContext | None, patience_s: float
    ) -> None:
        self._token = token
        self._tls = tls
        self._patience_s = patience_s
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        """Close them."""
        sessions = list(self._sessions.values())
        self._sessions.clear()
        for session in sessions:
            await session.close()

    @asynccontextmanager
    async def answer(
        self,
        address: str,
        method: str,
        path: str,
        *,
        body: Body | None = None,
        is_slow: bool = False,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """One request; a broker that says nothing for long after it does not answer.

        Raises:
            Away: The broker does not answer, or breaks off.
            AppError: It refuses.
        """
        session, base = self._session(address)
        silence_s = _SLOW_S if is_slow else _SILENCE_S
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=silence_s)
        url = URL(base + path, encoded=True)
        try:
            response = await session.request(
                method, url, data=body, timeout=timeout, headers=self._headers()
            )
        except BROKEN as error:
            raise Away(error) from error
        async with response:
            if not response.ok:
                raise await _refusal(response)
            yield response

    async def json(
        self,
        address: str,
        method: str,
        path: str,
        *,
        body: Body | None = None,
        is_repeatable: bool = True,
        is_slow: bool = False,
    ) -> Any:  # noqa: ANN401 - JSON
        """A request with a JSON answer, sent again while the broker restarts, where that is safe.

        A body that is a stream can be sent once only, as can what has another effect at the second
        time; but where no connection was made, nothing was sent.

        Raises:
            AppError: The broker refuses, or does not answer.
        """
        is_repeatable = is_repeatable and not isinstance(body, AsyncIterable)
        patience = Patience(self._patience_s)
        while True:
            try:
                async with self.answer(
                    address, method, path, body=body, is_slow=is_slow
                ) as response:
                    data = await read_all(response)
                    return orjson.loads(data) if data else {}
            except Away as error:
                may_repeat = is_repeatable or isinstance(error.cause, aiohttp.ClientConnectorError)
                if not may_repeat or not await patience.wait():
                    raise

    async def websocket(self, address: str, path: str) -> aiohttp.ClientWebSocketResponse:
        """Open a WebSocket; the broker says `open`, or closes it with its reason.

        Raises:
            AppError: The broker refuses, or does not answer.
        """
        session, base = self._session(address)
        try:
            async with asyncio.timeout(_SILENCE_S):
                socket = await session.ws_connect(
                    URL(base + path, encoded=True),
                    headers=self._headers(),
                    heartbeat=20.0,
                    max_msg_size=messages.MAX_FRAME_BYTES,
                )
                first = await socket.receive()
        except aiohttp.WSServerHandshakeError as error:
            raise _error(
                error.status, "", f"The sandbox broker answered {error.status}."
            ) from error
        except BROKEN as error:
            raise Away(error) from error
        if first.type is aiohttp.WSMsgType.TEXT:
            return socket
        code = (socket.close_code or 0) - messages.CLOSE_BASE
        await socket.close()
        raise _error(code, "", str(first.extra or "The port cannot be reached."))

    def _headers(self) -> dict[str, str]:
        token = self._token if isinstance(self._token, str) else self._token()
        return {"Authorization": f"Bearer {token}"}

    def _session(self, address: str) -> tuple[aiohttp.ClientSession, str]:
        """The connections to a broker, and the base of its URLs."""
        is_unix = address.startswith(_UNIX)
        key = address if is_unix else "tcp"
        session = self._sessions.get(key)
        if session is None or session.closed:
            connector: aiohttp.BaseConnector
            if is_unix:
                connector = aiohttp.UnixConnector(address.removeprefix(_UNIX), limit=0)
            else:
                connector = aiohttp.TCPConnector(limit=0, ssl=self._tls or True)
            session = self._sessions[key] = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return session, "http://broker" if is_unix else address.rstrip("/")


async def read_all(response: aiohttp.ClientResponse) -> bytes:
    """The whole body of a short answer.

    Raises:
        Away: It broke off.
    """
    try:
        return await response.read()
    except BROKEN as error:
        raise Away(error) from error


async def _refusal(response: aiohttp.ClientResponse) -> AppError:
    """The error that an answer stands for."""
    try:
        said: Any = orjson.loads(await read_all(response))["error"]
        code, message = str(said["code"]), str(said["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "", f"The sandbox broker answered {response.status}."
    wait = response.headers.get("Retry-After", "")
    return _error(
        response.status, code, message, retry_after_s=float(wait) if wait.isdecimal() else None
    )


def _error(status: int, code: str, message: str, *, retry_after_s: float | None = None) -> AppError:
    if status in {401, 403}:
        return SandboxError(
            "The sandbox broker does not accept this server's token: both need the same "
            "master key (OI_MASTER_KEY)."
        )
    kind = _CODES.get(code) or _KINDS.get(status)
    if kind is None or code == SandboxError.code:
        return SandboxError(message)
    return kind(message, retry_after_s=retry_after_s)
