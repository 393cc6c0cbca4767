"""`secrets rotate`: what it seals anew, and when it refuses to say that all is well."""

import asyncio
import base64
from pathlib import Path
from uuid import UUID

import pytest

from openinteractions import crypto
from openinteractions.cli import secrets
from openinteractions.crypto import Sealer
from openinteractions.db.engine import Database
from openinteractions.db.sealed import credential_purpose
from openinteractions.errors import SetupError
from openinteractions.settings import Settings

PROJECT = UUID(int=7)
OLD, NEW, OTHER = bytes(32), bytes(range(32)), bytes(range(1, 33))
PURPOSE = credential_purpose(PROJECT, "a")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(secrets, "_SETTLE_S", 0.2)
    monkeypatch.setattr(crypto, "FOLLOWED_S", 0.05)


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def settings(url: str, home: Path, key: bytes | None = None, *old: bytes) -> Settings:
    return Settings.model_validate(
        {
            "database_url": url,
            "data_dir": home,
            "master_key": None if key is None else text(key),
            "old_master_keys": [text(one) for one in old],
        }
    )


async def keep(database: Database, value: bytes) -> None:
    async with database.hot() as connection:
        await connection.execute(
            "insert into credentials (project_id, id, type, public, sealed) "
            "values ($1, 'a', 'bearer_token', '{}', $2) "
            "on conflict (project_id, id) do update set sealed = excluded.sealed",
            PROJECT,
            value,
        )


async def kept(database: Database) -> bytes:
    async with database.hot() as connection:
        return await connection.fetchval("select sealed from credentials")


async def test_a_configured_key(
    database: Database, database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    await keep(database, Sealer(OLD).seal(b"x", purpose=PURPOSE))
    await secrets.rotate(settings(database_url, tmp_path, NEW, OLD), None)
    assert Sealer(NEW).open(await kept(database), purpose=PURPOSE) == b"x"
    said = capsys.readouterr().out
    assert "credentials.sealed: 1 of 1 sealed anew" in said
    assert text(OLD) not in said
    assert not (tmp_path / "master.key").exists()


async def test_what_does_not_open_is_left_and_named(
    database: Database, database_url: str, tmp_path: Path
):
    value = Sealer(OLD).seal(b"x", purpose=PURPOSE)
    await keep(database, value)
    with pytest.raises(
        SetupError, match=r"no known key: 1 of credentials\.sealed\. They were left"
    ):
        await secrets.rotate(settings(database_url, tmp_path, NEW, OTHER), None)
    assert await kept(database) == value
    # With a file, its old keys stay too.
    before = crypto.master_key(None, tmp_path)
    with pytest.raises(SetupError, match="every key stays where it is"):
        await secrets.rotate(settings(database_url, tmp_path), None)
    assert len((tmp_path / "master.key").read_text().split()) == 2
    assert text(before) in (tmp_path / "master.key").read_text()
    await secrets.rotate(settings(database_url, tmp_path, None, OLD), None)
    (line,) = (tmp_path / "master.key").read_text().split()
    sealer = Sealer(base64.b64decode(line))
    assert sealer.open(await kept(database), purpose=PURPOSE) == b"x"


async def test_a_process_that_keeps_to_the_old_key_is_noticed(
    database: Database, database_url: str, tmp_path: Path
):
    async def go_on() -> None:
        while True:
            await keep(database, Sealer(OLD).seal(b"x", purpose=PURPOSE))
            await asyncio.sleep(0.02)

    writer = asyncio.get_running_loop().create_task(go_on())
    with pytest.raises(SetupError, match="goes on sealing with an older key"):
        await secrets.rotate(settings(database_url, tmp_path, NEW, OLD), None)
    writer.cancel()


async def test_a_process_that_follows_the_file_is_waited_for(
    database: Database, database_url: str, tmp_path: Path
):
    running = crypto.sealer(None, [], tmp_path)

    async def go_on() -> None:
        while True:
            await keep(database, running.seal(b"x", purpose=PURPOSE))
            await asyncio.sleep(0.02)

    writer = asyncio.get_running_loop().create_task(go_on())
    await asyncio.sleep(0.1)
    await secrets.rotate(settings(database_url, tmp_path), None)
    writer.cancel()
    (line,) = (tmp_path / "master.key").read_text().split()
    sealer = Sealer(base64.b64decode(line))
    assert sealer.open(await kept(database), purpose=PURPOSE) == b"x"


async def test_a_key_file_that_makes_no_sense(database_url: str, tmp_path: Path):
    with pytest.raises(SetupError, match="OI_MASTER_KEY is set"):
        await secrets.rotate(settings(database_url, tmp_path, NEW), tmp_path / "x")
    with pytest.raises(SetupError, match="cannot read the key file"):
        await secrets.rotate(settings(database_url, tmp_path), tmp_path / "x")
    (tmp_path / "x").write_text("short")
    with pytest.raises(SetupError, match="the new key is not 32 bytes"):
        await secrets.rotate(settings(database_url, tmp_path), tmp_path / "x")
