"""Access tokens: one exchange at a time over all processes, and nothing lost on the way."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from ipaddress import ip_network
from typing import Any
from uuid import UUID

import orjson
import pytest
from tests.fakes.oauth import CLIENT, REFRESH, FakeOAuth

from openinteractions.crypto import Sealer
from openinteractions.db.engine import Database
from openinteractions.errors import Conflict, Invalid, NotFound
from openinteractions.netguard import Fetcher, Guard
from openinteractions.resources.credentials import refresh, store
from openinteractions.resources.credentials.service import Unusable, Vault
from openinteractions.wire.credentials import parse_create, parse_update

PROJECT = UUID(int=7)
KEY = bytes(32)


@pytest.fixture
async def provider() -> AsyncGenerator[FakeOAuth]:
    fake = FakeOAuth()
    async with fake.serve():
        yield fake


@asynccontextmanager
async def opened(database: Database, *, allow: str = "127.0.0.0/8") -> AsyncGenerator[Vault]:
    """A vault, as another process would have one."""
    fetcher = Fetcher(Guard([ip_network(allow)]), max_bytes=10**6)
    vault = Vault(database, Sealer(KEY), fetcher)
    try:
        yield vault
    finally:
        await vault.close()
        await fetcher.close()


@pytest.fixture
async def vault(database: Database) -> AsyncGenerator[Vault]:
    async with opened(database) as here:
        yield here


async def made(vault: Vault, provider: FakeOAuth, **fields: Any) -> dict[str, Any]:
    body = orjson.dumps(provider.body(id="grant", **fields))
    return orjson.loads(await vault.create(PROJECT, *parse_create(body, max_depth=9)))


async def changed(vault: Vault, **fields: Any) -> dict[str, Any]:
    body = orjson.dumps({"type": "oauth2", **fields})
    change = parse_update(body, update_mask=None, max_depth=9)
    return orjson.loads(await vault.update(PROJECT, "grant", change))


async def token(vault: Vault) -> str:
    found = await vault.injection(PROJECT, "grant")
    assert (found.header_name, found.prefix) == ("Authorization", "Bearer")
    return found.token


async def let_pass(database: Database, seconds: float) -> None:
    """Time goes by for tokens, leases and pauses."""
    past = timedelta(seconds=seconds)
    async with database.hot() as connection:
        await connection.execute(
            "update credentials set token_expires_at = token_expires_at - $1::interval, "
            "refreshing_until = refreshing_until - $1::interval",
            past,
        )
        await connection.execute(
            "update credentials set public = jsonb_set(public, '{refresh_failed,until}', "
            "to_jsonb((public #>> '{refresh_failed,until}')::float8 - $1::float8)) "
            "where public ? 'refresh_failed'",
            seconds,
        )


async def refusal(vault: Vault) -> str:
    with pytest.raises(Unusable) as caught:
        await token(vault)
    assert caught.value.reason == "refresh_failed"
    assert "SECRET" not in caught.value.message
    return caught.value.message


# ---- create


async def test_a_create_proves_the_grant(vault: Vault, provider: FakeOAuth):
    answer = await made(vault, provider, scopes=["a:b", "c"])
    assert set(answer) == {"id", "type", "status", "create_time", "update_time"}
    assert provider.forms == [
        {
            "grant_type": "refresh_token",
            "refresh_token": REFRESH,
            "client_id": CLIENT[0],
            "client_secret": CLIENT[1],
            "scope": "a:b c",
        }
    ]
    assert await token(vault) == "access-SECRET-1"
    assert len(provider.forms) == 1


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [
        (400, {"error": "invalid_grant", "error_description": REFRESH}, "400: invalid_grant."),
        (200, {"error": "bad_refresh_token"}, "answered 200: bad_refresh_token."),
        (400, {"error": CLIENT[1]}, "answered 400."),
        (400, {"error": f"x {REFRESH}"}, "answered 400."),
        (503, b"SECRET <html>", "answered 503."),
        (302, b"", "answered 302."),
        (200, b"access_token=SECRET", "without an access token for a header."),
        (200, ["SECRET"], "without an access token for a header."),
        (200, {"access_token": "SEC\r\nRET"}, "without an access token for a header."),
        (200, {"access_token": "x", "token_type": "mac"}, "that is no bearer token."),
        (200, b"x" * 300_000, "larger than 262144 bytes."),
    ],
)  # fmt: skip
async def test_a_grant_that_does_not_work_is_refused(
    vault: Vault, provider: FakeOAuth, database: Database, status: int, answer: Any, why: str
):
    provider.answers = [(status, answer)]
    with pytest.raises(Invalid) as caught:
        await made(vault, provider)
    assert caught.value.message.endswith(why)
    assert "SECRET" not in caught.value.message
    assert len(provider.forms) == 1
    assert await store.find(database, PROJECT, "grant") is None


async def test_a_token_url_that_is_not_there(vault: Vault, provider: FakeOAuth):
    with pytest.raises(Invalid, match=r"Cannot fetch 'http://127\.0\.0\.1:\d+/token': "):
        await made(vault, provider, token_url="http://127.0.0.1:9/token?key=SECRET")


async def test_a_token_url_goes_through_the_guard(database: Database, provider: FakeOAuth):
    async with opened(database, allow="10.0.0.0/8") as strict:
        for host in ("127.0.0.1", "localhost", "[::1]"):
            with pytest.raises(Invalid, match="not public"):
                await made(strict, provider, token_url=provider.url.replace("127.0.0.1", host))
    assert provider.forms == []


async def test_a_client_that_is_only_known_by_its_header(vault: Vault, provider: FakeOAuth):
    """RFC 6749, 2.3.1: that is what every server has to take; the form is what most do."""
    provider.takes = "basic"
    await made(vault, provider)
    assert [("client_secret" in form) for form in provider.forms] == [True, False]
    assert await token(vault) == "access-SECRET-1"


async def test_the_way_that_worked_is_remembered(
    vault: Vault, provider: FakeOAuth, database: Database
):
    provider.takes = "basic"
    await made(vault, provider)
    await let_pass(database, 3600)
    assert await token(vault) == "access-SECRET-2"
    assert [("client_secret" in form) for form in provider.forms] == [True, False, False]


async def test_an_id_that_is_taken_costs_no_exchange(vault: Vault, provider: FakeOAuth):
    await made(vault, provider)
    with pytest.raises(Conflict, match="Credential 'grant' already exists"):
        await made(vault, provider)
    assert len(provider.forms) == 1


# ---- refresh


async def test_a_token_is_renewed_in_its_last_minute(
    vault: Vault, provider: FakeOAuth, database: Database
):
    await made(vault, provider)
    await let_pass(database, 3500)
    assert await token(vault) == "access-SECRET-1"
    await let_pass(database, 50)
    assert await token(vault) == "access-SECRET-2"
    assert await token(vault) == "access-SECRET-2"
    assert provider.granted == 2


@pytest.mark.parametrize(
    ("lasts", "good_s"), [(20, 9), ("30", 14), (None, 3500), ("soon", 3500), (10**30, 2 * 10**6)]
)
async def test_how_long_a_token_is_used(
    vault: Vault, provider: FakeOAuth, database: Database, lasts: Any, good_s: float
):
    provider.lasts = lasts
    await made(vault, provider)
    await let_pass(database, good_s)
    assert await token(vault) == "access-SECRET-1"
    await let_pass(database, good_s + 120)
    assert await token(vault) == "access-SECRET-2"


@pytest.mark.parametrize("lasts", [0, -5, 1, False])
async def test_a_token_that_hardly_lasts_is_still_given(
    vault: Vault, provider: FakeOAuth, database: Database, lasts: Any
):
    provider.lasts = lasts
    await made(vault, provider)
    await let_pass(database, 1)
    assert await token(vault) == "access-SECRET-2"


async def test_a_new_refresh_token_is_kept(vault: Vault, provider: FakeOAuth, database: Database):
    provider.rotates = True
    await made(vault, provider)
    for _ in range(3):
        await let_pass(database, 3600)
        await token(vault)
    assert (provider.granted, provider.reused) == (4, 0)


@pytest.mark.parametrize("expired", [True, False])
async def test_many_at_once_exchange_once(database_url: str, provider: FakeOAuth, expired: bool):
    """Three processes, each with its own connections."""
    databases = [Database(database_url, pool_size=5) for _ in range(3)]
    provider.rotates = True
    async with (
        opened(databases[0]) as one,
        opened(databases[1]) as two,
        opened(databases[2]) as three,
    ):
        await made(one, provider)
        await let_pass(databases[0], 3600 if expired else 3570)
        provider.delay_s = 0.5
        found = await asyncio.gather(
            *(token(vault) for vault in (one, two, three) for _ in range(20))
        )
    for database in databases:
        await database.close()
    assert (provider.granted, provider.most_at_once, provider.reused) == (2, 1, 0)
    # With half a minute left, the others need not wait.
    assert ("access-SECRET-1" in found) is not expired
    assert "access-SECRET-3" in found


async def test_no_connection_is_held_while_the_token_url_thinks(
    database_url: str, provider: FakeOAuth
):
    database = Database(database_url, pool_size=1)
    async with opened(database) as vault:
        await made(vault, provider)
        await let_pass(database, 3600)
        provider.delay_s = 1
        waiting = asyncio.get_running_loop().create_task(token(vault))
        await asyncio.sleep(0.3)
        async with asyncio.timeout(0.5), database.transaction() as connection:
            found = await connection.exec_driver_sql(
                "select count(*) from pg_stat_activity "
                "where datname = current_database() and state like 'idle in transaction%'"
            )
            assert found.scalar_one() == 0
        assert await waiting == "access-SECRET-2"
    await database.close()


async def test_a_failure_says_why_and_is_not_repeated_at_once(
    vault: Vault, provider: FakeOAuth, database: Database
):
    await made(vault, provider)
    await let_pass(database, 3600)
    provider.answers = [(400, {"error": "invalid_grant"}), (503, b"")]
    why = "Credential 'grant' cannot be refreshed. The token URL answered 400: invalid_grant."
    for _ in range(3):
        assert await refusal(vault) == why
    assert len(provider.forms) == 2
    # Another process knows it too.
    async with opened(database) as other:
        assert await refusal(other) == why
    assert len(provider.forms) == 2
    await let_pass(database, 6)
    assert (await refusal(vault)).endswith("answered 503.")
    await let_pass(database, 6)
    assert (await refusal(vault)).endswith("answered 503.")
    assert len(provider.forms) == 3
    await let_pass(database, 6)
    assert await token(vault) == "access-SECRET-2"
    await let_pass(database, 3600)
    provider.answers = [(503, b"")]
    assert (await refusal(vault)).endswith("answered 503.")
    await let_pass(database, 6)
    assert await token(vault) == "access-SECRET-3"


async def test_a_token_that_is_still_good_bridges_a_failure(
    vault: Vault, provider: FakeOAuth, database: Database
):
    await made(vault, provider)
    await let_pass(database, 3570)
    provider.answers = [(503, b""), (503, b"")]
    assert await token(vault) == "access-SECRET-1"
    assert await token(vault) == "access-SECRET-1"
    assert len(provider.forms) == 2
    await let_pass(database, 26)
    assert (await refusal(vault)).endswith("answered 503.")


async def test_a_caller_that_goes_away_loses_nothing(
    vault: Vault, provider: FakeOAuth, database: Database
):
    provider.rotates = True
    await made(vault, provider)
    await let_pass(database, 3600)
    provider.delay_s = 0.3
    waiting = asyncio.get_running_loop().create_task(token(vault))
    await asyncio.sleep(0.1)
    waiting.cancel()
    await vault.close()
    async with opened(database) as other:
        assert await token(other) == "access-SECRET-3"
    assert (provider.granted, provider.reused) == (2, 0)


async def test_a_process_that_died_is_waited_for_and_replaced(
    vault: Vault, provider: FakeOAuth, database: Database
):
    await made(vault, provider)
    await let_pass(database, 3600)
    assert await store.claim(database, PROJECT, "grant", timedelta(seconds=1)) is not None
    assert await store.claim(database, PROJECT, "grant", timedelta(seconds=1)) is None
    began = asyncio.get_running_loop().time()
    assert await token(vault) == "access-SECRET-2"
    assert asyncio.get_running_loop().time() - began > 0.5


async def test_waiting_for_somebody_else_has_an_end(
    vault: Vault, provider: FakeOAuth, database: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(refresh, "_PATIENCE_S", 0.3)
    await made(vault, provider)
    await let_pass(database, 3600)
    await store.claim(database, PROJECT, "grant", timedelta(seconds=60))
    assert await refusal(vault) == "Credential 'grant' is still being refreshed."


async def test_an_outcome_of_an_older_lease_is_not_written(
    vault: Vault, provider: FakeOAuth, database: Database
):
    """A process slept over its lease, and another one refreshed."""
    provider.rotates = True
    await made(vault, provider)
    await let_pass(database, 3600)
    asleep = await store.claim(database, PROJECT, "grant", timedelta(seconds=60))
    assert asleep is not None
    await let_pass(database, 60)
    new = await token(vault)
    parts = store.Parts(public={}, sealed=b"old", token_sealed=b"old", token_lasts=timedelta(1))
    late = await store.settle(database, PROJECT, asleep, parts, is_update=False)
    assert late is None
    await store.release(database, PROJECT, asleep, {})
    assert await token(vault) == new


# ---- changes


async def test_a_change_proves_the_grant(vault: Vault, provider: FakeOAuth, database: Database):
    first = await made(vault, provider)
    provider.refresh_token = "refresh-SECRET-new"
    with pytest.raises(Invalid, match="400: invalid_grant") as caught:
        await changed(vault, refresh_token="refresh-SECRET-typo")
    assert "SECRET" not in caught.value.message
    assert await token(vault) == "access-SECRET-1"
    second = await changed(vault, refresh_token="refresh-SECRET-new")
    assert second["update_time"] > first["update_time"]
    assert await token(vault) == "access-SECRET-2"
    await let_pass(database, 3600)
    assert await token(vault) == "access-SECRET-3"


async def test_a_refresh_is_no_update(vault: Vault, provider: FakeOAuth, database: Database):
    provider.rotates = True
    first = await made(vault, provider)
    await let_pass(database, 3600)
    await token(vault)
    assert orjson.loads(await vault.get(PROJECT, "grant")) == first


async def test_a_change_ends_the_pause_after_a_failure(
    vault: Vault, provider: FakeOAuth, database: Database
):
    await made(vault, provider)
    await let_pass(database, 3600)
    provider.refresh_token = "refresh-SECRET-new"
    await refusal(vault)
    await changed(vault, refresh_token="refresh-SECRET-new")
    assert await token(vault) == "access-SECRET-2"
    row = await store.find(database, PROJECT, "grant")
    assert row is not None
    assert row.public.keys() == {"token_url", "client_id", "scopes"}


async def test_changes_and_refreshes_at_once_use_no_token_twice(
    vault: Vault, provider: FakeOAuth, database: Database
):
    provider.rotates = True
    await made(vault, provider)
    await let_pass(database, 3600)
    provider.delay_s = 0.05
    async with opened(database) as other:
        await asyncio.gather(
            *(token(one) for one in (vault, other) for _ in range(5)),
            *(changed(one, scopes=[f"s{n}"]) for one in (vault, other) for n in range(2)),
        )
    assert (provider.most_at_once, provider.reused) == (1, 0)
    await let_pass(database, 3600)
    await token(vault)
    assert provider.reused == 0


async def test_a_credential_that_is_deleted_meanwhile(
    vault: Vault, provider: FakeOAuth, database: Database
):
    await made(vault, provider)
    await let_pass(database, 3600)
    provider.delay_s = 0.3
    loop = asyncio.get_running_loop()
    waiting = loop.create_task(token(vault))
    await asyncio.sleep(0.1)
    await vault.delete(PROJECT, "grant")
    with pytest.raises(Unusable) as caught:
        await waiting
    assert caught.value.reason in ("unknown", "refresh_failed")
    with pytest.raises(NotFound):
        await changed(vault, scopes=[])
