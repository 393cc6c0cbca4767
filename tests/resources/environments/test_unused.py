"""Environments that nobody has asked for: they count from their first use on, and go early."""

from collections.abc import AsyncGenerator
from pathlib import Path
from uuid import UUID

import pytest
from tests import house
from tests.house import KEY, MODEL, Server
from tests.resources.environments.stand import Stand, standing

from openinteractions import ids
from openinteractions.errors import NotFound, QuotaReached
from openinteractions.resources.interactions import store as interactions
from openinteractions.resources.keys import service as keys

MOST = 2
CODE = [{"type": "code_execution"}]


@pytest.fixture
async def stand(database_url: str, tmp_path: Path) -> AsyncGenerator[Stand]:
    async with standing(database_url, tmp_path, sandbox={"max_environments": MOST}) as opened:
        yield opened


async def project(server: Server) -> UUID:
    caller = await keys.Keyring(server.database)(KEY)
    assert caller is not None
    return caller.project_id


async def unasked(server: Server) -> UUID:
    environments = server.process.environments
    return await environments.derive(await project(server), None, is_tentative=True)


async def change(server: Server, sql: str, *values: object) -> None:
    async with server.database.hot() as connection:
        await connection.execute(sql, *values)


async def age(server: Server, *environments: UUID) -> None:
    sql = "update environments set accessed_at = now() - interval '61 minutes' where id = any($1)"
    await change(server, sql, environments)


async def test_it_counts_from_its_first_use_on(stand: Stand):
    environments = stand.server.process.environments
    spare = [await unasked(stand.server) for _ in range(MOST + 2)]
    first = await stand.made()
    await stand.put(spare[0].hex, "workspace/a", b"a")
    # Now there are two; the ones that were made for nothing are not in the way, nor let in.
    status, answer = await stand.server.call("POST", "environments", {})
    assert (status, answer["error"]["status"]) == (400, "FAILED_PRECONDITION")
    for _ in range(2):
        with pytest.raises(QuotaReached, match=r"2 environments.*sandbox\.max_environments"):
            await environments.locate(spare[1])
    assert not await environments.has_files(spare[1])
    assert (await stand.server.call("DELETE", f"environments/{first}"))[0] == 200
    await environments.locate(spare[1])
    assert await environments.has_files(spare[1])
    with pytest.raises(QuotaReached):
        await environments.locate(spare[2])
    # What has been counted once is let in again.
    await environments.locate(spare[0])
    await environments.locate(spare[1])


async def test_a_refusal_of_the_quota_does_not_ask_for_another_try(stand: Stand):
    for _ in range(MOST):
        await stand.made()
    status, body, headers = await stand.call("POST", "/v1beta/environments", b"{}")
    assert status == 400, body
    assert "retry-after" not in {name.lower() for name in headers}


async def test_who_names_it_asks_for_it(stand: Stand):
    environments, mine = stand.server.process.environments, await project(stand.server)
    spare = [await unasked(stand.server) for _ in range(MOST + 1)]
    assert await environments.resolve(mine, spare[0].hex) == spare[0]
    config = {"type": "remote", "environment_id": spare[1].hex, "network": "disabled"}
    assert await environments.resolve(mine, config) == spare[1]
    with pytest.raises(QuotaReached):
        await environments.resolve(mine, spare[2].hex)
    await age(stand.server, *spare)
    assert await environments.expire() == 1
    assert await environments.inherit(mine, spare[1]) == spare[1]


async def test_unused_it_goes_early_but_not_below_a_run(stand: Stand):
    environments, mine = stand.server.process.environments, await project(stand.server)
    old, held, queued, fresh, used = [await unasked(stand.server) for _ in range(5)]
    await environments.locate(used)
    await age(stand.server, old, held, queued, used)
    sql = (
        "insert into jobs (id, project_id, kind, key, state, worker_id) "
        "values (gen_random_uuid(), $1, 'other', $2, $3, $4)"
    )
    await change(stand.server, sql, mine, str(held), 1, 12345)
    await change(stand.server, sql, mine, str(queued), 0, None)
    assert await environments.expire() == 1
    with pytest.raises(NotFound, match="expired"):
        await environments.inherit(mine, old)
    for other in (held, queued, fresh, used):
        assert await environments.inherit(mine, other) == other
    assert not await environments.was_used(mine, old)
    assert await environments.was_used(mine, used)


async def test_whoever_goes_on_in_it_keeps_it(stand: Stand):
    environments, mine = stand.server.process.environments, await project(stand.server)
    spare = await unasked(stand.server)
    await age(stand.server, spare)
    await environments.inherit(mine, spare)
    assert await environments.expire() == 0


async def test_it_goes_with_its_interaction(database_url: str):
    async with (
        house.upstream() as fake,
        house.opened(database_url, fake, sandbox={"max_environments": MOST}) as server,
    ):
        await change(
            server,
            "insert into brokers (name, address, host, pid, backend, capacity, seen) values "
            "('b', 'unix:///nowhere', 'h', 1, 'none', 1, now() + interval '1 hour')",
        )
        made = []
        for number in range(MOST + 2):
            fake.replies.append(house.reply(f"no code {number}"))
            body = {"model": MODEL, "input": "x", "tools": CODE}
            status, answer = await server.call("POST", "interactions", body)
            assert (status, answer["status"]) == (200, "completed"), answer
            made.append(answer)
        assert len({one["environment_id"] for one in made}) == MOST + 2
        # The next turn goes on in it, also after it has gone unused: nothing was lost then.
        fake.replies += [house.reply("on"), house.reply("on")]
        turn = {"model": MODEL, "input": "y", "tools": CODE}
        turn["previous_interaction_id"] = made[0]["id"]
        _, second = await server.call("POST", "interactions", turn)
        assert second["environment_id"] == made[0]["environment_id"]
        await age(server, UUID(made[0]["environment_id"]))
        assert await server.process.environments.expire() == 1
        turn["previous_interaction_id"] = second["id"]
        _, third = await server.call("POST", "interactions", turn)
        assert third["environment_id"] not in {one["environment_id"] for one in made}
        assert not third.get("warnings")
        for one in made[1:]:
            assert (await server.call("DELETE", f"interactions/{one['id']}"))[0] == 200
            path = f"environments/{one['environment_id']}"
            assert (await server.call("GET", path))[0] == 404
        # One that somebody has asked for stays.
        fake.replies.append(house.reply("mine"))
        body = {"model": MODEL, "input": "x", "environment": "remote"}
        _, asked = await server.call("POST", "interactions", body)
        assert (await server.call("DELETE", f"interactions/{asked['id']}"))[0] == 200
        path = f"environments/{asked['environment_id']}"
        assert (await server.call("GET", path))[0] == 200


async def test_it_stays_where_another_interaction_waits_for_its_turn(stand: Stand):
    server = stand.server
    mine, spare, interaction = await project(server), await unasked(server), ids.uuid7()
    await change(
        server,
        "insert into segments (id, project_id) values ($1, $2)",
        segment := ids.uuid7(),
        mine,
    )
    await change(
        server,
        "insert into interactions (id, project_id, segment_id, depth, status, environment_id) "
        "values ($1, $2, $3, 0, 'completed', $4)",
        interaction,
        mine,
        segment,
        spare,
    )
    job = "insert into jobs (id, project_id, kind, key) values (gen_random_uuid(), $1, 'x', $2)"
    await change(server, job, mine, str(spare))
    assert await interactions.delete(server.database, mine, interaction)
    assert await server.process.environments.inherit(mine, spare) == spare
