"""Search backends: what an operator has set up to search the web with.

They are the operator's own, so they are reached without the SSRF guard: one may be on this machine.
"""

import asyncio
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Literal, Protocol, TypeAlias, cast
from urllib.parse import quote, urlsplit

import aiohttp
import orjson
import structlog

from openinteractions.errors import Invalid, RequestError, Unready
from openinteractions.tools.port import Hit

_log = structlog.get_logger(__name__)

SearchKind: TypeAlias = Literal["searxng", "brave", "tavily", "json"]

_BRAVE: Final = "https://api.search.brave.com"
_TAVILY: Final = "https://api.tavily.com"
_WEB: Final = frozenset({"web_search"})
_MAX_BYTES: Final = 4 * 2**20
_MAX_QUERY: Final = 400
"""Characters; Brave and Tavily refuse more."""
_MAX_TITLE: Final = 300
_MAX_SNIPPET: Final = 800
_LONGEST_WAIT_S: Final = 5.0
_DEFAULT_WAIT_S: Final = 1.0
_OK: Final = 200
_FORBIDDEN: Final = frozenset({401, 403})
_TOO_MANY: Final = 429
_TAG: Final = re.compile(r"</?[A-Za-z][^<>]*>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What the operator has set."""

    kind: SearchKind
    url: str | None = None
    """Root of a SearXNG; of `json` a template with `{query}` and `{limit}`."""
    api_key: str | None = field(default=None, repr=False)
    results: int = 8
    timeout: timedelta = timedelta(seconds=15)
    key_header: str = "Authorization"
    results_field: str = "results"
    title_field: str = "title"
    url_field: str = "url"
    snippet_field: str = "snippet"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """One request to a backend."""

    url: str
    method: str = "GET"
    params: Mapping[str, str] = field(default_factory=dict[str, str])
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    body: bytes | None = None


class _Wire(Protocol):
    """The wire format of one kind of backend."""

    kinds: frozenset[str]
    """Contract `search_types` that it has."""

    def request(self, query: str, kind: str, limit: int) -> _Request:
        """How it is asked."""
        ...

    def hits(self, answer: object) -> Sequence[Hit]:
        """What its answer lists; an answer of another shape lists nothing."""
        ...


class _Searxng:
    """https://docs.searxng.org/dev/search_api.html ."""

    kinds = frozenset({"web_search", "image_search"})

    def __init__(self, options: SearchOptions) -> None:
        self._url = (options.url or "").rstrip("/").removesuffix("/search") + "/search"
        self._headers = _keyed("Authorization", options.api_key)

    def request(self, query: str, kind: str, limit: int) -> _Request:
        del limit  # It has none: a page is a page.
        categories = {"image_search": "images"}.get(kind, "general")
        params = {"q": query, "format": "json", "categories": categories}
        return _Request(url=self._url, params=params, headers=self._headers)

    def hits(self, answer: object) -> Sequence[Hit]:
        listed = _listed(answer, "results", may_lack=False)
        return _hits(listed, title="title", url="url", snippet="content")


class _Brave:
    """https://api-dashboard.search.brave.com/app/documentation/web-search/get-started ."""

    kinds = _WEB

    def __init__(self, options: SearchOptions) -> None:
        self._url = (options.url or _BRAVE).rstrip("/") + "/res/v1/web/search"
        self._headers = _keyed("X-Subscription-Token", options.api_key)

    def request(self, query: str, kind: str, limit: int) -> _Request:
        del kind
        params = {"q": query, "count": str(min(limit, 20)), "text_decorations": "false"}
        return _Request(url=self._url, params=params, headers=self._headers)

    def hits(self, answer: object) -> Sequence[Hit]:
        listed = _listed(answer, "web.results", may_lack=True)
        return _hits(listed, title="title", url="url", snippet="description")


class _Tavily:
    """https://docs.tavily.com/documentation/api-reference/endpoint/search ."""

    kinds = _WEB

    def __init__(self, options: SearchOptions) -> None:
        self._url = (options.url or _TAVILY).rstrip("/") + "/search"
        self._headers = {
            "Content-Type": "application/json",
            **_keyed("Authorization", options.api_key),
        }

    def request(self, query: str, kind: str, limit: int) -> _Request:
        del kind
        body = orjson.dumps({"query": query, "max_results": min(limit, 20)})
        return _Request(url=self._url, method="POST", headers=self._headers, body=body)

    def hits(self, answer: object) -> Sequence[Hit]:
        listed = _listed(answer, "results", may_lack=False)
        return _hits(listed, title="title", url="url", snippet="content")


class _AnyJson:
    """An endpoint that answers a GET with a list of results somewhere in a JSON object."""

    kinds = _WEB

    def __init__(self, options: SearchOptions) -> None:
        self._options = options
        self._headers = _keyed(options.key_header, options.api_key)

    def request(self, query: str, kind: str, limit: int) -> _Request:
        del kind
        url = (self._options.url or "").replace("{limit}", str(limit))
        return _Request(url=url.replace("{query}", quote(query, safe="")), headers=self._headers)

    def hits(self, answer: object) -> Sequence[Hit]:
        chosen = self._options
        return _hits(
            _listed(answer, chosen.results_field, may_lack=True),
            title=chosen.title_field,
            url=chosen.url_field,
            snippet=chosen.snippet_field,
        )


_WIRES: Final[Mapping[SearchKind, type[_Searxng | _Brave | _Tavily | _AnyJson]]] = {
    "searxng": _Searxng,
    "brave": _Brave,
    "tavily": _Tavily,
    "json": _AnyJson,
}


class SearchBackend:
    """Asks the operator's backend."""

    def __init__(self, options: SearchOptions, session: aiohttp.ClientSession) -> None:
        """Nothing is asked.

        Args:
            options: The operator's.
            session: Closed by the caller.
        """
        self._options = options
        self._wire: _Wire = _WIRES[options.kind](options)
        self._session = session

    @property
    def kinds(self) -> frozenset[str]:
        """Contract `search_types` that it has."""
        return self._wire.kinds

    async def search(self, query: str, *, kind: str, limit: int) -> Sequence[Hit]:
        """What it finds, best first; at most `limit`, and what the operator has set.

        Raises:
            Invalid: It has no such kind of search, or refuses the request.
            Unready: It cannot be reached, is too slow, or has trouble of its own.
        """
        if kind not in self.kinds:
            raise Invalid(
                f"The search backend of this server ({self._options.kind}) has no {kind}."
            )
        limit = min(limit, self._options.results)
        request = self._wire.request(query[:_MAX_QUERY], kind, limit)
        answer = await self._ask(request)
        try:
            return self._wire.hits(answer)[:limit]
        except _Misread as error:
            raise self._unready(
                "search.misread",
                f"The search backend's answer is not understood: {error}. Its operator has to "
                "look at the settings search.*.",
                reason=str(error),
            ) from None

    async def _ask(self, request: _Request) -> object:
        """The JSON of the answer; asked a second time where that may help."""
        status, body, wait_s = await self._sent(request)
        if (status == _TOO_MANY or status >= 500) and wait_s <= _LONGEST_WAIT_S:  # noqa: PLR2004 - HTTP
            await asyncio.sleep(wait_s)
            status, body, wait_s = await self._sent(request)
        if status != _OK:
            _log.warning("search.refused", kind=self._options.kind, status=status)
            raise _trouble(self._options.kind, status)
        try:
            return cast("object", orjson.loads(body))
        except orjson.JSONDecodeError as error:
            message = "The search backend answered something that is not JSON."
            raise self._unready("search.misread", message, reason="no JSON") from error

    def _unready(self, event: str, message: str, **about: str) -> Unready:
        _log.warning(event, kind=self._options.kind, **about)
        return Unready(message)

    async def _sent(self, request: _Request) -> tuple[int, bytes, float]:
        """Status, body, and how many seconds it asks to wait."""
        timeout = aiohttp.ClientTimeout(total=self._options.timeout.total_seconds())
        try:
            async with self._session.request(
                request.method,
                request.url,
                params=request.params or None,
                headers={"Accept": "application/json", **request.headers},
                data=request.body,
                # A key must not follow to another host.
                allow_redirects=False,
                timeout=timeout,
            ) as response:
                wait = response.headers.get("Retry-After", "")
                wait_s = float(wait) if wait.isdecimal() else _DEFAULT_WAIT_S
                return response.status, await _bounded(response), wait_s
        except TimeoutError as error:
            message = "The search backend did not answer in time."
            raise self._unready("search.unreachable", message, error="TimeoutError") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            _log.warning("search.unreachable", kind=self._options.kind, error=type(error).__name__)
            raise Unready("The search backend cannot be reached.") from error


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_chunked(64 * 1024):
        data += chunk
        if len(data) > _MAX_BYTES:
            raise Unready(f"The search backend answered more than {_MAX_BYTES} bytes.")
    return bytes(data)


def _trouble(kind: SearchKind, status: int) -> RequestError:
    if kind == "searxng" and status in _FORBIDDEN:
        return Unready(
            f"The search backend answered {status}: its operator has to allow JSON "
            "(search.formats in SearXNG's settings.yml), or to mend the key."
        )
    if status in _FORBIDDEN:
        return Unready(
            f"The search backend answered {status}: its key (setting search.api_key) is wrong."
        )
    if status == _TOO_MANY:
        return Unready("The search backend is asked too often: wait a while, or ask less.")
    if status >= 500:  # noqa: PLR2004 - HTTP
        return Unready(f"The search backend has trouble of its own: it answered {status}.")
    return Invalid(f"The search backend refused the query: it answered {status}.")


def _keyed(header: str, key: str | None) -> dict[str, str]:
    if key is None:
        return {}
    return {header: f"Bearer {key}" if header.lower() == "authorization" else key}


def _at(value: object, path: str) -> object:
    """What lies at a path of names with dots between; None if there is nothing."""
    for name in path.split(".") if path else ():
        if not isinstance(value, dict):
            return None
        value = cast("dict[str, object]", value).get(name)
    return value


class _Misread(Exception):
    """An answer is not of the shape that the settings name; the message says what is missing."""


def _listed(answer: object, path: str, *, may_lack: bool) -> list[Any]:
    """The list of results at a path of names.

    Args:
        answer: The backend's.
        path: See `_at`.
        may_lack: Whether the list is left out where nothing was found: then the log says so.

    Raises:
        _Misread: Something else is there, or nothing.
    """
    found = _at(answer, path)
    if isinstance(found, list):
        return cast("list[Any]", found)
    where = f"at '{path}'" if path else "at its top"
    is_object = isinstance(answer, dict)
    if found is not None or not is_object:
        raise _Misread(f"there is no list of results {where}")
    parent, _, name = path.rpartition(".")
    above = _at(answer, parent)
    if isinstance(above, dict) and name in cast("dict[str, object]", above):
        return []
    if not may_lack:
        raise _Misread(f"there is no list of results {where}")
    _log.warning("search.no_list", path=path)
    return []


def _hits(listed: Sequence[Any], *, title: str, url: str, snippet: str) -> list[Hit]:
    if listed and not any(isinstance(_at(entry, url), str) for entry in listed):
        raise _Misread(f"no result has a URL at '{url}'")
    found: list[Hit] = []
    for entry in listed:
        place = _at(entry, url)
        if not isinstance(place, str) or not _is_page(place):
            continue
        found.append(
            Hit(
                title=_words(_at(entry, title), _MAX_TITLE),
                url=place,
                snippet=_words(_at(entry, snippet), _MAX_SNIPPET),
            )
        )
    return found


def _is_page(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _words(value: object, limit: int) -> str:
    """Text of a result: backends mark what was found in it by HTML."""
    text = html.unescape(_TAG.sub("", value)) if isinstance(value, str) else ""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
