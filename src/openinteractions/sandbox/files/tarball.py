"""Reads a tar or tar.gz from a file as a stream of members, trusting nothing in it.

Only headers are decoded with `tarfile`; what they announce is checked here before a byte of it is
read, so that neither a header nor a compressed stream can make this program hold or produce more
than it was told to.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from openinteractions.errors import Invalid, TooLarge
from openinteractions.sandbox.files.threads import Halt

_BLOCK_BYTES: Final = 512
_BUFFER_BYTES: Final = 1 << 20
_MAX_EXTENSION_BYTES: Final = 1 << 20
_MAX_EXTENSIONS_BYTES: Final = 64 * 2**20
_MAX_RECORDS: Final = 1_000_000
"""Of all extended headers of an archive: ten for each of the most members."""
_MAX_NUMBER_DIGITS: Final = 20
_GZIP: Final = b"\x1f\x8b"
_MAX_RATIO: Final = 400
_RATIO_FROM_BYTES: Final = 128 * 2**20
_HEADERS_PER_MEMBER: Final = 4096

_KINDS: Final[dict[bytes, Literal["file", "folder", "symlink", "hardlink"]]] = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
}
_SPARSE: Final = b"GNU.sparse."
_KEPT: Final = frozenset({b"path", b"linkpath", b"size", b"mtime"})
"""The records that say something of a member here, beside those of sparse files."""
_LONG: Final = {tarfile.GNUTYPE_LONGNAME: b"path", tarfile.GNUTYPE_LONGLINK: b"linkpath"}
_PAX: Final = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_NOT_AN_ARCHIVE: Final = "Only tar and tar.gz archives can be extracted, and this is neither."
_DAMAGED: Final = "The archive is damaged"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an archive may be."""

    max_bytes: int
    """Of all its files together, unpacked."""
    max_members: int = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One member; its name and target are as the archive has them."""

    kind: Literal["file", "folder", "symlink", "hardlink"]
    name: bytes
    target: bytes
    size: int
    mode: int
    modified: float


@dataclass(slots=True)
class _Extensions:
    """What extended headers say of the member that follows; what nobody asks for is not kept."""

    of_all: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    of_next: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    record_count: int = 0
    """Of the archive so far, kept or not."""
    byte_count: int = 0

    def taken(self) -> dict[bytes, bytes]:
        both = {**self.of_all, **self.of_next}
        self.of_next = {}
        return both

    def weigh(self, content: bytes) -> None:
        """Count a header's content.

        Raises:
            TooLarge: The archive says more of its members than anyone would write.
        """
        self.byte_count += len(content)
        if self.byte_count > _MAX_EXTENSIONS_BYTES:
            raise TooLarge("The extended headers of the archive are too large.")

    def learn(self, known: dict[bytes, bytes], content: bytes) -> None:
        """Take in a pax header.

        Raises:
            Invalid: It is malformed.
            TooLarge: The archive has more records than anyone would write.
        """
        for key, value in _records(content):
            self.record_count += 1
            if self.record_count > _MAX_RECORDS:
                raise TooLarge(f"The archive has more than {_MAX_RECORDS} extended records.")
            if key in _KEPT:
                known[key] = value
            elif key.startswith(_SPARSE):
                known[_SPARSE] = b""


class Tarball:
    """An archive that is read once, from its beginning to its end."""

    def __init__(self, file: io.FileIO, limits: Limits, halt: Halt) -> None:
        self._packed = io.BufferedReader(file, _BUFFER_BYTES)
        self._is_gzip = self._packed.peek(2)[:2] == _GZIP
        self._plain: io.BufferedIOBase = self._packed
        if self._is_gzip:
            self._plain = gzip.GzipFile(fileobj=self._packed)
        self._limits = limits
        self._halt = halt
        self._read_bytes = 0
        self._left = 0
        """Bytes of the member at hand that were not read yet."""
        self._padding = 0

    def members(self) -> Iterator[Member]:
        """The members in order. Read one's bytes with `data` before asking for the next.

        Raises:
            Invalid: It is no archive, is damaged, or has what is not possible here.
            TooLarge: It is larger than its limits.
        """
        extensions = _Extensions()
        count = 0
        while (info := self._header(is_first=count == 0)) is not None:
            count += 1
            if count > 2 * self._limits.max_members:
                raise self._too_many()
            if self._extends(info, extensions):
                continue
            yield self._member(info, extensions.taken())
            self._skip()
        # What follows the end is padding; but only at its own end is a gzip known to be whole.
        while self._is_gzip and self._read(_BUFFER_BYTES):
            pass

    def data(self) -> Iterator[bytes]:
        """The bytes of the member at hand, in pieces."""
        while self._left:
            self._halt.check()
            piece = self._exactly(min(self._left, _BUFFER_BYTES))
            self._left -= len(piece)
            yield piece

    def _header(self, *, is_first: bool) -> tarfile.TarInfo | None:
        block = self._read(_BLOCK_BYTES)
        if is_first and len(block) < _BLOCK_BYTES:
            raise Invalid(_NOT_AN_ARCHIVE)
        if not block or block == bytes(_BLOCK_BYTES):
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise Invalid(_NOT_AN_ARCHIVE if is_first else f"{_DAMAGED}: {error}.") from error

    def _extends(self, info: tarfile.TarInfo, extensions: _Extensions) -> bool:
        """Take in a header that is about others; False if it is a member's own."""
        if info.type in _LONG:
            content = self._extension(info, extensions)
            extensions.of_next[_LONG[info.type]] = content.split(b"\0", 1)[0]
        elif info.type in _PAX:
            extensions.learn(extensions.of_next, self._extension(info, extensions))
        elif info.type == tarfile.XGLTYPE:
            extensions.learn(extensions.of_all, self._extension(info, extensions))
        else:
            return False
        return True

    def _extension(self, info: tarfile.TarInfo, extensions: _Extensions) -> bytes:
        if not 0 <= info.size <= _MAX_EXTENSION_BYTES:
            raise Invalid(f"{_DAMAGED}: a header in it is too large.")
        content = self._exactly(info.size)
        self._exactly(-info.size % _BLOCK_BYTES)
        extensions.weigh(content)
        return content

    def _member(self, info: tarfile.TarInfo, extra: dict[bytes, bytes]) -> Member:
        name = extra.get(b"path") or _raw(info.name)
        kind = _KINDS.get(info.type)
        if _SPARSE in extra or kind is None:
            raise Invalid(
                f"The archive has '{_shown(name)}' in it, which is no plain file, folder or link:"
                " devices, pipes and sparse files cannot be extracted."
            )
        size = _number(extra[b"size"]) if b"size" in extra else info.size
        if size < 0:
            raise Invalid(f"{_DAMAGED}: a size in it is negative.")
        self._left = size if kind == "file" else 0
        self._padding = -self._left % _BLOCK_BYTES
        return Member(
            kind=kind,
            name=name,
            target=extra.get(b"linkpath") or _raw(info.linkname),
            size=self._left,
            mode=info.mode,
            modified=_time(extra.get(b"mtime"), info.mtime),
        )

    def _skip(self) -> None:
        for _ in self.data():
            pass
        self._exactly(self._padding)

    def _exactly(self, size: int) -> bytes:
        piece = self._read(size)
        if len(piece) < size:
            raise Invalid(f"{_DAMAGED}: it ends too early.")
        return piece

    def _read(self, size: int) -> bytes:
        self._halt.check()
        try:
            piece = self._plain.read(size)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Invalid(f"{_DAMAGED}: it cannot be decompressed.") from error
        self._read_bytes += len(piece)
        self._check_size()
        return piece

    def _check_size(self) -> None:
        headers = self._limits.max_members * _HEADERS_PER_MEMBER
        if self._read_bytes > self._limits.max_bytes + headers:
            raise TooLarge(f"The archive holds more than {self._limits.max_bytes} bytes.")
        if self._is_gzip and self._read_bytes > _RATIO_FROM_BYTES:
            packed = self._packed.tell()
            if self._read_bytes > _MAX_RATIO * packed:
                raise TooLarge(f"The archive unpacks to more than {_MAX_RATIO} times its size.")

    def _too_many(self) -> TooLarge:
        return TooLarge(f"The archive has more than {self._limits.max_members} members.")


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records of a pax header: a length that counts itself, a key, `=`, a value."""
    at = 0
    while at < len(content) and content[at]:
        space = content.find(b" ", at, at + _MAX_NUMBER_DIGITS)
        length = _number(content[at:space]) if space > at else 0
        end = at + length
        if not space < end <= len(content) or content[end - 1] != ord("\n"):
            raise Invalid(f"{_DAMAGED}: an extended header in it is malformed.")
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        yield key, value
        at = end


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > _MAX_NUMBER_DIGITS:
        raise Invalid(f"{_DAMAGED}: a number in it is malformed.")
    return int(digits)


def _time(extended: bytes | None, plain: float) -> float:
    try:
        seconds = float(extended) if extended else float(plain)
    except ValueError:
        seconds = 0.0
    # Beyond these, some file systems and readers fail; NaN compares false and becomes 0.
    return seconds if 0 <= seconds < 2**33 else 0.0


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _shown(name: bytes) -> str:
    return name[:200].decode(errors="replace")
