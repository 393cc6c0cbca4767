"""What the HTTP protocol bounds: the real one and the real application, on no database."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest.mock import MagicMock
from uuid import uuid4

import pytest
import uvicorn

from openinteractions.api.scope import Caller
from openinteractions.app import create_app
from openinteractions.cli import protocol
from openinteractions.settings import Settings

REST_S = 1.0
KEEP_ALIVE_S = 5
NEVER_S = 30.0
"""A connection that is open for so long would stay."""
LATE = b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
CHUNKED = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
CREATE = "/v1beta/interactions"
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Client:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def seconds_open(self) -> float:
        """Until the server closes it."""
        began = time.monotonic()
        async with asyncio.timeout(NEVER_S):
            with suppress(ConnectionError):
                while await self.reader.read(1000):
                    pass
        return time.monotonic() - began


class Running:
    """A server, and its connections."""

    def __init__(self, app: Any) -> None:
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                port=0,
                http=protocol.BoundedHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
            )
        )
        self.opened: list[Client] = []

    async def connect(self) -> Client:
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        self.opened.append(client)
        return client

    @property
    def protocol(self) -> Any:
        """The server's side of the only connection."""
        (one,) = self.uvicorn.server_state.connections
        return one


@asynccontextmanager
async def running(app: Any) -> AsyncGenerator[Running]:
    server = Running(app)
    task = asyncio.create_task(server.uvicorn._serve())
    while not server.uvicorn.started:  # noqa: ASYNC110 - it has no event for this
        await asyncio.sleep(0.01)
    try:
        yield server
    finally:
        for client in server.opened:
            client.writer.close()
        server.uvicorn.should_exit = True
        await task


async def everybody(_: str | None) -> Caller:
    return Caller(uuid4(), None, is_budgeted=False)


def application() -> Any:
    return create_app(Settings(data_dir=None), MagicMock(), everybody)


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Running]:
    monkeypatch.setattr(protocol, "_REST_TIMEOUT_S", REST_S)
    monkeypatch.setattr(protocol, "_HEAD_TIMEOUT_S", 1.0)
    async with running(application()) as made:
        yield made


async def test_the_rest_of_an_answered_request_has_only_so_long(server: Running) -> None:
    client = await server.connect()
    await client.send(LATE)
    assert (await client.answer())[0] == 405
    await client.send(b"x")
    assert await client.seconds_open() < NEVER_S


async def test_bytes_now_and_then_do_not_help(server: Running) -> None:
    client = await server.connect()
    await client.send(LATE)
    await client.answer()
    open_s = asyncio.create_task(client.seconds_open())
    with suppress(ConnectionError):
        while not open_s.done():
            await client.send(b"x")
            await asyncio.sleep(0.1)
    assert await open_s < NEVER_S


async def test_blank_lines_keep_no_connection(server: Running) -> None:
    client = await server.connect()
    await client.send(GET)
    await client.answer()
    await client.send(b"\r\n")
    assert await client.seconds_open() < NEVER_S


async def test_a_rest_in_time_leaves_the_connection(server: Running) -> None:
    client = await server.connect()
    await client.send(LATE)
    await client.answer()
    await client.send(bytes(500))
    await asyncio.sleep(REST_S / 2)
    await client.send(bytes(500) + GET)
    assert (await client.answer())[0] == 200
    await asyncio.sleep(REST_S * 1.5)
    await client.send(GET + GET)
    assert [(await client.answer())[0] for _ in range(2)] == [200, 200]
    # Nothing follows a rest: it does not stay for ever either.
    await client.send(LATE)
    await client.answer()
    await client.send(bytes(1000))
    assert await client.seconds_open() < NEVER_S


@pytest.mark.parametrize("path", [b"/healthz", CREATE.encode()], ids=["answered", "unanswered"])
@pytest.mark.parametrize(
    "piece",
    [b"x-name: value\r\n" * 1000, b"x" * 15_000],
    ids=["many", "one"],
)
async def test_trailers_are_bounded_and_dropped(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: bytes, piece: bytes
) -> None:
    monkeypatch.setattr(protocol, "_REST_TIMEOUT_S", 60.0)
    client = await server.connect()
    await client.send(CHUNKED % path + b"1\r\nx\r\n")
    await asyncio.sleep(0.2)
    side = server.protocol
    await client.send(b"0\r\nfirst: ")
    sent = 0
    with suppress(ConnectionError):
        while sent < 2**21 and not side.transport.is_closing():
            await client.send(piece)
            sent += len(piece)
            await asyncio.sleep(0.005)
    assert 64_000 < sent < 500_000
    assert len(side.headers) == 2
    assert await client.seconds_open() < NEVER_S


async def test_short_trailers_are_no_harm(server: Running) -> None:
    client = await server.connect()
    for _ in range(2):
        await client.send(CHUNKED % b"/healthz" + b"1\r\nx\r\n0\r\nx-sum: 1\r\n\r\n")
        assert (await client.answer())[0] == 405


async def counting(scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
    """Answers with the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        size += len(message["body"])
        more = message["more_body"]
    text = str(size).encode()
    headers = [(b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


@pytest.mark.parametrize("chunk", [None, 100, 1_000_000])
async def test_large_bodies_arrive(chunk: int | None) -> None:
    size = 100_000_000 if chunk != 100 else 1_000_000
    if chunk is None:
        request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)
    else:
        piece = b"%x\r\n" % chunk + bytes(chunk) + b"\r\n"
        request = CHUNKED % b"/" + piece * (size // chunk) + b"0\r\n\r\n"
    async with running(counting) as server:
        client = await server.connect()
        for _ in range(2):
            await client.send(request)
            assert await client.answer() == (200, str(size).encode())


async def test_a_slow_body_is_its_readers_to_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_REST_TIMEOUT_S", 0.1)
    monkeypatch.setattr(protocol, "_HEAD_TIMEOUT_S", 0.1)
    async with running(counting) as server:
        client = await server.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
        for _ in range(5):
            await asyncio.sleep(0.2)
            await client.send(b"x")
        assert await client.answer() == (200, b"5")


async def test_who_is_cut_off_by_the_end_is_told_in_the_contracts_form() -> None:
    async with running(application()) as server:
        client = await server.connect()
        await client.send(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{" % CREATE.encode()
        )
        await asyncio.sleep(0.2)
        server.uvicorn.should_exit = True
        head = (await client.reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 503 ")
        assert "retry-after: 1\r\n" in head
        assert "content-type: application/json\r\n" in head
        assert json.loads(await client.reader.read()) == {
            "error": {
                "code": "unavailable",
                "message": "The server is stopping.",
                "status": "UNAVAILABLE",
            }
        }
