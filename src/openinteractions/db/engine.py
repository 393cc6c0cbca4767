"""The engine, and the two ways to use a connection: a transaction, or one bare hot statement."""

from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
from asyncpg.exceptions._base import DataError as ClientDataError
from sqlalchemy import event
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection

from openinteractions.errors import SetupError, Unready

LOST = (
    asyncpg.PostgresConnectionError,
    # Shut down, restarting, cancelled by an operator; out of connections, memory or disk.
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    # A standby that was asked during a failover.
    asyncpg.ReadOnlySQLTransactionError,
    # Deadlocks, serialisation failures and locks that were not to be had: the same again may work.
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.InterfaceError,
    # What asyncpg raises on a connection that broke in the middle of an answer.
    asyncpg.InternalClientError,
    # The pool had no connection to give: not the built-in TimeoutError.
    PoolTimeoutError,
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
            pool_pre_ping=True,
            connect_args={
                "timeout": 10,
                "server_settings": {"application_name": "openinteractions"},
            },
        )
        event.listen(self.engine.sync_engine, "handle_error", _mark_lost)
        # Taking one out of SQLAlchemy's pool and putting it back costs more than a small statement
        # itself, so hot statements keep theirs for the next one, unless somebody waits for it.
        self._kept: list[PoolProxiedConnection] = []
        self._wanted = 0

    def hot(self) -> AbstractAsyncContextManager[Any]:
        """A bare asyncpg connection, in autocommit: each statement is its own transaction.

        A statement that meets a lost connection raises one of `LOST`; the pool forgets it.
        """
        return _Hot(self)

    async def borrow(self) -> PoolProxiedConnection:
        """For `hot`: a connection that a hot statement has left, or one from the pool."""
        return self._kept.pop() if self._kept else await self._take()

    def give_back(self, held: PoolProxiedConnection, *, is_lost: bool) -> None:
        """For `hot`: keep a connection for the next statement, unless somebody waits for one."""
        if is_lost:
            held.invalidate()
            # After an outage the others are dead too: found out once, not once for each.
            while self._kept:
                self._kept.pop().invalidate()
        if self._wanted or not held.is_valid:
            held.close()
        else:
            self._kept.append(held)

    async def _take(self) -> PoolProxiedConnection:
        with self._wanting():
            try:
                return await self.engine.raw_connection()
            except (DBAPIError, AsyncAdapt_asyncpg_dbapi.Error) as error:
                raise ConnectionResetError(f"the database gave no connection: {error}") from error

    @contextmanager
    def _wanting(self) -> Generator[None]:
        """Meanwhile, what is kept for hot statements goes back to the pool."""
        self._wanted += 1
        try:
            while self._kept:
                self._kept.pop().close()
            yield
        finally:
            self._wanted -= 1

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncConnection]:
        """One transaction: committed when the block ends, rolled back when it raises.

        A lost connection raises one of `LOST`, as in `hot`.
        """
        try:
            with self._wanting():
                async with self.engine.begin() as connection:
                    yield connection
        except DBAPIError as error:
            # The second is a connection that was never made, as while PostgreSQL starts.
            if error.connection_invalidated or isinstance(_driver_error(error), LOST):
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
        while self._kept:
            self._kept.pop().close()
        await self.engine.dispose()


class _Hot(AbstractAsyncContextManager[Any]):
    """The context of `Database.hot`; a class, since a generator costs three times as much."""

    __slots__ = ("_database", "_held")

    def __init__(self, database: Database) -> None:
        self._database = database

    async def __aenter__(self) -> Any:  # noqa: ANN401 - asyncpg ships no types
        self._held = await self._database.borrow()
        return self._held.driver_connection

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._database.give_back(self._held, is_lost=False)
            return
        # A parameter that does not fit its column is a bug of ours, not a lost database, though
        # asyncpg derives it from the error of a closed connection.
        is_bug = isinstance(error, ClientDataError)
        self._database.give_back(self._held, is_lost=isinstance(error, LOST) and not is_bug)
        if is_bug:
            raise ValueError(str(error)) from error


def _driver_error(error: DBAPIError) -> BaseException | None:
    return None if error.orig is None else error.orig.__cause__


def _mark_lost(context: Any) -> None:  # noqa: ANN401 - SQLAlchemy's ExceptionContext
    if isinstance(context.original_exception, LOST):
        context.is_disconnect = True
