"""Folders at the top of an environment beside the three: who makes them, and what they may be."""

import stat
from pathlib import Path

import pytest

from openinteractions.errors import Conflict, Invalid, NotFound
from openinteractions.sandbox import tops
from openinteractions.sandbox.files import paths
from openinteractions.sandbox.files.tree import Tree
from openinteractions.sandbox.port import FOLDERS
from tests.sandbox.trees import (
    OWNER,
    archive,
    folder,
    link,
    member,
    names,
    plant,
    read,
    stream,
    tarred,
    unpacked,
)

LARGE = 1 << 30
IMAGES_OWN = [
    ".dockerenv", "bin", "boot", "dev", "etc", "lib", "lib64", "media", "mnt", "opt", "proc",
    "root", "run", "sbin", "srv", "sys", "tmp", "usr", "var",
]  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return plant(tmp_path)


@pytest.fixture
async def data(tree: Tree, tmp_path: Path) -> Path:
    await tree.add_tops(["data"])
    return tmp_path / "root/data"


@pytest.mark.parametrize("name", ["data", ".claude", "Backend-app_2.0", "...", "-x", "n" * 100])
async def test_a_folder_may_have_such_a_name(tree, tmp_path, name):
    await tree.add_tops([name, name])
    made = (tmp_path / "root" / name).lstat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (OWNER, OWNER, 0o755)
    await tree.write(f"{name}/a/b.txt", stream(b"x"))
    assert await read(tree, f"/{name}/a/b.txt") == b"x"
    assert await names(tree) == sorted([*FOLDERS, name])
    assert tops.place(name) == f"/{name}"


@pytest.mark.parametrize(
    "name",
    [
        *IMAGES_OWN, "lost+found", "lib32", "libx32", ".", "..", "", "a b", "ä", "a/b", "a\n",
        "a\0", "n" * 101, *FOLDERS,
    ],
)  # fmt: skip
async def test_no_folder_may_have_such_a_name(tree, tmp_path, name):
    assert not tops.is_further(name)
    before = sorted(path.name for path in (tmp_path / "root").iterdir())
    if name not in FOLDERS:
        with pytest.raises(Invalid):
            await tree.add_tops([name])
        if "/" not in name:
            with pytest.raises(Invalid):
                paths.for_writing(f"/{name}", is_folder=True)
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == before


async def test_there_are_not_too_many(tree):
    await tree.add_tops([f"d{number}" for number in range(tops.MAX_FURTHER - 1)])
    with pytest.raises(Invalid, match="16 folders beside"):
        await tree.add_tops(["one", "more"])
    assert await tree.missing_tops(["d0", "one", "home"]) == ["one"]
    await tree.add_tops(["one", "d0"])
    with pytest.raises(Invalid, match="put 'more' into 'workspace'"):
        await tree.add_tops(["more"])


async def test_only_sources_make_one(tree, tmp_path):
    """Whatever else writes is told where it may."""
    for attempt in (
        lambda: tree.write("data/x.csv", stream(b"x")),
        lambda: tree.mkdir("data/x.csv"),
        lambda: tree.extract("data/x.csv", stream(archive(member("a"))), max_bytes=LARGE),
        lambda: tree.commit("u1", "data/x.csv"),
        lambda: tree.commit_archive("u1", "data/x.csv", max_bytes=LARGE),
    ):
        await tree.append("u1", 0, stream(archive(member("a"))))
        with pytest.raises(Invalid, match=r"no folder 'data' .* Write to '/workspace/data/x.csv'"):
            await attempt()
    with pytest.raises(Invalid, match="no folder 'data'"):
        await tree.mkdir("data")
    with pytest.raises(Invalid, match=r"none of the folders .agents, home, workspace"):
        await tree.extract("", stream(archive(member("data/x.csv"))), max_bytes=LARGE)
    for path in ("data", "data/x.csv"):
        with pytest.raises(NotFound):
            await tree.stat(path)
    with pytest.raises(NotFound):
        await tree.delete("data/x.csv")
    assert not (tmp_path / "root/data").exists()


@pytest.mark.parametrize(
    ("path", "instead"),
    [
        ("x.csv", "/workspace/x.csv"),
        ("/x.csv", "/workspace/x.csv"),
        ("AGENTS.md", "/.agents/AGENTS.md"),
        ("/tmp/a/x", "/workspace/a/x"),
        ("etc", "/workspace/etc"),
        ("a b/x", "/workspace/a b/x"),
    ],
)
def test_a_refusal_names_another_place(path, instead):
    with pytest.raises(Invalid, match=f"'{instead}'"):
        paths.for_writing(path)


async def test_one_that_is_there_is_like_the_three(tree, data, tmp_path):
    await tree.write("data/a.txt", stream(b"1"))
    with pytest.raises(Conflict):
        await tree.write("/data/a.txt", stream(b"2"))
    await tree.write("/data/a.txt", stream(b"22"), overwrite=True)
    await tree.mkdir("data/d/e")
    await tree.mkdir("data")
    await tree.append("u1", 0, stream(b"333"))
    await tree.commit("u1", "data/d/u")
    (data / "l").symlink_to("a.txt")
    assert await names(tree, "", recursive=True) == [
        ".agents", "data", "data/a.txt", "data/d", "data/d/e", "data/d/u", "data/l", "home",
        "workspace",
    ]  # fmt: skip
    usage = await tree.usage()
    assert (usage.file_count, usage.size_bytes) == (3, 5)
    await tree.delete("data/d", recursive=True)
    for whole in ("data", "/data/", "home"):
        with pytest.raises(Invalid, match="own folders"):
            await tree.delete(whole, recursive=True)
    assert unpacked(await tarred(tree)) == {
        ".agents": None, "data": None, "data/a.txt": b"22", "data/l": "a.txt", "home": None,
        "workspace": None,
    }  # fmt: skip
    again = plant(tmp_path / "again")
    await again.add_tops(["data"])
    packed = await tarred(tree)
    await again.extract("", stream(packed), max_bytes=LARGE)
    assert await read(again, "data/a.txt") == b"22"


async def test_links_lead_into_one_and_out_of_it(tree, data, tmp_path):
    workspace = tmp_path / "root/workspace"
    await tree.write("data/a.txt", stream(b"in data"))
    await tree.write("home/h.txt", stream(b"in home"))
    (workspace / "absolute").symlink_to("/data/a.txt")
    (workspace / "relative").symlink_to("../data/a.txt")
    (workspace / "folder").symlink_to("/data")
    (data / "back").symlink_to("/home/agent/h.txt")
    (data / "across").symlink_to("../home/agent/h.txt")
    (data / "round").symlink_to("/workspace/../data/../data/a.txt")
    for path in (
        "workspace/absolute",
        "workspace/relative",
        "workspace/folder/a.txt",
        "data/round",
    ):
        assert await read(tree, path) == b"in data"
    for path in ("data/back", "data/across", "workspace/folder/back"):
        assert await read(tree, path) == b"in home"
    await tree.write("workspace/folder/new", stream(b"x"))
    assert (data / "new").read_bytes() == b"x"


@pytest.mark.parametrize(
    "target", ["/data/a", "../../data/a", "../../data", "/workspace/../data/a"]
)
async def test_an_archive_may_have_links_to_one_that_is_there(tree, tmp_path, target):
    packed = archive(member("a", b"x"), link("l", target))
    with pytest.raises(Invalid, match="leads out"):
        await tree.extract("workspace/x", stream(packed), max_bytes=LARGE)
    await tree.add_tops(["data"])
    await tree.extract("workspace/x", stream(packed), max_bytes=LARGE)
    assert str((tmp_path / "root/workspace/x/l").readlink()) == target
    with pytest.raises(Invalid, match="leads out"):
        await tree.extract("data", stream(archive(link("l", "/database/a"))), max_bytes=LARGE)


async def test_an_archive_under_the_root_may_have_it(tree, data):
    packed = archive(folder("data"), member("data/x", b"x"), member("workspace/y", b"y"))
    await tree.extract("/", stream(packed), max_bytes=LARGE)
    assert (data / "x").read_bytes() == b"x"
    with pytest.raises(Invalid, match=r"none of the folders .agents, home, workspace, data"):
        await tree.extract("/", stream(archive(member("data", b"x"))), max_bytes=LARGE)
