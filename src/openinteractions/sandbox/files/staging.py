"""The folder beside the tree where things are made before they appear in it, and taken apart after.

It lies on the same disk and is never mounted into a sandbox. So a file appears in the tree whole,
with its owner and mode, by one rename; and a folder that is deleted disappears from it by one, and
is emptied where no code can swap its parts for links meanwhile.
"""

import contextlib
import errno
import itertools
import os
import secrets
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from openinteractions.sandbox.files.beneath import closing, names_in, open_folder_of
from openinteractions.sandbox.files.threads import Halt

_FOLDER: Final = "staging"
_PRIVATE: Final = 0o700
_TRIES: Final = 100
"""To empty one folder, into which a process that was in it may still write."""

_process = secrets.token_hex(4)
_numbers = itertools.count()


def open_staging(disk: Path) -> int:
    """A descriptor of the staging folder, made if it is absent."""
    return open_private(disk, _FOLDER)


def open_private(disk: Path, name: str) -> int:
    """A descriptor of a folder beside the tree that only this program may enter."""
    with closing(open_folder_of(disk)) as parent:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, _PRIVATE, dir_fd=parent)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=parent)


@contextmanager
def staging(disk: Path) -> Generator[int]:
    """`open_staging`, closed at the end."""
    with closing(open_staging(disk)) as fd:
        yield fd


def new_name() -> bytes:
    """A name in staging that nothing else has."""
    return f"{_process}.{next(_numbers)}".encode()


def trash_name() -> bytes:
    """A name in staging for what is only there to be removed, by whoever comes first."""
    return b"trash." + new_name()


def sweep(disk: Path, halt: Halt) -> None:
    """Remove what earlier processes left in staging, and what this one did not finish removing."""
    ours = f"{_process}.".encode()
    with staging(disk) as place:
        for name in names_in(place):
            if not name.startswith(ours):
                discard(place, name, halt)


def discard(place: int, name: bytes, halt: Halt) -> None:
    """Remove an entry of staging with all that is below it.

    Depth costs nothing: a folder that is not empty moves up into staging before it is emptied, so
    there is one open folder at a time and no recursion.
    """
    todo = [name]
    while todo:
        one = todo.pop()
        if not _removed(place, one):
            with contextlib.suppress(FileNotFoundError):
                todo.extend(_emptied(place, one, halt))


def _removed(place: int, name: bytes) -> bool:
    try:
        os.unlink(name, dir_fd=place)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in {errno.EISDIR, errno.EPERM}:
            raise
        return _removed_folder(place, name)
    return True


def _removed_folder(place: int, name: bytes) -> bool:
    try:
        os.rmdir(name, dir_fd=place)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        return False
    return True


def _emptied(place: int, name: bytes, halt: Halt) -> Iterator[bytes]:
    """Empty a folder and remove it; yields the new names of those that were in it."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with closing(os.open(name, flags, dir_fd=place)) as reference:
        _take(reference)
        with closing(os.open(b".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=reference)) as folder:
            for _ in range(_TRIES):
                yield from _moved_up(place, folder, halt)
                if _removed_folder(place, name):
                    return


def _take(folder: int) -> None:
    """Make a folder this program's own: a process that still is in it can then add nothing."""
    path = Path(f"/proc/self/fd/{folder}")
    with contextlib.suppress(OSError):
        os.chown(path, os.geteuid(), os.getegid())
    with contextlib.suppress(OSError):
        path.chmod(_PRIVATE)


def _moved_up(place: int, folder: int, halt: Halt) -> Iterator[bytes]:
    with os.scandir(folder) as entries:
        for entry in entries:
            halt.check()
            raw = os.fsencode(entry.name)
            if not _removed(folder, raw):
                moved = trash_name()
                with contextlib.suppress(FileNotFoundError):
                    os.rename(raw, moved, src_dir_fd=folder, dst_dir_fd=place)
                    yield moved


def make_folder(place: int, mode: int, uid: int, gid: int) -> bytes:
    """Make an empty folder in staging; its name there."""
    name = new_name()
    os.mkdir(name, _PRIVATE, dir_fd=place)
    own(place, name, mode, uid, gid)
    return name


def own(place: int, name: bytes, mode: int, uid: int, gid: int) -> None:
    """Give a folder of staging its owner and mode."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with closing(os.open(name, flags, dir_fd=place)) as fd:
        os.fchown(fd, uid, gid)
        os.fchmod(fd, stat.S_IMODE(mode))
