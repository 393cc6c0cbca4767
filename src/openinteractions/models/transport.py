"""The one way to an upstream model: POST a JSON body, read JSON objects back as they arrive.

aiohttp, since its cost per streamed chunk is a third of httpx2's (docs/decisions). Everything that
can go wrong on the way is mapped here, once, onto `ModelUnavailable` and `ModelRejected`.
"""

import asyncio
import contextlib
import email.utils
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import aiohttp
import orjson

from openinteractions import clock
from openinteractions.errors import ContextOverflow, ModelError, ModelRejected, ModelUnavailable

_TRANSIENT = frozenset({408, 409, 425, 429})
_OVERFLOW_MARKS = (
    "context_length_exceeded",
    "exceed_context_size",
    "maximum context length",
    "prompt is too long",
    "exceeds the maximum number of tokens",
    "context window",
)
_MAX_ERROR_BYTES = 64 * 1024
_MAX_EVENT_BYTES = 64 * 2**20


class SseDecoder:
    """Cuts a byte stream into the `data` payloads of its server-sent events.

    LF, CRLF and CR line ends, comments, several data lines an event, and a byte-order mark are all
    understood. An event that the stream's end cuts off is dropped, as the standard says.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._first = True

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Take the next bytes; yield each payload that they complete."""
        buffer = self._rest + chunk
        if self._first and len(buffer) >= 3:  # noqa: PLR2004 - the length of a byte-order mark
            buffer = buffer.removeprefix(b"\xef\xbb\xbf")
            self._first = False
        # A CR at the end may be half of a CRLF: keep it until the next byte is known.
        held = b"\r" if buffer.endswith(b"\r") else b""
        lines = (buffer[:-1] if held else buffer).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *whole, rest = lines.split(b"\n")
        self._rest = rest + held
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise ModelUnavailable("The upstream sent an event that is too long.")
        for line in whole:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []


class Upstream:
    """One provider's address, credentials and time-outs over a shared connection pool."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        base_url: str,
        headers: Mapping[str, str],
        connect_timeout: timedelta,
        idle_timeout: timedelta,
    ) -> None:
        self._session = session
        self._base_url = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json", **headers}
        self._timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=connect_timeout.total_seconds(),
            sock_read=idle_timeout.total_seconds(),
        )

    @asynccontextmanager
    async def post(
        self,
        path: str,
        body: bytes,
        *,
        explain: Callable[[Any], str | None],
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[AsyncIterator[Any]]:
        """Send a request and iterate over the JSON values of its answer.

        An event stream gives one value an event, until `[DONE]` or its end; a plain JSON answer
        gives itself, once. Leaving the context closes the connection unless it was read to the end.

        Args:
            path: Below the base URL, with a leading slash.
            body: The JSON document.
            explain: Finds the human message in a decoded error body, or returns None.
            headers: More headers, for this call only.

        Raises:
            ModelUnavailable: 408, 409, 425, 429, 5xx, no connection, a reset, silence.
            ContextOverflow: A 4xx that says the input is too long.
            ModelRejected: Any other 4xx.
        """
        try:
            async with self._session.post(
                self._base_url + path,
                data=body,
                headers={**self._headers, **(headers or {})},
                timeout=self._timeout,
                allow_redirects=False,
            ) as response:
                if response.status != 200:  # noqa: PLR2004 - the one good status
                    raise await _refusal(response, explain)
                yield _values(response)
        except TimeoutError as error:
            raise ModelUnavailable("The upstream did not answer in time.") from error
        except aiohttp.ClientConnectorError as error:
            raise ModelUnavailable("The upstream cannot be reached.") from error
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise ModelUnavailable("The connection to the upstream broke.") from error


async def _values(response: aiohttp.ClientResponse) -> AsyncGenerator[Any]:
    if not response.content_type.endswith("event-stream"):
        yield _json(await response.read())
        return
    decoder = SseDecoder()
    async for chunk in response.content.iter_any():
        for payload in decoder.feed(chunk):
            if payload.strip() == b"[DONE]":
                return
            yield _json(payload)


def _json(payload: bytes) -> Any:  # noqa: ANN401 - whatever the upstream sent
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise ModelUnavailable("The upstream sent something that is not JSON.") from error


async def _refusal(
    response: aiohttp.ClientResponse, explain: Callable[[Any], str | None]
) -> ModelError:
    raw = await response.content.read(_MAX_ERROR_BYTES)
    message: str | None = None
    with contextlib.suppress(orjson.JSONDecodeError, TypeError, KeyError, AttributeError):
        message = explain(orjson.loads(raw))
    status = response.status
    text = f"The upstream answered {status}" + (f": {message}" if message else ".")
    return classify(text, status=status, retry_after_s=retry_after(response.headers))


def classify(text: str, *, status: int, retry_after_s: float | None = None) -> ModelError:
    """The error that an upstream's status and message stand for; also for errors in a stream."""
    if status in _TRANSIENT or status >= 500:  # noqa: PLR2004 - HTTP's server errors
        return ModelUnavailable(text, upstream_status=status, retry_after_s=retry_after_s)
    lowered = text.lower()
    if any(mark in lowered for mark in _OVERFLOW_MARKS):
        return ContextOverflow(text, upstream_status=status)
    return ModelRejected(text, upstream_status=status)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """How long an answer asks to wait, in seconds: `retry-after-ms`, seconds or an HTTP date."""
    with contextlib.suppress(KeyError, ValueError):
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    text = headers.get("Retry-After")
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (moment - clock.now()).total_seconds())
