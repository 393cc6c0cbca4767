"""Changes of one environment's tree, each by a rename from staging; blocking, for threads."""

import contextlib
import errno
import os
import stat
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from openinteractions.errors import Invalid
from openinteractions.sandbox.files import kernel, staging
from openinteractions.sandbox.files.beneath import (
    closing,
    further_in,
    is_there,
    locate,
    open_folder_of,
    open_top,
)
from openinteractions.sandbox.files.entries import described, entry_at
from openinteractions.sandbox.files.paths import TOP, Parts, instead_of, is_further, shown
from openinteractions.sandbox.files.problems import exists, explained
from openinteractions.sandbox.files.quota import Boundless, Quota
from openinteractions.sandbox.files.threads import Halt
from openinteractions.sandbox.port import Entry
from openinteractions.sandbox.tops import MAX_FURTHER

_FOLDER_MODE: Final = 0o755
_FILE_MODE: Final = 0o644
_PERMISSIONS: Final = 0o777
_HEAD_BYTES: Final = 1024
FOLDER_BYTES: Final = 4096
"""What a new folder takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where an environment's tree is, and whose its files are."""

    root: Path
    uid: int
    gid: int
    environment: str = ""
    """Its id, for messages."""
    quota: Quota = field(default_factory=Boundless)

    @property
    def disk(self) -> Path:
        """The folder of the tree and of what lies beside it."""
        return self.root.parent

    @contextmanager
    def opened(self) -> Generator[int]:
        """A descriptor of the tree's root."""
        with closing(open_folder_of(self.root)) as fd:
            yield fd

    def explained(self, parts: Parts) -> AbstractContextManager[None]:
        """`paths.explained`, for this environment."""
        return explained(parts, self.environment)

    def check_top(self, parts: Parts) -> None:
        """Refuse to write where no folder at the top is.

        Raises:
            Invalid: There is none; none is made on the way.
        """
        if not parts or parts[0] in TOP:
            return
        try:
            with self.opened() as root:
                os.close(open_top(root, parts[0]))
        except FileNotFoundError:
            raise no_top(parts) from None

    def missing(self, names: Sequence[bytes]) -> list[bytes]:
        """Those of these names that the root has no folder of."""
        with self.opened() as root:
            there = {*TOP, *further_in(root)}
        return [name for name in dict.fromkeys(names) if name not in there]

    def add_tops(self, names: Sequence[bytes]) -> None:
        """Make folders beside the three; nothing happens to one that is there.

        Raises:
            Invalid: There would be too many, or a name cannot be.
        """
        missing = self.missing(names)
        with self.explained(()), self.opened() as root, staging.staging(self.disk) as place:
            if not all(map(is_further, missing)):
                raise Invalid(f"No name of a folder at the top: '{shown(missing)}'.")
            if len(further_in(root)) + len(missing) > MAX_FURTHER:
                raise Invalid(
                    f"An environment may have {MAX_FURTHER} folders beside 'workspace', '.agents' "
                    f"and 'home': put '{shown(missing[-1:])}' into 'workspace'."
                )
            for name in missing:
                os.close(self._child(root, place, name))

    def check_free(self, parts: Parts, *, overwrite: bool) -> None:
        """Refuse early what `land` would refuse after all bytes were sent.

        Raises:
            Conflict: The path is taken, and is not to be overwritten.
            Invalid: A folder is there, which is never overwritten.
        """
        self.check_top(parts)
        with self.explained(parts), self.opened() as root:
            if not is_there(root, parts):
                return
            if not overwrite:
                raise exists(parts, self.environment)
            with closing(locate(root, parts, follow=False)) as fd:
                is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
            if is_folder:
                raise IsADirectoryError(errno.EISDIR, "a folder")

    def land(self, place: int, name: bytes, parts: Parts, *, overwrite: bool) -> None:
        """Give a finished entry of staging its place in the tree, where folders are made for it.

        Raises:
            FileExistsError: The path is taken, and is not to be overwritten.
        """
        with self.opened() as root, closing(self.folder(root, place, parts[:-1])) as folder:
            if overwrite:
                os.rename(name, parts[-1], src_dir_fd=place, dst_dir_fd=folder)
            else:
                kernel.rename_new(place, name, folder, parts[-1])

    def land_file(
        self, place: int, name: bytes, parts: Parts, *, overwrite: bool, mode: int | None
    ) -> Entry:
        """`land` a file as the environment's own, safely on the disk.

        Args:
            place: Descriptor of the folder where it is.
            name: Its name there.
            parts: Where it goes.
            overwrite: Replace a file that is there.
            mode: Its permissions; None: those of the replaced file, else read and write.
        """
        self.check_top(parts)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with closing(os.open(name, flags, dir_fd=place)) as fd:
            os.fchown(fd, self.uid, self.gid)
            os.fchmod(fd, (self._mode(parts) if mode is None else mode) & _PERMISSIONS)
            os.fsync(fd)
            self.land(place, name, parts, overwrite=overwrite)
            return described(parts, kernel.stat(fd), os.pread(fd, _HEAD_BYTES, 0))

    def _mode(self, parts: Parts) -> int:
        """The permissions of a replaced file stay, so that a script stays executable."""
        with contextlib.suppress(OSError), self.opened() as root:
            with closing(locate(root, parts, follow=False)) as fd:
                mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode):
                return mode
        return _FILE_MODE

    def folder(self, root: int, place: int, parts: Parts) -> int:
        """A reference to a folder of the tree; it and those above it are made if absent."""
        depth = len(parts)
        while True:
            try:
                here = locate(root, parts[:depth])
                break
            except FileNotFoundError:
                depth -= 1
                if depth <= 0:
                    raise
        try:
            for name in parts[depth:]:
                below = self._child(here, place, name)
                os.close(here)
                here = below
            # Refuses what is no folder.
            return os.open(b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
        finally:
            os.close(here)

    def _child(self, folder: int, place: int, name: bytes) -> int:
        self.quota.spend(FOLDER_BYTES)
        made = staging.make_folder(place, _FOLDER_MODE, self.uid, self.gid)
        try:
            kernel.rename_new(place, made, folder, name)
        except OSError as error:
            os.rmdir(made, dir_fd=place)
            if error.errno != errno.EEXIST:
                raise
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=folder)

    def mkdir(self, parts: Parts) -> Entry:
        """Make a folder, and those above it; nothing happens if it is there."""
        self.check_top(parts)
        with self.explained(parts), self.opened() as root, staging.staging(self.disk) as place:
            try:
                os.close(self.folder(root, place, parts))
            except NotADirectoryError:
                if is_there(root, parts):
                    raise exists(parts, self.environment) from None
                raise
            return entry_at(root, parts)

    def delete(self, parts: Parts, *, recursive: bool, halt: Halt) -> None:
        """Remove a file, a link (not what it leads to), or a folder.

        Raises:
            NotFound: There is nothing.
            Invalid: A folder that is not empty, without `recursive`.
        """
        with (
            self.explained(parts),
            self.opened() as root,
            closing(locate(root, parts[:-1])) as folder,
        ):
            if not stat.S_ISDIR(kernel.stat(folder, parts[-1]).mode):
                os.unlink(parts[-1], dir_fd=folder)
            elif recursive:
                self._trash(folder, parts[-1], halt)
            else:
                self._rmdir(folder, parts)

    def _trash(self, folder: int, name: bytes, halt: Halt) -> None:
        trash = staging.trash_name()
        with staging.staging(self.disk) as place:
            os.rename(name, trash, src_dir_fd=folder, dst_dir_fd=place)
            # It is gone from the tree; what cannot be removed now is left to the next sweep.
            with contextlib.suppress(OSError):
                staging.discard(place, trash, halt)

    def _rmdir(self, folder: int, parts: Parts) -> None:
        try:
            os.rmdir(parts[-1], dir_fd=folder)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            raise Invalid(
                f"The directory '{shown(parts)}' is not empty. Set recursive=true to delete it"
                " with all that is in it."
            ) from error


def no_top(parts: Parts) -> Invalid:
    """400: the environment has no such folder beside the three."""
    return Invalid(
        f"The environment has no folder '{shown(parts[:1])}' at its top, and only its sources make "
        f"one. Write to '{instead_of(parts)}'."
    )
