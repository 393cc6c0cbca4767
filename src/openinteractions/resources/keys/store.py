"""All SQL of projects, keys and budgets."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import exists, insert, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert

from openinteractions import ids
from openinteractions.db.engine import Database
from openinteractions.db.tables import api_keys, budgets, projects

CHANNEL = "oi_keys"


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it can be shown: never the key itself."""

    id: UUID
    project: str
    name: str
    prefix: str
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Holder:
    """Whom a key speaks for."""

    project_id: UUID
    key_id: UUID
    is_budgeted: bool
    retention: timedelta | None


async def find(database: Database, digest: bytes) -> Holder | None:
    """The holder of a valid key, by the key's hash."""
    budgeted = exists().where(
        budgets.c.project_id == api_keys.c.project_id,
        or_(budgets.c.key_id.is_(None), budgets.c.key_id == api_keys.c.id),
    )
    async with database.transaction() as connection:
        row = (
            await connection.execute(
                select(api_keys.c.project_id, api_keys.c.id, budgeted, projects.c.retention)
                .join(projects, projects.c.id == api_keys.c.project_id)
                .where(api_keys.c.hash == digest, api_keys.c.revoked_at.is_(None))
            )
        ).first()
    return None if row is None else Holder(*row)


async def ensure_project(database: Database, name: str) -> UUID:
    """The id of a project, created if there is none of this name."""
    async with database.transaction() as connection:
        await connection.execute(
            upsert(projects).values(id=ids.uuid7(), name=name).on_conflict_do_nothing()
        )
        return (
            await connection.execute(select(projects.c.id).where(projects.c.name == name))
        ).scalar_one()


async def add(
    database: Database, *, project_id: UUID, name: str, digest: bytes, prefix: str
) -> UUID:
    """Keep a key's hash; the id of the key that has it, old or new."""
    async with database.transaction() as connection:
        await connection.execute(
            upsert(api_keys)
            .values(id=ids.uuid7(), project_id=project_id, name=name, hash=digest, prefix=prefix)
            .on_conflict_do_nothing()
        )
        return (
            await connection.execute(select(api_keys.c.id).where(api_keys.c.hash == digest))
        ).scalar_one()


async def any_key(database: Database) -> bool:
    """Whether there is any valid key."""
    async with database.transaction() as connection:
        found = select(exists().where(api_keys.c.revoked_at.is_(None)))
        return (await connection.execute(found)).scalar_one()


async def list_keys(database: Database) -> list[Key]:
    """Every key, oldest first."""
    async with database.transaction() as connection:
        rows = await connection.execute(
            select(
                api_keys.c.id,
                projects.c.name,
                api_keys.c.name,
                api_keys.c.prefix,
                api_keys.c.created_at,
                api_keys.c.revoked_at,
            )
            .join(projects, projects.c.id == api_keys.c.project_id)
            .order_by(api_keys.c.created_at, api_keys.c.id)
        )
        return [Key(*row) for row in rows]


async def revoke(database: Database, prefix: str) -> list[str]:
    """Revoke the valid keys whose id or prefix begins so; return their prefixes."""
    async with database.transaction() as connection:
        rows = await connection.execute(
            update(api_keys)
            .where(
                api_keys.c.revoked_at.is_(None),
                api_keys.c.prefix.startswith(prefix, autoescape=True),
            )
            .values(revoked_at=text("now()"))
            .returning(api_keys.c.prefix)
        )
        revoked = [row[0] for row in rows]
        await connection.execute(text(f"notify {CHANNEL}"))
    return revoked


async def set_retention(
    database: Database, *, project_id: UUID, retention: timedelta | None
) -> None:
    """Set how long a project's new interactions are kept; None: as the server's setting says."""
    async with database.transaction() as connection:
        await connection.execute(
            update(projects).where(projects.c.id == project_id).values(retention=retention)
        )
        await connection.execute(text(f"notify {CHANNEL}"))


async def set_budget(
    database: Database,
    *,
    project_id: UUID,
    key_id: UUID | None,
    max_nanousd: int | None,
    max_tokens: int | None,
) -> None:
    """Set, replace or (both None) remove the budget of one day for a key or a whole project."""
    async with database.transaction() as connection:
        mine = budgets.c.key_id.is_(None) if key_id is None else budgets.c.key_id == key_id
        await connection.execute(budgets.delete().where(budgets.c.project_id == project_id, mine))
        if max_nanousd is not None or max_tokens is not None:
            await connection.execute(
                insert(budgets).values(
                    id=ids.uuid7(),
                    project_id=project_id,
                    key_id=key_id,
                    max_nanousd=max_nanousd,
                    max_tokens=max_tokens,
                )
            )
        await connection.execute(text(f"notify {CHANNEL}"))
