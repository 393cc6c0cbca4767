"""The way to an upstream: framing, waiting, and what each failure becomes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from email.utils import format_datetime
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from openinteractions import clock
from openinteractions.errors import ContextOverflow, ModelRejected, ModelUnavailable
from openinteractions.models.transport import SseDecoder, Upstream, classify, retry_after

WORDS = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=6)
OTHER_LINES = ["data", "event: x", ": comment", "id: 7", "data:", "datax: y"]
LINES = st.lists(
    st.one_of(st.just(""), st.sampled_from(OTHER_LINES), WORDS.map("data: {}".format)), max_size=12
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def expected(lines: list[str]) -> list[bytes]:
    """What the standard says of these lines, each of which has its end."""
    payloads: list[bytes] = []
    pending: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            pending.append(line[5:].removeprefix(" "))
        elif not line and pending:
            payloads.append("\n".join(pending).encode())
            pending = []
    return payloads


def decode(chunks: list[bytes]) -> list[bytes]:
    decoder = SseDecoder()
    return [payload for chunk in chunks for payload in decoder.feed(chunk)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[a:b] for a, b in pairwise(edges)]


@settings(deadline=None)
@given(
    lines=LINES,
    ends=st.lists(ENDS, min_size=12, max_size=12),
    places=st.lists(st.integers(0, 300), max_size=20),
    bom=st.booleans(),
)
def test_any_cut_gives_the_same_payloads(
    lines: list[str], ends: list[str], places: list[int], bom: bool
) -> None:
    text = ""
    for line, end in zip(lines, ends, strict=False):
        # A CR, an empty line and its LF would be one CRLF: such a line ends in CRLF instead.
        joins = text.endswith("\r") and not line and end == "\n"
        text += line + ("\r\n" if joins else end)
    stream = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    assert decode([stream]) == expected(lines)
    assert decode(cut(stream, places)) == expected(lines)
    assert decode([stream[at : at + 1] for at in range(len(stream))]) == expected(lines)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(end: str) -> None:
    stream = (
        f"data: a{end}data:b{end}{end}: hm{end}event: e{end}data: c{end}{end}data: lost".encode()
    )
    assert decode([stream]) == [b"a\nb", b"c"]


def test_an_event_is_out_with_its_last_byte() -> None:
    decoder = SseDecoder()
    assert list(decoder.feed(b"data: a\r\n\r")) == [b"a"]
    assert list(decoder.feed(b"\ndata: b\r\n\r\n")) == [b"b"]


def test_only_a_leading_byte_order_mark_is_dropped() -> None:
    mark = "\ufeff".encode()
    assert decode([mark[:1], mark[1:] + b"data: a\n\n"]) == [b"a"]
    assert decode([b"\n", mark + b"data: a\n\n"]) == []


def test_an_endless_line_is_refused() -> None:
    decoder = SseDecoder()
    for _ in range(64):
        assert list(decoder.feed(b"x" * 2**20)) == []
    with pytest.raises(ModelUnavailable, match="too long"):
        list(decoder.feed(b"x"))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"Retry-After": "-3"}, 0),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"retry-after-ms": "soon", "Retry-After": "9"}, 9),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 -0000"}, 0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(CIMultiDict(headers)) == seconds


def test_retry_after_a_date() -> None:
    later = format_datetime(clock.now() + timedelta(seconds=90), usegmt=True)
    assert retry_after(CIMultiDict({"Retry-After": later})) == pytest.approx(90, abs=2)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_retry_after_takes_any_text(text: str) -> None:
    waited = retry_after({"Retry-After": text, "retry-after-ms": text})
    assert waited is None or waited >= 0


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (408, "", ModelUnavailable),
        (409, "", ModelUnavailable),
        (429, "maximum context length", ModelUnavailable),
        (500, "prompt is too long", ModelUnavailable),
        (529, "", ModelUnavailable),
        (400, "This model's maximum context length is 8192 tokens", ContextOverflow),
        (400, "m (context_length_exceeded)", ContextOverflow),
        (413, "Prompt is too long: 9 > 8", ContextOverflow),
        (400, "the request exceeds the available context size", ContextOverflow),
        (400, "bad schema", ModelRejected),
        (307, "", ModelRejected),
        (404, "", ModelRejected),
    ],
)
def test_what_a_status_means(status: int, text: str, kind: type[Exception]) -> None:
    error = classify(text, status=status, retry_after_s=2)
    assert type(error) is kind
    assert error.upstream_status == status


@asynccontextmanager
async def upstream(handler: Any) -> AsyncGenerator[Upstream]:
    """An Upstream whose server is one aiohttp handler."""
    app = web.Application()
    app.router.add_post("/v1/x", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with aiohttp.ClientSession() as session:
        yield Upstream(
            session,
            base_url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1/",
            headers={"X-Key": "k"},
            connect_timeout=timedelta(seconds=2),
            idle_timeout=timedelta(seconds=2),
        )
    await runner.cleanup()


def explain(body: Any) -> str | None:
    return body["why"]


async def collect(server: Upstream, **fields: Any) -> list[Any]:
    async with server.post("/x", b'{"a":1}', explain=explain, **fields) as answer:
        return [value async for value in answer]


async def test_headers_and_body_arrive() -> None:
    async def echo(request: web.Request) -> web.Response:
        names = "X-Key", "X-More", "Content-Type"
        return web.json_response([await request.json(), *(request.headers[n] for n in names)])

    async with upstream(echo) as server:
        told = await collect(server, headers={"X-More": "m"})
    assert told == [[{"a": 1}, "k", "m", "application/json"]]


async def test_a_long_error_body_is_read_to_its_end() -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=400, headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for piece in (b'{"why": "it ', b"was ", b'you"}'):
            await response.write(piece)
            await asyncio.sleep(0.02)
        return response

    async with upstream(slow) as server:
        with pytest.raises(ModelRejected, match=r"answered 400: it was you$"):
            await collect(server)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'"x"', b"{}", b"\xff\xfe"])
async def test_error_bodies_of_another_shape(body: bytes) -> None:
    async def odd(_request: web.Request) -> web.Response:
        return web.Response(status=503, body=body)

    async with upstream(odd) as server:
        with pytest.raises(ModelUnavailable, match=r"answered 503\.$"):
            await collect(server)


async def test_redirects_are_not_followed() -> None:
    async def away(_request: web.Request) -> web.Response:
        raise web.HTTPFound("https://elsewhere.example/")

    async with upstream(away) as server:
        with pytest.raises(ModelRejected, match="302"):
            await collect(server)


async def test_a_body_that_lies_about_its_length() -> None:
    async def short(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        response.content_type = "application/json"
        await response.prepare(request)
        await response.write(b'{"a":')
        assert request.transport is not None
        request.transport.close()
        return response

    async with upstream(short) as server:
        with pytest.raises(ModelUnavailable, match="broke"):
            await collect(server)


async def test_nothing_is_read_after_the_mark() -> None:
    async def talkative(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\ndata: [DONE]\n\ndata: 2\n\n")
        await asyncio.sleep(30)
        return response

    async with upstream(talkative) as server, asyncio.timeout(2):
        assert await collect(server) == [1]


async def test_done_is_told() -> None:
    async def stream(request: web.Request) -> web.Response:
        mark = "data: [DONE]\n\n" if request.query else ""
        return web.Response(text=f"data: 1\n\n{mark}", content_type="text/event-stream")

    async with upstream(stream) as server:
        for path, done in (("/x", False), ("/x?mark=1", True)):
            async with server.post(path, b"{}", explain=explain) as answer:
                assert await anext(answer) == 1
                assert [value async for value in answer] == []
                assert answer.done is done
