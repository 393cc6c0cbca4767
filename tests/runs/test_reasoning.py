"""What a model thought before it called a tool stays with the conversation, and with that model."""

from collections.abc import AsyncGenerator

import pytest
from tests import house
from tests.fakes.openai import FakeOpenAI
from tests.fakes.upstream import Received, Reply
from tests.house import Server
from tests.runs import abandoned

from openinteractions.loop.context import seal_signature
from openinteractions.models.port import Json, ThoughtDelta, ToolCall

LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
LATER = {"type": "function", "name": "later", "defer_loading": True}


class Kimi(FakeOpenAI):
    """A server that refuses calls without the reasoning that led to them."""

    def fault(self, received: Received) -> str | None:
        for at, message in enumerate(received.json["messages"]):
            if message.get("tool_calls") and not message.get("reasoning_content"):
                return (
                    "thinking is enabled but reasoning_content is missing in assistant tool call "
                    f"message at index {at}"
                )
        return super().fault(received)


def thinking(number: int) -> Reply:
    """A turn that thinks and then calls."""
    call = ToolCall(f"c{number}", "look", {})
    return Reply((ThoughtDelta(f"thought-{number}"), call, house.finished("tool_calls")))


def result(number: int) -> Json:
    return {"type": "function_result", "call_id": f"c{number}", "name": "look", "result": "r"}


def thoughts(received: Received) -> list[str]:
    messages = received.json["messages"]
    return [one["reasoning_content"] for one in messages if "reasoning_content" in one]


@pytest.fixture
async def kimi() -> AsyncGenerator[Kimi]:
    fake = Kimi()
    fake.default = house.reply("done")
    async with fake.serve():
        yield fake


@pytest.fixture
async def server(database_url: str, kimi: Kimi) -> AsyncGenerator[Server]:
    async with house.opened(database_url, kimi) as opened:
        yield opened


@pytest.mark.parametrize("summaries", ["auto", "none"])
async def test_it_goes_back_in_every_later_turn_in_every_process(
    server: Server, database_url: str, kimi: Kimi, summaries: str
):
    kimi.replies = [thinking(1), thinking(2)]
    asked = {"tools": [LOOK], "generation_config": {"thinking_summaries": summaries}}
    first = await server.create("x", **asked)
    second = await server.create([result(1)], previous_interaction_id=first["id"], **asked)
    assert second["status"] == "requires_action"
    async with house.opened(database_url, kimi) as there:
        for place in (server, there):
            for given in ([result(2)], [result(2), {"type": "user_input", "content": "well?"}]):
                more = {"previous_interaction_id": second["id"], **asked}
                third = await place.create(given, **more)
                assert house.answer(third) == "done"
                await place.create("more?", previous_interaction_id=third["id"])
                assert thoughts(kimi.requests[-1]) == ["thought-1", "thought-2"]
    # And where the client keeps the conversation itself.
    steps = [*(await server.get(first["id"]))["steps"], result(1)]
    await server.create(steps, store=False, **asked)
    assert thoughts(kimi.requests[-1]) == ["thought-1"]


async def test_it_goes_back_where_another_worker_takes_the_run_over(database_url: str, kimi: Kimi):
    sealed = seal_signature(
        '{"reasoning_content":"thought-1"}', provider="fake", model=house.MODEL.partition("/")[2]
    )
    call = {"type": "tool_search_call", "id": "t", "arguments": {"function_names": ["later"]}}
    async with house.opened(database_url, kimi, role="api") as looking_on:
        key = await abandoned.leave(
            looking_on,
            kimi,
            committed=[{"type": "thought", "signature": sealed}, call],
            tools=[LATER, {"type": "tool_search"}],
        )
        async with house.opened(database_url, kimi, role="worker"):
            got = await abandoned.ended(looking_on, key)
    assert house.answer(got) == "done"
    assert thoughts(kimi.requests[-1]) == ["thought-1"]


async def test_no_other_model_sees_it(database_url: str, kimi: Kimi):
    provider = {"kind": "openai", "api_key": "none"}
    async with (
        house.upstream() as other,
        house.opened(
            database_url, kimi, providers={"other": {**provider, "base_url": other.url}}
        ) as server,
    ):
        kimi.replies = [thinking(1)]
        first = await server.create("x", tools=[LOOK])
        last = {"previous_interaction_id": first["id"], "tools": [LOOK]}
        await server.create([result(1)], model="other/m", **last)
        assert thoughts(other.requests[-1]) == []
        assert len(other.requests[-1].json["messages"]) == 3
        # Nor another model of the same provider.
        kimi.fault = lambda _received: None  # type: ignore[method-assign]
        await server.create([result(1)], model="fake/other", **last)
        assert thoughts(kimi.requests[-1]) == []
