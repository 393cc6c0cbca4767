"""Disks of both kinds on the real file system; images need root."""

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import stat
import subprocess
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from openinteractions.errors import SetupError, TooLarge, Unready
from openinteractions.sandbox import disk, mounts
from openinteractions.sandbox.disk import Disks
from openinteractions.sandbox.disks import image, tree
from openinteractions.sandbox.port import Gone, SandboxError

SIZE = 24 * 2**20
IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="images need root")
KINDS = [pytest.param("image", marks=needs_root), "folder"]
A, B, C = (letter * 32 for letter in "abc")


async def opened(folder: Path, kind: str) -> Disks:
    disks = Disks(folder, kind=kind, size_bytes=SIZE)  # pyright: ignore[reportArgumentType]
    await disks.recover()
    return disks


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncGenerator[Path]:
    yield tmp_path / "broker"
    mounts.unmount_all(tmp_path)


@pytest.fixture(params=KINDS)
async def disks(request, folder) -> AsyncGenerator[Disks]:
    disks = await opened(folder, request.param)
    yield disks
    await disks.close()


@pytest.fixture
async def images(folder) -> AsyncGenerator[Disks]:
    disks = await opened(folder, "image")
    yield disks
    await disks.close()


async def made(disks: Disks, env: str) -> Path:
    await disks.ensure(env)
    return await disks.open(env)


def tree_of(root: Path) -> dict[str, object]:
    """All that a copy has to keep."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        about = path.lstat()
        if path.is_symlink():
            content: object = str(path.readlink())
        else:
            content = path.read_bytes() if path.is_file() else None
        times = None if path.is_symlink() else about.st_mtime_ns
        found[str(path.relative_to(root))] = (about.st_mode, about.st_uid, times, content)
    return found


async def test_a_new_disk_has_three_folders_of_the_sandboxs_user(disks, folder):
    root = await made(disks, A)
    assert sorted(path.name for path in root.iterdir()) == [".agents", "home", "workspace"]
    for path in root.iterdir():
        assert (path.stat().st_uid, path.stat().st_gid) == (disks.uid, path.stat().st_gid)
    assert (root.parent / "uploads").is_dir()
    assert list(await disks.list()) == [A]


async def test_other_users_of_the_machine_cannot_look_in(disks, folder):
    await made(disks, A)
    for path in (folder, folder / "environments", folder / "environments" / A):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


async def test_files_stay_over_release_and_a_new_broker(disks, folder):
    root = await made(disks, A)
    (root / "workspace/a.txt").write_text("kept")
    assert await disks.release(A)
    assert await disks.release(A)
    await disks.ensure(A)
    assert (await disks.open(A) / "workspace/a.txt").read_text() == "kept"
    await disks.close()
    again = await opened(folder, "auto")
    assert list(await again.list()) == [A]
    assert (await again.open(A) / "workspace/a.txt").read_text() == "kept"
    await again.close()


async def test_who_has_no_disk_is_gone(disks):
    for call in (disks.open, disks.usage, disks.room):
        with pytest.raises(Gone):
            await call(A)
    with pytest.raises(Gone):
        await disks.fork(A, B)
    assert list(await disks.list()) == []
    assert await disks.release(A)
    await disks.delete(A)


@pytest.mark.parametrize("name", ["", "..", "../" + "a" * 29, "A" * 32, "a" * 33])
async def test_only_ids_become_paths(disks, name):
    for call in (disks.ensure, disks.open, disks.delete, disks.release, disks.usage):
        with pytest.raises(ValueError, match="no id"):
            await call(name)


async def test_a_deleted_disk_leaves_nothing(disks, folder):
    root = await made(disks, A)
    deep = root / "workspace"
    for _ in range(300):
        deep = deep / "d"
        deep.mkdir()
    with (root / "workspace/held").open("w") as held:
        held.write("x")
        await disks.delete(A)
    await disks.delete(A)
    assert list((folder / "environments").iterdir()) == []
    assert list(await disks.list()) == []
    assert mounts.points(folder) == []
    await disks.ensure(A)
    assert list((await disks.open(A) / "workspace").iterdir()) == []


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_fork_has_everything_and_a_life_of_its_own(disks, is_open):
    root = await made(disks, A)
    work = root / "workspace"
    (work / "sub/deeper").mkdir(parents=True)
    (work / "sub").chmod(0o750)
    (work / "run.sh").write_text("#!/bin/sh\n")
    (work / "run.sh").chmod(0o700)
    (work / "sub/link").symlink_to("/etc/passwd")
    (work / "sub/dangling").symlink_to("../nowhere")
    (root / "home/.profile").write_bytes(os.urandom(300_000))
    os.utime(root / "home/.profile", ns=(10**18, 10**18 + 7))
    with (work / "holes").open("wb") as file:
        file.seek(8 * 2**20)
        file.write(b"end")
    (root.parent / "uploads/half").write_text("half an upload")
    before = tree_of(root)
    if not is_open:
        await disks.release(A)
    await disks.fork(A, B)
    forked = await disks.open(B)
    assert tree_of(forked) == before
    assert list((forked.parent / "uploads").iterdir()) == []
    assert (forked / "workspace/holes").stat().st_blocks * 512 < 2**20
    (forked / "workspace/run.sh").write_text("changed")
    root = await disks.open(A)
    assert tree_of(root) == before
    assert (root.parent / "uploads/half").exists()
    (root / "workspace/run.sh").unlink()
    assert (forked / "workspace/run.sh").read_text() == "changed"


async def test_a_fork_never_replaces_a_disk(disks):
    for env in (A, B):
        (await made(disks, env) / "workspace/name").write_text(env)
    await disks.fork(A, B)
    assert (await disks.open(B) / "workspace/name").read_text() == B


async def test_two_may_be_forked_into_each_other_at_once(disks):
    await disks.ensure(A)
    await disks.ensure(B)
    others = [secrets.token_hex(16) for _ in range(6)]
    async with asyncio.timeout(30):
        await asyncio.gather(
            *(disks.fork(A, other) for other in others), disks.fork(A, B), disks.fork(B, A)
        )
    assert sorted(await disks.list()) == sorted([A, B, *others])


async def test_a_fork_that_fails_leaves_nothing_and_lets_the_source_go_on(
    disks, folder, monkeypatch
):
    root = await made(disks, A)
    (root / "workspace/a").write_text("a")

    def fail(source: int, target: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(tree, "copy_file", fail)
        with pytest.raises(Unready, match="disk is full"):
            await disks.fork(A, B)
    assert [path.name for path in (folder / "environments").iterdir()] == [A]
    async with asyncio.timeout(5):
        await asyncio.to_thread((root / "workspace/b").write_text, "goes on")
        await disks.fork(A, B)


async def test_who_is_cancelled_holds_the_disk_until_the_work_is_done(disks, monkeypatch):
    root = await made(disks, A)
    (root / "workspace/a").write_text("a")
    is_copying, may_go_on = threading.Event(), threading.Event()
    copy = tree.copy_file

    def slow(source: int, target: int) -> None:
        is_copying.set()
        assert may_go_on.wait(10)
        copy(source, target)

    monkeypatch.setattr(tree, "copy_file", slow)
    fork = asyncio.ensure_future(disks.fork(A, B))
    await asyncio.to_thread(is_copying.wait, 10)
    fork.cancel()
    await asyncio.sleep(0)
    fork.cancel()
    deleted = asyncio.ensure_future(disks.delete(B))
    await asyncio.sleep(0.1)
    assert not deleted.done()
    assert not fork.done()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await fork
    await deleted
    assert list(await disks.list()) == [A]


async def test_usage_counts_the_sandboxs_files(disks):
    root = await made(disks, A)
    (root / "workspace/sub").mkdir()
    (root / "workspace/sub/a").write_bytes(bytes(1000))
    (root / ".agents/AGENTS.md").write_bytes(bytes(234))
    (root / "home/up").symlink_to("/")
    (root.parent / "uploads/half").write_bytes(bytes(5000))
    await disks.release(A)
    usage = await disks.usage(A)
    assert (usage.file_count, usage.size_bytes) == (3, 1234 + 1)


async def test_room_shrinks_as_files_grow(disks):
    root = await made(disks, A)
    before = await disks.room(A)
    assert SIZE // 2 < before <= SIZE
    (root / "workspace/big").write_bytes(os.urandom(5 * 2**20))
    assert before - 6 * 2**20 < await disks.room(A) <= before - 5 * 2**20


async def test_one_broker_a_folder(disks, folder):
    with pytest.raises(SetupError, match=rf"Another broker \(pid {os.getpid()}\)"):
        await Disks(folder, kind="folder", size_bytes=SIZE).recover()


async def test_half_made_and_half_deleted_disks_go_at_the_start(disks, folder):
    root = await made(disks, A)
    (root / "workspace/a").write_text("kept")
    kind = disks.kind
    await made(disks, B)
    await disks.close()
    home = folder / "environments"
    (home / B).rename(home / f".{B}-0123")
    (home / f".{C}-4567").mkdir()
    (home / f".{C}-4567/disk.img").write_text("half")
    again = await opened(folder, kind)
    assert [path.name for path in home.iterdir()] == [A]
    assert (await again.open(A) / "workspace/a").read_text() == "kept"
    await again.close()


@pytest.mark.parametrize("did_reboot", [True, False])
async def test_a_copy_that_may_be_torn_is_made_again(disks, folder, did_reboot):
    root = await made(disks, A)
    (root / "workspace/a").write_text("of the source")
    await disks.fork(A, B)
    kind = disks.kind
    await disks.release(A)
    (await disks.open(B) / "workspace/a").write_text("of the copy")
    await disks.release(B)
    await disks.close()
    mark = f"settling.{A}.{'another-boot' if did_reboot else disk._boot()}"
    (folder / "environments" / B / mark).touch()
    again = await opened(folder, kind)
    text = (await again.open(B) / "workspace/a").read_text()
    assert text == ("of the source" if did_reboot else "of the copy")
    await again.close()
    assert list((folder / "environments" / B).glob("settling.*")) == []


async def test_a_torn_copy_without_its_source_is_not_kept(disks, folder):
    await disks.ensure(B)
    kind = disks.kind
    await disks.close()
    (folder / "environments" / B / f"settling.{A}.another-boot").touch()
    again = await opened(folder, kind)
    assert list(await again.list()) == []
    await again.close()


async def test_the_mark_of_a_copy_goes_when_it_is_on_the_disk(disks, folder):
    await disks.ensure(A)
    await disks.fork(A, B)
    async with asyncio.timeout(20):
        while list((folder / "environments" / B).glob("settling.*")):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# Plain folders.


async def test_a_folder_copy_takes_no_pipes_and_refuses_absurd_depth(folder):
    disks = await opened(folder, "folder")
    root = await made(disks, A)
    os.mkfifo(root / "workspace/pipe")
    (root / "workspace/a").write_text("a")
    async with asyncio.timeout(10):
        await disks.fork(A, B)
    assert [path.name for path in (await disks.open(B) / "workspace").iterdir()] == ["a"]
    deep = root / "workspace"
    for _ in range(250):
        deep = deep / "d"
        deep.mkdir()
    with pytest.raises(SandboxError, match="deeper"):
        await disks.fork(A, C)
    assert list(await disks.list()) == [A, B]
    assert (await disks.usage(A)).file_count == 2
    await disks.close()


async def test_a_folder_copy_reads_through_no_link_that_appears_meanwhile(
    folder, tmp_path, monkeypatch
):
    """A folder is swapped for a link out of the tree after it was seen as a folder."""
    disks = await opened(folder, "folder")
    root = await made(disks, A)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("the machine's")
    (root / "workspace/sub").mkdir()
    copy_entry = tree._Copier._entry

    def swapped(self, entry, *rest):
        if entry.name == "sub" and entry.is_dir(follow_symlinks=False):
            (root / "workspace/sub").rmdir()
            (root / "workspace/sub").symlink_to(tmp_path / "secret")
        copy_entry(self, entry, *rest)

    monkeypatch.setattr(tree._Copier, "_entry", swapped)
    with contextlib.suppress(SandboxError):
        await disks.fork(A, B)
        found = await disks.open(B)
        assert list(found.rglob("key")) == []
    monkeypatch.undo()
    await disks.close()


async def test_auto_without_root_says_why_sizes_are_not_enforced(folder, monkeypatch):
    monkeypatch.setattr(Disks, "_why_no_images", lambda self: "mounting needs root")
    disks = await opened(folder, "auto")
    assert disks.kind == "folder"
    assert any("mounting needs root" in problem for problem in await disks.problems())
    await disks.close()
    with pytest.raises(SetupError, match="mounting needs root"):
        await opened(folder, "image")


# Images.


@needs_root
async def test_auto_takes_images_where_they_work(folder):
    disks = await opened(folder, "auto")
    assert disks.kind == "image"
    assert list(await disks.problems()) == []
    await disks.ensure(A)
    assert (folder / "environments" / A / "disk.img").stat().st_blocks * 512 < 8 * 2**20
    await disks.close()


@needs_root
async def test_a_disk_keeps_the_kind_that_it_was_made_with(folder):
    first = await opened(folder, "folder")
    (await made(first, A) / "workspace/a").write_text("a")
    await first.close()
    second = await opened(folder, "image")
    await second.fork(A, B)
    await second.ensure(C)
    assert (await second.open(B) / "workspace/a").read_text() == "a"
    kinds = [(folder / "environments" / env / "disk.img").exists() for env in (A, B, C)]
    assert kinds == [False, False, True]
    await second.close()


@needs_root
async def test_a_full_disk_is_full_for_its_environment_alone(images):
    root = await made(images, A)
    other = await made(images, B)

    def fill() -> None:
        with (root / "workspace/big").open("wb") as file:
            while True:
                file.write(bytes(2**20))
                file.flush()

    with pytest.raises(OSError, match="No space left"):
        await asyncio.to_thread(fill)
    assert await images.room(A) < 2**20
    (other / "workspace/a").write_bytes(bytes(2**20))
    assert await images.room(B) > SIZE // 2
    (root / "workspace/big").unlink()
    (root / "workspace/small").write_text("room again")


@needs_root
async def test_what_is_deleted_inside_is_given_back(images, folder):
    root = await made(images, A)
    file = folder / "environments" / A / "disk.img"
    (root / "workspace/big").write_bytes(os.urandom(8 * 2**20))
    mounts.sync(root)
    assert file.stat().st_blocks * 512 > 8 * 2**20
    (root / "workspace/big").unlink()
    mounts.sync(root)
    async with asyncio.timeout(10):
        while file.stat().st_blocks * 512 > 7 * 2**20:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@needs_root
async def test_nothing_in_a_disk_gains_rights(images):
    root = await made(images, A)
    flags = os.statvfs(root).f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV


@needs_root
async def test_a_disk_in_use_is_not_released(images, monkeypatch):
    monkeypatch.setattr(image, "_BUSY_S", 0.1)
    root = await made(images, A)
    with (root / "workspace/a").open("w") as file:
        file.write("x")
        assert not await images.release(A)
        assert (root / "workspace/a").exists()
    assert await images.release(A)
    assert not root.exists()


@needs_root
async def test_a_disk_that_someone_still_has_is_never_mounted_twice(images, folder, tmp_path):
    """As while a container is starting: the tree is unmounted, its file system is not."""
    root = await made(images, A)
    (tmp_path / "elsewhere").mkdir()
    mounts.bind(root, tmp_path / "elsewhere")
    assert await images.release(A)
    (tmp_path / "elsewhere/workspace/late").write_text("late")
    await images.fork(A, B)
    root = await images.open(A)
    assert (root / "workspace/late").read_text() == "late"
    assert root.stat().st_dev == (tmp_path / "elsewhere").stat().st_dev
    assert (await images.open(B) / "workspace/late").read_text() == "late"
    mounts.unmount(tmp_path / "elsewhere")


@needs_root
async def test_a_fork_of_a_busy_disk_is_whole(images, folder):
    root = await made(images, A)
    is_over = threading.Event()

    def write() -> int:
        count = 0
        while not is_over.is_set():
            folder = root / f"workspace/{count % 40}"
            folder.mkdir(exist_ok=True)
            (folder / "a").write_bytes(os.urandom(5000))
            (folder / "a").rename(folder / "b")
            count += 1
        return count

    writer = asyncio.ensure_future(asyncio.to_thread(write))
    await asyncio.sleep(0.2)
    forks = [secrets.token_hex(16) for _ in range(3)]
    for fork in forks:
        await images.fork(A, fork)
        file = folder / "environments" / fork / "disk.img"
        assert image.is_clean(file)
        check = ["e2fsck", "-f", "-n", str(file)]
        done = await asyncio.to_thread(subprocess.run, check, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout
    is_over.set()
    assert await writer > 20
    assert (await images.open(forks[-1]) / "workspace/0/b").stat().st_size == 5000


@needs_root
async def test_an_unclean_end_is_repaired(images, folder):
    root = await made(images, A)
    (root / "workspace/a").write_text("kept")
    mounts.sync(root)
    # What a machine that goes down leaves: the file as it is while mounted.
    await images.ensure(B)
    source, target = (folder / "environments" / env / "disk.img" for env in (A, B))
    target.write_bytes(source.read_bytes())
    assert not image.is_clean(target)
    assert (await images.open(B) / "workspace/a").read_text() == "kept"
    assert await images.release(B)
    assert image.is_clean(target)


@needs_root
async def test_a_ruined_disk_says_so(images, folder):
    await images.ensure(A)
    file = folder / "environments" / A / "disk.img"
    file.write_bytes(bytes(SIZE))
    with pytest.raises(SandboxError, match="no file system"):
        await images.open(A)


@needs_root
async def test_a_broker_that_died_while_it_copied_leaves_nothing_frozen(images, folder):
    root = await made(images, A)
    handle = os.open(root, os.O_RDONLY)
    fcntl.ioctl(handle, mounts._FIFREEZE, 0)
    os.close(handle)
    writer = asyncio.ensure_future(asyncio.to_thread((root / "workspace/a").write_text, "x"))
    await asyncio.sleep(0.1)
    assert not writer.done()
    await images.close()
    again = await opened(folder, "image")
    async with asyncio.timeout(5):
        await writer
    await again.close()


@needs_root
async def test_a_full_machine_is_reported_and_refuses_new_disks(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounts.run("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(small))
    try:
        disks = await opened(small / "broker", "image")
        await disks.ensure(A)
        assert list(await disks.problems()) == []
        with contextlib.suppress(OSError), (small / "big").open("wb") as file:
            while True:
                file.write(bytes(2**16))
                file.flush()
        assert any("is free" in problem for problem in await disks.problems())
        with pytest.raises(Unready, match="nearly full"):
            await disks.ensure(B)
        assert list(await disks.list()) == [A]
        await disks.close()
    finally:
        mounts.unmount_all(small)


@needs_root
async def test_many_at_once(images):
    envs = [secrets.token_hex(16) for _ in range(12)]
    roots = await asyncio.gather(*(made(images, env) for env in envs))
    assert len({root.stat().st_dev for root in roots}) == len(envs)
    for env, root in zip(envs, roots, strict=True):
        (root / "workspace/name").write_text(env)
    assert all(await asyncio.gather(*(images.release(env) for env in envs)))
    roots = await asyncio.gather(*(images.open(env) for env in envs))
    assert [(root / "workspace/name").read_text() for root in roots] == envs
    await asyncio.gather(*(images.delete(env) for env in envs))


@pytest.fixture
async def folders(folder) -> AsyncGenerator[Disks]:
    disks = await opened(folder, "folder")
    yield disks
    await disks.close()


async def test_a_file_with_many_names_is_copied_once(folders):
    root = await made(folders, A)
    (root / "workspace/deep").mkdir()
    (root / "workspace/a").write_bytes(bytes(range(256)) * 4096 * 4)
    for number in range(50):
        place = root / "workspace" / ("deep" if number % 2 else "")
        os.link(root / "workspace/a", place / f"name-{number}")
    await folders.fork(A, B)
    copied = await folders.open(B)
    names = [path for path in (copied / "workspace").rglob("*") if path.is_file()]
    assert len(names) == 51
    assert {path.stat().st_ino for path in names} == {names[0].stat().st_ino}
    assert names[0].read_bytes() == (root / "workspace/a").read_bytes()
    assert await folders.room(B) > SIZE // 2


async def test_what_is_over_its_bound_is_not_copied(folders):
    root = await made(folders, A)
    (root / "workspace/a").write_bytes(b"x" * (SIZE * 12 // 10))
    with pytest.raises(TooLarge, match=str(SIZE)):
        await folders.fork(A, B)
    assert list(await folders.list()) == [A]


async def test_names_take_room_too_and_depth_hides_nothing(folders):
    root = await made(folders, A)
    for number in range(1000):
        (root / "workspace" / str(number)).touch()
    assert await folders.room(A) <= SIZE - 1000 * 4096
    assert await folders.room(A) > 0
    await made(folders, B)
    place = await folders.open(B) / "workspace"
    (place / "/".join("d" * 210)).mkdir(parents=True)
    assert await folders.room(B) < 0


async def test_looking_ends_once_it_is_known_to_be_too_much(folders):
    root = await made(folders, A)
    for number in range(2000):
        (root / "workspace" / str(number)).touch()
    found = await folders.fill(A, most=100 * 4096)
    assert found is not None
    assert 100 * 4096 < found.charged < 150 * 4096
    whole = await folders.fill(A)
    assert whole is not None
    assert whole.charged >= 2000 * 4096
    assert (whole.size, whole.hard_size) == (SIZE, SIZE * 11 // 10)


@needs_root
async def test_an_images_file_system_bounds_it(images):
    await images.ensure(A)
    assert await images.fill(A) is None


async def test_no_disk_is_made_on_a_machine_that_is_nearly_full(disks, monkeypatch):
    root = await made(disks, A)
    (root / "workspace/a").write_text("kept")
    real = os.statvfs

    def low(path):
        found = real(path)
        if str(path).endswith("/environments"):
            return os.statvfs_result((4096, 4096, 1000, 50, 49, *tuple(found)[5:]))
        return found

    monkeypatch.setattr(disk.os, "statvfs", low)
    for call in (disks.ensure(B), disks.fork(A, B)):
        with pytest.raises(Unready, match="nearly full"):
            await call
    assert list(await disks.list()) == [A]
    # What is there goes on.
    await disks.ensure(A)
    assert (await disks.open(A) / "workspace/a").read_text() == "kept"


async def test_a_copy_has_nothing_that_was_half_done(disks):
    root = await made(disks, A)
    for name in ("uploads", "staging"):
        (root.parent / name).mkdir(exist_ok=True)
        (root.parent / name / "half").write_bytes(b"x" * 1000)
    (root.parent / "staging/trash.1/deep").mkdir(parents=True)
    await disks.fork(A, B)
    copied = (await disks.open(B)).parent
    left = [path for name in ("uploads", "staging") for path in (copied / name).glob("*")]
    assert left == []
    assert (root.parent / "uploads/half").exists()


async def test_counting_has_a_deadline_and_says_what_it_knows(disks, monkeypatch):
    root = await made(disks, A)
    for number in range(300):
        (root / "workspace" / str(number)).write_text("abc")
    monkeypatch.setattr(disk, "_COUNT_S", -1.0)
    assert (await disks.usage(A)).file_count < 300
    monkeypatch.setattr(disk, "_COUNT_S", 10.0)
    assert (await disks.usage(A)).file_count == 300
    (root / "workspace/another").write_text("abc")
    monkeypatch.setattr(disk, "_COUNT_S", -1.0)
    assert (await disks.usage(A)).file_count == 300


async def test_one_environment_is_counted_once_at_a_time(disks, monkeypatch):
    await made(disks, A)
    measure, calls = tree.measure, []

    def slow(*arguments):
        calls.append(1)
        time.sleep(0.2)
        return measure(*arguments)

    monkeypatch.setattr(tree, "measure", slow)
    found = await asyncio.gather(*(disks.usage(A) for _ in range(5)))
    assert [usage.file_count for usage in found] == [0] * 5
    assert len(calls) == 1
    await disks.usage(A)
    assert len(calls) == 2


async def test_what_a_broker_before_has_left_mounted_is_found(disks, folder):
    await made(disks, A)
    await disks.ensure(B)
    await disks.close()
    later = await opened(folder, disks.kind)
    assert await later.mounted() == ([A] if disks.kind == "image" else [])
    assert await later.release(A)
    assert await later.mounted() == []
    await later.close()
