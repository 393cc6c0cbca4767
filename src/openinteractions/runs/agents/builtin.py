"""What the ids of the built-in agents stand for.

Ids and defaults are the hosted API's (https://ai.google.dev/gemini-api/docs/antigravity-agent,
https://ai.google.dev/gemini-api/docs/deep-research). Its code-mender agents are not served.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from openinteractions.loop.spec import Limits
from openinteractions.models.port import THOUGHTS_AS_GIVEN

Kind: TypeAlias = Literal["general", "research"]
Effort: TypeAlias = Literal["standard", "max"]

_HOUR_S: Final = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Builtin:
    """One kind of agent under one of its ids."""

    id: str
    kind: Kind
    config_type: Literal["antigravity", "deep-research"]
    """The `agent_config.type` that goes with it; `dynamic` goes with every agent."""
    needs_environment: bool
    """Whether a request has to name one, or follow one that had one; custom agents make theirs."""
    background_only: bool
    tools: tuple[str, ...]
    """Types that it has where the request names no tools; a request's own replace them."""
    environment_tools: tuple[str, ...] = ()
    """Types that come with its environment, whatever tools the request names."""
    allowed: frozenset[str]
    """Types of tools that a request may name."""
    limits: Limits = field(default_factory=Limits)
    """Its own, within the server's and the request's."""
    effort: Effort = "standard"
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Defaults of `generation_config`. Empty where the vendors' own serve best."""


_WEB_AND_CODE: Final = ("code_execution", "google_search", "url_context")
_GENERAL_TOOLS: Final = frozenset({*_WEB_AND_CODE, "function", "mcp_server", "tool_search"})
_RESEARCH_TOOLS: Final = frozenset({*_WEB_AND_CODE, "mcp_server", "file_search"})


def _general(agent_id: str) -> Builtin:
    return Builtin(
        id=agent_id,
        kind="general",
        config_type="antigravity",
        needs_environment=True,
        background_only=False,
        tools=_WEB_AND_CODE,
        environment_tools=("workspace", "browser"),
        allowed=_GENERAL_TOOLS,
        generation={"thinking_summaries": THOUGHTS_AS_GIVEN},
    )


def _research(agent_id: str, effort: Effort = "standard") -> Builtin:
    return Builtin(
        id=agent_id,
        kind="research",
        config_type="deep-research",
        needs_environment=False,
        background_only=True,
        tools=("google_search", "url_context", "code_execution"),
        allowed=_RESEARCH_TOOLS,
        limits=Limits(max_seconds=_HOUR_S),
        effort=effort,
    )


BUILTINS: Final[Mapping[str, Builtin]] = {
    agent.id: agent
    for agent in (
        _general("antigravity"),
        _general("antigravity-preview-05-2026"),
        _general("antigravity-preview-09-2026"),
        _general("antigravity-preview-latest"),
        _research("deep-research-preview-04-2026"),
        _research("deep-research-max-preview-04-2026", "max"),
        _research("deep-research-pro-preview-12-2025"),
    )
}


def find(agent_id: str) -> Builtin | None:
    """The built-in agent of this id; a path before it (`agents/…`) does not matter."""
    return BUILTINS.get(agent_id.rpartition("/")[2])
