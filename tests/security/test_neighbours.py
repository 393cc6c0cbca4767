"""One environment against another: on the same host, of the same user, by the same broker."""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from uuid import UUID

import aiohttp
import pytest
from yarl import URL

from openinteractions import ids
from openinteractions.crypto import broker_token
from openinteractions.db.engine import Database
from openinteractions.errors import AppError, NotFound
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.port import Output, SandboxError
from tests.security.arena import Arena, arena

SECRET = "neighbour-" + hashlib.sha256(b"a").hexdigest()[:12]


@dataclass(frozen=True)
class Two:
    """The one that attacks, and the one that has something to lose."""

    field: Arena
    evil: UUID
    victim: UUID
    running: str
    """An execution of the victim's, which does not end."""


@pytest.fixture(scope="module")
async def database_url(cluster) -> AsyncGenerator[str]:
    url = await cluster.create(template="template")
    yield url
    await cluster.drop(url)


@pytest.fixture(scope="module")
async def two(docker_engine, database_url) -> AsyncGenerator[Two]:
    opened = Database(database_url, pool_size=5)
    try:
        # Warm sandboxes have their files mounted later: neighbours of both kinds.
        async with arena(docker_engine, opened, database_url, OI_SANDBOX__WARM="1") as field:
            evil, victim = await field.environment(), await field.environment()
            await field.works(evil)
            await field.stage.sh(victim, f"echo {SECRET} > secret; echo {SECRET} > ~/secret")
            program = (
                "import ctypes, socket, time\n"
                "a = socket.socket(socket.AF_UNIX); a.bind('\\0neighbour'); a.listen()\n"
                "b = socket.create_server(('0.0.0.0', 5555))\n"
                "c = ctypes.CDLL(None); c.shmat(c.shmget(0x5ec4e7, 4096, 0o1666), None, 0)\n"
                "c.msgget(0x5ec4e7, 0o1666); print('ready', flush=True); time.sleep(600)"
            )
            command = field.stage.command("python3", "-c", program, SECRET)
            following = asyncio.ensure_future(field.stage.run(victim, command))
            try:
                await until(field, victim, command.id)
                yield Two(field, evil, victim, command.id)
            finally:
                await field.stage.client.kill(field.stage.address, victim, command.id)
                await following
    finally:
        await opened.close()


async def until(field: Arena, env: UUID, name: str) -> None:
    """The command has begun, and said that it is ready."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(NotFound):
                async with field.stage.client.follow(field.stage.address, env, name) as pieces:
                    async for piece in pieces:
                        assert isinstance(piece, Output), piece
                        if piece.data.startswith(b"ready"):
                            return
            await asyncio.sleep(0.05)


@pytest.fixture
async def unharmed(two: Two) -> AsyncGenerator[None]:
    """Afterwards the victim has its file, and its command runs on."""
    yield
    field = two.field
    await field.healthy()
    assert await field.stage.sh(two.victim, "cat secret") == f"{SECRET}\n"
    shown = await field.stage.client.environments(field.stage.address)
    assert [
        two.running in each["executions"] for each in shown if each["id"] == two.victim.hex
    ] == [True]


# --- from inside ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unharmed")
async def test_nothing_of_a_neighbour_is_seen_from_inside(two: Two):
    arguments = (SECRET[::-1], two.victim.hex)
    assert await two.field.report(two.evil, "pry", *arguments) == []
    # The same search in the victim's own sandbox finds everything that it looks for.
    found = await two.field.report(two.victim, "pry", *arguments)
    for what in ("/workspace/secret", "/home/agent/secret", "an abstract socket", "a port",
                 "shared memory", "a message queue"):  # fmt: skip
        assert what in found


@pytest.mark.usefixtures("unharmed")
async def test_links_out_of_the_workspace_lead_nowhere(two: Two):
    """Neither for commands nor for the files' side of the broker."""
    stage = two.field.stage
    victims = stage.home / "sandboxes/environments" / two.victim.hex / "root"
    await stage.sh(
        two.evil,
        f"ln -sfn {victims} away; ln -sfn {victims}/workspace/secret file; ln -sfn / top; "
        "ln -sfn /proc/1/root out",
    )
    for path in (
        "away/workspace/secret",
        "file",
        f"top{victims}/workspace/secret",
        "out/etc/passwd",
    ):
        with pytest.raises(AppError):
            await read(two, two.evil, f"workspace/{path}")
        with pytest.raises(AppError):
            await stage.client.write(
                stage.address, two.evil, f"workspace/{path}", b"x", overwrite=True, extract=False
            ) if path != "file" else await read(two, two.evil, "workspace/file/x")
    ran = await stage.run(two.evil, stage.shell("cat file away/workspace/secret"))
    assert SECRET.encode() not in ran.out
    await stage.sh(two.evil, "rm away file top out")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("scope", ["signals", "priority", "processes"])
async def test_the_same_user_reaches_no_foreign_process(two: Two, scope: str):
    """`kill -1` and the like act on all of a user's processes; here that is the own sandbox."""
    script = {
        "signals": "trap '' TERM; kill -TERM -1; kill -KILL -1",
        "priority": "renice -n 19 -u 1000; ionice -c 3 -u 1000 || true",
        "processes": "for pid in $(seq 2 3000); do kill -9 $pid; done 2>/dev/null",
    }[scope]
    await two.field.stage.run(two.evil, two.field.stage.shell(script, timeout_s=20))
    await two.field.works(two.evil)


# --- through the broker ---------------------------------------------------------------------------


async def read(two: Two, env: UUID, path: str) -> bytes:
    stage = two.field.stage
    async with stage.client.read(stage.address, env, path) as file:
        return b"".join([chunk async for chunk in file])


@pytest.mark.usefixtures("unharmed")
async def test_an_execution_belongs_to_its_environment(two: Two):
    client, address = two.field.stage.client, two.field.stage.address
    with pytest.raises(NotFound):
        async with client.follow(address, two.evil, two.running) as pieces:
            await anext(pieces)
    with pytest.raises(NotFound):
        await client.signal(address, two.evil, two.running, 9)
    with pytest.raises(NotFound):
        await client.write_stdin(address, two.evil, two.running, b"x")
    with pytest.raises(NotFound):
        await client.resize(address, two.evil, two.running, rows=1, cols=1)
    # A command of the same id in another environment is another command.
    stage = two.field.stage
    ran = await stage.run(two.evil, stage.shell("echo mine", id=two.running))
    assert ran.out == b"mine\n"


@pytest.mark.usefixtures("unharmed")
async def test_what_is_not_there_is_not_found(two: Two):
    stage, absent = two.field.stage, ids.uuid7()
    client, address = stage.client, stage.address
    for call in (
        stage.run(absent, stage.shell("true")),
        client.usage(address, absent),
        client.stat(address, absent, "workspace"),
        client.list(address, absent, "workspace"),
        client.ensure(address, absent),
        client.ensure(address, await stage.environment(), source=absent),
    ):
        with pytest.raises(NotFound):
            await call


@pytest.mark.usefixtures("unharmed")
async def test_paths_of_the_brokers_api_stay_below_their_environment(two: Two):
    stage = two.field.stage
    headers = {"Authorization": f"Bearer {broker_token(stage.key)}"}
    victim = f"{two.victim.hex}/root/workspace/secret"
    paths = [
        f"{two.evil.hex}/files/{climb}{victim}"
        for step in (
            "../",
            "%2e%2e/",
            "..%2f",
            "%2e%2e%2f",
            "....//",
            "workspace/../",
            "%252e%252e/",
        )
        for climb in (step * 2, step * 3, "workspace/" + step * 4)
    ]
    paths += [
        f"../environments/{two.evil.hex}/files/%00/etc/passwd",
        f"{two.evil.hex}/files/%2fetc%2fpasswd",
        f"{two.evil.hex}/files//etc/passwd",
        f"{two.evil.hex}%2f..%2f{two.victim.hex}/files/workspace/secret",
        f"{two.victim.hex.upper()}x/files/workspace/secret",
        f"{two.evil.hex}/uploads/..%2f..%2f{two.victim.hex}",
        f"{two.evil.hex}/uploads/%2e%2e",
    ]
    connector = aiohttp.UnixConnector(stage.address.removeprefix("unix://"))
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        for path in paths:
            for query in ("", "?op=read", "?op=stat", "?op=tar"):
                url = URL(f"http://broker/v1/environments/{path}{query}", encoded=True)
                async with session.get(url) as answer:
                    body = await answer.read()
                    assert SECRET.encode() not in body, url
                    assert b"root:" not in body
                    if ".." in path or "%2e" in path:
                        assert answer.status in {400, 404}, (url, answer.status, body[:200])


@pytest.mark.usefixtures("unharmed")
async def test_the_broker_knows_its_callers(two: Two):
    stage = two.field.stage
    for token in ("", "x", broker_token(bytes(32)), broker_token(stage.key)[:-1]):
        stranger = BrokerClient(token, patience_s=0.1)
        try:
            with pytest.raises(SandboxError, match="token"):
                await stranger.environments(stage.address)
            with pytest.raises(SandboxError, match="token"):
                await stranger.usage(stage.address, two.victim)
        finally:
            await stranger.close()
    # Its socket is nobody's but the server's own user's.
    path = stage.home / "sandboxes/broker.sock"
    assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("unharmed")
async def test_a_fork_is_apart_from_then_on(two: Two):
    stage = two.field.stage
    child = await stage.environment()
    await stage.client.ensure(stage.address, child, source=two.victim)
    assert await stage.sh(child, "cat secret; echo changed > secret; cat secret") == (
        f"{SECRET}\nchanged\n"
    )
    await stage.client.delete(stage.address, child)


@pytest.mark.usefixtures("unharmed")
async def test_a_warm_sandbox_is_used_once(two: Two):
    """Whoever had a sandbox first leaves nothing behind for the next one, and no way in."""
    stage = two.field.stage
    seen = set()
    envs = [await stage.environment() for _ in range(3)]
    # All of them stay until the end: the kernel gives a namespace's number to the next one.
    for number, env in enumerate(envs):
        script = (
            f"ls -A /workspace /tmp /home/agent /run/oi; echo {number} > /tmp/x; echo {number} > x"
        )
        assert not re.search(r"\d|x", await stage.sh(env, script))
        seen.add(await stage.sh(env, "readlink /proc/self/ns/pid"))
    assert len(seen) == 3
    for env in envs:
        await stage.client.delete(stage.address, env)
    with pytest.raises(NotFound):
        await stage.client.stat(stage.address, env, "workspace")
