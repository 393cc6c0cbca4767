"""From a run's spec to one call of a model."""

from collections.abc import Sequence

from openinteractions.loop import deferred
from openinteractions.loop.limits import estimate_tokens
from openinteractions.loop.spec import RunSpec
from openinteractions.models.catalog import Target
from openinteractions.models.port import Json, ModelCall
from openinteractions.tools.port import Means
from openinteractions.tools.toolbox import toolbox


def call_for(
    spec: RunSpec,
    target: Target,
    messages: Sequence[bytes],
    generation: Json,
    *,
    tools: Sequence[Json] | None = None,
    is_free: bool = False,
) -> ModelCall:
    """The call that a spec makes of a model.

    Args:
        spec: What the run was told.
        target: Which model.
        messages: The conversation.
        generation: The generation config.
        tools: What the model can call, where it is not as at the beginning.
        is_free: The model has called a tool, so it need not be made to call one again.
    """
    if tools is None:
        own = toolbox(spec.own_tools, Means()).declarations()
        tools = [*deferred.declared(spec.tools, ()), *own]
    return ModelCall(
        model=target.model,
        messages=messages,
        system=spec.system,
        tools=tools,
        tool_choice=_freed(spec.tool_choice) if is_free else spec.tool_choice,
        generation=generation,
        json_schema=spec.json_schema,
        response_formats=spec.response_formats,
        modalities=spec.modalities,
        safety_settings=spec.safety_settings,
        service_tier=spec.service_tier,
    )


def about(call: ModelCall, said: str) -> Json:
    """About what a call took that broke off before it said so."""
    given = estimate_tokens(call.messages, call.system, call.tools)
    written = len(said) // 4 + 1
    return {
        "total_input_tokens": given,
        "total_output_tokens": written,
        "total_tokens": given + written,
    }


def _freed(choice: str | Json | None) -> str | Json | None:
    """The choice of tools without the demand to call one: it would never come to an answer."""
    if choice == "any":
        return "auto"
    if isinstance(choice, dict) and choice["allowed_tools"].get("mode") == "any":
        return {"allowed_tools": {**choice["allowed_tools"], "mode": "auto"}}
    return choice
