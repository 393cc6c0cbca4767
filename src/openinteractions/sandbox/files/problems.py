"""What the system says of a path, as the errors of this program."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from openinteractions.errors import (
    AppError,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    TooLarge,
)
from openinteractions.sandbox.files.paths import Parts, shown
from openinteractions.sandbox.port import SandboxError

_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK}
_LINKS: Final = {errno.EXDEV, errno.ELOOP}


@contextmanager
def explained(parts: Parts, environment: str = "") -> Generator[None]:
    """Turn what the system says about a path into the errors of this program."""
    try:
        yield
    except OSError as error:
        raise explain(error, parts, environment) from error


def explain(error: OSError, parts: Parts, environment: str = "") -> AppError:
    """The error to raise for what the system said about a path."""
    name = shown(parts)
    where = f" in environment '{environment}'" if environment else ""
    number = error.errno or 0
    if number in _FULL:
        return TooLarge("The environment's disk is full: nothing more can be written to it.")
    simple: dict[int, AppError] = {
        errno.ENOENT: NotFound(f"Path '{name}' not found{where}."),
        errno.ENOTDIR: Invalid(f"A part of the path '{name}' is not a directory."),
        errno.EISDIR: Invalid(f"Path '{name}' is a directory."),
        errno.ENOTEMPTY: Invalid(f"The directory '{name}' is not empty."),
        errno.EEXIST: exists(parts, environment),
        errno.ENAMETOOLONG: Invalid(f"The path '{name[:200]}' is too long."),
        errno.EACCES: Forbidden(f"The mode of '{name}' does not allow that."),
        errno.EPERM: Forbidden(f"'{name}' cannot be changed."),
    }
    if number in _LINKS:
        return Invalid(f"The path '{name}' has a link in it that leads out of the environment.")
    return simple.get(number) or SandboxError(
        f"The environment's disk failed at '{name}': {error.strerror}."
    )


def exists(parts: Parts, environment: str = "") -> Conflict:
    """409: something has this name already."""
    where = f" in environment '{environment}'" if environment else ""
    return Conflict(
        f"Path '{shown(parts)}' already exists{where}. Set overwrite=true to replace it."
    )
