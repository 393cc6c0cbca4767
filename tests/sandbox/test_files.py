"""The files of environments: reading, writing, lists, uploads."""

import asyncio
import os
import secrets
import socket
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openinteractions.errors import Conflict, Invalid, NotFound, TooLarge
from openinteractions.sandbox.files import paths
from openinteractions.sandbox.files.quota import Quota
from openinteractions.sandbox.files.tree import Changed, Tree
from tests.sandbox.trees import (
    OWNER,
    archive,
    descriptors,
    folder,
    member,
    names,
    plant,
    plant_odd_name,
    read,
    stream,
)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return plant(tmp_path)


@pytest.fixture
def workspace(tree: Tree, tmp_path: Path) -> Path:
    return tmp_path / "root/workspace"


# Paths.


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("", ()),
        ("/", ()),
        (".", ()),
        ("//", ()),
        ("a//b/", (b"a", b"b")),
        ("./workspace/./x", (b"workspace", b"x")),
        ("/workspace/x", (b"workspace", b"x")),
        ("workspace/x", (b"workspace", b"x")),
        ("/.agents/AGENTS.md", (b".agents", b"AGENTS.md")),
        ("/home/agent/x", (b"home", b"x")),
        ("/home/agent", (b"home",)),
        ("home/agent/x", (b"home", b"agent", b"x")),
        ("home/x", (b"home", b"x")),
        ("workspace/ä ö", (b"workspace", "ä ö".encode())),
    ],
)
def test_a_path_has_many_public_forms(path, parts):
    assert paths.parse(path) == parts


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "workspace/../../etc/passwd",
        "/..",
        "workspace/..",
        "workspace/a\0b",
        "workspace/" + "n" * 256,
        "workspace/" + "n/" * 2100,
        "workspace/\ud800",
    ],
)
def test_a_path_that_cannot_be_is_refused(path):
    with pytest.raises(Invalid):
        paths.parse(path)


@pytest.mark.parametrize("path", ["etc/passwd", "/etc/passwd", "x", "", "/", "workspace", "/home"])
def test_files_go_into_the_three_folders_only(path):
    with pytest.raises(Invalid):
        paths.for_writing(path)


def test_the_refusal_names_the_three_folders():
    with pytest.raises(Invalid, match=r"'workspace', '\.agents', 'home'"):
        paths.for_writing("tmp/x")


@given(st.text(max_size=40))
def test_a_parsed_path_is_its_own_spelling(path):
    try:
        parts = paths.parse(path)
    except Invalid:
        return
    assert not {b"", b".", b".."} & set(parts)
    assert all(b"/" not in part and b"\0" not in part for part in parts)
    assert paths.parse(paths.shown(parts)) == parts


# Reading and writing.


async def test_a_file_comes_back_as_it_was_written(tree):
    content = os.urandom(3 << 20)
    entry = await tree.write("workspace/a/b/c.bin", stream(content[:100], content[100:]))
    assert (entry.path, entry.type, entry.size_bytes) == ("workspace/a/b/c.bin", "file", 3 << 20)
    assert await read(tree, "/workspace/a/b/c.bin") == content
    assert await read(tree, "workspace/a/b/c.bin", offset=10, length=20) == content[10:30]
    assert await read(tree, "workspace/a/b/c.bin", offset=(3 << 20) - 5) == content[-5:]
    assert await read(tree, "workspace/a/b/c.bin", offset=3 << 20) == b""
    with pytest.raises(Invalid):
        await read(tree, "workspace/a/b/c.bin", offset=(3 << 20) + 1)


async def test_the_environment_owns_what_is_written(tree, workspace):
    await tree.write("workspace/a/b.txt", stream(b"x"))
    await tree.mkdir("workspace/c/d")
    for path in ("a", "a/b.txt", "c", "c/d"):
        status = (workspace / path).stat()
        assert (status.st_uid, status.st_gid) == (OWNER, OWNER)
    assert stat.S_IMODE((workspace / "a/b.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((workspace / "a").stat().st_mode) == 0o755


async def test_an_empty_file_is_a_file(tree):
    entry = await tree.write("workspace/empty", stream())
    assert entry.size_bytes == 0
    assert await read(tree, "workspace/empty") == b""


async def test_an_existing_file_is_kept_unless_told_otherwise(tree, workspace):
    await tree.write("workspace/a.sh", stream(b"one"), mode=0o755)
    with pytest.raises(Conflict, match=r"'workspace/a\.sh' already exists in environment 'env1'"):
        await tree.write("workspace/a.sh", stream(b"two"))
    assert await read(tree, "workspace/a.sh") == b"one"
    await tree.write("workspace/a.sh", stream(b"three"), overwrite=True)
    assert await read(tree, "workspace/a.sh") == b"three"
    assert stat.S_IMODE((workspace / "a.sh").stat().st_mode) == 0o755


async def test_set_id_bits_are_not_kept(tree, workspace):
    (workspace / "tool").touch()
    (workspace / "tool").chmod(0o6755)
    await tree.write("workspace/tool", stream(b"x"), overwrite=True)
    await tree.write("workspace/other", stream(b"x"), mode=0o7777)
    assert stat.S_IMODE((workspace / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((workspace / "other").stat().st_mode) == 0o777


async def test_a_file_that_appears_meanwhile_is_not_replaced(tree, workspace):
    async def slow():
        yield b"ours"
        (workspace / "a").write_text("theirs")

    with pytest.raises(Conflict):
        await tree.write("workspace/a", slow())
    assert (workspace / "a").read_text() == "theirs"


async def test_a_folder_is_never_replaced_by_a_file(tree, workspace):
    (workspace / "d").mkdir()
    with pytest.raises(Conflict):
        await tree.write("workspace/d", stream(b"x"))
    with pytest.raises(Invalid, match="is a directory"):
        await tree.write("workspace/d", stream(b"x"), overwrite=True)


async def test_a_file_has_nothing_below_it(tree):
    await tree.write("workspace/a", stream(b"x"))
    with pytest.raises(Invalid, match="not a directory"):
        await tree.write("workspace/a/b", stream(b"x"))
    with pytest.raises(Invalid, match="not a directory"):
        await tree.mkdir("workspace/a/b")
    with pytest.raises(NotFound):
        await tree.stat("workspace/a/b")


async def test_what_broke_off_leaves_nothing(tree, tmp_path):
    async def broken():
        yield b"x" * (2 << 20)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await tree.write("workspace/new/a", broken())
    assert list((tmp_path / "root/workspace").iterdir()) == []
    assert list((tmp_path / "staging").iterdir()) == []


async def test_a_cancelled_write_leaves_nothing(tree, tmp_path):
    started = asyncio.Event()

    async def endless():
        while True:
            yield b"x" * (1 << 20)
            started.set()
            await asyncio.sleep(0.001)

    task = asyncio.ensure_future(tree.write("workspace/a", endless()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((tmp_path / "staging").iterdir()) == []
    assert list((tmp_path / "root/workspace").iterdir()) == []


async def test_no_descriptors_are_lost(tree, workspace):
    (workspace / "loop").symlink_to("/workspace/loop")
    (workspace / "out").symlink_to("/etc")
    (workspace / "d/e").mkdir(parents=True)
    os.mkfifo(workspace / "fifo")

    async def all_of_it() -> None:
        await tree.write("workspace/d/a", stream(b"x"), overwrite=True)
        await read(tree, "workspace/d/a")
        await names(tree, "", recursive=True)
        await tree.usage()
        async with tree.tar("", recursive=True) as pieces:
            await anext(pieces)
        for path in ("loop", "loop/x", "out/x", "fifo", "no", "d"):
            with pytest.raises((NotFound, Invalid)):
                await read(tree, f"workspace/{path}")
        upload = secrets.token_hex(4)
        await tree.append(upload, 0, stream(b"x"))
        await tree.commit(upload, "workspace/d/a", overwrite=True)

    await all_of_it()
    before = descriptors()
    for _ in range(3):
        await all_of_it()
    assert descriptors() == before


async def test_more_than_the_limit_is_not_taken(tree, tmp_path):
    with pytest.raises(TooLarge):
        await tree.write("workspace/a", stream(b"x" * 11), max_bytes=10)
    await tree.write("workspace/b", stream(b"x" * 10), max_bytes=10)
    assert [path.name for path in (tmp_path / "root/workspace").iterdir()] == ["b"]


async def test_a_full_disk_is_the_callers_to_solve(tree, tmp_path, full_disk):
    tree = plant(full_disk)
    with pytest.raises(TooLarge, match="disk is full"):
        await tree.write("workspace/a", stream(*[b"x" * (1 << 20)] * 8))
    assert list((full_disk / "root/workspace").iterdir()) == []
    await tree.write("workspace/a", stream(b"x" * (1 << 20)))


@pytest.fixture
def full_disk(tmp_path):
    """A disk of 4 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = tmp_path / "small"
    disk.mkdir()
    assert os.system(f"mount -t tmpfs -o size=4m none {disk}") == 0
    yield disk
    assert os.system(f"umount {disk}") == 0


async def test_a_file_that_shrinks_is_not_padded(tree, workspace):
    (workspace / "log").write_bytes(b"x" * (1 << 20))
    async with tree.read("workspace/log") as reading:
        chunks = reading.chunks(1000)
        assert len(await anext(chunks)) == 1000
        os.truncate(workspace / "log", 1500)
        assert len(await anext(chunks)) == 500
        with pytest.raises(Changed):
            await anext(chunks)


async def test_a_file_that_grows_ends_where_it_did(tree, workspace):
    (workspace / "log").write_bytes(b"x" * 1000)
    async with tree.read("workspace/log") as reading:
        with (workspace / "log").open("ab") as log:
            log.write(b"y" * 1000)
        assert b"".join([chunk async for chunk in reading.chunks()]) == b"x" * 1000
        assert reading.size == 1000


async def test_a_missing_path_is_said_in_the_contracts_words(tree):
    with pytest.raises(NotFound) as caught:
        await tree.stat("/workspace/no")
    assert caught.value.message == "Path 'workspace/no' not found in environment 'env1'."
    for path in ("etc/passwd", "tmp"):
        with pytest.raises(NotFound):
            await tree.stat(path)


# Folders and deleting.


async def test_mkdir_can_be_repeated(tree):
    first = await tree.mkdir("workspace/a/b")
    assert (first.type, first.mime_type, first.size_bytes) == ("directory", None, 0)
    assert await tree.mkdir("workspace/a/b") == first
    assert (await tree.mkdir("workspace")).type == "directory"
    await tree.write("workspace/f", stream(b"x"))
    with pytest.raises(Conflict):
        await tree.mkdir("workspace/f")


async def test_delete(tree, workspace):
    await tree.write("workspace/a/b/c", stream(b"x"))
    await tree.mkdir("workspace/empty")
    await tree.delete("workspace/empty")
    with pytest.raises(Invalid, match="recursive=true"):
        await tree.delete("workspace/a")
    await tree.delete("workspace/a/b/c")
    await tree.write("workspace/a/b/c", stream(b"x"))
    await tree.delete("workspace/a", recursive=True)
    assert list(workspace.iterdir()) == []
    with pytest.raises(NotFound):
        await tree.delete("workspace/a", recursive=True)
    with pytest.raises(Invalid):
        await tree.delete("workspace", recursive=True)


async def test_a_very_deep_tree_is_deleted_and_measured(tree, workspace, tmp_path):
    fd = os.open(workspace, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep", dir_fd=fd)
        below = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with os.fdopen(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd), "w") as file:
        file.write("here")
    os.close(fd)
    assert (await tree.usage()).size_bytes == 4
    assert len(await names(tree, "workspace", recursive=True, limit=500)) > 800
    await tree.delete("workspace/deep", recursive=True)
    assert list(workspace.iterdir()) == []
    assert list((tmp_path / "staging").iterdir()) == []


async def test_leftovers_of_an_earlier_process_are_removed(tree, tmp_path):
    await tree.write("workspace/a", stream(b"x"))
    (tmp_path / "staging/dead.1/sub").mkdir(parents=True)
    (tmp_path / "staging/dead.2").touch()
    (tmp_path / "staging/trash.x.1/sub").mkdir(parents=True)
    await tree.clean()
    assert list((tmp_path / "staging").iterdir()) == []
    assert await read(tree, "workspace/a") == b"x"


async def test_cleaning_leaves_a_write_in_progress_alone(tree):
    async def interrupted():
        yield b"x" * (2 << 20)
        await tree.clean()
        yield b"y"

    assert (await tree.write("workspace/a", interrupted())).size_bytes == (2 << 20) + 1


# Lists.


async def test_the_root_has_the_three_folders(tree, tmp_path):
    (tmp_path / "root/lost+found").mkdir()
    for path in ("", "/", ".", "//"):
        assert await names(tree, path) == [".agents", "home", "workspace"]


async def fill(tree: Tree, *some: str) -> None:
    for path in some:
        await tree.write(path, stream(path.encode()))


async def test_a_list_has_direct_children_or_all(tree):
    await fill(tree, "workspace/a/x", "workspace/a.txt", "workspace/b/c/d", "home/h")
    assert await names(tree, "workspace") == ["workspace/a", "workspace/a.txt", "workspace/b"]
    assert await names(tree, "workspace/b") == ["workspace/b/c"]
    assert await names(tree, "workspace/a.txt") == ["workspace/a.txt"]
    everything = [
        ".agents",
        "home",
        "home/h",
        "workspace",
        "workspace/a",
        "workspace/a/x",
        "workspace/a.txt",
        "workspace/b",
        "workspace/b/c",
        "workspace/b/c/d",
    ]
    assert await names(tree, "", recursive=True) == everything
    assert await names(tree, "", recursive=True, limit=1) == everything
    assert await names(tree, "", recursive=True, limit=3) == everything
    assert await names(tree, "workspace/b", recursive=True, limit=1) == everything[-2:]


async def test_pages_are_as_long_as_asked_and_end(tree):
    await fill(tree, *[f"workspace/f{number}" for number in range(10)])
    first = await tree.list("workspace", limit=4)
    assert [entry.path for entry in first.entries] == [f"workspace/f{n}" for n in range(4)]
    assert first.next_after == "workspace/f3"
    last = await tree.list("workspace", limit=6, after="workspace/f3")
    assert (len(last.entries), last.next_after) == (6, None)


async def test_a_page_follows_a_path_that_is_gone(tree):
    await fill(tree, "workspace/a/1", "workspace/a/2", "workspace/b")
    await tree.delete("workspace/a", recursive=True)
    page = await tree.list("workspace", recursive=True, after="workspace/a/1")
    assert [entry.path for entry in page.entries] == ["workspace/b"]


async def test_odd_names_are_listed(tree, workspace):
    (workspace / "new\nline").touch()
    (workspace / " ").touch()
    (workspace / "ünï").touch()
    plant_odd_name(workspace)
    found = await names(tree, "workspace", limit=1)
    assert found == [
        "workspace/ ",
        "workspace/new\nline",
        "workspace/ünï",
        "workspace/\ufffd\ufffd",
    ]
    assert (await tree.stat("workspace/new\nline")).type == "file"
    assert await names(tree, "workspace", recursive=True, limit=1) == found


async def test_what_is_no_file_is_not_told(tree, workspace):
    os.mkfifo(workspace / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(workspace)
        server.bind("socket")
        os.chdir("/")
        assert await names(tree, "workspace") == []
        assert await names(tree, "workspace", recursive=True) == []
        for path in ("workspace/fifo", "workspace/socket"):
            with pytest.raises(NotFound):
                await tree.stat(path)
            with pytest.raises(NotFound):
                await asyncio.wait_for(read(tree, path), 5)
    await tree.delete("workspace/fifo")
    assert [path.name for path in workspace.iterdir()] == ["socket"]


async def test_links_mean_what_they_mean_in_the_sandbox(tree, workspace, tmp_path):
    await fill(tree, "workspace/d/a.txt", "home/h.txt", "home/agent/wrong")
    for name, target in {
        "relative": "d/a.txt",
        "absolute": "/workspace/d/a.txt",
        "folder": "/workspace/d",
        "to_home": "/home/agent/h.txt",
        "across": "../home/agent/h.txt",
        "up_and_down": "../../../workspace/d/../d/a.txt",
        "twice": "absolute",
        "host_view": "../home/h.txt",
        "out": "/etc/passwd",
        "up": "../../../../../../etc/passwd",
        "nowhere": "nothing",
        "circle": "circle",
    }.items():
        (workspace / name).symlink_to(target)
    (tmp_path / "root/home/h.txt").write_text("home")
    entries = {
        entry.path.partition("/")[2]: entry for entry in (await tree.list("workspace")).entries
    }
    for name in ("relative", "absolute", "up_and_down", "twice"):
        assert (entries[name].type, entries[name].size_bytes) == ("file", 17)
        assert await read(tree, f"workspace/{name}") == b"workspace/d/a.txt"
    for name in ("to_home", "across"):
        assert await read(tree, f"workspace/{name}") == b"home"
    assert entries["folder"].type == "directory"
    assert await names(tree, "workspace/folder") == ["workspace/folder/a.txt"]
    for name in ("host_view", "out", "up", "nowhere", "circle"):
        assert (entries[name].type, entries[name].mime_type) == ("symlink", None)
        assert (await tree.stat(f"workspace/{name}")) == entries[name]
        assert (await tree.stat(f"workspace/{name}")) == entries[name]
        with pytest.raises(Invalid, match="leads to no file"):
            await read(tree, f"workspace/{name}")
    for name, link in (("relative", "d/a.txt"), ("folder", "/workspace/d"), ("out", "/etc/passwd")):
        assert entries[name].link == link
        assert (await tree.stat(f"workspace/{name}")).link == link
    assert entries["d"].link is None
    assert (await tree.stat("workspace/folder/a.txt")).link is None


async def test_a_link_is_replaced_and_deleted_itself(tree, workspace):
    await fill(tree, "workspace/a")
    (workspace / "link").symlink_to("a")
    (workspace / "link2").symlink_to("/workspace/a")
    with pytest.raises(Conflict):
        await tree.write("workspace/link", stream(b"new"))
    await tree.write("workspace/link", stream(b"new"), overwrite=True)
    await tree.delete("workspace/link2")
    assert not (workspace / "link").is_symlink()
    assert sorted(path.name for path in workspace.iterdir()) == ["a", "link"]
    assert await read(tree, "workspace/a") == b"workspace/a"


async def test_writing_below_a_link_to_a_folder(tree, workspace):
    await tree.mkdir("workspace/releases/1")
    (workspace / "current").symlink_to("/workspace/releases/1")
    await tree.write("workspace/current/x/y", stream(b"x"))
    assert (workspace / "releases/1/x/y").read_text() == "x"
    (workspace / "dangling").symlink_to("/workspace/nothing")
    with pytest.raises(Invalid):
        await tree.write("workspace/dangling/x", stream(b"x"))


@pytest.mark.parametrize(
    ("name", "content", "mime_type"),
    [
        ("a.txt", b"", "text/plain; charset=utf-8"),
        ("a.md", b"", "text/markdown; charset=utf-8"),
        ("a.PNG", b"", "image/png"),
        ("a.json", b"", "application/json"),
        ("a.tar.gz", b"", "application/gzip"),
        ("a.tgz", b"", "application/gzip"),
        ("Makefile", b"all:\n\ttrue\n", "text/plain; charset=utf-8"),
        (".bashrc", b"export A=1", "text/plain; charset=utf-8"),
        ("data", b"\0\1\2", "application/octet-stream"),
        ("latin1", b"\xe9t\xe9", "application/octet-stream"),
        ("cut", ("x" + "é" * 600).encode(), "text/plain; charset=utf-8"),
        ("data:text,html", b"\0", "application/octet-stream"),
    ],
)
async def test_the_type_comes_from_the_name_else_from_the_bytes(tree, name, content, mime_type):
    written = await tree.write(f"workspace/{name}", stream(content))
    assert written.mime_type == mime_type
    assert await tree.stat(f"workspace/{name}") == written
    assert (await tree.list("workspace")).entries == [written]


async def test_times_are_told(tree, workspace):
    before = time.time()
    entry = await tree.write("workspace/a", stream(b"x"))
    assert before - 1 < entry.created <= entry.modified + 0.1 < time.time() + 1
    os.utime(workspace / "a", (1, 1_000_000_000))
    assert (await tree.stat("workspace/a")).modified == 1_000_000_000


async def test_usage_counts_what_is_there(tree, workspace):
    assert (await tree.usage()).file_count == 0
    await tree.write("workspace/a/b", stream(b"x" * 100_000))
    await tree.write("home/c", stream(b"y"))
    os.link(workspace / "a/b", workspace / "second_name")
    (workspace / "link").symlink_to("/etc/passwd")
    os.mkfifo(workspace / "fifo")
    with (workspace / "hole").open("wb") as hole:
        hole.truncate(1 << 40)
    found = await tree.usage()
    assert (found.file_count, found.is_partial) == (4, False)
    assert 100_001 <= found.size_bytes <= 100_001 + 8192
    assert (await tree.usage(within_s=-1)).is_partial


# Uploads in parts.


async def test_an_upload_arrives_in_parts(tree, tmp_path):
    assert await tree.append("u1", 0, stream(b"one")) == 3
    assert await tree.append("u1", 3, stream(b"two", b"three")) == 11
    assert (await tree.upload_state("u1")).size_bytes == 11
    assert await names(tree, "", recursive=True) == [".agents", "home", "workspace"]
    entry = await tree.commit("u1", "workspace/new/a.txt")
    assert (entry.path, entry.size_bytes) == ("workspace/new/a.txt", 11)
    assert await read(tree, "workspace/new/a.txt") == b"onetwothree"
    status = (tmp_path / "root/workspace/new/a.txt").stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (OWNER, 0o644)
    state = await tree.upload_state("u1")
    assert (state.is_over, state.written) == (True, [entry])
    # Whoever lost the answer asks again, wherever it should go now; nothing is made twice.
    assert await tree.commit("u1", "workspace/b") == entry
    with pytest.raises(NotFound):
        await tree.append("u1", 0, stream(b"one"))
    for unknown in (tree.upload_state("u2"), tree.commit("u2", "workspace/b")):
        with pytest.raises(NotFound):
            await unknown
    assert await names(tree, "workspace") == ["workspace/new"]


async def test_a_part_may_come_again(tree):
    await tree.append("u", 0, stream(b"abc"))
    assert await tree.append("u", 0, stream(b"abc")) == 3
    assert await tree.append("u", 1, stream(b"bc")) == 3
    assert await tree.append("u", 3, stream()) == 3
    with pytest.raises(Invalid, match="next offset is 3, not 4"):
        await tree.append("u", 4, stream(b"x"))
    with pytest.raises(Invalid, match="not those that arrived before"):
        await tree.append("u", 0, stream(b"abX"))
    assert (await tree.upload_state("u")).size_bytes == 3


async def test_a_part_that_broke_off_is_sent_again_whole(tree):
    async def broken():
        yield b"abc"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await tree.append("u", 0, broken())
    assert await tree.append("u", 0, stream(b"abcdef")) == 6
    await tree.commit("u", "workspace/a")
    assert await read(tree, "workspace/a") == b"abcdef"


async def test_two_parts_do_not_mix(tree):
    async def slow():
        yield b"a" * (2 << 20)
        with pytest.raises(Conflict):
            await tree.append("u", 0, stream(b"b"))
        with pytest.raises(Conflict):
            await tree.commit("u", "workspace/a")

    assert await tree.append("u", 0, slow()) == 2 << 20


async def test_an_upload_follows_the_rules_of_writing(tree):
    await tree.write("workspace/a", stream(b"old"))
    await tree.append("u", 0, stream(b"new"))
    with pytest.raises(Conflict):
        await tree.commit("u", "workspace/a")
    with pytest.raises(Invalid):
        await tree.commit("u", "etc/passwd")
    await tree.commit("u", "workspace/a", overwrite=True)
    assert await read(tree, "workspace/a") == b"new"
    with pytest.raises(TooLarge):
        await tree.append("big", 0, stream(b"x" * 11), max_bytes=10)


async def test_uploads_are_forgotten(tree, tmp_path):
    await tree.append("old", 0, stream(b"x"))
    await tree.append("young", 0, stream(b"x"))
    await tree.append("dropped", 0, stream(b"x"))
    for upload in ("dropped", "dropped", "never"):
        await tree.delete_upload(upload)
        for late in (tree.append(upload, 0, stream(b"x")), tree.commit(upload, "workspace/x")):
            with pytest.raises(NotFound):
                await late
    kept = {path.name for path in (tmp_path / "uploads").iterdir()}
    assert kept == {"old", "young", "dropped.over", "never.over"}
    for name in ("old", "dropped.over"):
        os.utime(tmp_path / "uploads" / name, (0, time.time() - 7200))
    await tree.clean(uploads_older_than_s=3600)
    kept = {path.name for path in (tmp_path / "uploads").iterdir()}
    assert kept == {"young", "never.over"}


@pytest.mark.parametrize("upload", ["", "..", "a/b", "a\0", "ä", "x" * 129])
async def test_an_uploads_id_is_no_path(tree, upload):
    with pytest.raises(Invalid):
        await tree.append(upload, 0, stream(b"x"))
    with pytest.raises(Invalid):
        await tree.upload_state(upload)


# Where the file system does not bound the size.


def bounded(tmp_path: Path, size: int, used: int = 0) -> tuple[Tree, Quota]:
    quota = Quota()
    quota.measured(used, size, spent_before=0)
    plant(tmp_path)
    return Tree(tmp_path / "root", uid=OWNER, gid=OWNER, quota=quota), quota


async def test_what_does_not_fit_is_refused_however_it_comes(tmp_path):
    tree, quota = bounded(tmp_path, 100_000)
    piece = b"x" * 40_000
    await tree.write("workspace/a", stream(piece))
    assert await tree.append("one", 0, stream(piece)) == 40_000
    # Bytes that are there already cost nothing.
    assert await tree.append("one", 0, stream(piece)) == 40_000
    assert quota.used == 80_000
    with pytest.raises(TooLarge, match="may hold 100000 bytes"):
        await tree.write("workspace/b", stream(piece))
    with pytest.raises(TooLarge, match="disk is full"):
        await tree.append("one", 40_000, stream(piece))
    with pytest.raises(TooLarge, match="disk is full"):
        await tree.extract("workspace/c", stream(archive(member("f", piece))), max_bytes=10**9)
    assert await names(tree, "workspace") == ["workspace/a"]
    assert list((tmp_path / "staging").iterdir()) == []
    assert (await tree.commit("one", "workspace/b")).size_bytes == 40_000


async def test_what_an_archive_holds_counts_as_well_as_itself(tmp_path):
    tree, _ = bounded(tmp_path, 300_000)
    content = archive(member("f", bytes(400_000)), mode="w:gz")
    assert len(content) < 10_000
    with pytest.raises(TooLarge, match="disk is full"):
        await tree.extract("workspace/c", stream(content), max_bytes=10**9)
    folders = archive(*[folder(f"d{number}") for number in range(100)], mode="w:gz")
    with pytest.raises(TooLarge, match="disk is full"):
        await tree.extract("workspace/c", stream(folders), max_bytes=10**9)
    assert await names(tree, "workspace") == []


async def test_nothing_is_taken_in_where_there_is_no_room_but_files_can_be_deleted(tmp_path):
    tree, _ = bounded(tmp_path, 1000, used=1001)
    (tmp_path / "root/workspace/a").write_text("hello")

    async def untouched():
        raise AssertionError("the body was read")
        yield b""

    for call in (
        tree.write("workspace/b", untouched()),
        tree.append("one", 0, untouched()),
        tree.extract("workspace/c", untouched(), max_bytes=10**9),
        tree.mkdir("workspace/d"),
    ):
        with pytest.raises(TooLarge):
            await call
    assert await read(tree, "workspace/a") == b"hello"
    await tree.delete("workspace/a")
    assert await names(tree, "workspace") == []
