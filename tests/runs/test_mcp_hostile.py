"""MCP servers that mean harm, or break off in bad moments: what they cost, and what they learn."""

import asyncio
import gzip
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any
from uuid import uuid4

import orjson
import pytest
from aiohttp import web
from mcp import types
from tests import house
from tests.runs.test_mcp import NoVault

from openinteractions.errors import Invalid, Unready
from openinteractions.netguard import Fetcher, Guard
from openinteractions.runs import mcp
from openinteractions.runs.mcp import MAX_SERVERS, MAX_TOOLS, McpServers
from openinteractions.sandbox.egress.policy import Reach

PROJECT = uuid4()
SESSION = {"Mcp-Session-Id": "s1"}
STREAM = {"Content-Type": "text/event-stream"}
GREETING = {
    "protocolVersion": "2025-11-25",
    "capabilities": {"tools": {}},
    "serverInfo": {"name": "raw", "version": "1"},
}


@dataclass
class Raw:
    """A server that speaks the protocol of 2025 by hand, and says what it is told to."""

    tools: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    pages: int = 1
    """The same tools on each, under other names."""
    gzips: bool = False
    delay_s: float = 0.0
    on_call: Any = None
    """Answers a call instead of a JSON response with `said`."""
    said: str = "done"
    """Of a call; where it has `ECHO` stands the query."""
    on_list: Any = None
    door: Any = None
    """Answers everything."""
    url: str = ""
    calls: list[Any] = field(default_factory=list[Any])
    seen: list[Any] = field(default_factory=list[Any])
    """Method of HTTP, and of the message."""
    encodings: set[str | None] = field(default_factory=set[str | None])
    sent: int = 0
    listing: int = 0
    most: int = 0
    """Lists being made at once."""

    async def post(self, request: web.Request) -> web.StreamResponse:
        if self.door is not None:
            return await self.door(request)
        body = await request.json()
        method = body.get("method")
        self.seen.append(("POST", method))
        self.encodings.add(request.headers.get("Accept-Encoding"))
        match method:
            case "initialize":
                answered = web.json_response(answer(body, GREETING), headers=SESSION)
            case "tools/list" if self.on_list is not None:
                answered = await self.on_list(request, body)
            case "tools/list":
                answered = await self._list(body)
            case "tools/call":
                answered = await self._call(request, body)
            case "notifications/initialized":
                answered = web.Response(status=202)
            case _:
                answered = web.json_response(error(body, -32601))
        return answered

    async def get(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(("GET", request.headers.get("Last-Event-ID")))
        return web.Response(status=404)

    async def _call(self, request: web.Request, body: Any) -> web.StreamResponse:
        self.calls.append(body["params"]["arguments"])
        if self.on_call is not None:
            return await self.on_call(request, body)
        text = self.said.replace("ECHO", request.query_string)
        return web.json_response(answer(body, {"content": [{"type": "text", "text": text}]}))

    async def _list(self, body: Any) -> web.StreamResponse:
        self.listing += 1
        self.most = max(self.most, self.listing)
        await asyncio.sleep(self.delay_s)
        self.listing -= 1
        page = int((body.get("params") or {}).get("cursor") or 0)
        tools = [{**tool, "name": f"{tool['name']}{page or ''}"} for tool in self.tools]
        result: dict[str, Any] = {"tools": tools}
        if page + 1 < self.pages:
            result["nextCursor"] = str(page + 1)
        data = orjson.dumps(answer(body, result))
        headers = {"Content-Type": "application/json"}
        if self.gzips:
            data, headers["Content-Encoding"] = gzip.compress(data), "gzip"
        self.sent += len(data)
        return web.Response(body=data, headers=headers)

    def given(self, **more: Any) -> dict[str, Any]:
        return {"type": "mcp_server", "name": "docs", "url": self.url, **more}


def answer(body: Any, result: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": body["id"], "result": result}


def error(body: Any, code: int, message: str = "no") -> dict[str, Any]:
    about = {"code": code, "message": message}
    return {"jsonrpc": "2.0", "id": body["id"], "error": about}


def tool(name: str, schema: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "inputSchema": schema or {"type": "object"}, **more}


@pytest.fixture
async def raw() -> AsyncGenerator[Raw]:
    made = Raw()
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/mcp", made.post)
    app.router.add_get("/mcp", made.get)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    yield made
    await runner.cleanup()


@pytest.fixture
async def fetcher() -> AsyncGenerator[Fetcher]:
    made = Fetcher(Guard([ip_network("127.0.0.0/8")]), max_bytes=1000)
    yield made
    await made.close()


@pytest.fixture
def way(fetcher: Fetcher) -> McpServers:
    return McpServers(fetcher, NoVault(), ceiling=Reach())


async def listed(way: McpServers, given: dict[str, Any]) -> list[dict[str, Any]]:
    entries, _ = await way.prepared(PROJECT, [given])
    return entries[0]["tools"]


async def refusal(way: McpServers, *given: dict[str, Any]) -> str:
    with pytest.raises(Invalid) as caught:
        await way.prepared(PROJECT, given)
    return caught.value.message


async def called(way: McpServers, given: dict[str, Any], timeout_s: float = 10) -> Any:
    entries, secrets = await way.prepared(PROJECT, [given])
    async with way.servers(PROJECT, [entries[0]], secrets) as servers:
        return await servers["docs"].call("pay", {"amount": 1}, timeout_s=timeout_s)


# ---- what a list may cost


def costly(name: str, count: int) -> dict[str, Any]:
    """A tool for whose schema the meta-schema has to be asked."""
    inner = {"type": "object", "multipleOf": 1, "properties": {"a": {"type": "string"}}}
    return tool(
        name, {"type": "object", "properties": {f"{name}_{n}": inner for n in range(count)}}
    )


async def test_schemas_are_checked_beside_the_loop_and_not_for_long(way, raw, monkeypatch):
    monkeypatch.setattr(mcp, "_CHECK_S", 0.3)
    check, threads = mcp.require_schema, set[int]()

    def checked(*given: Any, **more: Any) -> None:
        threads.add(threading.get_ident())
        check(*given, **more)

    monkeypatch.setattr(mcp, "require_schema", checked)
    raw.tools = [costly(f"t{n}", 22) for n in range(MAX_TOOLS)]
    found = await listed(way, raw.given())
    assert [one["name"] for one in found] == [one["name"] for one in raw.tools]
    assert found[0]["parameters"] == raw.tools[0]["inputSchema"]
    assert found[-1]["parameters"] == {"type": "object"}
    assert threads
    assert threading.get_ident() not in threads


async def test_what_common_schemas_ask_of_a_tool_is_kept(way, raw):
    inner = {"type": "object", "properties": {"a": {"type": "string", "description": "x"}}}
    schema = {"type": "object", "properties": {f"p{n}": inner for n in range(20)}}
    raw.tools = [tool(f"t{n}", schema) for n in range(MAX_TOOLS)]
    found = await listed(way, raw.given())
    assert [one["parameters"] for one in found] == [schema] * MAX_TOOLS


async def test_one_schema_may_cost_little(way, raw):
    raw.tools = [costly("t0", 1_500), costly("t1", 3)]
    found = await listed(way, raw.given())
    assert found[0]["parameters"] == {"type": "object"}
    assert found[1]["parameters"] == raw.tools[1]["inputSchema"]


@pytest.mark.parametrize("count", [MAX_TOOLS + 1, 100])
async def test_a_list_is_measured_before_it_is_looked_at(way, raw, monkeypatch, count):
    def checked(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(mcp, "require_schema", checked)
    monkeypatch.setattr(mcp, "enforced", checked)
    raw.tools = [tool(f"t{n}", description="x" * 3000) for n in range(count)]
    assert "choose some with 'allowed_tools'" in await refusal(way, raw.given())


async def test_all_pages_have_one_budget(way, raw):
    raw.tools = [tool("t", description="x" * 300_000)]
    raw.pages = 10**6
    assert "its answer is larger than 2097152 bytes" in await refusal(way, raw.given())
    assert raw.sent < 3 * 2**20


async def test_only_some_hundred_tools_are_listed(way, raw):
    raw.tools = [tool(f"t{n}") for n in range(200)]
    raw.pages = 10**6
    assert "more than 500 tools" in await refusal(way, raw.given())
    assert raw.seen.count(("POST", "tools/list")) == 3


async def test_nothing_is_decompressed(way, raw):
    raw.tools = [tool("t")]
    await listed(way, raw.given(headers={"Accept-Encoding": "gzip"}))
    assert raw.encodings == {"identity"}
    raw.gzips = True
    assert "compressed" in await refusal(way, raw.given())


async def test_a_request_names_only_so_many_servers(way, raw):
    many = [raw.given(name=f"s{n}") for n in range(MAX_SERVERS + 1)]
    assert f"more than {MAX_SERVERS} MCP servers" in await refusal(way, *many)
    assert raw.seen == []


async def test_a_project_looks_at_some_servers_at_once(way, raw, monkeypatch):
    monkeypatch.setattr(mcp, "_LOOKS_OF_PROJECT", 2)
    raw.tools, raw.delay_s = [tool("t")], 0.1
    many = [raw.given(name=f"s{n}") for n in range(6)]
    await way.prepared(PROJECT, many)
    assert raw.most == 2
    monkeypatch.setattr(mcp, "_WAIT_S", 0.05)
    with pytest.raises(Unready, match="try again"):
        await way.prepared(PROJECT, many)


async def test_all_projects_look_at_some_servers_at_once(fetcher, raw, monkeypatch):
    monkeypatch.setattr(mcp, "_LOOKS", 2)
    way = McpServers(fetcher, NoVault(), ceiling=Reach())
    raw.tools, raw.delay_s = [tool("t")], 0.1
    await asyncio.gather(*(way.prepared(uuid4(), [raw.given()]) for _ in range(6)))
    assert raw.most == 2


# ---- a call is made once


async def test_a_call_whose_answer_cannot_be_resumed_is_not_made_again(way, raw):
    async def breaks(request: web.Request, _body: Any) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        await response.prepare(request)
        await response.write(b"id: 1\nretry: 10\ndata: \n\n")
        return response

    raw.on_call = breaks
    with pytest.raises(Invalid, match=r"404.*may have taken effect"):
        await called(way, raw.given())
    assert ("GET", "1") in raw.seen
    assert raw.calls == [{"amount": 1}]


@pytest.mark.parametrize(("status", "count"), [(200, 2), (400, 1)])
async def test_only_a_refused_call_itself_is_made_again(way, raw, status, count):
    async def wants_headers(_request: web.Request, body: Any) -> web.StreamResponse:
        async def forgets(_request: web.Request, _body: Any) -> web.StreamResponse:
            return web.Response(status=404)

        # Of a success it is not believed that it was none; nor does a list tell of the call.
        raw.on_call, raw.on_list = forgets, None if status == 200 else forgets
        return web.json_response(error(body, types.HEADER_MISMATCH), status=status)

    raw.on_call = wants_headers
    with pytest.raises(Invalid, match="404"):
        await called(way, raw.given())
    assert len(raw.calls) == count
    assert raw.seen.count(("POST", "initialize")) == 2


async def test_a_call_that_finds_no_session_is_made_again(way, raw):
    async def forgets(_request: web.Request, _body: Any) -> web.StreamResponse:
        raw.on_call = None
        return web.Response(status=404)

    raw.on_call = forgets
    assert await called(way, raw.given()) == ("done", False)
    assert len(raw.calls) == 2


@pytest.mark.parametrize(
    ("code", "is_sure"), [(-32603, False), (-32600, False), (-32602, True), (-32601, True)]
)
async def test_an_error_says_whether_the_call_may_have_acted(way, raw, code, is_sure):
    async def fails(_request: web.Request, body: Any) -> web.StreamResponse:
        return web.json_response(error(body, code))

    raw.on_call = fails
    with pytest.raises(Invalid, match="refused: no") as caught:
        await called(way, raw.given())
    assert ("may have taken effect" in caught.value.message) is not is_sure


@pytest.mark.parametrize("code", [-32000, -32001, -32050])
async def test_a_servers_own_error_is_told_whatever_its_code(way, raw, code):
    async def fails(_request: web.Request, body: Any) -> web.StreamResponse:
        return web.json_response(error(body, code, "The till is locked."))

    raw.on_call = fails
    with pytest.raises(Invalid, match=r"refused: The till is locked\. The call may have taken"):
        await called(way, raw.given())


async def test_a_stream_that_ends_without_an_answer_has_broken_off(way, raw):
    async def ends(_request: web.Request, _body: Any) -> web.StreamResponse:
        return web.Response(body=b"", headers=STREAM)

    raw.on_call = ends
    with pytest.raises(Invalid, match=r"broke off without an answer\. The call may have taken"):
        await called(way, raw.given())


# ---- where nothing was called


@pytest.mark.parametrize("status", [200, 500, 503])
async def test_a_list_that_cannot_be_had_has_no_effect(way, raw, status):
    async def fails(_request: web.Request, body: Any) -> web.StreamResponse:
        return web.json_response(error(body, -32603, "no list today"), status=status)

    raw.on_list = fails
    message = await refusal(way, raw.given())
    assert "no list today" in message
    assert "may have" not in message


async def test_a_session_that_is_not_opened_has_no_effect(way, raw):
    entries, _ = await way.prepared(PROJECT, [raw.given()])

    async def fails(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    raw.door = fails
    async with way.servers(PROJECT, [entries[0]], None) as servers:
        with pytest.raises(Invalid, match="503") as caught:
            await servers["docs"].call("pay", {}, timeout_s=5)
    assert "may have" not in caught.value.message


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_what_is_no_message_is_said_in_words(way, raw, kind):
    async def talks(_request: web.Request, _body: Any) -> web.StreamResponse:
        return web.Response(text='data: {"hello": "world"}\n\n', content_type=kind)

    raw.on_list = talks
    message = await refusal(way, raw.given())
    assert message.endswith("The MCP server's answer makes no sense: it is no JSON-RPC message.")


# ---- what it is shown


SECRETS = "api_key=QUERY-%41BC%2F123&v=2&Bare+Token+123&short=abc"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("at ECHO.", "at [redacted]."),
        ("QUERY-%41BC%2F123", "[redacted]"),
        ("QUERY-ABC/123", "[redacted]"),
        ("QUERY-ABC%2F123", "[redacted]"),
        ("Bare Token 123", "[redacted]"),
        ("pass%word", "[redacted]"),
        ("an abc of v=2 and api_key", "an abc of v=2 and api_key"),
    ],
)
async def test_what_stands_in_the_url_does_not_come_back(way, raw, said, expected):
    url = raw.url.replace("://", "://me:pass%25word@") + f"?{SECRETS}"
    raw.tools = [tool("pay", description=said.replace("ECHO", SECRETS))]
    raw.said = said
    assert await called(way, raw.given(url=url)) == (expected, False)
    [found] = await listed(way, raw.given(url=url))
    assert found["description"] == expected

    async def fails(_request: web.Request, body: Any) -> web.StreamResponse:
        about = {"code": -32603, "message": raw.tools[0]["description"]}
        return web.json_response({"jsonrpc": "2.0", "id": body["id"], "error": about})

    raw.on_call = fails
    with pytest.raises(Invalid) as caught:
        await called(way, raw.given(url=url))
    assert f"refused: {expected}" in caught.value.message


async def test_a_message_is_cut_where_nothing_is_left_of_a_secret(way, raw):
    secret = "tok-0123456789abcdefghijklmno"

    async def fails(_request: web.Request, body: Any) -> web.StreamResponse:
        return web.json_response(error(body, -32050, "x" * 473 + secret))

    raw.on_call = fails
    with pytest.raises(Invalid) as caught:
        await called(way, raw.given(headers={"X-Token": secret}))
    assert "x[redacted]" in caught.value.message
    assert "tok-" not in caught.value.message


@pytest.mark.parametrize("value", ["t\N{LATIN SMALL LETTER E WITH ACUTE}", "a\nb"])
async def test_a_header_that_cannot_be_sent_is_the_requests_fault(way, raw, value):
    message = await refusal(way, raw.given(headers={"X-Token": value}))
    assert message.startswith("Invalid value at 'tools[0].headers.X-Token'")
    assert raw.seen == []


async def test_a_schema_does_not_repeat_them_either(way, raw):
    raw.tools = [tool("pay", {"type": "object", "description": "with QUERY-ABC/123"})]
    [found] = await listed(way, raw.given(url=f"{raw.url}?{SECRETS}"))
    assert found["parameters"]["description"] == "with [redacted]"


@pytest.mark.parametrize("query", ["a=" + "x" * 9000, "&".join(["a=b"] * 65)])
async def test_a_query_beyond_reason_is_refused(way, raw, query):
    assert "tools[0].url" in await refusal(way, raw.given(url=f"{raw.url}?{query}"))
    headers = {f"x-{n}": "x" for n in range(65)}
    assert "64 headers" in await refusal(way, raw.given(headers=headers))


# ---- where it may go


@pytest.mark.parametrize(
    ("ceiling", "is_fine"),
    [
        (Reach("allowlist", ["127.0.0.1"]), True),
        (Reach("open"), True),
        (Reach("allowlist", ["mcp.example.com"]), False),
        (Reach("disabled"), False),
    ],
    ids=["listed", "open", "others", "disabled"],
)
async def test_the_operators_ceiling_holds(fetcher, raw, ceiling, is_fine):
    raw.tools = [tool("pay")]
    before = McpServers(fetcher, NoVault(), ceiling=Reach())
    entries, _ = await before.prepared(PROJECT, [raw.given()])
    raw.seen.clear()
    way = McpServers(fetcher, NoVault(), ceiling=ceiling)
    if is_fine:
        assert await called(way, raw.given()) == ("done", False)
        return
    message = await refusal(way, raw.given())
    assert message.startswith("Invalid value at 'tools[0]' ('docs')")
    assert "127.0.0.1 is not among the hosts" in message
    assert "sandbox.ceiling" in message
    # The operator may have lowered it since.
    async with way.servers(PROJECT, [entries[0]], None) as servers:
        with pytest.raises(Invalid, match=r"sandbox\.ceiling") as caught:
            await servers["docs"].call("pay", {}, timeout_s=5)
    assert "may have" not in caught.value.message
    assert raw.seen == []


async def test_a_server_knows_its_operators_ceiling(database_url: str, raw: Raw):
    raw.tools = [tool("pay")]
    async with (
        house.upstream() as upstream,
        house.opened(
            database_url,
            upstream,
            network={"allow": ["127.0.0.0/8"]},
            sandbox={"ceiling": {"mode": "allowlist", "domains": ["mcp.example.com"]}},
        ) as server,
    ):
        body = {"model": house.MODEL, "input": "x", "tools": [raw.given()]}
        status, answered = await server.call("POST", "interactions", body)
    assert status == 400
    assert "sandbox.ceiling" in answered["error"]["message"]


# ---- names


async def test_tools_that_a_model_cannot_tell_apart_are_refused(way, raw):
    name = mcp.mcp_function("a__b", "pay")
    raw.tools = [tool("pay"), tool(name.removeprefix("a__"))]
    first, second = raw.given(name="a__b"), raw.given(name="a")
    message = await refusal(way, first, second)
    assert "Invalid value at 'tools[1]'" in message
    assert f"both '{name}'" in message
    found, _ = await way.prepared(PROJECT, [first, {**second, "allowed_tools": ["pay"]}])
    assert len(found) == 2
