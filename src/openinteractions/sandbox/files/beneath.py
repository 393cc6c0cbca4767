"""Opens paths of a tree without ever leaving it.

The kernel resolves a path inside one of the folders at the top and refuses what leads out. Where it
cannot decide, since it does not know the sandbox's mounts (an absolute link, or one from one folder
into another), the path is walked here: one component at a time, each opened by its name in the
folder before, and no link followed by the kernel.
"""

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from openinteractions.sandbox import tops
from openinteractions.sandbox.files import kernel
from openinteractions.sandbox.files.paths import (
    ABOVE_MOUNTS,
    MOUNT_FOLDERS,
    TOP,
    Parts,
    in_sandbox,
    is_further,
    is_top,
)

_MAX_LINKS: Final = 40
_MAX_WALK: Final = 512
"""Components that are walked here, each of which keeps a descriptor open meanwhile."""
_LEG: Final = 15
"""Components that are opened at once: together always fewer than the kernel's 4096 bytes."""
_OF_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_folder_of(path: Path) -> int:
    """A descriptor of a folder of the host, which must not be a link."""
    return os.open(path, _OF_FOLDER)


@contextmanager
def closing(fd: int) -> Generator[int]:
    """Close a descriptor at the end."""
    try:
        yield fd
    finally:
        os.close(fd)


def locate(root: int, parts: Parts, *, follow: bool = True) -> int:
    """Open a path of the tree as a bare reference (`O_PATH`), which has no side effects.

    Args:
        root: Descriptor of the tree's root.
        parts: The path.
        follow: If its last component is a link, follow that too.

    Raises:
        FileNotFoundError: It is not there.
        OSError: `EXDEV` if a link leads out of the environment; `ELOOP` if in circles.
    """
    if not parts:
        return kernel.open_beneath(root, b".", os.O_PATH | os.O_DIRECTORY)
    folder = open_top(root, parts[0])
    if len(parts) == 1:
        return folder
    with closing(folder):
        flags = os.O_PATH if follow else os.O_PATH | os.O_NOFOLLOW
        try:
            return kernel.open_beneath(folder, b"/".join(parts[1:]), flags)
        except OSError as error:
            if error.errno not in {errno.EXDEV, errno.EAGAIN}:
                raise
    return _Walk(root).to(parts, follow=follow)


def open_top(root: int, name: bytes) -> int:
    """A descriptor of a folder in the tree's root.

    Raises:
        FileNotFoundError: It is not there, or no folder.
    """
    if is_top(name):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.open(name, _OF_FOLDER, dir_fd=root)
    raise FileNotFoundError(errno.ENOENT, "no such folder")


class _Walk:
    """A path resolved as the sandbox would, with every folder on the way held open."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._above: Parts = ()
        """Where the walk is, while it is in none of the mounted folders."""
        self._open: list[int] = []
        """The mounted folder, and those below it down to where the walk is."""
        self._todo: deque[bytes] = deque()
        self._links = 0

    def to(self, parts: Parts, *, follow: bool) -> int:
        """Walk, and return a descriptor of the end."""
        self._todo.extend((*in_sandbox(parts[0]), *parts[1:]))
        try:
            while self._todo:
                self._step(self._todo.popleft(), follow=follow)
            if not self._open:
                raise OSError(errno.EXDEV, "leads out of the environment")
            return self._open.pop()
        finally:
            self._leave()

    def _step(self, name: bytes, *, follow: bool) -> None:
        if name in {b"", b"."}:
            return
        if name == b"..":
            self._up()
        elif self._open:
            self._into(name, follow=follow)
        else:
            self._above = (*self._above, name)
            if self._above not in ABOVE_MOUNTS:
                self._open.append(self._mounted())

    def _mounted(self) -> int:
        """The folder of the tree that lies where the walk is."""
        # Not `/home`, which is a folder of the tree elsewhere.
        own = self._above[0] if is_further(self._above[0]) else b""
        with contextlib.suppress(FileNotFoundError):
            return open_top(self._root, MOUNT_FOLDERS.get(self._above, own))
        raise OSError(errno.EXDEV, "leads out of the environment")

    def _up(self) -> None:
        if self._open:
            os.close(self._open.pop())
        if not self._open:
            self._above = self._above[:-1]

    def _into(self, name: bytes, *, follow: bool) -> None:
        if len(self._open) > _MAX_WALK:
            raise OSError(errno.ELOOP, "too deep")
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._open[-1])
        self._open.append(fd)
        mode = os.fstat(fd).st_mode
        is_last = not any(part not in {b"", b"."} for part in self._todo)
        if stat.S_ISLNK(mode) and (follow or not is_last):
            target = os.readlink(b"", dir_fd=fd)
            os.close(self._open.pop())
            self._follow(target)
        elif not stat.S_ISDIR(mode) and self._todo:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")

    def _follow(self, target: bytes) -> None:
        self._links += 1
        if self._links > _MAX_LINKS:
            raise OSError(errno.ELOOP, "too many links")
        if target.startswith(b"/"):
            self._leave()
            self._above = ()
        self._todo.extendleft(reversed(target.split(b"/")))

    def _leave(self) -> None:
        while self._open:
            os.close(self._open.pop())


def reopen(fd: int, flags: int) -> int:
    """Open for real what `locate` found, once it is known to be harmless."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)


@contextmanager
def folder_at(base: int, below: Parts = ()) -> Generator[int]:
    """A folder below an open one, by real folders only, at any depth, ready to be listed.

    Raises:
        OSError: `ELOOP` or `ENOTDIR` if something on the way is a link or no folder.
    """
    here = base
    try:
        for leg in _legs(below):
            flags = os.O_PATH | os.O_DIRECTORY
            here, before = kernel.open_beneath(here, leg, flags, links=False), here
            if before != base:
                os.close(before)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        with closing(os.open(b".", flags, dir_fd=here)) as fd:
            yield fd
    finally:
        if here != base:
            os.close(here)


def _legs(parts: Parts) -> Iterator[bytes]:
    """A path in pieces short enough for the kernel."""
    for start in range(0, len(parts), _LEG):
        yield b"/".join(parts[start : start + _LEG])


def further_in(root: int) -> list[bytes]:
    """The names of the folders that lie beside the three, sorted."""
    with folder_at(root) as fd:
        return [name.encode() for name in tops.further(fd)]


def tops_in(root: int) -> list[bytes]:
    """The names of all folders in the tree's root."""
    return [*TOP, *further_in(root)]


def names_in(folder: int) -> list[bytes]:
    """The sorted names in a folder that is open for reading."""
    with os.scandir(folder) as entries:
        return sorted(os.fsencode(entry.name) for entry in entries)


def is_there(root: int, parts: Parts) -> bool:
    """Whether anything has this name, also a link that leads nowhere."""
    with contextlib.suppress(FileNotFoundError):
        os.close(locate(root, parts, follow=False))
        return True
    return False
