"""Lists of the tree, page by page, and its size.

No call holds more than a page of names at a time, however many files a folder has, and no call
recurses, however deep they lie.
"""

import heapq
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from openinteractions.sandbox.files.beneath import closing, folder_at, open_top, tops_in
from openinteractions.sandbox.files.entries import entry_at, entry_in, entry_of, find
from openinteractions.sandbox.files.paths import MAX_PATH_BYTES, Parts, is_top, shown
from openinteractions.sandbox.files.threads import Halt
from openinteractions.sandbox.port import Entry

_SECTOR_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Page:
    """Some entries of a list, sorted by path: a folder, then what is in it, then what follows."""

    entries: Sequence[Entry]
    next_after: str | None
    """Where the next page begins; None at the end."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How much is in the tree."""

    file_count: int
    """Files and links; a file with several names counts once."""
    size_bytes: int
    """What the files hold; holes do not count."""
    is_partial: bool = False
    """There was no time to look at all of it: it has more than this."""


@dataclass(frozen=True, slots=True)
class Window:
    """Which part of a list is wanted."""

    after: Parts
    """Begin after this path."""
    limit: int
    is_deep: bool
    """All descendants, not only direct children."""


def page(root: int, parts: Parts, window: Window, halt: Halt) -> Page:
    """A page of what is in a folder; of a file its one entry.

    Raises:
        FileNotFoundError: The path names nothing.
    """
    found = find(root, parts)
    with closing(found.fd):
        if not found.is_folder:
            return Page([entry_of(found, parts)], None)
        after = window.after
        below = after[len(parts) :] if after[: len(parts)] == parts else ()
        lister = _Lister(root, found.fd, parts, halt)
        if window.is_deep:
            return lister.deep(below, window.limit)
        return lister.direct(below, window.limit)


def _is_told(entry: os.DirEntry[str]) -> bool:
    return (
        entry.is_file(follow_symlinks=False)
        or entry.is_dir(follow_symlinks=False)
        or entry.is_symlink()
    )


def _key(name: str) -> bytes:
    """What a name is sorted by: itself as it is shown."""
    try:
        return name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode(errors="replace").encode()


class _Lister:
    """Makes pages of one folder."""

    def __init__(self, root: int, base: int, parts: Parts, halt: Halt) -> None:
        self._root = root
        self._base = base
        self._parts = parts
        self._halt = halt
        self._todo: list[tuple[Parts, bool]] = []
        """Paths below the base still to be told, the next one last; whether each is a folder."""

    def direct(self, after: Parts, limit: int) -> Page:
        """A page of its children."""
        with folder_at(self._base) as folder:
            children = self._children(folder, self._parts, after, limit + 1)
            has_more = len(children) > limit
            paths = [(*self._parts, name) for name, _ in children[:limit]]
            told = (entry_in(self._root, folder, path) for path in paths)
            entries = [entry for entry in told if entry is not None]
        return Page(entries, shown(paths[-1]) if has_more else None)

    def deep(self, after: Parts, limit: int) -> Page:
        """A page of all descendants, folders before what is in them."""
        # Deepest first on the stack: what is in the last folder told, then what follows it.
        for depth in range(len(after) + 1):
            self._plan(after[:depth], after[depth:], limit + 1)
        entries: list[Entry] = []
        told: Parts = ()
        for _ in range(limit):
            if not self._todo:
                return Page(entries, None)
            self._halt.check()
            told, is_folder = self._todo.pop()
            entry = self._entry(told)
            if entry is not None:
                entries.append(entry)
            if is_folder:
                self._plan(told, (), limit + 1)
        return Page(entries, shown((*self._parts, *told)) if self._todo else None)

    def _plan(self, folder: Parts, after: Parts, count: int) -> None:
        try:
            with folder_at(self._base, folder) as fd:
                children = self._children(fd, (*self._parts, *folder), after, count)
        except OSError:
            # Gone or swapped since; or `after` is a file, which has nothing below it.
            return
        room = MAX_PATH_BYTES - len(b"/".join((*self._parts, *folder, b"")))
        self._todo += [
            ((*folder, name), is_folder)
            for name, is_folder in reversed(children)
            # Longer paths could not be asked for.
            if len(name) <= room
        ]
        # What lies deeper in the stack cannot come up in this page any more.
        del self._todo[:-count]

    def _children(
        self, folder: int, path: Parts, after: Parts, count: int
    ) -> list[tuple[bytes, bool]]:
        """The first names in a folder that follow `after`, in order; whether each is a folder."""
        with os.scandir(folder) as entries:
            names = self._names(entries)
            if not path:
                names = (found for found in names if found[2] and is_top(found[1]))
            if after:
                names = (found for found in names if found[0] > after[0])
            first = heapq.nsmallest(count, names)
        return [(name, is_folder) for _, name, is_folder in first]

    def _names(self, entries: Iterator[os.DirEntry[str]]) -> Iterator[tuple[bytes, bytes, bool]]:
        """What each is sorted by, its name, and whether it is a folder."""
        for entry in entries:
            self._halt.check()
            if _is_told(entry):
                is_folder = entry.is_dir(follow_symlinks=False)
                yield _key(entry.name), os.fsencode(entry.name), is_folder

    def _entry(self, below: Parts) -> Entry | None:
        try:
            return entry_at(self._root, (*self._parts, *below))
        except OSError:
            return None


def usage(root: int, *, within_s: float, halt: Halt) -> Usage:
    """Count and measure everything in the tree, as far as that is possible in so much time."""
    return _Sum(halt, time.monotonic() + within_s).of(root)


class _Sum:
    """Adds up a tree."""

    def __init__(self, halt: Halt, deadline: float) -> None:
        self._halt = halt
        self._deadline = deadline
        self._files = 0
        self._bytes = 0
        self._linked: set[int] = set()
        """Files with several names that were counted."""

    def of(self, root: int) -> Usage:
        """The sum of a tree."""
        for top in tops_in(root):
            try:
                base = open_top(root, top)
            except OSError:
                continue
            with closing(base):
                if not self._below(base):
                    return Usage(self._files, self._bytes, is_partial=True)
        return Usage(self._files, self._bytes)

    def _below(self, base: int) -> bool:
        """Add what is below a folder; False if there was no time for all."""
        todo: list[Parts] = [()]
        while todo:
            self._halt.check()
            path = todo.pop()
            try:
                with folder_at(base, path) as folder, os.scandir(folder) as entries:
                    for count, entry in enumerate(entries):
                        if not count % 256 and time.monotonic() > self._deadline:
                            return False
                        if entry.is_dir(follow_symlinks=False):
                            todo.append((*path, os.fsencode(entry.name)))
                        else:
                            self._add(entry)
            except OSError:
                # Gone or swapped since.
                continue
        return True

    def _add(self, entry: os.DirEntry[str]) -> None:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            return
        is_file = stat.S_ISREG(status.st_mode)
        if not is_file and not stat.S_ISLNK(status.st_mode):
            return
        if status.st_nlink > 1:
            if status.st_ino in self._linked:
                return
            self._linked.add(status.st_ino)
        self._files += 1
        if is_file:
            self._bytes += min(status.st_size, max(status.st_blocks * _SECTOR_BYTES, 4096))
