"""The one way to an upstream model: POST a JSON body, read JSON objects back as they arrive.

aiohttp, since its cost per streamed chunk is a third of httpx2's (docs/decisions). Everything that
can go wrong on the way is mapped here, once, onto `ModelUnavailable` and `ModelRejected`.
"""

import asyncio
import contextlib
import email.utils
import math
import urllib.request
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, timedelta
from typing import Any
from urllib.parse import urlsplit

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
    "exceeds the available context size",
    "context window",
    "exceed context limit",
)
_MAX_ERROR_BYTES = 64 * 1024
_SECRET_CHARS = 8
_MAX_EVENT_BYTES = 64 * 2**20
_DRAIN_S = 0.2


class SseDecoder:
    """Cuts a byte stream into the `data` payloads of its server-sent events.

    LF, CRLF and CR line ends, comments, several data lines an event, and a byte-order mark are all
    understood. An event that the stream's end cuts off is dropped, as the standard says.
    """

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._held = 0
        self._data: list[bytes] = []
        self._at_start = True
        self._after_cr = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Take the next bytes; yield each payload that they complete."""
        if self._after_cr and chunk:
            # The CR that ended the last chunk has ended its line: this LF belongs to it.
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first, *more = chunk.split(b"\n")
        self._hold(first)
        if not more:
            return
        # A line is joined once, at its end: media arrive as one line of many chunks.
        lines = [b"".join(self._line), *more[:-1]]
        self._line, self._held = [], 0
        self._hold(more[-1])
        if self._at_start:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []

    def _hold(self, part: bytes) -> None:
        if part:
            self._line.append(part)
            self._held += len(part)
        if self._held > _MAX_EVENT_BYTES:
            raise ModelUnavailable("The upstream sent an event that is too long.")


class Answer(AsyncIterator[Any]):
    """The JSON values of one answer, as they arrive."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._batches = self._read()
        self._values = self._one_by_one()
        self.done = False
        """Whether the `[DONE]` mark, or a whole plain JSON answer, has been seen."""

    def __aiter__(self) -> AsyncIterator[Any]:  # noqa: PYI034 - `async for` is then a hop shorter
        return self._values

    async def __anext__(self) -> Any:  # noqa: ANN401 - whatever the upstream sent
        return await anext(self._values)

    async def close(self) -> None:
        """End the reading; after `[DONE]`, take the end of the body, so that the pool keeps us."""
        await self._values.aclose()
        await self._batches.aclose()
        content = self._response.content
        if self.done and not content.at_eof():
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
                async with asyncio.timeout(_DRAIN_S):
                    while await content.readany():
                        pass

    def batches(self) -> AsyncIterator[list[Any]]:
        """The values in lists, each what came at once: a hop less for every one of many."""
        return self._batches

    async def _one_by_one(self) -> AsyncGenerator[Any]:
        async for batch in self._batches:
            for value in batch:
                yield value

    async def _read(self) -> AsyncGenerator[list[Any]]:
        # What the consumer raises between two values never passes here: only reading is mapped.
        with _mapped():
            if not self._response.content_type.endswith("event-stream"):
                value = _json(await self._response.read())
                self.done = True
                yield [value]
                return
            decoder = SseDecoder()
            async for chunk in self._response.content.iter_any():
                batch: list[Any] = []
                try:
                    self.done = _decode(decoder, chunk, batch)
                finally:
                    # Also before an error: what came whole counts.
                    if batch:
                        yield batch
                if self.done:
                    return


def _decode(decoder: SseDecoder, chunk: bytes, batch: list[Any]) -> bool:
    """Add the values that a chunk completes; whether the `[DONE]` mark came."""
    for payload in decoder.feed(chunk):
        if payload.strip() == b"[DONE]":
            return True
        batch.append(_json(payload))
    return False


def proxy_for(url: str) -> str | None:
    """The proxy that the environment (`HTTPS_PROXY`, `NO_PROXY`, …) wants for an address.

    Asked once: aiohttp's `trust_env` asks a thread, twice, for every request.
    """
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


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
        proxy: str | None = None,
    ) -> None:
        self._session = session
        self._proxy = proxy
        self._base_url = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json", **headers}
        self._secrets = [value.rpartition(" ")[2] for value in headers.values()]
        self._timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=connect_timeout.total_seconds(),
            sock_read=idle_timeout.total_seconds(),
        )

    @property
    def base_url(self) -> str:
        """The root of the provider's API, without a trailing slash."""
        return self._base_url

    @asynccontextmanager
    async def post(
        self,
        path: str,
        body: bytes,
        *,
        explain: Callable[[Any], str | None],
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Answer]:
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
        async with AsyncExitStack() as stack:
            with _mapped():
                response = await stack.enter_async_context(
                    self._session.post(
                        self._base_url + path,
                        data=body,
                        headers={**self._headers, **(headers or {})},
                        timeout=self._timeout,
                        proxy=self._proxy,
                        allow_redirects=False,
                    )
                )
                if response.status != 200:  # noqa: PLR2004 - the one good status
                    raise await _refusal(response, explain, secrets=self._secrets)
            answer = Answer(response)
            stack.push_async_callback(answer.close)
            yield answer


@contextlib.contextmanager
def _mapped() -> Generator[None]:
    """Turn what goes wrong on the connection into `ModelUnavailable`."""
    try:
        yield
    except TimeoutError as error:
        raise ModelUnavailable("The upstream did not answer in time.") from error
    except aiohttp.ClientConnectorError as error:
        raise ModelUnavailable("The upstream cannot be reached.") from error
    except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
        raise ModelUnavailable("The connection to the upstream broke.") from error


def _json(payload: bytes) -> Any:  # noqa: ANN401 - whatever the upstream sent
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise ModelUnavailable("The upstream sent something that is not JSON.") from error


async def _refusal(
    response: aiohttp.ClientResponse,
    explain: Callable[[Any], str | None],
    *,
    secrets: Sequence[str],
) -> ModelError:
    raw = b""
    async for chunk in response.content.iter_any():
        raw += chunk
        if len(raw) > _MAX_ERROR_BYTES:
            break
    message: str | None = None
    with contextlib.suppress(orjson.JSONDecodeError, TypeError, KeyError, AttributeError):
        message = explain(orjson.loads(raw))
    status = response.status
    text = f"The upstream answered {status}" + (f": {message}" if message else ".")
    for secret in secrets:
        # Vendors quote the key that they refuse, and callers see this text.
        text = text.replace(secret, "…") if len(secret) >= _SECRET_CHARS else text
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
    millis = _number(headers.get("retry-after-ms"))
    if millis is not None:
        return max(0.0, millis / 1000)
    text = headers.get("Retry-After")
    seconds = _number(text)
    if text is None or seconds is not None:
        return None if seconds is None else max(0.0, seconds)
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # "-0000" gives a naive date, which means UTC of unknown origin.
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (aware - clock.now()).total_seconds())


def _number(text: str | None) -> float | None:
    with contextlib.suppress(ValueError):
        number = float(text or "")
        return number if math.isfinite(number) else None
    return None
