"""Measuring and copying trees that a sandbox may be changing at the same time.

Every step goes from an open folder to a name in it, and follows no link: whatever the sandbox swaps
meanwhile, nothing outside its tree is read or written.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# <https://man7.org/linux/man-pages/man2/ioctl_ficlone.2.html>
_FICLONE = 0x40049409
_MAX_DEPTH = 200
_BLOCK = 512


@dataclass(slots=True)
class Usage:
    """What a tree holds."""

    file_count: int = 0
    """Files and links, without folders."""
    size_bytes: int = 0
    """As the files say themselves; holes count."""
    disk_bytes: int = 0
    """What they take on the disk, folders too."""


def measure(root: Path) -> Usage:
    """Count a tree; what is too deep or vanishes meanwhile is left out."""
    usage = Usage()
    with opened(root) as folder:
        _measure(folder, usage, 0)
    return usage


def copy(source: Path, target: Path) -> None:
    """Copy the files, folders and links of a tree into an empty folder; nothing else.

    Raises:
        OSError: Something cannot be read or written, or is nested too deep.
    """
    with opened(source) as old, opened(target) as new:
        _copy_folder(old, new, 0)


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


def _measure(folder: int, usage: Usage, depth: int) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                usage.disk_bytes += found.st_blocks * _BLOCK // max(found.st_nlink, 1)
                if not stat.S_ISDIR(found.st_mode):
                    usage.file_count += 1
                    usage.size_bytes += found.st_size
                elif depth < _MAX_DEPTH:
                    with opened(entry.name, under=folder) as inner:
                        _measure(inner, usage, depth + 1)


def _copy_folder(old: int, new: int, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise OSError(errno.ELOOP, f"folders are nested deeper than {_MAX_DEPTH}")
    with os.scandir(old) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                _copy_entry(entry, old, new, depth)
    _dress(new, os.fstat(old))


def _copy_entry(entry: os.DirEntry[str], old: int, new: int, depth: int) -> None:
    name = entry.name
    if entry.is_symlink():
        os.symlink(os.readlink(name, dir_fd=old), name, dir_fd=new)
        found = entry.stat(follow_symlinks=False)
        if os.geteuid() == 0:
            os.chown(name, found.st_uid, found.st_gid, dir_fd=new, follow_symlinks=False)
    elif entry.is_dir(follow_symlinks=False):
        with opened(name, under=old) as inner:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=new)
            with opened(name, under=new) as made:
                _copy_folder(inner, made, depth + 1)
    elif entry.is_file(follow_symlinks=False):
        _copy_one(name, old, new)


def _copy_one(name: str, old: int, new: int) -> None:
    # A pipe put in the file's place meanwhile must not hold us.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    source = os.open(name, os.O_RDONLY | flags, dir_fd=old)
    try:
        found = os.fstat(source)
        if not stat.S_ISREG(found.st_mode):
            return
        target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=new)
        try:
            copy_file(source, target)
            _dress(target, found)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _dress(handle: int, like: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.fchown(handle, like.st_uid, like.st_gid)
    os.fchmod(handle, stat.S_IMODE(like.st_mode) & 0o777)
    os.utime(handle, ns=(like.st_atime_ns, like.st_mtime_ns))
