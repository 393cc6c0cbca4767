"""Attacks from inside a sandbox: each is contained, and everybody else is well after it."""

import asyncio
import base64
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from openinteractions.crypto import broker_token
from openinteractions.db.engine import Database
from openinteractions.netguard import Fetcher, Guard
from openinteractions.resources.credentials.service import Vault
from openinteractions.sandbox.port import MOUNTS
from openinteractions.wire.credentials import parse_create
from tests.sandbox.engine import docker
from tests.security import liar as liars
from tests.security.arena import DISK, IS_ROOT, PIDS, Arena, arena, rss

needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can be in a supervisor's place")

BEARER = "bearer-4f9d1c7ab2"
VARIABLE = "variable-77e0d35c61"
CANARY = "canary-c5582a90fe"
RSS_GROWTH = 96 * 2**20


@pytest.fixture(scope="module")
async def database_url(cluster) -> AsyncGenerator[str]:
    url = await cluster.create(template="template")
    yield url
    await cluster.drop(url)


@pytest.fixture(scope="module")
async def field(docker_engine, database_url) -> AsyncGenerator[Arena]:
    """One broker for all attacks; at its end the host is as it was."""
    opened = Database(database_url, pool_size=5)
    try:
        async with arena(docker_engine, opened, database_url) as made:
            yield made
    finally:
        await opened.close()


@pytest.fixture(scope="module")
async def den(field: Arena) -> UUID:
    """The environment that attacks come from."""
    return await field.environment()


@pytest.fixture
async def well(field: Arena, den: UUID) -> AsyncGenerator[None]:
    """Afterwards everything works: the attacker's environment too, with its files."""
    yield
    await field.healthy()
    await field.works(den)


# --- using things up ------------------------------------------------------------------------------


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("bomb", ["forks", "threads", "files", "many_memories"])
async def test_a_bomb_goes_off_in_its_own_sandbox(field: Arena, den: UUID, bomb: str):
    command = field.stage.command(*field.argv("bombs", bomb), timeout_s=2)
    going_off = asyncio.ensure_future(field.stage.run(den, command))
    await asyncio.sleep(1)
    await field.healthy()
    assert processes(field, den) <= PIDS
    await asyncio.wait_for(going_off, 30)
    # What it left in the background goes with a stop, and the files stay.
    await field.stop(den)


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("bomb", ["forks", "hidden_forks"])
async def test_a_bomb_that_forked_away_from_its_command_ends_with_the_next(field, den, bomb: str):
    """It has taken every process that there may be; what runs by itself goes on."""
    stage = field.stage
    long = stage.shell("sleep 4; echo done")
    running = asyncio.ensure_future(stage.run(den, long))
    await until_running(field, den, long.id)
    container = stage.container(den)
    if bomb == "forks":
        await stage.run(den, stage.command("bash", "-c", ":(){ :|:& };:", timeout_s=5))
    else:
        await field.attack(den, "bombs", bomb, timeout_s=5)
    await asyncio.sleep(1)
    await field.healthy()
    assert 2 < processes(field, den) <= PIDS
    await field.works(den, within_s=10)
    async with asyncio.timeout(60):
        while processes(field, den) >= 10:
            await asyncio.sleep(0.1)
            # A command that found room, by chance, has ended nothing.
            await field.works(den, within_s=10)
    assert (await running).out == b"done\n"
    assert stage.container(den) == container


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("hog", ["memory", "memory_files", "shared_memory"])
async def test_a_memory_hog_dies_alone(field: Arena, den: UUID, hog: str):
    await field.works(den)
    before = field.stage.container(den)
    ran = await field.attack(den, "bombs", hog, timeout_s=2)
    assert ran.exit.signal == signal.SIGKILL or ran.out.endswith(b"refused\n")
    if ran.exit.outcome == "exited" and ran.exit.signal is not None:
        assert ran.exit.out_of_memory
    # The very same sandbox goes on, with all of its memory.
    await field.works(den)
    assert field.stage.container(den) == before
    assert (
        await field.stage.sh(den, "python3 -c 'print(len(bytes(200 << 20)))'") == f"{200 << 20}\n"
    )


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm", "/run", "/run/oi"])
async def test_temporary_files_end_at_their_bounds(field: Arena, den: UUID, folder: str):
    stopped = await field.report(den, "fill", folder, "bytes")
    assert stopped["stopped"] == "ENOSPC"
    assert stopped["bytes"] <= 64 * 2**20
    # Names without content take memory too.
    stopped = await field.report(den, "fill", folder, "inodes")
    assert stopped["stopped"] == "ENOSPC"
    assert stopped["files"] <= 64 * 2**20 // 4096


@pytest.mark.skipif(not IS_ROOT, reason="disks of a fixed size need root")
@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("folder", ["/workspace", "/home/agent"])
async def test_a_full_disk_is_full_for_its_owner_only(field: Arena, den: UUID, folder: str):
    before = shutil.disk_usage(field.stage.home).free
    stopped = await field.report(den, "fill", folder, "bytes")
    assert stopped["stopped"] == "ENOSPC"
    assert DISK // 2 < stopped["bytes"] < DISK
    assert before - shutil.disk_usage(field.stage.home).free < 2 * DISK
    await field.stage.sh(field.neighbour, "head -c 8M /dev/zero > big && rm big")


@pytest.mark.skipif(not IS_ROOT, reason="disks of a fixed size need root")
@pytest.mark.usefixtures("well")
async def test_names_of_files_end_at_a_bound(field: Arena, den: UUID):
    stopped = await field.report(den, "fill", "/workspace", "inodes")
    assert stopped["stopped"] == "ENOSPC"
    await field.stage.sh(field.neighbour, "mkdir d && touch d/a d/b && rm -r d")


@pytest.mark.usefixtures("well")
async def test_a_flood_of_output_costs_the_broker_nothing(field: Arena, den: UUID):
    stage, size = field.stage, 2 << 30
    assert stage.process is not None
    before = rss(stage.process.pid)
    command = stage.command(*field.argv("bombs", "flood", str(size)), max_output_bytes=1 << 20)
    flooding = asyncio.ensure_future(stage.run(den, command))
    took = []
    while not flooding.done():
        took.append(await field.healthy())
        await asyncio.sleep(0.2)
    ran = await flooding
    assert ran.exit.output_bytes == size + len("done\n")
    assert ran.exit.truncated
    assert len(ran.out) + len(ran.err) + ran.omitted == ran.exit.output_bytes
    assert rss(stage.process.pid) - before < RSS_GROWTH
    assert sorted(took)[len(took) // 2] < 1


@pytest.mark.usefixtures("well")
async def test_busy_processors_starve_nobody(field: Arena, den: UUID):
    burning = asyncio.ensure_future(field.attack(den, "bombs", "burn", "60", "2"))
    await asyncio.sleep(0.5)
    took = [await field.healthy() for _ in range(10)]
    assert sorted(took)[5] < 1
    await burning


@pytest.mark.usefixtures("well")
async def test_connections_that_say_nothing_hold_nobody_up(field: Arena, den: UUID):
    assert field.stage.process is not None
    before = rss(field.stage.process.pid)
    silent = asyncio.ensure_future(field.attack(den, "bombs", "connections", "2"))
    await asyncio.sleep(1)
    await field.healthy()
    assert rss(field.stage.process.pid) - before < RSS_GROWTH
    assert descriptors(field.stage.process.pid) < 600
    await silent


# --- rights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def tried(field: Arena, den: UUID) -> Any:
    return await field.report(den, "privileges")


def names_of_tries() -> list[str]:
    """The names in the program, those that it makes in a loop by their pattern."""
    source = (Path(__file__).parent / "attacks/privileges.py").read_text()
    return re.findall(r"@attempt\ndef (\w+)", source)


@pytest.mark.parametrize("name", names_of_tries())
def test_nothing_can_be_done_that_needs_rights(tried, name: str):
    assert tried["tries"][name] == "refused"


def test_no_namespace_and_no_rare_socket_can_be_opened(tried):
    made = {name for name in tried["tries"] if name.endswith(("_namespace", "_socket"))}
    assert len(made) == 3 * 7 + 12
    assert {name: tried["tries"][name] for name in made if tried["tries"][name] != "refused"} == {}


def test_commands_are_nobody_special(tried):
    identity = tried["identity"]
    assert identity["Uid"] == identity["Gid"] == ["1000"] * 4
    assert identity["Groups"] in (["1000"], [])
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(identity[kind][0], 16) == 0
    assert identity["NoNewPrivs"] == ["1"]
    assert identity["Seccomp"] == ["2"]


def test_the_root_cannot_be_written_and_the_host_cannot_be_seen(field, tried):
    ours = set(MOUNTS.values())
    memory = {"/tmp", "/run", "/run/oi", "/dev/shm", "/dev", "/dev/pts", "/dev/mqueue", "/proc"}
    engines = {"/etc/resolv.conf", "/etc/hostname", "/etc/hosts"}
    for target, options, source in tried["mounts"]:
        is_read_only = "ro" in options.split(",")
        kernels = target.startswith(("/proc/", "/sys"))
        assert is_read_only or kernels or target in ours | memory, target
        if target in ours:
            assert {"nosuid", "nodev"} <= set(options.split(",")) or not IS_ROOT
        elif target not in engines and not target.startswith("/sys/fs/cgroup"):
            assert source == "/" or kernels or target == "/etc/ssl/certs/ca-certificates.crt", (
                source
            )
        assert "docker.sock" not in source
    assert ours <= {target for target, _, _ in tried["mounts"]}
    assert tried["interfaces"] == ["lo"]


def test_only_its_own_processes_are_there(tried):
    assert tried["processes"][0] == 1
    assert len(tried["processes"]) < 10


# --- the supervisor -------------------------------------------------------------------------------


@pytest.mark.usefixtures("well")
async def test_commands_cannot_touch_the_supervisor_though_it_is_the_same_user(field, den):
    await field.works(den)
    before = field.stage.container(den)
    answers = await field.report(den, "warden", "signals")
    assert len(answers) >= 10
    assert {name: answer for name, answer in answers.items() if "open" in answer} == {}
    await field.works(den)
    assert field.stage.container(den) == before


@pytest.mark.usefixtures("well")
async def test_what_the_same_user_may_do_to_the_supervisor_ends_with_a_stop(field, den):
    """Its limits and its priority: they bring nothing, and harm nobody but the own sandbox."""
    program = (
        "import os, resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0)); "
        "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))"
    )
    await field.stage.run(den, field.stage.command("python3", "-c", program))
    await field.healthy()
    await field.stop(den)


@pytest.mark.usefixtures("well")
async def test_nothing_in_the_environment_runs_as_the_supervisor(field: Arena, den: UUID):
    """Not even after a stop, when a sandbox starts with files that were written before."""
    fake = '#!/bin/sh\\ntouch /workspace/caught\\nexec /usr/bin/python3 "$@"\\n'
    await field.stage.sh(
        den,
        f"""mkdir -p ~/.local/bin ~/.npm-global/bin && printf '{fake}' > ~/.local/bin/python3
        chmod +x ~/.local/bin/python3 && cp ~/.local/bin/python3 ~/.local/bin/sh
        cp ~/.local/bin/python3 ~/.npm-global/bin/python3; touch ~/pyvenv.cfg
        printf 'raise SystemExit(1)' | tee ~/json.py ~/asyncio.py os.py asyncio.py json.py""",
    )
    await field.stop(den)
    assert await field.stage.run(den, field.stage.command("/bin/ls", "/workspace/caught"))
    ran = await field.stage.run(den, field.stage.command("/bin/cat", "/workspace/caught"))
    assert b"No such file" in ran.err
    await field.stage.run(
        den,
        field.stage.command(
            "/bin/sh",
            "-c",
            "/bin/rm -rf ~/.local ~/.npm-global ~/*.py /workspace/*.py ~/pyvenv.cfg",
        ),
    )


@pytest.mark.usefixtures("well")
async def test_when_the_supervisor_dies_its_command_is_unknown_and_the_files_stay(field, den):
    stage = field.stage
    command = stage.shell("echo once >> /workspace/runs; sleep 100")
    running = asyncio.ensure_future(stage.run(den, command))
    await until_running(field, den, command.id)
    docker("kill", "--signal", "KILL", stage.container(den))
    ran = await asyncio.wait_for(running, 30)
    assert ran.exit.outcome == "unknown"
    assert (await stage.run(den, command)).exit.outcome == "unknown"
    assert await stage.sh(den, "cat /workspace/runs; rm /workspace/runs") == "once\n"


@needs_root
@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("kind", ["random", "zeros", "text", "heads"])
async def test_rubbish_instead_of_frames_hurts_nobody_else(field: Arena, den: UUID, kind: str):
    await field.works(den)
    stage = field.stage
    assert stage.process is not None
    before = rss(stage.process.pid)
    async with liars.stopped(field.pid(den)) as (_, end):
        pouring = asyncio.ensure_future(liars.pour(end, liars.rubbish(kind), 1))
        took = [await field.healthy() for _ in range(5) if not await asyncio.sleep(0.15)]
        assert await pouring > 1 << 20
        assert rss(stage.process.pid) - before < RSS_GROWTH
        assert sorted(took)[2] < 1.5
        await field.stop(den)


@needs_root
@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("lie", ["giant", "nonsense", "unheard", "nothing"])
async def test_answers_without_sense_end_as_unknown(field: Arena, den: UUID, lie: str):
    await field.works(den)
    async with liars.lying(field.pid(den), lie):
        async with asyncio.timeout(20):
            ran = await field.stage.run(den, field.stage.shell("true"))
        assert ran.exit.outcome == "unknown"
        await field.healthy()
        await field.stop(den)


@needs_root
@pytest.mark.usefixtures("well")
async def test_a_forged_result_is_at_least_a_result(field: Arena, den: UUID):
    """A supervisor's word about its own sandbox cannot be checked; only its form can."""
    await field.works(den)
    async with liars.lying(field.pid(den), "forged"):
        async with asyncio.timeout(20):
            ran = await field.stage.run(den, field.stage.shell("true"))
        exit_ = ran.exit
        assert ran.out == b"all is well\n"
        assert (exit_.outcome, exit_.code, exit_.signal, exit_.timed_out) == (
            "exited", None, None, False,
        )  # fmt: skip
        assert (exit_.cpu_s, exit_.wall_s, exit_.max_rss_bytes, exit_.output_bytes) == (0, 0, 0, 0)
        await field.healthy()
        await field.stop(den)


@needs_root
@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("lie", ["endless", "crowd"])
async def test_more_than_was_asked_for_is_bounded(field: Arena, den: UUID, lie: str):
    await field.works(den)
    stage = field.stage
    assert stage.process is not None
    before = rss(stage.process.pid)
    async with liars.lying(field.pid(den), lie) as liar:
        command = stage.shell("true", max_output_bytes=100_000)
        running = asyncio.ensure_future(stage.run(den, command))
        took = [await field.healthy() for _ in range(5) if not await asyncio.sleep(0.3)]
        assert liar.sent > 500
        assert rss(stage.process.pid) - before < RSS_GROWTH
        assert sorted(took)[2] < 1.5
        assert descriptors(stage.process.pid) < 600
        await field.stop(den)
        await asyncio.wait_for(running, 20)


# --- the network ----------------------------------------------------------------------------------


@contextmanager
def listener() -> Generator[tuple[int, list[str]]]:
    """Somebody on the host, on every address, who must not be reached."""
    met: list[str] = []
    with socket.create_server(("", 0), backlog=100) as server:
        server.settimeout(0.2)
        done = threading.Event()

        def accept() -> None:
            while not done.is_set():
                try:
                    one, peer = server.accept()
                except TimeoutError:
                    continue
                met.append(str(peer))
                one.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1], met
        finally:
            done.set()
            thread.join()


def addresses() -> list[str]:
    shown = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout
    return shown.split()


@pytest.fixture(scope="module", params=["open", "listed"])
async def reached(field: Arena, request) -> Any:
    """What a sandbox reached, with nothing forbidden, and with a list of what is allowed."""
    network = None if request.param == "open" else {"allowlist": [{"domain": "allowed.example"}]}
    env = await field.environment(network=network)
    with listener() as (port, met):
        found = await field.report(env, "reach", str(port), *addresses())
        found["met"] = list(met)
    await field.stage.client.delete(field.stage.address, env)
    await field.healthy()
    return found


def test_there_is_no_way_out_but_the_proxy(reached):
    assert reached["direct"] == {}
    assert reached["met"] == []


def test_only_what_is_documented_listens(reached):
    assert reached["listening"] == [53, 80, 443, 3128]
    assert reached["sockets"] == []


def test_names_lead_nowhere_and_leave_nothing(reached):
    answers = reached["names"]
    assert {value for name, value in answers.items() if " A" in name} == {"127.0.0.1"}
    assert {value for name, value in answers.items() if " A" not in name} == {"nothing"}


def test_the_proxy_knows_every_spelling_of_a_private_place(reached):
    answers = reached["proxy"]
    assert len(answers) > 80
    assert {
        ask: said for ask, said in answers.items() if not re.match(r"HTTP/1.1 (4|50)\d", said)
    } == {}


def test_another_name_in_tls_gains_nothing(reached):
    for host, said in reached["fronting"].items():
        assert "200" not in said or "200 Conn" in said, (host, said)


# --- secrets --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def trusted(field: Arena) -> UUID:
    """An environment with a credential for its requests, and one in a variable."""
    stage = field.stage
    vault = Vault(stage.database, stage.sealer, Fetcher(Guard(), max_bytes=1))
    for body in (
        {"id": "header", "type": "bearer_token", "token": BEARER},
        {
            "id": "variable",
            "type": "environment_variable",
            "value": VARIABLE,
            "injection_location": ["header"],
            "trusted_domains": ["allowed.example"],
        },
    ):
        name, content = parse_create(json.dumps(body).encode(), max_depth=20)
        await vault.create(stage.project_id, name, content)
    return await field.environment(
        network={"allowlist": [{"domain": "allowed.example", "credential": "credentials/header"}]},
        env={"KEY": {"credential": "credentials/variable"}, "PLAIN": {"value": "seen"}},
    )


def secrets_of(field: Arena) -> dict[str, str]:
    key = field.stage.key
    return {
        "bearer": BEARER,
        "variable": VARIABLE,
        "token": broker_token(key),
        "master key": base64.b64encode(key).decode(),
        "master key in hex": key.hex(),
        "database": field.stage.url,
    }


@pytest.mark.usefixtures("well")
async def test_no_secret_is_anywhere_in_a_sandbox(field: Arena, trusted: UUID):
    wanted = secrets_of(field)
    said = await field.stage.sh(
        trusted, 'env; curl -sk -m 10 -H "X-Key: $KEY" https://allowed.example/ || true'
    )
    assert "PLAIN=seen" in said
    assert "KEY=__" in said
    assert not [name for name, secret in wanted.items() if secret in said]
    found = await field.report(trusted, "search", *[each[::-1] for each in wanted.values()])
    assert found["files"] > 5
    assert [(path, list(wanted)[number]) for path, number in found["found"]] == []
    # A search that finds nothing must be one that could.
    await field.stage.sh(trusted, f"mkdir -p ~/a/b && echo -n 1{CANARY}2 > ~/a/b/c")
    found = await field.report(trusted, "search", CANARY[::-1])
    assert found["found"] == [["/home/agent/a/b/c", 0]]
    await field.stage.sh(trusted, "rm -r ~/a")


@needs_root
@pytest.mark.usefixtures("well")
async def test_no_secret_is_in_the_memory_of_a_sandbox(field: Arena, trusted: UUID):
    await field.stage.sh(
        trusted, 'curl -sk -m 10 -H "X-Key: $KEY" https://allowed.example/ || true'
    )
    memory = remembered(field.pid(trusted))
    assert b"PLAIN" in memory or b"OI_EXECUTION" in memory
    found = {name for name, secret in secrets_of(field).items() if secret.encode() in memory}
    assert found == set()
    shown = docker("inspect", field.stage.container(trusted)).stdout
    assert not [name for name, secret in secrets_of(field).items() if secret in shown]


def remembered(pid: int) -> bytes:
    """All memory of a process that can be written to."""
    parts = []
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            if "w" in rights:
                start, stop = (int(each, 16) for each in span.split("-"))
                memory.seek(start)
                parts.append(memory.read(stop - start))
    return b"".join(parts)


# --- what tests look at ---------------------------------------------------------------------------


def members(container: str | None) -> list[int]:
    """The processes of a container, as the host sees them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            if container is not None and container in file.read_text():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def processes(field: Arena, env: UUID) -> int:
    return len(members(field.stage.container(env)))


async def until_running(field: Arena, env: UUID, name: str) -> None:
    async with asyncio.timeout(30):
        while True:
            for each in await field.stage.client.environments(field.stage.address):
                if each["id"] == env.hex and name in each["executions"]:
                    return
            await asyncio.sleep(0.05)
