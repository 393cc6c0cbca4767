"""The web as one run may reach it: past the SSRF guard, under its environment's network rules."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from yarl import URL

from openinteractions import __version__
from openinteractions.errors import Invalid
from openinteractions.netguard import Fetcher, Refused
from openinteractions.runs.search import SearchBackend
from openinteractions.sandbox.egress import hosts
from openinteractions.sandbox.egress.policy import Blocked, Policy, Reach
from openinteractions.tools.port import Hit, Page

_MAX_BYTES: Final = 20 * 2**20
"""Largest page; they are read in memory, several at once."""
_HEADERS: Final = {
    # Many sites turn away what does not look like a browser; this says what it is all the same.
    "User-Agent": f"Mozilla/5.0 (compatible; OpenInteractions/{__version__})",
    "Accept": "text/html,application/xhtml+xml,application/pdf;q=0.9,text/*;q=0.8,*/*;q=0.7",
    "Accept-Language": "en;q=0.9,*;q=0.5",
}
_NO_SEARCH: Final = (
    "This server cannot search the web: its operator has to configure a search backend "
    "(setting search.kind)."
)


class Reaches:
    """What the web tools of all runs share."""

    def __init__(
        self,
        fetcher: Fetcher,
        backend: SearchBackend | None,
        *,
        default: Reach,
        ceiling: Reach,
    ) -> None:
        """Nothing is opened.

        Args:
            fetcher: Fetches pages.
            backend: Searches; None where the operator has none.
            default: What a run may reach whose environment says nothing, or that has none.
            ceiling: What no run can go beyond.
        """
        self._fetcher = fetcher
        self._backend = backend
        self._default = default
        self._ceiling = ceiling

    @property
    def search_types(self) -> frozenset[str]:
        """The contract's `search_types` that the backend has."""
        return frozenset[str]() if self._backend is None else self._backend.kinds

    def web(
        self, network: Callable[[], Awaitable[object]] | None = None, *, owner: str | None = None
    ) -> "RunWeb":
        """The web of one run.

        Args:
            network: Gives the `network` of the run's environment as it is now, so that a change of
                it counts at once; None for a run without an environment.
            owner: Whose the run is; see `Fetcher.fetch`.
        """

        async def policy() -> Policy:
            now = None if network is None else await network()
            return Policy(now, default=self._default, ceiling=self._ceiling)

        return RunWeb(self._fetcher, self._backend, policy, owner=owner)


class RunWeb:
    """Implements `tools.port.Web`."""

    def __init__(
        self,
        fetcher: Fetcher,
        backend: SearchBackend | None,
        policy: Callable[[], Awaitable[Policy]],
        *,
        owner: str | None = None,
    ) -> None:
        self._owner = owner
        self._fetcher = fetcher
        self._backend = backend
        self._policy = policy

    async def fetch(
        self, url: str, *, grows: Callable[[int], Awaitable[None]] | None = None
    ) -> Page:
        """GET a URL; every host on the way has to be one that the run may reach."""
        policy = await self._policy()
        found = await self._fetcher.fetch(
            url,
            owner=self._owner,
            permits=lambda place: _require(policy, place),
            headers=_HEADERS,
            max_bytes=_MAX_BYTES,
            grows=grows,
        )
        return Page(
            url=found.url, mime_type=found.mime_type, data=found.data, charset=found.charset
        )

    async def search(self, query: str, *, kind: str, limit: int) -> Sequence[Hit]:
        """Ask the operator's backend. It is no place that a model can choose, so no rule holds."""
        if self._backend is None:
            raise Invalid(_NO_SEARCH)
        return await self._backend.search(query, kind=kind, limit=limit)


def _require(policy: Policy, url: str) -> None:
    """Refuse a URL whose host the network rules do not name.

    Raises:
        Refused: The message says which rule, and who can change it.
    """
    try:
        # Read by the library that connects: another reading might see another host.
        host = hosts.normal(URL(url).host or "")
    except ValueError:
        host = None
    if host is None:
        raise Refused("The URL names no host that can be checked against the network rules.")
    try:
        policy.decide(host)
    except Blocked as error:
        raise Refused(f"Cannot fetch this: {error.reason}") from error
