"""A folder of the tree as a tar, made piece by piece while it is sent.

A member's size is fixed in its header. Small files are read before the header is written, so it
always is right; a large one that grows meanwhile is cut at that size, and one that shrinks is
filled up with zeros, as GNU tar does. Pipes, sockets and devices are left out, and so are files
that this program may not read. Links are kept as they are, and never followed.
"""

import errno
import itertools
import os
import stat
import tarfile
from collections.abc import Generator, Iterator
from typing import Final

from openinteractions.errors import TooLarge
from openinteractions.sandbox.files.beneath import closing, folder_at, reopen
from openinteractions.sandbox.files.paths import Parts, is_top
from openinteractions.sandbox.files.threads import Halt
from openinteractions.sandbox.port import UID

_PIECE_BYTES: Final = 256 * 1024
_READ_BYTES: Final = 1 << 20
_SORTED_AT_ONCE: Final = 10_000
_RECORD_BYTES: Final = 10_240
_BLOCK_BYTES: Final = 512
_MAX_BYTES: Final = 1 << 40
"""More than any disk here has: only holes of sparse files can be that large."""


class Packer:
    """Packs one folder. Iterate over `pieces` in threads."""

    def __init__(self, base: int, *, is_root: bool, is_deep: bool, halt: Halt) -> None:
        """Args:
        base: Descriptor of the folder, which must stay open.
        is_root: It is the tree's root.
        is_deep: All that is below it, with its folders; else only the files that are in it.
        halt: Ends the work early.
        """
        self._base = base
        self._is_root = is_root
        self._is_deep = is_deep
        self._halt = halt
        self._bytes = 0

    def pieces(self) -> Generator[bytes]:
        """The tar, in pieces of about a quarter of a megabyte or more."""
        waiting = bytearray()
        for part in self._members():
            self._bytes += len(part)
            if self._bytes > _MAX_BYTES:
                raise TooLarge("The files are too large for one archive.")
            waiting += part
            if len(waiting) >= _PIECE_BYTES:
                yield bytes(waiting)
                waiting.clear()
        end = self._bytes + 2 * _BLOCK_BYTES
        waiting += bytes(2 * _BLOCK_BYTES + -end % _RECORD_BYTES)
        yield bytes(waiting)

    def _members(self) -> Iterator[bytes]:
        todo: list[Parts] = [()]
        while todo:
            path = todo.pop()
            folders: list[Parts] = []
            try:
                with folder_at(self._base, path) as folder:
                    if path:
                        yield _header(path, os.fstat(folder), tarfile.DIRTYPE)
                    for entry in self._entries(folder, at_top=self._is_root and not path):
                        member = (*path, os.fsencode(entry.name))
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(member)
                        else:
                            yield from self._file(folder, member)
            except OSError as error:
                if error.errno not in _PASSED_OVER:
                    raise
            if self._is_deep:
                todo += sorted(folders, reverse=True)

    def _entries(self, folder: int, *, at_top: bool) -> Iterator[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            while some := list(itertools.islice(entries, _SORTED_AT_ONCE)):
                for entry in sorted(some, key=lambda one: one.name):
                    self._halt.check()
                    if not at_top or _is_packed(entry):
                        yield entry

    def _file(self, folder: int, path: Parts) -> Iterator[bytes]:
        try:
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            with closing(os.open(path[-1], flags, dir_fd=folder)) as found:
                status = os.fstat(found)
                if stat.S_ISLNK(status.st_mode):
                    yield _header(path, status, tarfile.SYMTYPE, os.readlink(b"", dir_fd=found))
                elif stat.S_ISREG(status.st_mode):
                    with closing(reopen(found, os.O_RDONLY)) as fd:
                        yield from self._content(fd, path)
        except OSError as error:
            if error.errno not in _PASSED_OVER:
                raise

    def _content(self, fd: int, path: Parts) -> Iterator[bytes]:
        status = os.fstat(fd)
        first = os.pread(fd, _READ_BYTES, 0)
        size = len(first) if len(first) < _READ_BYTES else status.st_size
        yield _header(path, status, tarfile.REGTYPE, size=size)
        first = first[:size]
        yield first
        done = len(first)
        while done < size:
            self._halt.check()
            part = os.pread(fd, min(_READ_BYTES, size - done), done)
            if not part:
                part = bytes(min(_READ_BYTES, size - done))
            done += len(part)
            yield part
        yield bytes(-size % _BLOCK_BYTES)


def _is_packed(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of the tree's root is of the environment."""
    return is_top(os.fsencode(entry.name)) and entry.is_dir(follow_symlinks=False)


_PASSED_OVER: Final = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.ENXIO,
}
"""Gone or swapped since it was listed, or not for this program to read."""


def _header(
    path: Parts, status: os.stat_result, kind: bytes, target: bytes = b"", *, size: int = 0
) -> bytes:
    info = tarfile.TarInfo(os.fsdecode(b"/".join(path)))
    info.type = kind
    info.size = size
    info.mode = stat.S_IMODE(status.st_mode)
    info.mtime = max(0, int(status.st_mtime))
    info.uid = info.gid = UID
    info.uname = info.gname = "agent"
    info.linkname = os.fsdecode(target)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
