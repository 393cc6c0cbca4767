"""The broker's routes for files and uploads, over a real socket."""

import asyncio
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from openinteractions.broker import errors, files
from openinteractions.broker.files import add_file_routes
from openinteractions.errors import Conflict, Invalid, NotFound, TooLarge, Unready
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.files.tree import Tree
from openinteractions.sandbox.port import Displaced, Owner
from tests.broker.test_life import eventually
from tests.sandbox.trees import OWNER, archive, member, plant, stream, unpacked

ENV = UUID(int=1)
BASE = f"http://broker/v1/environments/{ENV.hex}"


class Broker:
    """A broker that only has files."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self.workspace = disk / "root/workspace"
        self.socket = str(disk / "broker.sock")
        self.is_broken = False
        self.opened = 0
        self.owner: Owner | None = None
        """Who owns the one run now."""
        self.asked = 0
        """How often that was asked."""
        self.changes = 0
        self.gate: asyncio.Event | None = None
        """Where changes wait."""
        self.let_go = 0
        """How many of them ended while they waited."""
        plant(disk)

    @asynccontextmanager
    async def fence(self, env: str, owner: Owner) -> AsyncIterator[None]:
        assert env == ENV.hex
        self.asked += 1
        if owner != self.owner:
            raise Displaced("Another one.")
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.let_go += 1
                raise
        yield

    async def changed(self, env: str) -> None:
        assert env == ENV.hex
        self.changes += 1

    @asynccontextmanager
    async def tree(self, env: str) -> AsyncIterator[Tree]:
        if env == "busy":
            raise Unready("Not now.", retry_after_s=2)
        if self.is_broken:
            raise ZeroDivisionError("a bug")
        if env != ENV.hex:
            raise NotFound(f"Environment '{env}' not found.")
        self.opened += 1
        try:
            yield Tree(self.disk / "root", uid=OWNER, gid=OWNER, environment="env1")
        finally:
            self.opened -= 1

    def leftovers(self) -> list[str]:
        """What lies in staging, and what is open."""
        staging = self.disk / "staging"
        names = [path.name for path in staging.iterdir()] if staging.exists() else []
        return names + ["a tree"] * self.opened

    async def settled(self) -> bool:
        """Whether nothing is left within a moment."""
        for _ in range(100):
            if not self.leftovers():
                return True
            await asyncio.sleep(0.05)
        return False


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    broker = Broker(tmp_path)
    app = web.Application(middlewares=[errors.rendered])
    add_file_routes(
        app.router,
        broker.tree,
        broker.fence,
        broker.changed,
        max_upload_bytes=64 << 20,
        max_extracted_bytes=1 << 20,
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.UnixSite(runner, broker.socket).start()
    yield broker
    await runner.cleanup()


@pytest.fixture
async def http(broker: Broker) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.UnixConnector(broker.socket)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


@pytest.fixture
async def client(broker: Broker) -> AsyncIterator[tuple[BrokerClient, str]]:
    client = BrokerClient("token")
    yield client, f"unix://{broker.socket}"
    await client.close()


async def call(http: aiohttp.ClientSession, method: str, path: str, data=None) -> tuple[int, dict]:
    async with http.request(method, URL(BASE + path, encoded=True), data=data) as response:
        assert response.content_type == "application/json"
        return response.status, await response.json()


async def refused(http: aiohttp.ClientSession, method: str, path: str, data=None) -> str:
    status, answer = await call(http, method, path, data)
    assert list(answer) == ["error"]
    assert set(answer["error"]) == {"code", "message"}
    return f"{status} {answer['error']['code']}"


async def test_files_go_through_the_client_and_back(client, broker):
    broker_client, address = client
    content = os.urandom(5 << 20)
    where = (address, ENV)
    written = await broker_client.write(
        *where, "workspace/d/ä b?.bin", stream(content), overwrite=False
    )
    assert [(entry.path, entry.size_bytes) for entry in written] == [
        ("workspace/d/ä b?.bin", 5 << 20)
    ]
    assert await broker_client.stat(*where, "workspace/d/ä b?.bin") == written[0]
    async with broker_client.read(*where, "workspace/d/ä b?.bin") as file:
        assert (file.size, file.mime_type) == (5 << 20, "application/octet-stream")
        assert b"".join([chunk async for chunk in file]) == content
    async with broker_client.read(*where, "workspace/d/ä b?.bin", offset=7, length=9) as file:
        assert file.size == 5 << 20
        assert b"".join([chunk async for chunk in file]) == content[7:16]
    await broker_client.mkdir(*where, "home/new")
    entries, after = await broker_client.list(*where, "", recursive=True, limit=2)
    assert ([entry.path for entry in entries], after) == ([".agents", "home"], "home")
    entries, after = await broker_client.list(*where, "", recursive=True, after=after)
    assert after is None
    assert [entry.path for entry in entries] == [
        "home/new",
        "workspace",
        "workspace/d",
        "workspace/d/ä b?.bin",
    ]
    async with broker_client.tar(*where, "workspace") as tar:
        assert unpacked(b"".join([piece async for piece in tar])) == {
            "d": None,
            "d/ä b?.bin": content,
        }
    with pytest.raises(Conflict):
        await broker_client.write(*where, "workspace/d/ä b?.bin", b"x", overwrite=False)
    await broker_client.remove(*where, "workspace/d", recursive=True)
    with pytest.raises(NotFound):
        await broker_client.stat(*where, "workspace/d")
    assert await broker.settled()


async def test_an_archive_that_nobody_waits_for_is_let_go(client, broker):
    broker_client, address = client
    owner = broker.owner = Owner(UUID(int=7), 1)
    broker.gate = asyncio.Event()
    writing = asyncio.ensure_future(
        broker_client.write(
            address, ENV, "workspace", archive(member("a")), overwrite=True, extract=True,
            owner=owner,
        )
    )  # fmt: skip
    await eventually(lambda: broker.asked == 1)
    writing.cancel()
    await eventually(lambda: broker.let_go == 1)
    assert await broker.settled()
    assert unpacked_names(broker) == []


def unpacked_names(broker: Broker) -> list[str]:
    return [path.name for path in broker.workspace.iterdir()]


async def test_uploads_go_through_the_client(client, broker):
    broker_client, address = client
    where = (address, ENV)
    packed = archive(member("a", b"a"), member("b/c", b"c"), mode="w:gz")
    assert await broker_client.append_upload(*where, "u", 0, packed[:10]) == 10
    assert await broker_client.append_upload(*where, "u", 0, packed[:10]) == 10
    with pytest.raises(Invalid, match="next offset is 10"):
        await broker_client.append_upload(*where, "u", 11, b"x")
    assert await broker_client.append_upload(*where, "u", 10, packed[10:]) == len(packed)
    assert (await broker_client.upload_state(*where, "u")).size_bytes == len(packed)
    extracted = await broker_client.commit_upload(
        *where, "u", "workspace/x", overwrite=False, extract=True
    )
    assert [entry.path for entry in extracted] == ["workspace/x/a", "workspace/x/b/c"]
    state = await broker_client.upload_state(*where, "u")
    assert (state.is_over, state.written) == (True, extracted)
    await broker_client.append_upload(*where, "v", 0, b"file")
    written = await broker_client.commit_upload(*where, "v", "workspace/v", overwrite=False)
    assert [entry.size_bytes for entry in written] == [4]
    await broker_client.append_upload(*where, "w", 0, b"file")
    await broker_client.drop_upload(*where, "w")
    await broker_client.drop_upload(*where, "w")
    state = await broker_client.upload_state(*where, "w")
    assert (state.is_over, state.written) == (True, None)
    with pytest.raises(NotFound):
        await broker_client.upload_state(*where, "x")
    content = archive(member("a", bytes(2 << 20)), mode="w:gz")
    with pytest.raises(TooLarge):
        await broker_client.write(*where, "workspace", content, overwrite=True, extract=True)
    assert await broker.settled()


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/files", ""),
        ("/files/", ""),
        ("/files//", ""),
        ("/files/.", ""),
        ("/files/workspace/", "workspace"),
        ("/files//workspace/a%20b", "workspace/a b"),
        ("/files/workspace%2Fa%20b", "workspace/a b"),
        ("/files//home/agent/h", "home/h"),
    ],
)
async def test_a_path_may_be_spelled_in_several_ways(http, broker, path, parts):
    (broker.workspace / "a b").touch()
    (broker.disk / "root/home/h").touch()
    status, answer = await call(http, "GET", path)
    assert (status, answer["path"]) == (200, parts)


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/files/workspace/no", "404 not_found"),
        ("GET", "/files/../../../etc/passwd?op=read", "400 invalid_request"),
        ("GET", "/files/workspace/%2e%2e/%2e%2e/x", "400 invalid_request"),
        ("GET", "/files/workspace/a%2F..%2F..", "400 invalid_request"),
        ("GET", "/files/workspace/%00", "400 invalid_request"),
        ("GET", "/files/workspace?op=read", "400 invalid_request"),
        ("GET", "/files/workspace?op=nonsense", "400 invalid_request"),
        ("GET", "/files/workspace?op=list&limit=0", "400 invalid_request"),
        ("GET", "/files/workspace?op=list&limit=10001", "400 invalid_request"),
        ("GET", "/files/workspace?op=list&limit=x", "400 invalid_request"),
        ("GET", "/files/workspace?op=list&recursive=maybe", "400 invalid_request"),
        ("GET", "/files/workspace/a?op=read&offset=-1", "400 invalid_request"),
        ("GET", "/files/workspace/a?op=read&offset=2", "400 invalid_request"),
        ("GET", "/files/workspace/a?op=tar", "400 invalid_request"),
        ("PUT", "/files/workspace/a", "409 aborted"),
        ("PUT", "/files/etc/a", "400 invalid_request"),
        ("PUT", "/files/workspace?extract=true", "400 invalid_request"),
        ("POST", "/files/workspace/x", "400 invalid_request"),
        ("POST", "/files/workspace/a?op=mkdir", "409 aborted"),
        ("DELETE", "/files/workspace", "400 invalid_request"),
        ("DELETE", "/files/workspace/no", "404 not_found"),
        ("PATCH", "/files/workspace/a", "405 method_not_allowed"),
        ("GET", "/nothing", "404 not_found"),
        ("GET", "/uploads/no", "404 not_found"),
        ("PUT", "/files/workspace/x?epoch=1", "400 invalid_request"),
        ("PUT", f"/files/workspace/x?interaction={ENV.hex}", "400 invalid_request"),
        ("PUT", "/files/workspace/x?epoch=1&interaction=me", "400 invalid_request"),
        ("DELETE", f"/files/workspace/a?epoch=-1&interaction={ENV.hex}", "400 invalid_request"),
        ("DELETE", f"/files/workspace/a?epoch=1&interaction={ENV.hex}", "409 displaced"),
        ("PUT", "/uploads/a.b", "400 invalid_request"),
        ("PUT", "/uploads/a?offset=5", "404 not_found"),
        ("POST", "/uploads/no/commit?path=workspace/x", "404 not_found"),
        ("POST", "/uploads/no/commit", "400 invalid_request"),
    ],
)
async def test_refusals_have_a_status_and_a_code(http, broker, method, path, code):
    (broker.workspace / "a").write_bytes(b"a")
    assert await refused(http, method, path, b"x" if method == "PUT" else None) == code
    assert await broker.settled()


async def test_an_unknown_environment_and_a_bug(http, broker):
    async with http.get("http://broker/v1/environments/busy/files") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
    async with http.get("http://broker/v1/environments/other/files") as response:
        assert response.status == 404
    broker.is_broken = True
    status, answer = await call(http, "GET", "/files")
    assert (status, answer["error"]["code"]) == (500, "internal")
    assert "bug" not in answer["error"]["message"]


@pytest.mark.parametrize("framing", ["Content-Length: 4000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(
    "path",
    ["files/workspace/a", "files/workspace/a?overwrite=true", "files/workspace/x?extract=true"],
)
async def test_a_client_that_goes_away_leaves_nothing(broker, framing, path):
    (broker.workspace / "kept").write_bytes(b"kept")
    _, writer = await asyncio.open_unix_connection(broker.socket)
    head = f"PUT /v1/environments/{ENV.hex}/{path} HTTP/1.1\r\nHost: b\r\n{framing}\r\n\r\n"
    body = b"x" * (3 << 20)
    if "chunked" in framing:
        body = b"%x\r\n%s\r\n" % (len(body), body)
    writer.write(head.encode() + body)
    await writer.drain()
    for _ in range(100):
        if broker.leftovers():
            break
        await asyncio.sleep(0.02)
    writer.close()
    await writer.wait_closed()
    assert await broker.settled()
    assert [file.name for file in broker.workspace.iterdir()] == ["kept"]


async def test_what_arrived_of_an_upload_stays(broker, http):
    _, writer = await asyncio.open_unix_connection(broker.socket)
    path = f"/v1/environments/{ENV.hex}/uploads/u?offset=0"
    head = f"PUT {path} HTTP/1.1\r\nHost: b\r\nContent-Length: 4000000\r\n\r\n"
    writer.write(head.encode() + b"x" * (3 << 20))
    await writer.drain()
    await asyncio.sleep(0.3)
    writer.close()
    await writer.wait_closed()
    assert await broker.settled()
    _, answer = await call(http, "GET", "/uploads/u")
    assert 1 << 20 <= answer["size"] <= 3 << 20
    status, answer = await call(http, "PUT", "/uploads/u?offset=0", io.BytesIO(b"x" * 4_000_000))
    assert (status, answer) == (200, {"size": 4_000_000})


async def test_a_download_that_cannot_be_finished_does_not_look_finished(broker, http):
    file = broker.workspace / "log"
    file.write_bytes(b"x" * (20 << 20))
    async with http.get(f"{BASE}/files/workspace/log?op=read") as response:
        await response.content.readany()
        os.truncate(file, 1000)
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionError)):
            await response.read()
    assert await broker.settled()


async def test_a_reader_that_goes_away_frees_the_file(broker, http):
    (broker.workspace / "log").write_bytes(b"x" * (20 << 20))
    for query in ("log?op=read", "?op=tar"):
        async with http.get(f"{BASE}/files/workspace/{query}") as response:
            await response.content.readany()
            response.close()
        assert await broker.settled()


async def test_a_refusal_is_heard_while_the_body_is_still_coming(client, broker):
    broker_client, address = client
    (broker.workspace / "a").touch()
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            yield b"x" * (1 << 20)
            sent += 1
            await asyncio.sleep(0.001)

    with pytest.raises(Conflict):
        await broker_client.write(address, ENV, "workspace/a", endless(), overwrite=False)
    assert sent < 1000
    assert await broker.settled()


async def test_many_at_once(http, broker):
    async def one(number: int) -> None:
        content = bytes([number]) * 300_000
        path = f"/files/workspace/f{number}"
        status, _ = await call(http, "PUT", path, content)
        assert status == 200
        async with http.get(f"{BASE}{path}?op=read") as response:
            assert await response.read() == content

    async with asyncio.TaskGroup() as group:
        for number in range(40):
            group.create_task(one(number))
    assert await broker.settled()


async def begun(broker: Broker, query: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A download of which nothing was read."""
    reader, writer = await asyncio.open_unix_connection(broker.socket, limit=2**12)
    request = f"GET /v1/environments/{ENV.hex}/files/workspace?{query} HTTP/1.1\r\nHost: b\r\n\r\n"
    writer.write(request.replace("workspace?op=read", "workspace/big?op=read").encode())
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("query", ["op=read", "op=tar&recursive=true"])
async def test_a_download_that_nobody_reads_is_broken_off(broker, monkeypatch, query):
    (broker.workspace / "big").write_bytes(bytes(8 << 20))
    monkeypatch.setattr(files, "_STALL_S", 0.2)
    reader, writer = await begun(broker, query)
    for is_open in (True, False):
        await eventually(lambda wanted=is_open: bool(broker.opened) is wanted, within_s=5)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(8 << 20)
    writer.close()


async def test_a_download_that_is_read_slowly_goes_on(broker, monkeypatch):
    (broker.workspace / "big").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(files, "_STALL_S", 0.2)
    reader, writer = await begun(broker, "op=read")
    got = 0
    # Each piece that is sent takes longer than a reader may pause.
    while got < 1 << 20:
        got += len(await reader.read(1 << 15))
        await asyncio.sleep(0.05)
    assert got >= 1 << 20
    writer.close()


OLD, NEW = Owner(UUID(int=7), 1), Owner(UUID(int=7), 2)


def files_of(broker: Broker) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in broker.workspace.rglob("*") if path.is_file()}


async def test_an_owner_that_was_replaced_changes_no_file(client, broker):
    broker_client, address = client
    where = (address, ENV, "workspace/a")
    broker.owner = OLD
    await broker_client.write(*where, b"old", overwrite=True, owner=OLD)
    broker.owner = NEW
    packed = archive(member("b", b"b"), mode="w:gz")
    with pytest.raises(Displaced):
        await broker_client.write(*where, b"late", overwrite=True, owner=OLD)
    with pytest.raises(Displaced):
        await broker_client.write(
            address, ENV, "workspace", packed, overwrite=True, extract=True, owner=OLD
        )
    with pytest.raises(Displaced):
        await broker_client.remove(*where, owner=OLD)
    with pytest.raises(Displaced):
        await broker_client.remove(address, ENV, "workspace/none", owner=Owner(UUID(int=8), 2))
    assert files_of(broker) == {"a": b"old"}
    await broker_client.write(*where, b"new", overwrite=True, owner=NEW)
    await broker_client.write(
        address, ENV, "workspace", packed, overwrite=True, extract=True, owner=NEW
    )
    assert files_of(broker) == {"a": b"new", "b": b"b"}
    await broker_client.remove(*where, owner=NEW)
    assert files_of(broker) == {"b": b"b"}
    assert await broker.settled()


async def test_every_change_is_noted_and_no_look(client, broker):
    client, address = client
    where = (address, ENV)
    await client.write(*where, "workspace/note", b"1", overwrite=True)
    assert broker.changes == 1
    await client.append_upload(*where, "up1", 0, b"22")
    await client.stat(*where, "workspace/note")
    await client.list(*where, "")
    assert broker.changes == 1
    await client.commit_upload(*where, "up1", "workspace/note", overwrite=True)
    await client.remove(*where, "workspace/note")
    assert broker.changes == 3
    with pytest.raises(NotFound):
        await client.remove(*where, "workspace/note")
    assert broker.changes == 3


async def test_who_is_no_owner_is_not_asked(client, broker):
    broker_client, address = client
    where = (address, ENV, "workspace/a")
    await broker_client.write(*where, b"a", overwrite=True)
    await broker_client.remove(*where)
    assert broker.asked == 0


@pytest.mark.parametrize("extract", ["false", "true"])
async def test_an_owner_may_be_replaced_while_its_bytes_arrive(broker, extract):
    (broker.workspace / "kept").write_bytes(b"kept")
    broker.owner = OLD
    body = archive(member("kept", b"late")) if extract == "true" else b"late"
    path = "workspace" if extract == "true" else "workspace/kept"
    query = f"overwrite=true&extract={extract}&interaction={OLD.interaction_id.hex}&epoch=1"
    reader, writer = await asyncio.open_unix_connection(broker.socket)
    head = f"PUT /v1/environments/{ENV.hex}/files/{path}?{query} HTTP/1.1\r\nHost: b\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body[:-1]))
    await eventually(broker.leftovers, within_s=5)
    broker.owner = NEW
    assert broker.asked == 0
    writer.write(body[-1:])
    assert b" 409 " in await reader.readline()
    writer.close()
    assert files_of(broker) == {"kept": b"kept"}
    assert await broker.settled()
