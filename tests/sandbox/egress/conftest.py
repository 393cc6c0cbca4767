from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.sandbox.egress import rig as rigs


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncGenerator[rigs.Rig]:
    async with rigs.rig(tmp_path) as made:
        yield made
