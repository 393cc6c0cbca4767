"""How sandboxes come and go: room, idleness, restarts, forks, and what is nobody's."""

import asyncio
import json
import os
import re
import secrets

import pytest

from openinteractions import ids
from openinteractions.errors import Invalid, NotFound, Unready
from openinteractions.sandbox import mounts
from tests.sandbox.engine import SLIM, docker

ROOT = os.geteuid() == 0


async def has_disk(stage, env):
    ((value,),) = await stage.fetch("select has_disk from environments where id = $1", env)
    return value


def disk(stage, env):
    return stage.home / "sandboxes/environments" / env.hex


async def state(stage, env):
    for each in await stage.client.environments(stage.address):
        if each["id"] == env.hex:
            return each["state"]
    return None


async def eventually(check, *, within_s=30):
    async with asyncio.timeout(within_s):
        while True:
            found = check()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.05)


async def write(stage, env, path, data):
    return await stage.client.write(stage.address, env, path, data, overwrite=True)


async def read(stage, env, path):
    async with stage.client.read(stage.address, env, path) as file:
        return b"".join([chunk async for chunk in file])


async def test_files_need_no_sandbox_and_are_the_sandboxs_files(broker):
    env = await broker.environment()
    await write(broker, env, "workspace/in.txt", b"from outside")
    assert await has_disk(broker, env)
    assert await state(broker, env) == "stopped"
    assert await broker.sh(env, "cat in.txt; echo inside > /home/agent/out.txt") == "from outside"
    assert await read(broker, env, "home/out.txt") == b"inside\n"
    entries, _ = await broker.client.list(broker.address, env, "workspace")
    assert [entry.path for entry in entries] == ["workspace/in.txt"]
    assert (await broker.client.usage(broker.address, env))[0] == 2


async def test_an_idle_sandbox_stops_and_comes_back_with_its_files(stage):
    await stage.start(OI_SANDBOX__IDLE_STOP="1s")
    env = await stage.environment()
    await stage.sh(env, "echo kept > /workspace/a; echo gone > /tmp/b; (sleep 600 &) >&2")
    container = stage.container(env)
    await eventually(lambda: stage.container(env) is None)
    assert stage.events("environment.stopped")[-1]["why"] == "idle"
    if ROOT:
        await eventually(lambda: not mounts.points(disk(stage, env)))
    assert await stage.sh(env, "cat /workspace/a; cat /tmp/b 2>/dev/null || echo none") == (
        "kept\nnone\n"
    )
    assert stage.container(env) != container


async def test_a_running_command_is_use(stage):
    await stage.start(OI_SANDBOX__IDLE_STOP="500ms")
    env = await stage.environment()
    assert await stage.sh(env, "sleep 3; echo done") == "done\n"


async def test_room_is_made_by_stopping_the_idlest(stage):
    await stage.start(OI_SANDBOX__MAX_RUNNING="2")
    first, second, third = [await stage.environment() for _ in range(3)]
    await stage.sh(first, "echo 1 > a")
    await stage.sh(second, "echo 2 > a")
    await stage.sh(first, "true")
    await stage.sh(third, "echo 3 > a")
    assert [await state(stage, env) for env in (first, second, third)] == [
        "running",
        "stopped",
        "running",
    ]
    # Those that work are not stopped.
    commands = [(env, stage.shell("sleep 300")) for env in (first, third)]
    runs = [asyncio.ensure_future(stage.run(*each)) for each in commands]
    await eventually(lambda: busy(stage, first, third))
    with pytest.raises(Unready) as refused:
        await stage.sh(second, "cat a")
    assert refused.value.retry_after_s
    assert "2 sandboxes" in refused.value.message
    for env, command in commands:
        await stage.client.kill(stage.address, env, command.id)
    await asyncio.wait_for(asyncio.gather(*runs), 20)
    await eventually(lambda: idle(stage))
    assert await stage.sh(second, "cat a") == "2\n"


async def busy(stage, *envs):
    found = await stage.client.environments(stage.address)
    return {each["id"] for each in found if each["executions"]} >= {env.hex for env in envs}


async def idle(stage):
    return not any(each["executions"] for each in await stage.client.environments(stage.address))


async def test_a_stop_ends_what_runs_and_says_so(broker):
    env = await broker.environment()
    running = asyncio.ensure_future(broker.run(env, broker.shell("sleep 300")))
    await eventually(lambda: busy(broker, env))
    await broker.client.stop(broker.address, env)
    end = (await asyncio.wait_for(running, 10)).exit
    assert (end.outcome, end.stopped_for) == ("killed", "other")
    assert broker.container(env) is None
    await broker.client.stop(broker.address, env)


async def test_a_delete_ends_what_runs_and_says_so(broker):
    env = await broker.environment()
    running = asyncio.ensure_future(broker.run(env, broker.shell("sleep 300")))
    await eventually(lambda: busy(broker, env))
    await broker.fetch("update environments set deleted_at = now() where id = $1", env)
    await broker.client.delete(broker.address, env)
    end = (await asyncio.wait_for(running, 10)).exit
    assert (end.outcome, end.stopped_for) == ("killed", "deleted")


async def test_a_process_that_is_killed_for_memory_is_told_from_one_that_is_not(broker):
    env = await broker.environment()
    killed = await broker.run(env, broker.shell("kill -9 $$"))
    assert (killed.exit.signal, killed.exit.out_of_memory) == (9, False)
    hog = "import sys; x = bytearray(8 << 30)"
    starved = await broker.run(env, broker.shell(f"python3 -c '{hog}'; true"))
    assert (starved.exit.code, starved.exit.out_of_memory) == (0, True)


async def test_a_fork_has_the_files_and_then_its_own(broker):
    parent, child, empty = [await broker.environment() for _ in range(3)]
    await broker.sh(parent, "echo both > a")
    await broker.client.ensure(broker.address, child, source=parent)
    await broker.client.ensure(broker.address, child, source=parent)
    assert await has_disk(broker, child)
    await broker.sh(parent, "echo parent > a")
    assert await broker.sh(child, "cat a; echo child > b") == "both\n"
    assert await broker.sh(parent, "cat a; ls") == "parent\na\n"
    # Nothing to copy yet: an empty one.
    await broker.client.ensure(broker.address, empty, source=await broker.environment())
    assert await broker.sh(empty, "ls") == ""
    with pytest.raises(NotFound):
        await broker.client.ensure(broker.address, await broker.environment(), source=ids.uuid7())


async def test_a_further_folder_needs_a_new_sandbox(broker):
    add = broker.client.add_folders
    env, fork = [await broker.environment() for _ in range(2)]
    await broker.sh(env, "echo kept > /workspace/a")
    before = broker.container(env)
    assert before is not None
    await add(broker.address, env, ["data", "app"])
    assert broker.container(env) is None
    assert broker.events("environment.stopped")[-1]["why"] == "it gets another folder"
    await write(broker, env, "data/in.txt", b"in")
    script = "cat /data/in.txt a; id -u; stat -c %u /app; echo out > /app/out.txt"
    assert await broker.sh(env, script) == "inkept\n1000\n1000\n"
    # Those that are there change nothing.
    again = broker.container(env)
    await add(broker.address, env, ["app", "home", "data"])
    assert broker.container(env) == again
    # What runs is not stopped for one.
    running = asyncio.ensure_future(broker.run(env, broker.shell("sleep 300")))
    await eventually(lambda: busy(broker, env))
    with pytest.raises(Unready, match=r"'/more'.*something runs in it"):
        await add(broker.address, env, ["app", "more"])
    with pytest.raises(NotFound):
        await broker.client.stat(broker.address, env, "more")
    # Files and sandbox go on after a broker's end, and both have them.
    broker.kill()
    await broker.start()
    await eventually(lambda: busy(broker, env))
    assert await broker.sh(env, "cat /app/out.txt") == "out\n"
    await broker.client.stop(broker.address, env)
    await asyncio.wait_for(running, 10)
    await broker.client.ensure(broker.address, fork, source=env)
    assert await broker.sh(fork, "cat /app/out.txt /data/in.txt; echo fork > /data/in.txt") == (
        "out\nin"
    )
    assert await read(broker, env, "data/in.txt") == b"in"
    assert await read(broker, fork, "data/in.txt") == b"fork\n"
    assert (await broker.client.usage(broker.address, fork))[0] == 3


@pytest.mark.parametrize("names", [["etc"], ["a/b"], [".."], [""], ["é"], [1], "data", None])
async def test_folders_have_names(broker, names):
    env = await broker.environment()
    with pytest.raises(Invalid):
        await broker.client._link.json(
            broker.address,
            "PUT",
            f"/v1/environments/{env.hex}/folders",
            body=json.dumps({"names": names}).encode(),
        )
    entries, _ = await broker.client.list(broker.address, env, "")
    assert [entry.path for entry in entries] == [".agents", "home", "workspace"]


async def test_a_deleted_environment_is_gone_and_stays_so(broker):
    env = await broker.environment()
    await broker.sh(env, "echo x > a")
    await broker.fetch("update environments set deleted_at = now() where id = $1", env)
    with pytest.raises(NotFound):
        await broker.sh(env, "true")
    await broker.client.delete(broker.address, env)
    await broker.client.delete(broker.address, env)
    assert broker.container(env) is None
    assert not disk(broker, env).exists()
    with pytest.raises(NotFound):
        await read(broker, env, "workspace/a")


async def test_lost_files_are_never_an_empty_environment(broker):
    env = await broker.environment()
    await broker.fetch("update environments set has_disk = true where id = $1", env)
    for attempt in (broker.sh(env, "ls"), read(broker, env, "workspace/a")):
        with pytest.raises(NotFound, match="are lost"):
            await attempt
    with pytest.raises(NotFound, match="are lost"):
        await broker.client.ensure(broker.address, env)


async def test_another_brokers_environment_is_refused(broker):
    env = await broker.environment()
    await broker.fetch("update environments set broker = 'elsewhere' where id = $1", env)
    with pytest.raises(Unready):
        await broker.sh(env, "true")
    await broker.fetch("update environments set broker = null where id = $1", env)
    with pytest.raises(Unready):
        await broker.client.ensure(broker.address, env)
    assert not disk(broker, env).exists()


async def test_a_new_broker_takes_over_what_runs_and_removes_what_is_nobodys(broker):
    kept, deleted = await broker.environment(), await broker.environment()
    await broker.sh(kept, "echo x > a; (python3 -m http.server 8000 >/dev/null 2>&1 &)")
    await broker.sh(deleted, "true")
    container = broker.container(kept)
    broker.kill()
    await broker.fetch("update environments set deleted_at = now() where id = $1", deleted)
    await broker.start()
    assert broker.container(deleted) is None
    assert broker.container(kept) == container
    # The very same container, with all that runs in it.
    assert "http.server" in await broker.sh(kept, "ps -eo args; cat a")
    assert broker.container(kept) == container


async def test_a_stopped_broker_lets_live_what_works_and_stops_the_rest(broker):
    at_work, idling = await broker.environment(), await broker.environment()
    await broker.sh(idling, "echo kept > a")
    running = asyncio.ensure_future(
        broker.run(at_work, broker.shell("echo begun; while [ ! -e go ]; do sleep 0.1; done"))
    )
    await eventually(lambda: busy(broker, at_work))
    container = broker.container(at_work)
    assert await broker.fetch("select 1 from brokers where name = $1", broker.name)
    assert await broker.stop() == 0
    assert not await broker.fetch("select 1 from brokers where name = $1", broker.name)
    assert broker.container(at_work) == container
    assert broker.container(idling) is None
    await broker.start()
    assert broker.events("environment.adopted")[-1]["environment_id"] == at_work.hex
    await write(broker, at_work, "workspace/go", b"")
    ran = await asyncio.wait_for(running, 30)
    assert (ran.out, ran.exit.code) == (b"begun\n", 0)
    assert broker.container(at_work) == container
    assert await broker.sh(idling, "cat a") == "kept\n"


async def test_two_brokers_cannot_have_one_name_or_one_folder(broker, tmp_path):
    second = broker.spawn()
    assert await asyncio.to_thread(second.wait, 60) == 2
    assert re.search(r"Another broker \(pid \d+\) uses the folder", broker.log_path.read_text())
    third = broker.spawn(OI_SANDBOX__DATA_DIR=str(tmp_path))
    assert await asyncio.to_thread(third.wait, 60) == 2
    assert "another broker is running under the name" in broker.log_path.read_text()
    assert (await broker.client.health(broker.address))["name"] == broker.name


async def test_without_an_engine_files_work_and_commands_are_refused(stage):
    await stage.start(OI_SANDBOX__DOCKER_URL=f"unix://{stage.home}/none.sock")
    env = await stage.environment()
    await write(stage, env, "workspace/a", b"x")
    assert await read(stage, env, "workspace/a") == b"x"
    with pytest.raises(Unready, match="No container engine listens"):
        await stage.sh(env, "true")
    assert "No container engine" in (await stage.client.health(stage.address))["problem"]
    await eventually(lambda: told(stage))


async def told(stage):
    ((problem,),) = await stage.fetch("select problem from brokers where name = $1", stage.name)
    return "No container engine" in (problem or "")


async def test_an_engine_that_comes_later_is_used_then(stage):
    link = stage.home / "engine.sock"
    await stage.start(OI_SANDBOX__DOCKER_URL=f"unix://{link}")
    env = await stage.environment()
    with pytest.raises(Unready):
        await stage.sh(env, "true")
    link.symlink_to("/var/run/docker.sock")
    await eventually(lambda: stage.events("broker.engine_up"))
    assert await stage.sh(env, "echo hello") == "hello\n"


async def test_a_missing_image_is_named(stage):
    await stage.start(OI_SANDBOX__IMAGE="openinteractions/none:such")
    env = await stage.environment()
    with pytest.raises(Unready, match=r"openinteractions/none:such.*scripts/sandbox-image"):
        await stage.sh(env, "true")


@pytest.mark.skipif(not ROOT, reason="late mounts need root")
async def test_a_warm_sandbox_is_claimed(stage):
    await stage.start(OI_SANDBOX__WARM="1")

    async def is_warm():
        return (await stage.client.health(stage.address))["warm"] == 1

    await eventually(is_warm, within_s=60)
    env = await stage.environment(env={"NAME": {"value": "ada"}})
    assert await stage.sh(env, "echo $NAME > a; cat a") == "ada\n"
    assert stage.events("environment.started")[-1]["kind"] == "warm"
    stage.kill()
    await stage.start(OI_SANDBOX__WARM="0")
    assert await stage.sh(env, "cat a") == "ada\n"
    assert stage.events("environment.started")[-1]["kind"] == "warm"
    assert stage.events("environment.adopted")


@pytest.mark.skipif(not ROOT, reason="late mounts need root")
async def test_a_stopped_broker_leaves_nothing_mounted_that_nobody_needs(stage):
    await stage.start(OI_SANDBOX__WARM="1")
    env = await stage.environment()
    await write(stage, env, "workspace/a", b"x")

    async def is_warm():
        return (await stage.client.health(stage.address))["warm"] == 1

    await eventually(is_warm, within_s=60)
    assert await stage.stop() == 0
    assert mounts.points(stage.home) == []


async def test_another_brokers_containers_are_left_alone(docker_engine, broker, database):
    label = docker_engine.broker_name(secrets.token_hex(4))
    other = docker_engine.start(
        SLIM,
        *("--label", f"openinteractions.broker={label}"),
        *("--label", f"openinteractions.environment={ids.uuid7().hex}"),
    )
    broker.kill()
    await broker.start()
    assert other in docker_engine.containers(f"openinteractions.broker={label}")
    docker("rm", "--force", other)


async def test_a_container_that_ended_while_no_broker_was_there_starts_anew(broker):
    env = await broker.environment()
    await broker.sh(env, "echo x > a")
    broker.kill()
    docker("kill", broker.container(env))
    await broker.start()
    assert await broker.sh(env, "cat a") == "x\n"


async def test_the_heartbeat_counts_what_runs(broker):
    env = await broker.environment()
    await broker.sh(env, "true")

    async def is_counted():
        ((running, problem),) = await broker.fetch(
            "select running, problem from brokers where name = $1", broker.name
        )
        return (running, problem) == (1, None)

    await eventually(is_counted)
