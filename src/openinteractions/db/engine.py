"""The engine, and the two ways to use a connection: a transaction, or one bare hot statement."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from openinteractions.errors import SetupError, Unready

LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InterfaceError,
    OSError,
    TimeoutError,
)
"""What a statement raises when the database went away, whether or not it took effect."""


def sqlalchemy_url(url: str) -> str:
    """Any spelling of a PostgreSQL URL as SQLAlchemy's asyncpg dialect wants it.

    Raises:
        SetupError: It is not a PostgreSQL URL.
    """
    parts = urlsplit(url)
    if parts.scheme.split("+")[0] not in {"postgres", "postgresql"}:
        raise SetupError(
            f"the database URL has the scheme {parts.scheme!r}: only postgresql:// is supported"
        )
    query = [
        ("ssl" if name == "sslmode" else name, value)
        for name, value in parse_qsl(parts.query)
        if name != "channel_binding"
    ]
    # urlunsplit drops an empty authority, which a socket URL (`@/name?host=…`) has.
    rest = urlunsplit(("", "", parts.path, urlencode(query), ""))
    return f"postgresql+asyncpg://{parts.netloc}{rest}"


class Database:
    """One process's connections to PostgreSQL."""

    def __init__(self, url: str, *, pool_size: int) -> None:
        self.url = sqlalchemy_url(url)
        self._plain_url = url.replace("+asyncpg", "", 1)
        self.engine: AsyncEngine = create_async_engine(
            self.url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=30,
            connect_args={
                "timeout": 10,
                "server_settings": {"application_name": "openinteractions"},
            },
        )
        event.listen(self.engine.sync_engine, "handle_error", _mark_lost)

    @asynccontextmanager
    async def hot(self) -> AsyncGenerator[Any]:
        """A bare asyncpg connection, in autocommit: each statement is its own transaction.

        A statement that meets a lost connection raises one of `LOST`; the pool forgets it.
        """
        async with self.engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver = raw.driver_connection
            assert driver is not None
            try:
                yield driver
            except LOST:
                await connection.invalidate()
                raise

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncConnection]:
        """One transaction: committed when the block ends, rolled back when it raises.

        A lost connection raises one of `LOST`, as in `hot`.
        """
        try:
            async with self.engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            if error.connection_invalidated:
                raise ConnectionResetError("the database connection was lost") from error
            raise

    async def dedicated(self) -> Any:  # noqa: ANN401 - asyncpg ships no types
        """A connection outside the pool, for LISTEN; the caller closes it."""
        driver: Any = asyncpg
        return await driver.connect(self._plain_url, timeout=10)

    async def ping(self) -> None:
        """Ask the database for a sign of life.

        Raises:
            Unready: It gave none.
        """
        try:
            async with self.hot() as connection:
                await connection.fetchval("select 1", timeout=5)
        except LOST as error:
            raise Unready("The database is not reachable.", retry_after_s=1) from error

    async def close(self) -> None:
        """Close every pooled connection."""
        await self.engine.dispose()


def _mark_lost(context: Any) -> None:  # noqa: ANN401 - SQLAlchemy's ExceptionContext
    if isinstance(context.original_exception, LOST):
        context.is_disconnect = True
