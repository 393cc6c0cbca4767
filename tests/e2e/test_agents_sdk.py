"""Custom agents with the official clients: what they send, read back and raise."""

import os
import re
import subprocess
from collections.abc import Generator
from typing import Any

import pytest
from google.genai import Client
from google.genai._gaos.lib import compat_errors as raised
from jsonschema import Draft202012Validator

from tests.e2e import wire
from tests.e2e.own import Own, own_server
from tests.e2e.server import Fakes, sdk
from tests.e2e.test_sdk_js import JS, node

__all__ = ["node"]

pytestmark = pytest.mark.filterwarnings("ignore:Agents usage is experimental:UserWarning")

BASE = "antigravity-preview-05-2026"
SECRET = "sk-SECRET"
MCP = {
    "type": "mcp_server",
    "name": "crm",
    "url": "https://mcp.example.com/mcp",
    "headers": {"Authorization": SECRET},
    "allowed_tools": [{"mode": "auto", "tools": ["lookup"]}],
}
FULL: dict[str, Any] = {
    "description": "Looks after customers",
    "system_instruction": "Be kind.",
    "agent_config": {"type": "antigravity", "max_total_tokens": 5000, "model": "fake/m"},
    "tools": [
        {"type": "code_execution"},
        {"type": "google_search", "search_types": ["web_search"]},
        {"type": "url_context"},
        {"type": "function", "name": "lookup", "parameters": {"type": "object"}},
        MCP,
    ],
    "base_environment": {
        "type": "remote",
        "sources": [
            {"type": "inline", "target": ".agents/AGENTS.md", "content": f"Be brief. {SECRET}"}
        ],
        "network": {"allowlist": [{"domain": "a.example.com", "transform": {"X": SECRET}}]},
        "env": {"TOKEN": SECRET},
    },
}


@pytest.fixture(scope="module")
def own(upstreams: Fakes) -> Generator[Own]:
    with own_server(upstreams) as running:
        yield running
        log = (running.home / "server.log").read_text()
    assert "agent.created" in log
    assert SECRET not in log


@pytest.fixture
def its_client(own: Own) -> Generator[Client]:
    with sdk(own) as made:
        yield made


def fault(error: raised.APIStatusError) -> tuple[int, str, str]:
    assert isinstance(error.body, dict)
    found = error.body["error"]
    return error.status_code, found["code"], found["message"]


def test_the_python_sdk(its_client: Client) -> None:
    here = its_client.agents
    made = here.create(id="customer-sentinel", base_agent=BASE, **FULL)
    assert (made.id, made.base_agent) == ("customer-sentinel", BASE)
    assert (made.description, made.system_instruction) == ("Looks after customers", "Be kind.")
    assert made.agent_config is not None
    assert (made.agent_config.max_total_tokens, made.agent_config.model) == (5000, "fake/m")
    assert [tool.type for tool in made.tools or []] == [tool["type"] for tool in FULL["tools"]]
    assert made.base_environment.sources[0].target == ".agents/AGENTS.md"  # type: ignore[union-attr]
    assert made.base_environment.network.allowlist[0].domain == "a.example.com"  # type: ignore[union-attr]
    extra = made.model_dump()
    assert extra["version"] == 1
    assert extra["created"] == extra["updated"]
    assert SECRET not in repr(made)
    assert here.get(id="customer-sentinel") == made
    assert here.get(id="agents/customer-sentinel") == made

    here.create(id="plain", base_agent="antigravity")
    listed = here.list()
    assert [one.id for one in listed.agents or []] == ["plain", "customer-sentinel"]
    assert listed.agents[1] == made  # type: ignore[index]
    first = here.list(page_size=1, parent="projects/p")
    rest = here.list(page_size=1, page_token=first.next_page_token)
    assert [one.id for one in rest.agents or []] == ["customer-sentinel"]
    assert rest.next_page_token is None
    assert SECRET not in repr(here.with_raw_response.list().parse())
    for name in ("plain", "customer-sentinel"):
        here.delete(id=name)
    assert here.list().agents == []


def test_our_own_tools_come_through_as_they_are(its_client: Client) -> None:
    made = its_client.agents.create(
        id="browsing", base_agent=BASE, tools=[{"type": "browser"}, {"type": "tool_search"}]
    )
    assert [tool.raw for tool in made.tools or []] == [  # type: ignore[union-attr]
        {"type": "browser"},
        {"type": "tool_search"},
    ]
    its_client.agents.delete(id="browsing")


def test_what_the_sdk_raises(its_client: Client) -> None:
    here = its_client.agents
    here.create(id="twice", base_agent=BASE)
    with pytest.raises(raised.ConflictError) as conflict:
        here.create(id="twice", base_agent=BASE)
    assert fault(conflict.value) == (409, "aborted", "Agent 'twice' already exists.")
    for body, told in (
        ({"id": "Antigravity-mine"}, "Invalid value at 'id': the prefix 'antigravity-' is reserve"),
        ({"id": "x", "base_agent": "twice"}, "Invalid enum value 'twice' at 'base_agent'."),
        ({"base_agent": BASE}, "Missing required parameter 'id'."),
        ({"id": "x", "tools": [{"type": "retrieval"}]}, "'retrieval' at 'tools[0].type'"),
    ):
        with pytest.raises(raised.BadRequestError) as bad:
            here.create(**{"base_agent": BASE, **body})  # type: ignore[arg-type]
        assert told in fault(bad.value)[2]
    with pytest.raises(raised.NotFoundError) as missing:
        here.create(id="x", base_agent=BASE, base_environment="0" * 32)
    assert fault(missing.value)[2] == f"Environment '{'0' * 32}' not found."
    here.delete(id="twice")
    for call in (here.get, here.delete):
        for name in ("twice", BASE):
            with pytest.raises(raised.NotFoundError) as missing:
                call(id=name)
            assert fault(missing.value) == (404, "not_found", f"Agent '{name}' not found.")


async def test_the_python_sdk_async(own: Own) -> None:
    async with sdk(own).aio as client:
        here = client.agents
        made = await here.create(id="async", base_agent=BASE, **FULL)
        assert await here.get(id="async") == made
        assert [one.id for one in (await here.list()).agents or []] == ["async"]
        await here.delete(id="async")
        with pytest.raises(raised.NotFoundError):
            await here.get(id="async")


def test_what_the_sdk_read_can_be_written_back(own: Own, its_client: Client) -> None:
    """A whole answer of the SDK changes nothing; then one field of it."""
    here = its_client.agents
    made = here.create(id="back", base_agent=BASE, **FULL)
    path = "/v1beta/agents/back"
    answer = made.model_dump(mode="json", exclude_none=True)
    # A secret that was lost would be a change.
    assert wire.call(own, "PATCH", path, answer).json()["version"] == 1
    masked = wire.call(own, "PATCH", f"{path}?updateMask=tools", {**answer, "description": "x"})
    assert masked.json() == wire.call(own, "GET", path).json()
    assert (masked.json()["version"], masked.json()["description"]) == (1, made.description)
    change = {"id": "back", "system_instruction": "Be kinder.", "description": None}
    changed = wire.call(own, "PATCH", path, change).json()
    assert (changed["version"], changed["system_instruction"]) == (2, "Be kinder.")
    read = here.get(id="back")
    assert (read.system_instruction, read.description) == ("Be kinder.", None)
    assert here.get(id="back@1").system_instruction == "Be kind."
    versions = wire.call(own, "GET", f"{path}/versions").json()["agent_versions"]
    assert [one["version"] for one in versions] == [2, 1]
    here.delete(id="back")
    assert wire.call(own, "GET", f"{path}/versions/1").status == 404


@pytest.mark.parametrize("version", ["v1", "v1beta", "v1alpha"])
def test_answers_are_as_described(own: Own, version: str) -> None:
    described = wire.call(own, "GET", "/openapi.json").json()
    body = {"id": f"d-{version}", "base_agent": BASE, **FULL}

    def check(value: Any, name: str) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
        Draft202012Validator(schema).validate(value)

    check(body, "CreateAgent")
    check({"description": "x", "tools": [MCP]}, "UpdateAgent")
    agents = f"/{version}/agents"
    check(wire.call(own, "POST", agents, body).json(), "Agent")
    check(wire.call(own, "GET", agents).json(), "AgentList")
    check(wire.call(own, "GET", f"{agents}/{body['id']}/versions").json(), "AgentVersions")
    gone = wire.call(own, "DELETE", f"{agents}/{body['id']}", content_type="application/json")
    assert (gone.status, gone.json()) == (200, {})


def test_the_javascript_sdk(own: Own, node: str) -> None:
    done = subprocess.run(
        [node, "--test", "--test-reporter=tap", "agents.test.mjs"],
        cwd=JS,
        env={"PATH": os.environ["PATH"], "OI_URL": own.url, "OI_KEY": own.key},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^# pass 1$", done.stdout, re.MULTILINE), done.stdout
