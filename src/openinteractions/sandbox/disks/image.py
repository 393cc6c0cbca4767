"""An environment's disk as a file with a file system in it: its size is a hard bound (needs root).

The file is sparse: it takes what is in it, and gives back what is deleted.
"""

import errno
import os
import shutil
import struct
import tempfile
import time
from pathlib import Path

from openinteractions.sandbox import mounts
from openinteractions.sandbox.disks import tree
from openinteractions.sandbox.port import FOLDERS

FILE = "disk.img"
TREE = "fs"
_FORKED = "forked"
"""Beside the image: it was copied from another environment's, and not opened since."""

_FORMAT = 1
"""Raised when the template's content changes."""
_BUSY_S = 2.0
# <https://www.kernel.org/doc/html/latest/filesystems/ext4/globals.html#super-block>
_SUPERBLOCK = 1024
"""Where it is, and how long."""
_STATE_OFFSET, _CLEAN = 0x3A, 1
_INCOMPAT_OFFSET, _NEEDS_RECOVERY = 0x60, 4
# e2fsck: 1 is "errors corrected", <https://man7.org/linux/man-pages/man8/e2fsck.8.html>.
_FSCK_GOOD = frozenset({0, 1})


class Images:
    """Disks as ext4 images, each a copy of one template."""

    def __init__(self, folder: Path, *, size_bytes: int, uid: int) -> None:
        self._folder = folder
        self._uid = uid
        # Whole blocks; the name says all that the content depends on.
        self._size = -(-size_bytes // 4096) * 4096
        self._template = folder / f"template-{_FORMAT}-{self._size}-{uid}.img"

    def prepare(self) -> None:
        """Make the template, unless it is there."""
        for leftover in self._folder.glob(".template-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self._template.exists():
            return
        with tempfile.TemporaryDirectory(prefix=".template-", dir=self._folder) as work:
            content = Path(work) / "content"
            layout(content, uid=self._uid)
            made = Path(work) / FILE
            # The tables of inodes are left as holes; `noinit_itable` at the mount keeps it so.
            mounts.run(
                "mkfs.ext4", "-q", "-F", "-m0", "-b4096", "-Jsize=4",
                "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
                "-d", str(content), str(made), f"{self._size // 1024}k",
            )  # fmt: skip
            write_out(made)
            made.rename(self._template)
        write_out(self._folder)

    def check(self) -> None:
        """Try a mount.

        Raises:
            OSError: It does not work here.
        """
        self.prepare()
        with tempfile.TemporaryDirectory(prefix=".template-", dir=self._folder) as work:
            self.make(Path(work))
            self.open(Path(work))
            self.close(Path(work))

    def make(self, folder: Path) -> None:
        """Put a new disk into an empty folder."""
        self._copy(self._template, folder)
        write_out(folder / FILE)

    def fork(self, source: Path, folder: Path) -> None:
        """Put a copy of a disk, as it is at one moment, into an empty folder."""
        image = source / FILE
        if not self.is_open(source) and mounts.is_looped(image):
            # Someone still has its file system, so the file alone may not be whole.
            self.open(source)
        (folder / _FORKED).touch()
        if not self.is_open(source):
            self._copy(image, folder)
            return
        with mounts.frozen(source / TREE):
            self._copy(image, folder)

    def settle(self, folder: Path) -> None:
        """Have a copy on the disk."""
        write_out(folder / FILE)

    def is_open(self, folder: Path) -> bool:
        """Whether its tree is mounted."""
        return mounts.is_mounted(folder / TREE)

    def open(self, folder: Path) -> None:
        """Mount its tree, repaired if it was not unmounted in order."""
        if self.is_open(folder):
            return
        image = folder / FILE
        if not is_clean(image) and not mounts.is_looped(image):
            mounts.run("e2fsck", "-p", str(image), good=_FSCK_GOOD)
        mounts.mount_image(image, folder / TREE)
        if (folder / _FORKED).exists():
            # What was half uploaded belongs to the other one.
            halves = [str(folder / TREE / name) for name in ("uploads", "staging")]
            mounts.run("rm", "-rf", "--one-file-system", "--", *halves)
            (folder / TREE / "uploads").mkdir(mode=0o700)
            (folder / _FORKED).unlink()

    def close(self, folder: Path) -> bool:
        """Unmount its tree; False where something still uses it."""
        if not self.is_open(folder):
            return True
        mounts.sync(folder / TREE)
        deadline = time.monotonic() + _BUSY_S
        while not mounts.unmount(folder / TREE):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        # A container that starts has a copy of every mount for a moment.
        while mounts.is_looped(folder / FILE) and time.monotonic() < deadline:
            time.sleep(0.005)
        return True

    def abandon(self, folder: Path) -> None:
        """Unmount its tree whoever uses it: it is about to be deleted."""
        mounts.unmount_all(folder)

    def room(self, folder: Path) -> int:
        """Bytes that can still be written; its tree must be mounted."""
        found = os.statvfs(folder / TREE)
        return found.f_bavail * found.f_frsize

    def recover(self, folder: Path) -> None:
        """Undo what a broker that has died may have left."""
        if self.is_open(folder):
            mounts.thaw(folder / TREE)

    def _copy(self, image: Path, folder: Path) -> None:
        (folder / TREE).mkdir(mode=0o700)
        with image.open("rb") as old, (folder / FILE).open("xb") as new:
            tree.copy_file(old.fileno(), new.fileno())


def layout(folder: Path, *, uid: int) -> None:
    """The tree of a new environment: what the sandbox sees below `root`, the rest beside it."""
    folder.mkdir(mode=0o700)
    (folder / "uploads").mkdir(mode=0o700)
    (folder / "root").mkdir(mode=0o755)
    for name in FOLDERS:
        made = folder / "root" / name
        made.mkdir(mode=0o755)
        if os.geteuid() == 0:
            os.chown(made, uid, uid)


def is_clean(image: Path) -> bool:
    """Whether a file system was unmounted, or frozen, in order."""
    with image.open("rb") as file:
        file.seek(_SUPERBLOCK)
        block = file.read(_SUPERBLOCK)
    if len(block) < _SUPERBLOCK or block[0x38:0x3A] != b"\x53\xef":
        raise OSError(errno.EIO, f"{image.name} holds no file system")
    (state,) = struct.unpack_from("<H", block, _STATE_OFFSET)
    (incompat,) = struct.unpack_from("<I", block, _INCOMPAT_OFFSET)
    return state == _CLEAN and not incompat & _NEEDS_RECOVERY


def write_out(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
