"""MCP servers: looked at when an interaction is created, called while it runs."""

import asyncio
import base64
import dataclasses
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any
from uuid import uuid4

import httpx2
import orjson
import pytest
from tests.fakes import mcp as fakes
from tests.fakes.mcp import Door, FakeMcp
from tests.fakes.oauth import FakeOAuth

from openinteractions.crypto import Sealer
from openinteractions.db.engine import Database
from openinteractions.errors import Invalid
from openinteractions.netguard import Fetcher, Guard
from openinteractions.resources.credentials.service import Vault
from openinteractions.runs import mcp_client
from openinteractions.runs.mcp import MAX_TOOLS, McpServers
from openinteractions.runs.mcp_result import MAX_CHARS
from openinteractions.sandbox.egress.policy import Reach
from openinteractions.tools.port import McpServer
from openinteractions.wire.credentials import parse_create, parse_update

LOOPBACK = ip_network("127.0.0.0/8")
PROJECT = uuid4()
HEADERS = {"Authorization": "Bearer the-door-secret"}


class NoVault:
    """Where nobody asks for a credential."""

    async def injection(self, project_id: Any, credential_id: str) -> Any:
        raise AssertionError(credential_id)


@pytest.fixture
async def fetcher() -> AsyncGenerator[Fetcher]:
    made = Fetcher(Guard([LOOPBACK]), max_bytes=1000)
    yield made
    await made.close()


@pytest.fixture
def way(fetcher: Fetcher) -> McpServers:
    return McpServers(fetcher, NoVault(), ceiling=Reach())


both = pytest.mark.parametrize("fake", ["new", "old"], indirect=True)
"""Servers without sessions, and those of before, with them."""


@pytest.fixture
async def fake(request: pytest.FixtureRequest) -> AsyncGenerator[FakeMcp]:
    made = FakeMcp(Door(is_old=getattr(request, "param", "new") == "old"))
    over = asyncio.Event()

    async def serve() -> None:
        async with made.serve():
            started.set()
            await over.wait()

    # Its cancel scopes want to be left by the task that entered them; pytest has two.
    started = asyncio.Event()
    task = asyncio.ensure_future(serve())
    await started.wait()
    yield made
    over.set()
    await task


def tool(fake: FakeMcp, **more: Any) -> dict[str, Any]:
    return {"type": "mcp_server", "name": "docs", "url": fake.url, **more}


async def prepared(way: McpServers, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    entries, secrets = await way.prepared(PROJECT, [{"type": "url_context"}, given])
    assert list(entries) == [1]
    return entries[1], secrets


@asynccontextmanager
async def calling(way: McpServers, given: dict[str, Any]) -> AsyncGenerator[McpServer]:
    """The server as a run has it, without having looked at it first."""
    entry, secret = {**given, "tools": []}, {}
    for name in ("headers", "credential"):
        if name in entry:
            secret[name] = entry.pop(name)
    secrets = {"mcp": {"docs": secret}}
    async with way.servers(PROJECT, [{"type": "url_context"}, entry], secrets) as servers:
        yield servers["docs"]


async def refusal(way: McpServers, given: dict[str, Any]) -> str:
    with pytest.raises(Invalid) as caught:
        await way.prepared(PROJECT, [{"type": "url_context"}, given])
    assert caught.value.status == 400
    assert "'tools[1]" in caught.value.message
    return caught.value.message


# ---- create


async def test_the_tools_are_listed_with_their_hints(way, fake):
    entry, secrets = await prepared(way, tool(fake))
    assert secrets is None
    assert {key: entry[key] for key in ("type", "name", "url")} == tool(fake)
    found = {one["name"]: one for one in entry["tools"]}
    assert found["add"]["description"] == "Add two numbers."
    assert found["add"]["parameters"]["required"] == ["a", "b"]
    assert found["add"].keys() == {"name", "description", "parameters"}
    assert found["look"]["is_pure"] is True
    assert found["set.it"]["is_repeatable"] is True
    assert "is_pure" not in found["set.it"]


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (["look", "add"], ["add", "look"]),
        ([{"mode": "auto", "tools": ["add"]}], ["add"]),
        ([{"tools": ["add"]}, {"mode": "validated", "tools": ["fail"]}], ["add", "fail"]),
        (["add", {"tools": ["look"]}], ["add", "look"]),
        (["add", "look", {"mode": "none", "tools": ["look"]}], ["add"]),
        ([{"mode": "none"}], []),
    ],
)
async def test_allowed_tools_choose(way, fake, allowed, names):
    entry, _ = await prepared(way, tool(fake, allowed_tools=allowed))
    assert [one["name"] for one in entry["tools"]] == names


async def test_excluded_tools_leave_the_others(way, fake):
    entry, _ = await prepared(way, tool(fake, allowed_tools=[{"mode": "none", "tools": ["add"]}]))
    names = [one["name"] for one in entry["tools"]]
    assert "look" in names
    assert "add" not in names


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (["nope"], "Unknown tool 'nope' at 'tools[1].allowed_tools[0]'"),
        (["add", {"tools": ["look", "nope"]}], "'nope' at 'tools[1].allowed_tools[1]'"),
        ([], "at least one"),
        ([{"mode": "any", "tools": ["add"]}], "tool_choice"),
    ],
)
async def test_allowed_tools_that_make_no_sense_are_refused(way, fake, allowed, words):
    assert words in await refusal(way, tool(fake, allowed_tools=allowed))


async def test_too_many_tools_have_to_be_chosen_from(way):
    fake = FakeMcp(more=MAX_TOOLS)
    async with fake.serve():
        assert "allowed_tools" in await refusal(way, tool(fake))
        entry, _ = await prepared(way, tool(fake, allowed_tools=["add"]))
        assert len(entry["tools"]) == 1


@pytest.mark.parametrize("how", [{}, {"json_response": True}, {"stateless_http": True}])
@pytest.mark.parametrize("is_old", [True, False])
async def test_every_kind_of_answer_is_understood(way, how, is_old):
    fake = FakeMcp(Door(is_old=is_old))
    async with fake.serve(**how):
        await prepared(way, tool(fake))
        async with calling(way, tool(fake)) as server:
            assert await server.call("add", {"a": 1, "b": 2}, timeout_s=5) == ("3", False)


async def test_what_is_no_mcp_server_is_named_with_the_cause(way, fake):
    for _ in range(9):
        fake.door.answers.append((200, {"content-type": "text/html"}, b"<html>"))
    assert "text/html" in await refusal(way, tool(fake))
    fake.door.answers.clear()
    other = tool(fake) | {"url": fake.url.replace("/mcp", "/elsewhere")}
    assert "404" in await refusal(way, other)
    gone = tool(fake) | {"url": "http://127.0.0.1:9/mcp"}
    assert "127.0.0.1:9/mcp': the host cannot be reached" in await refusal(way, gone)


async def test_a_server_that_never_answers_is_given_up(way, monkeypatch):
    monkeypatch.setattr(mcp_client, "CONNECT_S", 0.3)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            pass
        writer.close()

    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    given = {"type": "mcp_server", "name": "docs", "url": f"http://127.0.0.1:{port}/mcp"}
    try:
        assert "no answer within 0.3 seconds" in await refusal(way, given)
    finally:
        listener.close()


async def test_two_servers_of_one_name_are_refused(way, fake):
    with pytest.raises(Invalid, match=r"Duplicate MCP server name 'docs' at 'tools\[1\]'"):
        await way.prepared(PROJECT, [tool(fake), tool(fake)])


# ---- secrets


async def test_headers_open_the_door_and_stay_out_of_the_entry(way, fake):
    fake.door.needs = {"authorization": HEADERS["Authorization"]}
    message = await refusal(way, tool(fake))
    assert "401 (Unauthorized)" in message
    entry, secrets = await prepared(way, tool(fake, headers=HEADERS))
    assert "secret" not in orjson.dumps(entry).decode()
    assert secrets == {"mcp": {"docs": {"headers": HEADERS}}}
    async with way.servers(PROJECT, [entry], secrets) as servers:
        assert await servers["docs"].call("look", {}, timeout_s=5) == ("seen", False)
    async with way.servers(PROJECT, [entry], None) as servers:
        with pytest.raises(Invalid, match="401"):
            await servers["docs"].call("look", {}, timeout_s=5)


async def test_secrets_in_the_url_stay_out_of_the_entry_too(way, fake):
    url = fake.url.replace("://", "://me:pass-word@") + "?key=query-secret"
    entry, secrets = await prepared(way, tool(fake) | {"url": url})
    assert entry["url"] == fake.url
    pair = base64.b64encode(b"me:pass-word").decode()
    assert secrets["mcp"]["docs"] == {
        "headers": {"Authorization": f"Basic {pair}"},
        "url": f"{fake.url}?key=query-secret",
    }
    assert {one["query"] for one in fake.door.seen} == {"key=query-secret"}
    assert {one["authorization"] for one in fake.door.seen} == {f"Basic {pair}"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "elsewhere"}, {"Content-Length": "3"}, {"Transfer-Encoding": "chunked"},
        {"A": "x\r\nB: y"}, {"A\r\nB": "x"}, {"Mcp-Session-Id": "mine"}, {"": "x"},
        {"A": "x" * 40_000},
    ],
)  # fmt: skip
async def test_headers_that_belong_to_the_connection_are_refused(way, fake, headers):
    message = await refusal(way, tool(fake, headers=headers))
    assert "tools[1].headers" in message
    assert fake.door.seen == []


async def test_what_a_server_was_shown_does_not_come_back(way, fake):
    given = tool(fake, headers=HEADERS)
    async with calling(way, given) as server:
        text, _ = await server.call("headers", {}, timeout_s=5)
        assert "authorization=[redacted]" in text
        assert "the-door-secret" not in text
        fake.door.needs = {"authorization": "other"}
        with pytest.raises(Invalid) as caught:
            await server.call("headers", {}, timeout_s=5)
        assert "the-door-secret" not in caught.value.message


@dataclasses.dataclass
class Stored:
    """Stored credentials of a project."""

    database: Database
    vault: Vault
    project: Any

    async def add(self, body: Mapping[str, Any]) -> None:
        name, content = parse_create(orjson.dumps(body), max_depth=20)
        await self.vault.create(self.project, name, content)


@pytest.fixture
async def stored(database: Database, fetcher: Fetcher) -> AsyncGenerator[Stored]:
    vault = Vault(database, Sealer(b"k" * 32), fetcher)
    project = uuid4()
    async with database.hot() as connection:
        await connection.execute("insert into projects (id, name) values ($1, 'p')", project)
    yield Stored(database, vault, project)
    await vault.close()


async def test_a_credential_becomes_its_header_and_is_read_anew(stored, fetcher, fake):
    way = McpServers(fetcher, stored.vault, ceiling=Reach())
    body = {"type": "bearer_token", "id": "c1", "token": "first-token", "header_name": "X-Key"}
    await stored.add({**body, "prefix": ""})
    fake.door.needs = {"x-key": "first-token"}
    entries, secrets = await way.prepared(stored.project, [tool(fake, credential="c1")])
    assert secrets == {"mcp": {"docs": {"credential": "c1"}}}
    assert "c1" not in orjson.dumps(entries[0]).decode()
    async with way.servers(stored.project, [entries[0]], secrets) as servers:
        assert await servers["docs"].call("look", {}, timeout_s=5) == ("seen", False)
        change = {"type": "bearer_token", "token": "second-token"}
        content = parse_update(orjson.dumps(change), update_mask=None, max_depth=20)
        await stored.vault.update(stored.project, "c1", content)
        fake.door.needs = {"x-key": "second-token"}
        assert await servers["docs"].call("look", {}, timeout_s=5) == ("seen", False)
        await stored.vault.delete(stored.project, "c1")
        with pytest.raises(Invalid, match="Credential 'c1' not found"):
            await servers["docs"].call("look", {}, timeout_s=5)
    message = None
    with pytest.raises(Invalid) as caught:
        await way.prepared(stored.project, [tool(fake, credential="c1")])
    message = caught.value.message
    assert message.startswith("Invalid value at 'tools[0].credential'")


async def test_an_oauth_grant_is_refreshed_for_a_call(stored, fetcher, fake):
    endpoint = FakeOAuth(lasts=1)
    async with endpoint.serve():
        await stored.add(endpoint.body(id="o1"))
        way = McpServers(fetcher, stored.vault, ceiling=Reach())
        await asyncio.sleep(1)
        entries, secrets = await way.prepared(stored.project, [tool(fake, credential="o1")])
        assert entries[0]["tools"]
        assert secrets == {"mcp": {"docs": {"credential": "o1"}}}
    tokens = {one["authorization"] for one in fake.door.seen}
    assert "Bearer access-SECRET-1" not in tokens
    assert all(token.startswith("Bearer access-SECRET-") for token in tokens)


async def test_an_environment_variables_credential_is_refused(stored, fetcher, fake):
    way = McpServers(fetcher, stored.vault, ceiling=Reach())
    body = {
        "type": "environment_variable",
        "id": "v1",
        "value": "v",
        "injection_location": "header",
    }
    await stored.add({**body, "trusted_domains": ["127.0.0.1"]})
    with pytest.raises(Invalid, match=r"tools\[0\]\.credential.*bearer_token or oauth2"):
        await way.prepared(stored.project, [tool(fake, credential="v1")])
    assert fake.door.seen == []


async def test_a_credential_goes_over_https_only(stored, fetcher):
    way = McpServers(fetcher, stored.vault, ceiling=Reach())
    await stored.add({"type": "bearer_token", "id": "c1", "token": "first-token"})
    given = {"type": "mcp_server", "name": "docs", "url": "http://example.com/mcp"}
    with pytest.raises(Invalid, match="over https only"):
        await way.prepared(stored.project, [{**given, "credential": "c1"}])


async def test_another_projects_credential_does_not_exist(stored, fetcher, fake):
    await stored.add({"type": "bearer_token", "id": "c1", "token": "first-token"})
    way = McpServers(fetcher, stored.vault, ceiling=Reach())
    with pytest.raises(Invalid, match="not found"):
        await way.prepared(uuid4(), [tool(fake, credential="c1")])


# ---- calls


@both
async def test_one_session_serves_a_run_and_is_ended_with_it(way, fake):
    async with calling(way, tool(fake)) as server:
        assert fake.door.seen == []
        assert await server.call("add", {"a": 1, "b": 2}, timeout_s=5) == ("3", False)
        assert await server.call("add", {"a": 3, "b": 4}, timeout_s=5) == ("7", False)
        assert fake.calls == [("add", 1, 2), ("add", 3, 4)]
    methods = [one["method"] for one in fake.door.seen]
    assert methods.count("GET") == 0
    assert methods.count("DELETE") == (1 if fake.door.is_old else 0)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "mcp-session"]


@both
async def test_calls_may_run_beside_each_other(way, fake):
    async with calling(way, tool(fake)) as server:
        calls = (server.call("add", {"a": n, "b": 1}, timeout_s=5) for n in range(10))
        assert await asyncio.gather(*calls) == [(str(n + 1), False) for n in range(10)]


@both
async def test_results_are_text_content_or_objects(way, fake):
    async with calling(way, tool(fake)) as server:
        result, is_error = await server.call("picture", {}, timeout_s=5)
        assert not is_error
        data = base64.b64encode(fakes.PNG).decode()
        assert result == [
            {"type": "text", "text": "a dot"},
            {"type": "image", "mime_type": "image/png", "data": data},
        ]
        result, _ = await server.call("table", {}, timeout_s=5)
        assert orjson.loads(result) == {"rows": 2}


@both
async def test_a_tools_own_error_is_a_result(way, fake):
    async with calling(way, tool(fake)) as server:
        text, is_error = await server.call("fail", {}, timeout_s=5)
        assert is_error
        assert "no such luck" in text


@both
async def test_an_unknown_tool_is_an_error(way, fake):
    async with calling(way, tool(fake)) as server:
        try:
            text, is_error = await server.call("nope", {}, timeout_s=5)
        except Invalid as error:
            text, is_error = error.message, True
        assert is_error
        assert "nope" in text
        assert await server.call("look", {}, timeout_s=5) == ("seen", False)


@both
async def test_a_long_result_is_cut_and_says_so(way, fake):
    async with calling(way, tool(fake)) as server:
        text, _ = await server.call("big", {"size": MAX_CHARS + 5}, timeout_s=10)
        assert text.startswith("x" * MAX_CHARS + "\n[5 more characters")


@both
async def test_a_result_beyond_all_bounds_ends_its_call_only(way, fake, monkeypatch):
    monkeypatch.setattr(mcp_client, "_MAX_ANSWER_BYTES", 300_000)
    for how in ({}, {"json_response": True}):
        other = FakeMcp()
        async with other.serve(**how), calling(way, tool(other)) as server:
            assert await server.call("look", {}, timeout_s=5) == ("seen", False)
            with pytest.raises(Invalid, match=r"larger than 300000 bytes|Connection|SSE"):
                await server.call("big", {"size": 400_000}, timeout_s=10)
            assert await server.call("look", {}, timeout_s=5) == ("seen", False)


@both
async def test_a_slow_tool_is_given_up_and_told(way, fake):
    async with calling(way, tool(fake)) as server:
        with pytest.raises(Invalid, match=r"within 0\.5 seconds.*may have taken effect"):
            await server.call("slow", {"seconds": 60}, timeout_s=0.5)
        async with asyncio.timeout(5):
            await fake.cancelled.wait()
        assert await server.call("look", {}, timeout_s=5) == ("seen", False)


@both
async def test_who_is_cancelled_cancels_the_tool(way, fake):
    async with calling(way, tool(fake)) as server:
        task = asyncio.ensure_future(server.call("slow", {"seconds": 60}, timeout_s=60))
        await fake.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await fake.cancelled.wait()
        assert await server.call("look", {}, timeout_s=5) == ("seen", False)


@pytest.mark.parametrize("is_old", [True, False])
async def test_a_server_that_was_started_anew_is_reached_again(way, is_old):
    fake = FakeMcp(Door(is_old=is_old))
    async with fake.serve():
        given = tool(fake)
        port = int(fake.url.split(":")[2].partition("/")[0])
        stack = calling(way, given)
        server = await stack.__aenter__()
        assert await server.call("add", {"a": 1, "b": 2}, timeout_s=5) == ("3", False)
    with pytest.raises(Invalid, match="cannot be used") as caught:
        await server.call("add", {"a": 5, "b": 5}, timeout_s=5)
    assert "may have" not in caught.value.message
    async with fake.serve(port):
        assert await server.call("add", {"a": 3, "b": 4}, timeout_s=5) == ("7", False)
        await stack.__aexit__(None, None, None)
    assert fake.calls == [("add", 1, 2), ("add", 3, 4)]


@pytest.mark.parametrize("fake", ["old"], indirect=True)
async def test_a_lost_session_is_opened_anew_once(way, fake):
    async with calling(way, tool(fake)) as server:
        assert await server.call("look", {}, timeout_s=5) == ("seen", False)
        before = len(fake.door.seen)
        fake.door.answers.append((404, {}, b""))
        assert await server.call("look", {}, timeout_s=5) == ("seen", False)
        assert len(fake.door.seen) > before + 2
        fake.calls.clear()
        fake.door.forgets = True
        before = len(fake.door.seen)
        with pytest.raises(Invalid, match="404"):
            await server.call("look", {}, timeout_s=5)
        assert len(fake.door.seen) - before < 8
        assert fake.calls == []


@pytest.mark.parametrize("is_old", [True, False])
async def test_a_server_that_dies_during_a_call_leaves_it_unknown(way, is_old):
    fake = FakeMcp(Door(is_old=is_old))
    async with fake.serve():
        stack = calling(way, tool(fake))
        server = await stack.__aenter__()
        task = asyncio.ensure_future(server.call("slow", {"seconds": 60}, timeout_s=20))
        await fake.started.wait()
    with pytest.raises(Invalid, match="may have taken effect"):
        await task
    await stack.__aexit__(None, None, None)


@both
async def test_an_answer_of_500_is_not_taken_for_nothing(way, fake):
    async with calling(way, tool(fake)) as server:
        await server.call("look", {}, timeout_s=5)
        fake.door.answers.append((500, {}, b""))
        with pytest.raises(Invalid, match=r"500 \(Internal Server Error\).*may have taken effect"):
            await server.call("add", {"a": 1, "b": 1}, timeout_s=5)


# ---- where it goes


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/mcp", "http://127.0.0.1:1/mcp", "http://localhost/mcp",
        "http://[::ffff:169.254.169.254]/mcp", "http://2852039166/mcp",
    ],
)  # fmt: skip
async def test_private_addresses_are_refused(url):
    closed = Fetcher(Guard(), max_bytes=1000)
    try:
        given = {"type": "mcp_server", "name": "docs", "url": url}
        message = await refusal(McpServers(closed, NoVault(), ceiling=Reach()), given)
        assert "not public" in message or "no valid URL" in message
        assert "may have" not in message
    finally:
        await closed.close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_elsewhere_are_not_followed(way, fake, status):
    other = FakeMcp()
    async with other.serve():
        for target in ("http://169.254.169.254/mcp", other.url.replace("127.0.0.1", "127.0.0.2")):
            fake.door.answers = [(status, {"location": target}, b"")] * 9
            await refusal(way, tool(fake, headers=HEADERS))
        assert other.door.seen == []
    async with calling(way, tool(fake, headers=HEADERS)) as server:
        fake.door.answers = []
        await server.call("look", {}, timeout_s=5)
        fake.door.answers = [(status, {"location": "http://169.254.169.254/"}, b"")]
        with pytest.raises(Invalid):
            await server.call("look", {}, timeout_s=5)


async def test_a_redirect_on_the_same_host_is_followed(way, fake):
    fake.door.answers = [(307, {"location": fake.url}, b"")]
    await prepared(way, tool(fake, headers=HEADERS))
    assert {one["authorization"] for one in fake.door.seen} == {HEADERS["Authorization"]}


async def test_proxies_of_the_environment_are_not_used(way, fake, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    await prepared(way, tool(fake))


async def test_the_way_out_leads_to_the_servers_own_host_only(fetcher, fake):
    access = mcp_client.Access(url=fake.url, headers=HEADERS)
    way_out = mcp_client._Guarded(access, fetcher, mcp_client._Secrets(access))
    port = fake.url.split(":")[2].partition("/")[0]
    for url in (
        fake.url.replace("127.0.0.1", "127.0.0.2"),
        fake.url.replace("127.0.0.1", "localhost"),
        fake.url.replace(port, "9"),
        fake.url.replace("http", "https", 1),
    ):
        answer = await way_out.handle_async_request(httpx2.Request("POST", url, content=b"{}"))
        assert b"another place" in await answer.aread()
    assert fake.door.seen == []
