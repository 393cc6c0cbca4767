"""Attacks on the host through an environment's files. Nothing outside is read or changed.

The attacker is code in the sandbox: it can plant anything in the three folders, at any moment. The
host works on them with all its rights (as root, where the tests run as root).
"""

import asyncio
import contextlib
import ctypes
import gzip
import io
import os
import stat
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from openinteractions.errors import Conflict, Invalid, NotFound, RequestError, TooLarge
from openinteractions.sandbox.files import kernel
from openinteractions.sandbox.files.tree import Tree
from tests.sandbox.trees import (
    archive,
    folder,
    link,
    member,
    names,
    plant,
    read,
    snapshot,
    stream,
    tarred,
    unpacked,
)

SECRET = b"the host's secret"
LARGE = 1 << 30
EXCHANGE = 2
RACE_S = 1.5


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Something of the host that must stay as it is, beside the environment's disk."""
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    for name in ("secret", "victim", "sub/secret"):
        (outside / name).write_bytes(SECRET)
    before = snapshot([outside])
    yield outside
    assert snapshot([outside]) == before


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return plant(tmp_path / "disk")


@pytest.fixture
def workspace(tree: Tree, tmp_path: Path) -> Path:
    return tmp_path / "disk/root/workspace"


def targets(outside: Path, workspace: Path) -> dict[str, str]:
    """Links that lead out of the tree, or that an unwary program would follow out of it."""
    up = os.path.relpath(outside, workspace)
    return {
        "absolute": str(outside),
        "relative": up,
        "far_up": "../" * 40 + str(outside).lstrip("/"),
        "proc_root": f"/proc/self/root{outside}",
        "proc_cwd": "/proc/self/cwd",
        "proc_fd": "/proc/self/fd",
        "proc_init": f"/proc/1/root{outside}",
        "beside": "../../staging",
        "uploads": "../../uploads",
        "through_mount": f"/workspace/../{outside}",
        "through_home": f"/home/agent/../../{outside}",
        "root": "/",
        "dots": "..",
        "dotdots": "../..",
    }


@pytest.mark.parametrize("name", list(targets(Path("/o"), Path("/w"))))
async def test_a_planted_link_leads_nowhere(tree, workspace, outside, name):
    (workspace / "link").symlink_to(targets(outside, workspace)[name])
    (workspace / "indirect").symlink_to("link")
    (workspace / "again").symlink_to("/workspace/indirect")
    for start in ("link", "indirect", "again"):
        for below in ("", "/secret", "/sub/secret", "/victim", "/etc/passwd", "/../secret"):
            path = f"workspace/{start}{below}"
            with pytest.raises((Invalid, NotFound)):
                await read(tree, path)
            with pytest.raises((Invalid, NotFound)):
                await tarred(tree, path)
            if below:
                with pytest.raises((Invalid, NotFound)):
                    await tree.stat(path)
                with pytest.raises((Invalid, NotFound)):
                    await tree.list(path)
        assert await names(tree, f"workspace/{start}", recursive=True) == [f"workspace/{start}"]
        await every_write_fails(tree, f"workspace/{start}")
    everything = unpacked(await tarred(tree))
    assert SECRET not in everything.values()
    assert len(await names(tree, "", recursive=True)) == 6


async def every_write_fails(tree: Tree, path: str) -> None:
    """Everything that changes something, at and below a link that leads out."""
    content = archive(member("victim", b"x"), member("new", b"x"))
    await tree.append("u", 0, stream(b"x"))
    for below in ("victim", "new", "sub/new", "sub"):
        for change in (
            tree.write(f"{path}/{below}", stream(b"x"), overwrite=True),
            tree.mkdir(f"{path}/{below}/x"),
            tree.delete(f"{path}/{below}", recursive=True),
            tree.extract(f"{path}/{below}", stream(content), overwrite=True, max_bytes=LARGE),
            tree.commit("u", f"{path}/{below}", overwrite=True),
        ):
            with pytest.raises((Invalid, NotFound)):
                await change
    with pytest.raises((Invalid, NotFound, Conflict)):
        await tree.extract(path, stream(content), overwrite=True, max_bytes=LARGE)
    with pytest.raises((Invalid, NotFound, Conflict)):
        await tree.mkdir(path)


async def test_a_link_at_the_end_is_replaced_not_followed(tree, workspace, outside):
    for number, change in enumerate(("write", "commit", "extract", "delete")):
        path = workspace / f"l{number}"
        path.symlink_to(outside / "victim")
        name = f"workspace/l{number}"
        if change == "write":
            await tree.write(name, stream(b"x"), overwrite=True)
        elif change == "commit":
            await tree.append("u", 0, stream(b"x"))
            await tree.commit("u", name, overwrite=True)
        elif change == "extract":
            content = archive(member(f"l{number}", b"x"))
            await tree.extract("workspace", stream(content), overwrite=True, max_bytes=LARGE)
        else:
            await tree.delete(name, recursive=True)
        assert not path.is_symlink()


async def test_folders_deleted_with_links_in_them_leave_the_targets(tree, workspace, outside):
    (workspace / "d/e").mkdir(parents=True)
    (workspace / "d/e/link").symlink_to(outside)
    (workspace / "d/file").symlink_to(outside / "victim")
    await tree.delete("workspace/d", recursive=True)
    assert not (workspace / "d").exists()


async def test_a_second_name_of_a_file_is_never_written_through(tree, workspace):
    (workspace / "a").write_bytes(b"old")
    os.link(workspace / "a", workspace / "b")
    await tree.write("workspace/b", stream(b"new"), overwrite=True)
    content = archive(member("a", b"newer"))
    os.link(workspace / "b", workspace / "c")
    await tree.extract("workspace", stream(content), overwrite=True, max_bytes=LARGE)
    assert (workspace / "b").read_bytes() == (workspace / "c").read_bytes() == b"new"


async def test_pipes_and_devices_are_neither_opened_nor_waited_for(tree, workspace):
    os.mkfifo(workspace / "fifo")
    # Only root can make one; the kernel refuses it to the sandbox, too.
    with contextlib.suppress(PermissionError):
        os.mknod(workspace / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    async with asyncio.timeout(20):
        for path in [file.name for file in workspace.iterdir()]:
            with pytest.raises(NotFound):
                await read(tree, f"workspace/{path}")
            with pytest.raises((Invalid, NotFound)):
                await tree.write(f"workspace/{path}/below", stream(b"x"))
        assert unpacked(await tarred(tree, "workspace")) == {}
        assert await names(tree, "workspace", recursive=True) == []
        assert (await tree.usage()).file_count == 0
        await tree.write("workspace/fifo", stream(b"x"), overwrite=True)
        assert await read(tree, "workspace/fifo") == b"x"


async def test_the_hosts_own_folders_are_out_of_reach(tree, tmp_path):
    await tree.append("u1", 0, stream(SECRET))
    for path in ("../uploads/u1", "uploads/u1", "staging", "/uploads/u1", "./../uploads"):
        with pytest.raises((Invalid, NotFound)):
            await read(tree, path)
        with pytest.raises((Invalid, NotFound)):
            await tree.delete(path, recursive=True)
        with pytest.raises(Invalid):
            await tree.write(path, stream(b"x"), overwrite=True)
    assert oct((tmp_path / "disk/uploads").stat().st_mode)[-3:] == "700"
    await tree.write("workspace/x", stream(b"x"))
    assert oct((tmp_path / "disk/staging").stat().st_mode)[-3:] == "700"


# Folders beside the three.


def root_of(workspace: Path) -> Path:
    return workspace.parent


async def test_what_the_root_should_not_have_is_not_there(tree, workspace, outside):
    """No code of the sandbox can put anything there; whatever did, it is no way out."""
    root = root_of(workspace)
    (root / "link").symlink_to(outside)
    (root / "inner").symlink_to("workspace")
    (root / "file").write_bytes(SECRET)
    (root / "lost+found").mkdir()
    (root / "etc").mkdir()
    for name in ("lost+found", "etc"):
        (root / name / "secret").write_bytes(SECRET)
    for name in ("link", "inner", "file", "lost+found", "etc"):
        (workspace / name).symlink_to(f"/{name}/secret")
        for path in (f"{name}/secret", name, f"workspace/{name}"):
            with pytest.raises((Invalid, NotFound)):
                await read(tree, path)
        with pytest.raises(Invalid):
            await tree.write(f"{name}/victim", stream(b"x"), overwrite=True)
        with pytest.raises((Invalid, NotFound)):
            await tree.delete(f"{name}/secret")
        with pytest.raises((Invalid, NotFound)):
            await tarred(tree, name)
        with pytest.raises((Invalid, Conflict)):
            await tree.extract("", stream(archive(member(f"{name}/victim"))), max_bytes=LARGE)
        with pytest.raises((Invalid, Conflict)):
            await tree.add_tops([name])
        (workspace / name).unlink()
    assert await names(tree, "", recursive=True) == [".agents", "home", "workspace"]
    assert list(unpacked(await tarred(tree))) == [".agents", "home", "workspace"]
    assert (await tree.usage()).file_count == 0
    assert (root / "etc/secret").read_bytes() == SECRET


@pytest.mark.parametrize("name", list(targets(Path("/o"), Path("/w"))))
async def test_a_link_planted_in_a_further_folder_leads_nowhere(tree, workspace, outside, name):
    await tree.add_tops(["data"])
    data = root_of(workspace) / "data"
    (data / "link").symlink_to(targets(outside, workspace)[name])
    (workspace / "to_it").symlink_to("/data/link")
    for place in ("data/link", "workspace/to_it"):
        for path in (place, f"{place}/secret", f"{place}/victim"):
            with pytest.raises((Invalid, NotFound)):
                await read(tree, path)
        with pytest.raises((Invalid, NotFound)):
            await tree.write(f"{place}/victim", stream(b"x"), overwrite=True)
        with pytest.raises((Invalid, NotFound)):
            await tree.delete(f"{place}/victim")
        packed = archive(member("victim", b"x"))
        with pytest.raises((Invalid, NotFound, Conflict)):
            await tree.extract(place, stream(packed), overwrite=True, max_bytes=LARGE)


@pytest.mark.parametrize("path", ["data/../../outside/secret", "/data/../etc/x", "/..", "data/.."])
async def test_a_path_never_climbs_out_of_a_further_folder(tree, path):
    await tree.add_tops(["data"])
    for attempt in (read(tree, path), tree.write(path, stream(b"x")), tree.delete(path)):
        with pytest.raises(Invalid):
            await attempt


# Races: a thread exchanges a folder and a link to the outside, as fast as it can.


@contextmanager
def swapping(left: Path, right: Path) -> Iterator[dict[str, int]]:
    """Exchange two names again and again, from before the start; counts how often."""
    stop = threading.Event()
    counts = {"swaps": 0}
    numbers = {"x86_64": 316, "aarch64": 276}
    number = numbers[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(left), os.fsencode(right)

    def swap() -> None:
        while not stop.is_set():
            if libc.syscall(number, -100, names[0], -100, names[1], EXCHANGE) == 0:
                counts["swaps"] += 1
            time.sleep(0)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        while not counts["swaps"] and thread.is_alive():
            time.sleep(0)
        yield counts
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def arena(workspace: Path, outside: Path) -> tuple[Path, Path]:
    """`d` is a folder that looks like the outside, `l` a link to the outside."""
    inside = workspace / "d"
    (inside / "sub").mkdir(parents=True)
    for name in ("secret", "victim", "sub/secret"):
        (inside / name).write_bytes(b"harmless")
    (workspace / "l").symlink_to(outside)
    return inside, workspace / "l"


async def reading(tree: Tree) -> None:
    assert await read(tree, "workspace/d/secret") == b"harmless"


async def reading_deeper(tree: Tree) -> None:
    assert await read(tree, "workspace/d/sub/secret") == b"harmless"


async def packing(tree: Tree) -> None:
    assert SECRET not in await tarred(tree)
    assert SECRET not in await tarred(tree, "workspace/d")


async def listing(tree: Tree) -> None:
    # The size gives away whose file it is.
    sizes = {entry.size_bytes for entry in (await tree.list("", recursive=True)).entries}
    sizes |= {entry.size_bytes for entry in (await tree.list("workspace/d")).entries}
    assert len(SECRET) not in sizes


async def writing(tree: Tree) -> None:
    await tree.write("workspace/d/victim", stream(b"harmless"), overwrite=True)
    await tree.write("workspace/d/sub/new", stream(b"harmless"), overwrite=True)


async def making(tree: Tree) -> None:
    await tree.mkdir("workspace/d/x/y")
    await tree.delete("workspace/d/x", recursive=True)


async def deleting(tree: Tree) -> None:
    await tree.write("workspace/d/gone/a", stream(b"x"), overwrite=True)
    await tree.delete("workspace/d/gone/a")
    await tree.delete("workspace/d/gone")


async def extracting(tree: Tree) -> None:
    content = archive(member("victim", b"harmless"), folder("sub"), member("sub/new", b"harmless"))
    await tree.extract("workspace/d", stream(content), overwrite=True, max_bytes=LARGE)
    await tree.extract(
        "workspace", stream(archive(member("d/new", b""))), overwrite=True, max_bytes=LARGE
    )


async def committing(tree: Tree) -> None:
    await tree.append("u", 0, stream(b"harmless"))
    await tree.commit("u", "workspace/d/victim", overwrite=True)


async def measuring(tree: Tree) -> None:
    assert (await tree.usage()).size_bytes < 100 * len(SECRET)


@pytest.mark.parametrize(
    "attempt",
    [
        reading,
        reading_deeper,
        packing,
        listing,
        writing,
        making,
        deleting,
        extracting,
        committing,
        measuring,
    ],
)
async def test_folders_that_become_links_meanwhile(tree, arena, outside, attempt):
    naive = done = refused = 0
    until = time.monotonic() + RACE_S
    with swapping(*arena) as counts:
        while time.monotonic() < until or not (naive and done):
            try:
                await attempt(tree)
                done += 1
            except RequestError:
                refused += 1
            # What a program would get that trusts the path: the attack is a real one.
            with contextlib.suppress(OSError):
                naive += (arena[0] / "secret").read_bytes() == SECRET
            assert time.monotonic() < until + 60
    assert counts["swaps"] > 100
    assert naive
    assert done


async def test_a_folder_that_is_emptied_is_not_swapped_for_a_link(tree, workspace, outside):
    """The inner folders of a deleted one are exchanged for links to the outside all the time."""
    for _ in range(15):
        deep = workspace / "d/e"
        (deep / "sub").mkdir(parents=True)
        for number in range(30):
            (deep / f"f{number}").write_bytes(b"x")
            (deep / "sub" / f"f{number}").write_bytes(b"x")
        (workspace / "d/l").symlink_to(outside)
        with swapping(deep, workspace / "d/l"):
            await tree.delete("workspace/d", recursive=True)
        assert not (workspace / "d").exists()


async def test_the_target_of_a_new_folder_is_swapped(tree, workspace, outside):
    """What is made and what is then given to the sandbox's user are the same."""
    (workspace / "l").symlink_to(outside)
    (workspace / "new").mkdir()
    until = time.monotonic() + RACE_S
    with swapping(workspace / "new", workspace / "l"):
        while time.monotonic() < until:
            with contextlib.suppress(RequestError):
                await tree.mkdir("workspace/new/a/b/c")
            with contextlib.suppress(RequestError):
                await tree.delete("workspace/new/a", recursive=True)


# Archives.


def children(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def hard(name: str, target: str):
    return link(name, target, tarfile.LNKTYPE)


ATTACKS = {
    "up": [member("../victim", b"x")],
    "up_inside": [member("a/../../../../outside/victim", b"x")],
    "absolute": [member("/tmp/victim", b"x")],
    "absolute_folder": [folder("/tmp/new")],
    "link_then_write": [link("l", "OUTSIDE"), member("l/victim", b"x")],
    "link_up_then_write": [link("l", "../../../outside"), member("l/victim", b"x")],
    "inner_link_then_write": [folder("d"), link("l", "d"), member("l/victim", b"x")],
    "link_twice": [link("a", "b"), link("b", "OUTSIDE"), member("a/victim", b"x")],
    "folder_then_link": [folder("l"), link("l", "/workspace"), member("l/victim", b"x")],
    "write_then_link": [member("l/victim", b"x"), link("l", "OUTSIDE")],
    "link_to_proc": [link("l", "/proc/self/root/etc"), member("l/x", b"x")],
    "link_to_root": [link("l", "/")],
    "link_to_above_home": [link("l", "/home")],
    "link_to_nothing": [link("l", "")],
    "link_through_the_outside": [link("l", "/etc/../workspace")],
    "hardlink_out": [hard("h", "OUTSIDE/victim")],
    "hardlink_up": [hard("h", "../../../../outside/victim")],
    "hardlink_to_link": [link("l", "a"), member("a", b"x"), hard("h", "l")],
    "hardlink_to_nothing": [hard("h", "no")],
    "hardlink_to_folder": [folder("d"), hard("h", "d")],
    "hardlink_through_link": [link("l", "d"), folder("d"), member("d/a"), hard("h", "l/a")],
    "device": [member("d", type=tarfile.CHRTYPE, devmajor=1, devminor=5)],
    "block_device": [member("d", type=tarfile.BLKTYPE, devmajor=7, devminor=0)],
    "pipe": [member("p", type=tarfile.FIFOTYPE)],
    "pax_up": [member("é/../../../x", b"x")],
    "long_up": [member("a/" * 60 + "../" * 61 + "victim", b"x")],
    "long_name": [member("n" * 256, b"x")],
    "long_path": [member("n/" * 2100, b"x")],
    "deep": [folder("d/" * 101)],
    "nul": [member("a", b"x", pax_headers={"path": "a\0b"})],
    "pax_path": [member("a", b"x", pax_headers={"path": "../../victim"})],
    "pax_link": [link("a", "b"), member("x", b"")],
    "file_as_folder": [member("a", b"x"), member("a/b", b"x")],
    "link_as_folder": [member("a", b"x"), link("l", "a"), member("l/b", b"x")],
    "named_nothing": [member(".", b"x")],
    "named_dots": [member("..", b"x")],
}
HARMLESS = {"pax_link"}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", list(ATTACKS))
async def test_an_archive_that_leads_out_is_refused_whole(tree, workspace, outside, name, form):
    members = [member("first", b"x")]
    for info, content in ATTACKS[name]:
        info.linkname = info.linkname.replace("OUTSIDE", str(outside))
        members.append((info, content))
    packed = archive(*members, form=form)
    works = name in HARMLESS or (form == tarfile.GNU_FORMAT and name in {"nul", "pax_path"})
    for overwrite in (False, True):
        if works:
            await tree.extract("workspace/x", stream(packed), overwrite=True, max_bytes=LARGE)
            continue
        with pytest.raises(Invalid):
            await tree.extract("workspace/x", stream(packed), overwrite=overwrite, max_bytes=LARGE)
        assert list(workspace.iterdir()) == []
    assert not {"victim", "new"} & children(Path("/tmp"))


async def test_an_archive_meets_links_in_the_tree(tree, workspace, outside):
    """Parts of the path are links that the sandbox planted, and not the archive."""
    (workspace / "out").symlink_to(outside)
    (workspace / "x").mkdir()
    (workspace / "x/out").symlink_to(outside)
    content = archive(member("out/victim", b"x"))
    for path in ("workspace", "workspace/x"):
        for overwrite in (False, True):
            with pytest.raises((Invalid, Conflict)):
                await tree.extract(path, stream(content), overwrite=overwrite, max_bytes=LARGE)
    with pytest.raises((Invalid, NotFound, Conflict)):
        await tree.extract("workspace/out", stream(content), overwrite=True, max_bytes=LARGE)


async def test_a_bomb_is_put_out(tree, tmp_path, workspace):
    """Half a gigabyte of zeros in half a megabyte."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9) as packed:
        size = 512 << 20
        info = tarfile.TarInfo("zeros")
        info.size = size
        packed.write(info.tobuf())
        for _ in range(size >> 20):
            packed.write(bytes(1 << 20))
        packed.write(bytes(1024))
    bomb = out.getvalue()
    assert len(bomb) < 1 << 20
    for limit in (LARGE, 10 << 20):
        with pytest.raises(TooLarge):
            await tree.extract("workspace", stream(bomb), max_bytes=limit)
    assert list(workspace.iterdir()) == []
    assert list((tmp_path / "disk/staging").iterdir()) == []


async def test_a_bomb_in_a_header_is_not_taken_into_memory(tree):
    """An extended header of a gigabyte: this program must refuse it by its announced size."""
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    info.size = 1 << 30
    start = gzip.compress(info.tobuf() + bytes(1 << 20))
    with pytest.raises(Invalid):
        await tree.extract("workspace", stream(start), max_bytes=4 << 30)


async def test_set_id_and_owners_are_not_taken_from_an_archive(tree, workspace):
    info = member("tool", b"x", mode=0o6777, uid=0, gid=0, uname="root", gname="root")
    other = folder("d", 0o7777)
    await tree.extract("workspace", stream(archive(info, other)), max_bytes=LARGE)
    for name in ("tool", "d"):
        status = (workspace / name).stat()
        assert status.st_mode & 0o7000 == 0
        assert status.st_uid == workspace.stat().st_uid


# The kernel's part.


def test_the_kernel_keeps_paths_inside(tmp_path, outside):
    kernel.require()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "out").symlink_to(outside)
    (inside / "magic").symlink_to("/proc/self/root")
    (inside / "self").symlink_to("../inside")
    fd = os.open(inside, os.O_PATH)
    try:
        for path in (b"../outside", b"out", b"out/secret", b"/etc", b"self", b"a/../../outside"):
            with pytest.raises(OSError, match=r"cross-device|No such"):
                kernel.open_beneath(fd, path, os.O_PATH)
        with pytest.raises(OSError, match=r"cross-device|Too many"):
            kernel.open_beneath(fd, b"magic/etc", os.O_PATH)
    finally:
        os.close(fd)
