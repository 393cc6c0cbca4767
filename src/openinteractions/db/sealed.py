"""Every column with sealed values: what each is bound to, and how all of them get a new key.

A value's purpose names its row, so that a value that was moved to another one does not open.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import Table, and_, select, tuple_, update

from openinteractions.crypto import Sealer
from openinteractions.db import tables
from openinteractions.db.engine import Database
from openinteractions.errors import SetupError

_BATCH = 200

Row: TypeAlias = Mapping[str, Any]


def signing_key_purpose() -> str:
    """Of the keys that sign callbacks."""
    return "webhook-signing-key"


def credential_purpose(project_id: UUID, credential_id: str) -> str:
    """Of a credential's secrets."""
    return f"credential:{project_id.hex}:{credential_id}"


def access_token_purpose(project_id: UUID, credential_id: str) -> str:
    """Of the access token that an oauth2 credential has at present."""
    return f"credential-token:{project_id.hex}:{credential_id}"


def environment_purpose(project_id: UUID, environment_id: UUID) -> str:
    """Of an environment's network rules and variables."""
    return f"environment:{project_id.hex}:{environment_id.hex}"


def interaction_purpose(project_id: UUID, interaction_id: UUID) -> str:
    """Of the secrets of the request that made an interaction."""
    return f"interaction:{project_id.hex}:{interaction_id.hex}"


def agent_purpose(project_id: UUID, agent_id: str, version: int) -> str:
    """Of the secrets in one version of an agent's definition."""
    return f"agent:{project_id.hex}:{agent_id}@{version}"


@dataclass(frozen=True, slots=True)
class Sealed:
    """A column, and the purpose that its values are sealed for."""

    table: Table
    column: str
    purpose: Callable[[Row], str]
    needs: tuple[str, ...] = field(default=("project_id", "id"))
    """The columns that the purpose is made from."""

    @property
    def name(self) -> str:
        """As `table.column`."""
        return f"{self.table.name}.{self.column}"


COLUMNS = (
    Sealed(tables.signing_keys, "sealed", lambda _: signing_key_purpose(), ()),
    Sealed(
        tables.credentials, "sealed", lambda row: credential_purpose(row["project_id"], row["id"])
    ),
    Sealed(
        tables.credentials,
        "token_sealed",
        lambda row: access_token_purpose(row["project_id"], row["id"]),
    ),
    Sealed(
        tables.environments, "sealed", lambda row: environment_purpose(row["project_id"], row["id"])
    ),
    Sealed(
        tables.interactions, "sealed", lambda row: interaction_purpose(row["project_id"], row["id"])
    ),
    Sealed(
        tables.agent_versions,
        "sealed",
        lambda row: agent_purpose(row["project_id"], row["agent_id"], row["version"]),
        ("project_id", "agent_id", "version"),
    ),
)
"""A test holds this list against the tables."""


@dataclass(slots=True)
class Count:
    """What one pass over a column found."""

    seen: int = 0
    changed: int = 0
    """They were sealed with an older key, and now are with the current one."""
    closed: int = 0
    """They open with no known key, and were left as they are."""


async def reseal(database: Database, sealer: Sealer, column: Sealed) -> Count:
    """Seal every value of a column with the current key, a batch at a time.

    Nothing is locked: a value that is written meanwhile wins, and is seen by the next pass.
    """
    count = Count()
    async for rows in _batches(database, column):
        for row in rows:
            count.seen += 1
            sealed: bytes = row[column.column]
            try:
                fresh = sealer.resealed(sealed, purpose=column.purpose(row))
            except SetupError:
                count.closed += 1
                continue
            if fresh is not None:
                await _replace(database, column, row, fresh)
                count.changed += 1
    return count


async def _batches(database: Database, column: Sealed) -> AsyncGenerator[list[Row]]:
    """The rows with a value, in the order of their keys."""
    keys = list(column.table.primary_key.columns)
    value = column.table.c[column.column]
    wanted = dict.fromkeys([*keys, *(column.table.c[name] for name in column.needs), value])
    page = select(*wanted).where(value.is_not(None)).order_by(*keys).limit(_BATCH)
    last: tuple[Any, ...] | None = None
    while True:
        statement = page if last is None else page.where(tuple_(*keys) > last)
        async with database.transaction() as connection:
            found = (await connection.execute(statement)).mappings()
            rows: list[Row] = [dict(row) for row in found]
        if not rows:
            return
        yield rows
        last = tuple(rows[-1][key.name] for key in keys)


async def _replace(database: Database, column: Sealed, row: Row, fresh: bytes) -> None:
    same = (key == row[key.name] for key in column.table.primary_key.columns)
    value = column.table.c[column.column]
    async with database.transaction() as connection:
        await connection.execute(
            update(column.table)
            .where(and_(*same, value == row[column.column]))
            .values({column.column: fresh})
        )
