"""Credentials: kept encrypted, given to the egress proxy only."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import orjson
import structlog

from openinteractions import clock
from openinteractions.api import pages
from openinteractions.api.pages import Page
from openinteractions.crypto import Sealer
from openinteractions.db.engine import Database
from openinteractions.errors import Conflict, Invalid, NotFound, SetupError
from openinteractions.netguard import Fetcher
from openinteractions.resources.credentials import store
from openinteractions.resources.credentials.box import Box
from openinteractions.resources.credentials.refresh import Refresher, Unusable, check
from openinteractions.resources.credentials.store import Row
from openinteractions.wire.credentials import Content, is_credential_id
from openinteractions.wire.explain import shown

_log = structlog.get_logger(__name__)

_PREFIX = "credentials/"
_PAGES = {"resource": "credentials"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderInjection:
    """A header to set in requests for the host that the credential was given for."""

    credential_id: str
    header_name: str
    prefix: str
    """Before the token, with a blank between them; empty: the token alone."""
    token: str = field(repr=False)

    @property
    def value(self) -> str:
        """The header's value."""
        return f"{self.prefix} {self.token}" if self.prefix else self.token


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceholderInjection:
    """A value to put in the place of its placeholder."""

    credential_id: str
    value: str = field(repr=False)
    locations: frozenset[str]
    """Of `header`, `query` and `body`; a placeholder elsewhere: the request is to be refused."""
    trusted_domains: tuple[str, ...] | None
    """Exact hosts, `*.example.com` or `*`; a placeholder on its way elsewhere: the same. None: the
    credential names no hosts."""

    @property
    def placeholder(self) -> str:
        """What stands for the value inside the sandbox."""
        return placeholder(self.credential_id)


Injection: TypeAlias = HeaderInjection | PlaceholderInjection


def placeholder(credential_id: str) -> str:
    """What stands for a credential's value inside a sandbox."""
    return f"__GEMINI_CRED_{_bare(credential_id)}__"


class Vault:
    """Keeps credentials, and says what the egress proxy does with them."""

    def __init__(self, database: Database, sealer: Sealer, fetcher: Fetcher) -> None:
        self._database = database
        self._box = Box(sealer)
        self._refresher = Refresher(database, self._box, fetcher)

    async def close(self) -> None:
        """Let exchanges end that have begun."""
        await self._refresher.close()

    async def create(self, project_id: UUID, wanted: str | None, content: Content) -> bytes:
        """Keep a new credential; it as JSON.

        Args:
            project_id: Whose.
            wanted: Its id; None: one is made up.
            content: What it is made of.

        Raises:
            Conflict: There is one of this id.
            Invalid: The token URL of an oauth2 one gives no access token.
        """
        name = wanted or str(uuid4())
        row = None
        if content.type != "oauth2":
            parts = self._box.parts(project_id, name, content)
            row = await store.add(self._database, project_id, name, content.type, parts)
        # Looked for first: an exchange may use the refresh token up.
        elif await store.find(self._database, project_id, name) is None:
            row = await self._refresher.add(project_id, name, content)
        if row is None:
            raise Conflict(f"Credential '{name}' already exists.")
        _log.info("credential.created", credential_id=name, type=row.type)
        return orjson.dumps(_shown(row))

    async def get(self, project_id: UUID, credential_id: str) -> bytes:
        """A credential as JSON.

        Raises:
            NotFound: The project has none of this id.
        """
        return orjson.dumps(_shown(await self._find(project_id, credential_id)))

    async def listing(self, project_id: UUID, page: Page) -> bytes:
        """One page of a project's credentials, newest first, as JSON."""
        before = page.after_moment(_PAGES)
        found = await store.page(self._database, project_id, before=before, limit=page.limit)
        rows, last = page.cut(found)
        answer: dict[str, Any] = {"credentials": [_shown(row) for row in rows]}
        if last is not None:
            answer["next_page_token"] = pages.moment_token(last.created_at, last.id, _PAGES)
        return orjson.dumps(answer)

    async def update(self, project_id: UUID, credential_id: str, change: Content) -> bytes:
        """Change a credential; it as JSON.

        Raises:
            NotFound: The project has none of this id.
            Invalid: It is of another type, or the outcome makes no sense, or the token URL of an
                oauth2 one gives no access token any more.
            Unready: Somebody refreshes it, and takes too long.
        """
        row = await self._find(project_id, credential_id)
        if row.type != change.type:
            raise Invalid(
                f"Invalid value at 'type': credential '{row.id}' is of type '{row.type}', and that "
                "cannot be changed."
            )
        if change.public or change.secret:
            if row.type == "oauth2":
                row = await self._refresher.change(project_id, row.id, change)
            else:
                row = await self._changed(project_id, row, change)
            _log.info("credential.updated", credential_id=row.id, type=row.type)
        return orjson.dumps(_shown(row))

    async def delete(self, project_id: UUID, credential_id: str) -> None:
        """Delete a credential: from then on it is not injected any more.

        Raises:
            NotFound: The project has none of this id.
        """
        row = await self._find(project_id, credential_id)
        if not await store.delete(self._database, project_id, row.id):
            raise _missing(row.id)
        _log.info("credential.deleted", credential_id=row.id)

    async def injection(self, project_id: UUID, credential_id: str) -> Injection:
        """What to do to a request, as of now: read anew each time, so that changes take effect.

        Raises:
            Unusable: There is no such credential, or no access token is to be had.
        """
        name = _bare(credential_id)
        row = None
        if is_credential_id(name):
            row = await store.find(self._database, project_id, name)
        row = check(name, row)
        try:
            return await self._injection(project_id, row)
        except SetupError as error:
            _log.error("credential.unreadable", credential_id=name, why=error.message)
            message = f"Credential '{name}' cannot be read: the server's log has the reason."
            raise Unusable("unreadable", message) from error

    async def _injection(self, project_id: UUID, row: Row) -> Injection:
        if row.type == "oauth2":
            return HeaderInjection(
                credential_id=row.id,
                header_name="Authorization",
                prefix="Bearer",
                token=await self._refresher.token(project_id, row),
            )
        secret = self._box.secret(project_id, row)
        if row.type == "bearer_token":
            return HeaderInjection(
                credential_id=row.id,
                header_name=row.public["header_name"],
                prefix=row.public["prefix"],
                token=secret["token"],
            )
        domains: list[str] | None = row.public.get("trusted_domains")
        return PlaceholderInjection(
            credential_id=row.id,
            value=secret["value"],
            locations=frozenset(row.public["injection_location"]),
            trusted_domains=None if domains is None else tuple(domains),
        )

    async def _changed(self, project_id: UUID, row: Row, change: Content) -> Row:
        while True:
            content = change.over(row.public, self._box.secret(project_id, row))
            parts = self._box.parts(project_id, row.id, content)
            written = await store.replace(self._database, project_id, row, parts)
            if written is not None:
                return written
            # Somebody else changed it in between: on top of that, then.
            row = await self._find(project_id, row.id)

    async def _find(self, project_id: UUID, credential_id: str) -> Row:
        name = _bare(credential_id)
        row = None
        if is_credential_id(name):
            row = await store.find(self._database, project_id, name)
        if row is None:
            raise _missing(name)
        return row


def _bare(credential_id: str) -> str:
    return credential_id.removeprefix(_PREFIX)


def _missing(name: str) -> NotFound:
    return NotFound(f"Credential '{shown(name)}' not found.")


def _shown(row: Row) -> dict[str, str]:
    return {
        "id": row.id,
        "type": row.type,
        "status": row.status,
        "create_time": clock.rfc3339(row.created_at),
        "update_time": clock.rfc3339(row.updated_at),
    }
