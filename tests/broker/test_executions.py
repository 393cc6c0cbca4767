"""Commands: started once, followed to the end, whatever dies in between (ruling R4)."""

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest

from openinteractions import ids
from openinteractions.broker import executions, store
from openinteractions.broker.executions import Bounds, Executions
from openinteractions.broker.live import Live
from openinteractions.broker.slot import Slot
from openinteractions.broker.tasks import Tasks
from openinteractions.errors import Conflict, NotFound, TooMany
from openinteractions.sandbox.port import Exit, SandboxError
from tests.broker.stage import Ran
from tests.sandbox.engine import docker

COUNT = "echo x >> /workspace/count; "
# Prints 1 … 60, one every 50 ms.
SLOW = COUNT + "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo $i; sleep 0.05; done"
SLOW_OUTPUT = "".join(f"{number}\n" for number in range(1, 61)).encode()


async def rows(stage, env):
    return await stage.fetch(
        "select id, epoch, sandbox, exit::text, output, ended_at from executions "
        "where environment_id = $1",
        env,
    )


async def test_a_command_gives_its_output_and_its_end(broker):
    env = await broker.environment(env={"GREETING": {"value": "hello"}})
    script = 'echo "$GREETING $MINE" && pwd && id -u && echo oops >&2; exit 3'
    ran = await broker.run(env, broker.shell(script, env={"MINE": "world"}))
    assert ran.out == b"hello world\n/workspace\n1000\n"
    assert ran.err == b"oops\n"
    assert isinstance(ran.exit, Exit)
    assert (ran.exit.outcome, ran.exit.code, ran.exit.timed_out) == ("exited", 3, False)
    assert ran.exit.output_bytes == len(ran.out + ran.err)
    # Its end is told first, and then stored.
    async with asyncio.timeout(30):
        while (row := (await rows(broker, env))[0])["ended_at"] is None:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    assert row["sandbox"] == broker.container(env)


async def test_the_same_id_is_run_once_and_its_result_is_replayed(broker):
    env = await broker.environment()
    command = broker.shell(COUNT + "echo out; echo err >&2; exit 7")
    first = await broker.run(env, command)
    assert await broker.run(env, command) == first
    # Also when the sandbox is gone, and after a restart of the broker.
    await broker.client.stop(broker.address, env)
    assert await broker.run(env, command) == first
    assert await broker.stop() == 0
    await broker.start()
    again = await broker.run(env, command, offset=2)
    assert (again.out + again.err, again.exit) == ((first.out + first.err)[2:], first.exit)
    assert await broker.sh(env, "cat count") == "x\n"


async def test_two_callers_share_one_run(broker):
    env = await broker.environment()
    command = broker.shell(SLOW)
    one, other = await asyncio.gather(broker.run(env, command), broker.run(env, command))
    assert one.out == other.out == SLOW_OUTPUT
    assert await broker.sh(env, "cat count") == "x\n"


async def test_a_lower_epoch_is_refused(broker):
    env = await broker.environment()
    run = ids.uuid7().hex
    old = broker.shell("true", id=f"{run}.1", epoch=1)
    await broker.run(env, old)
    newer = await broker.run(env, broker.shell("true", id=f"{run}.2", epoch=3))
    assert newer.exit.code == 0
    with pytest.raises(Conflict):
        await broker.run(env, broker.shell(COUNT, id=f"{run}.3", epoch=2))
    # A higher one may take an execution over, and then the old owner has lost it.
    taken = await broker.run(env, broker.shell("true", id=f"{run}.2", epoch=4))
    assert taken.exit == newer.exit
    with pytest.raises(Conflict):
        await broker.run(env, broker.shell("true", id=f"{run}.2", epoch=3))
    # Another run's epochs have nothing to do with it.
    assert (await broker.run(env, broker.shell("true", epoch=1))).exit.code == 0
    assert await broker.sh(env, "ls") == ""


async def test_a_kill_ends_the_command_and_its_children(broker):
    env = await broker.environment()
    command = broker.shell("sleep 300 & sleep 301")
    running = asyncio.ensure_future(broker.run(env, command))
    await until_running(broker, env, command.id)
    await broker.client.kill(broker.address, env, command.id, epoch=command.epoch + 1)
    ran = await asyncio.wait_for(running, 10)
    assert ran.exit.outcome in {"exited", "killed"}
    assert ran.exit.code != 0
    assert "sleep" not in await broker.sh(env, "ps -eo comm")
    # The owner that was replaced starts nothing more.
    run = command.id.partition(".")[0]
    with pytest.raises(Conflict):
        await broker.run(env, broker.shell(COUNT, id=f"{run}.2", epoch=command.epoch))


async def test_a_kill_that_comes_first_keeps_the_command_from_starting(broker):
    env = await broker.environment()
    command = broker.shell(COUNT)
    await broker.client.kill(broker.address, env, command.id, epoch=5)
    with pytest.raises(Conflict):
        await broker.run(env, command)
    ran = await broker.run(env, broker.shell(COUNT, id=command.id, epoch=5))
    assert ran.exit.outcome == "killed"
    assert await broker.sh(env, "ls") == ""


async def test_a_kill_of_what_never_was_does_nothing(broker):
    env = await broker.environment()
    await broker.client.kill(broker.address, env, "nothing.1")
    with pytest.raises(NotFound):
        await broker.client.signal(broker.address, env, "nothing.1", 15)
    with pytest.raises(NotFound):
        async with broker.client.follow(broker.address, env, "nothing.1") as pieces:
            await anext(pieces)


async def test_a_broker_killed_in_the_middle_is_not_noticed(broker):
    env = await broker.environment()
    command = broker.shell(SLOW)
    ran, seen = Ran(), asyncio.Event()

    async def follow():
        async with broker.client.execute(broker.address, env, command) as pieces:
            async for piece in pieces:
                ran.add(piece)
                if b"\n10\n" in ran.out:
                    seen.set()

    following = asyncio.ensure_future(follow())
    await asyncio.wait_for(seen.wait(), 20)
    broker.kill()
    await broker.start()
    await asyncio.wait_for(following, 30)
    assert ran.out == SLOW_OUTPUT
    assert (ran.exit.outcome, ran.exit.code) == ("exited", 0)
    assert await broker.sh(env, "cat count") == "x\n"
    assert broker.events("environment.adopted")[-1]["executions"] == [command.id]


async def test_a_command_that_ends_while_no_broker_is_there_keeps_its_result(broker):
    env = await broker.environment()
    command = broker.shell(COUNT + "sleep 1; echo done")
    running = asyncio.ensure_future(broker.run(env, command))
    await until_running(broker, env, command.id)
    broker.kill()
    await asyncio.sleep(2)
    await broker.start()
    ran = await asyncio.wait_for(running, 30)
    assert (ran.out, ran.exit.code) == (b"done\n", 0)
    await until_stored(broker, env)


async def test_a_sandbox_that_dies_leaves_the_outcome_unknown(broker):
    env = await broker.environment()
    command = broker.shell("echo begun; " + COUNT + "sleep 300")
    running = asyncio.ensure_future(broker.run(env, command))
    await until_running(broker, env, command.id)
    docker("kill", "--signal", "KILL", broker.container(env))
    ran = await asyncio.wait_for(running, 60)
    assert ran.exit.outcome == "unknown"
    assert ran.exit.code is None
    # Never run again; but the next command has a sandbox again, with the files.
    assert (await broker.run(env, command)).exit.outcome == "unknown"
    assert await broker.sh(env, "cat count") == "x\n"
    assert broker.events("sandbox.lost")[0]["environment_id"] == env.hex


async def test_a_sandbox_that_dies_with_its_broker_leaves_the_outcome_unknown(broker):
    env = await broker.environment()
    command = broker.shell(COUNT + "sleep 300")
    running = asyncio.ensure_future(broker.run(env, command))
    await until_running(broker, env, command.id)
    broker.kill()
    docker("kill", "--signal", "KILL", broker.container(env))
    await broker.start()
    ran = await asyncio.wait_for(running, 60)
    assert ran.exit.outcome == "unknown"
    assert await broker.sh(env, "cat count") == "x\n"


async def test_what_was_written_down_and_never_sent_is_unknown(broker):
    env = await broker.environment()
    await broker.sh(env, "true")
    command = broker.shell(COUNT)
    await broker.fetch(
        "insert into executions (environment_id, id, project_id, epoch, sandbox) "
        "values ($1, $2, $3, 1, 'x')",
        env,
        command.id,
        broker.project_id,
    )
    assert (await broker.run(env, command)).exit.outcome == "unknown"
    assert await broker.sh(env, "ls") == ""


async def test_a_result_outlives_a_database_that_was_away(broker, cluster):
    env = await broker.environment()
    command = broker.shell(COUNT + "sleep 1; echo done")
    running = asyncio.ensure_future(broker.run(env, command))
    await until_running(broker, env, command.id)
    name = broker.url.split("@/")[1].split("?")[0]
    await cluster.execute(f'alter database "{name}" allow_connections false')
    await cluster.execute(
        f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
    )
    ran = await asyncio.wait_for(running, 20)
    assert (ran.out, ran.exit.code) == (b"done\n", 0), (ran, broker.log_path.read_text()[-6000:])
    await asyncio.sleep(1)
    assert broker.events("execution.not_stored")
    await cluster.execute(f'alter database "{name}" allow_connections true')
    await until_stored(broker, env)
    assert (await broker.run(env, command)).out == b"done\n"
    assert await broker.sh(env, "cat count") == "x\n"


async def test_output_beyond_the_bound_has_a_mark_in_its_middle(broker):
    env = await broker.environment()
    command = broker.shell("seq 1 200000", max_output_bytes=10_000)
    await broker.run(env, command)
    await until_stored(broker, env)
    ran = await broker.run(env, command)
    whole = "".join(f"{number}\n" for number in range(1, 200_001)).encode()
    assert ran.exit.truncated
    assert ran.exit.output_bytes == len(whole)
    assert len(ran.out) + ran.omitted == len(whole)
    assert len(ran.out) <= 10_000 + 64
    assert ran.out.startswith(b"1\n2\n3\n")
    assert ran.out.endswith(b"199999\n200000\n")


async def test_input_can_be_written_and_a_terminal_resized(broker):
    env = await broker.environment()
    command = broker.command("cat", has_stdin=True)
    running = asyncio.ensure_future(broker.run(env, command))
    await until_running(broker, env, command.id)
    data = os.urandom(300_000)
    at = (broker.address, env, command.id)
    await broker.client.write_stdin(*at, data[:1000])
    await broker.client.write_stdin(*at, data[1000:], is_last=True)
    assert (await asyncio.wait_for(running, 20)).out == data

    command = broker.shell("read line; stty size", pty=(24, 80), has_stdin=True)
    running = asyncio.ensure_future(broker.run(env, command))
    await until_running(broker, env, command.id)
    await broker.client.resize(broker.address, env, command.id, rows=50, cols=132)
    await broker.client.write_stdin(broker.address, env, command.id, b"\n")
    assert b"50 132" in (await asyncio.wait_for(running, 20)).out


async def test_a_time_limit_and_a_signal(broker):
    env = await broker.environment()
    ran = await broker.run(env, broker.shell("sleep 60", timeout_s=0.5))
    assert ran.exit.timed_out
    command = broker.shell("trap 'echo caught; exit 5' TERM; while :; do sleep 0.05; done")
    running = asyncio.ensure_future(broker.run(env, command))
    await until_running(broker, env, command.id)
    await asyncio.sleep(0.3)
    await broker.client.signal(broker.address, env, command.id, signal.SIGTERM)
    ran = await asyncio.wait_for(running, 10)
    assert (ran.out, ran.exit.code) == (b"caught\n", 5)


async def test_what_the_sandbox_refuses_is_not_written_down(broker):
    env = await broker.environment()
    command = broker.command("1 + 1", session="main", pty=(24, 80))
    with pytest.raises(SandboxError):
        await broker.run(env, command)
    assert await rows(broker, env) == []


async def test_a_reader_gets_no_more_than_the_bound_however_fast_it_is(broker):
    env = await broker.environment()
    ran = await broker.run(env, broker.shell("timeout 3 yes", max_output_bytes=49152))
    assert ran.exit.truncated
    assert ran.exit.output_bytes > 1 << 20
    assert len(ran.out) == 49152
    assert len(ran.out) + ran.omitted == ran.exit.output_bytes


@pytest.mark.skipif(os.geteuid() != 0, reason="stopping a process of another user needs root")
async def test_what_does_not_die_when_killed_goes_with_its_sandbox(broker):
    env = await broker.environment()
    command = broker.shell(COUNT + "sleep 300")
    running = asyncio.ensure_future(broker.run(env, command))
    await until_running(broker, env, command.id)
    container = broker.container(env)
    # From inside, the first process of a sandbox cannot be stopped.
    os.kill(int(docker("inspect", "--format", "{{.State.Pid}}", container).stdout), signal.SIGSTOP)
    killing = asyncio.ensure_future(broker.client.kill(broker.address, env, command.id, epoch=2))
    ran = await asyncio.wait_for(running, 20)
    assert (ran.exit.outcome, ran.exit.signal, ran.exit.timed_out) == ("killed", 9, False)
    await asyncio.wait_for(killing, 20)
    assert broker.container(env) != container
    assert broker.events("environment.stopped")[-1]["why"] == "a command did not end"
    assert await broker.sh(env, "cat count") == "x\n"


async def test_what_runs_for_an_interaction_that_has_ended_is_killed(broker):
    env = await broker.environment()
    runs = {}
    for status in ("in_progress", "cancelled", "deleted", None):
        key = ids.uuid7()
        if status is not None:
            await broker.fetch(
                "insert into interactions (id, project_id, segment_id, depth, status) "
                "values ($1, $2, $1, 0, 'in_progress')",
                key,
                broker.project_id,
            )
        command = broker.shell("sleep 300", id=f"{key.hex}.1")
        runs[status] = asyncio.ensure_future(broker.run(env, command))
        await until_running(broker, env, command.id)
        if status == "cancelled":
            await broker.fetch("update interactions set status = $2 where id = $1", key, status)
        elif status == "deleted":
            await broker.fetch("update interactions set deleted_at = now() where id = $1", key)
    ended = await asyncio.wait_for(asyncio.gather(runs["cancelled"], runs["deleted"]), 30)
    assert [ran.exit.outcome for ran in ended] == ["killed", "killed"]
    # One that is not stored has no row.
    assert not runs["in_progress"].done()
    assert not runs[None].done()
    await broker.client.stop(broker.address, env)
    await asyncio.gather(*runs.values())


class Mute:
    """A pipe whose other side says what it likes, or nothing."""

    def __init__(self, error=None):
        self.lost, self.error = asyncio.Event(), error
        self.killed = []

    async def follow(self, name, offset):
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()
        yield

    async def kill(self, name):
        self.killed.append(name)
        await asyncio.Event().wait()

    async def forget(self, name):
        raise self.error or ConnectionResetError


class Follower:
    """Executions of a house with one sandbox; keeps what was stored, and whether it was stopped."""

    def __init__(self, monkeypatch, error=None):
        self.stored, self.stops = {}, []
        monkeypatch.setattr(store, "end", self.end)
        self.tasks = Tasks()
        self.slot = Slot(ids.uuid7())
        live = Live(self.slot.id, ids.uuid7(), "ref", Mute(error), None)
        self.slot.live = self.live = live
        parts = SimpleNamespace(database=None, tasks=self.tasks)
        self.executions = Executions(
            SimpleNamespace(parts=parts, stop=self.stop, slot=lambda _: self.slot)
        )

    async def end(self, database, environment_id, name, *, fields, output):
        self.stored[name] = fields

    async def stop(self, environment_id, why):
        self.stops.append(environment_id)
        self.slot.live = None
        self.live.pipe.lost.set()

    def follow(self, name, **bounds):
        return self.executions.follow(self.slot, self.live, name, 1, Bounds(**bounds))


async def test_a_time_limit_holds_whatever_the_sandbox_does(monkeypatch):
    monkeypatch.setattr(executions, "_GRACE_S", 0.1)
    house = Follower(monkeypatch)
    async with house.tasks.running():
        running = house.follow("x.1", timeout_s=0.1)
        await asyncio.wait_for(running.task, 5)
    ended = house.stored["x.1"]
    assert (ended["outcome"], ended["timed_out"]) == ("killed", True)
    assert running.record.exit.timed_out
    assert house.stops == [house.slot.id]
    assert not house.slot.running


async def test_a_kill_holds_whatever_the_sandbox_does(monkeypatch):
    monkeypatch.setattr(executions, "_KILL_GRACE_S", 0.1)
    house = Follower(monkeypatch)
    async with house.tasks.running():
        running = house.follow("x.1")
        killing = asyncio.ensure_future(
            house.executions.signal(house.slot.id, "x.1", 9, epoch=None)
        )
        await asyncio.wait_for(running.task, 5)
        killing.cancel()
    assert house.live.pipe.killed == ["x.1"]
    assert house.stored["x.1"]["outcome"] == "killed"
    assert not house.stored["x.1"]["timed_out"]
    assert house.stops == [house.slot.id]


@pytest.mark.parametrize(
    "error", [TooMany("busy"), TypeError("a list"), OverflowError(), RecursionError()]
)
async def test_an_answer_that_nobody_foresaw_is_an_unknown_end(monkeypatch, error):
    house = Follower(monkeypatch, error)
    async with house.tasks.running():
        running = house.follow("x.1")
        await asyncio.wait_for(running.task, 5)
    assert house.stored["x.1"]["outcome"] == running.record.exit.outcome == "unknown"
    assert house.stops == [house.slot.id]
    assert not house.slot.running


async def test_a_cell_has_its_time_after_those_before_it(monkeypatch):
    house = Follower(monkeypatch)
    async with house.tasks.running():
        now = asyncio.get_running_loop().time()
        first = house.follow("x.1", timeout_s=600, session="a")
        second = house.follow("x.2", timeout_s=600, session="a")
        other = house.follow("x.3", timeout_s=600, session="b")
        plain = house.follow("x.4", timeout_s=600)
        endless = house.follow("x.5")
        ends = [round(each.ends_by - now) for each in (first, second, other, plain, endless)]
        await asyncio.sleep(0)
    assert ends == [630, 1260, 630, 630, 86430]


async def test_a_follower_that_is_cut_off_by_the_brokers_end_stores_nothing(monkeypatch):
    house = Follower(monkeypatch)
    async with house.tasks.running():
        house.follow("x.1")
        await asyncio.sleep(0.05)
    assert not house.stored
    assert not house.stops
    # So the next broker finds the sandbox at work.
    assert list(house.slot.running) == ["x.1"]


async def until_running(stage, env, name):
    """The command has begun to run."""
    async with asyncio.timeout(30):
        while True:
            for each in await stage.client.environments(stage.address):
                if each["id"] == env.hex and name in each["executions"]:
                    return
            await asyncio.sleep(0.05)


async def until_stored(stage, env):
    async with asyncio.timeout(30):
        while True:
            if all(row["exit"] for row in await rows(stage, env)):
                return
            await asyncio.sleep(0.05)
