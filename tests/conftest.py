"""One PostgreSQL for each test process, and a fresh migrated database for each test that asks."""

from collections.abc import AsyncGenerator

import pytest

from openinteractions.db import migrate
from openinteractions.db.engine import Database
from tests.db import postgres
from tests.sandbox.engine import docker_engine

__all__ = ["docker_engine"]


@pytest.fixture(scope="session")
async def cluster() -> AsyncGenerator[postgres.Cluster]:
    """A running cluster with a migrated database called `template`."""
    async with postgres.cluster() as running:
        database = Database(await running.create("template"), pool_size=2)
        await migrate.upgrade(database)
        await database.close()
        yield running


@pytest.fixture
async def database_url(cluster: postgres.Cluster) -> AsyncGenerator[str]:
    """The URL of a migrated database of the test's own."""
    url = await cluster.create(template="template")
    yield url
    await cluster.drop(url)


@pytest.fixture
async def database(database_url: str) -> AsyncGenerator[Database]:
    """A pool on the test's own database."""
    opened = Database(database_url, pool_size=10)
    yield opened
    await opened.close()
