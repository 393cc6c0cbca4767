"""Bring a database's schema to this version's, with Alembic."""

import asyncio
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from openinteractions.db.engine import Database
from openinteractions.errors import SetupError

_LOCK = 0x6F69_6D67
"""Advisory lock: two servers that start together migrate one after the other."""


def config() -> Config:
    """Alembic's configuration: migrations beside the sources, or inside the installed package."""
    here = Path(__file__).resolve()
    packaged = here.parents[1] / "_migrations"
    folder = packaged if packaged.is_dir() else here.parents[3] / "migrations"
    result = Config()
    result.set_main_option("script_location", str(folder).replace("%", "%%"))
    return result


def include_object(_object: object, name: str | None, kind: str, *_: object) -> bool:
    """Leave out of comparisons what the schema makes for itself: the partitions of `events`."""
    return not (kind == "table" and name is not None and name.startswith("events_"))


async def is_current(database: Database) -> bool:
    """Whether the schema is exactly this version's."""
    async with database.transaction() as connection:
        return await connection.run_sync(_revision) == _head()


async def upgrade(database: Database, revision: str = "head") -> None:
    """Migrate to a revision, by default the newest. Nothing happens if it is there already."""
    await _run(database, command.upgrade, revision)


async def downgrade(database: Database, revision: str) -> None:
    """Migrate back to a revision (`base`: an empty schema)."""
    await _run(database, command.downgrade, revision)


async def require_current(database: Database) -> None:
    """Refuse to go on with another version's schema.

    Raises:
        SetupError: It differs; the message names the command that mends it.
    """
    if not await is_current(database):
        raise SetupError(
            "the database's schema is not this version's: run `openinteractions migrate`"
        )


def _head() -> str | None:
    return ScriptDirectory.from_config(config()).get_current_head()


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


async def _run(database: Database, action: Any, revision: str) -> None:  # noqa: ANN401
    async with database.engine.connect() as connection:
        await connection.execute(text("select pg_advisory_lock(:key)"), {"key": _LOCK})
        await connection.commit()
        try:
            await connection.run_sync(_apply, action, revision)
            await connection.commit()
        finally:
            await connection.rollback()
            await asyncio.shield(
                connection.execute(text("select pg_advisory_unlock(:key)"), {"key": _LOCK})
            )


def _apply(connection: Connection, action: Any, revision: str) -> None:  # noqa: ANN401
    settings = config()
    settings.attributes["connection"] = connection
    action(settings, revision)
