"""An environment's disk as a plain folder: no root needed; its size is watched, not enforced."""

from pathlib import Path

from openinteractions.sandbox import mounts
from openinteractions.sandbox.disks import tree
from openinteractions.sandbox.disks.image import TREE, layout


class Folders:
    """Disks as plain folders."""

    def __init__(self, *, size_bytes: int, uid: int) -> None:
        self._size = size_bytes
        self._uid = uid

    def make(self, folder: Path) -> None:
        """Put a new disk into an empty folder."""
        layout(folder / TREE, uid=self._uid)
        mounts.sync(folder)

    def fork(self, source: Path, folder: Path) -> None:
        """Put a copy of a disk into an empty folder; what changes meanwhile may be in it or not."""
        layout(folder / TREE, uid=self._uid)
        tree.copy(source / TREE / "root", folder / TREE / "root")

    def settle(self, folder: Path) -> None:
        """Have a copy on the disk."""
        mounts.sync(folder)

    def is_open(self, folder: Path) -> bool:
        """Whether its tree is there: always."""
        return (folder / TREE).is_dir()

    def open(self, _folder: Path) -> None:
        """Nothing has to be mounted."""

    def close(self, _folder: Path) -> bool:
        """Nothing has to be unmounted."""
        return True

    def abandon(self, _folder: Path) -> None:
        """Nothing has to be unmounted."""

    def room(self, folder: Path) -> int:
        """Bytes that can still be written; negative where it holds more than it should."""
        return self._size - tree.measure(folder / TREE).disk_bytes

    def recover(self, _folder: Path) -> None:
        """Nothing can be left behind."""
