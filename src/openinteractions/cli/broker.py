"""`broker`: the process that runs sandboxes."""

import asyncio

import structlog

from openinteractions.broker.process import opened
from openinteractions.cli import database as databases
from openinteractions.cli import signals
from openinteractions.db import migrate
from openinteractions.errors import SetupError
from openinteractions.settings import Settings

_log = structlog.get_logger(__name__)

_POOL = 8


async def run(settings: Settings) -> None:
    """Run a broker until SIGTERM; what runs a command then, runs on for the next one.

    Raises:
        SetupError: There is no DATABASE_URL, its schema is another version's, another broker has
            the name or the folder, or a setting is wrong.
    """
    if settings.database_url is None:
        raise SetupError(
            "a broker of its own needs DATABASE_URL: with the embedded database, `serve` starts one"
        )
    stop = asyncio.Event()
    async with databases.opened(settings, pool_size=_POOL) as database:
        await migrate.require_current(database)
        async with opened(settings, database) as broker:
            signals.on_stop(stop.set)
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait({stopping, broker.beating}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
    if not stop.is_set():
        raise SetupError(f"another broker has taken the name {settings.sandbox.broker!r}")
    _log.info("broker.stopped")
