"""A call's id is its own in the whole conversation, however the upstream counts."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from tests import house
from tests.fakes.upstream import Reply
from tests.house import Server
from tests.runs import abandoned

from openinteractions.events.types import Event
from openinteractions.loop.turn import Turn
from openinteractions.models.port import Json, ToolCall
from openinteractions.tools.toolbox import Toolbox

LOOK = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
}
ANEW = [Reply((ToolCall("call_0", "look", {"n": n}), house.finished("tool_calls"))) for n in (1, 2)]


@pytest.fixture
async def fake() -> AsyncGenerator[Any]:
    async with house.upstream() as upstream:
        yield upstream


@pytest.fixture
async def server(database_url: str, fake: Any) -> AsyncGenerator[Server]:
    async with house.opened(database_url, fake) as opened:
        yield opened


def calls(interaction: Json) -> list[str]:
    return [step["id"] for step in interaction["steps"] if step["type"] == "function_call"]


def result(call_id: str) -> Json:
    return {"type": "function_result", "call_id": call_id, "name": "look", "result": "done"}


def told(request: Any) -> list[str]:
    """The ids of the calls, and of the results, that the upstream was shown."""
    found: list[str] = []
    for message in request.json["messages"]:
        found += [call["id"] for call in message.get("tool_calls", ())]
        found += [message["tool_call_id"]] if message["role"] == "tool" else []
    return found


async def test_a_later_turn_does_not_use_an_id_again(server: Server, fake: Any):
    fake.replies += ANEW
    first = await server.create("go", tools=[LOOK])
    assert calls(first) == ["call_0"]
    second = await server.create(
        [result("call_0")], tools=[LOOK], previous_interaction_id=first["id"]
    )
    assert second["status"] == "requires_action"
    (again,) = calls(second)
    assert again != "call_0"
    stored = await server.get(second["id"])
    assert calls(stored) == [again]
    await server.create([result(again)], tools=[LOOK], previous_interaction_id=second["id"])
    assert told(fake.requests[-1]) == ["call_0", "call_0", again, again]


@pytest.mark.parametrize("how", [{}, {"store": False}])
async def test_a_branch_knows_only_its_own_line(server: Server, fake: Any, how: Json):
    fake.replies += ANEW
    first = await server.create("go", tools=[LOOK])
    before = {"tools": [LOOK], "previous_interaction_id": f"{first['id']}@0", **how}
    assert calls(await server.create("another way", **before)) == ["call_0"]
    fake.replies += ANEW[:1]
    fake.replies.insert(0, house.reply("Hm."))
    answered = await server.create([result("call_0")], previous_interaction_id=first["id"])
    behind = {"tools": [LOOK], "previous_interaction_id": f"{answered['id']}@1", **how}
    assert calls(await server.create("and now", **behind)) != ["call_0"]


async def test_a_stream_begins_a_call_with_the_id_that_is_kept(server: Server, fake: Any):
    fake.replies += ANEW
    first = await server.create("go", tools=[LOOK])
    frames = await server.streamed(
        [result("call_0")], tools=[LOOK], previous_interaction_id=first["id"]
    )
    (shown,) = [f.data["step"]["id"] for f in frames if f.kind == "step.start"]
    stored = await server.get(frames[0].data["interaction"]["id"])
    assert calls(stored) == [shown]
    assert shown != "call_0"


async def test_who_takes_a_run_over_does_not_use_an_id_that_was_shown(database_url: str, fake: Any):
    """A call that readers saw was not committed: it stays, and is another one."""
    async with house.opened(database_url, fake, role="api") as server:
        key = await abandoned.leave(server, fake, given="go", tools=[LOOK])
        events: list[Event] = []
        turn = Turn(lambda *e: events.extend(e), first_index=0, provider="fake", model="m")
        turn.add(ToolCall("call_0", "look", {"n": 1}))
        turn.reveal_calls(Toolbox({}), lambda *e: None)
        await abandoned.append(server.database, house.uuid_of(key), events)
        fake.replies += ANEW
        async with house.opened(database_url, fake, role="worker"):
            got = await abandoned.ended(server, key)
        assert got["status"] == "requires_action"
        lost, again = calls(got)
        assert lost == "call_0" != again
        frames = await server.read(key)
        starts = [f.data["step"].get("id") for f in frames if f.kind == "step.start"]
        assert starts == ["call_0", None, again]
