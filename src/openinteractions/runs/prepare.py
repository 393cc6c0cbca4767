"""From a request to the run spec: aliases resolved, limits decided, everything checked up front."""

from dataclasses import asdict, dataclass
from typing import Any

from openinteractions.errors import Invalid
from openinteractions.loop.context import for_model
from openinteractions.loop.run import call_for
from openinteractions.loop.spec import Limits, RunSpec
from openinteractions.loop.structured import enforced, require_schema
from openinteractions.models.catalog import Catalog, Target
from openinteractions.models.port import Json, Warning  # noqa: A004 - the contract's word
from openinteractions.resources.files import media
from openinteractions.resources.interactions.runner import Prepared
from openinteractions.runs.history import Inliner
from openinteractions.tools.toolbox import SANDBOXED
from openinteractions.wire.create import CreateInteraction

_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What `prepare` has worked out already, for a run that starts in the same process."""

    spec: RunSpec
    target: str
    """Whose messages `compiled` are."""
    compiled: list[bytes]
    """The input."""


async def prepare(
    request: CreateInteraction,
    catalog: Catalog,
    inliner: Inliner,
    *,
    defaults: Limits,
    base_url: str,
    vendor_runs_code: bool,
) -> Prepared:
    """Resolve a request and make sure that its model can serve it.

    Raises:
        Invalid: Something in it cannot be honoured; the message names it.
        NotFound: No such model.
    """
    _refuse_later_features(request)
    assert request.model is not None
    tools = [_tool(tool, number) for number, tool in enumerate(request.tools)]
    chain = catalog.resolve(request.model)
    kinds = {catalog.providers[catalog.open(name).provider] for name in chain}
    is_vendors = vendor_runs_code and kinds == {"gemini"}
    own = [] if is_vendors else [tool for tool in tools if tool["type"] in SANDBOXED]
    _refuse_doubles(request, own)
    if request.json_schema:
        require_schema(request.json_schema, "response_format.schema")
    spec = RunSpec(
        chain=chain,
        system=request.system_instruction,
        tools=[tool for tool in tools if tool not in own],
        own_tools=own,
        tool_choice=request.tool_choice,
        generation=request.generation_config,
        json_schema=None if request.json_schema is None else enforced(request.json_schema),
        response_formats=request.media_formats,
        modalities=request.response_modalities,
        safety_settings=request.safety_settings,
        service_tier=request.service_tier,
        media_url=base_url,
        limits=limits(request.limits, defaults),
    )
    target = catalog.open(spec.chain[0])
    _require_price(spec, catalog)
    steps = await _fetched(request.steps, target, inliner)
    shown = for_model(steps, provider=target.provider, model=target.model)
    compiled = target.adapter.compile(await inliner(shown, target), target.model)
    warnings = target.adapter.check(call_for(spec, target, (), spec.generation))
    warnings += _unread_hints(steps, catalog.providers[target.provider])
    return Prepared(
        spec=spec.dump(),
        plan=Plan(spec, target.id, compiled),
        provider=target.provider,
        steps=steps,
        warnings=[asdict(warning) for warning in warnings],
        needs_environment=bool(own) or request.environment is not None,
        needs_sandbox=bool(own),
    )


def limits(asked: Json, defaults: Limits) -> Limits:
    """The caller's limits within the server's."""
    cost = asked.get("max_cost_usd")
    return Limits(
        max_total_tokens=asked.get("max_total_tokens"),
        max_cost_nanousd=None if cost is None else round(cost * _NANO),
        max_steps=_least(asked.get("max_steps"), defaults.max_steps),
        max_seconds=_least(asked.get("max_seconds"), defaults.max_seconds),
    )


def _least(asked: Any, most: Any) -> Any:  # noqa: ANN401 - int or float
    return most if asked is None or (most is not None and most < asked) else asked


def _refuse_later_features(request: CreateInteraction) -> None:
    """What this version does not have yet gets a clear answer, never silence (invariant 10)."""
    missing = {
        "agent": request.agent is not None,
        "cached_content": request.cached_content is not None,
        f"model '{request.model}'": request.model is not None and _is_agent(request.model),
    }
    for name, is_asked in missing.items():
        if is_asked:
            shown = name if " " in name else f"'{name}'"
            raise Invalid(f"{shown} is not supported by this version of the server yet.")
    if not request.store and any(f.get("delivery") == "uri" for f in request.media_formats):
        raise Invalid("'response_format.delivery' can only be 'uri' where 'store' is not false.")
    if not request.store and request.environment is not None:
        raise Invalid("'environment' needs 'store': interactions in one environment take turns.")
    if request.continuation_token is not None:
        raise Invalid(
            "Invalid value at 'continuation_token': this server has issued no such token."
        )


def _refuse_doubles(request: CreateInteraction, own: list[Json]) -> None:
    """A model tells tools apart by their names."""
    for tool in own:
        for number, other in enumerate(request.tools):
            if other["type"] == "function" and other["name"] == tool["type"]:
                raise Invalid(
                    f"Invalid value at 'tools[{number}].name': '{tool['type']}' is a tool of the "
                    "server's in this request; give the function another name."
                )


def _is_agent(name: str) -> bool:
    """Samples pass the hosted API's agents as `model` too."""
    return name.startswith(("antigravity", "deep-research-", "code-mender"))


def _tool(tool: Json, number: int) -> Json:
    if tool["type"] != "function":
        return tool
    if tool.get("defer_loading"):
        raise Invalid(
            f"'tools[{number}].defer_loading' is not supported by this version of the server yet."
        )
    parameters = tool.get("parameters")
    if not isinstance(parameters, dict):
        return tool
    require_schema(parameters, f"tools[{number}].parameters")  # pyright: ignore[reportUnknownArgumentType]
    return {**tool, "parameters": enforced(parameters)}


def _require_price(spec: RunSpec, catalog: Catalog) -> None:
    if spec.limits.max_cost_nanousd is None:
        return
    for name in spec.chain:
        if catalog.open(name).price is None:
            raise Invalid(
                f"'limits.max_cost_usd' cannot be kept: no price is known for '{name}'. "
                "The operator can set one in [models.prices]."
            )


# Hints on content blocks that a wire format has no word for.
_UNREAD = {
    "gemini": (),
    "openai": ("processing",),
    "anthropic": ("processing", "resolution"),
    "local": ("processing", "resolution"),
}


def _unread_hints(steps: list[Json], kind: str) -> list[Warning]:
    found = {
        name
        for step in steps
        for block in media.blocks(step)
        for name in _UNREAD[kind]
        if name in block
    }
    return [
        Warning("downgraded", f"input.{name}", f"This model's vendor has no '{name}': left out.")
        for name in sorted(found)
    ]


async def _fetched(steps: list[Json], target: Target, inliner: Inliner) -> list[Json]:
    """The input with the bytes of every `uri` that the model does not fetch itself beside it."""
    if not any(
        "uri" in block and not target.adapter.takes_uri(str(block.get("type")), block["uri"])
        for step in steps
        for block in media.blocks(step)
    ):
        return steps
    inlined = await inliner(steps, target)
    for step, full in zip(steps, inlined, strict=True):
        for block, fetched in zip(media.blocks(step), media.blocks(full), strict=True):
            if "uri" in block and "data" in fetched:
                fetched["uri"] = block["uri"]
    return inlined
