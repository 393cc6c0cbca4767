"""The environments of calls of agents, with real disks: copies, templates, what is left behind."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest
from tests import house
from tests.house import KEY
from tests.resources.environments.stand import Stand, standing

from openinteractions.db.sealed import environment_purpose
from openinteractions.errors import Invalid, NotFound
from openinteractions.process import opened as open_process
from openinteractions.resources.agents.service import Agents, Definition
from openinteractions.resources.keys import service as keys
from openinteractions.sandbox.client import BrokerClient

BASE = "antigravity"
NETWORK = {"allowlist": [{"domain": "a.example.com", "transform": {"X": "SECRET"}}]}


def inline(content: str, target: str) -> dict[str, str]:
    return {"type": "inline", "content": content, "target": target}


SOURCED = {
    "type": "remote",
    "sources": [inline("one", "workspace/a.txt"), inline("two", "workspace/b.txt")],
    "network": NETWORK,
    "env": {"A": "1", "B": "2"},
}
ENV = {"A": {"value": "1"}, "B": {"value": "2"}}


class Calls:
    """One project's agents and their calls."""

    def __init__(self, stand: Stand, project_id: UUID) -> None:
        self.stand = stand
        self.project_id = project_id
        self.agents: Agents = stand.server.process.agents

    async def agent(self, environment: Any = None, name: str = "mine") -> Definition:
        body = {"id": name, "base_agent": BASE}
        if environment is not None:
            body["base_environment"] = environment
        status, answer = await self.stand.server.call("POST", "agents", body)
        assert status == 200, answer
        return await self.agents.find(self.project_id, name)

    async def call(self, agent: Definition | str = "mine", environment: Any = None) -> str:
        """A call's environment."""
        if isinstance(agent, str):
            agent = await self.agents.find(self.project_id, agent)
        return (await self.agents.environment_for(self.project_id, agent, environment)).hex

    async def template(self, name: str = "mine") -> UUID | None:
        return (await self.agents.find(self.project_id, name)).template

    async def secret(self, environment: str) -> Any:
        row = await self.row(environment)
        purpose = environment_purpose(row["project_id"], row["id"])
        return orjson.loads(self.stand.server.process.sealer.open(row["sealed"], purpose=purpose))

    async def row(self, environment: str | UUID) -> Any:
        async with self.stand.server.database.hot() as connection:
            return await connection.fetchrow(
                "select * from environments where id = $1", environment
            )

    async def execute(self, statement: str, *values: object) -> None:
        async with self.stand.server.database.hot() as connection:
            await connection.execute(statement, *values)

    async def living(self) -> int:
        return await house.rows(
            self.stand.server.database, "environments", "deleted_at is null and expired_at is null"
        )

    async def files(self, environment: str) -> dict[str, bytes]:
        return {
            path: await self.stand.read(environment, path)
            for path in await self.stand.paths(environment)
        }


@pytest.fixture
async def calls(database_url: str, tmp_path: Path) -> AsyncGenerator[Calls]:
    async with standing(database_url, tmp_path) as stand:
        caller = await keys.Keyring(stand.server.database)(KEY)
        assert caller is not None
        yield Calls(stand, caller.project_id)


FILES = {"workspace/a.txt": b"one", "workspace/b.txt": b"two"}


# ---- no sources: a fresh one


@pytest.mark.parametrize("base", [None, "remote", "Remote", {"type": "remote"}])
async def test_without_files_each_call_gets_a_fresh_one(calls: Calls, base: Any):
    await calls.agent(base)
    found = {await calls.call(), await calls.call(), await calls.call(environment="REMOTE")}
    assert len(found) == await calls.living() == 3
    assert calls.stand.asked == []
    assert await calls.template() is None


async def test_its_configuration_and_the_calls_go_together(calls: Calls):
    await calls.agent({"type": "remote", "network": NETWORK, "env": {"A": "1", "B": "2"}})
    plain = await calls.call()
    assert await calls.secret(plain) == {"network": NETWORK, "env": ENV}
    change = {"type": "remote", "network": "disabled", "env": [{"B": "3"}, {"C": "4"}]}
    other = await calls.call(environment=change)
    assert await calls.secret(other) == {
        "network": "disabled",
        "env": {"A": {"value": "1"}, "B": {"value": "3"}, "C": {"value": "4"}},
    }
    full = await calls.call(
        environment={"type": "remote", "sources": [inline("x", "workspace/x.txt")]}
    )
    assert await calls.files(full) == {"workspace/x.txt": b"x"}
    assert await calls.secret(full) == {"network": NETWORK, "env": ENV}


# ---- an environment's id: a copy of it as it is now


@pytest.mark.parametrize("shape", ["id", "name", "object", "from"])
async def test_an_environment_is_copied_for_each_call(calls: Calls, shape: str):
    base = await calls.stand.made({"network": NETWORK})
    await calls.stand.put(base, "workspace/a.txt", b"1")
    given: Any = {
        "id": base,
        "name": f"environments/{base}",
        "object": {"type": "remote", "environment_id": base, "env": {"A": "1"}},
        "from": {"type": "remote", "from_environment": base, "env": {"A": "1"}},
    }[shape]
    await calls.agent(given)
    first = await calls.call()
    await calls.stand.put(first, "workspace/a.txt?overwrite=true", b"changed")
    second = await calls.call()
    assert len({base, first, second}) == 3
    assert await calls.files(second) == await calls.files(base) == {"workspace/a.txt": b"1"}
    env = {"A": {"value": "1"}} if isinstance(given, dict) else {}
    assert await calls.secret(second) == {"network": NETWORK, "env": env}
    assert (await calls.secret(base))["env"] == {}


async def test_a_copied_environment_that_has_no_files_is_no_trouble(calls: Calls):
    base = await calls.stand.made({"env": {"A": "1"}})
    await calls.execute("update environments set accessed_at = now() - interval '1 day'")
    await calls.agent(base)
    found = await calls.call()
    assert (await calls.secret(found))["env"] == {"A": {"value": "1"}}
    assert calls.stand.asked == []
    row = await calls.row(base)
    # It is in use: it lives on.
    assert row["accessed_at"] >= row["created_at"]


async def test_a_call_keeps_what_it_copies_alive(calls: Calls):
    base = await calls.stand.made()
    await calls.stand.put(base, "workspace/a.txt", b"1")
    await calls.agent(base)
    await calls.execute(
        "update environments set accessed_at = now() - interval '6 days', "
        "expires_at = now() + interval '1 day'"
    )
    await calls.call()
    row = await calls.row(base)
    assert (row["expires_at"] - row["accessed_at"]).days == 7


async def test_a_base_environment_that_is_gone_is_told_with_the_agents_name(calls: Calls):
    base = await calls.stand.made()
    await calls.agent(base)
    await calls.stand.server.call("DELETE", f"environments/{base}")
    with pytest.raises(NotFound) as raised:
        await calls.call()
    assert raised.value.message.startswith("The base environment of agent 'mine' is gone: ")
    assert await calls.living() == 0


# ---- sources: a template, made once


async def test_sources_are_brought_in_once_and_copied(calls: Calls):
    await calls.agent(SOURCED)
    assert (await calls.template(), await calls.living()) == (None, 0)
    first = await calls.call()
    template = await calls.template()
    assert template is not None
    await calls.stand.put(first, "workspace/a.txt?overwrite=true", b"changed")
    before = len(calls.stand.asked)
    second = await calls.call()
    assert [line.split()[0] for line in calls.stand.asked[before:]] == ["PUT"]
    assert len({template.hex, first, second}) == await calls.living() == 3
    assert await calls.files(second) == await calls.files(template.hex) == FILES
    assert await calls.secret(second) == {"network": NETWORK, "env": ENV}
    assert await calls.template() == template


async def test_a_call_adds_to_the_copy_and_not_to_the_template(calls: Calls):
    await calls.agent(SOURCED)
    change = {
        "type": "remote",
        "network": "disabled",
        "sources": [inline("other", "workspace/b.txt"), inline("new", "workspace/c.txt")],
        "env": {"B": {"value": "3"}},
    }
    found = await calls.call(environment=change)
    more = {"workspace/b.txt": b"other", "workspace/c.txt": b"new"}
    assert await calls.files(found) == FILES | more
    assert await calls.secret(found) == {
        "network": "disabled",
        "env": {"A": {"value": "1"}, "B": {"value": "3"}},
    }
    assert await calls.files(await calls.call()) == FILES
    _, shown = await calls.stand.server.call("GET", f"environments/{found}")
    assert [source["target"] for source in shown["sources"]] == [
        "workspace/a.txt",
        "workspace/b.txt",
        "workspace/c.txt",
    ]


async def test_many_first_calls_at_once_make_one_template(calls: Calls):
    agent = await calls.agent(SOURCED)
    found = await asyncio.gather(*(calls.call(agent) for _ in range(6)))
    assert len(set(found)) == 6
    assert await calls.living() == 7
    made = [line for line in calls.stand.asked if line.startswith("PUT") and line.count("/") == 3]
    assert len(made) == 7
    for one in found:
        assert await calls.files(one) == FILES


async def test_processes_that_make_a_template_at_once_keep_one(calls: Calls, database_url: str):
    agent = await calls.agent(SOURCED)
    server = calls.stand.server
    async with open_process(server.settings, server.database, role="api") as other:
        found = await asyncio.gather(
            *(
                agents.environment_for(calls.project_id, agent, None)
                for agents in (calls.agents, other.agents)
            )
        )
    template = await calls.template()
    assert template is not None
    assert await calls.living() == 3
    assert {*await calls.stand.disks.list()} == {template.hex, *(one.hex for one in found)}


@pytest.mark.parametrize("how", ["expired", "deleted", "lost"])
async def test_a_template_that_is_gone_is_made_again(calls: Calls, how: str):
    await calls.agent(SOURCED)
    await calls.call()
    old = await calls.agents.find(calls.project_id, "mine")
    assert old.template is not None
    if how == "expired":
        await calls.execute(
            "update environments set expires_at = now() - interval '1 s' where id = $1",
            old.template,
        )
    elif how == "deleted":
        await calls.stand.server.call("DELETE", f"environments/{old.template.hex}")
    else:
        await calls.stand.disks.delete(old.template.hex)
    assert await calls.files(await calls.call()) == FILES
    new = await calls.template()
    assert new not in {None, old.template}
    # One who has read the definition before that does not make a third one.
    assert await calls.files(await calls.call(old)) == FILES
    assert await calls.template() == new
    row = await calls.row(old.template)
    assert row["deleted_at"] is not None or row["expired_at"] is not None


async def test_using_a_template_keeps_it_alive(calls: Calls):
    await calls.agent(SOURCED)
    await calls.call()
    template = await calls.template()
    assert template is not None
    await calls.execute(
        "update environments set accessed_at = now() - interval '6 days', "
        "expires_at = now() + interval '1 day' where id = $1",
        template,
    )
    await calls.call()
    row = await calls.row(template)
    assert (row["expires_at"] - row["accessed_at"]).days == 7


async def test_a_new_version_shares_the_template_while_the_environment_is_the_same(calls: Calls):
    await calls.agent(SOURCED)
    await calls.call()
    template = await calls.template()
    await calls.stand.server.call("PATCH", "agents/mine", {"description": "x"})
    assert await calls.template("mine@2") == template
    other = {"type": "remote", "sources": [inline("3", "workspace/c.txt")]}
    await calls.stand.server.call("PATCH", "agents/mine", {"base_environment": other})
    assert await calls.template("mine@3") is None
    assert await calls.files(await calls.call("mine@3")) == {"workspace/c.txt": b"3"}
    assert await calls.files(await calls.call("mine@2")) == FILES
    assert await calls.template("mine@2") == template


async def test_deleting_an_agent_removes_its_templates_and_leaves_its_calls(calls: Calls):
    await calls.agent(SOURCED)
    found = await calls.call()
    await calls.stand.server.call("DELETE", "agents/mine")
    assert await calls.living() == 1
    assert await calls.stand.disks.list() == [found]
    assert await calls.files(found) == FILES


async def test_a_call_of_an_agent_that_was_deleted_meanwhile_leaves_nothing(calls: Calls):
    agent = await calls.agent(SOURCED)
    await calls.stand.server.call("DELETE", "agents/mine")
    with pytest.raises(NotFound, match="Agent 'mine@1' not found"):
        await calls.call(agent)
    assert await calls.living() == 0


# ---- an environment of the call's own


async def test_an_environment_that_a_call_names_is_used_as_it_is(calls: Calls):
    await calls.agent(SOURCED)
    own = await calls.stand.made()
    assert await calls.call(environment=own) == own
    change = {"type": "remote", "environment_id": own, "network": "disabled"}
    assert await calls.call(environment=change) == own
    assert await calls.secret(own) == {"network": "disabled", "env": {}}
    assert (await calls.living(), await calls.template()) == (1, None)


async def test_a_call_can_ask_for_a_copy_of_another_environment(calls: Calls):
    await calls.agent(SOURCED)
    own = await calls.stand.made({"network": NETWORK, "env": {"A": "0"}})
    await calls.stand.put(own, "workspace/own.txt", b"own")
    change = {
        "type": "remote",
        "from_environment": own,
        "sources": [inline("n", "workspace/new.txt")],
        "env": {"Z": "9"},
    }
    found = await calls.call(environment=change)
    assert found != own
    assert await calls.files(found) == {"workspace/own.txt": b"own", "workspace/new.txt": b"n"}
    assert await calls.files(own) == {"workspace/own.txt": b"own"}
    env = {"A": {"value": "0"}, "Z": {"value": "9"}}
    assert await calls.secret(found) == {"network": NETWORK, "env": env}
    # As for a model.
    environments = calls.stand.server.process.environments
    again = await environments.resolve(calls.project_id, change)
    assert await calls.files(again.hex) == await calls.files(found)
    both = {**change, "environment_id": own}
    with pytest.raises(Invalid, match="Only one of"):
        await environments.resolve(calls.project_id, both)


# ---- nothing is left behind


@pytest.mark.parametrize(
    "change",
    [
        {"sources": [inline("x", "/")]},
        {"env": {"1": "x"}},
        {"network": {"allowlist": [{"domain": "a.com", "credential": "none"}]}},
        # Known to be wrong only when it is there.
        {"sources": [inline("x", "workspace/ok.txt"), inline("x", "workspace/ok.txt/under")]},
    ],
    ids=["target", "env", "credential", "late"],
)
async def test_a_change_that_fails_leaves_no_copy(calls: Calls, change: dict[str, Any]):
    await calls.agent(SOURCED)
    await calls.call()
    disks = await calls.stand.disks.list()
    with pytest.raises(Invalid) as caught:
        await calls.call(environment={"type": "remote", **change})
    if "sources" in change:
        assert "'environment.sources[" in caught.value.message
    assert await calls.living() == 2
    assert await calls.stand.disks.list() == disks


async def test_a_template_that_cannot_be_made_leaves_nothing(calls: Calls):
    late = [inline("x", "workspace/ok.txt"), inline("x", "workspace/ok.txt/under")]
    await calls.agent({"type": "remote", "sources": late})
    with pytest.raises(Invalid, match=r"Cannot set up 'base_environment\.sources\[1\]'"):
        await calls.call()
    assert (await calls.living(), await calls.template()) == (0, None)
    assert await calls.stand.disks.list() == []


async def test_a_copy_whose_caller_leaves_is_taken_back(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
):
    await calls.agent(SOURCED)
    await calls.call()
    began = asyncio.Event()

    async def stuck(*_: Any, **__: Any) -> None:
        began.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(BrokerClient, "ensure", stuck)
    task = asyncio.ensure_future(calls.call())
    await began.wait()
    assert await calls.living() == 3
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await calls.living() == 2


async def test_one_that_was_made_in_vain_can_be_taken_back(calls: Calls):
    await calls.agent(SOURCED)
    found = await calls.call()
    await calls.stand.server.process.environments.discard(calls.project_id, UUID(found))
    template = await calls.template()
    assert template is not None
    assert await calls.stand.disks.list() == [template.hex]
