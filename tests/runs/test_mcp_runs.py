"""Whole interactions with an MCP server, and what becomes of the secrets that they bring."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import structlog
from tests import house
from tests.fakes.mcp import FakeMcp
from tests.fakes.upstream import Reply
from tests.house import Server
from tests.runs import abandoned

from openinteractions.db.engine import Database
from openinteractions.models.port import Finished, TextDelta, ToolCall

SECRET = "door-secret-0123456789"
HEADERS = {"Authorization": f"Bearer {SECRET}"}
NETWORK = {"allow": ["127.0.0.0/8"]}
USAGE: Any = {"total_input_tokens": 1, "total_output_tokens": 1, "total_tokens": 2}
RESULT = "mcp_server_tool_result"


@pytest.fixture
async def fake() -> AsyncGenerator[Any]:
    async with house.upstream() as upstream:
        yield upstream


@pytest.fixture
async def door() -> AsyncGenerator[FakeMcp]:
    """An MCP server that lets in only who knows the secret."""
    made = FakeMcp()
    made.door.needs = {"authorization": HEADERS["Authorization"]}
    started, over = asyncio.Event(), asyncio.Event()

    async def serve() -> None:
        async with made.serve():
            started.set()
            await over.wait()

    # Its cancel scopes want to be left by the task that entered them; pytest has two.
    task = asyncio.ensure_future(serve())
    await started.wait()
    yield made
    over.set()
    await task


@pytest.fixture
async def server(database_url: str, fake: Any) -> AsyncGenerator[Server]:
    async with house.opened(database_url, fake, network=NETWORK) as opened:
        yield opened


def tool(door: FakeMcp, **more: Any) -> dict[str, Any]:
    return {"type": "mcp_server", "name": "docs", "url": door.url, "headers": HEADERS, **more}


def calls(name: str, **arguments: Any) -> Reply:
    call = ToolCall("c1", name, arguments)
    return Reply((TextDelta("Let me see."), call, Finished("tool_calls", USAGE)))


async def dump(database: Database) -> str:
    """Every row of every table, as text; bytes are also in it as what they spell."""
    found: list[str] = []
    async with database.hot() as connection:
        tables = await connection.fetch(
            "select tablename from pg_tables where schemaname = 'public'"
        )
        for (table,) in tables:
            for row in await connection.fetch(f'select * from "{table}"'):
                for value in row.values():
                    is_bytes = isinstance(value, bytes)
                    found.append(value.decode("latin-1") if is_bytes else str(value))
    return "\n".join(found)


async def test_a_model_uses_an_mcp_server(server: Server, fake: Any, door: FakeMcp):
    fake.replies = [calls("docs__add", a=2, b=3), house.reply("It is 5.")]
    made = await server.create(tools=[tool(door, allowed_tools=["add"])])
    assert made["status"] == "completed"
    assert [step["type"] for step in made["steps"]] == [
        "model_output",
        "mcp_server_tool_call",
        RESULT,
        "model_output",
    ]
    call, result = made["steps"][1:3]
    assert (call["server_name"], call["name"]) == ("docs", "add")
    assert call["arguments"] == {"a": 2, "b": 3}
    assert (result["call_id"], result["result"], result["is_error"]) == (call["id"], "5", False)
    asked = fake.requests[0].json["tools"]
    assert [one["function"]["name"] for one in asked] == ["docs__add"]
    shown = fake.requests[1].json["messages"]
    assert shown[-2]["tool_calls"][0]["function"]["name"] == "docs__add"
    assert shown[-1]["content"] == "5"
    assert door.calls == [("add", 2, 3)]


async def test_secrets_are_nowhere_but_sealed_and_only_while_it_runs(
    server: Server, fake: Any, door: FakeMcp, capfd: pytest.CaptureFixture[str]
):
    fake.replies = [calls("docs__slow", seconds=1), house.reply("Done.")]
    with structlog.testing.capture_logs() as logs:
        made = await server.create(tools=[tool(door)], background=True)
        await door.started.wait()
        assert await house.rows(server.database, "interactions", "sealed is not null") == 1
        rows = await dump(server.database)
        assert '"mcp_server"' in rows
        assert SECRET not in rows
        assert "Bearer" not in rows
        ended = await abandoned.ended(server, made["id"])
        assert ended["status"] == "completed"
    assert SECRET not in str([made, ended, logs])
    assert "headers" not in ended["tools"][0]
    rows = await dump(server.database)
    assert SECRET not in rows
    assert await house.rows(server.database, "interactions", "sealed is not null") == 0
    written = capfd.readouterr()
    assert SECRET not in written.out + written.err


async def test_who_takes_over_opens_the_secrets(
    server: Server, database_url: str, fake: Any, door: FakeMcp
):
    committed = [
        {
            "type": "mcp_server_tool_call",
            "id": "c1",
            "server_name": "docs",
            "name": "add",
            "arguments": {"a": 1, "b": 1},
        }
    ]
    key = await abandoned.leave(server, fake, committed=committed, tools=[tool(door)])
    before = len(door.door.seen)
    fake.replies = [house.reply("It is 2.")]
    async with house.opened(database_url, fake, role="worker", network=NETWORK):
        ended = await abandoned.ended(server, key)
    assert ended["status"] == "completed"
    [result] = [step for step in ended["steps"] if step["type"] == RESULT]
    assert (result["result"], result["is_error"]) == ("2", False)
    assert door.calls == [("add", 1, 1)]
    assert {one["authorization"] for one in door.door.seen[before:]} == {HEADERS["Authorization"]}


@pytest.mark.parametrize(("name", "again"), [("slow", False), ("look_slowly", True)])
async def test_a_call_that_was_under_way_is_repeated_only_where_it_may_be(
    server: Server, fake: Any, door: FakeMcp, name, again
):
    arguments = {} if again else {"seconds": 30}
    fake.replies = [calls(f"docs__{name}", **arguments), house.reply("I see.")]
    made = await server.create(tools=[tool(door)], background=True)
    await door.started.wait()
    key = house.uuid_of(made["id"])
    owner = await abandoned.dead_worker(server.database)
    async with server.database.hot() as connection:
        await connection.execute("update jobs set worker_id = $2 where id = $1", key, owner)
    server.process.member._owned[key].task.cancel()
    ended = await abandoned.ended(server, made["id"])
    assert ended["status"] == "completed"
    [result] = [step for step in ended["steps"] if step["type"] == RESULT]
    assert result["is_error"] is not again
    assert result["result"].startswith("seen" if again else "Outcome unknown")
    assert door.calls == [name] * (2 if again else 1)


async def test_an_interaction_that_is_not_stored_uses_its_secrets_too(
    server: Server, fake: Any, door: FakeMcp
):
    fake.replies = [calls("docs__add", a=2, b=3), house.reply("It is 5.")]
    made = await server.create(tools=[tool(door)], store=False)
    assert [step["result"] for step in made["steps"] if step["type"] == RESULT] == ["5"]
    assert SECRET not in await dump(server.database)


async def test_what_continues_it_has_no_tools_but_its_own(server: Server, fake: Any, door: FakeMcp):
    fake.replies = [calls("docs__add", a=2, b=3), house.reply("It is 5."), house.reply("Bye.")]
    first = await server.create(tools=[tool(door)])
    await server.create("And now?", previous_interaction_id=first["id"])
    last = fake.requests[-1].json
    assert "tools" not in last
    assert any(m.get("content") == "5" for m in last["messages"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"allowed_tools": ["nope"]}, "Unknown tool 'nope' at 'tools[0].allowed_tools[0]'"),
        ({"headers": {}}, "Invalid value at 'tools[0]' ('docs'): The MCP server answered 401"),
        ({"url": "http://169.254.169.254/mcp"}, "not public"),
        ({"credential": "none"}, "'tools[0].credential': Credential 'none' not found"),
    ],
)
async def test_what_cannot_be_used_is_refused_at_once(
    server: Server, fake: Any, door: FakeMcp, change, words
):
    body = {"model": house.MODEL, "input": "x", "tools": [tool(door) | change]}
    status, answer = await server.call("POST", "interactions", body)
    assert status == 400
    assert words in answer["error"]["message"]
    assert fake.requests == []
    assert await house.rows(server.database, "interactions") == 0


async def test_cancelling_an_interaction_cancels_its_call(server: Server, fake: Any, door: FakeMcp):
    fake.replies = [calls("docs__slow", seconds=60)]
    made = await server.create(tools=[tool(door)], background=True)
    await door.started.wait()
    status, answer = await server.call("POST", f"interactions/{made['id']}/cancel", {})
    assert (status, answer["status"]) == (200, "cancelled")
    async with asyncio.timeout(5):
        await door.cancelled.wait()
    assert await house.rows(server.database, "interactions", "sealed is not null") == 0
