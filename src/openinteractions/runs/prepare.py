"""From a request to the run spec: aliases resolved, limits decided, everything checked up front."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from openinteractions.errors import Invalid
from openinteractions.loop.approval import carried_out, means
from openinteractions.loop.asking import call_for
from openinteractions.loop.context import for_model
from openinteractions.loop.spec import Limits, RunSpec
from openinteractions.loop.structured import enforced, require_schema
from openinteractions.models import gemini_models
from openinteractions.models.catalog import Catalog, Target
from openinteractions.models.port import Json, Warning  # noqa: A004 - the contract's word
from openinteractions.resources.files import media
from openinteractions.resources.interactions.runner import Prepared
from openinteractions.runs.assign import Powers, assign
from openinteractions.runs.brief import Brief, Situation
from openinteractions.runs.history import Inliner
from openinteractions.tools.port import Means
from openinteractions.tools.toolbox import Toolbox, toolbox
from openinteractions.wire.create import CreateInteraction

_NANO = 1_000_000_000
_NOT_IN_ENVIRONMENT = Warning(
    "environment_unused",
    "environment",
    "The model's vendor runs the code itself: it has neither the files nor the network rules and "
    "variables of this environment. The operator can have it run here (setting "
    "sandbox.code_execution).",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `prepare` has worked out already, for a run that starts in the same process."""

    spec: RunSpec
    target: str
    """Whose messages `compiled` are."""
    compiled: list[bytes]
    """The input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a request meets here."""

    catalog: Catalog
    inliner: Inliner
    defaults: Limits
    """What the server itself allows a run."""
    base_url: str
    powers: Powers
    pending: Sequence[Json] = ()
    """Calls of the interaction before that the input answers."""


async def prepare(request: CreateInteraction, brief: Brief, around: Surroundings) -> Prepared:
    """Resolve a request and make sure that its model can serve it.

    Raises:
        Invalid: Something in it cannot be honoured; the message names it.
        NotFound: No such model.
    """
    _refuse_unknown(request)
    catalog = around.catalog
    chain = _chain(brief.models, catalog)
    kinds = {catalog.providers[catalog.open(name).provider] for name in chain}
    target = catalog.open(chain[0])
    asks: list[str] = [*brief.most.get("approve", ()), *brief.limits.get("approve", ())]
    if asks and not request.store:
        raise Invalid("'approve' needs 'store': what was asked is answered by another request.")
    tools = assign(
        brief.tools,
        kinds,
        replace(around.powers, mixes=not gemini_models.is_old(target.model)),
        is_agent=brief.agent is not None,
        is_default=brief.is_default,
        approve=asks,
    )
    if request.json_schema:
        require_schema(request.json_schema, "response_format.schema")
    asked = limits(brief.limits, limits(brief.most, around.defaults))
    box = toolbox(tools.own, Means())
    spec = RunSpec(
        chain=chain,
        system=brief.instructions(
            Situation(tools=tools.all_names(), context_tokens=target.context_tokens)
        ),
        tools=tools.passed,
        own_tools=tools.own,
        tool_choice=request.tool_choice,
        generation=brief.generation,
        json_schema=None if request.json_schema is None else enforced(request.json_schema),
        response_formats=request.media_formats,
        modalities=request.response_modalities,
        safety_settings=request.safety_settings,
        service_tier=request.service_tier,
        media_url=around.base_url,
        limits=asked,
        agent=brief.agent,
        guided=brief.guided,
        approve=_approve(asks, box, tools.passed),
        approved=carried_out(around.pending, request.steps, box),
    )
    _require_price(spec, catalog)
    steps = await _fetched(request.steps, target, around.inliner)
    shown = for_model(steps, provider=target.provider, model=target.model)
    compiled = target.adapter.compile(await around.inliner(shown, target), target.model)
    warnings = [*brief.warnings, *tools.warnings]
    warnings += target.adapter.check(call_for(spec, target, (), spec.generation))
    warnings += _unread_hints(steps, catalog.providers[target.provider])
    if request.environment is not None and any(
        tool["type"] == "code_execution" for tool in tools.passed
    ):
        warnings.append(_NOT_IN_ENVIRONMENT)
    is_agent = brief.agent is not None
    return Prepared(
        spec=spec.dump(),
        plan=Plan(spec, target.id, compiled),
        provider=target.provider,
        steps=steps,
        warnings=[asdict(warning) for warning in warnings],
        secrets=around.powers.secrets,
        consents=[call["call_id"] for call in spec.approved],
        needs_environment=tools.needs_sandbox or is_agent or request.environment is not None,
        needs_sandbox=tools.needs_sandbox,
    )


def _chain(models: Sequence[str], catalog: Catalog) -> list[str]:
    """What is asked, then what takes over."""
    first = catalog.resolve(models[0])
    rest = [target for name in models[1:] for target in catalog.resolve(name)]
    return list(dict.fromkeys([*first, *rest]))


def _approve(patterns: Sequence[str], tools: Toolbox, passed: Sequence[Json]) -> list[str]:
    """The patterns of tools that need consent; one that means none is a slip."""
    names = [each["name"] for each in tools.declarations()]
    for pattern in patterns:
        kinds = [tool["type"] for tool in passed if tool["type"] != "function"]
        vendors = [kind for kind in kinds if fnmatchcase(kind, pattern.lower())]
        if vendors:
            raise Invalid(
                f"'approve' cannot hold for '{vendors[0]}': here it is run by the model's vendor."
            )
        if not any(means(pattern, name, tools) for name in names):
            known = ", ".join(names) or "none"
            raise Invalid(
                f"'approve' names '{pattern[:100]}', which is no tool that this server runs here. "
                f"There are: {known}."
            )
    return list(dict.fromkeys(patterns))


def limits(asked: Json, most: Limits) -> Limits:
    """The limits that were asked for, within what there is at most."""
    cost = asked.get("max_cost_usd")
    return Limits(
        max_total_tokens=_least(asked.get("max_total_tokens"), most.max_total_tokens),
        max_cost_nanousd=_least(
            None if cost is None else round(cost * _NANO), most.max_cost_nanousd
        ),
        max_steps=_least(asked.get("max_steps"), most.max_steps),
        max_seconds=_least(asked.get("max_seconds"), most.max_seconds),
    )


def _least(asked: Any, most: Any) -> Any:  # noqa: ANN401 - int or float
    return most if asked is None or (most is not None and most < asked) else asked


def _refuse_unknown(request: CreateInteraction) -> None:
    """What this server does not have gets a clear answer, never silence (invariant 10)."""
    if request.cached_content is not None:
        raise Invalid("'cached_content' is not supported: caches are the vendor's own.")
    if not request.store and any(f.get("delivery") == "uri" for f in request.media_formats):
        raise Invalid("'response_format.delivery' can only be 'uri' where 'store' is not false.")
    if not request.store and names_one(request.environment):
        raise Invalid(
            "'environment' needs 'store' where it names one that is there: interactions in one "
            'environment take turns. "remote", or a configuration, gives it one of its own, which '
            "is deleted at its end."
        )
    if request.continuation_token is not None:
        raise Invalid(
            "Invalid value at 'continuation_token': this server has issued no such token."
        )


def names_one(environment: str | Json | None) -> bool:
    """Whether a request works in an environment that was there before it."""
    if isinstance(environment, dict):
        return "environment_id" in environment
    return environment is not None and environment.lower() != "remote"


def _require_price(spec: RunSpec, catalog: Catalog) -> None:
    if spec.limits.max_cost_nanousd is None:
        return
    for name in spec.chain:
        if catalog.open(name).price is None:
            raise Invalid(
                f"'max_cost_usd' cannot be kept: no price is known for '{name}'. "
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
