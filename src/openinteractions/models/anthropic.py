"""Anthropic's Messages API: `POST {base}/v1/messages`, always streamed.

The request is built in `anthropic_request`, the conversation in `anthropic_messages`, the answer is
read in `anthropic_stream`; `anthropic_models` says what the generations of Claude differ in.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

import orjson

from openinteractions.errors import ModelUnavailable
from openinteractions.models import anthropic_messages, anthropic_request
from openinteractions.models.anthropic_stream import Turn
from openinteractions.models.calls import own_names
from openinteractions.models.encoded import encoded
from openinteractions.models.port import (
    Json,
    ModelCall,
    ModelEvent,
    Warning,  # noqa: A004 - the port's word
)
from openinteractions.models.transport import Upstream

_VERSIONED: Final = re.compile(r"/v\d+$")
_MAX_PAUSES: Final = 10


def headers(api_key: str | None) -> dict[str, str]:
    """The version of the wire, and the credentials; none for a gateway that wants no key."""
    version = {"anthropic-version": "2023-06-01"}
    return {**version, "x-api-key": api_key} if api_key else version


class AnthropicModel:
    """`Model` over the Messages API."""

    def __init__(self, upstream: Upstream, *, provider: str) -> None:
        self._upstream = upstream
        self.provider = provider
        base_url = upstream.base_url
        self._path = "/messages" if _VERSIONED.search(base_url) else "/v1/messages"

    def compile(self, steps: Sequence[Json], model: str) -> list[bytes]:  # noqa: ARG002 - all alike
        """See `Model.compile`."""
        return anthropic_messages.compile_messages(steps)

    def takes_uri(self, content_type: str, uri: str) -> bool:
        """See `Model.takes_uri`."""
        return anthropic_messages.takes_uri(content_type, uri)

    def check(self, call: ModelCall) -> list[Warning]:
        """See `Model.check`."""
        return anthropic_request.options(call)[1]

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[AsyncIterator[ModelEvent]]:
        """See `Model.stream`."""
        options, _ = anthropic_request.options(call)
        messages = anthropic_messages.join(call.messages, cache=anthropic_request.caches(call))
        turn = Turn(
            show_thoughts=call.shows_thoughts,
            keep_blocks=anthropic_request.uses_server_tools(options),
            names=own_names(call.tools),
        )
        body = _body(options, messages)
        async with (
            self._upstream.post(self._path, body, explain=_explain) as answer,
            aclosing(self._events(answer, turn, options, messages)) as events,
        ):
            yield events

    async def _events(
        self, answer: AsyncIterator[Any], turn: Turn, options: Json, messages: bytes
    ) -> AsyncGenerator[ModelEvent]:
        async for event in _read(answer, turn):
            yield event
        for _ in range(_MAX_PAUSES):
            if not turn.is_paused():
                break
            # Anthropic goes on where it paused when it gets its own words back.
            so_far = orjson.dumps({"role": "assistant", "content": turn.resume()})
            body = _body(options, messages + b"," + so_far)
            async with self._upstream.post(self._path, body, explain=_explain) as more:
                async for event in _read(more, turn):
                    yield event
        yield turn.finish()


async def _read(answer: AsyncIterator[Any], turn: Turn) -> AsyncGenerator[ModelEvent]:
    async for value in answer:
        for event in _checked(turn.feed(value)):
            yield event


def _checked(events: Iterator[ModelEvent]) -> list[ModelEvent]:
    try:
        return list(events)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelUnavailable("The upstream's answer is not in Anthropic's format.") from error


def _body(options: Json, messages: bytes) -> bytes:
    # The conversation is most of the body and is JSON already: it is put in as it is.
    return b'{"messages":[' + messages + b"]," + encoded(options)[1:]


def _explain(body: Any) -> str | None:  # noqa: ANN401 - whatever the upstream sent
    return body["error"].get("message")
