"""One call of a model: from a run's spec, into a turn, onto the account."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from openinteractions.errors import ModelUnavailable
from openinteractions.loop import deferred
from openinteractions.loop.limits import estimate_tokens
from openinteractions.loop.meter import Meter
from openinteractions.loop.spec import RunSpec
from openinteractions.loop.turn import Turn
from openinteractions.models.catalog import Target
from openinteractions.models.port import Json, Media, ModelCall
from openinteractions.tools.port import Means
from openinteractions.tools.toolbox import toolbox


class Account(Protocol):
    """Counts what a call has taken."""

    def __call__(self, target: Target, usage: Json) -> Awaitable[None]:
        """Add a call's usage to the run's."""
        ...


async def asked(
    target: Target,
    call: ModelCall,
    turn: Turn,
    account: Account,
    *,
    delivered: Callable[[Media], Awaitable[Media]] | None = None,
) -> None:
    """Have a model answer into a turn. What it took is accounted, however that ends.

    Where the upstream had begun and did not say what it took, that is an estimate: it was billed.

    Args:
        target: Which model.
        call: What it is asked.
        turn: Takes the answer.
        account: Counts what the call has taken.
        delivered: What becomes of a medium before the turn takes it.

    Raises:
        ModelError: It did not answer, or not to the end.
    """
    meter = Meter(target)
    try:
        async with meter, target.adapter.stream(call) as events:
            async for event in events:
                meter.event(event)
                if delivered is not None and isinstance(event, Media):
                    event = await delivered(event)  # noqa: PLW2901 - the turn's own form of it
                turn.add(event)
        if turn.finished is None:
            raise ModelUnavailable("The upstream's answer ended early.")
    finally:
        if meter.has_begun and not turn.taken:
            turn.taken = _about(call, turn.text())
        await account(target, turn.taken)


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


def _about(call: ModelCall, said: str) -> Json:
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
