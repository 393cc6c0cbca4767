"""Unpacks an archive into the tree: whole, or not at all.

First everything is made in staging, where no code of the sandbox can reach it, with symbolic links
last, so that nothing is ever written through one. Then all conflicts with the tree are looked for.
Only then does it move into place, a whole new folder by one rename. The one way to leave a part of
an archive in the tree is that the sandbox makes a file of the same name in that last moment.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from openinteractions.errors import Invalid, TooLarge
from openinteractions.sandbox.files import kernel, staging
from openinteractions.sandbox.files.beneath import (
    closing,
    folder_at,
    further_in,
    is_there,
    locate,
    names_in,
)
from openinteractions.sandbox.files.entries import described, entry_at
from openinteractions.sandbox.files.paths import (
    MAX_PATH_BYTES,
    TOP,
    Parts,
    checked,
    leads_inside,
    shown,
)
from openinteractions.sandbox.files.problems import exists, explained
from openinteractions.sandbox.files.site import FOLDER_BYTES, Site
from openinteractions.sandbox.files.streams import write_all
from openinteractions.sandbox.files.tarball import Limits, Member, Tarball
from openinteractions.sandbox.files.threads import Halt
from openinteractions.sandbox.port import Entry

_MAX_DEPTH: Final = 100
_HEAD_BYTES: Final = 1024
_FOLDER_MODE: Final = 0o755
_OWNER_MAY: Final = 0o600
_OWNER_ENTERS: Final = 0o700
_PERMISSIONS: Final = 0o777


def unpack(
    site: Site, tarball: Tarball, target: Parts, *, limits: Limits, overwrite: bool, halt: Halt
) -> list[Entry]:
    """Extract an archive under a folder, which is made if absent; what is now there, by path.

    Raises:
        Conflict: A member is in the tree already, and is not to be overwritten.
        Invalid: The archive is damaged, or has what may not be.
        TooLarge: It is over its limits, or the disk is full.
    """
    site.check_top(target)
    with site.explained(target), staging.staging(site.disk) as place:
        name = staging.make_folder(place, _FOLDER_MODE, site.uid, site.gid)
        try:
            with folder_at(place, (name,)) as base:
                made = _Made(site, base, target, limits, halt)
                made.all(tarball)
            move = _Move(site, place, name, target, overwrite=overwrite, halt=halt)
            move.check()
            move.move()
            with site.opened() as root:
                return made.entries(root)
        finally:
            with contextlib.suppress(OSError):
                # To its end, also where nobody waits any more: nothing else would remove it.
                staging.discard(place, name, Halt())


class _Made:
    """What an archive holds, in staging."""

    def __init__(self, site: Site, base: int, target: Parts, limits: Limits, halt: Halt) -> None:
        self._site = site
        self._base = base
        self._target = target
        self._limits = limits
        self._halt = halt
        with site.opened() as root:
            self._further = further_in(root)
        self._bytes = 0
        self._count = 0
        self._folders: set[Parts] = {()}
        self._files: dict[Parts, Entry | None] = {}
        """With their entries; None for another name of a file."""
        self._links: dict[Parts, bytes] = {}
        self._told: set[Parts] = set()

    def all(self, tarball: Tarball) -> None:
        """Make everything."""
        for member in tarball.members():
            self._count_one()
            self._bytes += member.size
            if self._bytes > self._limits.max_bytes:
                raise TooLarge(f"The archive holds more than {self._limits.max_bytes} bytes.")
            parts = self._parts(member.name, is_folder=member.kind == "folder")
            with explained((*self._target, *parts)), self._clashes(member.name):
                self._make(tarball, member, parts)
        for parts, link in self._links.items():
            self._halt.check()
            with explained((*self._target, *parts)), self._clashes(b"/".join(parts)):
                self._symlink(parts, link)

    def _count_one(self) -> None:
        """One more member, or a folder that none is, but that one lies in."""
        self._count += 1
        if self._count > self._limits.max_members:
            most = self._limits.max_members
            raise TooLarge(f"The archive has more than {most} members, the folders above included.")

    def entries(self, root: int) -> list[Entry]:
        """What of it is in the tree now, by path."""
        found: list[Entry] = []
        for parts in sorted(self._told):
            entry = self._files.get(parts)
            if entry is None:
                with contextlib.suppress(OSError):
                    found.append(entry_at(root, (*self._target, *parts)))
            else:
                found.append(entry)
        return found

    def _parts(self, name: bytes, *, is_folder: bool) -> Parts:
        """Where a member goes, below the target."""
        if name.startswith(b"/"):
            raise self._refused(name, "its name is absolute")
        try:
            parts = checked(name)
        except Invalid as error:
            raise self._refused(name, error.message) from error
        full = (*self._target, *parts)
        if len(parts) > _MAX_DEPTH or len(b"/".join(full)) >= MAX_PATH_BYTES:
            raise self._refused(name, "its path is too long or too deep")
        if not parts and is_folder:
            return parts
        if not parts:
            raise self._refused(name, "it has no name")
        tops = (*TOP, *self._further)
        if full[0] not in tops or (len(full) == 1 and not is_folder):
            raise self._refused(
                name, f"it is in none of the folders {', '.join(map(bytes.decode, tops))}"
            )
        return parts

    def _refused(self, name: bytes, why: str) -> Invalid:
        label = name[:200].decode(errors="replace")
        return Invalid(f"The archive's member '{label}' cannot be extracted: {why.rstrip('.')}.")

    @contextmanager
    def _clashes(self, name: bytes) -> Generator[None]:
        try:
            yield
        except (FileExistsError, NotADirectoryError) as error:
            why = "the archive has something of another kind at this path"
            raise self._refused(name, why) from error

    def _make(self, tarball: Tarball, member: Member, parts: Parts) -> None:
        if member.kind == "folder":
            self._folder(parts, member.mode)
        else:
            self._folder(parts[:-1], None)
            self._forget(parts)
        if member.kind == "file":
            self._file(tarball, member, parts)
        elif member.kind == "symlink":
            self._keep_link(member, parts)
        elif member.kind == "hardlink":
            self._hardlink(member, parts)
        if parts:
            self._told.add(parts)

    def _folder(self, parts: Parts, mode: int | None) -> None:
        depth = len(parts)
        while parts[:depth] not in self._folders:
            depth -= 1
        for size in range(depth + 1, len(parts) + 1):
            if size < len(parts) or mode is None:
                self._count_one()
            self._halt.check()
            self._site.quota.spend(FOLDER_BYTES)
            os.mkdir(b"/".join(parts[:size]), _OWNER_ENTERS, dir_fd=self._base)
            self._folders.add(parts[:size])
            self._own_folder(parts[:size], _FOLDER_MODE)
        if mode is not None and parts:
            self._own_folder(parts, mode)

    def _own_folder(self, parts: Parts, mode: int) -> None:
        permissions = (mode & _PERMISSIONS) | _OWNER_ENTERS
        name = b"/".join(parts)
        staging.own(self._base, name, permissions, self._site.uid, self._site.gid)

    def _forget(self, parts: Parts) -> None:
        """A later member replaces an earlier one of the same name, as every tar does."""
        self._links.pop(parts, None)
        if parts in self._files:
            del self._files[parts]
            os.unlink(b"/".join(parts), dir_fd=self._base)

    def _file(self, tarball: Tarball, member: Member, parts: Parts) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(b"/".join(parts), flags, _OWNER_MAY, dir_fd=self._base)
        with closing(fd):
            self._files[parts] = None
            head = b""
            for piece in tarball.data():
                head = head or piece[:_HEAD_BYTES]
                self._site.quota.spend(len(piece))
                write_all(fd, piece)
            os.fchown(fd, self._site.uid, self._site.gid)
            os.fchmod(fd, (member.mode & _PERMISSIONS) | _OWNER_MAY)
            os.utime(fd, (member.modified, member.modified))
            self._files[parts] = described((*self._target, *parts), kernel.stat(fd), head)

    def _keep_link(self, member: Member, parts: Parts) -> None:
        if not member.target or not self._leads_inside(parts, member.target):
            raise self._refused(member.name, "it is a link that leads out of the environment")
        self._links[parts] = member.target

    def _leads_inside(self, parts: Parts, target: bytes) -> bool:
        return leads_inside((*self._target, *parts), target, self._further)

    def _hardlink(self, member: Member, parts: Parts) -> None:
        source = self._parts(member.target, is_folder=False)
        if source not in self._files:
            raise self._refused(member.name, "it is a link to what is no file before it in there")
        os.link(
            b"/".join(source),
            b"/".join(parts),
            src_dir_fd=self._base,
            dst_dir_fd=self._base,
            follow_symlinks=False,
        )
        self._files[parts] = None

    def _symlink(self, parts: Parts, target: bytes) -> None:
        name = b"/".join(parts)
        os.symlink(target, name, dir_fd=self._base)
        os.chown(name, self._site.uid, self._site.gid, dir_fd=self._base, follow_symlinks=False)


class _Move:
    """The way of a staged folder into the tree."""

    def __init__(
        self, site: Site, place: int, name: bytes, target: Parts, *, overwrite: bool, halt: Halt
    ) -> None:
        self._site = site
        self._place = place
        self._name = name
        self._target = target
        self._overwrite = overwrite
        self._halt = halt

    def check(self) -> None:
        """Look at all of it before any of it moves.

        Raises:
            Conflict: Something is there already.
            Invalid: A file is where a folder should be, or the other way round.
        """
        todo: list[Parts] = [()]
        with self._site.opened() as root:
            while todo:
                below = todo.pop()
                full = (*self._target, *below)
                with explained(full):
                    if is_there(root, full):
                        todo += [(*below, name) for name in self._met(root, below)]

    def _met(self, root: int, below: Parts) -> list[bytes]:
        """The staged folders here that the tree has too."""
        full = (*self._target, *below)
        met: list[bytes] = []
        with closing(locate(root, full)) as there, self._staged(below) as here:
            if not stat.S_ISDIR(os.fstat(there).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "a file is there")
            for name in names_in(here):
                self._halt.check()
                if self._is_met(root, there, here, (*full, name)):
                    met.append(name)
        return met

    def _is_met(self, root: int, there: int, here: int, full: Parts) -> bool:
        """Whether a staged folder meets one; False if there is nothing, or it is replaced."""
        try:
            mode = kernel.stat(there, full[-1]).mode
        except FileNotFoundError:
            return False
        is_folder = stat.S_ISDIR(kernel.stat(here, full[-1]).mode)
        if is_folder and stat.S_ISLNK(mode):
            with contextlib.suppress(OSError), closing(locate(root, full)) as fd:
                mode = os.fstat(fd).st_mode
        if is_folder and stat.S_ISDIR(mode):
            return True
        if not self._overwrite:
            raise exists(full, self._site.environment)
        if is_folder or stat.S_ISDIR(mode):
            kind = "a directory" if is_folder else "no directory"
            raise Invalid(
                f"'{shown(full)}' is {kind} in the archive, and not so in the environment."
            )
        return False

    def move(self) -> None:
        """Rename everything into place; folders that are there already are entered."""
        todo: list[Parts] = [()]
        with self._site.opened() as root:
            while todo:
                below = todo.pop()
                full = (*self._target, *below)
                with (
                    self._site.explained(full),
                    closing(self._site.folder(root, self._place, full)) as there,
                    self._staged(below) as here,
                ):
                    todo += [(*below, name) for name in self._moved(here, there, full)]

    def _moved(self, here: int, there: int, full: Parts) -> list[bytes]:
        """Move what is in a staged folder; the names of folders that the tree has too."""
        met: list[bytes] = []
        for name in names_in(here):
            is_folder = stat.S_ISDIR(kernel.stat(here, name).mode)
            try:
                if self._overwrite and not is_folder:
                    os.rename(name, name, src_dir_fd=here, dst_dir_fd=there)
                else:
                    kernel.rename_new(here, name, there, name)
            except FileExistsError:
                if not is_folder:
                    raise exists((*full, name), self._site.environment) from None
                met.append(name)
        return met

    def _staged(self, below: Parts) -> contextlib.AbstractContextManager[int]:
        return folder_at(self._place, (self._name, *below))
