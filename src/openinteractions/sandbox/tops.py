"""What an environment's tree has at its top, and where that lies in the sandbox.

Three folders always. A source may go beside them, as Google's may: then there is a further one,
and folder `x` of the tree is `/x` in the sandbox. Only sources make them, since a container has to
start anew for one.
"""

import os
import re
from pathlib import Path
from typing import Final

from openinteractions.sandbox.port import FOLDERS, MOUNTS

MAX_FURTHER: Final = 16
"""Each is one more mount of every container of the environment."""

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")

# What the image, the engine or the disk may have at its root.
# <https://refspecs.linuxfoundation.org/FHS_3.0/fhs/ch03.html>
RESERVED: Final = frozenset(
    {
        ".", "..", ".dockerenv", "bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32",
        "lost+found", "media", "mnt", "opt", "proc", "root", "run", "sbin", "srv", "sys", "tmp",
        "usr", "var",
    }
)  # fmt: skip
"""Names of the sandbox's own."""


def is_further(name: str) -> bool:
    """Whether a folder of this name may lie beside the three."""
    return name not in FOLDERS and name not in RESERVED and _NAME.fullmatch(name) is not None


def place(top: str) -> str:
    """Where a folder at the top lies in the sandbox."""
    return MOUNTS.get(top, f"/{top}")


def further(root: Path | int) -> list[str]:
    """The names of those beside the three in a tree's root, sorted; links and files are none."""
    with os.scandir(root) as entries:
        return sorted(
            entry.name
            for entry in entries
            if is_further(entry.name) and entry.is_dir(follow_symlinks=False)
        )
