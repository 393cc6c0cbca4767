"""All operations on the files of one environment, from outside its sandbox."""

import contextlib
import io
import os
import stat
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

from openinteractions.errors import Invalid, NotFound
from openinteractions.sandbox.files import kernel, staging, uploads
from openinteractions.sandbox.files.beneath import closing, reopen
from openinteractions.sandbox.files.entries import entry_at, entry_of, find
from openinteractions.sandbox.files.listing import Page, Usage, Window, page, usage
from openinteractions.sandbox.files.pack import Packer
from openinteractions.sandbox.files.paths import Parts, for_writing, parse, shown
from openinteractions.sandbox.files.problems import explained
from openinteractions.sandbox.files.quota import Boundless, Quota
from openinteractions.sandbox.files.site import Site
from openinteractions.sandbox.files.streams import pour, write_chunks
from openinteractions.sandbox.files.tarball import Limits, Tarball
from openinteractions.sandbox.files.threads import Halt, haltable, in_thread, settle, start
from openinteractions.sandbox.files.unpack import unpack
from openinteractions.sandbox.port import UID, Entry, SandboxError, UploadState

_T = TypeVar("_T")

Landing: TypeAlias = AbstractAsyncContextManager[None]
"""Within it a change takes place; what it raises keeps the change from being made."""

_CHUNK_BYTES: Final = 1 << 20
_PRIVATE: Final = 0o600
_NEVER_BEFORE: Final = 24 * 3600.0


class Changed(SandboxError):
    """A file became shorter while it was read: what follows cannot be sent."""

    code = "file_changed"


class Tree:
    """An environment's files: safe against whatever runs in its sandbox at the same time.

    Paths are those of `paths.parse`; entries are described in `entries`. Everything that writes
    works beside the tree first, so `root` must have a folder of its own on its disk. A link before
    the end of a path is followed while it stays in the environment; at the end of a path it is
    followed for reading, and replaced or removed itself by what writes.

    Unless said otherwise, operations raise `NotFound`, `Invalid` for paths that cannot be,
    `Forbidden` where a file's mode shuts this program out, `TooLarge` if the disk is full, and
    `SandboxError` if it fails.
    """

    def __init__(
        self,
        root: Path,
        *,
        uid: int = UID,
        gid: int = UID,
        environment: str = "",
        quota: Quota | None = None,
    ) -> None:
        """Nothing is opened.

        Args:
            root: The folder of the three folders, and of those beside them.
            uid: Whose everything is that is written.
            gid: The same, its group.
            environment: The id to name in messages.
            quota: What may be written, where the disk does not bound it.

        Raises:
            SetupError: This kernel cannot keep paths inside a folder.
        """
        kernel.require()
        self._site = Site(
            root=root, uid=uid, gid=gid, environment=environment, quota=quota or Boundless()
        )

    async def stat(self, path: str) -> Entry:
        """The entry of a file, folder, or link that leads to neither."""
        parts = parse(path)
        return await self._in_root(parts, entry_at)

    async def list(
        self, path: str = "", *, recursive: bool = False, after: str = "", limit: int = 1000
    ) -> Page:
        """What is in a folder, sorted by path; of a file its one entry.

        Args:
            path: The folder.
            recursive: All descendants, each folder before what is in it; links to folders are
                not entered.
            after: Begin after this path: `next_after` of the page before.
            limit: Longest page.
        """
        parts = parse(path)
        halt = Halt()
        place = tuple(part for part in after.encode(errors="replace").split(b"/") if part)
        window = Window(after=place, limit=max(1, limit), is_deep=recursive)
        return await self._in_root(parts, page, window, halt, halt=halt)

    async def usage(self, *, within_s: float = 10.0) -> Usage:
        """How many files there are and how large they are together."""
        halt = Halt()

        def count(root: int, _: Parts) -> Usage:
            return usage(root, within_s=within_s, halt=halt)

        return await self._in_root((), count, halt=halt)

    @asynccontextmanager
    async def read(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator["Reading"]:
        """A file's bytes, while the context is open.

        Raises:
            Invalid: Also if it is no file, or `offset` is behind its end.
        """
        parts = parse(path)
        reading = Reading(self._site, parts)
        try:
            await in_thread(reading.open, offset, length)
            yield reading
        finally:
            await reading.close()

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[bytes],
        *,
        overwrite: bool = False,
        mode: int | None = None,
        max_bytes: int | None = None,
        landing: Landing | None = None,
    ) -> Entry:
        """Make or replace a file, once all of it has arrived; folders above it are made.

        Args:
            path: Where.
            chunks: Its bytes.
            overwrite: Replace a file or link that is there.
            mode: Its permissions; None: those of the replaced file, else `rw-r--r--`.
            max_bytes: Longest file.
            landing: Entered when all of it has arrived.

        Raises:
            Conflict: Something is there, and is not to be overwritten; nothing was changed.
        """
        parts = for_writing(path)
        await self._site.quota.check()
        await in_thread(self._site.check_free, parts, overwrite=overwrite)
        async with self._staged(parts, chunks, max_bytes) as staged, landing or nullcontext():
            return await in_thread(self._land, staged, overwrite, mode)

    async def mkdir(self, path: str) -> Entry:
        """Make a folder and those above it; one that is there is left as it is.

        Raises:
            Conflict: It is there, and no folder.
        """
        parts = for_writing(path, is_folder=True)
        await self._site.quota.check()
        return await in_thread(self._site.mkdir, parts)

    async def missing_tops(self, names: Sequence[str]) -> Sequence[str]:
        """Those of these folders at the top that are not there."""
        found = await in_thread(self._site.missing, [name.encode() for name in names])
        return [name.decode() for name in found]

    async def add_tops(self, names: Sequence[str]) -> None:
        """Make folders at the top, beside the three; nothing happens to one that is there.

        A sandbox that runs does not get them.
        """
        await in_thread(self._site.add_tops, [name.encode() for name in names])

    async def delete(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, link or folder.

        Raises:
            Invalid: Also if the folder is not empty, without `recursive`.
        """
        halt = Halt()
        parts = for_writing(path)
        work = partial(self._site.delete, parts, recursive=recursive, halt=halt)
        await haltable(halt, work)

    @asynccontextmanager
    async def tar(
        self, path: str = "", *, recursive: bool = False
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        """A folder as an uncompressed tar, with names from that folder on.

        Args:
            path: The folder; the root's tar has all folders at the top.
            recursive: All that is below it, with empty folders; else the files directly in it.

        Raises:
            Invalid: Also if it is no folder.
        """
        parts = parse(path)
        packing = _Packing(self._site, parts, is_deep=recursive)
        try:
            await in_thread(packing.open)
            yield packing.pieces()
        finally:
            await in_thread(packing.close)

    async def extract(
        self,
        path: str,
        chunks: AsyncIterable[bytes],
        *,
        overwrite: bool = False,
        max_bytes: int,
        landing: Landing | None = None,
    ) -> Sequence[Entry]:
        """Unpack a tar or tar.gz under a folder, whole or not at all; what it put there, by path.

        The archive itself is on the disk too while this runs.

        Args:
            path: The folder, made if absent. Under the root, the archive has folders that are
                there.
            chunks: The archive.
            overwrite: Replace files that are there; folders are always merged.
            max_bytes: Most that its files may have together, and that it may have itself.
            landing: Entered when all of it has arrived.

        Raises:
            Conflict: A member is there already, and is not to be overwritten.
        """
        parts = _for_extracting(path)
        await self._site.quota.check()
        async with self._staged(parts, chunks, max_bytes) as staged, landing or nullcontext():
            return await self._unpack(staged.fd, parts, overwrite, max_bytes)

    async def append(
        self,
        upload: str,
        offset: int,
        chunks: AsyncIterable[bytes],
        *,
        max_bytes: int | None = None,
    ) -> int:
        """Add a part to an upload, see `uploads.append`; its size then."""
        await self._site.quota.check()
        return await uploads.append(self._site, upload, offset, chunks, max_bytes=max_bytes)

    async def upload_state(self, upload: str) -> UploadState:
        """How much of an upload has arrived, or what it became, for a day at least."""
        return await in_thread(uploads.state, self._site, upload)

    async def delete_upload(self, upload: str) -> None:
        """Throw an upload away: nothing can be added to it, or made of it, any more."""
        await in_thread(uploads.delete, self._site, upload)

    async def commit(self, upload: str, path: str, *, overwrite: bool = False) -> Entry:
        """Make an upload the file at a path, as `write` does, without copying it.

        One that is over gives what it became.
        """
        parts = for_writing(path)
        try:
            async with uploads.opened(self._site, upload) as part:
                staged = _Staged(part.place, part.fd, part.name, parts)
                return await in_thread(self._land_part, part, staged, overwrite)
        except NotFound as error:
            (entry,) = await self._became(upload, error)
            return entry

    def _land_part(self, part: uploads.Part, staged: "_Staged", overwrite: bool) -> Entry:
        entry = self._land(staged, overwrite, None)
        part.end([entry])
        return entry

    async def _became(self, upload: str, error: NotFound) -> Sequence[Entry]:
        """What an upload that is not there became before; otherwise the error."""
        state = await in_thread(uploads.state, self._site, upload)
        if state.written is None:
            raise error
        return state.written

    async def commit_archive(
        self, upload: str, path: str, *, overwrite: bool = False, max_bytes: int
    ) -> Sequence[Entry]:
        """Unpack an upload, as `extract` does, and throw it away. One that is over as above."""
        parts = _for_extracting(path)
        await self._site.quota.check()
        try:
            async with uploads.opened(self._site, upload) as part:
                return await self._unpack(part.fd, parts, overwrite, max_bytes, then=part.end)
        except NotFound as error:
            return await self._became(upload, error)

    async def clean(self, *, uploads_older_than_s: float = _NEVER_BEFORE) -> None:
        """Remove what an earlier process did not finish, and uploads that nobody goes on with."""
        halt = Halt()
        await haltable(halt, staging.sweep, self._site.disk, halt)
        await in_thread(uploads.expire, self._site, uploads_older_than_s)

    async def _in_root(
        self,
        parts: Parts,
        work: "Callable[..., _T]",
        *args: object,
        halt: Halt | None = None,
    ) -> _T:
        """Run work in a thread with the root open: `work(root, parts, …)`."""

        def run() -> _T:
            with self._site.explained(parts), self._site.opened() as root:
                return work(root, parts, *args)

        return await settle(start(run), halt)

    @asynccontextmanager
    async def _staged(
        self, parts: Parts, chunks: AsyncIterable[bytes], max_bytes: int | None
    ) -> AsyncGenerator["_Staged"]:
        """A file in staging with these bytes; gone at the end unless it was moved."""
        staged = _Staged(-1, -1, staging.new_name(), parts)
        try:
            await in_thread(staged.open, self._site)
            await pour(chunks, staged.write, max_bytes=max_bytes)
            yield staged
        finally:
            await in_thread(staged.close)

    def _land(self, staged: "_Staged", overwrite: bool, mode: int | None) -> Entry:
        with self._site.explained(staged.parts):
            return self._site.land_file(
                staged.place, staged.name, staged.parts, overwrite=overwrite, mode=mode
            )

    async def _unpack(
        self,
        fd: int,
        parts: Parts,
        overwrite: bool,
        max_bytes: int,
        *,
        then: Callable[[Sequence[Entry]], None] | None = None,
    ) -> Sequence[Entry]:
        halt = Halt()
        limits = Limits(max_bytes=max_bytes)

        def work() -> list[Entry]:
            os.lseek(fd, 0, os.SEEK_SET)
            with io.FileIO(fd, closefd=False) as file:
                tarball = Tarball(file, limits, halt)
                entries = unpack(
                    self._site, tarball, parts, limits=limits, overwrite=overwrite, halt=halt
                )
            if then is not None:
                then(entries)
            return entries

        return await haltable(halt, work)


def _for_extracting(path: str) -> Parts:
    """The root will do: then each member's name says where it goes."""
    return for_writing(path, is_folder=True) if parse(path) else ()


@dataclass(slots=True)
class _Staged:
    """A file that is open beside the tree."""

    place: int
    fd: int
    name: bytes
    parts: Parts
    """Where it is to go."""
    quota: Quota = field(default_factory=Boundless)

    def open(self, site: Site) -> None:
        self.quota = site.quota
        with site.explained(self.parts):
            self.place = staging.open_staging(site.disk)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = os.open(self.name, flags, _PRIVATE, dir_fd=self.place)

    def write(self, chunks: Sequence[bytes]) -> None:
        self.quota.spend(sum(map(len, chunks)))
        with explained(self.parts):
            write_chunks(self.fd, chunks)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.name, dir_fd=self.place)
        if self.place >= 0:
            os.close(self.place)


class Reading:
    """A file that is being read. Its length was fixed when it was opened."""

    entry: Entry
    size: int
    """Bytes that `chunks` gives."""
    whole: int
    """Bytes of the whole file."""

    def __init__(self, site: Site, parts: Parts) -> None:
        self._site = site
        self._parts = parts
        self._fd = -1
        self._at = 0

    def open(self, offset: int, length: int | None) -> None:
        """Open it; see `Tree.read`."""
        with self._site.explained(self._parts), self._site.opened() as root:
            found = find(root, self._parts)
            with closing(found.fd):
                self._check(found.status.mode)
                self.entry = entry_of(found, self._parts)
                self._fd = reopen(found.fd, os.O_RDONLY)
        self.whole = os.fstat(self._fd).st_size
        rest = self.whole - offset
        if not 0 <= offset <= self.whole:
            raise Invalid(f"The file has {self.whole} bytes: there is nothing at offset {offset}.")
        self._at = offset
        self.size = rest if length is None else max(0, min(length, rest))
        os.posix_fadvise(self._fd, offset, self.size, os.POSIX_FADV_SEQUENTIAL)

    def _check(self, mode: int) -> None:
        if stat.S_ISDIR(mode):
            raise Invalid(f"Path '{shown(self._parts)}' is a directory.")
        if not stat.S_ISREG(mode):
            raise Invalid(f"Path '{shown(self._parts)}' is a link that leads to no file.")

    async def chunks(self, chunk_bytes: int = _CHUNK_BYTES) -> AsyncIterator[bytes]:
        """The bytes, exactly `size` of them.

        Raises:
            Changed: There are fewer now.
        """
        end = self._at + self.size
        while self._at < end:
            size = min(chunk_bytes, end - self._at)
            with self._site.explained(self._parts):
                chunk = await in_thread(os.pread, self._fd, size, self._at)
            if not chunk:
                raise Changed(f"Path '{shown(self._parts)}' became shorter while it was read.")
            self._at += len(chunk)
            yield chunk

    async def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            await in_thread(os.close, self._fd)


class _Packing:
    """A tar that is being made."""

    def __init__(self, site: Site, parts: Parts, *, is_deep: bool) -> None:
        self._site = site
        self._parts = parts
        self._is_deep = is_deep
        self._halt = Halt()
        self._base = -1
        self._pieces: Generator[bytes] | None = None

    def open(self) -> None:
        with self._site.explained(self._parts), self._site.opened() as root:
            found = find(root, self._parts)
            self._base = found.fd
            if not found.is_folder:
                raise Invalid(f"Path '{shown(self._parts)}' is not a directory.")
        is_root = not self._parts
        packer = Packer(self._base, is_root=is_root, is_deep=self._is_deep, halt=self._halt)
        self._pieces = packer.pieces()

    async def pieces(self) -> AsyncIterator[bytes]:
        while (piece := await settle(start(self._next), self._halt)) is not None:
            yield piece

    def _next(self) -> bytes | None:
        with self._site.explained(self._parts):
            return next(self._pieces, None) if self._pieces is not None else None

    def close(self) -> None:
        if self._pieces is not None:
            self._pieces.close()
        if self._base >= 0:
            os.close(self._base)
