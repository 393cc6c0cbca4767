"""Whose turn it is where there are fewer sandboxes than projects want."""

from types import SimpleNamespace
from uuid import UUID

import pytest

from openinteractions import ids
from openinteractions.broker.house import House
from openinteractions.broker.shares import Shares
from openinteractions.errors import Unready

A, B, C = (UUID(int=number) for number in range(1, 4))


class Clock:
    """Stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shares(clock: Clock) -> Shares:
    return Shares(6, now=clock)


def test_one_project_may_have_all_where_no_other_wants_any(shares):
    assert all(shares.may_have(B, {B: busy}) for busy in range(6))
    shares.note_refusal(B)
    assert shares.may_have(B, {B: 5})


def test_what_becomes_free_is_for_who_has_fewer(shares):
    shares.note_refusal(A)
    assert not shares.may_have(B, {B: 5})
    assert shares.may_have(A, {B: 5})
    shares.note_start(A)
    assert shares.may_have(B, {A: 1, B: 4})
    shares.note_refusal(A)
    shares.note_refusal(C)
    # Two each.
    for project, busy, may in ((B, {B: 4, A: 1}, False), (A, {B: 4, A: 1}, True)):
        assert shares.may_have(project, busy) is may
    assert not shares.may_have(A, {A: 2, B: 3})
    assert shares.may_have(B, {B: 1, A: 4})


def test_where_there_is_enough_for_all_who_wait_nobody_is_held_back(shares):
    shares.note_refusal(A)
    assert shares.may_have(B, {B: 4})


def test_who_does_not_ask_again_wants_none(shares, clock):
    shares.note_refusal(A)
    clock.now += 11
    assert shares.may_have(B, {B: 5})


def test_each_may_have_one_where_there_are_more_projects_than_sandboxes(clock):
    shares = Shares(1, now=clock)
    for project in (A, B):
        shares.note_refusal(project)
    assert shares.may_have(C, {})
    assert not shares.may_have(B, {B: 1})


def test_the_operator_is_told_once_a_minute(shares, clock):
    assert [shares.note_refusal(A) for _ in range(3)] == [True, False, False]
    clock.now += 61
    assert shares.note_refusal(B)


class Town:
    """A house with sandboxes of two projects, and no engine."""

    def __init__(self, most: int) -> None:
        async def nothing(*_: object) -> bool:
            return True

        launcher = SimpleNamespace(remove=nothing, pool=SimpleNamespace(warm=0))
        parts = SimpleNamespace(launcher=launcher, disks=SimpleNamespace(release=nothing))
        self.house = House("b", parts, max_running=most, idle_stop_s=60.0)
        self._nothing = nothing

    def start(self, project: UUID) -> UUID:
        """A sandbox in which something runs."""
        env = ids.uuid7()
        slot = self.house.slot(env)
        slot.live = SimpleNamespace(project_id=project, ref=env.hex, leave=self._nothing)
        slot.uses = 1
        return env

    async def asks(self, project: UUID) -> bool:
        try:
            await self.house._make_room(project)
        except Unready as error:
            return not (error.retry_after_s and "sandbox.max_running" in error.message)
        return True


async def test_a_project_that_waits_gets_what_becomes_free():
    town = Town(3)
    first, *_ = [town.start(B) for _ in range(3)]
    assert not await town.asks(B)
    assert not await town.asks(A)
    town.house.slot(first).uses = 0
    # It was the first to ask; but it has two, and the other one none.
    assert not await town.asks(B)
    assert town.house.running == 3
    assert await town.asks(A)
    assert town.house.running == 2
    town.start(A)
    assert not await town.asks(B)


async def test_a_project_alone_gets_what_becomes_free():
    town = Town(3)
    first, *_ = [town.start(B) for _ in range(3)]
    assert not await town.asks(B)
    town.house.slot(first).uses = 0
    assert await town.asks(B)
