"""Connections through the proxy: real clients, real servers."""

import asyncio
import contextlib
import hashlib
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from openinteractions.sandbox.egress.policy import Reach
from openinteractions.sandbox.egress.state import Limits
from tests.sandbox.egress import rig as rigs
from tests.sandbox.egress.rig import GIT, Rig, allow
from tests.sandbox.egress.test_hello import said

GET = b"GET /p?q HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
ONCE = b"GET /p?q HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n\r\n"
OPENED = allow(transform={"X-Added": "by-the-proxy"})
SIZE = 100 << 20


async def reply(request: web.Request) -> web.StreamResponse:
    if request.path == "/ws":
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str("echo " + message.data)
        return socket
    if request.path == "/down":
        response = web.StreamResponse()
        if "chunked" in request.query:
            response.enable_chunked_encoding()
        else:
            response.content_length = SIZE
        await response.prepare(request)
        for _ in range(SIZE >> 18):
            await response.write(bytes(1 << 18))
        return response
    if request.path == "/up":
        seen, digest = 0, hashlib.sha256()
        async for chunk in request.content.iter_any():
            seen += len(chunk)
            digest.update(chunk)
        return web.json_response({"bytes": seen, "sha": digest.hexdigest()})
    if request.path == "/empty":
        return web.Response(status=204)
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "path": request.path_qs,
            "headers": dict(request.headers),
            "body": body.decode(),
            "secure": request.secure,
        }
    )


@pytest.fixture
async def site(rig: Rig) -> AsyncGenerator[Rig]:
    async with rigs.site(rig, reply):
        yield rig


@pytest.fixture
async def client(rig: Rig) -> AsyncGenerator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(ssl=rig.client_ssl())
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


def through(rig: Rig) -> str:
    return f"http://127.0.0.1:{rig.ports['proxy']}"


async def get(rig: Rig, client: aiohttp.ClientSession, url: str, **more):
    async with client.request(more.pop("method", "GET"), url, proxy=through(rig), **more) as answer:
        return await answer.json()


async def test_a_plain_request(site: Rig, client):
    site.rules(allow())
    got = await get(site, client, "http://api.example.com/a/b?c=d", headers={"X-Mine": "1"})
    assert got["path"] == "/a/b?c=d"
    assert got["headers"]["Host"] == "api.example.com"
    assert got["headers"]["X-Mine"] == "1"
    (entry,) = await site.settled()
    assert (entry.environment_id, entry.host, entry.port, entry.kind) == (
        "env", "api.example.com", 80, "http",
    )  # fmt: skip
    assert (entry.method, entry.path, entry.status) == ("GET", "/a/b", 200)
    assert (entry.decision, entry.rule, entry.reason) == ("allowed", "api.example.com", None)
    assert entry.bytes_up > 50
    assert entry.bytes_down > 100


async def test_a_tunnel_is_not_looked_into(site: Rig, client):
    site.rules(allow())
    got = await get(site, client, "https://api.example.com/a")
    assert got["secure"]
    assert "X-Added" not in got["headers"]
    await client.close()
    (entry,) = await site.settled()
    assert (entry.kind, entry.method, entry.path, entry.host) == (
        "tunnel", "CONNECT", None, "api.example.com",
    )  # fmt: skip
    assert entry.bytes_down > 500


async def test_in_a_tunnel_the_certificate_is_the_hosts(site: Rig):
    site.rules(allow())
    for network, issuer in ((allow(), site.hosts), (OPENED, site.authority)):
        site.rules(network)
        _, writer = await site.tls()
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        context = ssl.create_default_context(cadata=issuer.pem.decode())
        writer.close()
        assert shown
        assert context.get_ca_certs()[0]["subject"]
        assert writer.get_extra_info("peercert")["issuer"] == context.get_ca_certs()[0]["subject"]


async def test_opened_tls(site: Rig, client):
    site.rules(OPENED)
    for number in range(3):
        got = await get(
            site, client, f"https://api.example.com/{number}", method="POST", data=b"x" * number,
            headers={"x-added": "mine"},
        )  # fmt: skip
        assert got["secure"]
        assert got["headers"]["X-Added"] == "by-the-proxy"
        assert "x-added" not in got["headers"]
        assert got["body"] == "x" * number
    entries = await site.settled(3)
    assert [entry.path for entry in entries] == ["/0", "/1", "/2"]
    assert {entry.kind for entry in entries} == {"https"}


@pytest.mark.parametrize("network", [allow(), OPENED], ids=["tunnel", "opened"])
async def test_tools_that_know_of_no_proxy(site: Rig, network):
    site.rules(network)
    got = await site.say_tls(ONCE)
    assert got.startswith(b"HTTP/1.1 200")
    assert (b"by-the-proxy" in got) == (network is OPENED)
    assert (await site.settled())[0].host == "api.example.com"


async def test_plain_http_without_a_proxy(site: Rig):
    site.rules(allow())
    got = await site.say("http", ONCE)
    assert got.startswith(b"HTTP/1.1 200")
    assert b'"path": "/p?q"' in got


async def test_several_hosts_on_one_proxy_connection(site: Rig):
    site.rules({"allowlist": [{"domain": "a.com"}, {"domain": "b.com"}]})
    ask = b"GET http://%b.com/ HTTP/1.1\r\nHost: %b.com\r\n\r\n"
    # The third is refused, so the fourth is never served.
    got = await site.say("proxy", b"".join(ask % (h, h) for h in (b"a", b"b", b"evil", b"a")))
    assert got.count(b"HTTP/1.1 200") == 2
    assert got.count(b"HTTP/1.1 403") == 1
    assert [entry.host for entry in await site.settled(3)] == ["a.com", "b.com", "evil.com"]


async def test_a_kept_connection_is_used_again(rig: Rig):
    opened = 0

    async def serve(reader, writer):
        nonlocal opened
        opened += 1
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    rig.rules(OPENED)
    async with rigs.script(rig, serve):
        got = await rig.say_tls(GET * 4 + ONCE)
    assert got.count(b"200 OK") == 5
    assert opened == 1
    assert rig.lookups == ["api.example.com"]


async def test_a_kept_connection_that_the_host_closes_is_opened_again(rig: Rig):
    opened = 0

    async def serve(reader, writer):
        nonlocal opened
        opened += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        if opened == 1:
            # It has taken the next request when it closes: only then is that in doubt.
            await reader.readuntil(b"\r\n\r\n")

    rig.rules(OPENED)
    async with rigs.script(rig, serve):
        got = await rig.say_tls(GET + ONCE)
        assert got.count(b"200 OK") == 2
        opened = 0
        post = b"POST / HTTP/1.1\r\nHost: api.example.com\r\nContent-Length: 0\r\n\r\n"
        got = await rig.say_tls(GET + post)
        # What may have been done is not done again: the client sees the connection close.
        assert got.count(b"HTTP/1.1") == 1
        assert opened == 1


async def test_refusals_say_why(site: Rig, client):
    site.rules(allow("good.com"))
    async with client.get("http://evil.com/", proxy=through(site)) as answer:
        text = await answer.text()
    assert answer.status == 403
    assert text.startswith("egress blocked: evil.com is not on this environment's allowlist")
    assert "good.com" in text
    assert "network.allowlist" in text
    # Programs show the first line of the answer to a CONNECT at most.
    got = await site.say("proxy", b"CONNECT evil.com:443 HTTP/1.1\r\nHost: evil.com\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 403 egress blocked: evil.com is not on this environment's")
    assert b"network.allowlist" in got
    # git does not, and neither do browsers; nor has who ignores proxies one: it is inside TLS.
    got = await site.say_through("evil.com:443", GET)
    assert got.startswith(b"HTTP/1.1 403")
    assert b"egress blocked: evil.com is not on this environment's allowlist" in got
    got = await site.say_tls(GET, "evil.com")
    assert got.startswith(b"HTTP/1.1 403")
    assert b"egress blocked: evil.com" in got
    # Plain http through a CONNECT gets it plainly.
    asked = f"CONNECT evil.com:443 HTTP/1.1\r\n{GIT}\r\n".encode()
    got = await site.say("proxy", asked + GET)
    assert b"\r\n\r\nHTTP/1.1 403" in got
    assert b"egress blocked: evil.com" in got
    entries = await site.settled(5)
    assert {(entry.decision, entry.status, entry.host) for entry in entries} == {
        ("refused", 403, "evil.com")
    }
    assert site.lookups == []


async def test_disabled(site: Rig):
    site.rules("disabled")
    assert b"no network access" in await site.say("http", ONCE)
    assert b"no network access" in await site.say_tls(ONCE)


async def test_the_ceiling_holds(site: Rig):
    site.rules(None, ceiling=Reach("allowlist", ["other.com"]))
    assert b"sandbox.ceiling" in await site.say("http", ONCE)


@pytest.mark.parametrize("port", [22, 25, 8080, 5432])
async def test_other_ports_are_refused(site: Rig, port: int):
    got = await site.say_through(f"api.example.com:{port}", GET)
    assert b"403" in got
    assert b"sandbox.ports" in got


async def test_plain_http_through_connect(site: Rig):
    site.rules(allow())
    head = b"CONNECT api.example.com:80 HTTP/1.1\r\nHost: api.example.com:80\r\n\r\n"
    got = await site.say("proxy", head + ONCE)
    assert b"200 Connection established\r\n\r\nHTTP/1.1 200 OK" in got
    assert b"Host differs" in await site.say(
        "proxy", head + ONCE.replace(b"api.example.com", b"evil.com")
    )


async def test_something_else_after_connect_goes_nowhere(rig: Rig):
    async def serve(reader, writer):
        got.append(await reader.read(100))

    async with rigs.script(rig, serve) as got:
        answer = await rig.say(
            "proxy", b"CONNECT api.example.com:443 HTTP/1.1\r\n\r\nSSH-2.0-OpenSSH\r\n\r\n"
        )
    assert b"400" in answer.split(b"\r\n\r\n")[1]
    assert got in ([], [b""])


async def test_names_that_do_not_resolve_are_the_hosts_fault(rig: Rig):
    got = await rig.say("http", ONCE.replace(b"api.example.com", b"no.invalid"))
    assert got.startswith(b"HTTP/1.1 502")
    assert b"could not be resolved" in got
    (entry,) = await rig.settled()
    assert entry.decision == "allowed"
    assert "could not be resolved" in (entry.reason or "")


async def test_a_connect_to_a_host_that_cannot_be_reached_says_why(rig: Rig):
    rig.rules(allow("*.invalid"))
    got = await rig.say_through("no.invalid:443", GET)
    assert got.startswith(b"HTTP/1.1 502")
    assert b"no.invalid could not be resolved" in got


@pytest.mark.parametrize("data", [b"", b"SSH-2.0-OpenSSH\r\n"])
async def test_a_refused_connect_waits_for_nobody(impatient: Rig, data: bytes):
    impatient.rules(allow())
    async with asyncio.timeout(15):
        asked = f"CONNECT evil.com:443 HTTP/1.1\r\n{GIT}\r\n".encode()
        got = await impatient.say("proxy", asked + data)
    assert (b"403" in got) == bool(data)
    assert (await impatient.settled())[0].status == 403


async def test_a_bad_certificate_is_refused(site: Rig):
    """The server has one for api.example.com."""
    site.rules(allow("other.com", transform={"X": "y"}))
    got = await site.say_tls(ONCE.replace(b"api.", b"").replace(b"example", b"other"), "other.com")
    assert got.startswith(b"HTTP/1.1 502")
    assert b"certificate of other.com is not good" in got


async def test_a_client_that_does_not_trust_us_is_noted(site: Rig):
    site.rules(OPENED)
    strict = ssl.create_default_context(cadata=site.hosts.pem.decode())
    with pytest.raises(ssl.SSLError):
        await asyncio.open_connection(
            "127.0.0.1", site.ports["https"], ssl=strict, server_hostname="api.example.com"
        )
    (entry,) = await site.settled()
    assert "does not accept opened TLS" in (entry.reason or "")


async def test_websockets(site: Rig, client):
    for network in (allow(), OPENED):
        site.rules(network)
        for scheme in ("ws", "wss"):
            if network is OPENED and scheme == "ws":
                continue
            url = f"{scheme}://api.example.com/ws"
            async with client.ws_connect(url, proxy=through(site)) as socket:
                for word in ("a", "b" * 100_000):
                    await socket.send_str(word)
                    assert await socket.receive_str() == "echo " + word
    assert any(entry.status == 101 for entry in await site.settled(2))


@pytest.mark.parametrize("network", [allow(), OPENED], ids=["tunnel", "opened"])
async def test_new_rules_end_what_they_would_not_allow(site: Rig, client, network):
    site.rules(network)
    async with client.ws_connect("wss://api.example.com/ws", proxy=through(site)) as socket:
        await socket.send_str("a")
        assert await socket.receive_str() == "echo a"
        site.rules(network)
        await socket.send_str("b")
        assert await socket.receive_str() == "echo b"
        site.rules(allow("other.com"))
        async with asyncio.timeout(15):
            assert (await socket.receive()).type in {
                aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.ERROR,
            }  # fmt: skip


async def test_new_rules_hold_for_the_next_request(site: Rig):
    site.rules(OPENED)
    reader, writer = await site.tls()
    writer.write(GET)
    assert b"200" in await reader.readline()
    site.rules(allow("other.com", transform={"X": "y"}))
    writer.write(GET)
    assert b"not on this environment's allowlist" in await reader.read(-1)
    writer.close()


@pytest.mark.parametrize("network", [allow(), OPENED], ids=["tunnel", "opened"])
@pytest.mark.parametrize("query", ["", "?chunked"])
async def test_a_hundred_megabytes_down(site: Rig, client, network, query: str):
    site.rules(network)
    seen = 0
    url = "https://api.example.com/down" + query
    async with client.get(url, proxy=through(site)) as answer:
        async for chunk in answer.content.iter_any():
            seen += len(chunk)
    assert seen == SIZE


@pytest.mark.parametrize("network", [allow(), OPENED], ids=["tunnel", "opened"])
@pytest.mark.parametrize("has_length", [True, False])
async def test_a_hundred_megabytes_up(site: Rig, client, network, has_length: bool):
    site.rules(network)
    piece = bytes(range(256)) * 1024

    async def pieces():
        for _ in range(SIZE // len(piece)):
            yield piece

    headers = {"Content-Length": str(SIZE)} if has_length else {}
    got = await get(
        site, client, "https://api.example.com/up", method="POST", data=pieces(), headers=headers
    )
    assert got["bytes"] == SIZE
    assert got["sha"] == hashlib.sha256(piece * (SIZE // len(piece))).hexdigest()


async def test_a_slow_reader_holds_the_host(rig: Rig):
    """Nothing piles up here."""
    sent = 0

    async def serve(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16

    rig.rules(OPENED)
    async with rigs.script(rig, serve):
        _, writer = await rig.tls()
        writer.write(GET)
        before = -1
        async with asyncio.timeout(20):
            while sent != before or sent == 0:
                before = sent
                await asyncio.sleep(0.5)
        assert sent < 32 << 20
        writer.transport.abort()


async def test_expect_continue_and_early_answers(rig: Rig):
    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/no" in head:
            writer.write(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n")
            return
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nX: y\r\n\r\n")
        body = await reader.readexactly(4)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + body)

    head = (
        b"POST %b HTTP/1.1\r\nHost: api.example.com\r\nContent-Length: 4\r\n"
        b"Expect: 100-continue\r\n\r\n"
    )
    rig.rules(OPENED)
    async with rigs.script(rig, serve):
        reader, writer = await rig.tls()
        writer.write(head % b"/yes")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert b"103 Hints" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"body")
        got = await reader.readuntil(b"body")
        assert b"200 OK" in got
        writer.close()
        got = await rig.say_tls(head % b"/no")
        assert got.startswith(b"HTTP/1.1 417")
        assert b"Connection: close" in got


async def test_answers_without_content(rig: Rig):
    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        while head:
            status = {b"/204": b"204 No", b"/304": b"304 No"}.get(head.split(b" ")[1], b"200 OK")
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: 5\r\n\r\n" % status)
            if status == b"200 OK" and not head.startswith(b"HEAD"):
                writer.write(b"hello")
            head = await reader.readuntil(b"\r\n\r\n")

    ask = b"%b HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
    rig.rules(OPENED)
    async with rigs.script(rig, serve):
        asks = [ask % each for each in (b"HEAD /", b"GET /204", b"GET /304", b"GET /")]
        reader, writer = await rig.tls()
        writer.write(b"".join(asks))
        heads = [await reader.readuntil(b"\r\n\r\n") for _ in asks]
        assert await reader.readexactly(5) == b"hello"
        writer.close()
    assert [b"Content-Length: 5" in head for head in heads] == [True, False, True, True]


async def test_old_clients_get_no_chunks(rig: Rig):
    async def serve(reader, writer):
        assert b"HTTP/1.1" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\nX-T: 1\r\n\r\n")

    async with rigs.script(rig, serve):
        got = await rig.say("http", b"GET / HTTP/1.0\r\nHost: api.example.com\r\n\r\n")
        assert got.endswith(b"\r\n\r\nabcde")
        assert b"Transfer-Encoding" not in got
        got = await rig.say("http", ONCE)
        assert got.endswith(b"3\r\nabc\r\n2\r\nde\r\n0\r\nX-T: 1\r\n\r\n")


async def test_half_closed_tunnels_go_on(rig: Rig):
    rig.rules(allow())

    async def serve(reader, writer):
        got.append(await reader.read(-1))
        writer.write(b"late answer")

    # TLS is not needed to see this: a hello, and then anything.
    async with rigs.script(rig, serve) as got:
        rig.dialler.at = {443: rig.dialler.at[80]}
        reader, writer = await rig.open("https")
        writer.write(said("api.example.com") + b"and more")
        writer.write_eof()
        assert await reader.read(-1) == b"late answer"
        writer.close()
    assert got[0].endswith(b"and more")


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncGenerator[Rig]:
    limits = Limits(
        connections=3, connect_s=1.0, handshake_s=1.0, head_s=1.0, keepalive_s=1.0, idle_s=2.0
    )
    async with rigs.rig(tmp_path, limits=limits) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("http", b""), ("http", b"GET / HT"), ("proxy", b""), ("proxy", b"CONNECT "),
        ("https", b""), ("https", b"\x16\x03\x01"),
        ("proxy", b"CONNECT a.com:443 HTTP/1.1\r\n\r\n"),
    ],
)  # fmt: skip
async def test_dawdlers_are_let_go(impatient: Rig, kind, data: bytes):
    async def serve(reader, writer):
        await reader.read(-1)

    async with rigs.script(impatient, serve):
        async with asyncio.timeout(15):
            await impatient.say(kind, data)


async def test_a_dripping_head_is_let_go(impatient: Rig):
    reader, writer = await impatient.open("http")
    async with asyncio.timeout(15):
        for byte in b"GET / HTTP/1.1\r\nX: " + b"a" * 1000:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)
            if reader.at_eof() or reader.exception():
                break
        else:
            raise AssertionError
    writer.close()


@pytest.mark.parametrize("network", [allow(), OPENED], ids=["tunnel", "opened"])
async def test_silent_hosts_are_let_go(impatient: Rig, network):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(10)

    impatient.rules(network)
    async with rigs.script(impatient, serve):
        async with asyncio.timeout(15):
            if network is OPENED:
                assert b"504" in await impatient.say_tls(GET)
            else:
                with contextlib.suppress(ConnectionError):
                    assert await impatient.say_tls(GET) == b""


async def test_a_host_that_does_not_answer_tls(impatient: Rig):
    async def serve(reader, writer):
        await asyncio.sleep(10)

    impatient.rules(OPENED)
    async with rigs.script(impatient, serve):
        impatient.dialler.at = {443: impatient.dialler.at[80]}
        got = await impatient.say_tls(GET)
    assert b"502" in got
    assert b"did not answer within" in got


async def test_connections_are_counted(tmp_path: Path):
    async with rigs.rig(tmp_path, limits=Limits(connections=3)) as made:
        await count_connections(made)


async def count_connections(impatient: Rig) -> None:
    held = [await impatient.open("http") for _ in range(3)]
    await rigs.until(lambda: impatient.egress.connections == 3)
    assert b"3 connections open" in await impatient.say("http", b"")
    for _, writer in held:
        writer.close()
    await rigs.until(lambda: not impatient.egress.connections)
    assert b"3 connections open" not in await impatient.say("http", b"x\r\n\r\n")


async def test_h2_is_agreed_on_in_tunnels_only(site: Rig):
    site.rules(OPENED)
    _, writer = await site.tls(alpn=["h2", "http/1.1"])
    assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
    writer.close()
