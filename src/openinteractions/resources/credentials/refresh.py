"""Access tokens of oauth2 credentials, renewed by whoever needs one first.

One at a time, over all processes: who renews takes the credential by setting `refreshing_until` (a
lease, longer than an exchange can take), asks the token URL with no transaction open, and writes
the outcome only if that very lease still stands. The others use the old token while it is good, or
wait. A refusal is noted in the row, so that nobody asks again before a pause is over.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from datetime import timedelta
from typing import Any, Literal, TypeAlias, TypeVar
from uuid import UUID

import structlog

from openinteractions import clock
from openinteractions.db.engine import Database
from openinteractions.errors import EngineError, Invalid, NotFound, Unready
from openinteractions.netguard import Fetcher
from openinteractions.resources.credentials import oauth, store
from openinteractions.resources.credentials.box import AccessToken, Box, grant
from openinteractions.resources.credentials.oauth import ExchangeFailed
from openinteractions.resources.credentials.store import Row
from openinteractions.wire.credentials import Content
from openinteractions.wire.explain import shown

_log = structlog.get_logger(__name__)

T = TypeVar("T")
Reason: TypeAlias = Literal["unknown", "revoked", "refresh_failed", "unreadable"]

_LEASE = timedelta(seconds=45)
"""Two tries of 15 s each at the token URL, and time to spare."""
_PATIENCE_S = 20.0
"""Longest wait for somebody else's refresh."""
_LOOK_AGAIN_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0
_CLOSING_S = 10.0
_FAILED = "refresh_failed"
"""Where the public part notes that the last refresh failed."""


class Unusable(EngineError):
    """A credential cannot be used now. The message is safe to show."""

    code = "credential_unusable"

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class Refresher:
    """Exchanges refresh tokens for access tokens."""

    def __init__(self, database: Database, box: Box, fetcher: Fetcher) -> None:
        self._database = database
        self._box = box
        self._fetcher = fetcher
        self._flights: dict[tuple[UUID, str], asyncio.Task[str]] = {}
        self._busy: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Let exchanges end that have begun: what they bring may be the only refresh token."""
        if not self._busy:
            return
        _, late = await asyncio.wait(self._busy, timeout=_CLOSING_S)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    async def add(self, project_id: UUID, credential_id: str, content: Content) -> Row | None:
        """Keep a new credential whose grant works; None if there is one of this id.

        Raises:
            Invalid: It does not work.
        """
        return await self._to_the_end(self._add(project_id, credential_id, content))

    async def change(self, project_id: UUID, credential_id: str, change: Content) -> Row:
        """Change a credential to a grant that works.

        Raises:
            Invalid: It does not work; all is as it was.
            NotFound: The credential was deleted meanwhile.
            Unready: Somebody refreshes it, and takes too long.
        """
        return await self._to_the_end(self._change(project_id, credential_id, change))

    async def token(self, project_id: UUID, row: Row) -> str:
        """An access token that is good.

        Raises:
            Unusable: There is none to be had now.
        """
        found = self._box.access_token(project_id, row)
        if found is not None and found.is_fresh:
            return found.text
        if _pause_s(row.public) > 0:
            return _kept(row, found)
        key = (project_id, row.id)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._start(self._refresh(project_id, row.id))
            self._flights[key] = flight
            flight.add_done_callback(lambda _: self._flights.pop(key, None))
        return await asyncio.shield(flight)

    # ---- the exchange

    async def _exchanged(self, project_id: UUID, content: Content) -> oauth.Token:
        return await oauth.exchange(self._fetcher, grant(content), owner=project_id.hex)

    async def _add(self, project_id: UUID, credential_id: str, content: Content) -> Row | None:
        try:
            token = await self._exchanged(project_id, content)
        except ExchangeFailed as error:
            raise _refused(error) from None
        parts = self._box.parts_with_token(project_id, credential_id, content, token)
        return await store.add(self._database, project_id, credential_id, content.type, parts)

    async def _change(self, project_id: UUID, credential_id: str, change: Content) -> Row:
        while True:
            claimed = await self._claimed(project_id, credential_id)
            content = self._content(project_id, claimed)
            # How the client says who it is may be another way now.
            content.secret.pop("auth", None)
            content = change.over(content.public, content.secret)
            try:
                token = await self._exchanged(project_id, content)
            except ExchangeFailed as error:
                await store.release(self._database, project_id, claimed, claimed.public)
                raise _refused(error) from None
            parts = self._box.parts_with_token(project_id, credential_id, content, token)
            row = await store.settle(self._database, project_id, claimed, parts, is_update=True)
            if row is not None:
                return row

    async def _claimed(self, project_id: UUID, credential_id: str) -> Row:
        """The credential, taken for an update."""
        deadline = _now() + _PATIENCE_S
        while (row := await store.claim(self._database, project_id, credential_id, _LEASE)) is None:
            if await store.find(self._database, project_id, credential_id) is None:
                raise NotFound(f"Credential '{credential_id}' not found.")
            if _now() > deadline:
                message = f"Credential '{credential_id}' is being refreshed. Try again."
                raise Unready(message, retry_after_s=1)
            await asyncio.sleep(_LOOK_AGAIN_S)
        return row

    async def _refresh(self, project_id: UUID, credential_id: str) -> str:
        deadline = _now() + _PATIENCE_S
        while True:
            claimed = await store.claim(self._database, project_id, credential_id, _LEASE)
            if claimed is not None:
                text = await self._renew(project_id, claimed)
            else:
                text = await self._others(project_id, credential_id)
            if text is not None:
                return text
            if _now() > deadline:
                raise Unusable(
                    "refresh_failed", f"Credential '{credential_id}' is still being refreshed."
                )
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _others(self, project_id: UUID, credential_id: str) -> str | None:
        """What there is while somebody else has the credential."""
        row = check(credential_id, await store.find(self._database, project_id, credential_id))
        found = self._box.access_token(project_id, row)
        return found.text if found is not None and found.is_good else None

    async def _renew(self, project_id: UUID, claimed: Row) -> str | None:
        """Renew a claimed credential's token; None if the credential was changed meanwhile."""
        found = self._box.access_token(project_id, claimed)
        is_fresh = found is not None and found.is_fresh
        if claimed.status != "active" or is_fresh or _pause_s(claimed.public) > 0:
            # Somebody was quicker.
            await store.release(self._database, project_id, claimed, claimed.public)
            check(claimed.id, claimed)
            return _kept(claimed, found)
        content = self._content(project_id, claimed)
        try:
            token = await self._exchanged(project_id, content)
        except ExchangeFailed as error:
            public = claimed.public | {_FAILED: _failure(claimed.public, error.reason)}
            await store.release(self._database, project_id, claimed, public)
            _log.warning("credential.refresh_failed", credential_id=claimed.id, why=error.reason)
            row = check(claimed.id, await store.find(self._database, project_id, claimed.id))
            return _kept(row, self._box.access_token(project_id, row))
        parts = self._box.parts_with_token(project_id, claimed.id, content, token)
        row = await store.settle(self._database, project_id, claimed, parts, is_update=False)
        return None if row is None else token.access_token

    def _content(self, project_id: UUID, row: Row) -> Content:
        public = {name: value for name, value in row.public.items() if name != _FAILED}
        return Content(type=row.type, public=public, secret=self._box.secret(project_id, row))

    # ---- tasks

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name="credential-exchange")
        self._busy.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._busy.discard(task)
        # Who waited for it may be gone: then nobody asks how it ended.
        if not task.cancelled():
            task.exception()

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it also if the caller goes away: an exchange may use the refresh token up."""
        return await asyncio.shield(self._start(work))


def check(credential_id: str, row: Row | None) -> Row:
    """See that a credential may be used.

    Raises:
        Unusable: There is none, or it was revoked.
    """
    if row is None:
        raise Unusable("unknown", f"Credential '{shown(credential_id)}' not found.")
    if row.status != "active":
        raise Unusable("revoked", f"Credential '{credential_id}' is revoked.")
    return row


def _kept(row: Row, found: AccessToken | None) -> str:
    """The token that there is; a new one is not to be had now."""
    if found is not None and found.is_good:
        return found.text
    why: str = row.public.get(_FAILED, {}).get("why", "There is no access token.")
    raise Unusable("refresh_failed", f"Credential '{row.id}' cannot be refreshed. {why}")


def _pause_s(public: Mapping[str, Any]) -> float:
    """How long not to ask again, after a failure."""
    until: float = public.get(_FAILED, {}).get("until", 0.0)
    return min(until - clock.now().timestamp(), _LONGEST_PAUSE_S)


def _failure(public: Mapping[str, Any], why: str) -> dict[str, Any]:
    count: int = public.get(_FAILED, {}).get("count", 0)
    pause_s = min(_FIRST_PAUSE_S * 2 ** min(count, 10), _LONGEST_PAUSE_S)
    return {"why": why, "count": count + 1, "until": clock.now().timestamp() + pause_s}


def _refused(error: ExchangeFailed) -> Invalid:
    return Invalid(f"The OAuth grant gives no access token. {error.reason}")


def _now() -> float:
    return asyncio.get_running_loop().time()
