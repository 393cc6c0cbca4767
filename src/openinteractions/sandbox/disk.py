"""Environments' disks: made, opened, copied and deleted, one at a time for each environment.

    <folder>/environments/<id>/disk.img    an ext4 image (kind `image`)
                               fs/root/    what the sandbox sees: workspace, .agents, home
                               fs/uploads/ staged uploads; the sandbox never sees them
                               settling.…  a copy that may not be wholly on the disk yet
    <folder>/environments/.<id>-…          half made or half deleted; removed at the next start

A disk appears under its name, and its name on the disk, before anyone is told of it. A copy is
written out after that, since no one could wait for it; its mark says of what it is a copy and since
which boot. Only where the machine itself went down in that second it is made again, of what the
source then is.

Mounts belong to the machine and not to this process: a broker that comes back finds the disks open
as they were.
"""

import asyncio
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

import structlog

from openinteractions.errors import SetupError, Unready
from openinteractions.sandbox import mounts
from openinteractions.sandbox.disks import tree
from openinteractions.sandbox.disks.folder import Folders
from openinteractions.sandbox.disks.image import FILE, TREE, Images, write_out
from openinteractions.sandbox.disks.tree import Usage
from openinteractions.sandbox.port import UID, Gone, SandboxError

_log = structlog.get_logger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

_ID = re.compile(r"[0-9a-f]{32}")
_THREADS = 8
_MAX_PID = 20
_LOW_SHARE = 0.05
_LOW_BYTES = 2**30
_COUNT_S = 2.0
_SETTLING = re.compile(r"settling\.([0-9a-f]{32})\.(.+)")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# The machine's own process namespace, a fixed number of the kernel (PROC_PID_INIT_INO).
_HOST_PIDS = 0xEFFFFFFC


@dataclass(frozen=True, slots=True)
class Fill:
    """How full a plain folder is, whose size nothing else bounds."""

    charged: int
    """Bytes that it counts with."""
    size: int
    """What it may hold."""
    hard_size: int
    """What is never let pass."""
    took_s: float
    """To find out."""


class _Kind(Protocol):
    def make(self, folder: Path, /) -> None: ...
    def fork(self, source: Path, folder: Path, /) -> None: ...
    def is_open(self, folder: Path, /) -> bool: ...
    def open(self, folder: Path, /) -> None: ...
    def close(self, folder: Path, /) -> bool: ...
    def abandon(self, folder: Path, /) -> None: ...
    def room(self, folder: Path, /) -> int: ...
    def settle(self, folder: Path, /) -> None: ...
    def recover(self, folder: Path, /) -> None: ...


class Disks:
    """The disks of one broker. `recover` comes first, `close` last; ids are 32 hex digits."""

    def __init__(
        self,
        folder: Path,
        *,
        kind: Literal["auto", "image", "folder"] = "auto",
        size_bytes: int,
        uid: int = UID,
    ) -> None:
        self.uid = uid if os.geteuid() == 0 else os.geteuid()
        """Owner of the files, so the user that the sandbox has to run as."""
        self.kind: Literal["auto", "image", "folder"] = kind
        """What new disks are; `recover` decides on `auto`."""
        self._folder = folder.resolve()
        self._home = self._folder / "environments"
        self._images = Images(self._folder, size_bytes=size_bytes, uid=self.uid)
        self._folders = Folders(size_bytes=size_bytes, uid=self.uid)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="disk")
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._lock_file: int | None = None
        self._why_folder: str | None = None
        self._counting: dict[str, asyncio.Future[Usage]] = {}
        self._counted: dict[str, Usage] = {}
        """What was counted last, to its end."""

    async def recover(self) -> Sequence[str]:
        """Take the folder over, tidy what a broker before has left; the environments found.

        Raises:
            SetupError: Another broker has it, it cannot be written, or the kind does not work.
        """
        return await self._run(self._recover)

    async def close(self) -> None:
        """Let the folder go. Disks stay open: sandboxes may still use them."""
        await asyncio.to_thread(self._threads.shutdown)
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    async def ensure(self, env: str) -> None:
        """Have a disk: made if it is not there.

        Raises:
            Unready: The broker's own disk is full, or nearly so.
        """
        async with self._alone(env):
            await self._run(self._ensure, env)

    async def open(self, env: str) -> Path:
        """The root of its tree on this machine, mounted.

        Raises:
            Gone: It has no disk.
            SandboxError: It is damaged beyond repair.
        """
        async with self._alone(env):
            return await self._run(self._open, env)

    async def release(self, env: str) -> bool:
        """Unmount it; False where something still uses it (a sandbox, a download)."""
        async with self._alone(env):
            return await self._run(self._release, env)

    async def fork(self, source: str, env: str) -> None:
        """Give an environment a copy of another's disk as it is now; nothing if it has a disk.

        The source may be in use: its writers wait while the copy is made.

        Raises:
            Gone: The source has no disk.
            TooLarge: The source holds more than it may.
            Unready: The broker's own disk is full, or nearly so.
        """
        async with self._alone(source, env):
            await self._run(self._fork, source, env)

    async def delete(self, env: str) -> None:
        """Remove its disk and all files; nothing happens where there is none."""
        async with self._alone(env):
            await self._run(self._delete, env)
            self._counted.pop(env, None)

    async def usage(self, env: str) -> Usage:
        """What the sandbox's files are, as far as it can be told soon.

        Of a large tree it is what was counted last, or a part.

        Raises:
            Gone: It has no disk.
        """
        counting = self._counting.get(env)
        if counting is None:
            counting = asyncio.ensure_future(self._count(env))
            self._counting[env] = counting
            counting.add_done_callback(lambda done: self._end_count(env, done))
        return await asyncio.shield(counting)

    def _end_count(self, env: str, done: asyncio.Future[Usage]) -> None:
        del self._counting[env]
        if not done.cancelled():
            # Whoever asked may have left.
            done.exception()

    async def _count(self, env: str) -> Usage:
        async with self._alone(env):
            root = await self._run(self._open, env)
        usage = await self._run(tree.measure, root, tree.Stop(within_s=_COUNT_S))
        if usage.is_partial:
            return self._counted.get(env, usage)
        self._counted[env] = usage
        return usage

    async def fill(self, env: str, *, most: int | None = None) -> Fill | None:
        """How full it is; None where its file system bounds it.

        Args:
            env: The environment.
            most: Look no further once it has more than this.

        Raises:
            Gone: It has no disk.
        """
        return await self._run(self._fill, env, most)

    async def room(self, env: str) -> int:
        """Bytes that it may still write; none or fewer: it is full.

        An image ends writes itself; a plain folder has to be asked.

        Raises:
            Gone: It has no disk.
        """
        async with self._alone(env):
            await self._run(self._open, env)
        return await self._run(self._room, env)

    async def list(self) -> Sequence[str]:
        """The environments that have a disk."""
        return await self._run(self._list)

    async def mounted(self) -> Sequence[str]:
        """The environments whose disk is mounted, also by a broker before."""
        return await self._run(self._mounted)

    async def problems(self) -> Sequence[str]:
        """What the operator should know, each with its fix."""
        return await self._run(self._problems)

    # What follows runs in threads.

    def _recover(self) -> Sequence[str]:
        try:
            for folder in (self._folder, self._home):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.chmod(0o700)
        except OSError as error:
            raise SetupError(f"Cannot use the folder for sandboxes: {error}.") from error
        self._lock()
        for entry in self._home.iterdir():
            if entry.name.startswith("."):
                _log.info("disk.leftover_removed", name=entry.name)
                self._remove(entry)
        self._decide()
        found = self._list()
        for env in found:
            self._of(self._home / env).recover(self._home / env)
        for env in found:
            self._settle_or_redo(env)
        return self._list()

    def _lock(self) -> None:
        handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, _MAX_PID, 0).decode("ascii", "replace").strip()
            os.close(handle)
            raise SetupError(
                f"Another broker{f' (pid {owner})' if owner else ''} uses the folder "
                f"{self._folder}: stop it, with `kill -9` if it hangs. Only a broker of another "
                "name needs a folder of its own (sandbox.broker, sandbox.data_dir)."
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, b"%d\n" % os.getpid(), 0)
        self._lock_file = handle

    def _decide(self) -> None:
        if self.kind == "folder":
            return
        reason = self._why_no_images()
        if reason is None:
            self.kind = "image"
        elif self.kind == "image":
            raise SetupError(f"sandbox.disk = image does not work here: {reason}.")
        else:
            self.kind = "folder"
            self._why_folder = reason

    def _why_no_images(self) -> str | None:
        if os.geteuid() != 0:
            return "mounting needs root"
        # Mounts that a container makes are not seen by the engine outside.
        if self.kind == "auto" and Path("/proc/self/ns/pid").stat().st_ino != _HOST_PIDS:
            return "the broker runs in a container"
        try:
            self._images.check()
        except OSError as error:
            return str(error)
        return None

    def _problems(self) -> Sequence[str]:
        found: list[str] = []
        if self._why_folder is not None:
            found.append(
                f"The size of environments is only watched, not enforced ({self._why_folder}): "
                "run the broker as root on the engine's own machine."
            )
        disk = os.statvfs(self._folder)
        free = disk.f_bavail / max(disk.f_blocks, 1)
        if free < _LOW_SHARE:
            found.append(
                f"Only {free:.1%} of the disk with {self._folder} is free; when it is full, "
                "environments' writes fail: make room, or set sandbox.data_dir to a larger disk."
            )
        return found

    def _list(self) -> Sequence[str]:
        return sorted(entry.name for entry in self._home.iterdir() if _ID.fullmatch(entry.name))

    def _mounted(self) -> Sequence[str]:
        folders = [(env, self._home / env) for env in self._list()]
        images = ((env, folder) for env, folder in folders if (folder / FILE).exists())
        return [env for env, folder in images if self._images.is_open(folder)]

    def _of(self, folder: Path) -> _Kind:
        """An environment keeps the kind that it was made with."""
        return self._images if (folder / FILE).exists() else self._folders

    def _new(self) -> _Kind:
        return self._images if self.kind == "image" else self._folders

    def _at(self, env: str) -> Path:
        folder = self._home / env
        if not folder.is_dir():
            raise Gone(f"The environment {env} has no disk here.")
        return folder

    def _check_host(self) -> None:
        """Disks may grow to more than the host has: so none is added to a full one.

        Raises:
            Unready: There is too little room.
        """
        disk = os.statvfs(self._home)
        free, whole = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if free < min(_LOW_SHARE * whole, _LOW_BYTES):
            raise Unready(
                f"The broker's disk is nearly full ({free // 2**20} MiB free): it takes no more "
                "environments until its operator makes room.",
                retry_after_s=30,
            )

    def _fill(self, env: str, most: int | None) -> Fill | None:
        folder = self._at(env)
        if self._of(folder) is not self._folders:
            return None
        kind, began = self._folders, time.monotonic()
        charged = kind.charged(folder, most=most)
        return Fill(charged, kind.size, kind.hard_size, time.monotonic() - began)

    def _ensure(self, env: str) -> None:
        if not (self._home / env).is_dir():
            self._check_host()
            self._appear(env, self._new().make)

    def _fork(self, source: str, env: str) -> None:
        if not (self._home / env).is_dir():
            self._at(source)
            self._check_host()
            self._copy(source, env)

    def _copy(self, source: str, env: str) -> None:
        old = self._at(source)
        kind = self._of(old)
        mark = f"settling.{source}.{_boot()}"

        def make(new: Path) -> None:
            (new / mark).touch()
            kind.fork(old, new)

        self._appear(env, make)
        self._threads.submit(self._settle, env)

    def _settle(self, env: str) -> None:
        folder = self._home / env
        try:
            self._of(folder).settle(folder)
            for mark in folder.glob("settling.*"):
                mark.unlink()
        except OSError as error:
            # Deleted meanwhile, or the disk fails: then the next start looks at it again.
            if folder.is_dir():
                _log.error("disk.not_settled", environment_id=env, reason=str(error))

    def _settle_or_redo(self, env: str) -> None:
        """See to a copy whose broker died before it was written out."""
        folder = self._home / env
        marks = [_SETTLING.fullmatch(path.name) for path in folder.glob("settling.*")]
        mark = next((each for each in marks if each is not None), None)
        if mark is None:
            return
        source, boot = mark.groups()
        if boot == _boot():
            self._settle(env)
            return
        _log.warning("disk.copy_was_torn", environment_id=env, source_id=source)
        self._delete(env)
        if (self._home / source).is_dir():
            self._settle_or_redo(source)
            self._copy(source, env)

    def _appear(self, env: str, make: Callable[[Path], None]) -> None:
        """All of it, or nothing."""
        work = self._hidden(env)
        work.mkdir(mode=0o700)
        try:
            make(work)
            write_out(work)
            work.rename(self._home / env)
        except BaseException:
            self._remove(work)
            raise
        write_out(self._home)

    def _open(self, env: str) -> Path:
        folder = self._at(env)
        self._of(folder).open(folder)
        return folder / TREE / "root"

    def _release(self, env: str) -> bool:
        folder = self._home / env
        return not folder.is_dir() or self._of(folder).close(folder)

    def _room(self, env: str) -> int:
        folder = self._at(env)
        return self._of(folder).room(folder)

    def _delete(self, env: str) -> None:
        folder = self._home / env
        if folder.is_dir():
            self._of(folder).abandon(folder)
            work = self._hidden(env)
            folder.rename(work)
            write_out(self._home)
            self._remove(work)

    def _hidden(self, env: str) -> Path:
        return self._home / f".{env}-{secrets.token_hex(4)}"

    def _remove(self, folder: Path) -> None:
        mounts.unmount_all(folder)
        # The command copes with any depth of folders, and never leaves the file system.
        remove = ("rm", "-rf", "--one-file-system", "--", str(folder))
        try:
            mounts.run(*remove)
        except OSError:
            # Folders that their owner may not write stop him, unless he is root.
            mounts.run("chmod", "-R", "u+rwX", "--", str(folder))
            mounts.run(*remove)

    # The way into the threads.

    @asynccontextmanager
    async def _alone(self, *envs: str) -> AsyncGenerator[None]:
        async with AsyncExitStack() as held:
            for env in sorted(set(envs)):
                if not _ID.fullmatch(env):
                    raise ValueError(f"no id of an environment: {env!r}")
                # In one order, so that two forks never wait for each other.
                await held.enter_async_context(self._locks.setdefault(env, asyncio.Lock()))
            yield

    async def _run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run it in a thread, to its end: who was cancelled leaves only then, the lock with him."""
        future = asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))
        is_cancelled = False
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError:
                is_cancelled = True
        try:
            result = future.result()
        except OSError as error:
            raise _explained(error) from error
        if is_cancelled:
            raise asyncio.CancelledError
        return result


def _boot() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()


def _explained(error: OSError) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return Unready("The broker's disk is full.")
    return SandboxError(f"An environment's disk does not work: {error}.")
