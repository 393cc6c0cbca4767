"""Folders as archives, and archives into folders."""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from openinteractions.errors import AppError, Conflict, Invalid, TooLarge
from openinteractions.sandbox.files import tarball as tarball_module
from openinteractions.sandbox.files.site import Site
from openinteractions.sandbox.files.tarball import Limits, Tarball
from openinteractions.sandbox.files.threads import Halt
from openinteractions.sandbox.files.tree import Tree
from openinteractions.sandbox.files.unpack import unpack
from tests.sandbox.trees import (
    OWNER,
    archive,
    descriptors,
    folder,
    link,
    member,
    names,
    plant,
    plant_odd_name,
    read,
    stream,
    tarred,
    unpacked,
)

LARGE = 1 << 30


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return plant(tmp_path)


@pytest.fixture
def workspace(tree: Tree, tmp_path: Path) -> Path:
    return tmp_path / "root/workspace"


async def extract(tree: Tree, path: str, content: bytes, **options) -> list[str]:
    options.setdefault("max_bytes", LARGE)
    return [entry.path for entry in await tree.extract(path, stream(content), **options)]


async def nothing_happened(tree: Tree, disk: Path) -> bool:
    everything = await names(tree, "", recursive=True)
    return everything == [".agents", "home", "workspace"] and not list((disk / "staging").iterdir())


# Out.


async def test_a_folder_comes_as_a_tar_of_its_files_or_of_everything(tree, workspace):
    for path in ("a", "b/c", "b/d/e"):
        await tree.write(f"workspace/{path}", stream(path.encode()))
    await tree.mkdir("workspace/empty")
    (workspace / "link").symlink_to("/etc/passwd")
    os.mkfifo(workspace / "fifo")
    shallow = unpacked(await tarred(tree, "workspace", recursive=False))
    assert shallow == {"a": b"a", "link": "/etc/passwd"}
    assert unpacked(await tarred(tree, "workspace")) == {
        **shallow,
        "b": None,
        "b/c": b"b/c",
        "b/d": None,
        "b/d/e": b"b/d/e",
        "empty": None,
    }
    assert unpacked(await tarred(tree, "workspace/b/d")) == {"e": b"b/d/e"}
    with pytest.raises(Invalid, match="not a directory"):
        await tarred(tree, "workspace/a")


async def test_the_whole_environment_is_a_tar_that_can_be_put_back(tree, tmp_path):
    await tree.write("workspace/run.sh", stream(b"#!/bin/sh"), mode=0o755)
    await tree.write("home/h", stream(b"h"))
    await tree.write(".agents/AGENTS.md", stream(b"# Agents"))
    whole = await tarred(tree)
    assert list(unpacked(whole)) == [
        ".agents",
        ".agents/AGENTS.md",
        "home",
        "home/h",
        "workspace",
        "workspace/run.sh",
    ]
    assert unpacked(await tarred(tree, recursive=False)) == {}
    other = plant(tmp_path / "other")
    await extract(other, "", whole)
    # But for the time at which a folder got its last file.
    assert unpacked(await tarred(other)) == unpacked(whole)
    assert await extract(other, "/", whole, overwrite=True) == list(unpacked(whole))


async def test_a_tar_has_names_and_sizes_of_all_kinds(tree, workspace):
    contents = {
        "n" * 200: b"x" * 511,
        "ünï/" + "d" * 150 + "/f": b"x" * 512,
        "new\nline": b"x" * 513,
        "large": os.urandom((1 << 20) + 7),
        "exact": os.urandom(1 << 20),
        "empty": b"",
    }
    for path, content in contents.items():
        await tree.write(f"workspace/{path}", stream(content))
    plant_odd_name(workspace, b"odd")
    made = await tarred(tree, "workspace")
    assert len(made) % 10240 == 0
    files = {name: content for name, content in unpacked(made).items() if content is not None}
    assert files == {**contents, "\udcff\udcfe": b"odd"}
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        info = tar.getmembers()[0]
    assert (info.uid, info.gid, info.uname) == (1000, 1000, "agent")


async def test_files_that_change_while_they_are_packed_keep_the_tar_whole(tree, workspace):
    for name in ("a", "b", "c"):
        (workspace / name).write_bytes(name.encode() * (5 << 20))
    (workspace / "z").write_bytes(b"end")
    pieces: list[bytes] = []
    async with tree.tar("workspace") as tar:
        async for piece in tar:
            if not pieces:
                os.truncate(workspace / "a", 2 << 20)
                with (workspace / "b").open("ab") as grown:
                    grown.write(b"more")
                (workspace / "c").unlink()
                os.mkfifo(workspace / "c")
            pieces.append(piece)
    found = unpacked(b"".join(pieces))
    assert len(found["a"]) == 5 << 20
    assert found["a"].rstrip(b"\0") == b"a" * len(found["a"].rstrip(b"\0"))
    assert (set(found), found["z"]) == ({"a", "b", "z"}, b"end")
    assert found["b"].startswith(b"b" * (5 << 20))


async def test_a_tar_that_nobody_reads_to_its_end_holds_nothing_open(tree, workspace):
    (workspace / "a").write_bytes(b"x" * (5 << 20))
    before = descriptors()
    async with tree.tar("", recursive=True) as tar:
        await anext(tar)
    assert descriptors() == before


# In.


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
async def test_an_archive_is_unpacked(tree, workspace, tmp_path, mode, form):
    long = "l" * 120 + "/" + "m" * 120
    content = archive(
        folder("./"),
        folder("d", 0o700),
        member("./d/a", b"a", mode=0o4755, mtime=1_000_000_000, uid=0),
        member("implied/b", b"b" * 2_000_000),
        member(long, b"long"),
        link("d/link", "../implied/b"),
        link("to_root", "/workspace/x/d/a"),
        link("hard", "d/a", tarfile.LNKTYPE),
        member("empty"),
        mode=mode,
        form=form,
    )
    entries = await tree.extract("workspace/x", stream(content[:7], content[7:]), max_bytes=LARGE)
    assert [(entry.path.removeprefix("workspace/x/"), entry.type) for entry in entries] == [
        ("d", "directory"),
        ("d/a", "file"),
        ("d/link", "file"),
        ("empty", "file"),
        ("hard", "file"),
        ("implied/b", "file"),
        (long, "file"),
        ("to_root", "file"),
    ]
    x = workspace / "x"
    assert (x / "d/a").read_bytes() == b"a"
    assert (x / "d/a").stat().st_mtime == 1_000_000_000
    assert stat.S_IMODE((x / "d/a").stat().st_mode) == 0o755
    assert stat.S_IMODE((x / "d").stat().st_mode) == 0o700
    assert (x / "hard").stat().st_ino == (x / "d/a").stat().st_ino
    assert (x / "implied/b").stat().st_size == 2_000_000
    for path in [x, *x.rglob("*")]:
        assert path.lstat().st_uid == path.lstat().st_gid == OWNER
    assert list((tmp_path / "staging").iterdir()) == []


async def test_what_is_no_tar_is_refused(tree, tmp_path):
    plain = archive(member("a", b"a"))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("a", "a")
    for content in (
        zipped.getvalue(),
        bz2.compress(plain),
        lzma.compress(plain),
        b"",
        b"hello",
        os.urandom(10_000),
        gzip.compress(b"hello" * 1000),
        gzip.compress(b""),
        b"\x1f\x8b",
        b"\x1f\x8b" + os.urandom(1000),
    ):
        with pytest.raises(Invalid):
            await extract(tree, "workspace", content)
    assert await nothing_happened(tree, tmp_path)


async def test_a_damaged_archive_is_refused_whole(tree, tmp_path):
    plain = archive(*[member(f"f{number}", b"x" * 1000) for number in range(50)])
    packed = gzip.compress(plain)
    for content in (
        plain[:20_000],
        plain[:20_100],
        packed[:-20],
        packed[: len(packed) // 2],
        packed[:-8] + b"\0" * 8,
        plain[:15_360] + os.urandom(512) + plain[15_872:],
    ):
        with pytest.raises(Invalid):
            await extract(tree, "workspace", content)
    assert await nothing_happened(tree, tmp_path)


async def test_an_empty_archive_is_fine(tree):
    assert await extract(tree, "workspace/new", archive()) == []
    assert (await tree.stat("workspace/new")).type == "directory"


async def test_a_conflict_anywhere_means_nothing_is_written(tree, workspace):
    await tree.write("workspace/x/d/taken", stream(b"old"))
    content = archive(
        member("a", b"new"), folder("d"), member("d/new", b"n"), member("d/taken", b"new")
    )
    with pytest.raises(Conflict, match="'workspace/x/d/taken' already exists in environment"):
        await extract(tree, "workspace/x", content)
    assert await names(tree, "workspace/x", recursive=True) == [
        "workspace/x/d",
        "workspace/x/d/taken",
    ]
    assert await read(tree, "workspace/x/d/taken") == b"old"
    await extract(tree, "workspace/x", content, overwrite=True)
    assert await read(tree, "workspace/x/d/taken") == b"new"
    assert await read(tree, "workspace/x/d/new") == b"n"


async def test_a_folder_and_a_file_do_not_replace_each_other(tree):
    await tree.write("workspace/x/file", stream(b"old"))
    await tree.write("workspace/x/folder/f", stream(b"old"))
    for content in (
        archive(member("folder", b"new")),
        archive(folder("file")),
        archive(member("file/below", b"new")),
    ):
        with pytest.raises(Conflict):
            await extract(tree, "workspace/x", content)
        with pytest.raises(Invalid):
            await extract(tree, "workspace/x", content, overwrite=True)
        with pytest.raises(Invalid):
            await extract(tree, "workspace/x/file", content, overwrite=True)
    assert await read(tree, "workspace/x/file") == b"old"
    assert await read(tree, "workspace/x/folder/f") == b"old"


async def test_existing_folders_keep_their_mode_and_links_to_folders_are_entered(tree, workspace):
    await tree.mkdir("workspace/x/d")
    await tree.mkdir("workspace/real")
    (workspace / "x/d").chmod(0o750)
    (workspace / "x/to").symlink_to("/workspace/real")
    await extract(tree, "workspace/x", archive(folder("d"), folder("to"), member("to/f", b"f")))
    assert stat.S_IMODE((workspace / "x/d").stat().st_mode) == 0o750
    assert (workspace / "real/f").read_bytes() == b"f"
    assert (workspace / "x/to").is_symlink()


async def test_a_later_member_replaces_an_earlier_one(tree, workspace):
    content = archive(
        member("a", b"one"),
        link("hard", "a", tarfile.LNKTYPE),
        member("a", b"two"),
        link("b", "a"),
        member("b", b"three"),
        member("c", b"four"),
        link("c", "a"),
    )
    await extract(tree, "workspace", content)
    assert (workspace / "a").read_bytes() == b"two"
    assert (workspace / "hard").read_bytes() == b"one"
    assert (workspace / "b").read_bytes() == b"three"
    assert str((workspace / "c").readlink()) == "a"


async def test_under_the_root_members_go_into_the_three_folders(tree, tmp_path):
    await extract(tree, "/", archive(folder("workspace"), member("home/a", b"a")))
    for content in (
        archive(member("etc/passwd", b"x")),
        archive(member("workspace", b"x")),
        archive(folder("tmp")),
        archive(link("workspace", "home")),
    ):
        with pytest.raises(Invalid):
            await extract(tree, "", content, overwrite=True)
    for path in ("tmp", "etc/x"):
        with pytest.raises(Invalid):
            await extract(tree, path, archive())


async def test_an_upload_can_be_an_archive(tree, tmp_path):
    content = archive(member("a", b"a"), mode="w:gz")
    await tree.append("u", 0, stream(content[:20]))
    await tree.append("u", 20, stream(content[20:]))
    entries = await tree.commit_archive("u", "workspace/x", max_bytes=LARGE)
    assert [entry.path for entry in entries] == ["workspace/x/a"]
    # What stays is the mark that it is over.
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["u.over"]
    await tree.append("v", 0, stream(content))
    with pytest.raises(Conflict):
        await tree.commit_archive("v", "workspace/x", max_bytes=LARGE)
    assert (await tree.upload_state("v")).size_bytes == len(content)


# Limits.


async def test_archives_are_bounded(tree, tmp_path):
    large = archive(member("a", b"x" * 600_000), member("b", b"x" * 600_000))
    with pytest.raises(TooLarge):
        await extract(tree, "workspace", gzip.compress(large), max_bytes=1_000_000)
    assert await nothing_happened(tree, tmp_path)
    await extract(tree, "workspace", gzip.compress(large), max_bytes=1_200_000)


def count(tarball: Tarball) -> int:
    return sum(1 for _ in tarball.members())


def members(content: bytes, limits: Limits, use=count):
    fd = os.memfd_create("archive")
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    with io.FileIO(fd) as file:
        tarball = Tarball(file, limits, Halt())
        return use(tarball)


def test_members_are_counted():
    content = archive(*[member(f"f{number}") for number in range(100)])
    assert members(content, Limits(max_bytes=1000, max_members=100)) == 100
    headers = archive(*[member("n" * 200 + str(number)) for number in range(70)])
    with pytest.raises(TooLarge):
        members(headers, Limits(max_bytes=1000, max_members=60))


async def test_too_many_members_are_refused(tree, tmp_path):
    content = archive(*[member(f"f{number}") for number in range(51)])
    site = Site(root=tmp_path / "root", uid=OWNER, gid=OWNER)
    limits = Limits(max_bytes=1000, max_members=50)
    with pytest.raises(TooLarge, match="50 members"):
        members(
            content,
            limits,
            lambda tarball: unpack(
                site, tarball, (b"workspace",), limits=limits, overwrite=False, halt=Halt()
            ),
        )
    assert await nothing_happened(tree, tmp_path)


def header(name: str, *, size: int | bytes, kind: bytes = b"0") -> bytes:
    """A header as an attacker writes it, with a right checksum."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(512)
    block[0 : len(name)] = name.encode()
    block[100:108] = b"0000644\0"
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = field
    block[136:148] = b"%011o\0" % 0
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NEGATIVE = b"\xff" + struct.pack(">3xq", -512)


@pytest.mark.parametrize(
    "content",
    [
        header("a", size=NEGATIVE),
        header("a", size=NEGATIVE, kind=b"x"),
        header("a", size=1 << 30),
        header("a", size=1 << 30, kind=b"x"),
        header("a", size=1 << 30, kind=b"L"),
        header("a", size=b"\x80" + b"\xff" * 11),
        header("a", size=512, kind=b"x") + b"99999999999999999999999 path=a\n".ljust(512, b"\0"),
        header("a", size=512, kind=b"x") + b"5 a=".ljust(512, b"\0"),
        header("a", size=512, kind=b"x") + b"0 a=b\n".ljust(512, b"\0"),
        header("a", size=512, kind=b"x")
        + b"14 size=-512\n".ljust(512, b"\0")
        + header("a", size=0),
        header("a", size=512, kind=b"x")
        + b"13 size=1e9\n\n".ljust(512, b"\0")
        + header("a", size=0),
        header("a", size=0, kind=b"S"),
        header("a", size=0, kind=b"M"),
        header("a", size=512, kind=b"x")
        + b"22 GNU.sparse.major=1\n".ljust(512, b"\0")
        + header("a", size=0),
    ],
)
async def test_a_crafted_header_is_refused(tree, tmp_path, content):
    with pytest.raises(AppError) as caught:
        await extract(tree, "workspace", content + bytes(10_240))
    assert isinstance(caught.value, Invalid | TooLarge)
    assert await nothing_happened(tree, tmp_path)


def pax(count: int, *, kind: bytes = b"g", key: str = "k") -> bytes:
    """A header with so many records, each with another key."""
    lines: list[bytes] = []
    for number in range(count):
        rest = f" {key}{number:06}=\n"
        lines.append(f"{len(rest) + 2}{rest}".encode())
    content = b"".join(lines)
    padding = bytes(-len(content) % 512)
    return header("pax", size=len(content), kind=kind) + content + padding


def test_what_nobody_asks_for_is_not_kept_of_headers():
    """A small archive would otherwise fill the memory, and each member copy all of it."""
    headers = b"".join(pax(60_000, key=key) for key in "uvwxyz")
    content = headers + header("a", size=0) + bytes(1024)
    tracemalloc.start()
    try:
        assert members(content, Limits(max_bytes=1000)) == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The headers themselves are held one at a time.
    assert peak < 6 * 2**20, peak


@pytest.mark.parametrize("kind", [b"g", b"x"])
def test_extended_headers_have_bounds(monkeypatch, kind):
    content = pax(100, kind=kind) * 2 + header("a", size=0) + bytes(1024)
    limits = Limits(max_bytes=1000)
    assert members(content, limits) == 1
    monkeypatch.setattr(tarball_module, "_MAX_RECORDS", 199)
    with pytest.raises(TooLarge, match="records"):
        members(content, limits)
    monkeypatch.undo()
    monkeypatch.setattr(tarball_module, "_MAX_EXTENSIONS_BYTES", 2399)
    with pytest.raises(TooLarge, match="headers"):
        members(content, limits)


async def test_folders_above_members_count_as_members(tree, tmp_path):
    """Ten kilobytes of archive must not become two hundred thousand folders."""
    deep = "/".join("a" * 90)
    content = archive(
        *[member(f"{number}/{deep}/f") for number in range(1200)],
        mode="w:gz",
        form=tarfile.GNU_FORMAT,
    )
    assert len(content) < 20_000
    with pytest.raises(TooLarge, match="members"):
        await extract(tree, "workspace/x", content)
    assert await nothing_happened(tree, tmp_path)


async def test_a_folder_counts_once(tree, tmp_path):
    content = archive(*[folder("a"), folder("a/b")], *[member(f"a/b/{n}") for n in range(8)])
    site = Site(root=tmp_path / "root", uid=OWNER, gid=OWNER)

    def unpack_with(most: int, target: bytes) -> int:
        limits = Limits(max_bytes=LARGE, max_members=most)
        tarball = Tarball(io.BytesIO(content), limits, Halt())
        where = (b"workspace", target)
        halt = Halt()
        return len(unpack(site, tarball, where, limits=limits, overwrite=False, halt=halt))

    assert unpack_with(10, b"x") == 10
    with pytest.raises(TooLarge):
        unpack_with(9, b"y")
