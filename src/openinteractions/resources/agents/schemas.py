"""Agents as answers show them. For documentation: answers are built as plain JSON."""

from pydantic import BaseModel, ConfigDict

from openinteractions.wire.agents import AgentTools, BaseAgent, CustomConfig
from openinteractions.wire.environment import Environment

_ANSWER = ConfigDict(extra="allow", use_attribute_docstrings=True)


class Agent(BaseModel):
    """A base agent with instructions, tools and files of a caller's own."""

    model_config = _ANSWER

    id: str
    base_agent: BaseAgent
    description: str | None = None
    system_instruction: str | None = None
    agent_config: CustomConfig | None = None
    tools: AgentTools | None = None
    """Without headers and credentials."""
    base_environment: Environment | None = None
    """Without contents, variables and secrets."""
    version: int
    """Counts its definitions. An addition to the contract, as are the times."""
    created: str
    """RFC 3339, UTC."""
    updated: str
    """When this version was made; RFC 3339, UTC."""


class AgentList(BaseModel):
    """A page of agents, newest first."""

    model_config = _ANSWER

    agents: list[Agent]
    next_page_token: str | None = None
    """Absent on the last page."""


class AgentVersions(BaseModel):
    """A page of an agent's versions, newest first."""

    model_config = _ANSWER

    agent_versions: list[Agent]
    next_page_token: str | None = None
    """Absent on the last page."""
