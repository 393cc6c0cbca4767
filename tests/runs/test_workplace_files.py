"""A run's files through a real broker, and the tools on them in a real sandbox."""

import asyncio
import shutil
import tempfile
import tracemalloc
from collections.abc import AsyncGenerator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests.broker.stage import Stage, staged
from tests.tools.files import Files, a_call, refused, use

from openinteractions import ids
from openinteractions.crypto import broker_token
from openinteractions.errors import Invalid, LeaseLost, NotFound
from openinteractions.netguard import Fetcher, Guard
from openinteractions.resources.environments.service import Environments, Rules
from openinteractions.runs.workplace import RemoteWorkplace
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.egress.policy import Reach
from openinteractions.sandbox.port import Entry
from openinteractions.tools.code_execution import CodeExecution

COUNT = ["sh", "-c", "echo once | tee -a count"]
EVIL = "a b; $(touch pwned) `id` 'x' \"y\" -z"


@dataclass
class Scene:
    """A broker, and a run in one of its environments."""

    stage: Stage
    place: RemoteWorkplace

    @property
    def env(self) -> UUID:
        return self.place.environment_id

    async def again(self) -> RemoteWorkplace:
        """The run's next owner."""
        await self.stage.fetch(
            "update jobs set epoch = epoch + 1 where id = $1", self.place.interaction_id
        )
        return replace(self.place, epoch=self.place.epoch + 1)

    async def has_disk(self) -> bool:
        ((value,),) = await self.stage.fetch(
            "select has_disk from environments where id = $1", self.env
        )
        return value


@pytest.fixture
async def scene(docker_engine, database, database_url) -> AsyncGenerator[Scene]:
    home = Path(tempfile.mkdtemp(prefix="oi-broker-", dir="/tmp"))
    async with staged(docker_engine, database, database_url, home) as stage:
        await stage.start()
        fetcher = Fetcher(Guard(), max_bytes=1)
        sandboxes = Environments(
            database, stage.client, stage.sealer, fetcher, Rules(ceiling=Reach())
        )
        place = RemoteWorkplace(
            sandboxes=sandboxes,
            environment_id=await stage.environment(),
            interaction_id=ids.uuid7(),
            epoch=1,
        )
        await stage.fetch(
            "insert into jobs (id, project_id, kind, state, worker_id, epoch) "
            "values ($1, $2, 'run', 1, 1, $3)",
            place.interaction_id,
            stage.project_id,
            place.epoch,
        )
        yield Scene(stage, place)
    await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)


def plain(said: Any) -> Any:
    """Without what is not the double's: times, and types by more than a name."""
    if isinstance(said, Entry):
        return (said.path, said.type, said.size_bytes)
    if isinstance(said, tuple) and isinstance(said[0], list):
        return ([plain(each) for each in said[0]], said[1])
    return said


async def told(place: Any) -> list[object]:
    """What a workplace says of its files, step by step."""
    said: list[object] = []

    async def note(asked: Any) -> None:
        try:
            said.append(plain(await asked))
        except (Invalid, NotFound) as error:
            said.append(type(error))

    for path, data in {"workspace/b/c.txt": b"12345", "workspace/a": b"", "home/x y": b"1"}.items():
        await note(place.write(path, data))
    await note(place.write("workspace/a", b"\0two"))
    await note(place.write("workspace/b", b""))
    await note(place.write("workspace/a/below", b""))
    for path in ("workspace", "workspace/a", "workspace/b", "workspace/b/c.txt", "workspace/none"):
        await note(place.stat(path))
    for path in ("workspace/a", "workspace/b", "workspace/none"):
        await note(place.read(path, max_bytes=100))
    for offset, most in ((0, 2), (3, 1), (3, 100), (5, 1), (6, 1)):
        await note(place.read("workspace/b/c.txt", offset=offset, max_bytes=most))
    for name in (".z", "B", "b.d", "é"):
        await place.write(f"workspace/b/d/{name}", b"")
    for deep in (False, True):
        await note(place.list("workspace", recursive=deep))
        await note(place.list("workspace", recursive=deep, limit=2))
        await note(place.list("workspace", recursive=deep, limit=3, after="workspace/b/c.txt"))
        # How a folder's files are passed over.
        await note(place.list("workspace", recursive=deep, after="workspace/b/\U0010ffff"))
        await note(place.list("workspace", recursive=deep, after="workspace/b/d/\U0010ffff"))
    await note(place.list("workspace/a"))
    await note(place.list("workspace/none"))
    for path, recursive in (
        ("workspace/none", False),
        ("workspace/b", False),
        ("workspace/b", True),
    ):
        await note(place.remove(path, recursive=recursive))
    await note(place.remove("workspace/a"))
    await note(place.list("workspace", recursive=True))
    return said


async def test_the_double_of_the_tests_says_what_the_broker_says(scene):
    real, double = await told(scene.place), await told(Files())
    for ours, theirs in zip(real, double, strict=True):
        assert ours == theirs


async def test_looking_whether_there_are_files_makes_none(scene):
    assert not await scene.place.has_files()
    assert not await scene.has_disk()
    await scene.place.write("workspace/a", b"1")
    assert await scene.place.has_files()
    with pytest.raises(NotFound):
        await replace(scene.place, environment_id=ids.uuid7()).has_files()


async def test_a_file_of_any_size_takes_little_memory(scene):
    await scene.stage.sh(scene.env, "head -c 40000000 /dev/zero > /workspace/large")
    tracemalloc.start()
    data, size = await scene.place.read("workspace/large", offset=1_000_000, max_bytes=100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(data), size) == (100_000, 40_000_000)
    assert peak < 3 * 2**20


@pytest.fixture
async def impatient(scene) -> AsyncGenerator[RemoteWorkplace]:
    """The run's workplace, whose client waits for nobody."""
    client = BrokerClient(broker_token(scene.stage.key), patience_s=0, restart_s=0)
    sandboxes = copy(scene.place.sandboxes)
    sandboxes.client = client
    yield replace(scene.place, sandboxes=sandboxes)
    await client.close()


async def test_a_broker_that_is_started_again_is_waited_for(scene, impatient):
    place, stage = impatient, scene.stage
    await place.write("workspace/a", b"before")
    await place.write("workspace/gone", b"")
    stage.kill()

    async def restart() -> None:
        await asyncio.sleep(1)
        await stage.start()

    async with asyncio.TaskGroup() as group:
        group.create_task(restart())
        read = group.create_task(place.read("workspace/a", max_bytes=100))
        entry = group.create_task(place.stat("workspace/a"))
        page = group.create_task(place.list("workspace"))
        group.create_task(place.write("workspace/b", b"new"))
        group.create_task(place.remove("workspace/gone"))
        ran = group.create_task(place.execute("1", COUNT, timeout_s=9, max_output_bytes=9999))
    assert ran.result().text == "once\n"
    assert read.result() == (b"before", 6)
    assert entry.result().size_bytes == 6
    assert "workspace/a" in [each.path for each in page.result()[0]]
    assert await place.read("workspace/b", max_bytes=9) == (b"new", 3)
    with pytest.raises(NotFound):
        await place.stat("workspace/gone")


async def test_a_command_is_found_again_however_often_the_broker_ends(scene, impatient):
    stage = scene.stage
    slow = ["sh", "-c", f"{COUNT[-1]}; sleep 3; cat count"]
    ran = asyncio.create_task(impatient.execute("1", slow, timeout_s=30, max_output_bytes=9999))
    for _ in range(2):
        await asyncio.sleep(1)
        stage.kill()
        await stage.start()
    # All that it wrote, and once.
    assert (await ran).text == "once\nonce\n"


async def test_a_replaced_owner_changes_nothing_and_loses_its_lease(scene):
    old = scene.place
    await old.write("workspace/a", b"old")
    new = await scene.again()
    await new.write("workspace/a", b"new")
    assert (await new.execute("1", COUNT, timeout_s=9, max_output_bytes=9999)).text == "once\n"
    for name in ("a", "b"):
        with pytest.raises(LeaseLost):
            await old.write(f"workspace/{name}", b"late")
    for name in ("a", "none"):
        with pytest.raises(LeaseLost):
            await old.remove(f"workspace/{name}")
    for key in ("1", "2"):
        with pytest.raises(LeaseLost):
            await old.execute(key, COUNT, timeout_s=9, max_output_bytes=9999)
    # It may look.
    assert (await old.read("workspace/a", max_bytes=9))[0] == b"new"
    assert sorted(entry.path for entry in (await new.list("workspace"))[0]) == [
        "workspace/a",
        "workspace/count",
    ]
    await scene.stage.fetch("delete from jobs where id = $1", old.interaction_id)
    with pytest.raises(LeaseLost):
        await new.write("workspace/a", b"after the end")


async def test_an_unstored_run_has_no_job_and_changes_files(scene):
    place = replace(scene.place, interaction_id=ids.uuid7(), is_stored=False)
    await place.write("workspace/a", b"1")
    await place.remove("workspace/a")
    assert (await place.execute("1", COUNT, timeout_s=9, max_output_bytes=9999)).text == "once\n"


async def test_searches_in_a_sandbox(scene):
    place = scene.place
    for path, data in {
        "workspace/src/a.py": "def one():\n    return 1\n",
        "workspace/src/b.ts": "const one = 1\n",
        "workspace/node_modules/m/i.js": "one\n",
        "workspace/.env": "ONE=one\n",
        "workspace/.git/HEAD": "one\n",
        "workspace/.gitignore": "src\n",
        f"workspace/{EVIL}/f.txt": f"so {EVIL} it is\n",
        "workspace/binary": "one\0",
        ".agents/AGENTS.md": "one rule\n",
    }.items():
        await place.write(path, data.encode())
    keys = iter(range(1, 99))

    async def search(**arguments: Any) -> str:
        return await use(place, "search_files", key=str(next(keys)), **arguments)

    assert await search(pattern="one") == (
        "/workspace/.env\n1:ONE=one\n\n/workspace/src/a.py\n1:def one():\n\n"
        "/workspace/src/b.ts\n1:const one = 1"
    )
    assert await search(pattern="one", glob="*.py") == "/workspace/src/a.py\n1:def one():"
    assert await search(pattern="one", glob="src/*.ts") == "/workspace/src/b.ts\n1:const one = 1"
    assert await search(pattern="one", path="node_modules") == (
        "/workspace/node_modules/m/i.js\n1:one"
    )
    assert await search(pattern="one", path="/.agents") == "/.agents/AGENTS.md\n1:one rule"
    assert await search(pattern="RETURN", path="src/a.py", ignore_case=True, context=1) == (
        "/workspace/src/a.py\n1-def one():\n2:    return 1"
    )
    assert await search(pattern=EVIL, literal=True, path=EVIL) == (
        f"/workspace/{EVIL}/f.txt\n1:so {EVIL} it is"
    )
    assert await search(pattern="--files") == "Nothing in /workspace matches."
    assert await search(pattern="x", glob="--files") == "Nothing in /workspace matches."
    assert "regex" in await refused(place, "search_files", key="99", pattern="one(")
    names = [entry.path for entry in (await place.list("workspace", recursive=True))[0]]
    assert "pwned" not in [name.rpartition("/")[2] for name in names]
    # The next owner of the run finds the same call's answer.
    await place.remove("workspace/src", recursive=True)
    assert "src/a.py" in await use(await scene.again(), "search_files", key="1", pattern="one")


async def test_what_is_edited_is_what_the_sandbox_runs(scene):
    place = scene.place
    await use(place, "write_file", path="bin/say.sh", content="#!/bin/sh\necho one\n")
    await scene.stage.sh(scene.env, "chmod +x bin/say.sh")
    await use(place, "edit_file", path="/workspace/bin/say.sh", old_text="one", new_text="two")
    assert await scene.stage.sh(scene.env, "bin/say.sh") == "two\n"
    await scene.stage.sh(scene.env, "echo three > ~/notes.txt; ln -s /etc/passwd out")
    assert await use(place, "read_file", path="/home/agent/notes.txt") == "     1\tthree"
    assert "root" not in await refused(place, "read_file", path="out")
    assert "empty" in await refused(place, "delete_file", path="bin")
    await use(place, "delete_file", path="bin", recursive=True)
    await use(place, "delete_file", path="out")
    assert await scene.stage.sh(scene.env, "ls -A") == ""


async def test_a_long_output_can_be_read_on(scene):
    tool = CodeExecution(scene.place)

    async def run(key: str, code: str) -> str:
        call = a_call("code_execution", key=key, language="bash", code=code)
        result = await tool.run(call)
        assert not result["is_error"], result
        return result["result"]

    said = await run("1", "seq 1 50000")
    assert len(said) < 26_000
    assert said.startswith("1\n2\n")
    assert said.endswith("\n50000\n")
    path = said.partition("the whole output is in ")[2].partition(" …]")[0]
    assert await scene.stage.sh(scene.env, f"seq 1 50000 | cmp - {path} && echo same") == "same\n"
    on = await use(scene.place, "read_file", path=path, offset=25_000, limit=1)
    assert on.startswith(" 25000\t25000\n")
    said = await run("2", "seq 1 1000000")
    path = said.partition("1 MiB of it, is in ")[2].partition(" …]")[0]
    size = int(await scene.stage.sh(scene.env, f"stat -c %s {path}"))
    assert 2**20 <= size < 2**20 + 1000
    assert said.endswith("\n1000000\n")
