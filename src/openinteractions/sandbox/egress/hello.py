"""What a TLS client says before anything is encrypted: which host it wants (RFC 8446, 6066)."""

from dataclasses import dataclass

from openinteractions.sandbox.egress import hosts

MAX_HELLO = 64 * 1024
"""Longest ClientHello, records and all."""

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_RECORD_HEAD = 5
_MESSAGE_HEAD = 4
_MAX_RECORD = 16384
_TLS_MAJOR = 3
_VERSION_AND_RANDOM = 34
_SERVER_NAME = 0
_ECH = 0xFE0D
_HOST_NAME = 0


class NotTls(Exception):
    """These bytes do not begin a TLS connection, or not one that can be understood."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What matters of a ClientHello."""

    host: str | None
    """The host it names, in its one spelling; None if it names none."""
    is_encrypted: bool
    """Whether the host that it really wants may be hidden in an encrypted part (ECH)."""


def parse(data: bytes) -> Hello | None:
    """Read a ClientHello, over however many records; None while bytes are missing.

    Raises:
        NotTls: It is none, or malformed.
    """
    message = bytearray()
    at = 0
    while at < len(data):
        if data[at] != _HANDSHAKE or (len(data) > at + 1 and data[at + 1] != _TLS_MAJOR):
            raise NotTls
        if len(data) < at + _RECORD_HEAD:
            break
        size = int.from_bytes(data[at + 3 : at + _RECORD_HEAD], "big")
        if not 0 < size <= _MAX_RECORD:
            raise NotTls
        at += _RECORD_HEAD
        message += data[at : at + size]
        at += size
        if len(message) >= _MESSAGE_HEAD:
            length = _length(message)
            if len(message) >= length:
                return _read(_Bytes(bytes(message[_MESSAGE_HEAD:length])))
    if len(data) >= MAX_HELLO:
        raise NotTls
    return None


def _length(message: bytearray) -> int:
    if message[0] != _CLIENT_HELLO:
        raise NotTls
    length = _MESSAGE_HEAD + int.from_bytes(message[1:_MESSAGE_HEAD], "big")
    if length > MAX_HELLO:
        raise NotTls
    return length


class _Bytes:
    """A cursor over bytes that refuses to read past their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise NotTls
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, size: int) -> "_Bytes":
        """A part that is led by its length, in so many bytes."""
        return _Bytes(self.take(self.number(size)))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)


def _read(body: _Bytes) -> Hello:
    body.take(_VERSION_AND_RANDOM)
    body.block(1)
    body.block(2)
    body.block(1)
    if not body:
        return Hello(None, is_encrypted=False)
    extensions = body.block(2)
    if body:
        raise NotTls
    seen: dict[int, _Bytes] = {}
    while extensions:
        kind = extensions.number(2)
        if kind in seen:
            raise NotTls
        seen[kind] = extensions.block(2)
    named = seen.get(_SERVER_NAME)
    return Hello(None if named is None else _host(named), is_encrypted=_ECH in seen)


def _host(extension: _Bytes) -> str:
    names = extension.block(2)
    if extension or names.number(1) != _HOST_NAME:
        raise NotTls
    name = names.block(2).rest()
    if names or not name.isascii() or (host := hosts.normal(name.decode())) is None:
        raise NotTls
    return host
