"""Trees of environments and archives for tests."""

import io
import os
import tarfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from openinteractions.sandbox.files.tree import Tree
from openinteractions.sandbox.port import FOLDERS, UID

OWNER = UID if os.geteuid() == 0 else os.geteuid()


def plant(disk: Path) -> Tree:
    """A new environment's tree on a disk."""
    for name in FOLDERS:
        folder = disk / "root" / name
        folder.mkdir(parents=True)
        os.chown(folder, OWNER, OWNER)
    return Tree(disk / "root", uid=OWNER, gid=OWNER, environment="env1")


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def read(tree: Tree, path: str, **options) -> bytes:
    async with tree.read(path, **options) as reading:
        content = b"".join([chunk async for chunk in reading.chunks()])
        assert len(content) == reading.size
        return content


async def tarred(tree: Tree, path: str = "", *, recursive: bool = True) -> bytes:
    async with tree.tar(path, recursive=recursive) as pieces:
        return b"".join([piece async for piece in pieces])


async def names(tree: Tree, path: str = "", **options) -> list[str]:
    """All pages of a list."""
    found: list[str] = []
    after = ""
    while True:
        page = await tree.list(path, after=after, **options)
        found += [entry.path for entry in page.entries]
        if page.next_after is None:
            return found
        after = page.next_after


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=kind, linkname=target)


def folder(name: str, mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.DIRTYPE, mode=mode)


def archive(
    *members: tuple[tarfile.TarInfo, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def unpacked(content: bytes) -> dict[str, bytes | str | None]:
    """Members of a tar: a file's bytes, a link's target, None for a folder."""
    found: dict[str, bytes | str | None] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for info in tar:
            file = tar.extractfile(info) if info.isfile() else None
            found[info.name] = file.read() if file else info.linkname or None
    return found


def snapshot(folders: Iterable[Path]) -> dict[str, tuple]:
    """Everything about folders that an operation could have changed by mistake."""
    found = {}
    for top in folders:
        for path in [top, *sorted(top.rglob("*"))]:
            status = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found[str(path)] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_nlink,
                status.st_mtime_ns,
                status.st_ctime_ns,
                content,
            )
    return found


def descriptors() -> list[str]:
    """What this process has open."""
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def plant_odd_name(folder: Path, content: bytes = b"") -> None:
    """A file whose name is not UTF-8."""
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")).write_bytes(content)
