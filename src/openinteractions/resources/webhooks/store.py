"""All SQL of the keys that sign callbacks."""

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import insert as upsert

from openinteractions.db.engine import Database
from openinteractions.db.tables import signing_keys

_LOCK = 0x6F69_6B65
"""Advisory lock: of several processes that find no key, one makes it."""


async def signing_key(database: Database) -> bytes | None:
    """The sealed key that signs now; None if none was made yet."""
    async with database.transaction() as connection:
        return (await connection.execute(_newest())).scalar_one_or_none()


async def keep_first_signing_key(database: Database, kid: str, sealed: bytes) -> bytes:
    """Keep a key unless there is one already; the sealed key that signs now."""
    async with database.transaction() as connection:
        await connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        found = (await connection.execute(_newest())).scalar_one_or_none()
        if found is not None:
            return found
        await connection.execute(upsert(signing_keys).values(kid=kid, sealed=sealed))
        return sealed


async def signing_keys_of_all_time(database: Database) -> list[bytes]:
    """Every sealed key, the newest first: old signatures are verified with old keys."""
    async with database.transaction() as connection:
        rows = await connection.execute(
            select(signing_keys.c.sealed).order_by(signing_keys.c.created_at.desc())
        )
        return [row[0] for row in rows]


def _newest():  # noqa: ANN202 - a select of one column
    return select(signing_keys.c.sealed).order_by(signing_keys.c.created_at.desc()).limit(1)
