"""Measuring and copying trees that a sandbox may be changing at the same time.

Every step goes from an open folder to a name in it, and follows no link: whatever the sandbox swaps
meanwhile, nothing outside its tree is read or written.
"""

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# <https://man7.org/linux/man-pages/man2/ioctl_ficlone.2.html>
_FICLONE = 0x40049409
_MAX_DEPTH = 200
_BLOCK = 512
_FOLDER_BYTES = 4096
_MAX_PATH = 4096
_LOOK_EVERY = 64
_SEVERAL = 2


@dataclass(slots=True)
class Usage:
    """What a tree holds."""

    file_count: int = 0
    """Files and links, without folders."""
    size_bytes: int = 0
    """As the files say themselves; holes count."""
    disk_bytes: int = 0
    """What they take on the disk, folders too."""
    entry_count: int = 0
    """Names of all kinds."""
    is_too_deep: bool = False
    """Some of it is nested so deep that it was not looked at."""
    is_partial: bool = False
    """There was no time, or no need, to look at all of it."""

    def charge(self, per_entry: int) -> int:
        """Bytes to count it with, where each name counts as so many at least."""
        return max(self.disk_bytes, self.entry_count * per_entry)


@dataclass(frozen=True, slots=True)
class Stop:
    """When to stop looking at a tree."""

    most: int | None = None
    """Once it is charged with more than this."""
    per_entry: int = 0
    within_s: float | None = None


class Overfull(Exception):
    """A tree has more than may be copied."""


def measure(root: Path, stop: Stop | None = None) -> Usage:
    """Count a tree; what is too deep or vanishes meanwhile is left out."""
    meter = _Meter(stop or Stop())
    with opened(root) as folder:
        meter.add(folder, 0)
    return meter.usage


def copy(source: Path, target: Path, *, most: int | None = None, per_entry: int = 0) -> None:
    """Copy the files, folders and links of a tree into an empty folder; nothing else.

    A file with several names is copied once, and gets them again.

    Raises:
        Overfull: It would be charged with more than `most`.
        OSError: Something cannot be read or written, or is nested too deep.
    """
    with opened(source) as old, opened(target) as new:
        _Copier(new, most, per_entry).folder(old, new, b"", 0)


def copy_file(source: int, target: int) -> None:
    """Copy an open file's content: at no cost where the file system can, else its holes stay."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in _extents(source, size):
        at = start
        while at < end:
            count = os.copy_file_range(source, target, end - at, at, at)
            if count == 0:
                return  # It has become shorter meanwhile.
            at += count


@contextmanager
def opened(path: Path | str, *, under: int | None = None) -> Generator[int]:
    """A folder's handle; never through a link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, dir_fd=under)
    try:
        yield handle
    finally:
        os.close(handle)


def _extents(handle: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(handle, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = min(os.lseek(handle, start, os.SEEK_HOLE), size)
        yield start, end


class _Meter:
    """Adds up a tree."""

    def __init__(self, stop: Stop) -> None:
        self.usage = Usage()
        self._stop = stop
        self._ends = None if stop.within_s is None else time.monotonic() + stop.within_s
        self._linked: set[tuple[int, int]] = set()

    def add(self, folder: int, depth: int) -> None:
        """Add what is in a folder, until it is time to stop."""
        with os.scandir(folder) as entries:
            for entry in entries:
                if self._is_enough():
                    self.usage.is_partial = True
                    return
                with contextlib.suppress(OSError):
                    self._entry(entry, folder, depth)

    def _entry(self, entry: os.DirEntry[str], folder: int, depth: int) -> None:
        usage = self.usage
        found = entry.stat(follow_symlinks=False)
        usage.entry_count += 1
        if self._is_new(found):
            usage.disk_bytes += found.st_blocks * _BLOCK
        if not stat.S_ISDIR(found.st_mode):
            usage.file_count += 1
            usage.size_bytes += found.st_size
        elif depth < _MAX_DEPTH:
            with opened(entry.name, under=folder) as inner:
                self.add(inner, depth + 1)
        else:
            usage.is_too_deep = True

    def _is_new(self, found: os.stat_result) -> bool:
        """False for one more name of a file."""
        if stat.S_ISDIR(found.st_mode) or found.st_nlink < _SEVERAL:
            return True
        known = (found.st_dev, found.st_ino)
        if known in self._linked:
            return False
        self._linked.add(known)
        return True

    def _is_enough(self) -> bool:
        stop, usage = self._stop, self.usage
        if stop.most is not None and usage.charge(stop.per_entry) > stop.most:
            return True
        return (
            self._ends is not None
            and not usage.entry_count % _LOOK_EVERY
            and time.monotonic() > self._ends
        )


class _Copier:
    """Copies a tree."""

    def __init__(self, top: int, most: int | None, per_entry: int) -> None:
        self._top = top
        self._most = most
        self._per_entry = per_entry
        self._spent = Usage()
        self._linked: dict[tuple[int, int], bytes] = {}
        """The first copy of each file that has several names, from the top."""

    def folder(self, old: int, new: int, path: bytes, depth: int) -> None:
        """Copy what is in a folder."""
        if depth > _MAX_DEPTH:
            raise OSError(errno.ELOOP, f"folders are nested deeper than {_MAX_DEPTH}")
        with os.scandir(old) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    self._entry(entry, (old, new), path, depth)
        _dress(new, os.fstat(old))

    def _entry(
        self, entry: os.DirEntry[str], folders: tuple[int, int], path: bytes, depth: int
    ) -> None:
        name, (old, new) = entry.name, folders
        below = path + os.fsencode(name)
        if entry.is_symlink():
            self._spend(0)
            os.symlink(os.readlink(name, dir_fd=old), name, dir_fd=new)
            found = entry.stat(follow_symlinks=False)
            if os.geteuid() == 0:
                os.chown(name, found.st_uid, found.st_gid, dir_fd=new, follow_symlinks=False)
        elif entry.is_dir(follow_symlinks=False):
            self._spend(_FOLDER_BYTES)
            with opened(name, under=old) as inner:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=new)
                with opened(name, under=new) as made:
                    self.folder(inner, made, below + b"/", depth + 1)
        elif entry.is_file(follow_symlinks=False):
            self._file(name, old, new, below)

    def _file(self, name: str, old: int, new: int, path: bytes) -> None:
        # A pipe put in the file's place meanwhile must not hold us.
        flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        source = os.open(name, os.O_RDONLY | flags, dir_fd=old)
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode) or self._is_linked(found, name, new):
                return
            self._spend(found.st_blocks * _BLOCK)
            target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=new)
            try:
                copy_file(source, target)
                _dress(target, found)
            finally:
                os.close(target)
            if found.st_nlink >= _SEVERAL and len(path) < _MAX_PATH:
                self._linked[found.st_dev, found.st_ino] = path
        finally:
            os.close(source)

    def _is_linked(self, found: os.stat_result, name: str, new: int) -> bool:
        """Give the copy of a file another name, where there is one."""
        first = self._linked.get((found.st_dev, found.st_ino))
        if first is None:
            return False
        self._spend(0)
        os.link(first, name, src_dir_fd=self._top, dst_dir_fd=new, follow_symlinks=False)
        return True

    def _spend(self, size: int) -> None:
        self._spent.entry_count += 1
        self._spent.disk_bytes += size
        if self._most is not None and self._spent.charge(self._per_entry) > self._most:
            raise Overfull


def _dress(handle: int, like: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.fchown(handle, like.st_uid, like.st_gid)
    os.fchmod(handle, stat.S_IMODE(like.st_mode) & 0o777)
    os.utime(handle, ns=(like.st_atime_ns, like.st_mtime_ns))
