"""The adapter for OpenAI and every server that speaks its chat completions.

`POST {base_url}/chat/completions`, always streamed. Known to be spoken by OpenAI, vLLM, Ollama,
llama.cpp, LiteLLM and OpenRouter. What only api.openai.com understands is sent only there
(`official`); everything else gets the oldest form of each field, which all of them take:

    field              official                  elsewhere
    max_output_tokens  max_completion_tokens     max_tokens
    thinking_level     reasoning_effort          the same, held to low, medium, high
    allowed_tools      tool_choice.allowed_tools only those tools are sent
    service_tier       service_tier              left out
    image output       not on this wire          modalities: ["image", "text"]
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

from openinteractions.errors import Invalid
from openinteractions.models.calls import function_name, own_names
from openinteractions.models.encoded import encoded
from openinteractions.models.function_schema import LAID_OPEN, as_object
from openinteractions.models.openai_chunks import Turn, explain
from openinteractions.models.openai_messages import Dialect, compile_steps
from openinteractions.models.openai_reasoning import blank_for
from openinteractions.models.port import Json, ModelCall, ModelEvent, Warning  # noqa: A004
from openinteractions.models.transport import Answer, Upstream

_MODES = {"auto": "auto", "any": "required", "none": "none", "validated": "auto"}
_TIERS = {"flex": "flex", "priority": "priority", "standard": "default", "deferred": "flex"}
_COMMON_EFFORT = {"minimal": "low", "xhigh": "high"}
_DOWNGRADE = "downgraded"
_SAMPLING = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
_MAX_TOOLS = 128
_JSON_HINT = "Answer with one JSON document and nothing else."


def headers(api_key: str | None) -> dict[str, str]:
    """The credentials' headers; none for a server that wants no key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class OpenAIModel:
    """One OpenAI-compatible provider, as a `Model`."""

    def __init__(
        self, upstream: Upstream, *, provider: str, official: bool, dialect: Dialect | None = None
    ) -> None:
        self._upstream = upstream
        self._official = official
        self._dialect = dialect or Dialect(
            takes_reasoning=not official, blank_reasoning=blank_for(upstream.base_url)
        )
        self.provider = provider
        """The provider's name in the settings."""

    def compile(self, steps: Sequence[Json], model: str) -> list[bytes]:  # noqa: ARG002 - the port
        """Turn one interaction's steps into chat messages; see `Model.compile`."""
        return compile_steps(steps, self._dialect)

    def takes_uri(self, content_type: str, uri: str) -> bool:
        """Only OpenAI itself is sure to fetch, and only images."""
        is_image = content_type.partition("/")[0] == "image"
        return self._official and is_image and uri.startswith(("https://", "http://"))

    def check(self, call: ModelCall) -> list[Warning]:
        """Say what of this call will be downgraded; see `Model.check`."""
        _refuse_tools(call.tools, official=self._official)
        _refuse_outputs(call, official=self._official)
        return [
            *_tool_warnings(call),
            *_schema_warnings(call),
            *self._generation_warnings(call),
            *self._tier_warnings(call.service_tier),
            *_safety_warnings(call),
        ]

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[AsyncIterator[ModelEvent]]:
        """Run one turn; see `Model.stream`."""
        path, body = "/chat/completions", self._body(call)
        async with (
            self._upstream.post(path, body, explain=explain) as answer,
            aclosing(_events(call, answer, keeps_reasoning=not self._official)) as events,
        ):
            yield events

    def _body(self, call: ModelCall) -> bytes:
        """The request: compiled messages are spliced in, never parsed again."""
        options: Json = {
            "model": call.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        system = call.system or ""
        if call.json_schema is not None:
            options["response_format"] = _response_format(call.json_schema)
            if not call.json_schema:
                # OpenAI refuses `json_object` where no message mentions JSON.
                system = f"{system}\n\n{_JSON_HINT}".lstrip()
        self._add_tools(options, call)
        self._add_generation(options, call.generation)
        self._add_outputs(options, call)
        if self._official and call.service_tier:
            options["service_tier"] = _TIERS.get(call.service_tier, "auto")
        messages = b",".join(call.messages)
        if system:
            first = encoded({"role": "system", "content": system})
            messages = first + b"," + messages if messages else first
        return b'{"messages":[' + messages + b"]," + encoded(options)[1:]

    def _add_tools(self, options: Json, call: ModelCall) -> None:
        tools, choice = call.tools, call.tool_choice
        allowed: Json | None = None
        if isinstance(choice, dict):
            allowed = cast(Json, choice.get("allowed_tools") or {})
            choice = cast(str, allowed.get("mode") or "auto")
            if not self._official:
                tools = [tool for tool in tools if tool.get("name") in allowed.get("tools", ())]
        if not tools:
            return  # `tool_choice` without tools is an error
        options["tools"] = [_tool(tool) for tool in tools]
        if choice is None:
            return
        options["tool_choice"] = mode = _MODES[choice]
        if allowed and self._official and mode != "none":
            names = [_named(name) for name in allowed.get("tools", ())]
            allowed_tools = {"mode": mode, "tools": names}
            options["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed_tools}

    def _add_generation(self, options: Json, generation: Any) -> None:  # noqa: ANN401 - JSON
        # OpenAI itself has no `top_k`; vLLM, llama.cpp, Ollama and their like do.
        for name in _SAMPLING if self._official else (*_SAMPLING, "top_k"):
            if generation.get(name) is not None:
                options[name] = generation[name]
        if generation.get("stop_sequences"):
            options["stop"] = list(generation["stop_sequences"])
        if generation.get("max_output_tokens") is not None:
            limit = "max_completion_tokens" if self._official else "max_tokens"
            options[limit] = generation["max_output_tokens"]
        level = generation.get("thinking_level")
        if level:
            effort = level if self._official else _COMMON_EFFORT.get(level, level)
            options["reasoning_effort"] = effort

    def _add_outputs(self, options: Json, call: ModelCall) -> None:
        if _wants(call, "audio"):
            voices = _voices(call.generation.get("speech_config"))
            voice = (voices[0].get("voice") if voices else None) or "alloy"
            options["modalities"] = ["text", "audio"]
            # The one format that can be streamed.
            options["audio"] = {"voice": voice.lower(), "format": "pcm16"}
        elif _wants(call, "image"):
            options["modalities"] = ["image", "text"]

    def _generation_warnings(self, call: ModelCall) -> list[Warning]:
        found: list[Warning] = []
        generation = call.generation
        level = generation.get("thinking_level")
        if not self._official and level in _COMMON_EFFORT:
            told = f"Sent as '{_COMMON_EFFORT[level]}', the nearest level that is widely known."
            found.append(_warning("generation_config.thinking_level", told))
        if self._official and generation.get("thinking_summaries") == "auto":
            told = "OpenAI's chat completions do not show summaries of thoughts."
            found.append(_warning("generation_config.thinking_summaries", told))
        if self._official and call.json_schema and not _is_strict(call.json_schema):
            told = (
                "The schema is followed as well as the model can, not enforced: OpenAI enforces"
                " only objects with `additionalProperties: false` and all properties required."
            )
            found.append(_warning("response_format.schema", told))
        if self._official and generation.get("top_k") is not None:
            found.append(_warning("generation_config.top_k", "OpenAI has no 'top_k'; left out."))
        if any(voice.get("language") for voice in _voices(generation.get("speech_config"))):
            told = "The language of the voice is left to the model."
            found.append(_warning("generation_config.speech_config.language", told))
        return found

    def _tier_warnings(self, tier: str | None) -> list[Warning]:
        if tier is None or tier == "standard":
            return []
        if not self._official:
            return [_warning("service_tier", "This provider has no service tiers.")]
        if tier == "deferred":
            return [_warning("service_tier", "Sent as 'flex'.")]
        return []


async def _events(
    call: ModelCall, answer: Answer, *, keeps_reasoning: bool
) -> AsyncGenerator[ModelEvent]:
    turn = Turn(
        show_thoughts=call.shows_thoughts,
        keeps_reasoning=keeps_reasoning,
        names=own_names(call.tools),
    )
    async for batch in answer.batches():
        for chunk in batch:
            for event in turn.feed(chunk):
                yield event
    for event in turn.finish(done=answer.done):
        yield event


def _tool(tool: Json) -> Json:
    parameters, _ = as_object(tool.get("parameters"))
    function: Json = {"name": function_name(tool["name"]), "parameters": parameters}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _named(name: str) -> Json:
    return {"type": "function", "function": {"name": function_name(name)}}


def _response_format(schema: Json) -> Json:
    if not schema:
        return {"type": "json_object"}
    strict = _is_strict(schema)
    named = {"name": "response", "schema": schema, "strict": strict}
    return {"type": "json_schema", "json_schema": named}


def _is_strict(schema: Any) -> bool:  # noqa: ANN401 - any JSON
    """Whether OpenAI's strict mode takes it; a schema outside is refused there, not ignored.

    https://platform.openai.com/docs/guides/structured-outputs#supported-schemas
    """
    if isinstance(schema, list):
        return all(_is_strict(item) for item in cast("list[Any]", schema))
    if not isinstance(schema, dict):
        return True
    node = cast(Json, schema)
    if "properties" in node or node.get("type") == "object":
        names = set(cast(Json, node.get("properties") or {}))
        if node.get("additionalProperties") is not False or names != set(node.get("required", ())):
            return False
    return all(_is_strict(value) for value in node.values())


def _voices(speech: Any) -> list[Json]:  # noqa: ANN401 - both of the contract's forms
    if isinstance(speech, dict):
        speech = cast(Json, speech).get("speakers")
    return cast("list[Json]", speech or [])


def _wants(call: ModelCall, kind: str) -> bool:
    return kind in call.modalities or any(
        entry.get("type") == kind for entry in call.response_formats
    )


def _refuse_tools(tools: Sequence[Json], *, official: bool) -> None:
    for number, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise _unsupported(str(tool.get("type")), f"tools[{number}].type")
    if official and len(tools) > _MAX_TOOLS:
        raise Invalid(
            f"'tools' are {len(tools)} functions, this server's own included: this model takes "
            f"{_MAX_TOOLS} at most."
        )


def _refuse_outputs(call: ModelCall, *, official: bool) -> None:
    known = {"text", "audio"} if official else {"text", "audio", "image"}
    for modality in call.modalities:
        if modality not in known:
            raise _unsupported(modality, "response_modalities")
    for entry in call.response_formats:
        if entry.get("type") not in known:
            raise _unsupported(str(entry.get("type")), "response_format.type")
        _refuse_format(entry)
    for name in ("image_config", "video_config", "transcription_config"):
        if call.generation.get(name):
            raise Invalid(f"'generation_config.{name}' is not supported with this model.")
    if call.generation.get("speech_config"):
        if not _wants(call, "audio"):
            raise Invalid("'generation_config.speech_config' is not supported without audio.")
        if len(_voices(call.generation["speech_config"])) > 1:
            raise Invalid("'generation_config.speech_config' takes one voice with this model.")


def _refuse_format(entry: Json) -> None:
    for name in ("aspect_ratio", "image_size", "bit_rate"):
        if entry.get(name):
            raise Invalid(f"'response_format.{name}' is not supported with this model.")
    if entry.get("delivery") == "uri":
        raise _unsupported("uri", "response_format.delivery")
    if entry.get("type") == "audio" and entry.get("mime_type") not in (None, "audio/l16"):
        raise _unsupported(str(entry["mime_type"]), "response_format.mime_type")
    if entry.get("sample_rate") not in (None, 24000):
        raise _unsupported(str(entry["sample_rate"]), "response_format.sample_rate")


def _tool_warnings(call: ModelCall) -> list[Warning]:
    choice = call.tool_choice
    mode = choice
    if isinstance(choice, dict):
        mode = cast(Json, choice.get("allowed_tools") or {}).get("mode")
    if mode != "validated":
        return []
    told = "Sent as 'auto': this provider does not check arguments against their schema."
    return [_warning("generation_config.tool_choice", told)]


def _schema_warnings(call: ModelCall) -> list[Warning]:
    return [
        _warning(f"tools.{tool['name']}.parameters", LAID_OPEN)
        for tool in call.tools
        if as_object(tool.get("parameters"))[1]
    ]


def _safety_warnings(call: ModelCall) -> list[Warning]:
    if not call.safety_settings:
        return []
    return [_warning("safety_settings", "This provider has no such settings; its own apply.")]


def _warning(field: str, message: str) -> Warning:
    return Warning(code=_DOWNGRADE, field=field, message=message)


def _unsupported(value: str, field: str) -> Invalid:
    return Invalid(f"The value '{value}' is not supported for '{field}' with this model.")
