"""The brokers' client against a broker that does as it is told: errors, retries, resumption."""

import asyncio
import contextlib
import json
import tempfile
from dataclasses import dataclass, field
from uuid import UUID

import pytest
from aiohttp import web

from openinteractions import errors
from openinteractions.sandbox import link, messages
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.pipe import Omitted
from openinteractions.sandbox.port import (
    Command,
    Displaced,
    Exit,
    NotBegun,
    Output,
    Owner,
    SandboxError,
)

ENV = UUID("0123456789abcdef0123456789abcdef")
COMMAND = Command(id="run.1", epoch=3, argv=["true"])
EXIT = messages.event("exit", **messages.exit_fields(Exit(outcome="exited", code=0)))


@dataclass
class Broker:
    """Answers with what the test has laid down, and remembers the requests."""

    path: str
    answers: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    runner: web.AppRunner | None = None

    @property
    def address(self):
        return f"unix://{self.path}"

    async def start(self):
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self.handle)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.UnixSite(self.runner, self.path).start()

    async def stop(self):
        await self.runner.cleanup()

    async def handle(self, request):
        body = await request.read()
        self.requests.append((request.method, request.raw_path, body, request.headers))
        answer = self.answers.pop(0)
        return await answer(request) if callable(answer) else answer


def refusal(status, code, message, **headers):
    body = json.dumps({"error": {"code": code, "message": message}})
    return web.Response(status=status, text=body, headers=headers)


def frames(*parts, is_cut=False):
    async def answer(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        if is_cut:
            await asyncio.sleep(0.05)
            request.transport.abort()
        return response

    return answer


def out(data, stream=1):
    return messages.frame(stream, data)


@pytest.fixture
async def broker():
    with tempfile.TemporaryDirectory(prefix="oi-client-", dir="/tmp") as folder:
        made = Broker(f"{folder}/b.sock")
        await made.start()
        yield made
        with contextlib.suppress(Exception):
            await made.stop()


@pytest.fixture
async def client():
    made = BrokerClient(lambda: "token", patience_s=3, restart_s=5)
    yield made
    await made.close()


async def collected(client, broker, command=COMMAND, offset=0):
    async with client.execute(broker.address, ENV, command, offset=offset) as pieces:
        return [piece async for piece in pieces]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request", errors.Invalid),
        (404, "not_found", errors.NotFound),
        (409, "aborted", errors.Conflict),
        (409, "displaced", Displaced),
        (413, "request_too_large", errors.TooLarge),
        (429, "too_many_requests", errors.TooMany),
        (503, "unavailable", errors.Unready),
        (503, "not_begun", NotBegun),
        (500, "internal", SandboxError),
        (500, "sandbox_error", SandboxError),
    ],
)
async def test_refusals_are_the_errors_that_they_were(broker, client, status, code, kind):
    broker.answers = [refusal(status, code, "Because.", **{"Retry-After": "7"})]
    with pytest.raises(kind, match=r"Because\.") as caught:
        await client.stop(broker.address, ENV)
    assert caught.type is kind
    if isinstance(caught.value, errors.RequestError):
        assert caught.value.retry_after_s == 7


async def test_an_answer_that_is_no_json_is_the_brokers_failure(broker, client):
    broker.answers = [web.Response(status=502, text="<html>")]
    with pytest.raises(SandboxError, match="502"):
        await client.stop(broker.address, ENV)


async def test_the_token_travels_and_paths_are_quoted(broker, client):
    entry = {
        "path": "workspace/a b#?.txt",
        "type": "file",
        "size_bytes": 3,
        "mime_type": "text/plain",
        "created": 1.0,
        "modified": 2.0,
        "later": "unknown fields are left out",
    }
    broker.answers = [web.json_response(entry)]
    found = await client.stat(broker.address, ENV, "/workspace/a b#?.txt")
    assert (found.path, found.size_bytes) == ("workspace/a b#?.txt", 3)
    ((method, path, _, headers),) = broker.requests
    assert method == "GET"
    assert path == f"/v1/environments/{ENV.hex}/files/workspace/a%20b%23%3F.txt?op=stat"
    assert headers["Authorization"] == "Bearer token"


async def test_a_broker_that_restarts_is_waited_for(broker, client):
    await broker.stop()
    waiting = asyncio.ensure_future(client.usage(broker.address, ENV))
    await asyncio.sleep(0.3)
    broker.answers = [web.json_response({"file_count": 2, "size_bytes": 5})]
    await broker.start()
    assert await waiting == (2, 5)


async def test_a_broker_that_stays_away_is_not_waited_for_for_ever(client):
    with pytest.raises(errors.Unready, match="does not answer"):
        await asyncio.wait_for(client.usage("unix:///tmp/oi-nobody.sock", ENV), 10)


async def test_a_write_that_broke_off_is_not_sent_again(broker, client):
    broker.answers = [frames(is_cut=True), web.json_response({"files": []})]
    with pytest.raises(errors.Unready):
        await client.write(broker.address, ENV, "workspace/a", b"x", overwrite=True)
    assert len(broker.requests) == 1


async def test_who_changes_a_file_for_a_run_says_as_which_owner(broker, client):
    where = (broker.address, ENV, "workspace/a")
    for owner in (None, Owner(UUID(int=1), 7)):
        broker.answers = [web.json_response({"files": []}), web.json_response({})]
        await client.write(*where, b"x", overwrite=True, owner=owner)
        await client.remove(*where, owner=owner)
    named = f"&interaction={UUID(int=1).hex}&epoch=7"
    assert [path.partition("?")[2] for _, path, *_ in broker.requests] == [
        "overwrite=true&extract=false",
        "recursive=false",
        "overwrite=true&extract=false" + named,
        "recursive=false" + named,
    ]


async def test_output_comes_in_order_with_its_end(broker, client):
    whole = messages.event("started") + out(b"a") + out(b"b", 2) + messages.event("ping") + EXIT
    # However it is cut.
    broker.answers = [frames(*(whole[at : at + 3] for at in range(0, len(whole), 3)))]
    pieces = await collected(client, broker)
    assert pieces[:-1] == [Output(1, b"a"), Output(2, b"b")]
    assert pieces[-1] == Exit(outcome="exited", code=0)
    method, path, body, _ = broker.requests[0]
    assert (method, path) == ("PUT", f"/v1/environments/{ENV.hex}/executions/run.1?offset=0")
    assert json.loads(body)["epoch"] == 3


async def test_what_broke_off_goes_on_at_its_byte_and_is_not_started_again(broker, client):
    broker.answers = [
        frames(messages.event("started"), out(b"12345"), is_cut=True),
        frames(messages.event("attached"), messages.event("omitted", bytes=10), is_cut=True),
        refusal(503, "unavailable", "The broker is about to stop."),
        frames(messages.event("attached"), out(b"end"), EXIT),
    ]
    pieces = await collected(client, broker)
    assert [piece for piece in pieces if not isinstance(piece, Exit | Omitted)] == [
        Output(1, b"12345"),
        Output(1, b"end"),
    ]
    assert [piece.byte_count for piece in pieces if isinstance(piece, Omitted)] == [10]
    seen = [(method, path.partition("?")[2]) for method, path, *_ in broker.requests]
    assert seen == [
        ("PUT", "offset=0"),
        ("GET", "offset=5"),
        ("GET", "offset=15"),
        ("GET", "offset=15"),
    ]


async def test_a_start_without_an_answer_is_asked_for_again(broker, client):
    broker.answers = [frames(is_cut=True), frames(messages.event("attached"), EXIT)]
    assert (await collected(client, broker))[-1].code == 0
    assert [method for method, *_ in broker.requests] == ["PUT", "PUT"]
    assert broker.requests[0][2] == broker.requests[1][2]


async def test_a_first_refusal_is_the_callers(broker, client):
    broker.answers = [refusal(503, "unavailable", "All busy.")]
    with pytest.raises(errors.Unready, match="All busy"):
        await collected(client, broker)
    assert len(broker.requests) == 1


async def test_a_restart_that_takes_too_long_is_given_up(broker):
    client = BrokerClient("token", patience_s=0.5, restart_s=0.5)
    broker.answers = [frames(messages.event("started"), is_cut=True)]
    pieces = asyncio.ensure_future(collected(client, broker))
    await asyncio.sleep(0.1)
    await broker.stop()
    with pytest.raises(errors.Unready):
        await asyncio.wait_for(pieces, 10)
    await client.close()


async def test_frames_that_are_none_end_it(broker, client):
    broker.answers = [frames(b"\x09\xff\xff\xff\xff")]
    with pytest.raises(SandboxError):
        await collected(client, broker)


async def test_a_file_is_read_as_it_comes(broker, client):
    headers = {"X-Size": "1000", "X-Mime-Type": "text/csv"}
    broker.answers = [web.Response(body=b"y" * 300_000, headers=headers)]
    async with client.read(broker.address, ENV, "workspace/a", offset=3, length=9) as file:
        assert (file.size, file.mime_type) == (1000, "text/csv")
        assert b"".join([chunk async for chunk in file]) == b"y" * 300_000
    assert broker.requests[0][1].endswith("files/workspace/a?op=read&offset=3&length=9")


async def test_a_callers_own_error_inside_a_read_stays_its_own(broker, client):
    broker.answers = [web.Response(body=b"y")]
    with pytest.raises(TimeoutError):
        async with client.read(broker.address, ENV, "workspace/a"):
            raise TimeoutError


async def test_an_upload_streams_its_body(broker, client):
    async def body():
        for _ in range(10):
            yield b"z" * 10_000

    broker.answers = [web.json_response({"size": 100_005})]
    assert await client.append_upload(broker.address, ENV, "u/1", 5, body()) == 100_005
    method, path, sent, _ = broker.requests[0]
    assert (method, path) == ("PUT", f"/v1/environments/{ENV.hex}/uploads/u%2F1?offset=5")
    assert sent == b"z" * 100_000


async def test_killing_what_is_not_there_is_fine(broker, client):
    broker.answers = [refusal(404, "not_found", "No such execution.") for _ in range(2)]
    await client.kill(broker.address, ENV, "run.1", epoch=4)
    assert json.loads(broker.requests[0][2]) == {"signal": 9, "epoch": 4}
    await client.drop_upload(broker.address, ENV, "u")


async def test_commands_survive_the_journey():
    command = Command(
        id="a.b",
        epoch=9,
        argv=["x", "ü"],
        cwd="/tmp",
        env={"A": "b"},
        has_stdin=True,
        pty=(24, 80),
        timeout_s=1.5,
        max_output_bytes=77,
        session="main",
    )
    assert messages.read_command("a.b", messages.command_body(command)) == command
    for broken in (None, [], {}, {"epoch": 1}, {"epoch": 1, "argv": []}, {"epoch": 1, "argv": "x"}):
        with pytest.raises(errors.Invalid):
            messages.read_command("a.b", broken)


async def pieces():
    yield b"x"


QUICK = [
    lambda client, to: client.stat(*to, "workspace/a"),
    lambda client, to: client.list(*to, "workspace"),
    lambda client, to: client.kill(*to, "run.1"),
    lambda client, to: client.usage(*to),
    lambda client, to: client.stop(*to),
    lambda client, to: client.delete(*to),
    lambda client, to: client.append_upload(*to, "u", 0, b"x"),
    lambda client, to: client.write(*to, "workspace/a", pieces(), overwrite=True),
]
SLOW = [
    lambda client, to: client.ensure(*to, source=ENV),
    lambda client, to: client.commit_upload(*to, "u", "workspace/a", overwrite=True),
    lambda client, to: client.write(*to, "workspace", pieces(), overwrite=True, extract=True),
]


@pytest.mark.parametrize(("calls", "bound"), [(QUICK, "_SILENCE_S"), (SLOW, "_SLOW_S")])
async def test_a_broker_that_hangs_does_not_answer(broker, monkeypatch, calls, bound):
    """What copies or unpacks may take long; whatever else says nothing is given up before."""

    async def hang(request):
        await asyncio.Event().wait()

    monkeypatch.setattr(link, bound, 0.2)
    broker.answers = [hang] * 2 * len(calls)
    client = BrokerClient("token", patience_s=0)
    async with asyncio.timeout(60):
        for call in calls:
            with pytest.raises(errors.Unready, match="does not answer"):
                await call(client, (broker.address, ENV))
    await client.close()
