"""Uploads that arrive in parts: kept beside the tree until they are whole.

A part may come twice, since a client that did not hear of its success sends it again. So bytes
that are there already are accepted if they are the same, and what follows them is added.

Of an upload that is over, a mark stays as long as its client may ask again: what it became, or
that it was thrown away.
"""

import contextlib
import fcntl
import os
import re
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import orjson

from openinteractions.errors import AppError, Conflict, Invalid, NotFound
from openinteractions.sandbox.files import staging
from openinteractions.sandbox.files.beneath import closing, names_in
from openinteractions.sandbox.files.site import Site
from openinteractions.sandbox.files.streams import pour, write_all
from openinteractions.sandbox.files.threads import in_thread
from openinteractions.sandbox.port import Entry, UploadState

_FOLDER: Final = "uploads"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PRIVATE: Final = 0o600
_MARK: Final = b".over"
"""No id has a point in it."""


class Part:
    """An upload that is open and locked, so that nobody else adds to it."""

    def __init__(self, site: Site, upload: str) -> None:
        self.place = -1
        """Descriptor of the folder of uploads."""
        self.fd = -1
        self.name = name_of(upload)
        self._site = site
        self._at = 0

    def open(self, *, create: bool) -> int:
        """Open and lock; the size so far.

        Raises:
            NotFound: There is none, and it is not to be made; or it is over.
            Conflict: Somebody else has it open.
        """
        self.place = staging.open_private(self._site.disk, _FOLDER)
        self._check_not_over()
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            self.fd = os.open(self.name, flags, _PRIVATE, dir_fd=self.place)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            raise _missing(self.name) from None
        except BlockingIOError:
            raise Conflict("Another part of this upload is arriving right now.") from None
        # Whoever had it until now may have been the one to end it.
        self._check_not_over()
        return os.fstat(self.fd).st_size

    def _check_not_over(self) -> None:
        if _mark(self.place, self.name) is not None:
            raise _missing(self.name)

    def seek(self, offset: int) -> None:
        """Where the next bytes belong."""
        self._at = offset
        os.utime(self.fd)

    def write(self, chunks: Sequence[bytes]) -> None:
        """Add bytes, or compare them with those that are there.

        Raises:
            Invalid: They differ.
        """
        piece = b"".join(chunks)
        with self._site.explained(()):
            known = os.pread(self.fd, len(piece), self._at)
            if not piece.startswith(known):
                raise Invalid(
                    f"The bytes from offset {self._at} on are not those that arrived before."
                )
            self._site.quota.spend(len(piece) - len(known))
            os.lseek(self.fd, self._at + len(known), os.SEEK_SET)
            write_all(self.fd, memoryview(piece)[len(known) :])
        self._at += len(piece)

    def size(self) -> int:
        """How much has arrived."""
        return os.fstat(self.fd).st_size

    def end(self, written: Sequence[Entry]) -> None:
        """Say what it became; what is left of it goes."""
        _put_mark(self._site, self.place, self.name, written)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self.place)

    def close(self) -> None:
        """Let it go."""
        for fd in (self.fd, self.place):
            if fd >= 0:
                os.close(fd)


def name_of(upload: str) -> bytes:
    """The file name of an upload.

    Raises:
        Invalid: That is no id.
    """
    if not _ID.fullmatch(upload):
        raise Invalid("The id of an upload has letters, digits, '-' and '_' only, 128 at most.")
    return upload.encode()


def _missing(name: bytes) -> NotFound:
    return NotFound(f"Upload '{name.decode()}' not found: it is finished, expired or never began.")


@asynccontextmanager
async def opened(site: Site, upload: str, *, create: bool = False) -> AsyncGenerator[Part]:
    """An upload, open and locked."""
    part = Part(site, upload)
    try:
        await in_thread(part.open, create=create)
        yield part
    finally:
        part.close()


async def append(
    site: Site, upload: str, offset: int, chunks: AsyncIterable[bytes], *, max_bytes: int | None
) -> int:
    """Add a part; the size then. An upload begins with its first part at offset 0.

    If the part ends early, what arrived of it stays.

    Raises:
        Invalid: The offset is behind the end, or other bytes are there.
        NotFound: No such upload, and this is not its beginning.
    """
    async with opened(site, upload, create=offset == 0) as part:
        size = await in_thread(part.size)
        if not 0 <= offset <= size:
            raise Invalid(f"The upload has {size} bytes: the next offset is {size}, not {offset}.")
        await in_thread(part.seek, offset)
        rest = None if max_bytes is None else max(0, max_bytes - offset)
        await pour(chunks, part.write, max_bytes=rest)
        return await in_thread(part.size)


def state(site: Site, upload: str) -> UploadState:
    """How far an upload has come, or what became of it.

    Raises:
        NotFound: There is none.
    """
    name = name_of(upload)
    with closing(staging.open_private(site.disk, _FOLDER)) as place:
        over = _mark(place, name)
        if over is not None:
            return over
        try:
            size = os.stat(name, dir_fd=place, follow_symlinks=False).st_size
        except FileNotFoundError:
            raise _missing(name) from None
    return UploadState(size_bytes=size)


def delete(site: Site, upload: str) -> None:
    """Throw an upload away, also before it has begun; one that is over stays as it is."""
    name = name_of(upload)
    with closing(staging.open_private(site.disk, _FOLDER)) as place:
        if _mark(place, name) is None:
            _put_mark(site, place, name, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=place)


def _mark(place: int, name: bytes) -> UploadState | None:
    """What became of an upload; None: it is not over, or nobody knows of it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(name + _MARK, flags, dir_fd=place), "rb") as file:
            written = orjson.loads(zlib.decompress(file.read()))
    except FileNotFoundError:
        return None
    except (zlib.error, orjson.JSONDecodeError):
        # Its disk went down in that moment.
        return None
    entries = None if written is None else [Entry(**each) for each in written]
    return UploadState(is_over=True, written=entries)


def _put_mark(site: Site, place: int, name: bytes, written: Sequence[Entry] | None) -> None:
    """Remember that an upload is over; where there is no room for that, it is not remembered."""
    content = zlib.compress(orjson.dumps(None if written is None else list(written)))
    fresh = staging.new_name() + _MARK
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError, AppError):
        site.quota.spend(len(content))
        try:
            with closing(os.open(fresh, flags, _PRIVATE, dir_fd=place)) as fd:
                write_all(fd, content)
            os.rename(fresh, name + _MARK, src_dir_fd=place, dst_dir_fd=place)
        except OSError:
            os.unlink(fresh, dir_fd=place)
            raise


def expire(site: Site, older_than_s: float) -> int:
    """Throw away uploads that nothing was added to for so long; how many."""
    before = time.time() - older_than_s
    count = 0
    with closing(staging.open_private(site.disk, _FOLDER)) as place:
        for name in names_in(place):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(name, dir_fd=place, follow_symlinks=False).st_mtime < before:
                    os.unlink(name, dir_fd=place)
                    count += 1
    return count
