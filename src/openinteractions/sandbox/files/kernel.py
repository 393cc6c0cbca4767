"""System calls that Python does not have: openat2, renameat2 with flags, statx."""

import ctypes
import errno
import functools
import os
import platform
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from openinteractions.errors import SetupError

# https://github.com/torvalds/linux/blob/master/scripts/syscall.tbl and arch/x86/entry/syscalls
_OPENAT2: Final = 437
_NUMBERS: Final = {"x86_64": (316, 332), "aarch64": (276, 291)}

# include/uapi/linux/openat2.h: never leave the start, not through /proc's links, not to a mount.
_BENEATH: Final = 0x08 | 0x02 | 0x01
_NO_LINKS: Final = 0x04
_RENAME_NOREPLACE: Final = 1

_AT_NO_FOLLOW: Final = 0x100
_AT_EMPTY_PATH: Final = 0x1000
_AT_DONT_SYNC: Final = 0x4000
_STATX_BASIC_AND_BIRTH: Final = 0x7FF | 0x800
_STATX_BIRTH: Final = 0x800
_STATX_BYTES: Final = 256
# struct statx up to the times; the four padded timestamps are access, birth, change, modification.
_STATX: Final = struct.Struct("=IIQIIIHHQQQQ qI4x qI4x qI4x qI4x")

_libc = ctypes.CDLL(None)


def _prototype(*kinds: type) -> Callable[..., int]:
    """`syscall` with arguments of these kinds after its number."""
    kind = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, *kinds, use_errno=True)
    return kind(("syscall", _libc))


_openat2 = _prototype(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
_renameat2 = _prototype(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_statx = _prototype(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)


class Stat(NamedTuple):
    """What the kernel says of one file."""

    mode: int
    links: int
    inode: int
    size: int
    blocks: int
    """Of 512 bytes, that are really taken."""
    created: float
    modified: float


def open_beneath(folder: int, path: bytes, flags: int, *, links: bool = True) -> int:
    """Open a path that may not lead out of a folder, nor to another mount, by any trick.

    Args:
        folder: Descriptor of the folder.
        path: Relative to it.
        flags: As of `os.open`; the descriptor is never inherited.
        links: Follow symbolic links that stay inside; else `ELOOP`.

    Raises:
        OSError: `EXDEV` if the path leads out.
    """
    resolve = _BENEATH if links else _BENEATH | _NO_LINKS
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    while True:
        fd = _openat2(_OPENAT2, folder, path, how, len(how))
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def rename_new(from_folder: int, name: bytes, to_folder: int, new_name: bytes) -> None:
    """Rename to a name that is free.

    Raises:
        FileExistsError: It is not.
    """
    number = _numbers()[0]
    if _renameat2(number, from_folder, name, to_folder, new_name, _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def stat(folder: int, name: bytes = b"") -> Stat:
    """Describe an entry of a folder without following it, or with no name the descriptor itself."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_NO_FOLLOW | _AT_EMPTY_PATH | _AT_DONT_SYNC
    if _statx(_numbers()[1], folder, name, flags, _STATX_BASIC_AND_BIRTH, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return _decoded(buffer)


def _decoded(raw: ctypes.Array[ctypes.c_char]) -> Stat:
    # mask, block size, attributes, links, uid, gid, mode, spare, inode, size, blocks, more
    # attributes, then seconds and nanoseconds of each time
    mask, _, _, links, _, _, mode, _, inode, size, blocks, _, *times = _STATX.unpack_from(raw)
    _, _, birth_s, birth_ns, change_s, change_ns, modified_s, modified_ns = times
    if not mask & _STATX_BIRTH or not birth_s:
        birth_s, birth_ns = change_s, change_ns
    return Stat(
        mode=mode,
        links=links,
        inode=inode,
        size=size,
        blocks=blocks,
        created=birth_s + birth_ns / 1e9,
        modified=modified_s + modified_ns / 1e9,
    )


def _numbers() -> tuple[int, int]:
    """Of renameat2 and statx on this processor."""
    return _NUMBERS[_machine()]


@functools.cache
def _machine() -> str:
    return platform.machine()


@functools.cache
def require() -> None:
    """Make sure that this kernel can keep paths inside a folder.

    Raises:
        SetupError: It cannot; there is no safe way to serve files without that.
    """
    if _machine() not in _NUMBERS:
        raise SetupError(f"environments need Linux on x86_64 or aarch64, and this is {_machine()}")
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(open_beneath(root, b".", os.O_PATH))
        stat(root)
    except OSError as error:
        raise SetupError(
            "environments need the system calls openat2 and statx (Linux 5.6 or newer, and a"
            f" container runtime that allows them): {error.strerror}"
        ) from error
    finally:
        os.close(root)
