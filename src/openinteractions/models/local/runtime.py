"""Which local models there are, and the few servers that run them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import aiohttp
import structlog

from openinteractions.errors import ModelRejected, ModelUnavailable, SetupError
from openinteractions.models.local import catalog, pull
from openinteractions.models.local.model import LocalModel
from openinteractions.models.local.server import LocalServer, ServerSpec, default_threads
from openinteractions.models.port import Model
from openinteractions.models.transport import Upstream
from openinteractions.settings import LocalSettings

DEFAULT: Final = "default"
"""The name that means the configured model, or the best one that is there."""
_MAX_SERVERS = 2
_IDLE_STOP = timedelta(minutes=15)
_NO_ROOM_RETRY_S = 2.0

_log = structlog.stdlib.get_logger()


class LocalRuntime:
    """Starts model servers when they are first asked for. Leaving the context stops them all."""

    def __init__(
        self,
        settings: LocalSettings,
        folder: Path,
        session: aiohttp.ClientSession,
        *,
        idle_stop: timedelta | None = _IDLE_STOP,
        max_servers: int = _MAX_SERVERS,
    ) -> None:
        """Nothing is started or read yet.

        Args:
            settings: Which model is the default, and what a server may take.
            folder: Where `pull` puts the weights; the servers' logs go there too.
            session: For the requests to the servers.
            idle_stop: Silence after which a server is stopped; None keeps it.
            max_servers: Most models that are loaded at once.
        """
        self._settings = settings
        self._folder = folder
        self._session = session
        self._idle_stop = idle_stop
        self._max_servers = max_servers
        self._servers: dict[str, LocalServer] = {}
        self._stack = AsyncExitStack()
        self._lock = asyncio.Lock()
        self._default: str | None = None

    async def __aenter__(self) -> Self:
        """Check the settings.

        Raises:
            SetupError: `local.model` names no packaged model.
        """
        await asyncio.to_thread(catalog.catalog)
        if self._settings.model is not None and self._settings.gguf is None:
            catalog.find(self._settings.model)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers.values():
            server.retire()
        await self._stack.aclose()
        self._servers.clear()

    def model(self) -> Model:
        """The model port for all local models."""
        nowhere = Upstream(
            self._session,
            base_url="http://127.0.0.1:0",
            headers={},
            connect_timeout=timedelta(seconds=1),
            idle_timeout=timedelta(seconds=1),
        )
        return LocalModel(self, nowhere)

    def names(self) -> Sequence[str]:
        """The names that a call may use, without their `local/` prefix."""
        own = [self._settings.gguf.stem] if self._settings.gguf else []
        return [DEFAULT, *own, *catalog.catalog()]

    def default_name(self) -> str:
        """What `local/default` means: the configured model, else the best one that is there.

        Decided once there is one, since a loaded model leaves less memory than it found. Reads
        files: on the event loop, call it in a thread.
        """
        if self._settings.gguf is not None:
            return self._settings.gguf.stem
        if self._settings.model is not None:
            return self._settings.model.removeprefix("local/")
        if self._default is None:
            fitting = catalog.default_model(catalog.free_memory())
            pulled = [line.name for line in catalog.list_models(self._folder) if line.pulled]
            if not pulled:
                return fitting
            self._default = fitting if fitting in pulled else _next_best(pulled, fitting)
        return self._default

    @asynccontextmanager
    async def use(self, name: str) -> AsyncGenerator[Upstream]:
        """See `model.Servers`."""
        try:
            if name == DEFAULT:
                name = await asyncio.to_thread(self.default_name)
            server = await self._server(name)
            async with server.use() as upstream:
                yield upstream
        except SetupError as error:
            raise ModelRejected(error.message) from error

    def server(self, name: str) -> LocalServer | None:
        """The server of a model, if it was ever asked for."""
        return self._servers.get(name)

    async def _server(self, name: str) -> LocalServer:
        async with self._lock:
            if name not in self._servers:
                spec = await asyncio.to_thread(self._spec, name)
                server = LocalServer(spec, self._session, idle_stop=self._idle_stop)
                self._servers[name] = await self._stack.enter_async_context(server)
            server = self._servers[name]
            if server.pid is None and not server.users:
                self._make_room()
            return server

    def _make_room(self) -> None:
        running = [server for server in self._servers.values() if server.pid or server.users]
        if len(running) < self._max_servers:
            return
        idle = [server for server in running if not server.users]
        if not idle:
            raise ModelUnavailable(
                f"{len(running)} other local models are busy.", retry_after_s=_NO_ROOM_RETRY_S
            )
        min(idle, key=lambda server: server.last_used).retire()

    def _spec(self, name: str) -> ServerSpec:
        settings = self._settings
        template = None
        if settings.gguf is not None and name == settings.gguf.stem:
            path = _own_file(settings.gguf)
        else:
            weights = catalog.find(name)
            path = self._folder / weights.file
            _check_weights(weights, path)
            template = weights.template and catalog.template(weights.template)
            free = catalog.free_memory()
            if free < weights.memory_bytes:
                _log.warning("local.low_memory", model=name, free=free, need=weights.memory_bytes)
        return ServerSpec(
            name=name,
            path=path,
            log=self._folder / f"{name}.log",
            threads=settings.threads or default_threads(),
            parallel=settings.parallel,
            context_tokens=settings.context_tokens,
            template=template,
        )


def _next_best(pulled: Sequence[str], fitting: str) -> str:
    """The largest that is not above what fits, else the smallest."""
    order = list(catalog.catalog())
    below = [name for name in pulled if order.index(name) <= order.index(fitting)]
    return below[-1] if below else pulled[0]


def _own_file(path: Path) -> Path:
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SetupError(f"cannot read the model file {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise SetupError(f"the model file {path} is not a GGUF file")
    return path


def _check_weights(weights: catalog.Weights, path: Path) -> None:
    command = f"run: openinteractions models pull {weights.name}"
    if not path.exists():
        raise SetupError(f"the local model {weights.name} is not downloaded yet; {command}")
    if not pull.ensure_verified(weights, path):
        raise SetupError(f"the file of the local model {weights.name} is damaged; {command}")
