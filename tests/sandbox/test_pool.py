"""The pool of warm sandboxes with real containers, whose main process is a plain shell."""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

import pytest

from openinteractions.sandbox import mounts, pool
from openinteractions.sandbox.disk import Disks
from openinteractions.sandbox.docker import DockerBackend
from openinteractions.sandbox.pool import Pool, Started
from openinteractions.sandbox.port import (
    UID,
    Backend,
    BackendDown,
    Duplex,
    Gone,
    Limits,
    Mount,
    Sandbox,
    SandboxError,
    SandboxSpec,
)
from tests.contracts.sandbox.suite import say
from tests.sandbox.engine import SLIM, DockerEngine

A, B, C = (letter * 32 for letter in "abc")
LIMITS = Limits(cpus=1, memory_bytes=128 * 2**20, pids=48, tmp_bytes=32 * 2**20)
PATIENCE_S = 30
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class Shell:
    """A pipe to a shell that is the sandbox's main process."""

    def __init__(self, stream: Duplex) -> None:
        self.stream = stream

    @classmethod
    async def open(cls, channel: Duplex, *, is_fresh: bool) -> "Shell":
        assert await say(channel, "echo up") == "up\n"
        return cls(channel)

    async def ping(self) -> None:
        await say(self.stream, ":")

    async def close(self) -> None:
        await self.stream.close()

    async def say(self, script: str) -> str:
        # The shell is older than what lies over its folder now.
        return await say(self.stream, f"cd /workspace; {script}")


def spec_of(*, name: str, mounts: Sequence[Mount], labels: Mapping[str, str]) -> SandboxSpec:
    return SandboxSpec(
        name=name, image=SLIM, argv=["bash"], limits=LIMITS, mounts=mounts, labels=labels
    )


class House:
    """Brokers' disks and pools over one folder."""

    def __init__(self, folder: Path, name: str, backend: Backend) -> None:
        self.folder = folder
        self.name = name
        self.backend = backend
        self.disks = Disks(folder, size_bytes=24 * 2**20)
        self._started: list[tuple[Pool[Shell], str]] = []

    def pool(self, *, size: int = 1, **changes: object) -> Pool[Shell]:
        given = {"make_spec": spec_of, "open_pipe": Shell.open, **changes}
        return Pool(self.backend, self.folder, broker=self.name, size=size, **given)  # pyright: ignore[reportArgumentType]

    async def root(self, env: str) -> Path:
        await self.disks.ensure(env)
        return await self.disks.open(env)

    async def containers(self) -> list[Sandbox]:
        return list(await self.backend.list({pool.BROKER_LABEL: self.name}))

    async def clean(self) -> None:
        for each in await self.containers():
            await self.backend.remove(each.ref)
        mounts.unmount_all(self.folder)
        await self.disks.close()


@pytest.fixture
async def house(tmp_path: Path, docker_engine: DockerEngine, request) -> AsyncGenerator[House]:
    backend = DockerBackend()
    # Some letters that paths and mount tables have trouble with.
    name = docker_engine.broker_name(re.sub(r"\W", "", request.node.name)[:30] + " é/x")
    house = House(tmp_path / "broker é x", name, backend)
    await house.disks.recover()
    yield house
    await house.clean()
    await backend.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@needs_root
async def test_a_warm_sandbox_gets_the_environments_files(house):
    root = await house.root(A)
    (root / "workspace/a.txt").write_text("before")
    async with house.pool() as warm:
        await until(lambda: warm.warm == 1)
        started = await warm.start(A, root)
        assert started.is_warm
        assert await started.pipe.say("pwd; cat a.txt; echo; ls -A /.agents ~") == (
            "/workspace\nbefore\n/.agents:\n\n/home/agent:\n"
        )
        script = "echo w >b.txt; echo x >/.agents/AGENTS.md; echo h >~/.profile; sync"
        assert await started.pipe.say(script) == ""
        for path, text in (
            ("workspace/b.txt", "w\n"),
            (".agents/AGENTS.md", "x\n"),
            ("home/.profile", "h\n"),
        ):
            assert (root / path).read_text() == text
        (root / "workspace/late").write_text("from the host")
        assert await started.pipe.say("cat late") == "from the host"
        await started.pipe.close()
        await warm.remove(started.ref)
    assert (root / "workspace/b.txt").exists()
    assert await house.disks.release(A)
    assert list((house.folder / "warm").iterdir()) == []
    assert await house.containers() == []


@needs_root
async def test_every_environment_has_a_container_of_its_own(house):
    """More ask at once than are ready."""
    async with house.pool(size=2) as warm:
        await until(lambda: warm.warm == 2)
        roots = {env: await house.root(env) for env in (A, B, C)}
        started: list[Started[Shell]] = await asyncio.gather(
            *(warm.start(env, root) for env, root in roots.items())
        )
        assert len({each.ref for each in started}) == 3
        assert sorted(each.is_warm for each in started) == [False, True, True]
        for env, each in zip(roots, started, strict=True):
            await each.pipe.say(f"echo {env} >mine")
        assert [(root / "workspace/mine").read_text() for root in roots.values()] == [
            f"{env}\n" for env in roots
        ]
        await until(lambda: warm.warm == 2)
        with pytest.raises(SandboxError, match="has a sandbox already"):
            await warm.start(A, roots[A])
        for each in started:
            await each.pipe.close()
            await warm.remove(each.ref)


@needs_root
async def test_a_warm_sandbox_shows_nothing_and_keeps_nothing_before_its_claim(house):
    """What a sandbox wrote into folders that are not there yet would be lost, so it cannot."""
    async with house.pool() as warm:
        await until(lambda: warm.warm == 1)
        pipe = warm._waiting[0].pipe
        for path in ("/workspace", "/.agents", "/home/agent"):
            script = f"ls -A {path}; touch {path}/x 2>/dev/null || echo refused"
            assert await pipe.say(script) == "refused\n"


async def test_without_a_pool_it_starts_with_its_folders(house):
    root = await house.root(A)
    (root / "workspace/a.txt").write_text("there")
    async with house.pool(size=0) as cold:
        started = await cold.start(A, root)
        assert not started.is_warm
        assert await started.pipe.say("cat a.txt; echo new >b.txt") == "there"
        assert (root / "workspace/b.txt").read_text() == "new\n"
        [found] = await house.containers()
        assert found.labels[pool.ENVIRONMENT_LABEL] == A
        await started.pipe.close()
        await cold.remove(started.ref)
        await cold.remove(started.ref)
        again = await cold.start(A, root)
        assert await again.pipe.say("cat b.txt") == "new\n"
        await again.pipe.close()
        await cold.remove(again.ref)


@needs_root
async def test_further_folders_are_mounted_from_the_start(house):
    """So their sandbox is a new one, and the warm one is left to others."""
    root = await house.root(A)
    for name in ("data", ".back-end_2"):
        (root / name).mkdir(mode=0o755)
        os.chown(root / name, UID, UID)
    # What is none, whoever has put it there.
    (root / "etc").mkdir()
    (root / "link").symlink_to("/etc")
    (root / "file").touch()
    async with house.pool() as warm:
        await until(lambda: warm.warm == 1)
        started = await warm.start(A, root)
        assert not started.is_warm
        assert warm.warm == 1
        script = (
            "for d in /data /.back-end_2; do stat -c '%n %u:%g %a' $d; echo $d >$d/x; "
            "echo 'echo ran' >$d/s; chmod +x $d/s; sh -c $d/s; done; "
            "exec 2>/dev/null; mkdir /other || echo read-only; rmdir /data; ls -d /link /file"
        )
        assert await started.pipe.say(script) == (
            "/data 1000:1000 755\nran\n/.back-end_2 1000:1000 755\nran\nread-only\n"
        )
        assert (root / "data/x").read_text() == "/data\n"
        assert (root / "data/x").stat().st_uid == UID
        assert (await started.pipe.say("cat /etc/passwd")).startswith("root:")
        other = await house.root(B)
        neighbour = await warm.start(B, other)
        assert neighbour.is_warm
        assert await neighbour.pipe.say("ls -d /data 2>/dev/null || echo none") == "none\n"
        for each in (started, neighbour):
            await each.pipe.close()
            await warm.remove(each.ref)
    assert await house.disks.release(A)


@needs_root
async def test_a_warm_sandbox_that_died_is_passed_over(house):
    root = await house.root(A)
    async with house.pool(size=2) as warm:
        await until(lambda: warm.warm == 2)
        dead, alive = (each.ref for each in warm._waiting)
        await house.backend.remove(dead)
        started = await warm.start(A, root)
        assert (started.ref, started.is_warm) == (alive, True)
        await until(lambda: warm.warm == 2)
        await started.pipe.close()
        await warm.remove(started.ref)


@needs_root
async def test_a_new_broker_finds_the_sandboxes_of_environments(house):
    roots = {env: await house.root(env) for env in (A, B)}
    old = house.pool()
    async with old:
        await until(lambda: old.warm == 1)
        warm = await old.start(A, roots[A])
        await until(lambda: old.warm == 1)
        # What a killed broker leaves: one of each kind, and a warm one.
        old._size = 0
        await old._waiting.pop().pipe.close()
    cold = await house.pool(size=0).start(B, roots[B])
    for each in (warm, cold):
        await each.pipe.say("kept=yes")
        await each.pipe.close()
    assert len(await house.containers()) == 3

    new = house.pool(size=0)
    assert dict(await new.recover()) == {A: warm.ref, B: cold.ref}
    assert {each.ref for each in await house.containers()} == {warm.ref, cold.ref}
    assert len(list((house.folder / "warm").iterdir())) == 1
    for env, ref in ((A, warm.ref), (B, cold.ref)):
        pipe = await new.attach(ref)
        assert await pipe.say("echo $kept; echo >again") == "yes\n"
        assert (roots[env] / "workspace/again").exists()
        with pytest.raises(SandboxError, match="already"):
            await new.start(env, roots[env])
        await pipe.close()
        await new.remove(ref)
    with pytest.raises(Gone):
        await new.attach(warm.ref)
    assert list((house.folder / "warm").iterdir()) == []
    assert await house.disks.release(A)


@needs_root
@pytest.mark.parametrize("damage", ["one mount is missing", "it has stopped", "no note"])
async def test_a_half_claimed_sandbox_is_removed(house, damage):
    root = await house.root(A)
    (root / "workspace/a.txt").write_text("kept")
    old = house.pool()
    async with old:
        await until(lambda: old.warm == 1)
        started = await old.start(A, root)
        old._size = 0
    place = old._places[started.ref]
    if damage == "one mount is missing":
        assert mounts.unmount(place / "home", lazily=True)
    elif damage == "no note":
        (place / "env").unlink()
    else:
        with contextlib.suppress(AssertionError):
            await started.pipe.say("exit")
        await asyncio.sleep(0.5)
    await started.pipe.close()
    new = house.pool(size=0)
    assert dict(await new.recover()) == {}
    assert await house.containers() == []
    assert list((house.folder / "warm").iterdir()) == []
    assert (root / "workspace/a.txt").read_text() == "kept"


async def test_brokers_of_one_name_leave_each_other_alone(house, tmp_path):
    """Two checkouts on one machine, say."""
    root = await house.root(A)
    here = house.pool(size=0)
    started = await here.start(A, root)
    other = House(tmp_path / "other", house.name, house.backend)
    assert dict(await other.pool(size=0).recover()) == {}
    assert await started.pipe.say("echo alive") == "alive\n"
    await started.pipe.close()
    await here.remove(started.ref)


async def test_what_a_broken_start_left_makes_room(house):
    root = await house.root(A)
    first = house.pool(size=0)
    left = await first.start(A, root)
    await left.pipe.close()
    second = house.pool(size=0)
    started = await second.start(A, root)
    assert [each.ref for each in await house.containers()] == [started.ref]
    await started.pipe.close()
    await second.remove(started.ref)


@pytest.mark.parametrize("error", [SandboxError("no answer"), ConnectionResetError("lost")])
async def test_a_pipe_that_does_not_open_leaves_no_container(house, error):
    async def fail(channel: Duplex, *, is_fresh: bool) -> Shell:
        raise error

    root = await house.root(A)
    broken = house.pool(size=0, open_pipe=fail)
    with pytest.raises(type(error)):
        await broken.start(A, root)
    assert await house.containers() == []
    good = house.pool(size=0)
    started = await good.start(A, root)
    await started.pipe.close()
    await good.remove(started.ref)


async def test_a_supervisor_that_is_silent_is_not_waited_for_for_ever(house, monkeypatch):
    monkeypatch.setattr(pool, "_PIPE_S", 0.2)

    async def hang(channel: Duplex, *, is_fresh: bool) -> Shell:
        await asyncio.sleep(60)
        return Shell(channel)

    root = await house.root(A)
    with pytest.raises(SandboxError, match="does not answer"):
        await house.pool(size=0, open_pipe=hang).start(A, root)
    assert await house.containers() == []


@needs_root
async def test_a_claim_that_is_given_up_removes_what_has_seen_the_files(house):
    class Silent(Shell):
        async def ping(self) -> None:
            await asyncio.sleep(60)

    root = await house.root(A)
    async with house.pool(open_pipe=Silent.open) as warm:
        await until(lambda: warm.warm == 1)
        ref = warm._waiting[0].ref
        claim = asyncio.ensure_future(warm.start(A, root))
        await asyncio.sleep(0.2)
        claim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claim
        assert ref not in {each.ref for each in await house.containers()}
    assert await house.disks.release(A)


@needs_root
async def test_mounts_that_do_not_appear_are_noticed_and_done_without(house, monkeypatch):
    """As where the engine has a mount namespace of its own."""
    monkeypatch.setattr(pool, "_lay_sample", lambda place: None)
    root = await house.root(A)
    async with house.pool() as cold:
        await until(lambda: bool(cold.problems))
        assert "do not appear in containers" in cold.problems[0]
        started = await cold.start(A, root)
        assert not started.is_warm
        await started.pipe.close()
        await cold.remove(started.ref)
    assert await house.containers() == []


async def test_without_root_nothing_is_kept_ready_and_it_says_so(house, monkeypatch):
    monkeypatch.setattr(pool.os, "geteuid", lambda: 1000)
    async with house.pool() as cold:
        await until(lambda: bool(cold.problems))
        assert "mounting needs root" in cold.problems[0]
        assert cold.warm == 0


class Flaky:
    """An engine that is down for some calls."""

    name = "flaky"

    def __init__(self, inner: Backend, failures: int) -> None:
        self._inner = inner
        self.failures = failures

    async def create(self, spec: SandboxSpec) -> str:
        if self.failures > 0:
            self.failures -= 1
            raise BackendDown("The engine is having a rest.")
        return await self._inner.create(spec)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


@needs_root
async def test_an_engine_that_is_down_is_tried_again_ever_more_rarely(house, monkeypatch):
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def quick(seconds: float) -> None:
        if seconds >= 1:
            pauses.append(seconds)
        await sleep(min(seconds, 0.02))

    flaky = Flaky(house.backend, failures=8)
    house.backend, real = flaky, house.backend  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(pool.asyncio, "sleep", quick)
    async with house.pool() as warm:
        await until(lambda: bool(warm.problems))
        assert "having a rest" in warm.problems[0]
        await until(lambda: warm.warm == 1)
        assert list(warm.problems) == []
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert list((house.folder / "warm").iterdir()) == []
    house.backend = real


@needs_root
async def test_clearing_a_place_never_deletes_what_is_mounted_there(house, monkeypatch):
    root = await house.root(A)
    (root / "workspace/a.txt").write_text("kept")
    place = house.folder / "warm/0123456789abcdef"
    place.parent.mkdir()
    pool._make(place)
    pool._lay(place, A, root)
    with monkeypatch.context() as patch:
        patch.setattr(mounts, "unmount_all", lambda folder: None)
        pool._clear(place)
    assert (root / "workspace/a.txt").read_text() == "kept"
    pool._clear(place)
    assert not place.exists()
    assert (root / "workspace/a.txt").read_text() == "kept"
