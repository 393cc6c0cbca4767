"""Places that are shared with those who never leave."""

import asyncio

import pytest

from openinteractions.turns import Turns


async def taking(turns: Turns, owner: str, count: int) -> list[asyncio.Task[None]]:
    wanted = [asyncio.ensure_future(turns.take(owner)) for _ in range(count)]
    await asyncio.sleep(0)
    return wanted


def got(wanted: list[asyncio.Task[None]]) -> int:
    return sum(each.done() for each in wanted)


async def test_one_who_keeps_all_he_gets_leaves_some():
    turns = Turns(64)
    assert got(await taking(turns, "greedy", 100)) == 7
    assert got(await taking(turns, "other", 100)) == 6


async def test_the_more_keep_theirs_the_fewer_each_has():
    turns = Turns(64)
    for number in range(20):
        assert got(await taking(turns, f"greedy-{number}", 100)) > 0
    await turns.take("other")


async def test_who_waits_gets_what_is_given_back_in_order():
    turns = Turns(4)
    first = await taking(turns, "a", 3)
    other = await taking(turns, "b", 1)
    assert (got(first), got(other)) == (1, 1)
    turns.give("a")
    await asyncio.sleep(0)
    assert [each.done() for each in first] == [True, True, False]
    turns.give("a")
    await asyncio.sleep(0)
    assert got(first) == 3


async def test_who_stops_waiting_costs_nothing():
    turns = Turns(1)
    await turns.take("a")
    waiting = await taking(turns, "b", 2)
    waiting[0].cancel()
    turns.give("a")
    # Its turn has come, and it goes at that moment.
    waiting[1].cancel()
    for each in waiting:
        with pytest.raises(asyncio.CancelledError):
            await each
    async with asyncio.timeout(20):
        await turns.take("c")
