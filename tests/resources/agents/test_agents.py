"""Agents over HTTP, without a broker: shapes, versions, scoping, secrets, what calls find."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from tests import house
from tests.house import KEY, Server

from openinteractions.db.sealed import agent_purpose
from openinteractions.errors import Invalid, NotFound
from openinteractions.resources.agents import routes
from openinteractions.resources.agents import service as agents
from openinteractions.resources.agents.service import Agents, Definition
from openinteractions.resources.keys import service as keys

OTHER = "oi_key_of_another_project_x"
BASE = "antigravity-preview-05-2026"
SECRET = "sk-SECRET"
MCP = {
    "type": "mcp_server",
    "name": "m",
    "url": "https://mcp.example.com/mcp",
    "headers": {"Authorization": SECRET},
}
CONFIG = {
    "type": "remote",
    "network": {"allowlist": [{"domain": "api.example.com", "transform": {"X-Key": SECRET}}]},
    "env": {"TOKEN": SECRET},
}


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    async with house.opened(database_url, None, role="api", sandbox={"enabled": "off"}) as opened:
        await keys.ensure(opened.database, OTHER, name="other", project="other")
        yield opened


async def made(server: Server, name: str = "mine", *, key: str = KEY, **fields: Any) -> Any:
    body = {"id": name, "base_agent": BASE, **fields}
    status, answer = await server.call("POST", "agents", body, key=key)
    assert status == 200, answer
    return answer


async def patched(server: Server, name: str, **fields: Any) -> Any:
    status, answer = await server.call("PATCH", f"agents/{name}", fields)
    assert status == 200, answer
    return answer


async def got(server: Server, path: str, *, key: str = KEY) -> Any:
    status, answer = await server.call("GET", path, key=key)
    assert status == 200, answer
    return answer


async def refused(
    server: Server, method: str, path: str, body: Any = None, *, status: int = 400, key: str = KEY
) -> str:
    found, answer = await server.call(method, path, body, key=key)
    assert found == status, answer
    return answer["error"]["message"]


async def create_refused(server: Server, *, status: int = 400, **fields: Any) -> str:
    body = {"id": "mine", "base_agent": BASE, **fields}
    return await refused(server, "POST", "agents", body, status=status)


async def project(server: Server, key: str = KEY) -> UUID:
    caller = await keys.Keyring(server.database)(key)
    assert caller is not None
    return caller.project_id


async def find(server: Server, text: str, key: str = KEY) -> Definition:
    return await server.process.agents.find(await project(server, key), text)


# ---- create, read, delete


async def test_an_agent_has_the_contracts_shape_and_says_its_version(server: Server):
    fields = {
        "description": "Looks after customers",
        "system_instruction": "Be kind.",
        "agent_config": {"type": "antigravity", "max_total_tokens": "5000"},
        "tools": [{"type": "code_execution"}],
        "base_environment": "remote",
    }
    answer = await made(server, "customer-sentinel", **fields)
    times = {name: answer.pop(name) for name in ("created", "updated")}
    assert answer == {
        "id": "customer-sentinel",
        "base_agent": BASE,
        **fields,
        "agent_config": {"type": "antigravity", "max_total_tokens": 5000},
        "version": 1,
    }
    assert times["created"] == times["updated"]
    assert times["created"].endswith("Z")
    for name in (
        "customer-sentinel",
        "agents/customer-sentinel",
        "agents%2Fcustomer-sentinel",
        "customer-sentinel@1",
        "customer-sentinel/versions/1",
        "agents/customer-sentinel/versions/1",
    ):
        assert await got(server, f"agents/{name}") == answer | times


async def test_what_was_not_given_is_not_there(server: Server):
    assert (await made(server)).keys() == {"id", "base_agent", "version", "created", "updated"}
    assert await find(server, "mine") == Definition(id="mine", version=1, base_agent=BASE)


async def test_no_tools_at_all_are_not_the_default_ones(server: Server):
    await made(server, tools=[])
    assert (await find(server, "mine")).tools == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "agents/{}"),
        ("DELETE", "agents/{}"),
        ("PATCH", "agents/{}"),
        ("GET", "agents/{}/versions"),
        ("GET", "agents/{}/versions/1"),
    ],
)
async def test_what_is_not_there_is_not_found(server: Server, method: str, path: str):
    await made(server, "theirs", key=OTHER)
    await made(server, "gone")
    await server.call("DELETE", "agents/gone")
    for name in ("nothing", "theirs", "gone", "antigravity", BASE):
        told = await refused(server, method, path.format(name), {}, status=404)
        assert told.startswith(f"Agent '{name}")
        assert told.endswith("' not found.")


@pytest.mark.parametrize(
    "path", ["mine@2", "mine@x", "mine/versions/0", "mine/versions/x", "mine@"]
)
async def test_versions_that_are_not_there_are_not_found(server: Server, path: str):
    await made(server)
    await refused(server, "GET", f"agents/{path}", status=404)


async def test_an_id_is_taken_once_in_a_project(server: Server):
    await made(server, description="first")
    status, answer = await server.call("POST", "agents", {"id": "mine", "base_agent": BASE})
    assert (status, answer["error"]["code"]) == (409, "aborted")
    assert answer["error"]["message"] == "Agent 'mine' already exists."
    await made(server, key=OTHER)
    assert (await got(server, "agents/mine"))["description"] == "first"


async def test_one_of_many_that_take_an_id_at_once_gets_it(server: Server):
    calls = [
        server.call("POST", "agents", {"id": "mine", "base_agent": BASE, "description": str(n)})
        for n in range(8)
    ]
    statuses = [status for status, _ in await asyncio.gather(*calls)]
    assert sorted(statuses) == [200] + [409] * 7
    assert await house.rows(server.database, "agent_versions") == 1


async def test_deleting_answers_with_an_object(server: Server):
    await made(server)
    assert await server.call("DELETE", "agents/agents/mine") == (200, {})
    assert (await got(server, "agents"))["agents"] == []
    assert await house.rows(server.database, "agent_versions") == 0


async def test_a_project_has_so_many_agents(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agents, "MAX_AGENTS", 3)
    for number in range(3):
        await made(server, f"a{number}")
    assert "3 agents" in await create_refused(server)
    await made(server, key=OTHER)
    await server.call("DELETE", "agents/a1")
    await made(server)


async def test_lists_are_newest_first_in_pages_of_ones_own(server: Server):
    for number in range(5):
        await made(server, f"a{number}")
    await made(server, "theirs", key=OTHER)
    await server.call("DELETE", "agents/a3")
    await patched(server, "a0", description="changed")
    seen: list[str] = []
    query = "page_size=2"
    while True:
        page = await got(server, f"agents?{query}")
        assert len(page["agents"]) <= 2
        seen += [one["id"] for one in page["agents"]]
        if "next_page_token" not in page:
            break
        query = f"pageSize=2&pageToken={page['next_page_token']}"
    assert seen == ["a4", "a2", "a1", "a0"]
    last = (await got(server, "agents"))["agents"][-1]
    assert (last["version"], last["description"]) == (2, "changed")


@pytest.mark.parametrize("path", ["agents", "agents/mine/versions"])
async def test_tokens_of_other_lists_are_refused(server: Server, path: str):
    await made(server)
    await made(server, "other")
    await patched(server, "other", description="x")
    environments = [await server.call("POST", "environments", {}) for _ in range(2)]
    assert environments
    for foreign in ("environments", "agents/other/versions", "agents"):
        if foreign != path:
            token = (await got(server, f"{foreign}?page_size=1"))["next_page_token"]
            await refused(server, "GET", f"{path}?page_token={token}")
    await refused(server, "GET", f"{path}?page_token=xx")


async def test_a_body_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routes, "_MAX_BODY_BYTES", 1000)
    body = {"id": "mine", "base_agent": BASE, "description": "x" * 1000}
    await refused(server, "POST", "agents", body, status=413)
    await made(server)
    await refused(server, "PATCH", "agents/mine", body, status=413)


async def test_what_is_shown_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agents, "MAX_BYTES", 2000)
    source = {"type": "inline", "target": "home/a", "content": "x" * 5000}
    await made(server, base_environment={"type": "remote", "sources": [source]})
    tools = [{"type": "function", "name": "f", "parameters": {"title": "x" * 2000}}]
    told = await create_refused(server, id="other", tools=tools)
    assert "more than 2000 bytes" in told
    await refused(server, "PATCH", "agents/mine", {"tools": tools})


async def test_inline_files_are_bounded(server: Server):
    sources = [
        {"type": "inline", "target": f"home/{n}", "content": "x" * 900_000} for n in range(3)
    ]
    definition = {"base_agent": BASE, "base_environment": {"type": "remote", "sources": sources}}
    with pytest.raises(Invalid, match="inline contents have more than"):
        await server.process.agents.create(await project(server), "mine", definition)


# ---- what a definition names


async def test_the_base_environment_must_be_there(server: Server):
    foreign = (await server.call("POST", "environments", {}, key=OTHER))[1]["id"]
    own = (await server.call("POST", "environments", {}))[1]["id"]
    for name in (foreign, uuid4().hex):
        for value in (
            name,
            {"type": "remote", "environment_id": name},
            {"type": "remote", "from_environment": name},
        ):
            told = await create_refused(server, base_environment=value, status=404)
            assert told == f"Environment '{name}' not found."
    async with server.database.hot() as connection:
        await connection.execute("update environments set expires_at = now() where id = $1", own)
    assert "expired" in await create_refused(server, base_environment=own, status=404)
    assert await house.rows(server.database, "agents") == 0


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"network": {"allowlist": [{"domain": "a b"}]}}, "network"),
        ({"network": {"allowlist": [{"domain": "a.com", "credential": "no"}]}}, "does not exist"),
        ({"env": {"1A": "x"}}, "Invalid name '1A' at 'env'"),
        ({"env": {"A": {"credential": "no"}}}, "does not exist"),
        (
            {"sources": [{"type": "inline", "target": "/", "content": ""}]},
            "'base_environment.sources[0].target'",
        ),
        ({"sources": [{"type": "gcs", "target": "home/a", "source": "x"}]}, "gs://"),
        ({"sources": [{"type": "skill_registry", "target": "home/a", "source": "x"}]}, "no skills"),
    ],
)
async def test_a_configuration_is_checked_before_it_is_needed(
    server: Server, config: dict[str, Any], told: str
):
    given = {"type": "remote", **config}
    assert told in await create_refused(server, base_environment=given)
    await made(server)
    assert told in await refused(server, "PATCH", "agents/mine", {"base_environment": given})
    assert (await got(server, "agents/mine"))["version"] == 1


async def test_a_tools_credential_must_be_there_and_fit(server: Server):
    for body in (
        {"id": "token", "type": "bearer_token", "token": "t"},
        {"id": "v", "type": "environment_variable", "value": "x", "injection_location": "header"},
    ):
        assert (await server.call("POST", "credentials", body))[0] == 200
    told = await create_refused(server, tools=[{**MCP, "credential": "no"}])
    assert told == "Credential 'no' at 'tools[0].credential' does not exist."
    assert "expected no env" in await create_refused(server, tools=[{**MCP, "credential": "v"}])
    await made(server, tools=[{**MCP, "credential": "credentials/token"}])
    found = await find(server, "mine")
    assert found.tools is not None
    assert found.tools[0]["credential"] == "credentials/token"


# ---- secrets


async def test_secrets_are_sealed_and_never_shown(server: Server):
    answer = await made(server, tools=[MCP], base_environment=CONFIG)
    assert answer["tools"] == [{key: MCP[key] for key in ("type", "name", "url")}]
    assert answer["base_environment"] == {
        "type": "remote",
        "network": {"allowlist": [{"domain": "api.example.com"}]},
    }
    for path in ("agents", "agents/mine", "agents/mine@1", "agents/mine/versions"):
        assert SECRET not in str(await got(server, path))
    async with server.database.hot() as connection:
        row = await connection.fetchrow("select * from agent_versions")
    assert SECRET.encode() not in row["public"] + row["sealed"]
    purpose = agent_purpose(row["project_id"], "mine", 1)
    opened = orjson.loads(server.process.sealer.open(row["sealed"], purpose=purpose))
    assert opened == {"tools": [MCP], "base_environment": CONFIG}


async def test_a_call_has_the_secrets_and_its_repr_has_not(server: Server):
    await made(server, tools=[MCP], base_environment=CONFIG)
    found = await find(server, "mine")
    assert (found.tools, found.base_environment) == ([MCP], CONFIG)
    assert SECRET not in repr(found)


async def test_secrets_last_through_a_change_of_something_else(server: Server):
    await made(server, tools=[MCP], base_environment=CONFIG)
    answer = await patched(server, "mine", description="x")
    assert SECRET not in str(answer)
    found = await find(server, "mine")
    assert (found.version, found.tools, found.base_environment) == (2, [MCP], CONFIG)


async def test_an_answer_with_a_change_in_it_is_a_body_and_loses_no_secret(server: Server):
    inline = {"type": "inline", "target": "workspace/a", "content": SECRET}
    base = {**CONFIG, "sources": [inline]}
    answer = await made(server, tools=[MCP], base_environment=base, description="one")
    assert await patched(server, "mine", **answer) == answer
    answer["base_environment"]["network"]["allowlist"].append({"domain": "b.example.com"})
    again = await patched(server, "mine", **answer)
    assert SECRET not in str(again)
    assert again["version"] == 2
    found = await find(server, "mine")
    assert found.tools == [MCP]
    rules = [*CONFIG["network"]["allowlist"], {"domain": "b.example.com"}]
    assert found.base_environment == {**base, "network": {"allowlist": rules}}
    # One that was read before that change does not undo it.
    told = await refused(server, "PATCH", "agents/mine", {**answer, "description": "x"})
    assert told.startswith("Invalid value at 'version': it is 2, and cannot be set.")
    cleared = {"type": "remote", "env": {"TOKEN": None}}
    await patched(server, "mine", base_environment=cleared)
    assert (await find(server, "mine")).base_environment == {"type": "remote"}
    assert (await find(server, "mine@2")).base_environment == found.base_environment


async def test_a_content_that_nobody_has_is_missed(server: Server):
    inline = {"type": "inline", "target": "workspace/a", "content": "x"}
    await made(server, base_environment={"type": "remote", "sources": [inline]})
    for changed in ({"target": "workspace/b"}, {"content": None}):
        source = {"type": "inline", "target": "workspace/a", **changed}
        body = {"base_environment": {"type": "remote", "sources": [source]}}
        assert "'content'" in await refused(server, "PATCH", "agents/mine", body)


async def test_an_update_mask_chooses(server: Server):
    first = await made(server, description="one", system_instruction="Be kind.")
    body = {"description": "two", "system_instruction": None, "version": 7}
    for name in ("update_mask", "updateMask"):
        body["description"] += "!"
        path = f"agents/mine?{name}=description"
        status, answer = await server.call("PATCH", path, body)
        assert (status, answer["description"]) == (200, body["description"])
        assert answer["system_instruction"] == "Be kind."
    told = await refused(server, "PATCH", "agents/mine?update_mask=version", body)
    assert told == "Unknown path 'version' in 'update_mask'."
    assert (await got(server, "agents/mine"))["version"] == first["version"] + 2


async def test_nothing_is_sealed_where_there_is_no_secret(server: Server):
    await made(server, tools=[{"type": "url_context"}], base_environment={"type": "remote"})
    assert await house.rows(server.database, "agent_versions", "sealed is null") == 1


# ---- versions


async def test_a_change_makes_a_version_and_leaves_those_before(server: Server):
    first = await made(server, description="one", system_instruction="Be kind.")
    second = await patched(server, "agents/mine", description="two", tools=[])
    assert (second["version"], second["description"], second["tools"]) == (2, "two", [])
    assert second["system_instruction"] == "Be kind."
    assert second["created"] == first["created"]
    assert second["updated"] > first["updated"]
    third = await patched(server, "mine", system_instruction=None, tools=None)
    assert third.keys() == first.keys() - {"system_instruction"}
    for number, one in enumerate((first, second, third), 1):
        assert await got(server, f"agents/mine/versions/{number}") == one
        assert (await find(server, f"mine@{number}")).description == one["description"]
    assert await got(server, "agents/mine") == third
    listed = await got(server, "agents/mine/versions")
    assert listed == {"agent_versions": [third, second, first]}
    page = await got(server, "agents/mine/versions?page_size=2")
    assert page["agent_versions"] == [third, second]
    query = f"page_size=2&page_token={page['next_page_token']}"
    assert await got(server, f"agents/mine/versions?{query}") == {"agent_versions": [first]}


async def test_what_changes_nothing_makes_no_version(server: Server):
    first = await made(server, description="one", tools=[MCP])
    for body in ({}, {"description": "one"}, {"tools": [MCP]}, {"agent_config": None}):
        assert await patched(server, "mine", **body) == first


async def test_a_version_is_never_changed_or_deleted(server: Server):
    await made(server)
    for method in ("PATCH", "DELETE"):
        told = await refused(server, method, "agents/mine@1", {"description": "x"})
        assert "A version cannot be" in told
    assert (await got(server, "agents/mine"))["version"] == 1


async def test_changes_at_once_are_all_kept(server: Server, monkeypatch: pytest.MonkeyPatch):
    await made(server)
    both = asyncio.Barrier(2)
    check, checks = Agents._check, 0

    async def together(*given: Any) -> None:
        """Both have read the first version before one of them writes."""
        nonlocal checks
        checks += 1
        if checks <= 2:
            await both.wait()
        await check(*given)

    monkeypatch.setattr(Agents, "_check", together)
    fields = ("description", "system_instruction")
    calls = [patched(server, "mine", **{name: f"{name}!"}) for name in fields]
    answers = await asyncio.gather(*calls)
    assert checks == 3
    assert sorted(one["version"] for one in answers) == [2, 3]
    last = await got(server, "agents/mine")
    assert [last[name] for name in fields] == [f"{name}!" for name in fields]


async def test_one_that_is_made_again_counts_on_so_that_old_pins_stay_gone(server: Server):
    await made(server, description="old")
    await patched(server, "mine", description="older")
    await server.call("DELETE", "agents/mine")
    again = await made(server, description="new")
    assert (again["version"], again["description"]) == (3, "new")
    assert (await got(server, "agents/mine/versions"))["agent_versions"] == [again]
    for pin in ("mine@1", "mine@2"):
        with pytest.raises(NotFound, match="not found"):
            await find(server, pin)
    assert (await find(server, "mine@3")).description == "new"


async def test_a_version_that_a_delete_missed_does_not_come_back(server: Server):
    """As when the row was added by a transaction that the delete did not see."""
    await made(server)
    mine = await project(server)
    await server.call("DELETE", "agents/mine")
    async with server.database.hot() as connection:
        await connection.execute(
            "insert into agent_versions (project_id, agent_id, version, public) "
            "values ($1, 'mine', 1, '{}')",
            mine,
        )
    await made(server)
    await refused(server, "GET", "agents/mine@1", status=404)
    assert [
        v["version"] for v in (await got(server, "agents/mine/versions"))["agent_versions"]
    ] == [2]


async def test_pins_of_another_project_are_not_found(server: Server):
    await made(server, key=OTHER)
    with pytest.raises(NotFound):
        await find(server, "mine@1")
    assert (await find(server, "agents/mine@1", OTHER)).version == 1
