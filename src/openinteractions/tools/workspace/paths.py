"""Paths as models write them, and what lies there."""

import difflib
from dataclasses import dataclass
from typing import Final

from openinteractions.errors import Invalid, NotFound, RequestError
from openinteractions.sandbox import tops
from openinteractions.sandbox.port import FOLDERS, MOUNTS, Entry
from openinteractions.tools.port import Workplace

FOLDERS_SHOWN: Final = "/workspace, /.agents and /home/agent"
PATH_HELP: Final = "Absolute (/workspace/a.py), or relative to /workspace."

_WORKSPACE: Final = "workspace"
_HOME: Final = "home"
_LOOK_AMONG: Final = 500
_ALIKE: Final = 0.6


@dataclass(frozen=True, slots=True)
class Path:
    """A path inside the environment."""

    stored: str
    """From the environment's root: `home/a.txt`."""

    @property
    def shown(self) -> str:
        """In the sandbox: `/home/agent/a.txt`."""
        return in_sandbox(self.stored)

    @property
    def name(self) -> str:
        """Its last component."""
        return self.stored.rpartition("/")[2]

    @property
    def folder(self) -> "Path":
        """What it lies in; a folder at the top lies in itself."""
        return Path(self.stored.rpartition("/")[0] or self.stored)


def in_sandbox(stored: str) -> str:
    """A path from the environment's root, as it is in the sandbox."""
    top, slash, rest = stored.partition("/")
    return f"{tops.place(top)}{slash}{rest}"


def parse(given: str) -> Path:
    """What a model's path means.

    Raises:
        Invalid: It is outside of the environment's folders, or no path at all.
    """
    if "\0" in given:
        raise Invalid("A path cannot have a NUL character in it.")
    text = given.strip() or "."
    if text == "~" or text.startswith("~/"):
        text = MOUNTS[_HOME] + text[1:]
    parts = [part for part in text.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise Invalid(f"The path '{given[:200]}' has '..' in it: give the absolute path.")
    if not text.startswith("/"):
        return Path("/".join((_WORKSPACE, *parts)))
    for folder, target in MOUNTS.items():
        above = target.strip("/").split("/")
        if parts[: len(above)] == above:
            return Path("/".join((folder, *parts[len(above) :])))
    # One that a source made, as far as can be told from here.
    if parts and tops.is_further(parts[0]):
        return Path("/".join(parts))
    raise Invalid(
        f"'{given[:200]}' is not in one of the folders that this tool has: {FOLDERS_SHOWN}. "
        "For other places in the sandbox, such as /tmp, use code_execution."
    )


async def found(place: Workplace, path: Path) -> Entry:
    """What is at a path.

    Raises:
        NotFound: Nothing; the message names what is called alike.
    """
    try:
        return await place.stat(path.stored)
    except NotFound:
        raise NotFound(f"There is no {path.shown}.{await _hint(place, path)}") from None


async def found_file(place: Workplace, path: Path) -> Entry:
    """As `found`, for what has to be a file.

    Raises:
        Invalid: It is none.
    """
    entry = await found(place, path)
    if entry.type == "directory":
        raise Invalid(f"{path.shown} is a folder: list_files shows what is in it.")
    if entry.type == "symlink":
        raise Invalid(f"{path.shown} is a link that leads to no file of this environment.")
    return entry


async def _hint(place: Workplace, path: Path) -> str:
    """Where the model may have meant."""
    if path.stored.startswith(tuple(f"{_WORKSPACE}/{folder}/" for folder in FOLDERS)):
        return _hint_of(path.stored.partition("/")[2])
    try:
        entries, _ = await place.list(path.folder.stored, limit=_LOOK_AMONG)
    except RequestError:
        return await _hint_above(place, path)
    names = {Path(entry.path).name: entry for entry in entries}
    alike = difflib.get_close_matches(path.name, names, n=3, cutoff=_ALIKE)
    if not alike:
        return f" list_files shows what is in {path.folder.shown}."
    return f" Did you mean {' or '.join(in_sandbox(names[name].path) for name in alike)}?"


async def _hint_above(place: Workplace, path: Path) -> str:
    """The same where not even the folder exists."""
    top, _, below = path.stored.partition("/")
    if top == _WORKSPACE and await _has_further(place, below.partition("/")[0]):
        return _hint_of(below)
    if tops.is_further(top) and not await _has_further(place, top):
        return f" The folders of this environment are {FOLDERS_SHOWN}."
    return f" The folder {path.folder.shown} does not exist either."


def _hint_of(meant: str) -> str:
    return f" Relative paths begin at /workspace: did you mean {in_sandbox(meant)}?"


async def _has_further(place: Workplace, name: str) -> bool:
    """Whether a folder of this name lies beside the three."""
    try:
        return tops.is_further(name) and (await place.stat(name)).type == "directory"
    except RequestError:
        return False
