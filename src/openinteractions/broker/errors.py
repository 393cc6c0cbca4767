"""Errors of the broker's API: `{"error": {"code", "message"}}`, whatever went wrong."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import aiohttp
import orjson
import structlog
from aiohttp import web

from openinteractions.errors import AppError, Invalid, NotFound, RequestError, WrongMethod

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

_NOT_FOUND = 404
_WRONG_METHOD = 405
_OURS = 500

_log = structlog.stdlib.get_logger()


def response(error: AppError) -> web.Response:
    """The answer that an error stands for; 500 for what is not the request's fault."""
    status = error.status if isinstance(error, RequestError) else _OURS
    retry_after_s = error.retry_after_s if isinstance(error, RequestError) else None
    headers = {} if retry_after_s is None else {"Retry-After": str(max(1, round(retry_after_s)))}
    body = orjson.dumps({"error": {"code": error.code, "message": error.message}})
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


@web.middleware
async def rendered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer with what handlers raise; if an answer has begun, break it off, never end it well."""
    try:
        return await handler(request)
    except AppError as error:
        answer = response(error)
        reason = error.code
    except web.HTTPException as error:
        answer = response(_of_router(request, error))
        reason = error.reason
    except (ConnectionError, aiohttp.ClientPayloadError, web.RequestPayloadError):
        # Nobody reads this answer.
        answer = response(Invalid("The connection ended inside the request."))
        reason = "disconnected"
    except Exception:  # noqa: BLE001 - the request boundary
        _log.exception("broker.request_crashed", method=request.method, route=_route(request))
        answer = response(AppError("Internal error. The broker's log has the details."))
        reason = "crashed"
    return answer if has_not_begun(request) else break_off(request, reason)


def has_not_begun(request: web.Request) -> bool:
    """Whether nothing of an answer has been sent."""
    return not request.get(BEGUN, False)


BEGUN: web.RequestKey[bool] = web.RequestKey("begun", bool)
"""Set by `begin`."""


async def begin(request: web.Request, answer: web.StreamResponse) -> None:
    """Send the head of a streamed answer; after that an error breaks the connection."""
    request[BEGUN] = True
    await answer.prepare(request)


def break_off(request: web.Request, reason: str) -> web.StreamResponse:
    """Cut the connection, so that the client cannot take what it got for the whole."""
    _log.warning("broker.answer_broken_off", route=_route(request), reason=reason)
    if request.transport is not None:
        request.transport.abort()
    raise ConnectionResetError(reason)


def _of_router(request: web.Request, error: web.HTTPException) -> AppError:
    path = request.path[:200]
    if error.status == _NOT_FOUND:
        return NotFound(f"There is nothing at {request.method} {path}.")
    if error.status == _WRONG_METHOD:
        return WrongMethod(f"{request.method} is not possible at {path}.")
    return Invalid(error.reason)


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return "?" if resource is None else resource.canonical
