"""Everything that is sealed gets a new key; nothing is lost on the way."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import LargeBinary

from openinteractions import ids
from openinteractions.crypto import Sealer
from openinteractions.db import sealed
from openinteractions.db.engine import Database
from openinteractions.db.tables import metadata

OLD, NEW = Sealer(bytes(32)), Sealer(bytes(range(32)), [bytes(32)])
ONLY_NEW = Sealer(bytes(range(32)))


def test_every_sealed_column_is_listed():
    """A column that is forgotten would be unreadable once the old key is gone."""
    found = {
        f"{table.name}.{column.name}"
        for table in metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, LargeBinary) and "sealed" in column.name
    }
    assert {column.name for column in sealed.COLUMNS} == found


def column(name: str) -> sealed.Sealed:
    return next(one for one in sealed.COLUMNS if one.name == name)


async def execute(database: Database, statement: str, *values: object) -> list[Any]:
    async with database.hot() as connection:
        return await connection.fetch(statement, *values)


async def keep(
    database: Database, project_id: UUID, name: str, plain: bytes, sealer: Sealer = OLD
) -> None:
    purpose = sealed.credential_purpose(project_id, name)
    await execute(
        database,
        "insert into credentials (project_id, id, type, public, sealed) "
        "values ($1, $2, 'bearer_token', '{}', $3)",
        project_id,
        name,
        sealer.seal(plain, purpose=purpose),
    )


async def test_every_column_can_be_sealed_anew(database: Database):
    project, key = uuid4(), ids.uuid7()
    await keep(database, project, "a", b"1")
    await execute(
        database,
        "update credentials set token_sealed = $1",
        OLD.seal(b"2", purpose=sealed.access_token_purpose(project, "a")),
    )
    await execute(
        database,
        "insert into signing_keys (kid, sealed) values ('k', $1)",
        OLD.seal(b"3", purpose=sealed.signing_key_purpose()),
    )
    await execute(
        database,
        "insert into environments (id, project_id, sealed) values ($1, $2, $3)",
        key,
        project,
        OLD.seal(b"4", purpose=sealed.environment_purpose(project, key)),
    )
    await execute(
        database,
        "insert into interactions (id, project_id, segment_id, depth, status, sealed) "
        "values ($1, $2, $1, 0, 'completed', $3)",
        key,
        project,
        OLD.seal(b"5", purpose=sealed.interaction_purpose(project, key)),
    )
    await execute(
        database,
        "insert into agent_versions (project_id, agent_id, version, public, sealed) "
        "values ($1, 'a', 2, '{}', $2)",
        project,
        OLD.seal(b"6", purpose=sealed.agent_purpose(project, "a", 2)),
    )
    for one in sealed.COLUMNS:
        assert await sealed.reseal(database, NEW, one) == sealed.Count(seen=1, changed=1)
        assert await sealed.reseal(database, NEW, one) == sealed.Count(seen=1)
    purposes = {
        "signing_keys.sealed": (sealed.signing_key_purpose(), b"3"),
        "credentials.sealed": (sealed.credential_purpose(project, "a"), b"1"),
        "credentials.token_sealed": (sealed.access_token_purpose(project, "a"), b"2"),
        "environments.sealed": (sealed.environment_purpose(project, key), b"4"),
        "interactions.sealed": (sealed.interaction_purpose(project, key), b"5"),
        "agent_versions.sealed": (sealed.agent_purpose(project, "a", 2), b"6"),
    }
    for one in sealed.COLUMNS:
        ((value,),) = await execute(database, f"select {one.column} from {one.table.name}")
        purpose, plain = purposes[one.name]
        assert ONLY_NEW.open(value, purpose=purpose) == plain


async def test_many_go_in_batches(database: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sealed, "_BATCH", 7)
    projects = [uuid4(), uuid4()]
    for number in range(20):
        for project in projects:
            await keep(database, project, f"c{number}", b"%d" % number, NEW if number % 4 else OLD)
    found = await sealed.reseal(database, NEW, column("credentials.sealed"))
    assert found == sealed.Count(seen=40, changed=10)
    rows = await execute(database, "select project_id, id, sealed from credentials")
    for project, name, value in rows:
        purpose = sealed.credential_purpose(project, name)
        assert ONLY_NEW.open(value, purpose=purpose) == name[1:].encode()


async def test_what_does_not_open_is_counted_and_left(database: Database):
    project = uuid4()
    await keep(database, project, "a", b"1", Sealer(b"x" * 32))
    await keep(database, project, "b", b"2")
    before = await execute(database, "select sealed from credentials where id = 'a'")
    found = await sealed.reseal(database, NEW, column("credentials.sealed"))
    assert found == sealed.Count(seen=2, changed=1, closed=1)
    assert await execute(database, "select sealed from credentials where id = 'a'") == before


async def test_a_write_in_between_wins(database: Database):
    """The value that was read is not there any more: the new one stays."""
    project = uuid4()
    await keep(database, project, "a", b"old")
    purpose = sealed.credential_purpose(project, "a")
    value = OLD.seal(b"newer", purpose=purpose)

    class Interrupted(Sealer):
        """Somebody writes while a batch is worked on."""

        def resealed(self, sealed: bytes, *, purpose: str) -> bytes | None:
            done.set()
            return super().resealed(sealed, purpose=purpose)

    done = asyncio.Event()
    async with database.transaction() as other:
        await other.exec_driver_sql("update credentials set sealed = $1", (value,))
        task = asyncio.get_running_loop().create_task(
            sealed.reseal(
                database, Interrupted(bytes(range(32)), [bytes(32)]), column("credentials.sealed")
            )
        )
        await done.wait()
        await asyncio.sleep(0.1)
    await task
    ((kept,),) = await execute(database, "select sealed from credentials")
    assert kept == value
    again = await sealed.reseal(database, NEW, column("credentials.sealed"))
    assert again.changed == 1
    ((kept,),) = await execute(database, "select sealed from credentials")
    assert ONLY_NEW.open(kept, purpose=purpose) == b"newer"
