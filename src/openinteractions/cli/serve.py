"""`serve` and `worker`: the long-running processes."""

import asyncio
import contextlib
import gc
import ipaddress
import socket
import sys
from collections.abc import Generator
from pathlib import Path

import structlog
import uvicorn

from openinteractions import metrics
from openinteractions.api.scope import Authenticator
from openinteractions.app import create_app
from openinteractions.cli import broker_child, signals
from openinteractions.cli import database as databases
from openinteractions.cli.protocol import BoundedHttpProtocol
from openinteractions.db import migrate
from openinteractions.db.engine import Database
from openinteractions.errors import SetupError
from openinteractions.process import opened
from openinteractions.resources.keys import service as keys
from openinteractions.resources.keys import store as key_store
from openinteractions.settings import Settings

_log = structlog.get_logger(__name__)

# With the drain of the runs that follows it stays below the 30 s that orchestrators usually wait.
_STOP_GRACE_S = 8


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers.

    Those raise the signal again once it has stopped serving, which would end the process before
    its runs are handed back and the embedded database is stopped.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave the signals alone."""
        yield

    def stop(self) -> None:
        """Serve no more: let open requests end, or at the second call cut them off."""
        self.force_exit = self.should_exit
        self.should_exit = True


async def serve(
    settings: Settings, *, auth: bool, worker: bool, config: Path | None = None
) -> None:
    """Run the api, and unless told otherwise a worker in the same process, until SIGTERM.

    With the worker, and where a container engine answers, goes a broker as a child process; it
    reads the same `config`.

    Without `auth` everybody on this machine is let in, and nobody else: the address must be a
    loopback one, and requests whose `Origin` or `Host` is not (`localhost`, 127.0.0.0/8, ::1, any
    port) are answered with 403, so that no web page can use the operator's browser to get in.
    `cors_origins` does not count then.

    Raises:
        SetupError: The set-up is wrong; the message names the fix.
    """
    if not auth:
        _require_loopback(settings.host)
    listener = _listen(settings)
    async with databases.opened(settings) as database:
        await _prepare_schema(settings, database)
        authenticate = await _authenticator(settings, database, auth=auth)
        role = "all" if worker else "api"
        async with contextlib.AsyncExitStack() as stack:
            if worker:
                # It is there for as long as runs may need it.
                await stack.enter_async_context(
                    broker_child.beside(settings, database, config=config)
                )
            process = await stack.enter_async_context(opened(settings, database, role=role))
            if isinstance(authenticate, keys.Keyring):
                await stack.enter_async_context(authenticate.watching())
            app = create_app(settings, process, authenticate, local_only=not auth)
            server = _Server(
                uvicorn.Config(
                    app,
                    loop="none",
                    http=BoundedHttpProtocol,
                    ws="none",
                    lifespan="off",
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    proxy_headers=False,
                    timeout_keep_alive=75,
                    timeout_graceful_shutdown=_STOP_GRACE_S,
                )
            )
            host, port = listener.getsockname()[:2]
            signals.on_stop(server.stop)
            _collect_rarely()
            _log.info("server.ready", url=_url(host, port), role=role)
            await server.serve([listener])
    _log.info("server.stopped")


async def work(settings: Settings) -> None:
    """Run a worker until SIGTERM.

    Raises:
        SetupError: There is no DATABASE_URL, or its schema is another version's.
    """
    if settings.database_url is None:
        raise SetupError(
            "a worker of its own needs DATABASE_URL: the embedded database belongs to `serve`, "
            "which has a worker inside"
        )
    stop = asyncio.Event()
    if settings.worker.metrics_port is not None:
        try:
            metrics.serve(settings.worker.metrics_port)
        except OSError as error:
            raise SetupError(
                f"cannot serve metrics on port {settings.worker.metrics_port} "
                f"(worker.metrics_port): {error.strerror}"
            ) from error
    async with databases.opened(settings) as database:
        await migrate.require_current(database)
        async with opened(settings, database, role="worker"):
            signals.on_stop(stop.set)
            _collect_rarely()
            await stop.wait()
    _log.info("worker.stopped")


def _collect_rarely() -> None:
    """Leave what the start has made out of garbage collection, and look for cycles less often.

    Python's own pace, a look at every 700 new objects, took a sixth of a turn's CPU.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


async def _prepare_schema(settings: Settings, database: Database) -> None:
    if settings.database_url is None:
        if not await migrate.is_current(database):
            _log.info("database.migrating")
            await migrate.upgrade(database)
    else:
        await migrate.require_current(database)


async def _authenticator(settings: Settings, database: Database, *, auth: bool) -> Authenticator:
    if not auth:
        _log.warning("server.no_auth", note="everybody who can reach this port is let in")
        return keys.OpenDoor(await key_store.ensure_project(database, keys.DEFAULT_PROJECT))
    if settings.bootstrap_api_key is not None:
        await keys.ensure(database, settings.bootstrap_api_key.get_secret_value(), name="bootstrap")
    elif not await key_store.any_key(database):
        key = await keys.create(database, name="first")
        # On standard output, once, and never in a log.
        print(f"API key (shown only now): {key}", flush=True)
    return keys.Keyring(database)


def _require_loopback(host: str) -> None:
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost":
        raise SetupError(f"--no-auth is only possible on a loopback address, not on {host!r}")


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise SetupError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}"
        ) from error
    listener.listen(2048)
    listener.setblocking(False)
    return listener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def loop_factory() -> asyncio.AbstractEventLoop:
    """uvloop, where it exists."""
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop  # noqa: PLC0415 - not on every platform

    return uvloop.new_event_loop()
