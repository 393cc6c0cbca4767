"""Errors on the wire: `{"error": {"code", "message", "status"}}`, whatever went wrong."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match

from openinteractions.db.engine import LOST
from openinteractions.errors import (
    AppError,
    Invalid,
    NotFound,
    RequestError,
    Unready,
    WrongMethod,
)

_log = structlog.get_logger(__name__)


def body(error: AppError) -> bytes:
    """The JSON of an error."""
    rpc = error.rpc if isinstance(error, RequestError) else "INTERNAL"
    return orjson.dumps({"error": {"code": error.code, "message": error.message, "status": rpc}})


def response(error: RequestError) -> Response:
    """The answer that an error stands for."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return Response(body(error), error.status, headers, media_type="application/json")


def crash(request: Request, error: BaseException) -> Response:
    """The answer to a bug: logged with its traceback, and nothing of it on the wire."""
    _log.error(
        "request.crashed",
        method=request.method,
        path=_route(request),
        exc_info=error,
    )
    message = AppError("Internal error. The server's log has the details.")
    return Response(body(message), 500, media_type="application/json")


def _route(request: Request) -> str:
    route = request.scope.get("route")
    return getattr(route, "path", "?")


def install(app: FastAPI) -> None:
    """Render every error of an application in the contract's shape."""
    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
        RequestError: _app_error,
        HTTPException: _http_error,
        RequestValidationError: _validation_error,
        ClientDisconnect: _client_gone,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    for kind in LOST:
        app.add_exception_handler(kind, _database_lost)


async def _app_error(_: Request, error: RequestError) -> Response:
    return response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path[:200]
    if error.status_code == 404:  # noqa: PLR2004 - HTTP's not found
        return response(NotFound(f"There is nothing at {request.method} {path}."))
    if error.status_code == 405:  # noqa: PLR2004 - HTTP's method not allowed
        answer = response(WrongMethod(f"{request.method} is not possible at {path}."))
        answer.headers["Allow"] = ", ".join(_methods(request))
        return answer
    return response(Invalid(str(error.detail)))


def _methods(request: Request) -> list[str]:
    """What is possible at a path: each method has a route of its own."""
    scope: dict[str, Any] = {
        "type": "http",
        "path": request.scope["path"],
        "root_path": "",
        "headers": [],
    }
    routes: list[BaseRoute] = request.app.routes
    return [
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _validation_error(_: Request, error: RequestValidationError) -> Response:
    """A path or query value of the wrong type; bodies are validated elsewhere."""
    first = cast("dict[str, Any]", error.errors()[0])
    name = first["loc"][-1]
    return response(Invalid(f"Invalid value for '{name}': {first['msg']}."))


async def _client_gone(_: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this; it keeps a broken connection from being logged as a bug."""
    del error
    return response(Invalid("The connection ended inside the request body."))


async def _database_lost(request: Request, error: Exception) -> Response:
    _log.error("request.database_lost", path=_route(request), error=type(error).__name__)
    return response(Unready("The database is not reachable.", retry_after_s=1))
