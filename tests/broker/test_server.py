"""The broker's API: who gets in, how it listens, forwarded ports, metrics."""

import asyncio
import socket
import ssl
import stat
import subprocess
import time
from pathlib import Path

import aiohttp
import pytest

from openinteractions import clock, ids
from openinteractions.broker import egress, listen
from openinteractions.broker import slot as slots
from openinteractions.broker.egress import EgressLog, Projects
from openinteractions.broker.slot import Slot
from openinteractions.crypto import broker_token
from openinteractions.errors import NotFound, SetupError, TooLarge
from openinteractions.resources.keys.store import ensure_project
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.egress.journal import Decision
from openinteractions.sandbox.port import SandboxError
from openinteractions.settings import SandboxSettings
from tests.broker.test_life import eventually

ECHO = (
    "import socket\n"
    's = socket.create_server(("127.0.0.1", 9000))\n'
    "while True:\n"
    "    c, _ = s.accept()\n"
    "    data = b''\n"
    "    while chunk := c.recv(65536): data += chunk\n"
    "    c.sendall(data[::-1]); c.close()\n"
)


async def test_only_who_has_the_master_key_gets_in(broker):
    stranger = BrokerClient("0" * 64)
    with pytest.raises(SandboxError, match="master key"):
        await stranger.environments(broker.address)
    await stranger.close()
    connector = aiohttp.UnixConnector(broker.address.removeprefix("unix://"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://broker/v1/health") as answer,
    ):
        assert answer.status == 401


async def test_the_socket_is_its_owners_alone(broker):
    path = broker.home / "sandboxes/broker.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert await broker.stop() == 0
    assert not path.exists()


async def test_health_says_what_it_is(broker):
    found = await broker.client.health(broker.address)
    assert (found["name"], found["backend"], found["running"]) == (broker.name, "docker", 0)
    assert found["problem"] is None
    assert found["limits"]["memory_bytes"] == 512 * 2**20


async def test_what_it_counts_is_shown(broker):
    env = await broker.environment()
    await broker.sh(env, "true")
    connector = aiohttp.UnixConnector(broker.address.removeprefix("unix://"))
    headers = {"Authorization": f"Bearer {broker_token(broker.key)}"}
    async with (
        aiohttp.ClientSession(connector=connector, headers=headers) as session,
        session.get("http://broker/metrics") as answer,
    ):
        text = await answer.text()
    assert 'oi_sandboxes{state="running"} 1.0' in text
    assert 'oi_sandbox_start_seconds_count{kind="cold"} 1.0' in text
    assert 'oi_executions_total{outcome="exited"} 1.0' in text


async def test_errors_come_through_as_they_are(broker):
    env = await broker.environment()
    with pytest.raises(NotFound, match=r"none\.txt"):
        await broker.client.stat(broker.address, env, "workspace/none.txt")
    with pytest.raises(NotFound, match="No such environment"):
        await broker.sh(broker.project_id, "true")


async def test_a_port_inside_is_reached(broker):
    env = await broker.environment()
    await broker.client.write(
        broker.address, env, "workspace/echo.py", ECHO.encode(), overwrite=False
    )
    await broker.sh(env, "setsid python3 echo.py </dev/null >/dev/null 2>&1 & sleep 0.5")
    data = bytes(range(256)) * 4000
    async with broker.client.dial(broker.address, env, 9000) as port:
        await port.write(data)
        await port.end()
        got = b""
        while piece := await asyncio.wait_for(port.read(), 20):
            got += piece
    assert got == data[::-1]
    with pytest.raises(NotFound, match="9001"):
        async with broker.client.dial(broker.address, env, 9001):
            pass
    with pytest.raises(NotFound, match="No such environment"):
        async with broker.client.dial(broker.address, broker.project_id, 9000):
            pass


@pytest.fixture
def certificate(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=broker"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


async def test_https_with_a_certificate_of_ones_own(stage, certificate):
    cert, key = certificate
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    await stage.start(
        OI_SANDBOX__LISTEN=f"https://127.0.0.1:{number}",
        OI_SANDBOX__TLS_CERT=str(cert),
        OI_SANDBOX__TLS_KEY=str(key),
    )
    ((address,),) = await stage.fetch("select address from brokers where name = $1", stage.name)
    assert address == f"https://127.0.0.1:{number}"
    trusting = BrokerClient(broker_token(stage.key), tls=ssl.create_default_context(cafile=cert))
    stage.address = address
    env = await stage.environment()
    stage.client, doubting = trusting, stage.client
    assert await stage.sh(env, "echo hello") == "hello\n"
    with pytest.raises(Exception, match="does not answer"):
        await asyncio.wait_for(doubting.environments(address), 30)
    await doubting.close()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"OI_SANDBOX__LISTEN": "http://127.0.0.1:1"}, "sandbox.listen"),
        ({"OI_SANDBOX__LISTEN": "https://127.0.0.1:1"}, "sandbox.tls_cert"),
        ({"OI_SANDBOX__LISTEN": "unix:///" + "x" * 200}, "too long"),
        ({"OI_DATABASE_URL": ""}, "DATABASE_URL"),
    ],
)
async def test_what_is_set_up_wrong_is_said(stage, settings, reason):
    process = stage.spawn(**settings)
    assert await asyncio.to_thread(process.wait, 60) == 2
    lines = stage.log_path.read_text().splitlines()
    (said,) = [line for line in lines if line.startswith("openinteractions: ")]
    assert reason in said


# A socket in a folder whose name can be guessed.


@pytest.mark.parametrize("kind", ["open", "link", "file"])
def test_a_folder_in_tmp_must_be_nobody_elses(tmp_path, monkeypatch, kind):
    home = tmp_path / ("x" * 120)
    home.mkdir()
    folder = listen._default(home).parent
    assert folder.parent == Path("/tmp")
    try:
        if kind == "open":
            folder.mkdir()
            folder.chmod(0o755)
        elif kind == "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            folder.symlink_to(tmp_path / "elsewhere")
        else:
            folder.touch(mode=0o600)
        with pytest.raises(SetupError):
            listen.listen(SandboxSettings(), home)
        assert not (tmp_path / "elsewhere/broker.sock").exists()
    finally:
        folder.rmdir() if kind == "open" else folder.unlink()


def test_a_folder_in_tmp_is_made_for_its_owner_alone(tmp_path):
    home = tmp_path / ("x" * 120)
    home.mkdir()
    for _ in range(2):
        with listen.listening(SandboxSettings(), home) as listener:
            assert listener.path is not None
            assert stat.S_IMODE(listener.path.parent.stat().st_mode) == 0o700
    listener.path.parent.rmdir()


# Files.


async def test_long_paths_fit_into_a_request(broker):
    env = await broker.environment()
    await broker.client.ensure(broker.address, env)
    long = "/".join(["workspace", *["\u00e4" * 120] * 16])
    assert 3500 < len(long.encode()) < 4096
    with pytest.raises(NotFound):
        await broker.client.list(broker.address, env, long, after=long)
    entries, _ = await broker.client.list(broker.address, env, "workspace", after=long)
    assert entries == []


async def test_only_files_of_the_same_project_are_copied(broker):
    foreign = await broker.environment()
    broker.project_id = await ensure_project(broker.database, "other")
    env = await broker.environment()
    await broker.client.ensure(broker.address, foreign)
    with pytest.raises(NotFound, match=foreign.hex):
        await broker.client.ensure(broker.address, env, source=foreign)


async def nothing_runs(stage):
    return not (await stage.client.health(stage.address))["running"]


async def test_a_download_that_nobody_reads_holds_no_sandbox(stage):
    await stage.start(OI_SANDBOX__MAX_RUNNING="1", OI_SANDBOX__IDLE_STOP="1s")
    env, other = await stage.environment(), await stage.environment()
    await stage.sh(env, "head -c 30000000 /dev/zero > /workspace/big")
    async with stage.client.read(stage.address, env, "workspace/big") as file:
        assert (await stage.sh(other, "echo hi")) == "hi\n"
        await eventually(lambda: nothing_runs(stage))
        # Its disk stays for as long as it is read.
        assert sum([len(chunk) async for chunk in file]) == 30_000_000
    assert (await stage.sh(env, "cat big | wc -c")).strip() == "30000000"


async def test_a_plain_folder_is_bounded(stage):
    size = 16 * 2**20
    await stage.start(OI_SANDBOX__DISK="folder", OI_SANDBOX__DISK_BYTES=str(size))
    env = await stage.environment()

    async def body(count):
        for _ in range(count):
            yield b"x" * 65536

    async def write(name, count):
        return await stage.client.write(
            stage.address, env, f"workspace/{name}", body(count), overwrite=True
        )

    await write("fits", 100)
    with pytest.raises(TooLarge, match=f"may hold {size} bytes"):
        await write("rest", 200)
    ran = await stage.run(env, stage.shell("head -c 40000000 /dev/zero > big; sleep 60"))
    assert ran.exit is not None
    assert ran.exit.outcome == "killed"
    (event,) = stage.events("environment.over_bound")
    assert event["environment_id"] == env.hex
    assert event["bound_bytes"] == size < event["size_bytes"]
    with pytest.raises(TooLarge, match=f"may take {size}"):
        await stage.sh(env, "true")
    with pytest.raises(TooLarge):
        await write("rest", 1)
    # What is too much can be deleted, and then all is well again.
    assert await stage.sh(env, "rm big; ls") == "fits\n"
    await write("rest", 1)


def test_what_nobody_goes_on_with_is_looked_for_again_and_again(monkeypatch):
    slot = Slot(ids.uuid7())
    assert slot.is_to_be_cleaned
    slot.cleaned_at = time.monotonic()
    assert not slot.is_to_be_cleaned
    monkeypatch.setattr(slots, "_CLEAN_S", -1.0)
    assert slot.is_to_be_cleaned


def test_who_reads_files_uses_the_disk_alone():
    slot = Slot(ids.uuid7())
    slot.last_used = slot.files_last_used = time.monotonic() - 1000
    with slot.files_used():
        assert not slot.is_busy
        assert slot.idle_s >= 1000
        assert slot.disk_idle_s == 0
    assert slot.idle_s >= 1000
    assert slot.disk_idle_s < 10


# The record of what sandboxes connect to.


def decision(env):
    return Decision(
        environment_id=env.hex, at=clock.now(), host="h", port=80, kind="http", decision="refused"
    )


async def logged(database, env):
    async with database.hot() as connection:
        return await connection.fetch(
            "select decision, count(*) as count, max(reason) as reason from egress_log "
            "where environment_id = $1 group by decision order by decision",
            env,
        )


async def test_a_noisy_environment_costs_the_others_no_record(database):
    project = await ensure_project(database, "default")
    noisy, quiet = ids.uuid7(), ids.uuid7()
    projects = Projects()
    for env in (noisy, quiet):
        projects.add(env, project)
    log = EgressLog(database, projects)
    for _ in range(30_000):
        log.record(decision(noisy))
    for _ in range(100):
        log.record(decision(quiet))
    async with log.writing():
        pass
    assert [tuple(row)[:2] for row in await logged(database, quiet)] == [("refused", 100)]
    omitted, kept = await logged(database, noisy)
    assert (omitted["decision"], omitted["count"]) == ("omitted", 1)
    assert 500 <= kept["count"] < 2000
    assert omitted["reason"].startswith(f"{30_000 - kept['count']} decisions")


async def test_an_environment_may_speak_again_after_a_while(database, monkeypatch):
    monkeypatch.setattr(egress, "_BURST", 10.0)
    monkeypatch.setattr(egress, "_SUM_UP_S", 0.0)
    env, projects = ids.uuid7(), Projects()
    projects.add(env, await ensure_project(database, "default"))
    log = EgressLog(database, projects)
    async with log.writing():
        for _ in range(2):
            for _ in range(40):
                log.record(decision(env))
            await asyncio.sleep(1.5)
    omitted, kept = await logged(database, env)
    assert kept["count"] in range(15, 40)
    assert omitted["count"] == 2
