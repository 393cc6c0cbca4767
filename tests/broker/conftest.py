"""A broker of the test's own."""

import shutil
import tempfile
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest

from tests.broker.stage import Stage, staged


@pytest.fixture
def home() -> Generator[Path]:
    """A data folder whose path is short enough for a socket, where the engine can mount it."""
    folder = Path(tempfile.mkdtemp(prefix="oi-broker-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def stage(docker_engine, database, database_url, home) -> AsyncGenerator[Stage]:
    """Everything but the broker's start."""
    async with staged(docker_engine, database, database_url, home) as made:
        yield made


@pytest.fixture
async def broker(stage: Stage) -> Stage:
    """A running broker."""
    await stage.start()
    return stage
