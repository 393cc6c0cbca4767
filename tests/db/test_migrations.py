"""The migrations make what the models say, and can be run at any time, back and forth."""

import asyncio
from collections.abc import AsyncGenerator

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from tests.db import postgres

from openinteractions.db import migrate
from openinteractions.db.engine import Database
from openinteractions.db.tables import metadata
from openinteractions.errors import SetupError
from openinteractions.worker import upkeep


@pytest.fixture
async def empty_url(cluster: postgres.Cluster) -> AsyncGenerator[str]:
    url = await cluster.create()
    yield url
    await cluster.drop(url)


@pytest.fixture
async def empty(empty_url: str) -> AsyncGenerator[Database]:
    database = Database(empty_url, pool_size=3)
    yield database
    await database.close()


def difference(connection: Connection) -> list[object]:
    options = {
        "include_object": migrate.include_object,
        "compare_type": True,
        "compare_server_default": True,
    }
    return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)


async def test_the_migrations_make_exactly_what_the_models_say(database: Database):
    async with database.transaction() as connection:
        assert await connection.run_sync(difference) == []


async def test_they_still_do_after_the_upkeep(database: Database):
    for _ in range(2):
        await upkeep.make_partitions(database)
    async with database.transaction() as connection:
        assert await connection.run_sync(difference) == []
    async with database.hot() as connection:
        partitions = await connection.fetchval(
            "select count(*) from pg_inherits where inhparent = 'events'::regclass"
        )
    assert partitions == 4


async def test_upkeep_at_once_is_no_quarrel(database: Database):
    await asyncio.gather(*(upkeep.make_partitions(database) for _ in range(6)))


async def test_there_and_back_and_there_again(empty: Database):
    for _ in range(2):
        assert not await migrate.is_current(empty)
        await migrate.upgrade(empty)
        assert await migrate.is_current(empty)
        async with empty.transaction() as connection:
            assert await connection.run_sync(difference) == []
        await migrate.downgrade(empty, "base")
        assert await relations(empty) <= {"alembic_version", "alembic_version_pkc"}


async def relations(database: Database) -> set[str]:
    async with database.hot() as connection:
        rows = await connection.fetch(
            "select relname from pg_class where relnamespace = 'public'::regnamespace"
        )
        types = await connection.fetch(
            "select typname from pg_type where typnamespace = 'public'::regnamespace "
            "and typtype in ('e', 'd')"
        )
    return {row[0] for row in (*rows, *types)}


async def test_another_versions_schema_is_refused(empty: Database):
    with pytest.raises(SetupError, match="openinteractions migrate"):
        await migrate.require_current(empty)
    await migrate.upgrade(empty)
    await migrate.require_current(empty)
    async with empty.hot() as connection:
        await connection.execute("update alembic_version set version_num = '9999'")
    with pytest.raises(SetupError):
        await migrate.require_current(empty)


async def test_nothing_happens_where_it_is_current(database: Database):
    async with database.hot() as connection:
        await connection.execute("insert into projects values (gen_random_uuid(), 'kept')")
    await migrate.upgrade(database)
    async with database.hot() as connection:
        assert await connection.fetchval("select count(*) from projects") == 1


async def test_servers_that_start_together_migrate_one_after_the_other(empty_url: str):
    servers = [Database(empty_url, pool_size=2) for _ in range(3)]
    await asyncio.gather(*(migrate.upgrade(server) for server in servers))
    for server in servers:
        assert await migrate.is_current(server)
        await server.close()


async def test_a_migration_that_cannot_lock_fails_instead_of_stopping_everybody(
    database: Database, database_url: str
):
    """`lock_timeout`: the old schema goes on serving, and the lock of migrations is given up."""
    reader = await asyncpg.connect(database_url)
    transaction = reader.transaction()
    await transaction.start()
    # A table of the newest revision: each revision is a transaction of its own.
    await reader.fetch("select * from environments")
    with pytest.raises(Exception, match="lock timeout"):
        await migrate.downgrade(database, "base")
    await transaction.rollback()
    await reader.close()
    assert await migrate.is_current(database)
    async with asyncio.timeout(5):
        await migrate.upgrade(database)
