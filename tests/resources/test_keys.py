"""Keys speak for projects, projects do not see each other, and a day's budget is kept."""
# ruff: noqa: ASYNC110 - a test looks again until it is so

import asyncio
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from uuid import UUID

import pytest
from tests import house
from tests.house import KEY, Server
from tests.resources.test_history import with_picture

from openinteractions import ids
from openinteractions.db.engine import Database
from openinteractions.errors import Invalid
from openinteractions.loop.limits import BudgetSpent
from openinteractions.resources.keys import service as keys
from openinteractions.resources.keys import store
from openinteractions.resources.keys.service import DayBudget, Keyring
from openinteractions.runs.purse import DayPurse

OTHER = "oi_key_of_another_project_x"


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    async with house.upstream() as fake, house.opened(database_url, fake) as opened:
        opened.fake = fake  # type: ignore[attr-defined]
        await keys.ensure(opened.database, OTHER, name="other", project="other")
        yield opened


# ---- keys


async def test_only_hashes_are_kept(database: Database):
    key = await keys.create(database, name="a")
    assert key.startswith("oi_")
    assert len(key) == 46
    async with database.hot() as connection:
        dump = await connection.fetchval("select string_agg(k::text, '') from api_keys k")
    assert key not in dump
    assert key[10:] not in dump
    (shown,) = await store.list_keys(database)
    assert (shown.name, shown.project, shown.prefix) == ("a", "default", key[:10])


async def test_a_key_is_good_until_it_is_revoked(database: Database):
    key = await keys.create(database, name="a")
    ring = Keyring(database)
    caller = await ring(key)
    assert caller is not None
    assert not caller.is_budgeted
    assert await ring(key + "x") is None
    assert await ring(None) is None
    assert await ring("") is None
    assert await store.revoke(database, key[:10]) == [key[:10]]
    assert await Keyring(database)(key) is None
    assert not await store.any_key(database)


async def test_a_revocation_reaches_a_running_keyring(database: Database):
    key = await keys.create(database, name="a")
    ring = Keyring(database)
    async with ring.watching():
        await asyncio.sleep(0.1)
        assert await ring(key) is not None
        await store.revoke(database, key[:10])
        async with asyncio.timeout(1):
            while await ring(key) is not None:
                await asyncio.sleep(0.01)


async def test_a_new_budget_reaches_a_running_keyring(database: Database):
    key = await keys.create(database, name="a")
    ring = Keyring(database)
    async with ring.watching():
        await asyncio.sleep(0.1)
        assert not (await ring(key)).is_budgeted
        await keys.limit(database, project="default", key_id=None, budget=DayBudget(max_tokens=5))
        async with asyncio.timeout(1):
            while not (await ring(key)).is_budgeted:
                await asyncio.sleep(0.01)


async def test_a_prefix_is_taken_literally(database: Database):
    await keys.create(database, name="a")
    assert await store.revoke(database, "oi%") == []
    assert await store.revoke(database, "oi__") == []
    assert len(await store.revoke(database, "oi_")) == 1


async def test_short_keys_are_refused(database: Database):
    with pytest.raises(Invalid):
        await keys.ensure(database, "x" * 15, name="a")


async def test_keys_made_at_once_share_their_project(database: Database):
    made = await asyncio.gather(
        *(keys.create(database, name=f"{n}", project="new") for n in range(6))
    )
    assert len(set(made)) == 6
    assert await house.rows(database, "projects") == 1


# ---- projects


async def test_another_projects_interaction_looks_absent(server: Server):
    mine = await server.create("one")
    streamed = (await server.streamed("two"))[0].data["interaction"]["id"]
    absent = ids.interaction_id(ids.uuid7())
    for public_id in (mine["id"], streamed):
        for method, path in [
            ("GET", "interactions/{}"),
            ("GET", "interactions/{}?stream=true"),
            ("POST", "interactions/{}/cancel"),
            ("DELETE", "interactions/{}"),
        ]:
            got = await server.call(method, path.format(public_id), key=OTHER)
            never = await server.call(method, path.format(absent), key=OTHER)
            assert got[0] == never[0] == 404
            assert str(got[1]).replace(public_id, absent) == str(never[1])
    assert (await server.get(mine["id"]))["status"] == "completed"


@pytest.mark.parametrize("more", [{}, {"store": False}, {"stream": True}])
async def test_another_projects_conversation_cannot_be_continued(server: Server, more: dict):
    mine = await server.create("secret")
    server.fake.requests.clear()
    for suffix in ("", "@0"):
        body = {
            "model": house.MODEL,
            "input": "go on",
            "previous_interaction_id": mine["id"] + suffix,
            **more,
        }
        status, _ = await server.call("POST", "interactions", body, key=OTHER)
        assert status == 404
    assert server.fake.requests == []


async def test_a_list_is_a_projects_own(server: Server):
    mine = await server.create("one")
    theirs = await server.create("one", key=OTHER)
    for key, own in ((KEY, mine), (OTHER, theirs)):
        _, listed = await server.call("GET", "interactions", key=key)
        assert [item["id"] for item in listed["interactions"]] == [own["id"]]


async def test_media_are_a_projects_own(server: Server):
    await server.create(with_picture("x"))
    async with server.database.hot() as connection:
        digest = (await connection.fetchval("select sha256 from blobs")).hex()
    status, data = await server.call("GET", f"media/{digest}")
    assert (status, data[:4]) == (200, b"\x89PNG")
    assert (await server.call("GET", f"media/{digest}", key=OTHER))[0] == 404
    for nonsense in ("x", "z" * 64, digest[:-2], digest + "00"):
        assert (await server.call("GET", f"media/{nonsense}"))[0] == 404


async def test_no_key_is_no_entry(server: Server):
    for key in ("", "oi_unknown_key_of_nobody"):
        for method, path in [("GET", "interactions"), ("POST", "interactions"), ("GET", "media/x")]:
            status, answer = await server.call(method, path, key=key)
            assert (status, answer["error"]["status"]) == (401, "UNAUTHENTICATED")


# ---- budgets


async def project(database: Database) -> UUID:
    return await store.ensure_project(database, "default")


async def used(database: Database) -> list[tuple[int, int]]:
    async with database.hot() as connection:
        rows = await connection.fetch(
            "select used_tokens, used_nanousd from budgets order by key_id nulls first"
        )
    return [(row[0], row[1]) for row in rows]


async def budgeted(database: Database, **budget: float) -> DayPurse:
    await keys.limit(database, project="default", key_id=None, budget=DayBudget(**budget))
    return DayPurse(database, await project(database), None)


async def test_what_was_set_aside_is_replaced_by_what_was_taken(database: Database):
    purse = await budgeted(database, max_tokens=100, max_cost_usd=1.0)
    await purse.reserve(tokens=90, nanousd=900_000_000)
    assert await used(database) == [(90, 900_000_000)]
    await purse.settle(tokens=10, nanousd=5)
    assert await used(database) == [(10, 5)]
    await purse.reserve(tokens=90, nanousd=0)
    with pytest.raises(BudgetSpent, match="100 tokens"):
        await DayPurse(database, await project(database), None).reserve(tokens=1, nanousd=0)


async def test_money_runs_out_too(database: Database):
    purse = await budgeted(database, max_cost_usd=0.5)
    with pytest.raises(BudgetSpent, match=r"\$0.5"):
        await purse.reserve(tokens=10**9, nanousd=500_000_001)
    await purse.reserve(tokens=10**9, nanousd=500_000_000)


async def test_a_key_and_its_project_both_pay_or_neither(database: Database):
    key_id = await keys.ensure(database, KEY, name="a")
    await budgeted(database, max_tokens=100)
    await keys.limit(database, project="default", key_id=key_id, budget=DayBudget(max_tokens=10))
    purse = DayPurse(database, await project(database), key_id)
    with pytest.raises(BudgetSpent):
        await purse.reserve(tokens=11, nanousd=0)
    assert await used(database) == [(0, 0), (0, 0)]
    await purse.reserve(tokens=10, nanousd=0)
    assert await used(database) == [(10, 0), (10, 0)]


async def test_calls_at_once_never_take_more_than_there_is(database: Database):
    await budgeted(database, max_tokens=100)
    whose = await project(database)
    answers = await asyncio.gather(
        *(DayPurse(database, whose, None).reserve(tokens=30, nanousd=0) for _ in range(8)),
        return_exceptions=True,
    )
    assert answers.count(None) == 3
    assert all(isinstance(a, BudgetSpent) for a in answers if a is not None)
    assert await used(database) == [(90, 0)]


async def test_a_new_day_has_a_new_budget(database: Database):
    purse = await budgeted(database, max_tokens=100)
    await purse.reserve(tokens=100, nanousd=0)
    async with database.hot() as connection:
        await connection.execute("update budgets set day = day - 1")
    fresh = DayPurse(database, await project(database), None)
    await fresh.reserve(tokens=100, nanousd=0)
    assert await used(database) == [(100, 0)]
    async with database.hot() as connection:
        today = await connection.fetchval("select day from budgets")
    assert today == datetime.now(UTC).date()


async def test_a_call_that_ends_after_midnight_earns_nothing(database: Database):
    """What was set aside yesterday is not credited to today."""
    purse = await budgeted(database, max_tokens=100)
    await purse.reserve(tokens=100, nanousd=50)
    async with database.hot() as connection:
        await connection.execute("update budgets set day = day - 1")
    await purse.settle(tokens=10, nanousd=5)
    ((tokens, nanousd),) = await used(database)
    assert tokens >= 0
    assert nanousd >= 0


async def test_a_budget_ends_runs_and_is_charged_for_what_they_took(server: Server):
    await keys.limit(
        server.database, project="default", key_id=None, budget=DayBudget(max_tokens=40)
    )
    await asyncio.sleep(0.1)
    more = {"generation_config": {"max_output_tokens": 20}}
    seen = [(await server.create("x", **more))["status"] for _ in range(4)]
    assert seen[0] == "completed"
    assert seen[-1] == "budget_exceeded"
    ((tokens, _),) = await used(server.database)
    assert tokens == 15 * seen.count("completed")
    # Another project has its own.
    assert (await server.create("x", key=OTHER, **more))["status"] == "completed"


async def test_a_budget_bounds_an_answer_that_names_no_limit(server: Server):
    """Ruling R24: the worst case is set aside, and the answer clamped to it."""
    await keys.limit(
        server.database, project="default", key_id=None, budget=DayBudget(max_tokens=40)
    )
    await asyncio.sleep(0.1)
    await server.create("x")
    asked = server.fake.requests[-1].json
    assert asked.get("max_completion_tokens", asked.get("max_tokens", 10**9)) <= 40
