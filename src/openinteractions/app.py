"""The FastAPI application: routers on every version, middleware, error rendering, docs."""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.openapi.utils import get_openapi
from opentelemetry.trace import SpanKind
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openinteractions import __version__, ids, metrics, tracing
from openinteractions.api import docs, errors
from openinteractions.api.scope import Authenticator, CallerDep
from openinteractions.errors import Forbidden, NotFound, Unready
from openinteractions.jobs import overview
from openinteractions.process import Process
from openinteractions.resources.agents import routes as agents
from openinteractions.resources.credentials import routes as credentials
from openinteractions.resources.environment_files import routes as environment_files
from openinteractions.resources.environment_files.uploads import Uploads
from openinteractions.resources.environments import routes as environments
from openinteractions.resources.files import routes as files
from openinteractions.resources.interactions import routes as interactions
from openinteractions.resources.interactions.recent import RecentRows
from openinteractions.resources.interactions.service import Service
from openinteractions.resources.webhooks import routes as webhooks
from openinteractions.settings import Settings
from openinteractions.wire import agents as wire_agents
from openinteractions.wire import create as wire_create
from openinteractions.wire import credentials as wire_credentials
from openinteractions.wire import environments as wire_environments

_log = structlog.get_logger(__name__)

_OK = 200
VERSIONS = ("v1beta", "v1", "v1alpha")
"""The one that SDKs use first: routes are tried in order."""
_EXPOSED = [
    "content-range",
    "location",
    "range",
    "retry-after",
    "x-goog-upload-status",
    "x-goog-upload-url",
    "x-request-id",
]
_LOOPBACK = r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?"
_LOOPBACK_HOST = re.compile(_LOOPBACK.encode(), re.IGNORECASE)
_LOOPBACK_ORIGIN = re.compile(b"https?://" + _LOOPBACK.encode(), re.IGNORECASE)
_STILL_TO_COME = (
    "triggers",
    "webhooks",
    "decisions",
    "voices",
)


def create_app(
    settings: Settings,
    process: Process,
    authenticate: Authenticator,
    *,
    local_only: bool = False,
) -> FastAPI:
    """Build the application over an open process.

    Args:
        settings: The operator's.
        process: The open process.
        authenticate: Knows the keys.
        local_only: Refuse what a web page from elsewhere makes a browser send, with 403: requests
            whose `Host` or `Origin` is not a loopback address. Pages of this machine may call
            the API, whatever `cors_origins` says.
    """
    app = _App(
        settings.cors_origins,
        local_only=local_only,
        title="OpenInteractions",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # FastAPI's own looks for OpenTelemetry's providers in the environment at every request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.authenticate = authenticate
    app.state.limits = settings.limits
    app.state.public_url = (settings.public_url or "").rstrip("/")
    app.state.database = process.database
    app.state.deliverer = process.deliverer
    app.state.vault = process.vault
    app.state.environments = process.environments
    app.state.agents = process.agents
    app.state.uploads = Uploads(process.environments, process.sealer)
    app.state.process = process
    app.state.interactions = Service(
        database=process.database,
        hub=process.hub,
        tail=process.tail,
        runner=process.executor,
        lost=process.lost,
        sealer=process.sealer,
        recent=RecentRows(),
        retention=settings.retention,
        max_attempts=settings.worker.max_attempts,
    )
    errors.install(app)
    for version in VERSIONS:
        shown = version == "v1beta"
        for router in (
            interactions.router,
            files.router,
            webhooks.router,
            credentials.router,
            environment_files.router,
            environments.router,
            agents.router,
            _later(),
        ):
            app.include_router(router, prefix=f"/{version}", include_in_schema=shown)
        app.include_router(
            environment_files.upload_router, prefix=f"/upload/{version}", include_in_schema=shown
        )
    app.include_router(webhooks.router)
    app.include_router(_operations())
    app.openapi = lambda: _openapi(app)
    return app


class _App(FastAPI):
    """FastAPI under our own stack: what stands around the router by default has its twin here.

    Bodies are bounded by `api.body`, crashes answered and traced by `_Envelope`; each layer less is
    one less on the way of every event of a stream.
    """

    def __init__(
        self,
        origins: Sequence[str],
        *,
        local_only: bool,
        **options: Any,  # noqa: ANN401 - FastAPI's
    ) -> None:
        super().__init__(**options)
        self._origins = () if local_only else origins
        self._local_only = local_only

    def build_middleware_stack(self) -> ASGIApp:
        """Envelope, CORS for browsers, error rendering, router."""
        handlers: dict[Any, Any] = dict(self.exception_handlers)
        routed = ExceptionMiddleware(AsyncExitStackMiddleware(self.router), handlers=handlers)
        cors = CORSMiddleware(
            routed,
            allow_origins=self._origins,
            allow_origin_regex=f"https?://{_LOOPBACK}" if self._local_only else None,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
        if self._local_only:
            return _Envelope(_LocalOnly(routed), _LocalOnly(cors))
        return _Envelope(routed, cors)


class _LocalOnly:
    """Lets in what this machine asks of itself.

    Without keys a browser on this machine is the way in for any page that it shows: by a plain
    cross-site POST, which its `Origin` tells, or by a name of the page's own that resolves to
    127.0.0.1 (DNS rebinding), which `Host` tells.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        app = self._app
        if not hosts or not all(map(_LOOPBACK_HOST.fullmatch, hosts)):
            message = "Without API keys this server answers only at a loopback address."
            app = errors.response(Forbidden(message))
        elif not all(map(_LOOPBACK_ORIGIN.fullmatch, origins)):
            message = "Without API keys only web pages of this machine may call this server."
            app = errors.response(Forbidden(message))
        await app(scope, receive, send)


class _Envelope:
    """Around every request: an id, a log line without user text, and a plain 500 for a bug."""

    def __init__(self, app: ASGIApp, for_browsers: ASGIApp) -> None:
        self._app = app
        self._for_browsers = for_browsers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        app = self._for_browsers if b"origin" in headers else self._app
        request_id = ids.uuid7().hex
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        began = time.perf_counter()
        sent: list[int] = []

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent.append(message["status"])
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        try:
            with tracing.span(
                f"{scope['method']} request",
                kind=SpanKind.SERVER,
                parent=_parent(headers),
                attributes={"http.request.method": scope["method"], "oi.request_id": request_id},
            ):
                await app(scope, receive, tagged)
        except asyncio.CancelledError:
            # uvicorn does so when its time to stop is over, and would answer in plain text.
            if not sent:
                stopping = Unready("The server is stopping.", retry_after_s=1)
                await errors.response(stopping)(scope, receive, tagged)
            raise
        except Exception as error:  # noqa: BLE001 - the request boundary
            request = Request(scope)
            answer = errors.crash(request, error)
            if not sent:
                await answer(scope, receive, tagged)
        finally:
            _record(scope, sent[0] if sent else 0, time.perf_counter() - began)


def _record(scope: Scope, status: int, seconds: float) -> None:
    """Measure and log a request that has ended."""
    # Unknown paths are one route, whatever they are: labels stay few.
    route = getattr(scope.get("route"), "path", None)
    metrics.child(metrics.request_seconds, route or "?").observe(seconds)
    # An interaction that ends is logged with the same ids: its request only where asked.
    metrics.child(metrics.requests, scope["method"], route or "?", str(status)).inc()
    is_create = scope["method"] == "POST" and route == "/interactions"
    log = _log.debug if is_create and status == _OK else _log.info
    log(
        "request",
        method=scope["method"],
        path=route or scope["path"][:120],
        status=status,
        ms=round(seconds * 1000, 1),
    )


def _parent(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """The caller's own trace, where it sends one."""
    trace = headers.get(b"traceparent")
    return {} if trace is None else {"traceparent": trace.decode("latin-1")}


def _later() -> APIRouter:
    """Resources of the contract that this version does not have yet."""
    router = APIRouter()

    async def later(request: Request) -> Response:
        name = request.url.path.split("/")[2]
        raise NotFound(f"'/{name}' is not part of this version of the server yet.")

    for name in _STILL_TO_COME:
        router.add_api_route(f"/{name}", later, methods=["GET", "POST"], include_in_schema=False)
        router.add_api_route(
            f"/{name}/{{rest:path}}",
            later,
            methods=["GET", "POST", "PATCH", "PUT", "DELETE"],
            include_in_schema=False,
        )
    return router


def _operations() -> APIRouter:
    router = APIRouter(tags=["operations"], include_in_schema=False)

    @router.get("/healthz")
    async def healthz() -> Response:
        """The process runs."""
        return Response(b'{"status":"ok"}', media_type="application/json")

    @router.get("/readyz")
    async def readyz(request: Request) -> Response:
        """The process can serve: the database answers, and it is not stopping."""
        if request.app.state.process.member.is_stopping:
            raise Unready("The server is stopping.")
        await request.app.state.database.ping()
        return Response(b'{"status":"ready"}', media_type="application/json")

    @router.get("/metrics")
    async def prometheus(request: Request, caller: CallerDep) -> Response:
        """Prometheus metrics of this process, and the queue's. Needs an API key like all else."""
        del caller
        await overview.measure(request.app.state.database)
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)

    @router.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        """The API's description."""
        return Response(orjson.dumps(request.app.openapi()), media_type="application/json")

    @router.get("/docs")
    async def reference() -> Response:
        """The API's description, for people. Everything it needs comes from this server."""
        return Response(docs.page(), media_type="text/html")

    return router


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            summary="A self-hosted, vendor-neutral server for the Interactions API.",
            routes=app.routes,
        )
        components = schema.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for requests in (wire_create, wire_credentials, wire_environments, wire_agents):
            schemas.update(requests.request_schemas())
        components["securitySchemes"] = {
            "api_key": {"type": "apiKey", "in": "header", "name": "x-goog-api-key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        }
        schema["security"] = [{"api_key": []}, {"bearer": []}]
        app.openapi_schema = schema
    return app.openapi_schema
