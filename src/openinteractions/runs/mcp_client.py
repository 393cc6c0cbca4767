"""One MCP server over streamable HTTP: the official SDK's client, past the SSRF guard.

The SDK's session lives in a task of its own, since it must be closed by the task that opened it,
while calls come from several. Its HTTP goes through `_Guarded`; what becomes of the requests of
one call, down there, is told by the call's `_Attempt`, which travels in the context.
"""

import asyncio
import base64
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Annotated, Any, Final, Self, TypeAlias, TypeVar, cast
from urllib.parse import quote, quote_plus, unquote, unquote_plus

import aiohttp
import httpx2
import orjson
from mcp import Client, MCPError, types
from mcp.client.streamable_http import streamable_http_client
from pydantic import Field, TypeAdapter

from openinteractions import __version__
from openinteractions.errors import AppError, Invalid
from openinteractions.models.port import Json
from openinteractions.netguard import Fetcher, Refused
from openinteractions.runs.mcp_result import result_of

CONNECT_S: Final = 10.0
_CLOSING_S: Final = 3.0
_GRACE_S: Final = 10.0
_SILENCE_S: Final = 600.0
"""Of a connection; how long a call may take is the call's own matter."""
_MAX_ANSWER_BYTES: Final = 16 * 2**20
"""Of one call, in all."""
_MAX_LISTING_BYTES: Final = 2 * 2**20
"""Of a connect, or of all pages of a list. The SDK makes ten to thirty times as much of it."""
_MAX_PAGES: Final = 50
_MAX_LISTED: Final = 500
_MAX_MESSAGE_CHARS: Final = 500
_MIN_SECRET_CHARS: Final = 6
"""Shorter values are words of all texts."""
_Answer: TypeAlias = types.CallToolResult | types.InputRequiredResult
_ANSWER: Final[TypeAdapter[_Answer]] = TypeAdapter(
    Annotated[_Answer, Field(union_mode="left_to_right")]
)
_MAYBE: Final = " The call may have taken effect."
_REFUSALS: Final = frozenset({types.INVALID_PARAMS, types.METHOD_NOT_FOUND, types.HEADER_MISMATCH})
"""What a server says before it does anything; of other errors nobody knows."""
_CLOSED: Final = "Connection closed"
_TIMED_OUT: Final = re.compile(r"Request '[^']*' timed out")
_BROKEN_STREAM: Final = "SSE stream "
_UNPARSED: Final = ("Failed to parse JSON response: ", "Failed to parse SSE message: ")
"""What the SDK says itself, under codes that servers use as well; a dump may follow."""
_VAGUE: Final = frozenset({"Server returned an error response", "Session terminated", "Not Found"})
"""What the SDK says where the server said nothing of use."""
# They belong to one connection, or aiohttp writes them itself.
_NOT_PASSED_ON: Final = frozenset(
    {"accept-encoding", "connection", "content-encoding", "content-length", "host"}
    | {"transfer-encoding"}
)

T = TypeVar("T")

# It logs what servers say, with tracebacks; what matters of it is in the errors.
logging.getLogger("mcp").setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Where a server is, and what it is shown."""

    url: str = field(repr=False)
    """Its query may be a secret."""
    headers: Mapping[str, str] = field(repr=False)
    credential: Callable[[], Awaitable[tuple[str, str]]] | None = None
    """Gives a header's name and value; asked at every request; raises AppError."""
    permits: Callable[[str], None] = field(default=lambda _url: None, repr=False)
    """Called with the URL of every request; refuses by raising Refused."""


@dataclass(slots=True)
class _Attempt:
    """What became of the requests of one call, or of a connect."""

    most: int
    """Bytes that all their answers may have."""
    is_call: bool = False
    """Of a tool: nothing else takes effect."""
    got: int = 0
    cause: str | None = None
    """Why the last of them has no answer, or why that broke off."""
    status: int = 0
    """Of the last answer that was an error's."""
    is_sent: bool = False
    """The server may have seen one of them."""
    is_taken: bool = False
    """The server has begun to answer the call itself with a success."""
    is_unknown: bool = False
    """The server refused the call itself since it does not know our session: it did nothing."""


_attempt: ContextVar[_Attempt | None] = ContextVar("mcp_attempt", default=None)


class Server:
    """Implements `tools.port.McpServer`; what it has open closes with its context."""

    def __init__(self, access: Access, fetcher: Fetcher) -> None:
        self._access = access
        self._fetcher = fetcher
        self._secrets = _Secrets(access)
        self._session: _Session | None = None
        self._opened: list[_Session] = []
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.gather(*(session.close() for session in self._opened))

    async def call(self, tool: str, arguments: Json, *, timeout_s: float) -> tuple[object, bool]:
        """Call a tool. A session is opened with the first call, and anew where it is lost.

        Raises:
            Invalid: There is no result; the message says why, and whether it may have acted.
        """
        result = await self._ask(
            lambda client: _called(client, tool, arguments, timeout_s=timeout_s),
            timeout_s,
            most=_MAX_ANSWER_BYTES,
            is_call=True,
        )
        if isinstance(result, types.InputRequiredResult):
            raise Invalid("The tool asks for input from a person, which it cannot get here.")
        return result_of(result, self._secrets.hide), result.is_error

    async def tools(self) -> list[types.Tool]:
        """All its tools.

        Raises:
            Invalid: They cannot be had; the message says why.
        """
        return await self._ask(_listed, CONNECT_S, most=_MAX_LISTING_BYTES)

    def hide(self, text: str) -> str:
        """A text without what the server was shown."""
        return self._secrets.hide(text)

    async def _ask(
        self,
        ask: Callable[[Client], Awaitable[T]],
        timeout_s: float,
        *,
        most: int,
        is_call: bool = False,
    ) -> T:
        """Ask; once more over a new session where nothing has come of it."""
        is_again = False
        while True:
            client = await self._client()
            attempt = _Attempt(most, is_call)
            token = _attempt.set(attempt)
            try:
                async with asyncio.timeout(timeout_s + _GRACE_S):
                    return await ask(client)
            except (MCPError, TimeoutError, ValueError, RuntimeError) as error:
                is_lost = attempt.is_unknown or (self._is_over and not attempt.is_sent)
                if not is_lost or is_again:
                    raise self._explained(error, attempt, timeout_s) from error
                is_again, self._session = True, None
            finally:
                _attempt.reset(token)

    @property
    def _is_over(self) -> bool:
        return self._session is None or self._session.is_over

    async def _client(self) -> Client:
        async with self._opening:
            if self._session is None or self._session.is_over:
                transport = _Guarded(self._access, self._fetcher, self._secrets)
                self._session = _Session(self._access.url, transport)
                # The one before may still have a call under way; all are closed in the end.
                self._opened = [one for one in self._opened if not one.is_over]
                self._opened.append(self._session)
            session = self._session
            try:
                return await session.client()
            except _NotOpen as error:
                self._session = None
                cause = error.__cause__
                raise self._explained(cause or error, error.attempt, CONNECT_S) from error

    def _explained(self, error: BaseException, attempt: _Attempt, timeout_s: float) -> Invalid:
        hide = self._secrets.hide
        # What a cut leaves of a secret would be found no more.
        said = hide(error.message)[:_MAX_MESSAGE_CHARS] if isinstance(error, MCPError) else ""
        return Invalid(hide(_explanation(error, said, attempt, timeout_s)))


def _explanation(error: BaseException, said: str, attempt: _Attempt, timeout_s: float) -> str:
    """Why there is no result; `said` is the message of the error, if it is the server's."""
    maybe = _MAYBE if attempt.is_call else ""
    is_unparsed = said.startswith(_UNPARSED)
    if attempt.status and attempt.cause is None:
        why = "" if said in _VAGUE or is_unparsed else f" {said}"
        is_vague = attempt.is_taken or attempt.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return f"The MCP server answered {_named(attempt.status)}.{why}{maybe if is_vague else ''}"
    code = error.code if isinstance(error, MCPError) else None
    if attempt.cause is not None:
        what = f"The MCP server cannot be used: {attempt.cause}"
    elif isinstance(error, TimeoutError) or _is_timeout(code, said):
        what = f"The MCP server gave no answer within {timeout_s:g} seconds."
    elif _is_closed(code, said):
        what = "The MCP server broke off without an answer."
    elif is_unparsed:
        what = "The MCP server's answer makes no sense: it is no JSON-RPC message."
    elif isinstance(error, MCPError):
        is_vague = attempt.is_taken and code not in _REFUSALS
        return f"The MCP server refused: {said}{maybe if is_vague else ''}"
    else:
        what = "The MCP server's answer makes no sense."
    return what + maybe if attempt.is_sent else what


def _is_timeout(code: int | None, said: str) -> bool:
    """Whether the SDK waited in vain; servers use the code for errors of their own."""
    return code == types.REQUEST_TIMEOUT and _TIMED_OUT.fullmatch(said) is not None


def _is_closed(code: int | None, said: str) -> bool:
    """Whether no answer came; servers use the code for errors of their own."""
    return code == types.CONNECTION_CLOSED and (said == _CLOSED or said.startswith(_BROKEN_STREAM))


def _named(status: int) -> str:
    try:
        return f"{status} ({HTTPStatus(status).phrase})"
    except ValueError:
        return str(status)


async def _called(client: Client, tool: str, arguments: Json, *, timeout_s: float) -> _Answer:
    """The SDK's own `call_tool` lists all tools, and drops a result that its schema forbids."""
    params = types.CallToolRequestParams(name=tool, arguments=arguments)
    request = types.CallToolRequest(params=params)
    session = client.session
    try:
        return await session.send_request(request, _ANSWER, request_read_timeout_seconds=timeout_s)
    except MCPError as error:
        if error.code != types.HEADER_MISMATCH:
            raise
    # The server wants some arguments in headers too; its list says which.
    attempt = _attempt.get()
    assert attempt is not None
    call, attempt.most, attempt.got = (attempt.most, attempt.got), _MAX_LISTING_BYTES, 0
    await _listed(client)
    attempt.most, attempt.got = call
    return await session.send_request(request, _ANSWER, request_read_timeout_seconds=timeout_s)


async def _listed(client: Client) -> list[types.Tool]:
    found: list[types.Tool] = []
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        params = types.PaginatedRequestParams(cursor=cursor)
        page = await client.session.list_tools(params=params)
        found += page.tools
        if len(found) > _MAX_LISTED:
            raise MCPError(types.INVALID_REQUEST, f"it lists more than {_MAX_LISTED} tools.")
        cursor = page.next_cursor
        if cursor is None:
            return found
    raise MCPError(types.INVALID_REQUEST, f"it lists its tools on more than {_MAX_PAGES} pages.")


class _NotOpen(Exception):
    """There is no session; the cause says why."""

    def __init__(self, attempt: _Attempt) -> None:
        super().__init__()
        self.attempt = attempt


class _Session:
    """One session, from its first message to its last, in a task of its own."""

    def __init__(self, url: str, transport: "_Guarded") -> None:
        self._url = url
        self._transport = transport
        self._attempt = _Attempt(_MAX_LISTING_BYTES)
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Client] = loop.create_future()
        # Who waited for it may be gone: then nobody asks how it ended.
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        self._stop = asyncio.Event()
        # `close` ends it.
        self._task = loop.create_task(self._live(), name="mcp-session")

    @property
    def is_over(self) -> bool:
        """It has broken, or was closed."""
        return self._task.done()

    async def client(self) -> Client:
        """The SDK's client, once it is open.

        Raises:
            _NotOpen: It cannot be opened, or takes too long.
        """
        try:
            async with asyncio.timeout(CONNECT_S):
                return await asyncio.shield(self._ready)
        except TimeoutError as error:
            await self.close()
            raise _NotOpen(self._attempt) from error

    async def close(self) -> None:
        """Say goodbye, and let go."""
        self._stop.set()
        if self._ready.done():
            await asyncio.wait([self._task], timeout=_CLOSING_S)
        self._task.cancel()
        await asyncio.wait([self._task])
        self._ready.cancel()

    async def _live(self) -> None:
        _attempt.set(self._attempt)
        info = types.Implementation(name="openinteractions", version=__version__)
        try:
            # Without the proxies that the environment may name: they are not our guard.
            async with httpx2.AsyncClient(
                transport=self._transport, trust_env=False, timeout=None
            ) as http:
                streams = streamable_http_client(
                    self._url, http_client=http, max_sse_event_size=_MAX_ANSWER_BYTES
                )
                async with Client(streams, cache=None, client_info=info) as client:
                    if not self._ready.done():
                        self._ready.set_result(client)
                    await self._stop.wait()
        except Exception as error:  # noqa: BLE001 - whatever the SDK raises, its session is over
            if not self._ready.done():
                failure = _NotOpen(self._attempt)
                failure.__cause__ = _first(error)
                self._ready.set_exception(failure)


def _first(error: Exception) -> Exception:
    """What went wrong first, of a group."""
    while isinstance(error, ExceptionGroup):
        error = cast("ExceptionGroup[Exception]", error).exceptions[0]
    return error


class _Guarded(httpx2.AsyncBaseTransport):
    """Sends what the SDK wants sent, to the server's own host only, past the guard.

    A request that fails is answered with a JSON-RPC error: an exception would end the session, and
    with it the calls beside this one.
    """

    def __init__(self, access: Access, fetcher: Fetcher, secrets: "_Secrets") -> None:
        self._access = access
        self._origin = httpx2.URL(access.url)
        self._fetcher = fetcher
        self._secrets = secrets

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        attempt = _attempt.get() or _Attempt(_MAX_ANSWER_BYTES)
        if request.method == "GET" and "last-event-id" not in request.headers:
            # A connection per session, for messages that nobody would read.
            return httpx2.Response(405)
        attempt.cause, attempt.status, was_sent = None, 0, attempt.is_sent
        try:
            self._require_own(request.url)
            self._access.permits(str(request.url))
            body, headers = await request.aread(), await self._headers(request)
            attempt.is_sent = True
            answer = await self._fetcher.request(
                request.method, str(request.url), body, headers, silence_s=_SILENCE_S
            )
        except AppError as error:
            if type(error) is not Invalid:
                # Neither the guard nor a connection that was not made has sent anything.
                attempt.is_sent = was_sent
            attempt.cause = error.message
            return _refusal(HTTPStatus.BAD_GATEWAY, error.message)
        return self._answered(request, answer, attempt)

    def _answered(
        self, request: httpx2.Request, answer: aiohttp.ClientResponse, attempt: _Attempt
    ) -> httpx2.Response:
        if answer.status >= HTTPStatus.BAD_REQUEST:
            attempt.status = answer.status
        # Nothing else tells what became of the call: not that its answer cannot be resumed, nor
        # that a session is unknown by the time the call is cancelled.
        if _is_call(request):
            attempt.is_taken |= answer.status < HTTPStatus.MULTIPLE_CHOICES
            is_unknown = answer.status == HTTPStatus.NOT_FOUND
            has_session = "mcp-session-id" in request.headers
            attempt.is_unknown = is_unknown and has_session and not attempt.is_taken
        if answer.headers.get("content-encoding", "identity").strip().lower() != "identity":
            answer.close()
            attempt.cause = "its answer is compressed, which was not asked for."
            return _refusal(HTTPStatus.BAD_GATEWAY, attempt.cause)
        headers = [
            (name, value)
            for name, value in answer.headers.items()
            if name.lower() not in _NOT_PASSED_ON
        ]
        return httpx2.Response(answer.status, headers=headers, stream=_Body(answer, attempt))

    def _require_own(self, url: httpx2.URL) -> None:
        """The SDK follows no redirects elsewhere; what it is shown goes nowhere else anyway."""
        own = self._origin
        is_same = (url.scheme, url.host, url.port) == (own.scheme, own.host, own.port)
        is_upgrade = url.scheme == "https" and (url.host, url.port, own.port) == (
            own.host,
            None,
            None,
        )
        if not (is_same or is_upgrade):
            raise Refused("It redirects to another place.")

    async def _headers(self, request: httpx2.Request) -> dict[str, str]:
        """The protocol's own headers over those of the request and the credential."""
        found = httpx2.Headers({"User-Agent": f"openinteractions/{__version__}"})
        found.update(dict(self._access.headers))
        if self._access.credential is not None:
            name, value = await self._access.credential()
            self._secrets.add(value)
            found[name] = value
        for name, value in request.headers.items():
            if name not in _NOT_PASSED_ON and name != "user-agent":
                found[name] = value
        # A small body could become a large one.
        found["Accept-Encoding"] = "identity"
        return dict(found)


class _Body(httpx2.AsyncByteStream):
    """An answer's body, as it comes."""

    def __init__(self, answer: aiohttp.ClientResponse, attempt: _Attempt) -> None:
        self._answer = answer
        self._attempt = attempt

    async def __aiter__(self) -> AsyncIterator[bytes]:
        attempt = self._attempt
        try:
            async for piece in self._answer.content.iter_any():
                attempt.got += len(piece)
                if attempt.got > attempt.most:
                    raise self._broken(f"its answer is larger than {attempt.most} bytes.")
                yield piece
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise self._broken(f"its answer broke off ({type(error).__name__}).") from error

    async def aclose(self) -> None:
        self._answer.close()

    def _broken(self, cause: str) -> httpx2.StreamError:
        self._attempt.cause = cause
        return httpx2.StreamError(cause)


def _refusal(status: int, message: str) -> httpx2.Response:
    error = {"code": types.INTERNAL_ERROR, "message": message}
    body = orjson.dumps({"jsonrpc": "2.0", "id": None, "error": error})
    return httpx2.Response(status, headers={"content-type": "application/json"}, content=body)


def _is_call(request: httpx2.Request) -> bool:
    """Whether it is the one that carries a call."""
    if request.method != "POST":
        return False
    message: Any = orjson.loads(request.content)
    return isinstance(message, dict) and cast("Json", message).get("method") == "tools/call"


class _Secrets:
    """What a server was shown, which its answers are not to repeat."""

    def __init__(self, access: Access) -> None:
        self._known: set[str] = set()
        for value in access.headers.values():
            self.add(value)
        self._add_query(httpx2.URL(access.url).query.decode())

    def add(self, value: str) -> None:
        """Of `Bearer abc`, also `abc` is a secret; of `Basic`, the password."""
        kind, _, rest = value.partition(" ")
        self._add(value, rest.strip())
        if kind.lower() == "basic":
            pair = _decoded(rest.strip())
            self._add(pair, pair.partition(":")[2])

    def hide(self, text: str) -> str:
        """A text without them."""
        for secret in sorted(self._known, key=len, reverse=True):
            text = text.replace(secret, "[redacted]")
        return text

    def _add(self, *texts: str) -> None:
        for text in texts:
            if len(text) >= _MIN_SECRET_CHARS:
                # Also as it stands within JSON.
                self._known |= {text, orjson.dumps(text).decode()[1:-1]}

    def _add_query(self, query: str) -> None:
        """All of it, and each value, however it is spelled."""
        self._add(query, unquote(query), unquote_plus(query))
        for part in query.split("&"):
            name, _, given = part.partition("=")
            value = given or name
            for plain in (unquote(value), unquote_plus(value)):
                self._add(value, plain, quote(plain, safe=""), quote_plus(plain))


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text).decode()
    except ValueError:
        return ""
