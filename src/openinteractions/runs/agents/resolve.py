"""From a request that names an agent to what its run is to be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final
from uuid import UUID

from openinteractions.errors import Invalid
from openinteractions.models.port import Json, Warning  # noqa: A004 - the contract's word
from openinteractions.resources.agents.service import Agents, Definition
from openinteractions.runs.agents import builtin, prompt
from openinteractions.runs.agents.builtin import Builtin
from openinteractions.runs.brief import Brief, Situation
from openinteractions.wire.check import model_id
from openinteractions.wire.create import CreateInteraction
from openinteractions.wire.options import unknown_options

_LIMITS: Final = ("max_total_tokens", "max_cost_usd", "max_steps", "max_seconds", "approve")
_BRIEF_BELOW_TOKENS: Final = 16_000
"""Windows smaller than this get short instructions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """The agent of a request."""

    base: Builtin
    custom: Definition | None
    """Its definition, where it is not built in."""

    @property
    def name(self) -> str:
        """As the caller knows it."""
        return self.base.id if self.custom is None else self.custom.id


async def find(agents: Agents, project_id: UUID, request: CreateInteraction) -> Agent:
    """The agent that a request names.

    Raises:
        NotFound: There is none of this id, or not in this version.
        Invalid: Something in the request does not go with it.
    """
    assert request.agent is not None
    config = request.agent_config or {}
    base = builtin.find(request.agent)
    custom = None
    if base is None:
        name = request.agent.rpartition("/")[2]
        if "version" in config and "@" not in name:
            name = f"{name}@{config['version']}"
        custom = await agents.find(project_id, name)
        base = builtin.find(custom.base_agent)
        assert base is not None
    agent = Agent(base=base, custom=custom)
    _check(agent, request, config)
    return agent


def _check(agent: Agent, request: CreateInteraction, config: Json) -> None:
    base = agent.base
    if not request.store:
        raise Invalid("'agent' needs 'store': an agent's run outlives its request.")
    if base.background_only and not request.background:
        raise Invalid(f"The agent '{agent.name}' needs 'background' to be true.")
    kind = config.get("type", base.config_type)
    if kind not in (base.config_type, "dynamic"):
        raise Invalid(
            f"Invalid value at 'agent_config.type': the agent '{agent.name}' takes "
            f"'{base.config_type}' or 'dynamic'."
        )
    if agent.custom is not None and "model" in config:
        raise Invalid(
            f"'agent_config.model' is fixed by the agent '{agent.name}': change the agent instead."
        )
    if "version" in config and agent.custom is None:
        raise Invalid(f"'agent_config.version': the agent '{agent.name}' has no versions.")
    if config.get("enable_bigquery_tool"):
        raise Invalid("'agent_config.enable_bigquery_tool' is not supported by this server.")
    for number, tool in enumerate(request.tools):
        if tool["type"] not in base.allowed:
            raise Invalid(
                f"The tool '{tool['type']}' at 'tools[{number}]' is not supported by the agent "
                f"'{agent.name}'."
            )


def brief(
    agent: Agent,
    request: CreateInteraction,
    *,
    default_model: Callable[[], str],
    today: date,
    network: str | Json | None,
) -> Brief:
    """What a run of the agent is to be.

    Args:
        agent: Which.
        request: The caller's.
        default_model: What agents think with, where neither says so.
        today: As the model is told.
        network: The rules of its environment, as far as the request or the agent names them.
    """
    base, custom = agent.base, agent.custom
    own: Json = custom.agent_config if custom is not None else {}
    config: Json = request.agent_config or {}
    said = {**own, **config}
    tools, is_default = _tools(agent, request)
    planning = base.kind == "research" and bool(config.get("collaborative_planning"))

    def instructions(situation: Situation) -> str:
        return prompt.compose(
            kind=base.kind,
            effort=base.effort,
            is_planning=planning,
            has_visuals=said.get("visualization") == "auto",
            tools=situation.tools,
            size="brief" if situation.context_tokens < _BRIEF_BELOW_TOKENS else "full",
            today=today,
            network=network,
            agent_instruction=_instruction(custom, request),
        )

    return Brief(
        models=[
            model_id(name)
            for name in (said.get("model") or default_model(), *said.get("fallback_models", ()))
        ],
        tools=[] if planning else tools,
        is_default=is_default,
        instructions=instructions,
        generation=_generation(base, said),
        limits=_tighter(_limits(config), request.limits),
        most={**_builtin_limits(base), **_limits(own)},
        agent=agent.name,
        guided=base.kind == "general",
        warnings=_warnings(said),
    )


def _instruction(custom: Definition | None, request: CreateInteraction) -> str | None:
    """The caller's replaces the agent's."""
    if request.system_instruction is not None:
        return request.system_instruction
    return None if custom is None else custom.system_instruction


def _tools(agent: Agent, request: CreateInteraction) -> tuple[list[Json], bool]:
    """The tools of a run, and whether they are the agent's own choice."""
    with_environment = [{"type": kind} for kind in agent.base.environment_tools]
    if request.tools_given:
        return _once([*request.tools, *with_environment]), False
    if agent.custom is not None and agent.custom.tools is not None:
        return _once([*agent.custom.tools, *with_environment]), False
    return [*({"type": kind} for kind in agent.base.tools), *with_environment], True


def _once(tools: Sequence[Json]) -> list[Json]:
    """Without built-in tools that are named twice."""
    seen: set[str] = set()
    kept: list[Json] = []
    for tool in tools:
        kind = tool["type"]
        if kind not in ("function", "mcp_server") and kind in seen:
            continue
        seen.add(kind)
        kept.append(tool)
    return kept


def _generation(base: Builtin, said: Mapping[str, Any]) -> Json:
    generation: Json = dict(base.generation)
    if "thinking_summaries" in said:
        generation["thinking_summaries"] = said["thinking_summaries"]
    return generation


def _tighter(one: Json, other: Json) -> Json:
    """Both limits at once: the smaller of each, and every tool that either wants asked for."""
    merged = {**one, **other}
    for name in one.keys() & other.keys():
        both = one[name], other[name]
        merged[name] = [*both[0], *both[1]] if name == "approve" else min(both)
    return merged


def _limits(config: Json) -> Json:
    return {name: config[name] for name in _LIMITS if name in config}


def _builtin_limits(base: Builtin) -> Json:
    longest = base.limits.max_seconds
    return {} if longest is None else {"max_seconds": longest}


def _warnings(said: Mapping[str, Any]) -> list[Warning]:
    unknown = "This server knows no such option: it was ignored."
    warnings = [
        Warning("ignored", f"agent_config.{name}", unknown) for name in unknown_options(dict(said))
    ]
    if said.get("visualization") == "auto":
        message = "Charts are shown as images in the results of code_execution, not in the report."
        warnings.append(Warning("downgraded", "agent_config.visualization", message))
    return warnings
