"""Names of files: the public forms, what they may not be, and what a link's target means.

A path means what it means in the sandbox: `/workspace/x` is this environment's `workspace`,
`/data/x` its folder `data` if it has one, and `/usr/x` is not of the tree at all.
"""

from collections.abc import Container, Sequence
from typing import Final, TypeAlias

from openinteractions.errors import Invalid
from openinteractions.sandbox import tops
from openinteractions.sandbox.port import FOLDERS, MOUNTS

Parts: TypeAlias = tuple[bytes, ...]
"""A path from the environment's root; empty for the root itself."""

MAX_PATH_BYTES: Final = 4096
_MAX_NAME_BYTES: Final = 255

TOP: Final = tuple(sorted(name.encode() for name in FOLDERS))
"""The names that are always in the tree's root."""

_INSTRUCTIONS: Final = b"AGENTS.md"

MOUNT_FOLDERS: Final = {
    tuple(part.encode() for part in target.strip("/").split("/")): name.encode()
    for name, target in MOUNTS.items()
}
"""Folder of the tree by its path in the sandbox."""

ABOVE_MOUNTS: Final = {place[:size] for place in MOUNT_FOLDERS for size in range(len(place))}
"""Paths in the sandbox on the way to those."""

_IN_SANDBOX: Final = {folder: place for place, folder in MOUNT_FOLDERS.items()}
"""The other way round."""


def is_top(name: bytes) -> bool:
    """Whether a folder of this name may be in the tree's root."""
    return name in TOP or is_further(name)


def is_further(name: bytes) -> bool:
    """Whether a folder of this name may lie there beside the three."""
    return tops.is_further(name.decode("ascii", errors="replace"))


def in_sandbox(top: bytes) -> Parts:
    """The path in the sandbox of a folder in the tree's root."""
    return _IN_SANDBOX.get(top, (top,))


def parse(path: str) -> Parts:
    """The components of a path in any of its public forms; none for the root.

    `a//b` and `./a/b/` are `a/b`. With a leading slash it may also be the path in the sandbox:
    `/workspace/x` is `workspace/x`, and `/home/agent/x` is `home/x`.

    Raises:
        Invalid: It is too long, climbs with `..`, or cannot be a file's name.
    """
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        raise Invalid("A path must be valid Unicode.") from None
    if len(raw) > MAX_PATH_BYTES:
        raise Invalid(f"A path may have {MAX_PATH_BYTES} bytes at most.")
    parts = checked(raw)
    if raw.startswith(b"/"):
        for place, folder in MOUNT_FOLDERS.items():
            if parts[: len(place)] == place:
                return (folder, *parts[len(place) :])
    return parts


def checked(raw: bytes) -> Parts:
    """The components of a relative path as bytes.

    Raises:
        Invalid: It climbs with `..`, or has a name that cannot be.
    """
    parts = tuple(part for part in raw.split(b"/") if part not in {b"", b"."})
    if b".." in parts:
        raise Invalid(f"The path '{_short(raw)}' has '..' in it, which is not possible here.")
    if b"\0" in raw:
        raise Invalid("A path cannot have a NUL character in it.")
    if any(len(part) > _MAX_NAME_BYTES for part in parts):
        raise Invalid(f"A name in a path may have {_MAX_NAME_BYTES} bytes at most.")
    return parts


def for_writing(path: str, *, is_folder: bool = False) -> Parts:
    """`parse`, for a path where something is to be written.

    Args:
        path: In any public form.
        is_folder: A folder at the top itself will do.

    Raises:
        Invalid: Also if no folder at the top can have it. Whether there is one is not looked at.
    """
    parts = parse(path)
    if not parts or not is_top(parts[0]):
        names = ", ".join(f"'{name}'" for name in FOLDERS)
        raise Invalid(
            f"The path '{_short(path.encode())}' must be in one of the folders {names}"
            f"{_why_not(parts)}."
        )
    if len(parts) == 1 and not is_folder:
        if parts[0] in TOP:
            raise Invalid(f"'{shown(parts)}' is one of the environment's own folders.")
        raise Invalid(
            "At its top an environment has only its own folders, and they stay: "
            f"use '{instead_of(parts)}' instead of '{_short(parts[0])}'."
        )
    return parts


def _why_not(parts: Parts) -> str:
    if not parts:
        return ""
    top = shown(parts[:1])
    why = (
        f"'/{top}' is the sandbox's own"
        if top in tops.RESERVED
        else "a folder beside them has a name of at most 100 letters, digits, '.', '_' and '-'"
    )
    return f", such as '{instead_of(parts)}': {why}"


def instead_of(parts: Parts) -> str:
    """Where what cannot lie at this path may lie."""
    if parts == (_INSTRUCTIONS,):
        return f"/.agents/{shown(parts)}"
    is_reserved = shown(parts[:1]) in tops.RESERVED
    return f"/workspace/{_short(b'/'.join(parts[1:] if is_reserved and parts[1:] else parts))}"


def shown(parts: Sequence[bytes]) -> str:
    """A path for people and JSON: bytes that are not UTF-8 appear as U+FFFD."""
    return b"/".join(parts).decode(errors="replace")


def _short(raw: bytes) -> str:
    return raw[:200].decode(errors="replace")


def leads_inside(parts: Parts, target: bytes, further: Container[bytes]) -> bool:
    """Whether a link at this path with this target would name something of the tree.

    Args:
        parts: Where the link is.
        target: Where it leads.
        further: The folders that the tree has beside the three.
    """
    place = [] if target.startswith(b"/") else [*in_sandbox(parts[0]), *parts[1:-1]]
    for name in target.split(b"/"):
        if name == b"..":
            del place[-1:]
        elif name not in {b"", b"."}:
            place.append(name)
        if tuple(place) not in ABOVE_MOUNTS and not _is_inside(place, further):
            return False
    return tuple(place) not in ABOVE_MOUNTS


def _is_inside(place: Sequence[bytes], further: Container[bytes]) -> bool:
    return place[0] in further or any(
        tuple(place[: len(mount)]) == mount for mount in MOUNT_FOLDERS
    )
