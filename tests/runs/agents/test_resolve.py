"""From a request that names an agent to what its run is to be."""

from datetime import date
from typing import Any

import pytest

from openinteractions.models.port import THOUGHTS_AS_GIVEN
from openinteractions.runs.agents import resolve
from openinteractions.runs.agents.builtin import BUILTINS
from openinteractions.runs.brief import Brief
from openinteractions.wire.create import parse_create

GENERAL = "antigravity-preview-09-2026"
RESEARCH = "deep-research-preview-04-2026"


def brief(agent: str = GENERAL, default: str = "own/default", **config: Any) -> Brief:
    body = {"agent": agent, "input": "x", "background": True, "environment": "remote"}
    if config:
        body["agent_config"] = {"type": "dynamic", **config}
    return resolve.brief(
        resolve.Agent(base=BUILTINS[agent], custom=None),
        parse_create(body, max_depth=50),
        default_model=lambda: default,
        today=date(2026, 11, 23),
        network=None,
    )


def test_a_model_may_have_its_collection_before_it():
    found = brief(model="models/acme/m", fallback_models=["models/gemini-3.5-flash", "acme/n"])
    assert found.models == ["acme/m", "gemini-3.5-flash", "acme/n"]
    assert brief().models == ["own/default"]
    assert brief(default="models/gemini-3.5-flash").models == ["gemini-3.5-flash"]


@pytest.mark.parametrize(
    ("agent", "config", "summaries"),
    [
        (GENERAL, {}, THOUGHTS_AS_GIVEN),
        (GENERAL, {"thinking_summaries": "auto"}, "auto"),
        (GENERAL, {"thinking_summaries": "none"}, "none"),
        (RESEARCH, {}, None),
        (RESEARCH, {"thinking_summaries": "auto"}, "auto"),
    ],
)
def test_whose_thoughts_are_shown(agent: str, config: dict[str, Any], summaries: str | None):
    assert brief(agent, **config).generation.get("thinking_summaries") == summaries
