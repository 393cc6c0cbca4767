"""MCP servers of requests: looked at when an interaction is created, called while it runs.

What the server said of its tools becomes part of the run spec. What it is shown (headers, the
credential's id, a URL's query) is kept apart, sealed, and only meets the spec again in `servers`.
"""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Final, TypeAlias, cast
from urllib.parse import unquote, urlsplit, urlunsplit
from uuid import UUID
from weakref import WeakValueDictionary

import orjson
from mcp import types
from yarl import URL

from openinteractions.errors import AppError, Invalid, Unready
from openinteractions.loop.structured import enforced, require_schema
from openinteractions.models.calls import mcp_function
from openinteractions.models.port import Json
from openinteractions.netguard import Fetcher, Refused
from openinteractions.resources.credentials.refresh import Unusable
from openinteractions.resources.credentials.service import HeaderInjection, Vault
from openinteractions.runs.mcp_client import CONNECT_S, Access, Server
from openinteractions.sandbox.egress import hosts
from openinteractions.sandbox.egress.policy import Reach, is_header_name, is_header_value
from openinteractions.tools.port import McpServer
from openinteractions.wire.credentials import is_private_host
from openinteractions.wire.explain import shown

KIND: Final = "mcp_server"
MAX_TOOLS: Final = 128
MAX_SCHEMA_BYTES: Final = 256 * 1024
MAX_SERVERS: Final = 16
_LOOKS: Final = 32
"""At servers, at once: each may take some tens of megabytes."""
_LOOKS_OF_PROJECT: Final = 8
_WAIT_S: Final = 30.0
_CHECK_S: Final = 1.0
"""Of processor time, for the schemas of a request: their thread slows the others down."""
_SCHEMA_STEPS: Final = 10_000
_MAX_HEADER_BYTES: Final = 32 * 1024
_MAX_HEADERS: Final = 64
_MAX_QUERY_BYTES: Final = 8 * 1024
_MAX_QUERY_VALUES: Final = 64
_NAMED: Final = 20
_OPEN_SCHEMA: Final[Json] = {"type": "object"}
_Hide: TypeAlias = Callable[[str], str]


class McpServers:
    """The way to the MCP servers that requests name."""

    def __init__(self, fetcher: Fetcher, vault: Vault, *, ceiling: Reach) -> None:
        """Nothing is opened.

        Args:
            fetcher: Makes the requests.
            vault: Of the credentials that requests name.
            ceiling: The hosts that the operator lets runs reach.
        """
        self._fetcher = fetcher
        self._vault = vault
        self._ceiling = ceiling
        self._looks = asyncio.Semaphore(_LOOKS)
        self._looks_of: WeakValueDictionary[UUID, asyncio.Semaphore] = WeakValueDictionary()

    async def prepared(
        self, project_id: UUID, tools: Sequence[Json]
    ) -> tuple[Mapping[int, Json], Json | None]:
        """Look at the MCP servers among a request's tools, all at once.

        Args:
            project_id: Whose credentials count.
            tools: The request's `tools`; others than `mcp_server` are passed over.

        Returns:
            The entry of `own_tools` for each, by its place in `tools`, and the secrets of all, as
            `servers` wants them; None where there are none.

        Raises:
            Invalid: One cannot be used; the message names its place and the cause.
            Unready: Too many are being looked at.
        """
        places = [place for place, tool in enumerate(tools) if tool["type"] == KIND]
        _refuse_many(tools, places)
        entries: dict[int, Json] = {}
        secrets: Json = {}
        parts = [_parted(tools[place], f"tools[{place}]") for place in places]
        listed = await asyncio.gather(
            *(
                self._listed(project_id, entry, secret, f"tools[{place}]")
                for place, (entry, secret) in zip(places, parts, strict=True)
            ),
            return_exceptions=True,
        )
        left_s = _CHECK_S
        for place, (entry, secret), found in zip(places, parts, listed, strict=True):
            if isinstance(found, BaseException):
                raise found
            known, hide = found
            chosen = _chosen(known, tools[place].get("allowed_tools"), f"tools[{place}]")
            described, took_s = await asyncio.to_thread(_described, chosen, hide, left_s)
            left_s -= took_s
            entries[place] = {**entry, "tools": described}
            if secret:
                secrets[entry["name"]] = secret
        _refuse_equal_names(entries)
        return entries, {"mcp": secrets} if secrets else None

    @asynccontextmanager
    async def servers(
        self, project_id: UUID, entries: Sequence[Json], secrets: Json | None
    ) -> AsyncGenerator[Mapping[str, McpServer]]:
        """The MCP servers of one run, by name, for `Means.servers`; closed with the context.

        Args:
            project_id: Whose the run is.
            entries: Its `own_tools`; others than `mcp_server` are passed over.
            secrets: What `prepared` gave beside them.
        """
        known: Mapping[str, Json] = (secrets or {}).get("mcp") or {}
        found: dict[str, McpServer] = {}
        async with AsyncExitStack() as stack:
            for entry in entries:
                if entry["type"] == KIND:
                    name: str = entry["name"]
                    access = self._access(project_id, entry, known.get(name) or {})
                    server = Server(access, self._fetcher)
                    found[name] = await stack.enter_async_context(server)
            yield found

    async def _listed(
        self, project_id: UUID, entry: Json, secret: Json, where: str
    ) -> tuple[list[types.Tool], _Hide]:
        """The tools of a server, and what takes its secrets out of a text."""
        if "credential" in secret:
            await self._require_credential(project_id, secret, entry["url"], where)
        try:
            async with (
                self._look(project_id),
                asyncio.timeout(2 * CONNECT_S),
                Server(self._access(project_id, entry, secret), self._fetcher) as server,
            ):
                return await server.tools(), server.hide
        except Unready:
            raise
        except (AppError, TimeoutError) as error:
            cause = error.message if isinstance(error, AppError) else "It is too slow."
            raise Invalid(f"Invalid value at '{where}' ('{entry['name']}'): {cause}") from error

    @asynccontextmanager
    async def _look(self, project_id: UUID) -> AsyncGenerator[None]:
        """Wait until it may be looked at one more server."""
        own = self._looks_of.setdefault(project_id, asyncio.Semaphore(_LOOKS_OF_PROJECT))
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(_WAIT_S):
                    await stack.enter_async_context(own)
                    await stack.enter_async_context(self._looks)
            except TimeoutError as error:
                message = "Too many MCP servers are being looked at; try again later."
                raise Unready(message) from error
            yield

    async def _require_credential(
        self, project_id: UUID, secret: Json, url: str, where: str
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" and not is_private_host(parts.hostname or ""):
            raise Invalid(
                f"Invalid value at '{where}.url': a credential is sent over https only (http only "
                "inside a private network)."
            )
        try:
            await self._header(project_id, secret["credential"])
        except AppError as error:
            raise Invalid(f"Invalid value at '{where}.credential': {error.message}") from error

    def _access(self, project_id: UUID, entry: Json, secret: Json) -> Access:
        credential: Callable[[], Awaitable[tuple[str, str]]] | None = None
        if "credential" in secret:
            credential = partial(self._header, project_id, secret["credential"])
        return Access(
            url=secret.get("url") or entry["url"],
            headers=secret.get("headers") or {},
            credential=credential,
            permits=self._require_permitted,
        )

    def _require_permitted(self, url: str) -> None:
        if self._ceiling.mode == "open":
            return
        try:
            # Read by the library that connects: another reading might see another host.
            host = hosts.normal(URL(url).host or "")
        except ValueError:
            host = None
        if host is None or not self._ceiling.permits(host):
            raise Refused(
                f"{host or 'its host'} is not among the hosts that this server lets runs reach; "
                "only its operator can change that (setting sandbox.ceiling)."
            )

    async def _header(self, project_id: UUID, credential_id: str) -> tuple[str, str]:
        """The header that a credential stands for, as of now.

        Raises:
            Unusable: It stands for none, or cannot be had.
        """
        found = await self._vault.injection(project_id, credential_id)
        if not isinstance(found, HeaderInjection):
            # Its trusted_domains and places are rules for what happens inside a sandbox.
            message = (
                f"Credential '{shown(credential_id)}' is an environment variable's; an MCP server "
                "takes one of type bearer_token or oauth2."
            )
            raise Unusable("unknown", message)
        if not is_header_name(found.header_name) or not _is_carried(found.value):
            message = f"Credential '{shown(credential_id)}' cannot be put into a header."
            raise Unusable("unknown", message)
        return found.header_name, found.value


def _refuse_many(tools: Sequence[Json], places: Sequence[int]) -> None:
    """Refuse too many servers, and two of one name."""
    if len(places) > MAX_SERVERS:
        raise Invalid(f"Invalid value at 'tools': more than {MAX_SERVERS} MCP servers.")
    names: set[str] = set()
    for place in places:
        name = tools[place]["name"]
        if name in names:
            raise Invalid(f"Duplicate MCP server name '{name}' at 'tools[{place}]'.")
        names.add(name)


def _refuse_equal_names(entries: Mapping[int, Json]) -> None:
    """Refuse two tools that a model could not tell apart."""
    names: dict[str, str] = {}
    for place, entry in entries.items():
        for tool in entry["tools"]:
            name = mcp_function(entry["name"], tool["name"])
            about = f"'{shown(tool['name'])}' of '{entry['name']}'"
            if name in names:
                raise Invalid(
                    f"Invalid value at 'tools[{place}]': the tools {names[name]} and {about} are "
                    f"both '{name}' to the model; leave one out with 'allowed_tools'."
                )
            names[name] = about


def _parted(tool: Json, where: str) -> tuple[Json, Json]:
    """What may be seen of a tool of type `mcp_server`, and what may not."""
    given: str = tool["url"]
    headers: dict[str, str] = dict(tool.get("headers") or {})
    try:
        parts = urlsplit(given)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if not host:
        raise Invalid(f"Invalid value at '{where}.url': expected an http(s) URL.")
    userinfo, at, place = parts.netloc.rpartition("@")
    if at and not any(name.lower() == "authorization" for name in headers):
        pair = base64.b64encode(unquote(userinfo).encode()).decode()
        headers["Authorization"] = f"Basic {pair}"
    _require_headers(headers, f"{where}.headers")
    is_long = len(parts.query.encode()) > _MAX_QUERY_BYTES
    if is_long or parts.query.count("&") >= _MAX_QUERY_VALUES:
        raise Invalid(
            f"Invalid value at '{where}.url': its query has more than {_MAX_QUERY_BYTES} bytes or "
            f"{_MAX_QUERY_VALUES} values."
        )
    secret: Json = {}
    if headers:
        secret["headers"] = headers
    if "credential" in tool:
        secret["credential"] = tool["credential"]
    if parts.query:
        secret["url"] = urlunsplit((parts.scheme, place, parts.path, parts.query, ""))
    url = urlunsplit((parts.scheme, place, parts.path, "", ""))
    return {"type": KIND, "name": tool["name"], "url": url}, secret


def _require_headers(headers: Mapping[str, str], where: str) -> None:
    if len(headers) > _MAX_HEADERS:
        raise Invalid(f"Invalid value at '{where}': more than {_MAX_HEADERS} headers.")
    if sum(len(name) + len(value) for name, value in headers.items()) > _MAX_HEADER_BYTES:
        raise Invalid(f"Invalid value at '{where}': more than {_MAX_HEADER_BYTES} bytes.")
    for name, value in headers.items():
        if not is_header_name(name) or name.lower().startswith("mcp-"):
            raise Invalid(f"Invalid value at '{where}': '{shown(name)}' cannot be set.")
        if not _is_carried(value):
            raise Invalid(
                f"Invalid value at '{where}.{name}': a header carries only characters of ASCII, "
                "and none that control."
            )


def _is_carried(value: str) -> bool:
    """Whether a header to an MCP server can have this value: httpx encodes them as ASCII."""
    return value.isascii() and is_header_value(value)


def _chosen(
    tools: Sequence[types.Tool],
    allowed: Any,  # noqa: ANN401
    where: str,
) -> list[types.Tool]:
    """The tools that the request allows; nothing of them has been looked at yet but their size."""
    known = {tool.name: tool for tool in tools}
    chosen = [known[name] for name in _allowed(known, allowed, f"{where}.allowed_tools")]
    if len(chosen) > MAX_TOOLS or sum(map(_size, chosen)) > MAX_SCHEMA_BYTES:
        raise Invalid(
            f"Invalid value at '{where}': the server's {len(chosen)} tools are more than "
            f"{MAX_TOOLS}, or their descriptions more than {MAX_SCHEMA_BYTES} bytes; choose some "
            "with 'allowed_tools'."
        )
    return chosen


def _size(tool: types.Tool) -> int:
    """Bytes of what an entry of `own_tools` may hold of it."""
    try:
        schema = len(orjson.dumps(tool.input_schema))
    except orjson.JSONEncodeError:
        # Nobody can follow it; an open one takes its place.
        schema = len(str(_OPEN_SCHEMA))
    return schema + len(orjson.dumps([tool.name, tool.description, tool.title]))


def _allowed(known: Mapping[str, types.Tool], allowed: Any, where: str) -> list[str]:  # noqa: ANN401
    """Names of tools, in the server's order."""
    if allowed is None:
        return list(known)
    wanted: set[str] = set()
    unwanted: set[str] = set()
    if not allowed:
        raise Invalid(f"Invalid value at '{where}': expected at least one tool.")
    for place, item in enumerate(cast("list[str | Json]", allowed)):
        named, is_wanted = _named(item, known, f"{where}[{place}]")
        for name in named:
            if name not in known:
                raise Invalid(
                    f"Unknown tool '{shown(name)}' at '{where}[{place}]'. The server has: "
                    f"{', '.join(map(shown, list(known)[:_NAMED])) or 'none'}."
                )
        (wanted if is_wanted else unwanted).update(named)
    if not wanted and unwanted:
        wanted = set(known)
    return [name for name in known if name in wanted - unwanted]


def _named(
    item: str | Json, known: Mapping[str, types.Tool], where: str
) -> tuple[Sequence[str], bool]:
    """The tools of one entry of `allowed_tools`, and whether they may be called."""
    if isinstance(item, str):
        return [item], True
    mode = item.get("mode", "auto")
    if mode == "any":
        raise Invalid(
            f"Invalid value at '{where}.mode': a call can be demanded by "
            "'generation_config.tool_choice' only."
        )
    return item.get("tools", list(known)), mode != "none"


def _described(
    tools: Sequence[types.Tool], hide: _Hide, budget_s: float
) -> tuple[list[Json], float]:
    """The tools as an entry of `own_tools` holds them, and the processor time that it took.

    Args:
        tools: As the server described them.
        hide: Takes secrets out of a text.
        budget_s: Of processor time. The schemas of the tools that are left then are not checked,
            nor asked for: the server checks what it is sent.
    """
    began = time.thread_time()
    described: list[Json] = []
    for tool in tools:
        is_late = time.thread_time() - began > budget_s
        found: Json = {
            "name": tool.name,
            "description": hide(tool.description or tool.title or ""),
            "parameters": _OPEN_SCHEMA if is_late else _parameters(tool, hide),
        }
        hints = tool.annotations
        if hints is not None and hints.read_only_hint:
            found["is_pure"] = True
        elif hints is not None and hints.idempotent_hint:
            found["is_repeatable"] = True
        described.append(found)
    return described, time.thread_time() - began


def _parameters(tool: types.Tool, hide: _Hide) -> Json:
    try:
        parameters: Json = orjson.loads(hide(orjson.dumps(enforced(tool.input_schema)).decode()))
        require_schema(parameters, tool.name, steps=_SCHEMA_STEPS)
    except (Invalid, orjson.JSONEncodeError, ValueError, RecursionError):
        # Its other tools are as good as ever.
        return _OPEN_SCHEMA
    return parameters
