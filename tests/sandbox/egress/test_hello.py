"""The host that TLS names."""

import contextlib
import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openinteractions.sandbox.egress import hello
from openinteractions.sandbox.egress.hello import Hello, NotTls


def said(host: str | None, *, tls12: bool = False) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    if tls12:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=host)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def made(*extensions: tuple[int, bytes]) -> bytes:
    """A ClientHello with these extensions."""
    block = b"".join(
        kind.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data for kind, data in extensions
    )
    body = b"\x03\x03" + b"r" * 32 + b"\0" + b"\0\x02\x13\x01" + b"\x01\0"
    body += len(block).to_bytes(2, "big") + block
    return records(b"\x01" + len(body).to_bytes(3, "big") + body, 1 << 14)


def records(message: bytes, size: int) -> bytes:
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)


def name(host: bytes, kind: int = 0) -> tuple[int, bytes]:
    entry = bytes([kind]) + len(host).to_bytes(2, "big") + host
    return 0, len(entry).to_bytes(2, "big") + entry


HELLO = said("api.example.com")


@pytest.mark.parametrize("tls12", [False, True])
def test_the_name_is_found(tls12: bool):
    assert hello.parse(said("API.example.com", tls12=tls12)) == Hello(
        "api.example.com", is_encrypted=False
    )
    assert hello.parse(said(None, tls12=tls12)) == Hello(None, is_encrypted=False)


@settings(deadline=None)
@given(st.integers(1, 600))
def test_the_name_is_found_over_many_records(size: int):
    whole = records(HELLO[5:], size)
    assert hello.parse(whole) == Hello("api.example.com", is_encrypted=False)
    assert hello.parse(whole + b"more") is not None


def test_what_is_not_whole_is_waited_for():
    whole = records(said("api.example.com")[5:], 50)
    assert all(hello.parse(whole[:at]) is None for at in range(len(whole)))


def test_an_encrypted_name_is_noticed():
    found = hello.parse(made(name(b"a.com"), (0xFE0D, b"x")))
    assert found == Hello("a.com", is_encrypted=True)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n", b"\x15\x03\x01\0\x02\x01\0", b"\x16\x02\x01", b"\x16\x03\x01\0\0",
        b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\0\x04\x02\0\0\0",
        made(name(b"a.com"), name(b"b.com")),
        made(name(b"a.com", kind=1)), made(name(b"")), made(name(b"a\0.com")),
        made(name(b"\xe4.com")),
        made(name(b"127.1")), made((0, b"\0\x09" + name(b"a.com")[1][2:])),
        made((0, name(b"a.com")[1] + b"x")), b"\x16\x03\x01\0\x04\x01\xff\xff\xff",
        made((0, b"\0\x10" + (b"\0\0\x05a.com" * 2))), b"\x16\x03\x01\0\x06\x01\0\0\x02\x03\x03",
        records(b"\x01\0\xff\xff" + b"\0" * 0xFFFF, 1)[: hello.MAX_HELLO],
    ],
)  # fmt: skip
def test_malformed_hellos_are_refused(data: bytes):
    with pytest.raises(NotTls):
        hello.parse(data)


@settings(deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_hello_or_not(data: bytes, has_head: bool):
    with contextlib.suppress(NotTls):
        hello.parse(b"\x16\x03\x01" + data if has_head else data)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_changed_hello_is_never_an_accident(at: int, value: int):
    data = bytearray(HELLO)
    data[at % len(data)] = value
    with contextlib.suppress(NotTls):
        hello.parse(bytes(data))
