"""An environment's disk as a plain folder: no root needed; its size is watched, not enforced."""

from pathlib import Path
from typing import Final

from openinteractions.errors import TooLarge
from openinteractions.sandbox import mounts
from openinteractions.sandbox.disks import tree
from openinteractions.sandbox.disks.image import TREE, layout

_TOLERANCE: Final = 1.1
"""What is only watched may be over its bound by so much."""
_MANY: Final = 2**17
_BYTES_PER_FILE, _BYTES_PER_SMALL_FILE = 16384, 4096


class Folders:
    """Disks as plain folders."""

    def __init__(self, *, size_bytes: int, uid: int) -> None:
        self.size = size_bytes
        """What one may hold."""
        self._uid = uid
        # As many files as an ext4 image of the size would take: they cost memory, and time.
        small = min(size_bytes // _BYTES_PER_SMALL_FILE, _MANY)
        self.per_entry = size_bytes // max(size_bytes // _BYTES_PER_FILE, small)
        """Bytes that each name counts as, at least."""

    @property
    def hard_size(self) -> int:
        """What is never let pass."""
        return int(self.size * _TOLERANCE)

    def make(self, folder: Path) -> None:
        """Put a new disk into an empty folder."""
        layout(folder / TREE, uid=self._uid)
        mounts.sync(folder)

    def fork(self, source: Path, folder: Path) -> None:
        """Put a copy of a disk into an empty folder; what changes meanwhile may be in it or not."""
        layout(folder / TREE, uid=self._uid)
        try:
            tree.copy(
                source / TREE / "root",
                folder / TREE / "root",
                most=self.hard_size,
                per_entry=self.per_entry,
            )
        except tree.Overfull:
            raise TooLarge(
                f"The environment cannot be copied: it has more than its {self.size} bytes "
                "(setting sandbox.disk_bytes). Delete files in it."
            ) from None

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
        return self.size - self.charged(folder)

    def charged(self, folder: Path, *, most: int | None = None, within_s: float = 60.0) -> int:
        """Bytes that it counts with; where it is more than `most`, any number above that."""
        stop = tree.Stop(most=most, per_entry=self.per_entry, within_s=within_s)
        usage = tree.measure(folder / TREE, stop)
        charged = usage.charge(self.per_entry)
        # What cannot be measured is not to be used for hiding.
        return max(charged, self.hard_size + 1) if usage.is_too_deep else charged

    def recover(self, _folder: Path) -> None:
        """Nothing can be left behind."""
