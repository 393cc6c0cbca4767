"""A private PostgreSQL, for servers without a `DATABASE_URL`: started, watched, stopped by us.

It listens on a unix socket in a folder that only its account can enter. If it dies, it is started
again. If *we* are killed (SIGKILL), it goes on running, and the next start attaches to it. Why no
ready-made supervisor: see `embedded_home._installed`.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import SubprocessError
from types import TracebackType
from typing import Self
from urllib.parse import quote

import structlog
from sqlalchemy import NullPool, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from openinteractions.db import embedded_home, embedded_server
from openinteractions.db.embedded_home import ELSE, Place
from openinteractions.db.embedded_server import Server
from openinteractions.db.engine import sqlalchemy_url
from openinteractions.errors import SetupError

DATABASE = "openinteractions"
_START_TIMEOUT_S = 300
"""Long, since it may have to recover from a crash first."""
_STOP_PATIENCE_S = ((signal.SIGINT, 30), (signal.SIGQUIT, 10), (signal.SIGKILL, 5))
"""Ask, insist, force; recovery makes even the last one safe."""
_CLEAR_PATIENCE_S = ((None, 1), (signal.SIGQUIT, 2), (signal.SIGKILL, 10))
"""Idle processes leave with their parent at once, busy ones have to be told."""
_POLL_S = 0.1
_QUICK_POLL_S = 0.005
_ROTATE_EVERY_S = 60
_FIRST_DELAY_S, _MAX_DELAY_S = 0.2, 15
_STABLE_AFTER_S = 30

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class EmbeddedPostgres:
    """The PostgreSQL of one data folder. An async context manager, or `start` and `stop`."""

    def __init__(
        self,
        home: Path,
        *,
        settings: Mapping[str, str] | None = None,
        system_folder: Path = embedded_home.SYSTEM_FOLDER,
    ) -> None:
        """Nothing is opened yet.

        Args:
            home: The data folder; made if it is missing.
            settings: PostgreSQL's own, beside or instead of ours.
            system_folder: Where root keeps clusters whose home `nobody` cannot enter.
        """
        self.home = home.absolute()
        self._settings = settings or {}
        self._system_folder = system_folder
        self._lock: int | None = None
        self._server: Server | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Where it listens, as `postgresql://…`; only while it is started."""
        assert self._server is not None, "not started"
        return _url(self._server)

    async def start(self) -> str:
        """Start it, or attach to the one that an earlier process left behind; return its URL.

        Raises:
            SetupError: It cannot run here, or another server uses this data folder.
        """
        began = asyncio.get_running_loop().time()
        try:
            place = await self._prepared()
            attached = await self._attach(place)
            self._server = attached or await self._launch(place)
            await _make_database(self._server)
        except (OSError, SQLAlchemyError, SubprocessError) as error:
            await self._give_up()
            raise SetupError(
                f"the embedded PostgreSQL of {self.home} does not start: {error}. {ELSE}"
            ) from error
        except BaseException:
            await self._give_up()
            raise
        self._stopping.clear()
        self._watcher = asyncio.get_running_loop().create_task(
            self._watch(place), name="embedded-postgres"
        )
        seconds = round(asyncio.get_running_loop().time() - began, 3)
        pid = self._server.pid
        log.info("database.started", pid=pid, attached=attached is not None, seconds=seconds)
        return self.url

    async def stop(self) -> None:
        """Stop it, whether we started it or attached to it. Open connections are cut."""
        self._stopping.set()
        if self._watcher is not None:
            await asyncio.wait([self._watcher], timeout=10)
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
            self._watcher = None
        if self._server is not None:
            await _shut_down(self._server)
            log.info("database.stopped", pid=self._server.pid)
            self._server = None
        self._unlock()

    async def _prepared(self) -> Place:
        """Prepare in a thread. A cancelled caller waits for it, so that it can clean up."""
        thread = asyncio.ensure_future(asyncio.to_thread(self._prepare))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            await asyncio.wait([thread])
            raise

    def _prepare(self) -> Place:
        assert self._lock is None, "started already"
        self._lock = embedded_home.lock(self.home)
        return embedded_home.prepare(
            self.home,
            system_folder=self._system_folder,
            is_durable=self._settings.get("fsync") != "off",
        )

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _give_up(self) -> None:
        """Leave nothing behind after a start that failed or was cancelled."""
        if self._server is not None:
            await asyncio.shield(_shut_down(self._server))
            self._server = None
        self._unlock()

    async def _attach(self, place: Place) -> Server | None:
        """The server that is there already, once it is ready; None if it is gone or of no use."""
        server = await asyncio.to_thread(embedded_server.find, place.data)
        if server is None or not await _becomes_ready(server):
            return None
        if await asyncio.to_thread(server.is_connectable):
            return server
        await _shut_down(server)
        return None

    async def _launch(self, place: Place) -> Server:
        """Start a server and wait until it is ready.

        Raises:
            SetupError: It ended instead, or took too long.
        """
        await _clear(place)
        launch = asyncio.to_thread(embedded_server.launch, place, self._settings)
        launching = asyncio.ensure_future(launch)
        try:
            server = await asyncio.shield(launching)
            if await _becomes_ready(server):
                return server
        except asyncio.CancelledError:
            await _shut_down(await launching)
            raise
        await _shut_down(server)
        words = await asyncio.to_thread(embedded_server.last_words, place.log)
        raise SetupError(f"PostgreSQL does not start: {words} (more in {place.log}). {ELSE}")

    async def _watch(self, place: Place) -> None:
        """Start it again whenever it dies, until `stop`."""
        clock = asyncio.get_running_loop().time
        delay_s = 0.0
        while not self._stopping.is_set():
            began = clock()
            await self._until_dead(place)
            if self._stopping.is_set():
                return
            assert self._server is not None
            process = self._server.process
            code = process.returncode if process else None
            log.error("database.died", pid=self._server.pid, exit_code=code)
            if clock() - began > _STABLE_AFTER_S:
                delay_s = 0.0
            await self._restart(place, delay_s)
            # The first restart is immediate; one that dies young makes the next one wait.
            delay_s = min(max(delay_s * 2, _FIRST_DELAY_S), _MAX_DELAY_S)

    async def _restart(self, place: Place, delay_s: float) -> None:
        """Try until it runs again, or until `stop`."""
        clock = asyncio.get_running_loop().time
        died = clock()
        while not await self._stops_within(delay_s):
            try:
                self._server = await self._launch(place)
            except (SetupError, OSError) as error:
                delay_s = min(max(delay_s * 2, _FIRST_DELAY_S), _MAX_DELAY_S)
                log.error("database.restart_failed", reason=str(error), retry_after_s=delay_s)  # noqa: TRY400 - expected, and the reason says it all
            else:
                seconds = round(clock() - died, 3)
                log.warning("database.restarted", pid=self._server.pid, seconds=seconds)
                return

    async def _until_dead(self, place: Place) -> None:
        """Return when the server has died, or on `stop`."""
        clock = asyncio.get_running_loop().time
        rotated = 0.0
        while not await self._stops_within(_POLL_S):
            server = self._server
            assert server is not None
            # Asking after our own child costs nothing; a stranger takes a look into /proc.
            is_child = server.process is not None
            if not (server.is_alive() if is_child else await asyncio.to_thread(server.is_alive)):
                return
            if clock() - rotated > _ROTATE_EVERY_S:
                rotated = clock()
                await asyncio.to_thread(embedded_server.rotate, place.log)

    async def _stops_within(self, seconds: float) -> bool:
        """Sleep, at most until `stop`; whether it was called."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True


def running_url(home: Path) -> str | None:
    """The URL of this home's PostgreSQL if one runs, for tools beside a server. Takes no lock.

    Blocks for a moment: call it in a thread.
    """
    server = embedded_server.find(embedded_home.where(home.absolute()) / "data")
    return _url(server) if server is not None and server.is_ready() else None


def _url(server: Server, database: str = DATABASE) -> str:
    return (
        f"postgresql://postgres@/{database}?host={quote(str(server.sockets), safe='/')}&port=5432"
    )


async def _becomes_ready(server: Server) -> bool:
    """Wait until it takes connections; False if it ends instead, or takes too long."""
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while await asyncio.to_thread(server.is_alive):
                if await asyncio.to_thread(server.is_ready):
                    return True
                await asyncio.sleep(_QUICK_POLL_S)
    except TimeoutError:
        return False
    return False


async def _shut_down(server: Server) -> None:
    """End it, politely first; return when it is gone."""
    for number, patience_s in _STOP_PATIENCE_S:
        await asyncio.to_thread(server.send, number)
        if await _ends_within(server.is_alive, patience_s):
            return
        log.warning("database.slow_to_stop", pid=server.pid, signal=number.name)


async def _clear(place: Place) -> None:
    """Wait for, then end, what a dead server left running, so that a new one may start."""
    for number, patience_s in _CLEAR_PATIENCE_S:
        if number is not None:
            await asyncio.to_thread(embedded_server.end, place.data, number)
        if await _ends_within(lambda: embedded_server.stragglers(place.data), patience_s):
            await asyncio.to_thread(embedded_server.forget, place)
            return


async def _ends_within(is_running: Callable[[], object], seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            while True:
                if not await asyncio.to_thread(is_running):
                    return True
                await asyncio.sleep(_QUICK_POLL_S)
    except TimeoutError:
        return False


async def _make_database(server: Server) -> None:
    """Create our database in a new cluster."""
    engine = create_async_engine(
        sqlalchemy_url(_url(server, "postgres")),
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"timeout": 30},
    )
    async with engine.connect() as connection:
        known = text("select 1 from pg_database where datname = :name")
        if await connection.scalar(known, {"name": DATABASE}) is None:
            await connection.execute(text(f'create database "{DATABASE}"'))
