"""The threads that work on files: nobody has all of them."""

import asyncio
import threading

import pytest

from openinteractions.sandbox.files import threads
from openinteractions.sandbox.files.threads import Halt, haltable, in_thread, owned_by
from tests.broker.test_life import eventually


class Work:
    """Work that does not end before it may."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    def do(self) -> None:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        # A test that fails must not hang.
        self.may_end.wait(20)
        with self._lock:
            self.running -= 1


async def until(work: Work, running: int) -> None:
    await eventually(lambda: work.running >= running)


@pytest.mark.parametrize("is_long", [False, True])
async def test_one_project_leaves_threads_to_the_others(*, is_long: bool):
    work = Work()
    with owned_by("b"):
        waiting = [
            asyncio.ensure_future(haltable(Halt(), work.do) if is_long else in_thread(work.do))
            for _ in range(40)
        ]
    share = 3 if is_long else 4
    await until(work, share)
    with owned_by("a"):
        assert await in_thread(lambda: "read") == "read"
        assert await haltable(Halt(), lambda: "unpacked") == "unpacked"
    if is_long:
        with owned_by("b"):
            assert await in_thread(lambda: "also its own") == "also its own"
    assert work.most == share
    work.may_end.set()
    await asyncio.gather(*waiting)
    assert work.most == share


async def test_long_work_of_many_leaves_threads_to_short_work():
    work = Work()
    waiting: list[asyncio.Future[None]] = []
    for number in range(10):
        with owned_by(f"b{number}"):
            waiting += [asyncio.ensure_future(haltable(Halt(), work.do)) for _ in range(4)]
    await until(work, 12)
    with owned_by("a"):
        assert await in_thread(lambda: "read") == "read"
    assert work.most == 12
    work.may_end.set()
    await asyncio.gather(*waiting)


async def test_lanes_take_turns():
    """Who waits does not wait for all that another one began before."""
    work, order = Work(), list[str]()
    here = threads.Threads()

    def note(owner: str) -> None:
        work.do()
        order.append(owner)

    futures: list[asyncio.Future[None]] = []
    for number in range(16):
        with owned_by(f"full{number}"):
            futures.append(asyncio.wrap_future(here.submit(work.do, is_long=False)))
    await until(work, 16)
    for owner in ("b", "b", "b", "b", "a"):
        with owned_by(owner):
            one = here.submit(lambda owner=owner: note(owner), is_long=False)
            futures.append(asyncio.wrap_future(one))
    waiting = [lane for lane in here._waiting if not lane[0].startswith("full")]
    assert waiting == [("b", False), ("a", False)]
    work.may_end.set()
    await asyncio.gather(*futures)
    assert sorted(order) == ["a", "b", "b", "b", "b"]
    assert not here._waiting
    assert not here._running


async def test_what_waits_for_a_thread_runs_also_if_nobody_waits_for_it():
    """A clean-up must not be lost: what it closes would stay open."""
    work, done = Work(), threading.Event()
    with owned_by("c"):
        waiting = [asyncio.ensure_future(in_thread(work.do)) for _ in range(4)]
        await until(work, 4)
        late = asyncio.ensure_future(in_thread(done.set))
        await asyncio.sleep(0)
    late.cancel()
    await asyncio.sleep(0)
    late.cancel()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await late
    assert done.is_set()
    await asyncio.gather(*waiting)
