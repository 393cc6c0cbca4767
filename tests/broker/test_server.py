"""The broker's API: who gets in, how it listens, forwarded ports, metrics."""

import asyncio
import socket
import ssl
import stat
import subprocess

import aiohttp
import pytest

from openinteractions.crypto import broker_token
from openinteractions.errors import NotFound
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.port import SandboxError

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
