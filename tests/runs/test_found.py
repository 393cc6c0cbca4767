"""What earlier turns have found counts later: pages can be cited, loaded functions stay loaded."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from tests import house
from tests.house import Server
from tests.runs.test_handover import note, says

from openinteractions.models.port import Json

PAGE = "https://shop.example/lamp"
READ: list[Json] = [
    {"type": "url_context_call", "id": "u1", "arguments": {"urls": [PAGE]}},
    {
        "type": "url_context_result",
        "call_id": "u1",
        "result": [{"url": PAGE, "title": "Lamp", "status": "success", "text": "49.90"}],
    },
    says("I have read it.", "model_output"),
]
LATER: Json = {
    "type": "function",
    "name": "get_w",
    "parameters": {"type": "object", "properties": {}},
    "defer_loading": True,
}
FINDER: Json = {
    "type": "tool_search",
    "execution": "client",
    "name": "find_functions",
    "parameters": {"type": "object", "properties": {}},
}
LOADED: list[Json] = [
    {"type": "tool_search_call", "id": "s1", "arguments": {"function_names": ["get_w"]}},
    {"type": "tool_search_result", "call_id": "s1", "result": [LATER]},
    says("Loaded.", "model_output"),
]
GIVEN: list[Json] = [
    {"type": "function_call", "id": "f1", "name": "find_functions", "arguments": {}},
    {"type": "function_result", "call_id": "f1", "name": "find_functions", "result": [LATER]},
    says("Loaded.", "model_output"),
]


@pytest.fixture
async def fake() -> AsyncGenerator[Any]:
    async with house.upstream() as upstream:
        yield upstream


@pytest.fixture
async def server(database_url: str, fake: Any) -> AsyncGenerator[Server]:
    async with house.opened(database_url, fake) as opened:
        yield opened


async def line(server: Server, found: list[Json], *, is_compacted: bool, **more: Any) -> str:
    """A line whose first turn has found something; the last of two more turns."""
    first = await server.create([says("go"), *found, says("and?")], **more)
    handover = [says("old"), note("It is done."), says("on")] if is_compacted else [says("on")]
    second = await server.create(handover, previous_interaction_id=first["id"], **more)
    third = await server.create("on", previous_interaction_id=second["id"], **more)
    return third["id"]


def forget(server: Server) -> None:
    cache = server.process.executor._house.cache
    cache._lines.clear()
    cache._size = 0


def cited(interaction: Json) -> list[tuple[str, str]]:
    [block] = interaction["steps"][-1]["content"]
    return [(note["url"], note["title"]) for note in block.get("annotations", ())]


@pytest.mark.parametrize("is_compacted", [False, True])
async def test_a_page_of_an_earlier_turn_is_cited(server: Server, fake: Any, is_compacted: bool):
    last = await line(server, READ, is_compacted=is_compacted)
    for is_cold in (False, True, False):
        if is_cold:
            forget(server)
        fake.replies.append(house.reply(f"It costs 49.90 ([Lamp]({PAGE}))."))
        done = await server.create("How much?", previous_interaction_id=last)
        assert cited(done) == [(PAGE, "Lamp")]


async def test_a_page_that_the_client_has_sent_along_is_cited(server: Server, fake: Any):
    fake.replies.append(house.reply(f"It costs 49.90 ([Lamp]({PAGE}))."))
    done = await server.create([says("go"), *READ, says("How much?")], store=False)
    assert cited(done) == [(PAGE, "Lamp")]


async def test_a_turn_cites_nothing_of_a_branch_or_of_what_comes_later(server: Server, fake: Any):
    root = await server.create("go")
    later = await server.create(
        [says("on"), *READ, says("and?")], previous_interaction_id=root["id"]
    )
    await server.create("on", previous_interaction_id=later["id"])
    fake.replies.append(house.reply(f"It costs 49.90 ([Lamp]({PAGE}))."))
    done = await server.create("How much?", previous_interaction_id=root["id"])
    assert cited(done) == []


@pytest.mark.parametrize("is_compacted", [False, True])
@pytest.mark.parametrize(
    ("found", "tools"),
    [(LOADED, [LATER, {"type": "tool_search"}]), (GIVEN, [FINDER])],
    ids=["server", "client"],
)
async def test_a_function_of_an_earlier_turn_stays_loaded(
    server: Server, fake: Any, found: list[Json], tools: list[Json], is_compacted: bool
):
    last = await line(server, found, is_compacted=is_compacted, tools=tools)
    for is_cold in (False, True):
        if is_cold:
            forget(server)
        await server.create("on", previous_interaction_id=last, tools=tools)
        names = [tool["function"]["name"] for tool in fake.requests[-1].json["tools"]]
        assert "get_w" in names
        assert len(names) == 2
