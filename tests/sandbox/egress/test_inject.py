"""Credentials: added where they belong, and stopped elsewhere."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from openinteractions.errors import Unready
from openinteractions.sandbox.egress.inject import (
    Bearer,
    BodySwap,
    Hop,
    Injector,
    Placeholder,
    Secrets,
    Variables,
    placeholder,
)
from openinteractions.sandbox.egress.policy import Rule
from tests.sandbox.egress import rig as rigs
from tests.sandbox.egress.rig import Rig, allow

HOST = "api.example.com"
VALUE = 's3cr3t "value"/+&'
MARK = placeholder("key")
EVERYWHERE = frozenset({"header", "query", "body"})


def variable(
    *locations: Any, value: str = VALUE, domains: tuple[str, ...] = (HOST,)
) -> Placeholder:
    return Placeholder(
        value=value, trusted_domains=domains, locations=frozenset(locations) or EVERYWHERE
    )


@pytest.fixture
async def site(rig: Rig) -> AsyncGenerator[Rig]:
    """Servers that tell what they got."""

    async def reply(request: web.Request) -> web.Response:
        body = await request.read()
        seen = {
            "path": request.raw_path, "headers": [list(each) for each in request.headers.items()],
            "body": body.decode("latin-1"),
        }  # fmt: skip
        echo = request.headers.get("X-Echo")
        headers = {"X-Said": request.headers.get(echo, "-")} if echo else {}
        return web.json_response(seen, headers=headers)

    async with rigs.site(rig, reply):
        yield rig


def ask(
    *headers: str, path: str = "/", body: bytes = b"", method: str = "GET", host: str = HOST
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def told(rig: Rig, data: bytes, host: str = HOST) -> dict[str, Any]:
    """What the server got."""
    got = await rig.say_tls(data, host)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), got
    seen = json.loads(body)
    seen["headers"] = {name.lower(): value for name, value in seen["headers"]}
    seen["head"] = head
    return seen


async def refused(rig: Rig, data: bytes, why: str, host: str = HOST) -> None:
    got = await rig.say_tls(data, host)
    assert got.startswith(b"HTTP/1.1 403"), got
    assert why in got.decode()
    assert (await rig.settled())[-1].decision == "refused"


async def test_a_bearer_token_replaces_the_sandboxs_own(site: Rig):
    site.vault["gh"] = Bearer(token="real-token")
    site.rules(allow(credential="gh"))
    got = await told(site, ask("authorization: Bearer mine", "AUTHORIZATION: another"))
    assert got["headers"]["authorization"] == "Bearer real-token"
    assert site.vault.asked == [("env", "gh")]
    assert site.journal[0].credential == "gh"


async def test_other_headers_and_prefixes(site: Rig):
    site.vault["k"] = Bearer(token="real-token", header_name="X-Api-Key", prefix="")
    site.rules(allow(credential="k"))
    got = await told(site, ask("x-api-key: mine"))
    assert got["headers"]["x-api-key"] == "real-token"


async def test_a_transform_overrides_the_credential(site: Rig):
    site.vault["gh"] = Bearer(token="real-token")
    site.rules(allow(credential="gh", transform=[{"authorization": "Token x"}, {"X-More": "1"}]))
    got = await told(site, ask())
    assert got["headers"]["authorization"] == "Token x"
    assert got["headers"]["x-more"] == "1"


async def test_rotation_and_revocation_act_at_the_next_request(site: Rig):
    site.rules(allow(credential="gh"))
    site.vault["gh"] = Bearer(token="first-token", header_name="X-Key")
    reader, writer = await site.tls()
    request = ask().replace(b"Connection: close\r\n", b"")
    for token in ("first-token", "second-token"):
        site.vault["gh"] = Bearer(token=token, header_name="X-Key")
        writer.write(request)
        await reader.readuntil(b"\r\n\r\n")
        assert token.encode() in await reader.readuntil(b'"}')
    del site.vault["gh"]
    writer.write(request)
    assert b"does not exist any more, or is revoked" in await reader.read(-1)
    writer.close()


async def test_a_credential_that_cannot_be_had_now(site: Rig, monkeypatch):
    async def fail(environment_id: str, credential_id: str):
        raise Unready("The token endpoint did not answer.")

    monkeypatch.setattr(site.vault, "credential", fail)
    site.rules(allow(credential="gh"))
    await refused(site, ask(), "cannot be used now: The token endpoint did not answer.")


@pytest.mark.parametrize(
    "bad", [Bearer(token="a\r\nX: y"), Bearer(token="x", header_name="Host"),
            Bearer(token="x", header_name="A B"), variable()],
)  # fmt: skip
async def test_what_cannot_be_a_header_is_refused(site: Rig, bad):
    site.vault["gh"] = bad
    site.rules(allow(credential="gh"))
    await refused(site, ask(), "cannot")


@pytest.mark.parametrize("rule", [{"credential": "gh"}, {"transform": {"X-A": "1"}}])
async def test_nothing_is_added_to_plain_http(site: Rig, rule):
    site.vault["gh"] = Bearer(token="real-token")
    site.rules(allow(**rule))
    for kind in ("http", "proxy"):
        data = ask() if kind == "http" else ask(path=f"http://{HOST}/")
        got = await site.say(kind, data)
        assert got.startswith(b"HTTP/1.1 403")
        assert b"https only" in got
    got = await site.say("proxy", f"CONNECT {HOST}:443 HTTP/1.1\r\n\r\n".encode() + ask())
    assert b"https only" in got
    assert site.vault.asked == []


async def test_a_variable_in_header_query_and_body(site: Rig):
    site.vault["key"] = variable(value="plain-value")
    site.rules(None, "key")
    got = await told(
        site,
        ask(f"X-Key: a{MARK}b{MARK}", path=f"/p?k={MARK}&l=1", body=f"[{MARK}]".encode()),
    )
    assert got["headers"]["x-key"] == "aplain-valuebplain-value"
    assert got["path"] == "/p?k=plain-value&l=1"
    assert got["body"] == "[plain-value]"
    assert got["headers"]["content-length"] == "13"
    assert (site.journal[0].credential, site.journal[0].path) == ("key", "/p")


@pytest.mark.parametrize(
    ("mime_type", "spelled"),
    [
        ("application/json; charset=utf-8", json.dumps(VALUE)[1:-1]),
        ("application/vnd.api+json", json.dumps(VALUE)[1:-1]),
        ("application/x-www-form-urlencoded", "s3cr3t+%22value%22%2F%2B%26"),
        ("text/plain", VALUE),
    ],
)
async def test_a_value_is_spelled_as_its_place_wants(site: Rig, mime_type: str, spelled: str):
    site.vault["key"] = variable()
    site.rules(None, "key")
    got = await told(
        site, ask(f"Content-Type: {mime_type}", path=f"/?a={MARK}", body=f'"{MARK}"'.encode())
    )
    assert got["body"] == f'"{spelled}"'
    assert got["path"] == "/?a=" + quote(VALUE, safe="")


async def test_basic_authentication(site: Rig):
    site.vault["key"] = variable("header", value="pass:word")
    site.rules(None, "key")
    pair = base64.b64encode(f"user:{MARK}".encode()).decode()
    got = await told(site, ask(f"Authorization: Basic {pair}"))
    shown = base64.b64decode(got["headers"]["authorization"].removeprefix("Basic "))
    assert shown == b"user:pass:word"
    other = "Basic " + base64.b64encode(b"user:mine").decode()
    assert (await told(site, ask(f"Authorization: {other}")))["headers"]["authorization"] == other


async def test_basic_authentication_elsewhere_is_refused(site: Rig):
    site.vault["key"] = variable(domains=("other.com",))
    site.rules(None, "key")
    pair = base64.b64encode(f"user:{MARK}".encode()).decode()
    await refused(site, ask(f"Authorization: Basic {pair}"), "must not be sent to api.example.com")


@pytest.mark.parametrize(
    ("locations", "request_bytes", "why"),
    [
        (["query"], ask(f"X: {MARK}"), "in the header of"),
        (["header"], ask(path=f"/?{MARK}"), "in the query of"),
        (["header"], ask(body=MARK.encode()), "in the body of"),
        ([], ask(path=f"/{MARK}"), "in the path"),
        ([], ask(f"{MARK}: x"), "in the name of a header"),
    ],
)
async def test_other_places_are_refused(site: Rig, locations, request_bytes: bytes, why: str):
    site.vault["key"] = variable(*locations)
    site.rules(None, "key")
    await refused(site, request_bytes, why)


@pytest.mark.parametrize("domains", [(), ("other.com",), ("*.api.example.com",), ("a:b",)])
async def test_other_hosts_are_refused(site: Rig, domains: tuple[str, ...]):
    site.vault["key"] = variable(domains=domains)
    site.rules(None, "key")
    for data in (ask(f"X: {MARK}"), ask(path=f"/?{MARK}"), ask(body=MARK.encode())):
        await refused(site, data, "must not be sent to api.example.com")


async def test_plain_http_is_refused(site: Rig):
    site.vault["key"] = variable()
    site.rules(None, "key")
    for data in (ask(f"X: {MARK}"), ask(path=f"/?{MARK}"), ask(body=MARK.encode())):
        assert b"without TLS" in await site.say("http", data)
    assert b"200 OK" in await site.say("http", ask("X: harmless"))


async def test_a_refused_request_never_reaches_the_host(rig: Rig):
    async def serve(reader, writer):
        parts = bytearray()
        got.append(parts)
        while part := await reader.read(1 << 16):
            parts += part

    rig.vault["key"] = variable("header")
    rig.rules(None, "key")
    async with rigs.script(rig, serve) as got:
        await refused(rig, ask(path=f"/?{MARK}"), "in the query")
        await refused(rig, ask(body=b"x" * 1000 + MARK.encode()), "in the body")
        assert got == []
        # A long one is stopped before the placeholder.
        long = b"x" * 400_000 + MARK.encode() + b"y" * 400_000
        await refused(rig, ask(body=long), "in the body")
    assert got[0].startswith(b"GET / HTTP/1.1\r\n")
    assert MARK.encode()[:8] not in got[0]
    assert b"s3cr3t" not in got[0]


async def test_a_long_body_is_swapped_as_it_passes(site: Rig):
    site.vault["key"] = variable(value="v")
    site.rules(None, "key")
    half = b"x" * 300_000
    got = await told(site, ask(body=half + MARK.encode() + half))
    assert got["body"] == (half + b"v" + half).decode()
    assert got["headers"]["transfer-encoding"] == "chunked"


async def test_chunked_bodies_are_swapped_across_chunks(site: Rig):
    site.vault["key"] = variable(value="v")
    site.rules(None, "key")
    text = f"a{MARK}b{MARK[:-1]}".encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in text) + b"0\r\n\r\n"
    data = ask("Transfer-Encoding: chunked", method="POST") + chunks
    got = await told(site, data)
    assert got["body"] == f"avb{MARK[:-1]}"


async def test_compressed_bodies(site: Rig):
    site.vault["key"] = variable("header")
    site.rules(None, "key")
    got = await told(site, ask("Content-Encoding: x-mine", body=b"zipped"))
    assert got["body"] == "zipped"
    site.vault["key"] = variable("body")
    await refused(site, ask("Content-Encoding: x-mine", body=b"zipped"), "send it uncompressed")


async def test_bodies_are_asked_for_where_they_are_read_first(site: Rig):
    site.vault["key"] = variable(value="v")
    site.rules(None, "key")
    reader, writer = await site.tls()
    head = f"POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(MARK)}\r\n"
    writer.write(head.encode() + b"Expect: 100-continue\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(MARK.encode())
    assert b" 200 " in await reader.readline()
    writer.close()


async def test_with_variables_all_tls_is_opened(site: Rig):
    site.vault["key"] = variable()
    site.rules(allow(), "key")
    await told(site, ask())
    assert site.journal[0].kind == "https"


async def test_variables_that_are_gone_are_refused(site: Rig):
    site.rules(None, "key")
    await refused(site, ask(f"X: {MARK}"), "is revoked")


async def test_what_a_host_echoes_is_redacted(site: Rig):
    site.vault["gh"] = Bearer(token="real-token-value")
    site.vault["key"] = variable(value="plain-value")
    site.rules(allow(credential="gh", transform={"X-Tr": "Token another-secret"}), "key")
    for name in ("Authorization", "X-Tr", "X-Var"):
        got = await told(site, ask(f"X-Echo: {name}", f"X-Var: {MARK}"))
        for secret in (b"real-token", b"another-secret", b"plain-value"):
            assert secret not in got["head"]
        assert got["headers"]["authorization"] == "Bearer real-token-value"
    assert f"X-Said: {MARK}".encode() in got["head"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 You said %s\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 103 %s\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/%s; charset=utf-8\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: %s\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-T: %s\r\n\r\n",
    ],
)
async def test_no_part_of_a_head_shows_a_secret(rig: Rig, answer: bytes):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer % b"real-token-value")

    rig.vault["gh"] = Bearer(token="real-token-value")
    rig.rules(allow(credential="gh"))
    async with rigs.script(rig, serve):
        got = await rig.say_tls(ask())
    assert b"HTTP/1.1 200" in got
    assert b"real-token-value" not in got
    assert b"[redacted]" in got


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nX-%s: 1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 103 Hints\r\n%s: 1\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n%s: 1\r\n\r\n",
    ],
)
async def test_the_name_of_a_header_shows_no_secret(rig: Rig, answer: bytes):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer % b"real-token-VALUE")

    rig.vault["gh"] = Bearer(token="Real-Token-Value")
    rig.rules(allow(credential="gh"))
    async with rigs.script(rig, serve):
        got = await rig.say_tls(ask())
    assert b"real-token" not in got.lower()
    assert "repeats a secret" in ((await rig.settled())[0].reason or "")


async def test_a_word_of_a_transform_is_no_secret_in_names(site: Rig):
    site.rules(allow(transform={"X-Fields": "content-type", "Accept-Encoding": "identity"}))
    got = await told(site, ask())
    assert got["headers"]["x-fields"] == "content-type"


async def test_a_length_that_nothing_proves_shows_no_secret(rig: Rig):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 123456789\r\n\r\n")

    rig.vault["pin"] = Bearer(token="123456789")
    rig.rules(allow(credential="pin"))
    async with rigs.script(rig, serve):
        got = await rig.say_tls(ask(method="HEAD"))
    assert got.startswith(b"HTTP/1.1 200")
    assert b"123456789" not in got


async def test_the_log_names_every_credential_that_a_request_got(site: Rig):
    site.vault["gh"] = Bearer(token="real-token")
    site.vault["key"] = variable(value="plain-value")
    site.rules(allow(credential="gh"), "key")
    await told(site, ask(f"X-Var: {MARK}"))
    assert site.journal[0].credential == "key, gh"


class Counted(str):
    """A value that counts how often it is spelled."""

    __slots__ = ()
    spelled = 0

    def encode(self, *args: Any) -> bytes:
        type(self).spelled += 1
        return super().encode(*args)


async def test_a_value_is_spelled_once_however_many_placeholders_there_are(site: Rig):
    value = Counted("plain-value")
    site.vault["key"] = variable(value=value)
    site.rules(None, "key")
    Counted.spelled = 0
    got = await told(site, ask(body=MARK.encode() * 10_000))
    assert got["body"] == value * 10_000
    assert site.vault.asked == [("env", "key")]
    assert 0 < Counted.spelled < 10


async def test_others_run_while_placeholders_are_swapped(rig: Rig):
    rig.vault["key"] = variable(value="plain-value")
    hop = Hop(environment_id="env", host=HOST, is_secure=True, rule=Rule(HOST))
    swap = Injector(rig.vault, Variables(["key"]), hop).body(b"text/plain")
    assert swap is not None
    work = asyncio.ensure_future(swap.feed(MARK.encode() * 10_000, is_last=True))
    turns = 0
    while not work.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 30
    assert await work == b"plain-value" * 10_000


async def test_placeholders_in_a_head_are_counted(site: Rig):
    site.vault["key"] = variable(value="v")
    site.rules(None, "key")
    got = await told(site, ask(*[f"X-{n}: {MARK}" for n in range(15)], path=f"/?{MARK}"))
    assert got["headers"]["x-14"] == "v"
    await refused(site, ask(*[f"X-{n}: {MARK}" for n in range(16)], path=f"/?{MARK}"), "at most 16")


@pytest.mark.parametrize("is_long", [False, True])
async def test_what_values_add_to_a_request_is_bounded(site: Rig, is_long: bool):
    site.vault["key"] = variable(value="\N{GRINNING FACE}" * 32_768)
    site.rules(None, "key")
    form = "Content-Type: application/x-www-form-urlencoded"
    filler = b"x" * (300_000 if is_long else 1)
    got = await told(site, ask(form, body=filler + MARK.encode()))
    assert len(got["body"]) == len(filler) + 12 * 32_768
    await refused(site, ask(form, body=filler + MARK.encode() * 2), "longer by more than")
    await refused(site, ask(body=MARK.encode() * 12_000), "longer by more than")


async def test_what_all_requests_of_an_environment_hold_is_bounded(site: Rig):
    site.vault["key"] = variable(value="v" * 10_000)
    site.rules(None, "key")
    room = site.egress.room
    whole, room.left = room.left, 60_000
    data = ask(body=MARK.encode())
    for _ in range(3):
        # Each takes its part, and gives it back.
        await told(site, data)
        assert room.left == 60_000
    hop = Hop(environment_id="env", host=HOST, is_secure=True, rule=Rule(HOST))
    other = Injector(site.vault, site.egress.variables, hop, room)
    swap = other.body(b"")
    assert swap is not None
    await swap.feed(MARK.encode(), is_last=True)
    await refused(site, data, "hold too many values")
    other.close()
    await told(site, data)
    assert room.left == 60_000 < whole


async def test_secrets_are_in_no_log_and_no_record(site: Rig, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    site.vault["gh"] = Bearer(token="real-token-value")
    site.vault["key"] = variable(value="plain-value")
    site.rules(allow(credential="gh", transform={"X-Tr": "another-secret"}), "key")
    await told(site, ask(f"X-Var: {MARK}", path=f"/a?b={MARK}", body=MARK.encode()))
    await refused(site, ask(path=f"/{MARK}"), "path")
    everything = caplog.text + str(capsys.readouterr()) + repr(site.journal)
    everything += repr(site.vault) + repr(site.egress.policy)
    for secret in ("real-token-value", "plain-value"):
        assert secret not in everything
    assert "another-secret" not in caplog.text + repr(site.journal)


async def test_trace_cannot_mirror_credentials(site: Rig):
    site.vault["gh"] = Bearer(token="real-token")
    site.rules(allow(credential="gh"))
    await refused(site, ask(method="TRACE"), "method TRACE")


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["__GEMINI_CRED_", "a__", "a", "__", "_", "x", "b__", "__GEMINI_CRED_a__",
                         "__GEMINI_CRED_a__b__", "__GEMINI_CRED_bb__"]),
        max_size=12,
    ),
    st.lists(st.integers(0, 200), max_size=10),
)  # fmt: skip
def test_a_body_is_swapped_alike_however_it_is_cut(words: list[str], at: list[int]):
    variables = Variables(["a", "a__b", "bb"])
    text = "".join(words).encode()

    async def swap(part: bytes, spell) -> bytes:
        for each in reversed(list(variables.find(part))):
            part = part[: each.start()] + b"<" + each[0][14:] + b">" + part[each.end() :]
        return part

    def fed(pieces: list[bytes]) -> bytes:
        body = BodySwap(swap, variables, b"")

        async def work() -> bytes:
            parts = [await body.feed(piece) for piece in pieces]
            return b"".join([*parts, await body.feed(b"", is_last=True)])

        try:
            work().send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError

    edges = sorted({0, len(text), *(each % (len(text) + 1) for each in at)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert fed(pieces) == fed([text])


def test_what_cannot_become_a_placeholder_is_not_held_back():
    variables = Variables(["a"])
    for text in (b"plain", b"__GEMINI_CRED_a__", b"x_y", b"__GEMINI_CRED_b"):
        assert variables.undecided(text) == len(text)
    assert variables.undecided(b"x__GEM") == 1
    assert variables.undecided(b"x_") == 1


def test_short_values_and_steering_headers_are_left_alone():
    secrets = Secrets()
    secrets.add("true")
    secrets.add("application/json")
    fields = [(b"Content-Type", b"application/json"), (b"X", b"application/json true")]
    assert secrets.redacted(fields) == [fields[0], (b"X", b"[redacted] true")]
    secrets.add("charset=utf-8")
    secrets.add("identity")
    fields = [
        (b"Content-Type", b"application/json; charset=utf-8"), (b"Content-Encoding", b"identity")
    ]  # fmt: skip
    assert secrets.redacted(fields) == fields
