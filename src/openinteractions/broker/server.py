"""The broker's HTTP API: what the one client (`sandbox/client.py`) speaks, and nobody else."""

import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast
from uuid import UUID

import orjson
import structlog
from aiohttp import web

from openinteractions import ids, metrics
from openinteractions.broker import answers
from openinteractions.broker.errors import has_not_begun, rendered
from openinteractions.broker.executions import Executions
from openinteractions.broker.files import add_file_routes
from openinteractions.broker.house import House
from openinteractions.db.engine import LOST
from openinteractions.errors import Invalid, NotFound, RequestError, Unready
from openinteractions.sandbox import messages
from openinteractions.sandbox.files.tree import Landing, Tree
from openinteractions.sandbox.port import Json, Owner, SandboxError

_log = structlog.get_logger(__name__)

_MAX_BODY: Final = 32 * 2**20
_STOP_S: Final = 2.0
_MAX_LINE: Final = 32 * 1024
"""Of a request: two paths of 4096 bytes are three times as long where each byte is escaped."""
_ENV: Final = "/v1/environments/{env:[0-9a-f]{32}}"
_BAD: Final = 500
_UNREADY: Final = 503
_MAX_PORT: Final = 65535

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Desk:
    """What the API is about."""

    house: House
    executions: Executions
    health: Callable[[], Json]
    is_token: Callable[[str], bool]


def create_app(desk: Desk) -> web.Application:
    """The API as an application."""
    app = web.Application(
        middlewares=[_logged, rendered, _lost_database, _authenticated(desk.is_token)],
        client_max_size=_MAX_BODY,
    )
    api = _Api(desk)
    execution = _ENV + "/executions/{xid}"
    app.add_routes(
        [
            web.get("/v1/health", api.health),
            web.get("/metrics", api.metrics),
            web.get("/v1/environments", api.environments),
            web.put(_ENV, api.ensure),
            web.delete(_ENV, api.delete),
            web.post(_ENV + "/stop", api.stop),
            web.post(_ENV + "/refresh", api.refresh),
            web.get(_ENV + "/usage", api.usage),
            web.put(_ENV + "/folders", api.add_folders),
            web.get(_ENV + "/executions", api.executions),
            web.put(execution, api.execute),
            web.get(execution, api.follow),
            web.post(execution + "/stdin", api.stdin),
            web.post(execution + "/signal", api.signal),
            web.post(execution + "/resize", api.resize),
            web.get(_ENV + "/ports/{port:[0-9]{1,5}}", api.port),
        ]
    )

    @asynccontextmanager
    async def open_tree(text: str) -> AsyncGenerator[Tree]:
        async with desk.house.tree(_uuid(text)) as tree:
            yield tree

    def fence(text: str, owner: Owner) -> Landing:
        return desk.house.fenced(_uuid(text), owner)

    async def changed(text: str) -> None:
        await desk.house.note_change(_uuid(text))

    add_file_routes(app.router, open_tree, fence, changed)
    return app


class _Api:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._house = desk.house

    async def health(self, _: web.Request) -> web.Response:
        return _json(self._desk.health())

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def environments(self, _: web.Request) -> web.Response:
        return _json({"environments": self._house.show()})

    async def ensure(self, request: web.Request) -> web.Response:
        source = (await _object(request)).get("from")
        await self._house.ensure(_env(request), None if source is None else _uuid(source))
        return _json({})

    async def delete(self, request: web.Request) -> web.Response:
        await self._house.delete(_env(request))
        return _json({})

    async def stop(self, request: web.Request) -> web.Response:
        await self._house.stop(_env(request), "asked for")
        return _json({})

    async def refresh(self, request: web.Request) -> web.Response:
        await self._house.refresh(_env(request))
        return _json({})

    async def usage(self, request: web.Request) -> web.Response:
        count, size = await self._house.usage(_env(request))
        return _json({"file_count": count, "size_bytes": size})

    async def add_folders(self, request: web.Request) -> web.Response:
        names = _names((await _object(request)).get("names"))
        await self._house.add_folders(_env(request), names)
        return _json({})

    async def executions(self, request: web.Request) -> web.Response:
        slot = self._house.slot(_env(request))
        return _json({"executions": sorted(slot.running)})

    async def execute(self, request: web.Request) -> web.StreamResponse:
        command = messages.read_command(request.match_info["xid"], await _object(request))
        offset = _number(request, "offset", 0)
        joined = await self._desk.executions.start(_env(request), command)
        return await answers.stream(request, joined, offset)

    async def follow(self, request: web.Request) -> web.StreamResponse:
        offset = _number(request, "offset", 0)
        joined = await self._desk.executions.join(_env(request), request.match_info["xid"])
        return await answers.stream(request, joined, offset)

    async def stdin(self, request: web.Request) -> web.Response:
        running = await self._desk.executions.running(_env(request), request.match_info["xid"])
        pipe = await running.live.usable()
        try:
            async for data in request.content.iter_any():
                await pipe.write_stdin(running.id, data)
            if request.query.get("eof") == "true":
                await pipe.end_stdin(running.id)
        except ConnectionError as error:
            raise SandboxError("The sandbox has ended.") from error
        return _json({})

    async def signal(self, request: web.Request) -> web.Response:
        body = await _object(request)
        epoch = body.get("epoch")
        await self._desk.executions.signal(
            _env(request),
            request.match_info["xid"],
            _integer(body.get("signal"), "signal"),
            epoch=None if epoch is None else _integer(epoch, "epoch"),
        )
        return _json({})

    async def resize(self, request: web.Request) -> web.Response:
        body = await _object(request)
        rows, cols = _integer(body.get("rows"), "rows"), _integer(body.get("cols"), "cols")
        running = await self._desk.executions.running(_env(request), request.match_info["xid"])
        pipe = await running.live.usable()
        try:
            await pipe.resize(running.id, rows, cols)
        except ConnectionError as error:
            raise SandboxError("The sandbox has ended.") from error
        return _json({})

    async def port(self, request: web.Request) -> web.StreamResponse:
        number = int(request.match_info["port"])
        opened = web.WebSocketResponse(heartbeat=20.0, max_msg_size=messages.MAX_FRAME_BYTES)
        await opened.prepare(request)
        try:
            if not 0 < number <= _MAX_PORT:
                raise Invalid(f"No such port: {number}.")
            async with self._house.sandbox(_env(request)) as live:
                pipe = await live.usable()
                stream = await pipe.dial(number)
                await answers.bridge(opened, stream)
        except RequestError as error:
            await answers.refuse(opened, error)
        except (ConnectionError, SandboxError) as error:
            await answers.refuse(opened, Unready(f"The sandbox cannot be reached: {error}."))
        return opened


@web.middleware
async def _logged(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every line that is logged for a request has its id."""
    request_id = request.headers.get("X-Request-Id", "")[:64] or ids.uuid7().hex
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        response = await handler(request)
        # Who finds no sandbox free asks again twice in a second; that is told once a minute.
        is_bad = response.status >= _BAD and response.status != _UNREADY
        level = _log.warning if is_bad else _log.debug
        level("broker.request", method=request.method, path=request.path, status=response.status)
    return response


@web.middleware
async def _lost_database(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except LOST as error:
        if isinstance(error, ConnectionError) and not has_not_begun(request):
            raise
        raise Unready(
            "The database, or the container engine, does not answer.", retry_after_s=1
        ) from error


def _authenticated(is_token: Callable[[str], bool]) -> Any:  # noqa: ANN401 - aiohttp's own type
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not is_token(token):
            error = {"code": "unauthenticated", "message": "The token is missing or wrong."}
            return _json({"error": error}, status=401)
        return await handler(request)

    return check


@asynccontextmanager
async def serving(
    app: web.Application, listener: socket.socket, tls: ssl.SSLContext | None
) -> AsyncGenerator[None]:
    """Serve on a bound socket until the context ends; open answers are then cut off.

    Their clients come back to whatever broker is there next.
    """
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=_STOP_S,
        max_line_size=_MAX_LINE,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener, ssl_context=tls, shutdown_timeout=_STOP_S).start()
        yield
    finally:
        await runner.cleanup()


async def _object(request: web.Request) -> Json:
    """The body, a JSON object; none is an empty one."""
    data = await request.read()
    try:
        value: Any = orjson.loads(data) if data else {}
    except orjson.JSONDecodeError as error:
        raise Invalid("The body is not JSON.") from error
    if not isinstance(value, dict):
        raise Invalid("The body must be a JSON object.")
    return cast("Json", value)


def _env(request: web.Request) -> UUID:
    return UUID(request.match_info["env"])


def _uuid(value: object) -> UUID:
    try:
        return UUID(str(value))
    except ValueError as error:
        raise NotFound(f"No such environment: {str(value)[:64]}.") from error


def _names(value: object) -> list[str]:
    names = cast("list[object]", value) if isinstance(value, list) else [None]
    if not all(isinstance(name, str) and name.isascii() for name in names):
        raise Invalid("'names' must be a list of names.")
    return cast("list[str]", names)


def _integer(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Invalid(f"'{name}' must be a whole number.")
    return value


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise Invalid(f"'{name}' must be a whole number.")
    return int(text)


def _json(value: Json, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
