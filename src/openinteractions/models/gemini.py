"""Gemini's own wire format: `POST {base}/v1beta/models/{model}:streamGenerateContent?alt=sse`.

The request is built in `gemini_request`, the conversation in `gemini_messages`, the answer is read
in `gemini_stream`. A plain JSON answer (one object, or an array of chunks) goes the same way.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, cast
from urllib.parse import quote, urlsplit

from openinteractions.errors import ModelUnavailable
from openinteractions.models import gemini_messages, gemini_request
from openinteractions.models.encoded import encoded
from openinteractions.models.gemini_stream import Turn
from openinteractions.models.port import (
    Json,
    ModelCall,
    ModelEvent,
    Warning,  # noqa: A004 - the port's word
)
from openinteractions.models.transport import Upstream

_VERSIONED: Final = re.compile(r"/v\d+(alpha|beta)?\d*$")
_YOUTUBE: Final = frozenset({"youtube.com", "www.youtube.com", "m.youtube.com", "youtu.be"})
_FILES_HOST: Final = "generativelanguage.googleapis.com"


def headers(api_key: str | None) -> dict[str, str]:
    """The credentials' headers; none for a gateway that wants no key."""
    return {"x-goog-api-key": api_key} if api_key else {}


class GeminiModel:
    """`Model` over the Gemini API."""

    def __init__(self, upstream: Upstream, *, provider: str) -> None:
        self._upstream = upstream
        self.provider = provider
        base_url = upstream.base_url
        self._prefix = "" if _VERSIONED.search(base_url) else "/v1beta"

    def compile(self, steps: Sequence[Json], model: str) -> list[bytes]:
        """See `Model.compile`."""
        return gemini_messages.compile_contents(steps, model)

    def takes_uri(self, content_type: str, uri: str) -> bool:
        """Gemini reads its own Files API, Cloud Storage and, as video, YouTube."""
        try:
            parts = urlsplit(uri)
        except ValueError:
            return False
        if parts.scheme == "gs" or parts.hostname == _FILES_HOST:
            return True
        return content_type == "video" and parts.hostname in _YOUTUBE

    def check(self, call: ModelCall) -> list[Warning]:
        """See `Model.check`."""
        return gemini_request.options(call)[1]

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[AsyncIterator[ModelEvent]]:
        """See `Model.stream`."""
        name = call.model if "/" in call.model else f"models/{call.model}"
        path = f"{self._prefix}/{quote(name)}:streamGenerateContent?alt=sse"
        delay = _RetryDelay()
        try:
            async with self._upstream.post(path, _body(call), explain=delay.explain) as answer:
                turn = Turn(show_thoughts=call.shows_thoughts)
                async with aclosing(_events(answer, turn)) as events:
                    yield events
        except ModelUnavailable as error:
            if error.retry_after_s is None:
                error.retry_after_s = delay.seconds
            raise


async def _events(answer: AsyncIterator[Any], turn: Turn) -> AsyncGenerator[ModelEvent]:
    async for value in answer:
        for chunk in cast("list[Any]", value) if isinstance(value, list) else (value,):
            for event in _checked(turn.feed(chunk)):
                yield event
    for event in _checked(turn.finish()):
        yield event


def _checked(events: Iterator[ModelEvent]) -> list[ModelEvent]:
    try:
        return list(events)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelUnavailable("The upstream's answer is not in Gemini's format.") from error


def _body(call: ModelCall) -> bytes:
    options, _ = gemini_request.options(call)
    # The conversation is most of the body and is JSON already: it is put in as it is.
    tail = encoded(options)
    contents = gemini_messages.join(call.messages)
    return b'{"contents":[' + contents + (b"]," + tail[1:] if options else b"]}")


class _RetryDelay:
    """Reads an error body; Gemini says there, not in a header, how long to wait."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def explain(self, body: Any) -> str | None:  # noqa: ANN401 - whatever the upstream sent
        values = cast("list[Json]", body if isinstance(body, list) else [body])
        error: Json = values[0]["error"] if values else {}
        details: list[Json] = error.get("details") or []
        for detail in details:
            delay = detail.get("retryDelay")
            if isinstance(delay, str) and re.fullmatch(r"\d+(\.\d+)?s", delay):
                self.seconds = float(delay[:-1])
        return error.get("message")
