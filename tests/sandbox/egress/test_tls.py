"""TLS over streams."""

import asyncio
import os
import ssl
from datetime import timedelta
from pathlib import Path

import pytest

from openinteractions import clock
from openinteractions.sandbox.egress import ca
from openinteractions.sandbox.egress.tls import TlsStream
from tests.sandbox.egress.rig import Pipe, pipes

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> ca.Authority:
    return ca.load_or_make(tmp_path_factory.mktemp("ca"))


def trusting(authority: ca.Authority, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    # Python 3.13 asks for this by default.
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


async def ends(
    authority: ca.Authority, host: str = "a.com", version: ssl.TLSVersion | None = None
) -> tuple[TlsStream, TlsStream, Pipe, Pipe]:
    one, two = pipes()
    client = TlsStream(one, trusting(authority, version), server_hostname=host)
    server = TlsStream(two, await authority.context(host))
    await asyncio.gather(client.handshake(), server.handshake())
    return client, server, one, two


async def drained(stream: TlsStream) -> bytes:
    parts: list[bytes] = []
    while part := await stream.read():
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "host", ["a.com", "a_b.com", "8.8.8.8", "2606:4700::1111", "x" * 63 + ".com"]
)
async def test_hosts_are_certified(authority: ca.Authority, host: str, version):
    client, server, _, _ = await ends(authority, host, version)
    await client.write(b"hi")
    assert await server.read() == b"hi"


@pytest.mark.parametrize("version", VERSIONS)
async def test_both_ways_at_once(authority: ca.Authority, version):
    client, server, _, _ = await ends(authority, version=version)
    up, down = os.urandom(3 << 20), os.urandom(5 << 20)

    async def send(stream: TlsStream, data: bytes) -> None:
        await stream.write(data)
        await stream.end()

    async with asyncio.timeout(30):
        _, _, at_server, at_client = await asyncio.gather(
            send(client, up), send(server, down), drained(server), drained(client)
        )
    assert at_server == up
    assert at_client == down


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_answer_can_follow_the_askers_end(authority: ca.Authority, version):
    client, server, _, _ = await ends(authority, version=version)
    await server.write(b"early")
    await client.write(b"ask")
    await client.end()
    assert await drained(server) == b"ask"
    await server.write(b"answer" * 1000)
    await server.end()
    assert await drained(client) == b"early" + b"answer" * 1000
    with pytest.raises(ConnectionError):
        await client.write(b"more")


async def test_what_is_cut_off_is_no_end(authority: ca.Authority):
    client, server, _, two = await ends(authority)
    await server.write(b"part")
    await two.end()
    assert await client.read() == b"part"
    with pytest.raises(ConnectionError):
        await client.read()


async def test_a_limit_is_kept_to(authority: ca.Authority):
    client, server, _, _ = await ends(authority)
    await client.write(b"abcdef")
    assert await server.read(4) == b"abcd"
    assert await server.read(4) == b"ef"


async def test_a_slow_reader_holds_the_writer(authority: ca.Authority):
    client, server, _, _ = await ends(authority)
    writing = asyncio.ensure_future(client.write(bytes(10 << 20)))
    await asyncio.sleep(0.05)
    assert not writing.done()
    # The reader's own answers (a key update, say) do not wait for that writer either.
    await server.write(b"x")
    assert await client.read() == b"x"
    writing.cancel()


async def test_another_authority_is_not_trusted(authority: ca.Authority, tmp_path: Path):
    other = ca.load_or_make(tmp_path)
    one, two = pipes()
    client = TlsStream(one, trusting(other), server_hostname="a.com")
    server = TlsStream(two, await authority.context("a.com"))
    told = asyncio.ensure_future(server.handshake())
    with pytest.raises(ssl.SSLCertVerificationError):
        await client.handshake()
    with pytest.raises(ssl.SSLError):
        await told


async def test_leaves_are_kept_and_renewed(authority: ca.Authority, monkeypatch):
    first = await authority.context("kept.com")
    assert await authority.context("kept.com") is first
    later = clock.now() + timedelta(hours=25)
    monkeypatch.setattr(clock, "now", lambda: later)
    assert await authority.context("kept.com") is not first


async def test_kept_leaves_are_bounded(authority: ca.Authority, monkeypatch):
    monkeypatch.setattr(ca, "_MAX_LEAVES", 3)
    for number in range(6):
        await authority.context(f"h{number}.com")
    assert len(authority._contexts) == 3


def test_the_authority_is_kept_for_its_owner_alone(tmp_path: Path):
    folder = tmp_path / "new"
    made = ca.load_or_make(folder)
    assert ca.load_or_make(folder).pem == made.pem
    files = list(folder.iterdir())
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o600"]
    assert b"PRIVATE" not in made.pem


def test_an_authority_that_ends_is_replaced(tmp_path: Path, monkeypatch):
    made = ca.load_or_make(tmp_path)
    later = clock.now() + timedelta(days=3640)
    monkeypatch.setattr(clock, "now", lambda: later)
    assert ca.load_or_make(tmp_path).pem != made.pem


def test_the_bundle_has_the_roots_and_ours(tmp_path: Path):
    made, other = ca.load_or_make(tmp_path / "a"), ca.load_or_make(tmp_path / "b")
    roots = tmp_path / "roots.pem"
    roots.write_bytes(other.pem.rstrip())
    bundle = made.bundle([roots])
    assert bundle == other.pem + made.pem
    context = ssl.create_default_context(cadata=bundle.decode())
    assert context.cert_store_stats()["x509_ca"] == 2
    assert made.bundle().endswith(made.pem)
