"""HTTP/1.1, strictly (RFC 9112): what two readers could understand differently is refused.

Heads are read whole and written anew from their parts, bodies are taken out of their framing and
framed anew. So nothing that was not understood here reaches either side.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from openinteractions.sandbox.port import Duplex

Fields: TypeAlias = list[tuple[bytes, bytes]]
Framing: TypeAlias = int | Literal["chunked", "close"]
"""How a body ends: after so many bytes, with its last chunk, or with the connection."""

MAX_HEAD = 64 * 1024
_MAX_FIELDS = 256
_MAX_CHUNK_LINE = 4096
_MAX_CHUNK = 1 << 40
_READ = 256 * 1024
_NO_CONTENT = 204
_NOT_MODIFIED = 304
_OK = 200

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_REQUEST = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])")
_RESPONSE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate",
        b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade",
        b"http2-settings", b"content-length",
    }
)  # fmt: skip
_NEVER_NAMED = frozenset({b"host", b"content-length", b"transfer-encoding"})


class BadMessage(Exception):
    """A message that is malformed, or that could be understood in two ways."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class Head:
    """The fields of a message."""

    minor: int
    """1 for HTTP/1.1, 0 for HTTP/1.0."""
    fields: Fields

    def values(self, name: bytes) -> list[bytes]:
        """All values of a field, by its lower-case name."""
        return [value for each, value in self.fields if each.lower() == name]

    def tokens(self, name: bytes) -> list[bytes]:
        """The lower-case elements of a list field."""
        found = (
            token.strip().lower() for value in self.values(name) for token in value.split(b",")
        )
        return [token for token in found if token]

    def is_persistent(self) -> bool:
        """Whether the connection may serve for another message."""
        options = self.tokens(b"connection")
        return b"close" not in options and (self.minor == 1 or b"keep-alive" in options)

    def end_to_end(self) -> Fields:
        """Fields that are meant for the other end; framing is not among them.

        Raises:
            BadMessage: `Connection` names a field that everybody needs.
        """
        named = set(self.tokens(b"connection"))
        if named & _NEVER_NAMED:
            raise BadMessage("Connection must not name Host or a length")
        dropped = _HOP_BY_HOP | named
        return [each for each in self.fields if each[0].lower() not in dropped]

    def declared(self) -> Framing | None:
        """How the body is framed, by the fields alone; None where they do not say.

        Raises:
            BadMessage: They can be understood in two ways.
        """
        lengths, codings = self.values(b"content-length"), self.values(b"transfer-encoding")
        if codings:
            if lengths:
                raise BadMessage("both Content-Length and Transfer-Encoding")
            if self.minor == 0:
                raise BadMessage("Transfer-Encoding in HTTP/1.0")
            if len(codings) != 1 or codings[0].lower() != b"chunked":
                raise BadMessage("a Transfer-Encoding other than chunked")
            return "chunked"
        if not lengths:
            return None
        if len(lengths) != 1 or _LENGTH.fullmatch(lengths[0]) is None:
            raise BadMessage("a Content-Length that is not one number")
        return int(lengths[0])


@dataclass(slots=True)
class Request(Head):
    """The head of a request."""

    method: bytes
    target: bytes

    def framing(self) -> Framing:
        """How its body ends; 0 where it has none.

        Raises:
            BadMessage: That is not clear.
        """
        return self.declared() or 0


@dataclass(slots=True)
class Response(Head):
    """The head of a response."""

    status: int
    phrase: bytes

    def framing(self, method: bytes) -> Framing:
        """How the body of the answer to such a request ends.

        Raises:
            BadMessage: That is not clear.
        """
        declared = self.declared()
        if method == b"HEAD" or self.status < _OK or self.status in {_NO_CONTENT, _NOT_MODIFIED}:
            return 0
        return "close" if declared is None else declared

    def length_shown(self) -> Fields:
        """The length that an answer without a body speaks of (to HEAD, or 304)."""
        return [(b"Content-Length", value) for value in self.values(b"content-length")]


def parse_request(head: bytes) -> Request:
    """Read a request's head, up to and without its empty line.

    Raises:
        BadMessage: It is malformed.
    """
    first, fields = _split(head)
    found = _REQUEST.fullmatch(first)
    if found is None:
        raise BadMessage("a malformed request line")
    return Request(int(found[3]), fields, found[1], found[2])


def parse_response(head: bytes) -> Response:
    """Read a response's head, up to and without its empty line.

    Raises:
        BadMessage: It is malformed.
    """
    first, fields = _split(head)
    found = _RESPONSE.fullmatch(first)
    if found is None:
        raise BadMessage("a malformed status line")
    return Response(int(found[1]), fields, int(found[2]), found[3] or b"")


def _split(head: bytes) -> tuple[bytes, Fields]:
    ends = head.count(b"\r\n")
    if head.count(b"\n") != ends or head.count(b"\r") != ends:
        raise BadMessage("a line that does not end in CRLF")
    if ends > _MAX_FIELDS:
        raise BadMessage("too many header fields")
    first, *lines = head.split(b"\r\n")
    return first, [field(line) for line in lines]


def field(line: bytes) -> tuple[bytes, bytes]:
    """Name and value of a header line.

    Raises:
        BadMessage: It is malformed, or continues the line before.
    """
    name, colon, value = line.partition(b":")
    if not colon or _TOKEN.fullmatch(name) is None:
        raise BadMessage("a malformed header field")
    if _VALUE.fullmatch(value) is None:
        raise BadMessage("a header field with control characters")
    return name, value.strip(b" \t")


def head(first: bytes, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A head as it goes over the wire."""
    lines = [first, *(name + b": " + value for name, value in fields), b"", b""]
    return b"\r\n".join(lines)


def framed(framing: Framing | None) -> Fields:
    """The field that says how a body ends."""
    if framing == "chunked":
        return [(b"Transfer-Encoding", b"chunked")]
    return [(b"Content-Length", b"%d" % framing)] if isinstance(framing, int) else []


class Wire:
    """A stream that can be read by head, by line and by number of bytes."""

    def __init__(self, stream: Duplex, early: bytes = b"") -> None:
        self.stream = stream
        self._buffer = bytearray(early)
        self.received = 0
        """Bytes taken out of it."""
        self.sent = 0

    @property
    def held(self) -> int:
        """Bytes that came and that nobody has taken."""
        return len(self._buffer)

    async def fill(self) -> bool:
        """Wait for more bytes; False at the end."""
        more = await self.stream.read(_READ)
        self._buffer += more
        return bool(more)

    async def head(self) -> bytes | None:
        """The next head, without its empty line; None if the stream ends before it begins.

        Raises:
            BadMessage: It is too long, or cut off.
        """
        looked = 0
        while True:
            # One empty line before a message is to be forgiven (RFC 9112, 2.2).
            if self._buffer.startswith(b"\r\n"):
                del self._buffer[:2]
            end = self._buffer.find(b"\r\n\r\n", looked)
            if (end if end >= 0 else len(self._buffer)) > MAX_HEAD:
                raise BadMessage(f"a head of more than {MAX_HEAD} bytes")
            if end >= 0:
                return self._taken(end, skip=4)
            if b"\n\n" in self._buffer or b"\n\r\n" in self._buffer:
                raise BadMessage("a line that does not end in CRLF")
            looked = max(0, len(self._buffer) - 3)
            if not await self.fill():
                if self._buffer:
                    raise BadMessage("a head that is cut off")
                return None

    async def line(self) -> bytes:
        """The next line, without its CRLF.

        Raises:
            BadMessage: It is too long, or cut off.
        """
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MAX_CHUNK_LINE:
                raise BadMessage("a chunk's line that is too long")
            if not await self.fill():
                raise BadMessage("a body that is cut off")
        if end > _MAX_CHUNK_LINE:
            raise BadMessage("a chunk's line that is too long")
        line = self._taken(end, skip=1)
        if not line.endswith(b"\r") or b"\r" in line[:-1]:
            raise BadMessage("a line that does not end in CRLF")
        return line[:-1]

    async def some(self, limit: int = _READ) -> bytes:
        """Up to `limit` bytes; `b""` at the end."""
        if self._buffer:
            return self._taken(min(limit, len(self._buffer)))
        taken = await self.stream.read(min(limit, _READ))
        self.received += len(taken)
        return taken

    async def write(self, data: bytes) -> None:
        """Send."""
        self.sent += len(data)
        await self.stream.write(data)

    def peek(self) -> bytes:
        """What came and was not taken."""
        return bytes(self._buffer)

    def _taken(self, count: int, *, skip: int = 0) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[: count + skip]
        self.received += count + skip
        return taken


class Body:
    """The content of a message, taken out of its framing."""

    def __init__(self, wire: Wire, framing: Framing) -> None:
        self._wire = wire
        self.framing: Framing = framing
        self._left = framing if isinstance(framing, int) else 0
        self.is_done = framing == 0
        """Whether all of it was read."""
        self.trailers: Fields = []
        """Fields after the last chunk."""

    async def read(self) -> bytes:
        """The next piece; `b""` after the last.

        Raises:
            BadMessage: Its framing is malformed, or it is cut off.
            ConnectionError: The connection broke.
        """
        if self.is_done:
            return b""
        if self.framing == "close":
            piece = await self._wire.some()
            self.is_done = not piece
            return piece
        if self.framing == "chunked" and self._left == 0:
            await self._begin_chunk()
            if self.is_done:
                return b""
        piece = await self._wire.some(min(self._left, _READ))
        if not piece:
            raise BadMessage("a body that is cut off")
        self._left -= len(piece)
        if self._left == 0:
            await self._end_piece()
        return piece

    async def _end_piece(self) -> None:
        if self.framing != "chunked":
            self.is_done = True
        elif await self._wire.line():
            raise BadMessage("a chunk that is longer than it says")

    async def _begin_chunk(self) -> None:
        found = _CHUNK.fullmatch(await self._wire.line())
        if found is None:
            raise BadMessage("a malformed chunk")
        self._left = int(found[1], 16)
        if self._left > _MAX_CHUNK:
            raise BadMessage("a chunk that is too long")
        if self._left:
            return
        while line := await self._wire.line():
            name, value = field(line)
            if len(self.trailers) >= _MAX_FIELDS:
                raise BadMessage("too many trailer fields")
            if name.lower() not in _HOP_BY_HOP | _NEVER_NAMED:
                self.trailers.append((name, value))
        self.is_done = True


def chunk(piece: bytes) -> bytes:
    """A chunk with this content, which must not be empty."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def last_chunk(trailers: Fields) -> bytes:
    """The end of a chunked body."""
    return head(b"0", trailers)
