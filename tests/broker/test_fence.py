"""Whose changes of files are made: the owner's, by the run's job (ruling R4)."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from openinteractions import ids
from openinteractions.broker.house import House
from openinteractions.db.engine import Database
from openinteractions.sandbox.port import Displaced, Owner
from tests.events import stage

ENV, OTHER = ids.uuid7(), ids.uuid7()


@pytest.fixture
def house(database: Database) -> House:
    """One that has a database, and nothing else."""
    parts = SimpleNamespace(database=database, disks=None)
    return House("b", parts, max_running=1, idle_stop_s=1.0)


@pytest.fixture
async def owner(database: Database) -> Owner:
    return Owner((await stage.interaction(database)).id, 1)


async def is_let_in(house: House, owner: Owner) -> bool:
    try:
        async with house.fenced(ENV, owner):
            return True
    except Displaced:
        return False


async def test_only_the_owner_of_a_running_job_is_let_in(house, owner, database):
    assert await is_let_in(house, owner)
    assert not await is_let_in(house, Owner(ids.uuid7(), 1))
    for epoch in (0, 2, 2**62):
        assert not await is_let_in(house, replace(owner, epoch=epoch))
    await stage.take_over(database, owner.interaction_id)
    assert not await is_let_in(house, owner)
    assert await is_let_in(house, replace(owner, epoch=2))


@pytest.mark.parametrize(
    "ended",
    [
        "update jobs set state = 0, worker_id = null where id = $1",
        "update jobs set state = 3, worker_id = null where id = $1",
        "delete from jobs where id = $1",
    ],
)
async def test_nobody_owns_what_does_not_run(house, owner, database, ended):
    async with database.hot() as connection:
        await connection.execute(ended, owner.interaction_id)
    assert not await is_let_in(house, owner)


async def test_changes_of_one_environment_come_one_after_the_other(house, owner, database):
    """What was let in before a takeover is over when the next owner is let in."""
    said: list[str] = []
    successor = replace(owner, epoch=2)

    async def change(environment, by):
        async with house.fenced(environment, by):
            said.append("in")

    async with house.fenced(ENV, owner):
        await stage.take_over(database, owner.interaction_id)
        waiting = asyncio.create_task(change(ENV, successor))
        # Another environment has its own turns.
        await change(OTHER, successor)
        await asyncio.sleep(0.2)
        said.append("out")
    await waiting
    assert said == ["in", "out", "in"]


async def test_who_fails_within_it_leaves_it(house, owner):
    with pytest.raises(ZeroDivisionError):
        async with house.fenced(ENV, owner):
            raise ZeroDivisionError
    async with asyncio.timeout(5):
        assert not await is_let_in(house, replace(owner, epoch=0))
        assert await is_let_in(house, owner)
