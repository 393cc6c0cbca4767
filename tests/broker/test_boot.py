"""Taking over from a broker before, where sandboxes answer what they like."""

import asyncio
import time
from types import SimpleNamespace
from uuid import UUID

import pytest

from openinteractions import ids
from openinteractions.broker import boot as boots
from openinteractions.broker import store
from openinteractions.broker.boot import Boot
from openinteractions.broker.live import Live
from openinteractions.broker.rules import Setup
from openinteractions.broker.slot import Slot
from openinteractions.broker.store import Row, Unfinished
from openinteractions.broker.tasks import Tasks
from openinteractions.sandbox.port import BackendDown, SandboxError


class Pipe:
    """What a sandbox answers."""

    def __init__(self, listed):
        self.listed, self.lost = listed, asyncio.Event()
        self.forgotten = 0
        self.is_closed = False

    async def list(self):
        if isinstance(self.listed, Exception):
            raise self.listed
        if self.listed is None:
            await asyncio.Event().wait()
        return self.listed

    async def forget(self, name):
        self.forgotten += 1
        await asyncio.Event().wait()

    async def close(self):
        self.is_closed = True


class Town:
    """A house with sandboxes that a broker before has left."""

    def __init__(self, monkeypatch, pipes):
        self.pipes = {ids.uuid7(): pipe for pipe in pipes}
        self.slots = {env: Slot(env) for env in self.pipes}
        self.removed, self.followed, self.ended = [], [], []
        self.tasks = Tasks()
        self.unfinished = []
        self.mounted = []
        self.is_quick = False
        """Commands end before anything else happens."""
        self.problem = None
        monkeypatch.setattr(store, "environments", self.environments)
        monkeypatch.setattr(store, "unfinished", self.find_unfinished)
        monkeypatch.setattr(store, "end", self.end)
        launcher = SimpleNamespace(
            pool=SimpleNamespace(recover=self.recover), attach=self.attach, remove=self.remove
        )
        parts = SimpleNamespace(
            database=None,
            launcher=launcher,
            rules=SimpleNamespace(load=self.load),
            disks=SimpleNamespace(open=self.open, mounted=self.find_mounted),
            tasks=self.tasks,
        )
        self.house = SimpleNamespace(
            name="b",
            parts=parts,
            slot=self.slots.__getitem__,
            slots=self.slots.values,
            egress=lambda *_: SimpleNamespace(swap=lambda *_: None),
            adopt=self.adopt,
            is_complete=False,
            running=0,
        )
        self.boot = Boot(self.house, SimpleNamespace(follow=self.follow))

    def adopt(self, slot, row, ref, pipe, egress):
        slot.live = Live(row.id, row.project_id, ref, pipe, egress)
        return slot.live

    def follow(self, slot, live, name, epoch, bounds):
        if not self.is_quick:
            slot.running[name] = None
        self.followed.append((name, round(bounds.timeout_s)))

    async def environments(self, database, found):
        return {env: Row(env, ids.uuid7(), "b", True, 1, False) for env in found}

    async def find_mounted(self):
        return [env.hex for env in self.mounted]

    async def find_unfinished(self, database, name):
        return self.unfinished

    async def end(self, database, environment_id, name, *, fields, output):
        self.ended.append((name, fields["outcome"]))

    async def recover(self):
        return {env.hex: env.hex for env in self.pipes}

    async def attach(self, ref, egress):
        if self.problem is not None:
            raise self.problem
        return self.pipes[UUID(ref)]

    async def remove(self, ref):
        self.removed.append(ref)

    async def load(self, row):
        return Setup(revision=1, variables={}, credential_ids=(), policy=None)

    async def open(self, env):
        return None

    def is_live(self):
        return [slot.live is not None for slot in self.slots.values()]


def listed(name, *, is_running):
    return {"id": name, "is_running": is_running}


@pytest.mark.parametrize(
    "lie", [OverflowError("huge"), TypeError("no dict"), RecursionError(), SandboxError("no"), [{}]]
)
async def test_a_sandbox_that_lies_is_removed_and_the_others_are_taken_in(monkeypatch, lie):
    town = Town(monkeypatch, [Pipe([]), Pipe(lie), Pipe([listed("x.1", is_running=True)])])
    first, bad, last = town.pipes
    town.unfinished = [
        Unfinished(last, "x.1", ids.uuid7(), 1, "c", 3600.0),
        Unfinished(last, "x.2", ids.uuid7(), 1, "c", 1.0),
        Unfinished(bad, "y.1", ids.uuid7(), 1, "c", 1.0),
    ]
    async with town.tasks.running():
        await town.boot.take_over()
        await asyncio.sleep(0)
    assert town.is_live() == [True, False, True]
    assert town.removed == [bad.hex]
    assert town.pipes[bad].is_closed
    assert town.followed == [("x.1", 23 * 3600)]
    assert sorted(town.ended) == [("x.2", "unknown"), ("y.1", "unknown")]
    assert town.house.is_complete
    assert not town.pipes[first].is_closed


async def test_sandboxes_that_answer_nothing_cost_their_time_once(monkeypatch):
    monkeypatch.setattr(boots, "_ADOPT_S", 2.0)
    town = Town(monkeypatch, [Pipe(None) for _ in range(8)])
    began = time.monotonic()
    async with town.tasks.running():
        await town.boot.take_over()
        await asyncio.sleep(0)
    # One after the other it would be 16 s.
    assert time.monotonic() - began < 10
    assert len(town.removed) == 8


async def test_what_is_to_be_forgotten_holds_up_nothing(monkeypatch):
    monkeypatch.setattr(boots, "_FORGET_S", 0.2)
    town = Town(monkeypatch, [Pipe([listed(f"x.{n}", is_running=False) for n in range(50_000)])])
    (pipe,), (slot,) = town.pipes.values(), town.slots.values()
    async with town.tasks.running():
        await asyncio.wait_for(town.boot.take_over(), 5)
        assert not slot.lock.locked()
        await asyncio.sleep(0.5)
        assert pipe.forgotten == 1
        assert [task.get_name() for task in town.tasks._tasks] == ["abandoned"]


async def test_an_engine_that_goes_away_removes_nothing_and_is_tried_again(monkeypatch):
    town = Town(monkeypatch, [Pipe([]), Pipe([])])
    town.problem = BackendDown("away")
    async with town.tasks.running():
        with pytest.raises(BackendDown):
            await town.boot.take_over()
        assert not town.boot.is_done
        assert not town.removed
        town.problem = None
        await town.boot.take_over()
        lives = [slot.live for slot in town.slots.values()]
        town.boot.is_done = False
        # What is taken in stays as it is.
        await town.boot.take_over()
        await asyncio.sleep(0)
        assert [slot.live for slot in town.slots.values()] == lives
    assert town.is_live() == [True, True]


async def test_what_ended_while_it_was_taken_in_is_not_unknown(monkeypatch):
    """It is followed to its end, and that end is stored: nothing else is said of it."""
    town = Town(monkeypatch, [Pipe([listed("x.1", is_running=True)])])
    (env,) = town.pipes
    town.unfinished = [
        Unfinished(env, "x.1", ids.uuid7(), 1, "c", 1.0),
        Unfinished(env, "x.2", ids.uuid7(), 1, "c", 1.0),
    ]
    town.is_quick = True
    async with town.tasks.running():
        await town.boot.take_over()
        await asyncio.sleep(0)
    assert [name for name, _ in town.followed] == ["x.1"]
    assert town.ended == [("x.2", "unknown")]


async def test_disks_that_were_left_open_are_known_to_be(monkeypatch):
    """Otherwise nobody would close one before its environment is used again."""
    town = Town(monkeypatch, [])
    idle, lost = ids.uuid7(), ids.uuid7()
    town.slots |= {env: Slot(env) for env in (idle, lost)}
    town.mounted = [lost]
    async with town.tasks.running():
        await town.boot.take_over()
        await asyncio.sleep(0)
    assert [town.slots[env].is_open for env in (idle, lost)] == [False, True]
