"""Builders: a whole server in this process, over a real database and a fake upstream.

    async with house.upstream() as fake, house.opened(url, fake) as server:
        answer = await server.create("Hello")

Several servers may be open on one database at once: they share nothing else, as processes do.
"""
# ruff: noqa: ASYNC110 - a test looks again until it is so

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import orjson
import pytest
import uvicorn

from openinteractions import ids
from openinteractions.app import create_app
from openinteractions.db.engine import Database
from openinteractions.jobs import runner
from openinteractions.models.port import Finished, Json, ModelEvent, TextDelta
from openinteractions.process import Process
from openinteractions.process import opened as open_process
from openinteractions.resources.keys import service as keys
from openinteractions.settings import Settings
from tests.fakes.openai import FakeOpenAI
from tests.fakes.upstream import FakeUpstream, Received, Reply

MODEL = "fake/m"
KEY = "oi_test_key_of_the_first_project"
USAGE: Json = {"total_input_tokens": 10, "total_output_tokens": 5, "total_tokens": 15}


def finished(reason: str = "stop", **usage: int) -> Finished:
    return Finished(reason, {**USAGE, **usage})  # pyright: ignore[reportArgumentType]


def reply(*texts: str, reason: str = "stop", **how: Any) -> Reply:
    """A turn that says these texts, one delta each."""
    events: list[ModelEvent] = [TextDelta(text) for text in texts]
    return Reply((*events, finished(reason)), **how)


def said(received: Received) -> list[tuple[str, str]]:
    """What a request to the fake shows: role and text of each message."""
    return [(m["role"], text_of(m["content"])) for m in received.json["messages"]]


def text_of(content: Any) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part.get("text", "") for part in content)


def echo(received: Received) -> Reply:
    """Answer every input with `re: <input>`, so that each turn is told apart."""
    return reply(f"re: {said(received)[-1][1]}")


@asynccontextmanager
async def upstream(default: Reply | Callable[[Received], Reply] = echo) -> AsyncGenerator[Any]:
    fake = FakeOpenAI()
    fake.default = default
    async with fake.serve():
        yield fake


def settings(fake: FakeUpstream | None, **tree: Any) -> Settings:
    """Settings for tests: quick heartbeats, little patience."""
    provider = {"kind": "openai", "base_url": fake.url if fake else "http://127.0.0.1:9/v1"}
    values: Json = {
        "data_dir": Path("/tmp/oi-test-nowhere"),
        "providers": {"fake": {**provider, "api_key": "none"}},
        "worker": {"heartbeat": 0.2, "dead_after": 1.0, "flush_interval": "5ms"},
        "models": {"attempts": 3, "max_retry_wait": 0.05},
    }
    for name, value in tree.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return Settings.model_validate(values)


@dataclass(frozen=True, slots=True)
class Frame:
    """One server-sent event."""

    kind: str
    id: str | None
    data: Json


@dataclass(eq=False)
class Server:
    """One open process that serves HTTP, and a client of it."""

    process: Process
    database: Database
    http: aiohttp.ClientSession
    settings: Settings

    async def call(
        self, method: str, path: str, body: object = None, *, key: str = KEY
    ) -> tuple[int, Any]:
        """One request: status and JSON."""
        raw = None if body is None else orjson.dumps(body)
        async with self.http.request(
            method, f"/v1beta/{path}", data=raw, headers={"x-goog-api-key": key}
        ) as response:
            text = await response.read()
            is_json = response.content_type == "application/json"
            return response.status, orjson.loads(text) if is_json and text else text

    async def create(self, given: Any = "Hello", *, key: str = KEY, **fields: Any) -> Json:
        """A whole interaction, created and ended."""
        body = {"model": MODEL, "input": given, **fields}
        status, answer = await self.call("POST", "interactions", body, key=key)
        assert status == 200, answer
        return answer

    async def get(self, public_id: str, *, key: str = KEY) -> Json:
        status, answer = await self.call("GET", f"interactions/{public_id}", key=key)
        assert status == 200, answer
        return answer

    @asynccontextmanager
    async def stream(
        self, path: str, body: object = None, *, key: str = KEY
    ) -> AsyncGenerator["Frames"]:
        """An event stream, read frame by frame."""
        method = "GET" if body is None else "POST"
        raw = None if body is None else orjson.dumps(body)
        async with self.http.request(
            method, f"/v1beta/{path}", data=raw, headers={"x-goog-api-key": key}
        ) as response:
            assert response.status == 200, await response.read()
            assert response.content_type == "text/event-stream"
            yield Frames(response)

    async def frames(self, path: str, body: object = None, *, key: str = KEY) -> list[Frame]:
        """A whole event stream, up to its end."""
        async with self.stream(path, body, key=key) as frames:
            return await frames.rest()

    async def read(self, public_id: str, after: str | None = None) -> list[Frame]:
        """A stored interaction's stream, after an event."""
        query = "" if after is None else f"&last_event_id={after}"
        return await self.frames(f"interactions/{public_id}?stream=true{query}")

    async def streamed(self, given: Any = "Hello", **fields: Any) -> list[Frame]:
        """A whole interaction, created with `stream`."""
        return await self.frames(
            "interactions", {"model": MODEL, "input": given, "stream": True, **fields}
        )


class Frames:
    """Reads server-sent events from a response."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def next(self) -> Frame | None:
        """The next event; None at the end of the stream. Signs of life are skipped."""
        fields: dict[str, str] = {}
        while True:
            line = (await self._response.content.readuntil(b"\n")).decode()
            if not line:
                raise ConnectionError("the stream was cut off before its end")
            if line.startswith(":"):
                continue
            if line == "\n":
                if not fields:
                    continue
                if fields["data"] == "[DONE]":
                    return None
                return Frame(fields["event"], fields.get("id"), orjson.loads(fields["data"]))
            name, _, value = line.rstrip("\n").partition(": ")
            fields[name] = value

    async def until(self, done: Callable[[Frame], bool]) -> list[Frame]:
        """Events up to the first that is wanted, it included."""
        seen: list[Frame] = []
        while True:
            frame = await self.next()
            assert frame is not None, seen
            seen.append(frame)
            if done(frame):
                return seen

    async def rest(self) -> list[Frame]:
        """Every event that is left."""
        seen: list[Frame] = []
        while (frame := await self.next()) is not None:
            seen.append(frame)
        return seen


@asynccontextmanager
async def opened(
    url: str, fake: FakeUpstream | None, *, role: str = "all", pool: int = 10, **tree: Any
) -> AsyncGenerator[Server]:
    """A server on its own pool of connections, as another process would be."""
    chosen = settings(fake, **tree)
    database = Database(url, pool_size=pool)
    patch = pytest.MonkeyPatch()
    # Each stands for a process on a machine of its own: by its process id it would be taken for
    # the one that the test opened before it.
    patch.setattr(runner, "machine", lambda: uuid4().hex)
    try:
        await keys.ensure(database, KEY, name="test")
        async with open_process(chosen, database, role=role) as process:
            keyring = keys.Keyring(database)
            async with keyring.watching(), serving(create_app(chosen, process, keyring)) as base:
                timeout = aiohttp.ClientTimeout(total=30)
                async with aiohttp.ClientSession(base, timeout=timeout, read_bufsize=2**22) as http:
                    yield Server(process, database, http, chosen)
    finally:
        patch.undo()
        await database.close()


@asynccontextmanager
async def serving(app: Any, port: int = 0) -> AsyncGenerator[str]:
    """Serve an ASGI application on a free loopback port, or on this one; gives its base URL."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    # Not `serve`: it would take pytest's signal handlers.
    task = asyncio.get_running_loop().create_task(server._serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def uuid_of(public_id: str) -> UUID:
    found = ids.parse_interaction_id(public_id)
    assert found is not None
    return found


def texts(frames: Sequence[Frame]) -> str:
    """All streamed text of the answer, joined."""
    return "".join(
        frame.data["delta"].get("text", "")
        for frame in frames
        if frame.kind == "step.delta" and frame.data["delta"]["type"] == "text"
    )


def answer(interaction: Json) -> str:
    """The text of the last answer, as the SDK's `output_text` reads it."""
    found = ""
    for step in reversed(interaction["steps"]):
        if step["type"] != "model_output":
            break
        found = "".join(b["text"] for b in step["content"] if b["type"] == "text") + found
    return found


async def rows(database: Database, table: str, where: str = "true", *values: object) -> int:
    async with database.hot() as connection:
        return await connection.fetchval(f"select count(*) from {table} where {where}", *values)


async def eventually(
    check: Callable[[], Any], *, within_s: float = 5.0, every_s: float = 0.02
) -> Any:
    """Wait until an async check gives something true."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while not (found := await check()):
                await asyncio.sleep(every_s)
            return found
    pytest_message = f"not within {within_s} s: {check}"
    raise AssertionError(pytest_message)
