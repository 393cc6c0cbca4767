"""Docker's backend at the edge: refusals, versions and addresses, against a fake engine over HTTP.

What containers really are is checked in tests/contracts/sandbox.
"""

import asyncio
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from openinteractions.sandbox import docker
from openinteractions.sandbox.docker import DockerBackend, tls_context
from openinteractions.sandbox.port import (
    BackendDown,
    Gone,
    Limits,
    Mount,
    SandboxError,
    SandboxSpec,
)

SPEC = SandboxSpec(name="oi-test", image="oi/x", argv=["cat"])
VERSION = {"Version": "99", "ApiVersion": "1.52", "MinAPIVersion": "1.44"}


class FakeEngine:
    """Answers as told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], tuple[int, Any]] = {("GET", "/version"): (200, VERSION)}
        self.asked: list[tuple[str, str]] = []
        self.body: Any = None
        self.stream: Callable[[web.Request], Any] | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        if request.can_read_body:
            self.body = await request.json()
        path = request.path.split("/", 2)[2] if request.path.startswith("/v1.") else request.path
        status, value = self.answers.get((request.method, path), (404, {"message": "no page"}))
        return web.json_response(value, status=status)

    @asynccontextmanager
    async def serve(self, site: Callable[[web.AppRunner], web.BaseSite]) -> AsyncGenerator[None]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await site(runner).start()
        yield
        await runner.cleanup()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncGenerator[FakeEngine]:
    fake = FakeEngine()
    async with fake.serve(lambda runner: web.UnixSite(runner, str(tmp_path / "engine.sock"))):
        yield fake


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncGenerator[DockerBackend]:
    backend = DockerBackend(f"unix://{tmp_path}/engine.sock")
    yield backend
    await backend.close()


async def test_speaks_the_oldest_version_that_both_know(engine, backend):
    engine.answers["GET", "images/oi/x:1/json"] = (200, {"Id": "sha256:1"})
    assert await backend.image_id("oi/x:1") == "sha256:1"
    assert await backend.image_id("oi/none") is None
    assert engine.asked[0] == ("GET", "/version")
    assert engine.asked[1] == ("GET", "/v1.44/images/oi/x:1/json")
    assert len(engine.asked) == 3
    engine.answers["GET", "/version"] = (200, {"ApiVersion": "1.41", "MinAPIVersion": "1.12"})
    older = DockerBackend(backend._url)
    await older.image_id("x")
    assert engine.asked[-1] == ("GET", "/v1.41/images/x/json")
    await older.close()


async def test_an_engine_that_is_too_old_is_refused(engine, backend):
    engine.answers["GET", "/version"] = (200, {"ApiVersion": "1.40"})
    with pytest.raises(BackendDown, match="too old"):
        await backend.list({})


async def test_health_names_what_is_missing(engine, backend):
    weak = {
        "Runtimes": {"runsc": {}, "runc": {}},
        "MemoryLimit": False,
        "PidsLimit": False,
        "SwapLimit": False,
        "CpuCfsQuota": False,
        "SecurityOptions": ["name=apparmor"],
    }
    engine.answers["GET", "info"] = (200, weak)
    health = await backend.health()
    assert health.version == "99 (API 1.52)"
    assert list(health.runtimes) == ["runc", "runsc"]
    assert [problem.split(":")[0] for problem in health.problems] == [
        "The engine cannot limit a sandbox's memory",
        "The engine cannot limit a sandbox's number of processes",
        "The engine cannot limit a sandbox's processor time",
        "The engine cannot limit swap",
        "The engine filters no system calls",
    ]
    strong = {**dict.fromkeys(weak, True), "SecurityOptions": ["name=seccomp,profile=builtin"]}
    engine.answers["GET", "info"] = (200, {**strong, "Runtimes": {}})
    assert list((await backend.health()).problems) == []


async def test_asks_for_exactly_this_container(engine, backend):
    engine.answers["POST", "containers/create"] = (201, {"Id": "c1"})
    engine.answers["POST", "containers/c1/start"] = (204, None)
    spec = SandboxSpec(
        name="oi-a",
        image="oi/x",
        argv=["python3", "-c", "1"],
        limits=Limits(cpus=1.5, memory_bytes=2**30, pids=99, tmp_bytes=2**28),
        mounts=[
            Mount(source=Path("/d/a"), target="/workspace"),
            Mount(source=Path("/d/b"), target="/.agents", is_late=True),
        ],
        env={"A": "b=c"},
        labels={"l": "v"},
        runtime="runsc",
        uid=1234,
    )
    assert await backend.create(spec) == "c1"
    tmp = "rw,nosuid,nodev"
    own = "noexec,mode=0755,uid=1234,gid=1234"
    private = "noexec,mode=0700,uid=1234,gid=1234"
    assert engine.body == {
        "Image": "oi/x",
        "Entrypoint": ["python3"],
        "Cmd": ["-c", "1"],
        "Env": ["A=b=c"],
        "User": "1234:1234",
        "Labels": {"l": "v"},
        "Hostname": "sandbox",
        "OpenStdin": True,
        "StdinOnce": False,
        "AttachStdin": False,
        "Tty": False,
        "HostConfig": {
            "Runtime": "runsc",
            "NetworkMode": "none",
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "Memory": 2**30,
            "MemorySwap": 2**30,
            "PidsLimit": 99,
            "NanoCpus": 1_500_000_000,
            "OomScoreAdj": 500,
            "Tmpfs": {
                "/tmp": f"{tmp},exec,mode=1777,size={2**24 * 10},nr_inodes={2**12 * 10}",
                "/dev/shm": f"{tmp},noexec,mode=1777,size={2**25},nr_inodes={2**13}",
                "/run": f"{tmp},{own},size={2**24},nr_inodes={2**12}",
                "/run/oi": f"{tmp},{private},size={2**24 * 3},nr_inodes={2**12 * 3}",
            },
            "Mounts": [
                {
                    "Type": "bind",
                    "Source": "/d/a",
                    "Target": "/workspace",
                    "ReadOnly": False,
                    "BindOptions": {"Propagation": "rprivate"},
                },
                {
                    "Type": "bind",
                    "Source": "/d/b",
                    "Target": "/.agents",
                    "ReadOnly": False,
                    "BindOptions": {"Propagation": "rslave"},
                },
            ],
            "Ulimits": [
                {"Name": "core", "Soft": 0, "Hard": 0},
                {"Name": "msgqueue", "Soft": 0, "Hard": 0},
                {"Name": "nofile", "Soft": 16384, "Hard": 16384},
            ],
            "IpcMode": "private",
            "LogConfig": {"Type": "none"},
            "RestartPolicy": {"Name": "no"},
            "Dns": ["127.0.0.1"],
            "ExtraHosts": ["sandbox:127.0.0.1"],
            "Sysctls": {
                "net.ipv4.ip_unprivileged_port_start": "0",
                "kernel.shm_rmid_forced": "1",
                "kernel.msgmni": "64",
                "kernel.sem": "250 32000 100 128",
            },
        },
    }


async def test_a_container_that_does_not_start_is_removed(engine, backend):
    engine.answers["POST", "containers/create"] = (201, {"Id": "c1"})
    engine.answers["POST", "containers/c1/start"] = (500, {"message": "cgroup trouble"})
    engine.answers["DELETE", "containers/c1"] = (204, None)
    with pytest.raises(BackendDown, match="did not start: cgroup trouble"):
        await backend.create(SPEC)
    assert engine.asked[-1] == ("DELETE", "/v1.44/containers/c1")


@pytest.mark.parametrize("path", ["containers/create", "containers/1/start"])
async def test_an_engine_with_trouble_of_its_own_may_be_asked_again(engine, backend, path):
    """Such as one that is just being restarted: the command waits, and is not told to its model."""
    engine.answers |= {
        ("POST", "containers/create"): (201, {"Id": "1"}),
        ("POST", "containers/1/start"): (204, None),
        ("DELETE", "containers/1"): (204, None),
        ("POST", path): (500, {"message": "failed to update store for object type endpoint"}),
    }
    with pytest.raises(BackendDown, match="did not start: failed to update store") as refused:
        await backend.create(SPEC)
    assert refused.value.retry_after_s
    engine.answers["POST", path] = (400, {"message": "no such mount"})
    with pytest.raises(SandboxError, match="did not start: no such mount"):
        await backend.create(SPEC)


async def test_a_removal_by_another_is_waited_for(engine, backend, monkeypatch):
    monkeypatch.setattr(docker, "_REMOVE_PAUSE_S", 0.01)
    engine.answers["DELETE", "containers/c1"] = (409, {"message": "already in progress"})
    removal = asyncio.ensure_future(backend.remove("c1"))
    await asyncio.sleep(0.1)
    assert not removal.done()
    engine.answers["DELETE", "containers/c1"] = (404, {"message": "gone"})
    await removal
    monkeypatch.setattr(docker, "_REMOVE_S", 0.05)
    engine.answers["DELETE", "containers/c1"] = (409, {"message": "already in progress"})
    with pytest.raises(SandboxError, match="cannot be removed"):
        await backend.remove("c1")
    engine.answers["DELETE", "containers/c1"] = (500, {"message": "stuck"})
    with pytest.raises(SandboxError, match="stuck"):
        await backend.remove("c1")


async def test_no_engine_says_what_to_do(tmp_path):
    absent = DockerBackend(f"unix://{tmp_path}/none.sock")
    with pytest.raises(BackendDown, match=r"none\.sock: start Docker, or set sandbox\.docker_url"):
        await absent.health()
    await absent.close()
    refused = DockerBackend("tcp://127.0.0.1:1")
    with pytest.raises(BackendDown, match="No container engine listens at tcp://127"):
        await refused.list({})
    await refused.close()


async def test_no_right_to_the_socket_names_the_group(backend, monkeypatch):
    def forbid(path: str, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_unix_connection", forbid, raising=False)
    with pytest.raises(BackendDown, match=r"may not use .* 'docker'"):
        await backend.health()


async def test_an_engine_that_hangs_is_down(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(docker, "_TIMEOUT", docker.aiohttp.ClientTimeout(total=0.1))
    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_unix_server(
        lambda _, writer: held.append(writer), tmp_path / "engine.sock"
    )
    with pytest.raises(BackendDown, match="does not answer"):
        await backend.health()
    for writer in held:
        writer.close()
    server.close()


async def test_an_engine_that_breaks_off_is_down(backend, tmp_path):
    server = await asyncio.start_unix_server(
        lambda _, writer: writer.close(), tmp_path / "engine.sock"
    )
    with pytest.raises(BackendDown, match="cannot be used"):
        await backend.health()
    server.close()


@pytest.mark.parametrize("url", ["", "docker.sock", "unix://", "ssh://host", "tcp://", "http:///x"])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(BackendDown, match=r"sandbox\.docker_url"):
        DockerBackend(url)


# Streams.


@asynccontextmanager
async def streaming(
    folder: Path, sent: bytes, head: bytes = b"HTTP/1.1 101 UPGRADED\r\nUpgrade: tcp\r\n\r\n"
) -> AsyncGenerator[DockerBackend]:
    """An engine whose attached container has this to say."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await _request(reader):
            if b"/attach?" in request:
                break
            body = (
                b'{"ApiVersion":"1.41"}'
                if b"/version" in request
                else b'{"State":{"Running":true}}'
            )
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        # The head and the first bytes in one piece, as it happens.
        writer.write(head + sent)
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, folder / "engine.sock")
    backend = DockerBackend(f"unix://{folder}/engine.sock")
    yield backend
    await backend.close()
    server.close()


async def _request(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def frame(stream: int, data: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


async def test_frames_are_taken_apart(tmp_path):
    sent = frame(1, b"one") + frame(2, b"oops") + frame(1, b"") + frame(1, b"two") + b"\x01\0\0"
    with capture_logs() as logs:
        async with streaming(tmp_path, sent) as backend:
            stream = await backend.attach("c1")
            assert [await stream.read(2) for _ in range(4)] == [b"on", b"e", b"tw", b"o"]
            assert await stream.read() == b""
            await stream.close()
    assert {log["event"] for log in logs} == {"sandbox.stderr"}
    assert "".join(log["text"] for log in logs) == "oops"


async def test_complaints_are_logged_within_bounds(tmp_path):
    sent = b"".join(frame(2, b"x" * 5000) for _ in range(50)) + frame(1, b"end")
    with capture_logs() as logs:
        async with streaming(tmp_path, sent) as backend:
            stream = await backend.attach("c1")
            assert await stream.read() == b"end"
            await stream.close()
    assert 1 <= len(logs) <= 50
    assert sum(len(log["text"]) for log in logs) <= 16 * 1024 + 1000


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", Gone),
        (b"HTTP/1.1 409 Conflict\r\n\r\n", Gone),
        (b"HTTP/1.1 500 Oh\r\n\r\nboom", SandboxError),
        (b"", BackendDown),
    ],
)
async def test_a_refused_stream_says_why(tmp_path, head, error):
    async with streaming(tmp_path, b"", head) as backend:
        with pytest.raises(error):
            await backend.attach("c1")


async def test_who_said_that_it_ends_writes_no_more_and_reads_on(tmp_path):
    async with streaming(tmp_path, frame(1, b"rest")) as backend:
        stream = await backend.attach("c1")
        await stream.end()
        with pytest.raises(ConnectionError):
            await stream.write(b"x")
        assert await stream.read() == b"rest"
        await stream.close()
        await stream.close()


# TLS.


def certificates(folder: Path) -> None:
    """An authority, and one certificate that serves and asks."""
    now = dt.datetime.now(dt.UTC)

    def issue(name: str, issuer: str, key: Any, signer: Any, *extensions: Any) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(hours=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        made = builder.sign(signer, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)

    ca, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    basic = x509.BasicConstraints(ca=True, path_length=None)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    (folder / "ca.pem").write_bytes(issue("ca", "ca", ca, ca, basic))
    (folder / "cert.pem").write_bytes(issue("engine", "ca", key, ca, names))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


async def test_an_engine_behind_tls_wants_the_certificate(tmp_path):
    certificates(tmp_path)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "ca.pem")
    server.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    fake = FakeEngine()
    fake.answers["GET", "containers/json"] = (200, [])
    sites: list[web.TCPSite] = []

    def site(runner: web.AppRunner) -> web.TCPSite:
        sites.append(web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server))
        return sites[0]

    async with fake.serve(site):
        port = sites[0]._server.sockets[0].getsockname()[1]  # pyright: ignore[reportOptionalMemberAccess]
        known = DockerBackend(f"tcp://127.0.0.1:{port}", tls=tls_context(tmp_path))
        assert list(await known.list({})) == []
        await known.close()
        bare = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        unknown = DockerBackend(f"tcp://127.0.0.1:{port}", tls=bare)
        with pytest.raises(BackendDown):
            await unknown.list({})
        await unknown.close()


def test_certificates_that_are_not_there_are_named(tmp_path):
    with pytest.raises(BackendDown, match=r"sandbox\.docker_certs"):
        tls_context(tmp_path)
