"""Bounds of environments on plain folders: what is measured, and what follows."""

from collections.abc import AsyncGenerator
from pathlib import Path
from uuid import UUID

import pytest

from openinteractions.broker import bounds as module
from openinteractions.broker.bounds import Bounds
from openinteractions.errors import TooLarge
from openinteractions.sandbox.disk import Disks

SIZE = 16 * 2**20
ENV = UUID(int=7)


@pytest.fixture
async def disks(tmp_path: Path) -> AsyncGenerator[Disks]:
    made = Disks(tmp_path / "broker", kind="folder", size_bytes=SIZE)
    await made.recover()
    await made.ensure(ENV.hex)
    yield made
    await made.close()


@pytest.fixture
async def workspace(disks) -> Path:
    return await disks.open(ENV.hex) / "workspace"


@pytest.fixture
def bounds(disks, monkeypatch) -> Bounds:
    """They look whenever they are asked."""
    for name in ("_EVERY_S", "_EVERY_WHEN_OVER_S", "_FRESH_S", "_PAUSES"):
        monkeypatch.setattr(module, name, 0)
    return Bounds(disks)


def fill(workspace: Path, share: float) -> None:
    (workspace / "big").write_bytes(b"x" * int(SIZE * share))


async def test_only_what_is_well_over_its_bound_is_stopped(bounds, workspace):
    await bounds.admit(ENV)
    for share in (0.5, 1.05):
        fill(workspace, share)
        assert await bounds.is_over(ENV) is None
    fill(workspace, 1.2)
    found = await bounds.is_over(ENV)
    assert found is not None
    assert found.charged > found.hard_size > found.size == SIZE


async def test_the_next_command_hears_why_and_those_after_may_delete(bounds, workspace):
    await bounds.admit(ENV)
    fill(workspace, 1.5)
    assert await bounds.is_over(ENV)
    with pytest.raises(TooLarge, match=f"may take {SIZE}.*delete"):
        await bounds.admit(ENV)
    await bounds.admit(ENV)
    # It may run on as long as it does not grow.
    assert await bounds.is_over(ENV) is None
    fill(workspace, 0.1)
    assert await bounds.is_over(ENV) is None
    fill(workspace, 1.5)
    assert await bounds.is_over(ENV)


async def test_who_grows_again_has_to_wait(bounds, workspace, monkeypatch):
    await bounds.admit(ENV)
    fill(workspace, 1.5)
    assert await bounds.is_over(ENV)
    for waits in (False, True):
        with pytest.raises(TooLarge):
            await bounds.admit(ENV)
        if waits:
            with pytest.raises(TooLarge, match="in 5 seconds"):
                await bounds.admit(ENV)
            monkeypatch.setattr(bounds._of(ENV), "waits_until", 0)
        await bounds.admit(ENV)
        fill(workspace, 1.8 if not waits else 2.2)
        assert await bounds.is_over(ENV)
    bounds.forget(ENV)
    fill(workspace, 0.1)
    await bounds.admit(ENV)
    assert bounds._of(ENV).stops == 0


async def test_many_small_files_are_too_many_as_well(bounds, workspace):
    await bounds.admit(ENV)
    for number in range(SIZE // 4096 * 12 // 10):
        (workspace / str(number)).touch()
    assert await bounds.is_over(ENV)


async def test_what_commands_write_and_delete_counts_for_uploads(bounds, workspace):
    quota = bounds.quota(ENV)
    await quota.check()
    quota.spend(SIZE // 2)
    fill(workspace, 1.01)
    with pytest.raises(TooLarge, match=f"may hold {SIZE} bytes"):
        await quota.check()
    (workspace / "big").unlink()
    await quota.check()
    quota.spend(SIZE // 2)


async def test_what_is_written_while_it_is_measured_counts(bounds, disks, monkeypatch):
    quota, look = bounds.quota(ENV), disks.fill

    async def slow(*arguments, **options):
        found = await look(*arguments, **options)
        quota.spend(1000)
        return found

    await quota.check()
    before = quota.used
    monkeypatch.setattr(disks, "fill", slow)
    await quota.check()
    assert quota.used == before + 1000
