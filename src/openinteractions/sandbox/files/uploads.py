"""Uploads that arrive in parts: kept beside the tree until they are whole.

A part may come twice, since a client that did not hear of its success sends it again. So bytes
that are there already are accepted if they are the same, and what follows them is added.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from openinteractions.errors import Conflict, Invalid, NotFound
from openinteractions.sandbox.files import staging
from openinteractions.sandbox.files.beneath import closing, names_in
from openinteractions.sandbox.files.site import Site
from openinteractions.sandbox.files.streams import pour, write_all
from openinteractions.sandbox.files.threads import in_thread

_FOLDER: Final = "uploads"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PRIVATE: Final = 0o600


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
            NotFound: There is none, and it is not to be made.
            Conflict: Somebody else has it open.
        """
        self.place = staging.open_private(self._site.disk, _FOLDER)
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            self.fd = os.open(self.name, flags, _PRIVATE, dir_fd=self.place)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            raise _missing(self.name) from None
        except BlockingIOError:
            raise Conflict("Another part of this upload is arriving right now.") from None
        return os.fstat(self.fd).st_size

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

    def remove(self) -> None:
        """Throw it away."""
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


def size(site: Site, upload: str) -> int:
    """How much of an upload has arrived.

    Raises:
        NotFound: There is none.
    """
    name = name_of(upload)
    with closing(staging.open_private(site.disk, _FOLDER)) as place:
        try:
            return os.stat(name, dir_fd=place, follow_symlinks=False).st_size
        except FileNotFoundError:
            raise _missing(name) from None


def delete(site: Site, upload: str) -> None:
    """Throw an upload away; nothing happens if there is none."""
    name = name_of(upload)
    with (
        closing(staging.open_private(site.disk, _FOLDER)) as place,
        contextlib.suppress(FileNotFoundError),
    ):
        os.unlink(name, dir_fd=place)


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
