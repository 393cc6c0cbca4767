"""What the ids of agents stand for."""

import dataclasses
from typing import get_args

import pytest

from openinteractions.runs.agents.builtin import BUILTINS, find
from openinteractions.wire.agents import BUILT_IN, BaseAgent

GENERAL = [
    "antigravity",
    "antigravity-preview-05-2026",
    "antigravity-preview-09-2026",
    "antigravity-preview-latest",
]
RESEARCH = [
    "deep-research-preview-04-2026",
    "deep-research-max-preview-04-2026",
    "deep-research-pro-preview-12-2025",
]


def test_these_are_all():
    assert sorted(BUILTINS) == sorted(GENERAL + RESEARCH)
    assert all(agent_id == agent.id for agent_id, agent in BUILTINS.items())


@pytest.mark.parametrize("agent_id", GENERAL)
def test_the_general_agent(agent_id: str):
    agent = find(agent_id)
    assert agent is not None
    assert (agent.kind, agent.config_type) == ("general", "antigravity")
    assert agent.needs_environment
    assert not agent.background_only
    assert set(agent.tools) == {"code_execution", "google_search", "url_context"}
    assert set(agent.environment_tools) == {"workspace", "browser"}
    assert {"function", "mcp_server"} <= agent.allowed
    assert not {"file_search", "computer_use"} & agent.allowed
    assert agent.limits.max_seconds is None


@pytest.mark.parametrize("agent_id", RESEARCH)
def test_the_research_agent(agent_id: str):
    agent = find(agent_id)
    assert agent is not None
    assert (agent.kind, agent.config_type) == ("research", "deep-research")
    assert agent.background_only
    assert set(agent.tools) == {"code_execution", "google_search", "url_context"}
    assert {"mcp_server", "file_search"} <= agent.allowed
    assert "function" not in agent.allowed
    assert agent.limits.max_seconds == 3600
    assert agent.effort == ("max" if "max" in agent_id else "standard")


def test_what_an_agent_has_it_may_be_given():
    assert all(set(agent.tools) <= agent.allowed for agent in BUILTINS.values())


def test_others_are_not_built_in():
    assert find("my-agent") is None
    assert find("code-mender-preview") is None
    assert find("") is None
    assert find("agents/antigravity") is BUILTINS["antigravity"]


def test_nobody_changes_them():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BUILTINS["antigravity"].kind = "research"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_wires_lists_are_those_of_the_agents_that_there_are():
    general = {agent.id for agent in BUILTINS.values() if agent.kind == "general"}
    assert set(get_args(get_args(BaseAgent)[0])) == general
    # The prefix is reserved.
    assert {name for name in BUILTINS if not name.startswith("antigravity-")} <= BUILT_IN
