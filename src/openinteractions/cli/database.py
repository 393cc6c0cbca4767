"""The database that a command works on: the operator's own, or the embedded one."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from openinteractions.db.embedded import EmbeddedPostgres, running_url
from openinteractions.db.engine import LOST, Database
from openinteractions.errors import SetupError
from openinteractions.settings import Settings


@asynccontextmanager
async def opened(
    settings: Settings, *, pool_size: int | None = None, attach: bool = False
) -> AsyncGenerator[Database]:
    """Open the database; an embedded server that is started for it stops with it.

    Args:
        settings: Say which.
        pool_size: Most connections; from the settings if left out.
        attach: Use the embedded server of a running `serve`, if there is one.

    Raises:
        SetupError: It cannot be reached, or went away in the middle of the command.
    """
    async with AsyncExitStack() as stack:
        if settings.database_url is not None:
            url = settings.database_url.get_secret_value()
        else:
            url = running_url(settings.home()) if attach else None
            if url is None:
                embedded = EmbeddedPostgres(settings.home())
                url = (await stack.enter_async_context(embedded)).url
        database = Database(url, pool_size=pool_size or settings.database_pool)
        stack.push_async_callback(database.close)
        try:
            yield database
        except LOST as error:
            # A file of the command's own is not the database.
            if isinstance(error, OSError) and error.filename is not None:
                raise
            reason = str(error) or type(error).__name__
            raise SetupError(f"the database cannot be reached: {reason}") from error
