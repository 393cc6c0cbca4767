"""The model port over the local server: the OpenAI-compatible wire, plus our function protocol."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, Final, Protocol, cast

from openinteractions.errors import Invalid
from openinteractions.models.local import protocol
from openinteractions.models.openai import OpenAIModel
from openinteractions.models.openai_messages import Dialect
from openinteractions.models.port import (
    Finished,
    Json,
    ModelCall,
    ModelEvent,
    TextDelta,
    ToolCall,
    Warning,  # noqa: A004 - the contract's word for it
)
from openinteractions.models.transport import Upstream

_DEFAULT_OUTPUT_TOKENS: Final = 1024
_PASSED_ON: Final = ("max_output_tokens", "seed", "stop_sequences", "temperature", "top_p")
# Functions are told in words, under their own names.
_DIALECT: Final = Dialect(takes_reasoning=False, name=str)
_MEDIA: Final = frozenset({"image", "audio", "video"})
_TEXT_LIKE: Final = frozenset({"application/json", "application/xml", "application/csv"})


class Servers(Protocol):
    """Whoever runs the model servers."""

    def names(self) -> Sequence[str]:
        """The models that may be asked for."""
        ...

    def use(self, name: str) -> AbstractAsyncContextManager[Upstream]:
        """A running server of this model, for one request.

        Raises:
            ModelUnavailable: It is down or there is no room for it just now.
            ModelRejected: It cannot run here; the message says what to do.
        """
        ...


class LocalModel:
    """All local models; `ModelCall.model` names which."""

    provider: Final = "local"

    def __init__(self, servers: Servers, nowhere: Upstream) -> None:
        self._servers = servers
        # Turning steps into messages needs no server.
        self._wire = OpenAIModel(nowhere, provider=self.provider, official=False, dialect=_DIALECT)

    def compile(self, steps: Sequence[Json], model: str) -> list[bytes]:
        """See the port. Text only."""
        for step in steps:
            _check_text_only(step)
        return self._wire.compile(steps, model)

    def takes_uri(self, content_type: str, uri: str) -> bool:
        """Nothing is fetched."""
        del content_type, uri
        return False

    def check(self, call: ModelCall) -> list[Warning]:
        """See the port."""
        if call.model not in self._servers.names():
            raise _unsupported(call.model, "model")
        for index, tool in enumerate(call.tools):
            if tool.get("type") != "function":
                raise _unsupported(str(tool.get("type")), f"tools[{index}].type")
        for name in call.modalities:
            if name != "text":
                raise _unsupported(name, "response_modalities")
        for entry in call.response_formats:
            raise _unsupported(str(entry.get("type")), "response_format.type")
        return [*_settings(call.generation), *_downgrades(call)]

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[AsyncIterator[ModelEvent]]:
        """See the port."""
        offered = protocol.offer(call.tools, call.tool_choice, call.json_schema)
        offered = protocol.unstick(offered, call.messages)
        async with self._servers.use(call.model) as upstream:
            wire = OpenAIModel(upstream, provider=self.provider, official=False)
            async with wire.stream(_plain(call, offered)) as events:
                if not offered.functions:
                    yield events
                    return
                async with aclosing(_read(events)) as replies:
                    yield replies


def _plain(call: ModelCall, offered: protocol.Offer) -> ModelCall:
    """The call without anything that the server's own wire cannot do with a small model."""
    known = {key: value for key, value in call.generation.items() if key in _PASSED_ON}
    constrained = offered.functions or call.json_schema is not None
    generation = {
        "max_output_tokens": _DEFAULT_OUTPUT_TOKENS,
        **({"temperature": 0} if constrained else {}),
        **{key: value for key, value in known.items() if value is not None},
    }
    if offered.functions:
        # It would cut the JSON around the text.
        generation.pop("stop_sequences", None)
    return replace(
        call,
        messages=protocol.render(call.messages, offered),
        system=protocol.instructions(offered, call.system) if offered.functions else call.system,
        tools=(),
        tool_choice=None,
        generation=generation,
        json_schema=protocol.schema(offered) if offered.functions else call.json_schema,
        safety_settings=(),
        service_tier=None,
    )


async def _read(events: AsyncIterator[ModelEvent]) -> AsyncGenerator[ModelEvent]:
    """Turn constrained replies back into text and calls."""
    reader = protocol.ReplyReader()
    async for event in events:
        match event:
            case TextDelta(text):
                shown = reader.feed(text)
                if shown:
                    yield TextDelta(shown)
            case Finished():
                last = reader.finish()
                # A call that the token limit cut off is no call.
                cut = isinstance(last, ToolCall) and last.malformed and event.reason == "max_tokens"
                if last is not None and not cut:
                    yield last
                called = isinstance(last, ToolCall) and not cut
                yield replace(event, reason="tool_calls") if called else event
            case _:
                yield event


def _settings(generation: Mapping[str, Any]) -> Iterable[Warning]:
    """Warnings about settings that change nothing here; those that ask for media are refused."""
    for name, value in generation.items():
        if value in (None, [], {}) or name in _PASSED_ON:
            continue
        if name == "thinking_level" or (name == "thinking_summaries" and value == "auto"):
            yield _ignored(f"generation_config.{name}", "The local models do not think.")
        elif name.endswith("_config"):
            raise Invalid(f"The field 'generation_config.{name}' is not supported with this model.")


def _downgrades(call: ModelCall) -> Iterable[Warning]:
    if call.safety_settings:
        yield _ignored("safety_settings", "The local models have no safety filter.")
    if call.service_tier not in (None, "standard"):
        yield _ignored("service_tier", "The local models have one tier.")
    offered = protocol.offer(call.tools, call.tool_choice, None)
    if offered.functions and call.generation.get("stop_sequences"):
        yield _ignored("generation_config.stop_sequences", "Left out where functions are offered.")


def _ignored(field: str, why: str) -> Warning:
    return Warning(code="downgraded", field=field, message=why)


def _check_text_only(step: Json) -> None:
    for name in ("content", "result"):
        content: Any = step.get(name)
        blocks = cast("list[Any]", content) if isinstance(content, list) else []
        for block in blocks:
            if isinstance(block, dict):
                _check_block(cast("Json", block))


def _check_block(block: Json) -> None:
    kind = str(block.get("type"))
    if kind in _MEDIA:
        raise _unsupported(kind, "content.type")
    if kind == "document":
        mime = str(block.get("mime_type")).partition(";")[0].strip().lower()
        if not mime.startswith("text/") and mime not in _TEXT_LIKE:
            raise _unsupported(mime, "content.mime_type")


def _unsupported(value: str, field: str) -> Invalid:
    return Invalid(f"The value '{value}' is not supported for '{field}' with this model.")
