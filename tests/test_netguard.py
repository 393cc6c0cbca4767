"""No spelling of a private address gets through, at the first try or behind a redirect."""
# ruff: noqa: RUF001 - confusable characters are the point

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from openinteractions import netguard
from openinteractions.errors import Invalid
from openinteractions.netguard import Fetcher, Guard, Refused, Unreachable, Unwelcome

PRIVATE = [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254",
    "172.16.0.1", "172.31.255.255", "192.0.2.1", "192.168.0.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::1", "100::1", "2001:db8::1", "2001::1",
    "2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "3fff::1",
]  # fmt: skip
PUBLIC = [
    "8.8.8.8", "1.1.1.1", "142.250.0.1", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1",
    "::ffff:8.8.8.8",
]  # fmt: skip
# Spellings of loopback that a URL may have; each must be refused, by whichever hand.
LOOPBACK = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1",
    "017700000001", "0", "0.0.0.0", "localhost", "LOCALHOST", "localhost.", "ip6-localhost",
    "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]",
    "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1%25lo]", "user:pass@127.0.0.1",
    "127。0。0。1", "127．0．0．1", "１２７.0.0.1", "①②⑦.0.0.1", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "127.0.0.1.",
    "%31%32%37.0.0.1", "example.com@127.0.0.1", "127.0.0.1%2f@127.0.0.1",
]  # fmt: skip


@dataclass
class Site:
    """A server on loopback that keeps what came."""

    port: int
    hits: list[str]


@pytest.fixture
async def site() -> AsyncGenerator[Site]:
    hits: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        hits.append(request.path_qs)
        if request.path == "/to":
            return web.Response(status=302, headers={"Location": request.query["u"]})
        if request.path == "/loop":
            return web.Response(status=307, headers={"Location": "/loop"})
        if request.path == "/big":
            return web.Response(body=b"x" * 5000)
        if request.path == "/no":
            return web.Response(status=404)
        return web.Response(body=b"secret", content_type="image/png")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    yield Site(listening._server.sockets[0].getsockname()[1], hits)
    await runner.cleanup()


@pytest.fixture
async def guarded() -> AsyncGenerator[Fetcher]:
    fetcher = Fetcher(Guard(), max_bytes=4000)
    yield fetcher
    await fetcher.close()


@pytest.fixture
async def allowed() -> AsyncGenerator[Fetcher]:
    """An operator lets users reach loopback over IPv4."""
    fetcher = Fetcher(Guard([ip_network("127.0.0.0/8")]), max_bytes=4000)
    yield fetcher
    await fetcher.close()


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_permitted(address: str):
    assert not Guard().permits(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_permitted(address: str):
    assert Guard().permits(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_in_every_disguise(address):
    number = int(address)
    plain = Guard().permits(str(address))
    assert Guard().permits(f"::ffff:{address}") == plain
    assert Guard().permits(f"64:ff9b::{address}") == plain
    assert Guard().permits(f"2002:{number >> 16:x}:{number & 0xFFFF:x}::") == plain


def test_allowed_ranges_are_exact():
    guard = Guard([ip_network("10.1.0.0/16"), ip_network("fd00::/8")])
    assert guard.permits("10.1.2.3")
    assert guard.permits("::ffff:10.1.2.3")
    assert guard.permits("fd12::1")
    assert not guard.permits("10.2.0.1")
    assert not guard.permits("fc00::1")
    assert not guard.permits("127.0.0.1")


@pytest.mark.parametrize("host", LOOPBACK)
async def test_loopback_is_refused_however_it_is_spelled(site: Site, guarded: Fetcher, host: str):
    with pytest.raises(Invalid):
        await guarded.fetch(f"http://{host}:{site.port}/x")
    assert site.hits == []


@pytest.mark.parametrize("host", LOOPBACK)
async def test_a_post_is_guarded_the_same(site: Site, guarded: Fetcher, host: str):
    with pytest.raises(Invalid):
        await guarded.post(f"http://{host}:{site.port}/x", b"{}", {})
    assert site.hits == []


@pytest.mark.parametrize("host", LOOPBACK)
async def test_a_form_is_guarded_the_same(site: Site, guarded: Fetcher, host: str):
    with pytest.raises(Invalid):
        await guarded.post_form(f"http://{host}:{site.port}/x", {}, {}, max_bytes=10)
    assert site.hits == []


@pytest.mark.parametrize("host", LOOPBACK)
async def test_any_request_is_guarded_the_same(site: Site, guarded: Fetcher, host: str):
    with pytest.raises(Invalid):
        await guarded.request("POST", f"http://{host}:{site.port}/x", b"{}", {}, silence_s=5)
    assert site.hits == []


async def test_any_request_follows_no_redirect_and_says_what_was_not_sent(
    site: Site, allowed: Fetcher
):
    base = f"http://127.0.0.1:{site.port}"
    answer = await allowed.request("PUT", f"{base}/to?u=/y", b"", {}, silence_s=5)
    assert (answer.status, answer.headers["Location"]) == (302, "/y")
    answer.close()
    assert site.hits == ["/to?u=/y"]
    with pytest.raises(Unreachable):
        await allowed.request("POST", "http://127.0.0.1:9/", b"", {}, silence_s=5)


async def test_a_caller_may_refuse_a_url_and_what_a_redirect_leads_to(site: Site, allowed: Fetcher):
    base = f"http://127.0.0.1:{site.port}"
    seen: list[str] = []

    def permits(url: str) -> None:
        seen.append(url)
        if url == f"{base}/x":
            raise Refused("not there")

    found = await allowed.fetch(f"{base}/to?u=/y", permits=permits, max_bytes=6)
    assert (found.data, found.url) == (b"secret", f"{base}/y")
    with pytest.raises(Refused, match="not there"):
        await allowed.fetch(f"{base}/to?u=/x", permits=permits)
    assert seen == [f"{base}/to?u=/y", f"{base}/y", f"{base}/to?u=/x", f"{base}/x"]
    assert site.hits == ["/to?u=/y", "/y", "/to?u=/x"]
    with pytest.raises(Invalid, match="larger than 5 bytes"):
        await allowed.fetch(f"{base}/y", max_bytes=5)
    with pytest.raises(Invalid, match="larger than 4000 bytes"):
        await allowed.fetch(f"{base}/big", max_bytes=10_000)


async def test_a_caller_may_let_an_answer_wait_for_room(site: Site, allowed: Fetcher):
    url = f"http://127.0.0.1:{site.port}/to?u=/big"
    sizes: list[int] = []
    room = asyncio.Event()

    async def grows(size: int) -> None:
        sizes.append(size)
        await room.wait()

    fetching = asyncio.ensure_future(allowed.fetch(url, max_bytes=10**6, grows=grows))
    with pytest.raises(Invalid, match="larger than 4000"):
        await fetching
    assert all(size <= 4000 for size in sizes)
    sizes.clear()
    fetching = asyncio.ensure_future(allowed.fetch(url.replace("big", "x"), grows=grows))
    done, _ = await asyncio.wait([fetching], timeout=0.2)
    assert (done, sizes) == (set(), [6])
    room.set()
    assert (await fetching).data == b"secret"


async def test_a_form_is_sent_once_and_its_answer_is_bounded(site: Site, allowed: Fetcher):
    base = f"http://127.0.0.1:{site.port}"
    got = await allowed.post_form(f"{base}/x", {"a": "b c"}, {}, max_bytes=6)
    assert got == (200, b"secret")
    got = await allowed.post_form(f"{base}/to?u=/x", {}, {}, max_bytes=100)
    assert got[0] == 302
    with pytest.raises(Invalid, match="larger than 5 bytes"):
        await allowed.post_form(f"{base}/x?hush", {}, {}, max_bytes=5)
    assert site.hits == ["/x", "/to?u=/x", "/x?hush"]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://8.8.8.8/x", "gopher://8.8.8.8", "//8.8.8.8/x", "x", "", "http://",
        "http:///x", "http://[::1", "data:text/plain,x", "http://8.8.8.8:99999/", "http://a b/",
        "http://\x00/", "http://" + "a" * 70_000,
    ],
)  # fmt: skip
async def test_other_schemes_and_nonsense_are_refused(guarded: Fetcher, url: str):
    with pytest.raises(Invalid):
        await guarded.fetch(url)


@pytest.mark.parametrize(
    "target", ["http://localhost:{port}/x", "http://[::1]:{port}/x", "http://10.0.0.1/x",
               "http://169.254.169.254/latest", "//[::ffff:10.0.0.1]/x", "file:///etc/passwd"],
)  # fmt: skip
async def test_a_redirect_to_a_private_place_is_refused(site: Site, allowed: Fetcher, target: str):
    """The first hop is allowed; the next is judged on its own."""
    elsewhere = target.format(port=site.port).replace("localhost", "0.0.0.0")
    with pytest.raises(Invalid):
        await allowed.fetch(f"http://127.0.0.1:{site.port}/to?u={elsewhere}")
    assert len(site.hits) == 1


async def test_allowed_places_can_be_fetched_through_redirects(site: Site, allowed: Fetcher):
    got = await allowed.fetch(f"http://127.0.0.1:{site.port}/to?u=/picture")
    assert (got.mime_type, got.data) == ("image/png", b"secret")
    assert got.url.endswith("/picture")
    assert got.base64() == "c2VjcmV0"


@pytest.mark.parametrize(("path", "why"), [
    ("/big", "larger than 4000"), ("/no", "answered 404"), ("/loop", "too many redirects"),
])  # fmt: skip
async def test_what_cannot_be_had_is_explained(site: Site, allowed: Fetcher, path: str, why: str):
    with pytest.raises(Invalid, match=why):
        await allowed.fetch(f"http://127.0.0.1:{site.port}{path}")
    assert len(site.hits) <= 6


@pytest.mark.parametrize(
    ("scheme", "sent", "why"),
    [
        ("http", None, "the host cannot be reached (Connection refused)"),
        ("http", b"", "the connection to the host broke"),
        ("http", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", "its answer broke off"),
        ("http", b"SSH-2.0\r\n\r\n", "the host's answer is not understood"),
        ("https", b"HTTP/1.1 400 no\r\n\r\n", "no secure connection to the host could be made"),
    ],
)
async def test_what_goes_wrong_on_the_way_is_told_in_words(
    allowed: Fetcher, scheme: str, sent: bytes | None, why: str
):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(sent or b"")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    if sent is None:
        server.close()
        await server.wait_closed()
    async with server:
        with pytest.raises(Invalid) as caught:
            await allowed.fetch(f"{scheme}://127.0.0.1:{port}/a")
    assert caught.value.message == f"Cannot fetch '{scheme}://127.0.0.1:{port}/a': {why}."


async def test_a_name_that_is_none_is_told_in_words(allowed: Fetcher, monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(Invalid) as caught:
        await allowed.fetch("https://nobody.example/a")
    told = "Cannot fetch 'https://nobody.example/a': the name of its host cannot be resolved."
    assert caught.value.message == told


async def test_a_message_shows_no_password_and_no_query(site: Site, allowed: Fetcher):
    with pytest.raises(Invalid) as caught:
        await allowed.fetch(f"http://me:hush@127.0.0.1:{site.port}/no?token=hush")
    assert "hush" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nonsense", "nonsense"), ("file:///etc/passwd", "file:///etc/passwd"),
        ("ftp://me:hush@8.8.8.8:21/x?y", "ftp://8.8.8.8:21/x"),
    ],
)  # fmt: skip
async def test_a_message_shows_the_url_as_it_is(guarded: Fetcher, url: str, shown: str):
    with pytest.raises(Invalid) as caught:
        await guarded.fetch(url)
    assert f"Cannot fetch '{shown}':" in caught.value.message


async def test_a_refusal_says_that_it_is_one(guarded: Fetcher):
    for host in ("127.0.0.1", "localhost", "[::1]", "127。0。0。1"):
        with pytest.raises(Refused) as caught:
            await guarded.fetch(f"http://{host}:9/")
        assert caught.value.code == "forbidden_address"


async def test_a_stream_is_bounded_by_its_own_limit(site: Site, allowed: Fetcher):
    url = f"http://127.0.0.1:{site.port}/to?u=/big"
    async with allowed.stream(url, max_bytes=5000) as pieces:
        assert len(b"".join([piece async for piece in pieces])) == 5000
    async with allowed.stream(url, max_bytes=4999) as pieces:
        with pytest.raises(Invalid, match="larger than 4999"):
            [piece async for piece in pieces]


@pytest.mark.parametrize("host", LOOPBACK)
async def test_a_stream_is_guarded_the_same(site: Site, guarded: Fetcher, host: str):
    with pytest.raises(Invalid):
        async with guarded.stream(f"http://{host}:{site.port}/x", max_bytes=10):
            pass
    assert site.hits == []


async def test_a_stream_says_what_it_was_answered(site: Site, allowed: Fetcher):
    with pytest.raises(Unwelcome, match="answered 404") as caught:
        async with allowed.stream(f"http://127.0.0.1:{site.port}/no", max_bytes=10):
            pass
    assert caught.value.answer == 404
    elsewhere = f"http://127.0.0.1:{site.port}/to?u=http://10.0.0.1/"
    with pytest.raises(Refused):
        async with allowed.stream(elsewhere, max_bytes=10):
            pass


def test_an_address_of_this_machine_is_not_public(monkeypatch):
    guard = netguard.Guard()
    assert guard.permits("8.8.8.8")
    monkeypatch.setattr(netguard, "_is_own", lambda address: address == "8.8.8.8")
    assert not guard.permits("8.8.8.8")
    assert guard.permits("1.1.1.1")


def test_this_machine_knows_its_own_addresses():
    assert netguard._is_own("127.0.0.1")
    assert not netguard._is_own("8.8.8.8")


async def test_slow_names_keep_nobody_else(site: Site, allowed: Fetcher, monkeypatch):
    real, over = socket.getaddrinfo, threading.Event()

    def slow(host, *rest, **more):
        if "tarpit" in str(host):
            over.wait(20)
            raise socket.gaierror("no")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(netguard, "_LOOKUP_S", 1.0)
    urls = [f"http://{n}.tarpit.example/?secret" for n in range(netguard._LOOKUP_THREADS + 10)]
    began = time.monotonic()
    fetches = [asyncio.ensure_future(allowed.fetch(url)) for url in urls]
    await asyncio.sleep(0.1)
    await asyncio.to_thread(int)
    assert time.monotonic() - began < 0.8
    ended = await asyncio.gather(*fetches, return_exceptions=True)
    assert time.monotonic() - began < 5
    assert {type(each) for each in ended} == {Unreachable}
    assert "'3.tarpit.example' could not be looked up within 1 seconds" in str(ended[3])
    # They have gone; the threads stay until their look-up ends, and leave some for other domains.
    assert (await allowed.fetch(f"http://localhost:{site.port}/x")).data == b"secret"
    with pytest.raises(Unreachable, match="could not be looked up"):
        await allowed.request("POST", urls[0], b"", {}, silence_s=5)
    over.set()
    assert (await allowed.fetch(f"http://localhost:{site.port}/x")).data == b"secret"


async def test_closing_ends_the_threads_that_look_up(site: Site):
    fetcher = Fetcher(Guard([ip_network("127.0.0.0/8"), ip_network("::1/128")]), max_bytes=4000)
    await fetcher.fetch(f"http://localhost:{site.port}/x")
    mine = [each for each in threading.enumerate() if each.name.startswith("fetch-dns")]
    assert mine
    await fetcher.close()
    for thread in mine:
        await asyncio.to_thread(thread.join, 5)
        assert not thread.is_alive()
    await fetcher.close()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_one_owner_leaves_connections_to_the_others(method: str):
    over, hits = asyncio.Event(), list[str]()

    async def answer(request: web.Request) -> web.Response:
        hits.append(request.path)
        if request.path == "/tarpit":
            await over.wait()
        return web.Response(body=b"found")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    fetcher = Fetcher(Guard([ip_network("127.0.0.0/8")]), max_bytes=4000, connections=20)

    def asks(path: str, owner: str) -> Coroutine[Any, Any, object]:
        if method == "GET":
            return fetcher.fetch(f"{base}/{path}", owner=owner)
        return fetcher.post_form(f"{base}/{path}", {}, {}, max_bytes=99, owner=owner)

    greedy = [asyncio.ensure_future(asks("tarpit", "greedy")) for _ in range(30)]
    async with asyncio.timeout(10):
        await asyncio.gather(*(asks("x", f"other-{n}") for n in range(10)))
    assert hits.count("/tarpit") == 2
    over.set()
    await asyncio.gather(*greedy)
    assert hits.count("/tarpit") == 30
    await fetcher.close()
    await runner.cleanup()


def test_an_address_keeps_its_interface():
    entry = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 3))
    assert netguard._resolved("x.example", 80, entry)["host"] == "fe80::1%3"
    entry = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 80, 0, 0))
    assert netguard._resolved("x.example", 80, entry)["host"] == "::1"
