"""The few mount calls that disks and the pool of warm sandboxes need (Linux, root).

Straight calls where a claim waits for them (a bind mount is then a fraction of a millisecond);
the `mount` command where a loop device has to be found, since it knows how to share one.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# <https://man7.org/linux/man-pages/man2/mount.2.html>, values of linux/mount.h.
_MS_BIND = 0x1000
_MS_PRIVATE = 1 << 18
_MS_SHARED = 1 << 20
_MNT_DETACH = 2
# <https://man7.org/linux/man-pages/man2/ioctl_fsfreeze.2.html> (linux/fs.h).
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878

_IMAGE_OPTIONS = "loop,nosuid,nodev,noatime,discard,noinit_itable,errors=remount-ro"
_COMMAND_S = 30

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MountPoint:
    """A line of this process's mount table."""

    path: Path
    is_shared: bool


def bind(source: Path, target: Path) -> None:
    """Mount a folder at a second place."""
    _mount(source, target, _MS_BIND)


def share(folder: Path) -> None:
    """Make a folder a mount of its own, whose later mounts appear in the containers that have it.

    Nothing happens where it is one already.
    """
    if any(point.path == folder and point.is_shared for point in points(folder)):
        return
    bind(folder, folder)
    # Private first: where the parent is shared too, the two would else be peers, and every mount
    # below would be made twice.
    _mount(None, folder, _MS_PRIVATE)
    _mount(None, folder, _MS_SHARED)


def unmount(target: Path, *, lazily: bool = False) -> bool:
    """Unmount what lies at a path; False where something still uses it.

    Args:
        target: A mount point, or a path that is none: nothing happens then.
        lazily: Take it out of the tree now; it ends when its last user does.
    """
    if _libc.umount2(os.fsencode(target), _MNT_DETACH if lazily else 0) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EBUSY:
        return False
    if number in {errno.EINVAL, errno.ENOENT}:
        return True
    raise OSError(number, os.strerror(number), str(target))


def unmount_all(folder: Path) -> None:
    """Take every mount at and below a folder out of the tree, deepest first."""
    for point in sorted(points(folder), key=lambda each: len(each.path.parts), reverse=True):
        unmount(point.path, lazily=True)


def points(folder: Path) -> list[MountPoint]:
    """The mounts at and below a folder."""
    return [point for point in _table() if point.path.is_relative_to(folder)]


def is_mounted(folder: Path) -> bool:
    """Whether something is mounted at this very path."""
    try:
        return folder.stat().st_dev != folder.parent.stat().st_dev
    except FileNotFoundError:
        return False


def mount_image(image: Path, target: Path) -> None:
    """Mount a file with an ext4 file system in it; a loop device that has it already is shared.

    Raises:
        OSError: It does not work; the message is the command's.
    """
    run("mount", "-t", "ext4", "-o", _IMAGE_OPTIONS, str(image), str(target))


def is_looped(image: Path) -> bool:
    """Whether a loop device still has this file: its file system may be in use somewhere."""
    wanted = str(image)
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if entry.read_text(encoding="utf-8", errors="replace").rstrip("\n") == wanted:
                return True
    return False


@contextmanager
def frozen(folder: Path) -> Generator[None]:
    """Write a mounted file system out, and hold every change to it until the end."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(handle, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(handle, _FITHAW, 0)
    finally:
        os.close(handle)


def thaw(folder: Path) -> None:
    """Let a file system go on that a broker which has died may have frozen."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.ioctl(handle, _FITHAW, 0)
    finally:
        os.close(handle)


def sync(folder: Path) -> None:
    """Write out the file system that a folder is on."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(handle) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(handle)


def run(*argv: str, good: frozenset[int] = frozenset({0})) -> None:
    """Run a system command.

    Raises:
        OSError: It is not there, failed, or took too long; the message is its own.
    """
    try:
        done = subprocess.run(  # noqa: S603 - fixed commands, and paths that we made
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_S,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{argv[0]} took longer than {_COMMAND_S} s") from error
    if done.returncode not in good:
        said = (done.stderr or done.stdout).strip()[:500]
        full = errno.ENOSPC if os.strerror(errno.ENOSPC) in said else errno.EIO
        raise OSError(full, f"{argv[0]}: {said or f'exit code {done.returncode}'}")


def _mount(source: Path | None, target: Path, flags: int) -> None:
    first = None if source is None else os.fsencode(source)
    if _libc.mount(first, os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _table() -> Iterator[MountPoint]:
    """<https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html>."""
    with Path("/proc/self/mountinfo").open("rb") as lines:
        for line in lines:
            fields = line.split()
            optional = fields[6 : fields.index(b"-")]
            path = fields[4].decode("unicode_escape").encode("latin-1")
            yield MountPoint(
                Path(os.fsdecode(path)), any(field.startswith(b"shared:") for field in optional)
            )
