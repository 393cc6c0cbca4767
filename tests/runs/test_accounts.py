"""What a run took is said once: its usage, its steps and the ledger agree, however it ended."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from tests import house
from tests.house import Server

from openinteractions.models.port import Json

PRICE = {"input": 1.0, "output": 2.0}


@pytest.fixture
async def fake() -> AsyncGenerator[Any]:
    async with house.upstream(house.reply("Half of", " it", "", stall_after=3)) as upstream:
        yield upstream


@pytest.fixture
async def server(database_url: str, fake: Any) -> AsyncGenerator[Server]:
    async with house.opened(database_url, fake, models={"prices": {house.MODEL: PRICE}}) as opened:
        yield opened


async def spent(server: Server) -> tuple[int, int, int]:
    async with server.database.hot() as connection:
        row = await connection.fetchrow(
            "select input_tokens, output_tokens, cost_nanousd from spend"
        )
    return tuple(row)


def check(usage: Json, paid: tuple[int, int, int]) -> None:
    given, written, cost = paid
    assert usage["total_input_tokens"] == given > 0
    assert usage["total_output_tokens"] == written > 1
    assert usage["total_tokens"] == given + written
    assert cost == given * 1_000 + written * 2_000


MODEL = {"model": house.MODEL}
AGENT = {
    "agent": "deep-research-preview-04-2026",
    "agent_config": {"type": "dynamic", "model": house.MODEL},
    "background": True,
}


@pytest.mark.parametrize("whom", [MODEL, AGENT])
async def test_a_call_that_was_cancelled_shows_what_it_is_charged(server: Server, whom: Json):
    body = {"input": "hi", "stream": True, **whom}
    async with server.stream("interactions", body) as frames:
        seen = await frames.until(lambda f: " it" in house.texts([f]))
        key = seen[0].data["interaction"]["id"]
        status, got = await server.call("POST", f"interactions/{key}/cancel")
        rest = await frames.rest()
    assert (status, got["status"]) == (200, "cancelled")
    check(got["usage"], await spent(server))
    assert rest[-1].data["interaction"]["usage"] == got["usage"]
    stored = await server.get(key)
    assert stored["usage"] == got["usage"]
    if whom is AGENT:
        (stop,) = [frame.data for frame in rest if frame.kind == "step.stop"]
        assert stop["usage"] == stored["steps"][-1]["usage"] == got["usage"]
        assert stop["step_usage"]["total_tokens"] == got["usage"]["total_tokens"]
