"""A `ModelCall` as the options of an Anthropic request, and what of it cannot be honoured."""

from collections.abc import Sequence
from typing import Any, Final

import orjson

from openinteractions.errors import Invalid
from openinteractions.models import anthropic_schema
from openinteractions.models.anthropic_messages import RESULTS_PREFIX, tools_used
from openinteractions.models.anthropic_models import Traits, traits
from openinteractions.models.calls import function_name
from openinteractions.models.function_schema import LAID_OPEN, as_object
from openinteractions.models.port import (
    THOUGHTS_AS_GIVEN,
    Json,
    ModelCall,
    Warning,  # noqa: A004 - the port's word
)

# Tokens to think with, for models that want a number. 1,024 is the least that the vendor takes.
_BUDGETS: Final = {"minimal": 1024, "low": 4096, "medium": 8192, "high": 16_384, "xhigh": 23_552}
_LEAST_BUDGET: Final = 1024
_ANSWER_ROOM: Final = 8192
_ASSISTANT: Final = b'{"role":"assistant","content":[{"type":'
_THINKS: Final = (_ASSISTANT + b'"thinking"', _ASSISTANT + b'"redacted_thinking"')
_TIERS: Final = {"standard": "standard_only", "priority": "auto"}
_HANDLED: Final = frozenset(
    {
        "max_output_tokens",
        "stop_sequences",
        "temperature",
        "top_p",
        "top_k",
        "thinking_level",
        "thinking_summaries",
    }
)
_NATIVE: Final = {
    "google_search": {"type": "web_search_20250305", "name": "web_search"},
    "url_context": {"type": "web_fetch_20250910", "name": "web_fetch"},
}
_CACHE_CONTROL: Final = {"type": "ephemeral"}
_JSON_ONLY: Final = "Answer with one JSON document and nothing else."


def options(call: ModelCall) -> tuple[Json, list[Warning]]:
    """Everything of a request's body but its `messages`, and what was downgraded on the way.

    Raises:
        Invalid: Something that Anthropic cannot do at all.
    """
    request = _Request(call)
    return request.body, request.warnings


def caches(call: ModelCall) -> bool:
    """Whether the prompt will be sent again, longer: marking it pays from the second time on."""
    return bool(call.tools) or len(call.messages) > 1


class _Request:
    def __init__(self, call: ModelCall) -> None:
        self._call = call
        self._given = {name: value for name, value in call.generation.items() if value is not None}
        self._traits: Traits = traits(call.model)
        self._system = [call.system] if call.system else []
        self._effort: Json = {}
        self.warnings: list[Warning] = []
        self.body: Json = {"model": call.model, "stream": True}
        self._refuse_media()
        self.body["max_tokens"] = self._given.get("max_output_tokens") or self._traits.max_tokens
        self._tools()
        self._think()
        self._sample()
        self._format()
        self._rest()
        if self._system:
            block: Json = {"type": "text", "text": "\n\n".join(self._system)}
            if caches(call):
                block["cache_control"] = _CACHE_CONTROL
            self.body["system"] = [block]

    def _warn(self, field: str, message: str) -> None:
        self.warnings.append(Warning("downgraded", field, message))

    def _refuse_media(self) -> None:
        for index, wanted in enumerate(self._call.response_formats):
            raise Invalid(
                f"The value '{wanted['type']}' is not supported for "
                f"'response_format[{index}].type' with this model."
            )
        for index, modality in enumerate(self._call.modalities):
            if modality != "text":
                raise Invalid(
                    f"The value '{modality}' is not supported for 'response_modalities[{index}]' "
                    "with this model."
                )

    # Tools ------------------------------------------------------------------------------------

    def _tools(self) -> None:
        tools = [self._tool(tool, index) for index, tool in enumerate(self._call.tools)]
        choice = self._call.tool_choice
        if isinstance(choice, dict):
            allowed = choice["allowed_tools"]
            names = {function_name(name) for name in allowed.get("tools") or ()}
            tools = [tool for tool in tools if tool["name"] in names or "type" in tool]
            choice = allowed.get("mode") or "auto"
        if tools:
            self.body["tools"] = tools
            self._choose(choice)
            return
        if choice not in (None, "auto", "none"):
            self._warn("generation_config.tool_choice", "It needs a tool to choose.")
        used = tools_used(self._call.messages)
        if used:
            # Gateways refuse uses of tools that the request does not define.
            schema: Json = {"type": "object", "properties": {}}
            self.body["tools"] = [{"name": name, "input_schema": schema} for name in used]
            self.body["tool_choice"] = {"type": "none"}

    def _choose(self, choice: str | None) -> None:
        if choice == "validated":
            self._warn(
                "generation_config.tool_choice",
                "'validated' became 'auto': the arguments are not checked against the schema.",
            )
        if choice is not None:
            self.body["tool_choice"] = {"type": "auto" if choice == "validated" else choice}

    def _tool(self, tool: Json, index: int) -> Json:
        kind: str = tool["type"]
        if kind == "function":
            schema, is_less = as_object(tool.get("parameters"))
            if is_less:
                self._warn(f"tools.{tool['name']}.parameters", LAID_OPEN)
            described: Json = (
                {"description": tool["description"]} if tool.get("description") else {}
            )
            return {"name": function_name(tool["name"]), **described, "input_schema": schema}
        if kind not in _NATIVE:
            raise Invalid(
                f"The value '{kind}' is not supported for 'tools[{index}].type' with this model."
            )
        if set(tool.get("search_types") or ()) - {"web_search"}:
            self._warn(f"tools[{index}].search_types", "Only the web can be searched.")
        return dict(_NATIVE[kind])

    # Thinking ---------------------------------------------------------------------------------

    def _think(self) -> None:
        level: str | None = self._given.get("thinking_level")
        summaries = self._given.get("thinking_summaries")
        shown = summaries == "auto" or (summaries == THOUGHTS_AS_GIVEN and self._traits.thinks)
        field = "generation_config.thinking_level"
        if self._traits.thinking == "adaptive":
            self._adapt(level, shown=shown)
        elif level is None:
            return
        elif self._traits.thinking == "none":
            self._warn(field, "This model does not think.")
        elif self._forced():
            self._warn(field, "This model cannot think when it must call a tool.")
        elif _continues_without_thought(self._call.messages):
            self._warn(field, "The turn in progress was begun without this model's thoughts.")
        else:
            self._budget(level, field)

    def _adapt(self, level: str | None, *, shown: bool) -> None:
        if level is not None:
            effort = level
            if level == "minimal":
                effort = "low"
            elif level == "xhigh" and not self._traits.xhigh:
                effort = "high"
            if effort != level:
                field = "generation_config.thinking_level"
                self._warn(field, f"'{level}' became '{effort}'.")
            self._effort = {"effort": effort}
        if (level is None and not shown) or self._forced():
            return
        # Newer models hide their thinking unless told otherwise; hidden, it need not be sent.
        display = "summarized" if shown else "omitted"
        self.body["thinking"] = {"type": "adaptive", "display": display}

    def _budget(self, level: str, field: str) -> None:
        # The budget is part of `max_tokens`.
        budget = _BUDGETS[level]
        asked: int | None = self._given.get("max_output_tokens")
        if asked is None:
            self.body["max_tokens"] = max(self.body["max_tokens"], budget + _ANSWER_ROOM)
        elif asked // 2 < _LEAST_BUDGET:
            self._warn(field, "'max_output_tokens' leaves no room to think.")
            return
        elif asked // 2 < budget:
            budget = asked // 2
            self._warn(field, f"'max_output_tokens' leaves {budget} tokens to think.")
        self.body["thinking"] = {"type": "enabled", "budget_tokens": budget}

    def _forced(self) -> bool:
        return self.body.get("tool_choice", {}).get("type") == "any"

    # The rest ---------------------------------------------------------------------------------

    def _sample(self) -> None:
        given = self._given
        if "stop_sequences" in given:
            self.body["stop_sequences"] = given["stop_sequences"]
        sampling = [name for name in ("temperature", "top_p", "top_k") if name in given]
        if not self._traits.sampling or "thinking" in self.body:
            why = "when it thinks" if self._traits.sampling else "at all"
            for name in sampling:
                self._warn(f"generation_config.{name}", f"This model does not take it {why}.")
            return
        for name in sampling:
            self.body[name] = given[name]
        if self.body.get("temperature", 0) > 1:
            self.body["temperature"] = 1.0
            self._warn("generation_config.temperature", "This model takes 1 at most.")
        if not self._traits.both_samplings and {"temperature", "top_p"} <= self.body.keys():
            del self.body["top_p"]
            self._warn("generation_config.top_p", "This model does not take it with temperature.")

    def _format(self) -> None:
        config = dict(self._effort)
        schema = self._call.json_schema
        if schema and self._traits.schemas:
            closed, dropped = anthropic_schema.closed(schema)
            config["format"] = {"type": "json_schema", "schema": closed}
            for keyword in dropped:
                self._warn("response_format.schema", f"'{keyword}' is not enforced as it stands.")
        elif schema is not None:
            wanted = f" It must follow this schema: {orjson.dumps(schema).decode()}"
            self._system.append(_JSON_ONLY + (wanted if schema else ""))
            self._warn("response_format", "The model is asked for JSON, but not held to it.")
        if config:
            self.body["output_config"] = config

    def _rest(self) -> None:
        call = self._call
        for name in self._given.keys() - _HANDLED:
            self._warn(f"generation_config.{name}", f"There is no '{name}'; it was left out.")
        if call.safety_settings:
            self._warn("safety_settings", "This vendor's filters cannot be set.")
        if call.service_tier in _TIERS:
            self.body["service_tier"] = _TIERS[call.service_tier]
        elif call.service_tier is not None:
            self._warn("service_tier", f"There is no tier '{call.service_tier}'.")


def _continues_without_thought(messages: Sequence[bytes]) -> bool:
    # With a budget, the turn that the last results answer must begin with a thought.
    if not messages or not messages[-1].startswith(RESULTS_PREFIX):
        return False
    for message in reversed(messages):
        if message.startswith(_ASSISTANT):
            return not message.startswith(_THINKS)
    return False


def uses_server_tools(body: Json) -> bool:
    """Whether Anthropic may run tools of its own for this request."""
    tools: list[dict[str, Any]] = body.get("tools") or []
    return any("type" in tool for tool in tools)
