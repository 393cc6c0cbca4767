"""Heads and bodies: what is understood, and what is refused."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openinteractions.sandbox.egress import http1
from openinteractions.sandbox.egress.http1 import BadMessage, Body, Wire
from tests.sandbox.egress.rig import pipes


class Drip:
    """A stream that gives its bytes in pieces of the test's choice."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    async def read(self, limit: int = 65536) -> bytes:
        if not self._pieces:
            return b""
        piece = self._pieces.pop(0)
        if len(piece) > limit:
            self._pieces.insert(0, piece[limit:])
        return piece[:limit]

    async def write(self, data: bytes) -> None:
        raise AssertionError

    async def end(self) -> None:
        raise AssertionError

    async def close(self) -> None:
        raise AssertionError


def run(work):
    """These streams never wait, so that no event loop is needed."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(each % (len(data) + 1) for each in at)})
    return [data[a:b] for a, b in pairwise(edges)]


async def content(data: bytes, framing: http1.Framing, at: list[int]) -> tuple[bytes, Body]:
    body = Body(Wire(Drip(cut(data, at))), framing)
    parts: list[bytes] = []
    while piece := await body.read():
        parts.append(piece)
    return b"".join(parts), body


def test_a_request_is_read():
    request = http1.parse_request(b"GET /a?b HTTP/1.1\r\nHost: a\r\nX-A:\t1 \r\nx-a: \xe4")
    assert (request.method, request.target, request.minor) == (b"GET", b"/a?b", 1)
    assert request.values(b"x-a") == [b"1", b"\xe4"]
    assert request.framing() == 0


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n X: folded", b"GET / HTTP/1.1\r\nX: a\r\n\tb", b"GET / HTTP/1.1\nX: a",
        b"GET / HTTP/1.1\r\nX: a\rb", b"GET / HTTP/1.1\r\nX: a\nY: b", b"GET / HTTP/1.1\r\nX : a",
        b"GET / HTTP/1.1\r\n: a", b"GET / HTTP/1.1\r\nX", b"GET / HTTP/1.1\r\nX: \0",
        b"GET / HTTP/1.1\r\nX: \x7f", b"GET / HTTP/1.1\r\nX\xe4: a", b"GET  / HTTP/1.1",
        b"GET / HTTP/1.1 ", b" GET / HTTP/1.1", b"GET /\tx HTTP/1.1", b"GET /\xe4 HTTP/1.1",
        b"GET / HTTP/2.0", b"GET / HTTP/1.2", b"GET / http/1.1", b"GET /", b"", b"G@T / HTTP/1.1",
        b"GET / x HTTP/1.1", b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 300 + b"Y: b",
        b"GET / HTTP/1.1\r\nX(Y): a", b"GET / HTTP/1.1\r\nX: a\x0b",
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused(head: bytes):
    with pytest.raises(BadMessage):
        http1.parse_request(head)


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 1\r\nContent-Length: 1", b"Content-Length: 1\r\nContent-Length: 2",
        b"Content-Length: 1, 1", b"Content-Length: +1", b"Content-Length: -1",
        b"Content-Length: 0x1", b"Content-Length: 1 2", b"Content-Length:", b"Content-Length: \xb2",
        b"Content-Length: 9999999999999999", b"Content-Length: 1_0",
        b"Content-Length: 1\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 1",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: identity", b"Transfer-Encoding: xchunked", b"Transfer-Encoding:",
        b"Transfer-Encoding: chunked;q=1", b"Transfer-Encoding: \x0bchunked",
    ],
)  # fmt: skip
def test_an_unclear_length_is_refused(fields: bytes):
    with pytest.raises(BadMessage):
        http1.parse_request(b"POST / HTTP/1.1\r\n" + fields).framing()
    with pytest.raises(BadMessage):
        http1.parse_response(b"HTTP/1.1 200 OK\r\n" + fields).framing(b"GET")


def test_http_1_0_has_no_chunks():
    with pytest.raises(BadMessage):
        http1.parse_request(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked").framing()


def test_connection_cannot_remove_what_everybody_needs():
    for name in (b"host", b"Content-Length", b"transfer-encoding"):
        request = http1.parse_request(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, " + name)
        with pytest.raises(BadMessage):
            request.end_to_end()


def test_hop_by_hop_fields_stay():
    request = http1.parse_request(
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: X-Mine, close\r\nx-mine: 1\r\nTE: trailers\r\n"
        b"Proxy-Authorization: Basic eA==\r\nProxy-Connection: keep-alive\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: x\r\nKeep-Alive: 5\r\nX-Yours: 2"
    )
    assert request.end_to_end() == [(b"Host", b"a"), (b"X-Yours", b"2")]


@pytest.mark.parametrize(
    ("head", "method", "framing"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5", b"GET", 5),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5", b"HEAD", 0),
        (b"HTTP/1.1 200\r\nTransfer-Encoding: Chunked", b"GET", "chunked"),
        (b"HTTP/1.1 204 No\r\nContent-Length: 5", b"GET", 0),
        (b"HTTP/1.1 304 No\r\nContent-Length: 5", b"GET", 0),
        (b"HTTP/1.0 200 OK", b"GET", "close"),
    ],
)
def test_how_an_answer_ends(head: bytes, method: bytes, framing):
    assert http1.parse_response(head).framing(method) == framing


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/2 200 OK", b"HTTP/1.1  200 OK",
             b"HTTP/1.1 099 OK", b"ICY 200 OK", b"HTTP/1.1 200OK", b"HTTP/1.1 200 O\0"],
)  # fmt: skip
def test_a_malformed_answer_is_refused(head: bytes):
    with pytest.raises(BadMessage):
        http1.parse_response(head)


cuts = st.lists(st.integers(0, 300), max_size=8)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), cuts)
def test_chunks_are_taken_apart_wherever_they_are_cut(pieces: list[bytes], at: list[int]):
    data = b"".join(http1.chunk(each) for each in pieces)
    data += http1.last_chunk([(b"X-Sum", b"1"), (b"Content-Length", b"9")])
    found, body = run(content(data, "chunked", at))
    assert found == b"".join(pieces)
    assert body.trailers == [(b"X-Sum", b"1")]


@settings(deadline=None)
@given(st.binary(max_size=80), cuts)
def test_a_length_is_kept_to(data: bytes, at: list[int]):
    async def work():
        wire = Wire(Drip(cut(data + b"GET / next", at)))
        body = Body(wire, len(data))
        found = b""
        while piece := await body.read():
            found += piece
        return found, await wire.some(1)

    assert run(work()) == (data, b"G")


@pytest.mark.parametrize(
    "data",
    [
        b"5\nhello\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhelloX\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n", b" 5\r\nhello\r\n0\r\n\r\n",
        b"-1\r\n", b"g\r\n", b"\r\n", b"5;a=\x00\r\nhello\r\n0\r\n\r\n", b"fffffffffffff\r\n",
        b"fffffffffff\r\nx", b"5\r\nhell", b"5\r\nhello\r\n", b"0\r\n", b"0\r\nX\r\n\r\n",
        b"0\r\n X: y\r\n\r\n", b"1;" + b"a" * 5000 + b"\r\nx\r\n0\r\n\r\n", b"0\r\nX: \0\r\n\r\n",
        b"0\r\n" + b"X: y\r\n" * 300 + b"\r\n", b"5\r\r\nhello\r\n0\r\n\r\n", b"5_0\r\n",
    ],
)  # fmt: skip
def test_malformed_chunks_are_refused(data: bytes):
    with pytest.raises(BadMessage):
        run(content(data, "chunked", []))


def test_chunk_extensions_are_dropped():
    found, _ = run(content(b"5;a=b\r\nhello\r\n0;x\r\n\r\n", "chunked", [3, 7]))
    assert found == b"hello"


def test_a_body_that_is_cut_off_is_noticed():
    with pytest.raises(BadMessage):
        run(content(b"abc", 4, []))


@settings(deadline=None)
@given(cuts)
def test_a_head_is_found_wherever_it_is_cut(at: list[int]):
    data = b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\nrest"

    async def work():
        wire = Wire(Drip(cut(data, at)))
        return await wire.head()

    assert run(work()) == b"GET / HTTP/1.1\r\nHost: a"


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\nX: " + b"a" * 70000 + b"\r\n\r\n", b"a" * 70000, b"GET / HTTP/1.1\r\nX: a",
     b"GET / HTTP/1.1\n\n" + b"a" * 10, b"GET / HTTP/1.1\r\nX: a\n\r\n"],
)  # fmt: skip
def test_a_head_without_a_proper_end_is_refused(data: bytes):
    async def work():
        await Wire(Drip([data])).head()

    with pytest.raises(BadMessage):
        run(work())


def test_the_end_before_a_head_is_no_error():
    async def work():
        return await Wire(Drip([])).head()

    assert run(work()) is None


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_head_or_refused(data: bytes):
    for parse in (http1.parse_request, http1.parse_response):
        try:
            found = parse(data)
            found.declared()
        except BadMessage:
            continue
        again = http1.head(data.split(b"\r\n")[0], found.fields)
        assert parse(again[:-4]).fields == found.fields


async def test_pipes_are_bounded():
    one, two = pipes()

    async def write() -> None:
        for _ in range(10):
            await one.write(b"x")

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(write(), 0.05)
    assert await two.read() == b"x"
