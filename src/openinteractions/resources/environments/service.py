"""What can be done with environments: made, found, changed, placed with a broker, deleted."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

import orjson
import structlog

from openinteractions import clock, ids
from openinteractions.api import pages
from openinteractions.api.pages import Page
from openinteractions.crypto import Sealer
from openinteractions.db.engine import Database
from openinteractions.db.sealed import environment_purpose
from openinteractions.errors import AppError, Invalid, NotFound, QuotaReached, Unready
from openinteractions.netguard import Fetcher
from openinteractions.resources.credentials import store as credentials
from openinteractions.resources.environments import brokers, sources, store
from openinteractions.resources.environments.schemas import Configuration
from openinteractions.resources.environments.sources import Source, Sources, faults_shown
from openinteractions.resources.environments.store import Environment, NewEnvironment, Place
from openinteractions.resources.environments.usage import Counts
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.egress.policy import Reach, check_network
from openinteractions.wire.environment import named_in, variables
from openinteractions.wire.environments import environment_id, parse_environment_id
from openinteractions.wire.explain import shown
from openinteractions.wire.fields import Json

_log = structlog.get_logger(__name__)

_REMOTE: Final = "remote"
_VARIABLE: Final = "environment_variable"
_BATCH: Final = 100
_KEEP_ROWS: Final = timedelta(days=30)
"""So long the id of an environment that expired still says so."""
_KEEP_UNUSED: Final = timedelta(hours=1)
"""So long one stays that nobody has asked for and nobody has used."""
_TRIES: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the operator has set."""

    ttl: timedelta = timedelta(days=7)
    """An environment expires after so long without use."""
    log_retention: timedelta = timedelta(days=7)
    ceiling: Reach
    """What no request can go beyond."""
    skills_dir: Path | None = None
    gcs_url: str = "https://storage.googleapis.com"
    max_environments: int = 1000
    """Of one project; those that expired, were deleted or were never used do not count."""
    is_off: bool = False
    """`serve` runs no broker here; one may run elsewhere."""


@dataclass(frozen=True, slots=True)
class _Change:
    """A checked configuration, and the sources that it brings."""

    configuration: Configuration
    sources: list[Source]

    def then(self, other: "_Change") -> "_Change":
        """This with another one on top."""
        configuration = self.configuration.changed(other.configuration)
        return _Change(configuration, self.sources + other.sources)


class Environments:
    """The resource's connections to the rest of the house."""

    def __init__(
        self,
        database: Database,
        client: BrokerClient,
        sealer: Sealer,
        fetcher: Fetcher,
        rules: Rules,
    ) -> None:
        """Nothing is opened.

        Args:
            database: Where the rows are.
            client: Reaches the brokers; closed by the caller.
            sealer: Seals network rules and variables.
            fetcher: Reaches what sources name, other than repositories.
            rules: The operator's.
        """
        self.client = client
        self._database = database
        self._sealer = sealer
        self._rules = rules
        self._sources = Sources(client, fetcher, gcs_url=rules.gcs_url)
        self._counts = Counts(database, client)

    # For the routes.

    async def create(self, project_id: UUID, body: Json) -> Environment:
        """Make an environment; without sources it takes no disk yet.

        Raises:
            Invalid: Something in it is wrong; nothing is left behind.
            NotFound: There is nothing to copy.
            QuotaReached: The project has as many as it may.
            Unready: No broker can take its sources.
        """
        if "from_environment" not in body:
            row = await self._make(project_id, await self._checked(project_id, body))
            return await self._counts.of(row) if row.has_disk else row
        for name in ("sources", "env"):
            if body.get(name):
                raise Invalid(f"'{name}' does not go with 'from_environment': it must be empty.")
        parent = await self._usable(project_id, body["from_environment"])
        change = await self._checked(project_id, body)
        if parent.has_disk:
            # The same files: counting those of the copy would have to mount it.
            parent = await self._counts.of(parent)
        return await self._make(project_id, change, parent)

    async def get(self, project_id: UUID, text: str) -> Environment:
        """Find an environment by its public id; it may have expired.

        Raises:
            NotFound: It is absent, deleted, or another project's.
        """
        row = await self._find(project_id, text)
        is_due = (row.is_outdated or row.is_counted_long_ago) and not row.is_expired
        return await self._counts.of(row) if is_due else row

    async def page(self, project_id: UUID, page: Page) -> tuple[Sequence[Environment], str | None]:
        """Environments of a project, newest first, and the token of the next page.

        Raises:
            Invalid: The token is none of this list.
        """
        before = page.after("environments")
        found = await store.page(self._database, project_id, before=before, limit=page.limit)
        rows, last = page.cut(found)
        token = None if last is None else pages.token(last.id, "environments")
        return await self._counts.of_all(rows), token

    async def delete(self, project_id: UUID, text: str) -> None:
        """Delete an environment and its files; at once if its broker answers, else later.

        Raises:
            NotFound: It is absent, deleted, or another project's.
        """
        key = parse_environment_id(text)
        place = None if key is None else await store.delete(self._database, project_id, key)
        if key is None or place is None:
            raise _not_found(text)
        if place.address is not None:
            await self._remove(key, place.address)

    async def open(self, project_id: UUID, text: str) -> tuple[UUID, str]:
        """An environment that is to be used now, and its broker's address.

        Raises:
            NotFound: It is absent, deleted, expired, or another project's.
            QuotaReached: This is its first use, and the project has as many as it may.
            Unready: No broker has it, or can take it.
        """
        row = await self._usable(project_id, text)
        return row.id, await self.locate(row.id)

    async def network_log(self, project_id: UUID, text: str, page: Page) -> bytes:
        """What an environment's sandbox connected to, newest first: a page as JSON.

        Raises:
            NotFound: The environment is absent, deleted, or another project's.
            Invalid: The token is none of this list.
        """
        row = await self._find(project_id, text)
        filters = f"network_log:{row.id.hex}"
        before = page.after(filters)
        found = await store.network_log(
            self._database, project_id, row.id, before=before, limit=page.limit
        )
        events, last = page.cut(found)
        answer: Json = {"events": [_event(dict(event)) for event in events]}
        if last is not None:
            answer["next_page_token"] = pages.token(last["id"], filters)
        return orjson.dumps(answer)

    # For interactions and their runs.

    async def resolve(self, project_id: UUID, value: str | Json) -> UUID:
        """The environment that a valid `environment` of a request means, made or changed by it.

        `"remote"`, and an object without sources, take no disk yet and need no broker.

        Raises:
            Invalid: A source, the network or a variable is wrong; nothing is left behind.
            NotFound: The id is unknown, or its environment has expired.
            QuotaReached: The project has as many as it may.
            Unready: No broker can take its sources.
        """
        if isinstance(value, str):
            if value.lower() == _REMOTE:
                return await self.derive(project_id, None)
            return (await self._asked_for(project_id, value)).id
        changed, copied = named_in(value)
        if changed is None:
            return await self.derive(project_id, copied, change=value)
        row = await self._asked_for(project_id, changed)
        await self._change(row, await self._checked(project_id, value, "environment"))
        return row.id

    async def derive(
        self,
        project_id: UUID,
        parent: str | None,
        base: Json | None = None,
        change: Json | None = None,
        *,
        is_tentative: bool = False,
    ) -> UUID:
        """A new environment: what valid configurations say, one on top of the other.

        Each one's network replaces that of those before it, its variables and sources are added.

        Args:
            project_id: Whose.
            parent: The id of the environment whose files and configuration it begins with; None:
                it begins empty, and without sources takes no disk and needs no broker.
            base: What comes on top of it: an agent's `base_environment`.
            change: What comes on top of both: a call's own `environment`.
            is_tentative: Nobody asked for it: it counts towards the quota from its first use on,
                unless it has files at once.

        Raises:
            Invalid: A source, the network or a variable is wrong; nothing is left behind.
            NotFound: The parent is unknown, has expired, or has lost its files.
            QuotaReached: The project has as many as it may.
            Unready: No broker can take its sources, or the parent's gives no sign of life.
        """
        row = None if parent is None else await self._usable(project_id, parent)
        wanted = _Change(Configuration(), [])
        for config, place in ((base, "base_environment"), (change, "environment")):
            if config:
                wanted = wanted.then(await self._checked(project_id, config, place))
        return (await self._make(project_id, wanted, row, is_tentative=is_tentative)).id

    async def inherit(self, project_id: UUID, environment: UUID) -> UUID:
        """The environment of an interaction, for the one that continues it.

        Raises:
            NotFound: It was deleted or has expired.
        """
        row = await self._usable(project_id, environment_id(environment))
        if row.is_tentative:
            # It must last until the run that is about to be made holds it.
            await self.touch(row.id)
        return row.id

    async def was_used(self, project_id: UUID, environment: UUID) -> bool:
        """Whether something is lost with an environment that is gone; a guess after 30 days."""
        return await store.was_used(self._database, project_id, environment)

    async def check(self, project_id: UUID, value: str | Json) -> None:
        """See that a valid `base_environment` could be had, as far as can be told from here.

        Raises:
            Invalid: A source, the network or a variable is wrong.
            NotFound: The id is unknown, or its environment has expired.
        """
        if isinstance(value, str):
            if value.lower() != _REMOTE:
                await self._usable(project_id, value)
            return
        changed, copied = named_in(value)
        parent = changed or copied
        if parent is not None:
            await self._usable(project_id, parent)
        await self._checked(project_id, value, "base_environment")

    async def discard(self, project_id: UUID, environment: UUID) -> None:
        """Take back an environment that was made for something which then failed."""
        place = await store.delete(self._database, project_id, environment)
        if place is not None and place.address is not None:
            await self._remove(environment, place.address)

    async def locate(self, environment: UUID) -> str:
        """The address of the broker that has an environment; one that nobody has yet is placed.

        Raises:
            NotFound: It is absent, deleted or expired.
            QuotaReached: This is its first use, and the project has as many as it may.
            Unready: No broker is there, or not the one that has it.
        """
        place = await store.locate(self._database, environment)
        if place is not None and place.is_tentative:
            await self._claim(environment)
        if place is not None and (place.broker is None or place.is_stale):
            place = await store.place(self._database, environment, ttl=self._rules.ttl)
        if place is None:
            raise _not_found(environment_id(environment))
        if place.broker is None:
            raise await brokers.missing(self._database, is_off=self._rules.is_off)
        if place.address is None:
            raise _is_away(place)
        if not place.has_disk:
            with faults_shown():
                # The broker notes that it has a disk now.
                await self.client.ensure(place.address, environment)
        return place.address

    async def has_files(self, environment: UUID) -> bool:
        """Whether an environment has a disk yet; looking makes none.

        Raises:
            NotFound: It is absent, deleted or expired.
        """
        place = await store.locate(self._database, environment)
        if place is None:
            raise _not_found(environment_id(environment))
        return place.has_disk

    async def network_of(self, project_id: UUID, environment: UUID) -> str | Json | None:
        """An environment's `network` as it is now, with its secrets; None: it says nothing.

        Raises:
            NotFound: It is absent, deleted, expired, or another project's.
        """
        row = await self._usable(project_id, environment_id(environment))
        return self._configuration(row).network

    async def require_broker(self) -> None:
        """Refuse what needs a sandbox, where none can be had.

        Raises:
            Invalid: This server has none, and none will come.
            Unready: There is no broker, or none that can start sandboxes; the message says why.
        """
        count, problem = await store.readiness(self._database)
        if not count:
            raise await brokers.missing(self._database, is_off=self._rules.is_off)
        if problem is not None:
            raise Unready(f"No sandbox can be started: {problem}", retry_after_s=5)

    async def touch(self, environment: UUID) -> None:
        """Note that an environment is in use, at most once a minute: it then lives on."""
        await store.touch(self._database, environment, ttl=self._rules.ttl)

    # For the upkeep.

    async def expire(self) -> int:
        """Let environments that were not used for long expire, and remove what is left of others.

        Returns:
            How many expired.
        """
        count = 0
        unused = min(_KEEP_UNUSED, self._rules.ttl)
        while expired := await store.expire(self._database, unused=unused, limit=_BATCH):
            count += len(expired)
        after: UUID | None = None
        while left := await store.left_behind(self._database, after=after, limit=_BATCH):
            for environment, address in left:
                await self._remove(environment, address)
            after = left[-1][0]
        await store.clean(self._database, keep_rows=_KEEP_ROWS, keep_logs=self._rules.log_retention)
        if count:
            _log.info("environments.expired", environments=count)
        return count

    # Inside.

    async def _find(self, project_id: UUID, text: str) -> Environment:
        key = parse_environment_id(text)
        row = None if key is None else await store.get(self._database, project_id, key)
        if row is None:
            raise _not_found(text)
        return row

    async def _usable(self, project_id: UUID, text: str) -> Environment:
        row = await self._find(project_id, text)
        if row.is_expired:
            raise NotFound(f"Environment '{shown(text)}' has expired.")
        return row

    async def _asked_for(self, project_id: UUID, text: str) -> Environment:
        """One that a request names: from now on it is somebody's."""
        row = await self._usable(project_id, text)
        if row.is_tentative:
            await self._claim(row.id)
        return row

    async def _claim(self, environment: UUID) -> None:
        most = self._rules.max_environments
        if not await store.claim(self._database, environment, most=most):
            raise _full(most)

    async def _checked(self, project_id: UUID, body: Json, place: str = "") -> _Change:
        """What a request asks for, at a place of it, as far as it can be known to be possible."""
        given = body.get("sources", [])
        found = await asyncio.to_thread(
            sources.checked,
            given,
            skills_dir=self._rules.skills_dir,
            where=f"{place}.sources" if place else "sources",
        )
        wanted = Configuration(
            sources.public(given), body.get("network"), variables(body.get("env", {}))
        )
        check_network(wanted.network, self._rules.ceiling)
        await self._check_credentials(project_id, wanted)
        return _Change(wanted, found)

    async def _check_credentials(self, project_id: UUID, wanted: Configuration) -> None:
        for given, where, is_variable in wanted.credentials:
            name = given.removeprefix("credentials/")
            row = await credentials.find(self._database, project_id, name)
            if row is None:
                raise Invalid(f"Credential '{shown(name)}' at '{where}' does not exist.")
            if is_variable != (row.type == _VARIABLE):
                fit = f"one of type {_VARIABLE}" if is_variable else f"no {_VARIABLE}"
                raise Invalid(
                    f"Credential '{shown(name)}' at '{where}' is of type {row.type}: "
                    f"expected {fit}."
                )

    async def _make(
        self,
        project_id: UUID,
        change: _Change,
        parent: Environment | None = None,
        *,
        is_tentative: bool = False,
    ) -> Environment:
        wanted, copied = change.configuration, None
        if parent is not None:
            wanted = self._configuration(parent).changed(wanted)
            if parent.has_disk:
                copied = parent
            else:
                await self.touch(parent.id)
        address = None if copied is None else await self.locate(copied.id)
        is_empty = copied is None and not change.sources
        row = await self._insert(project_id, wanted, copied, is_tentative=is_tentative and is_empty)
        if is_empty:
            return row
        try:
            address = address or await self.locate(row.id)
            if copied is not None:
                with faults_shown():
                    await self.client.ensure(address, row.id, source=copied.id)
            await self._sources.put(address, row.id, change.sources)
        except BaseException:
            await asyncio.shield(self.discard(project_id, row.id))
            raise
        return replace(row, has_disk=True)

    async def _insert(
        self,
        project_id: UUID,
        wanted: Configuration,
        copied: Environment | None,
        *,
        is_tentative: bool,
    ) -> Environment:
        key = ids.uuid7()
        new = NewEnvironment(
            id=key,
            project_id=project_id,
            public=wanted.public(),
            sealed=self._seal(project_id, key, wanted),
            broker=None if copied is None else copied.broker,
            # Known before there are any: a write after the copy would wait for the copy's own.
            file_count=0 if copied is None else copied.file_count,
            size_bytes=0 if copied is None else copied.size_bytes,
            is_tentative=is_tentative,
        )
        most = self._rules.max_environments
        row = await store.create(self._database, new, ttl=self._rules.ttl, most=most)
        if row is None:
            raise _full(most)
        return row

    async def _change(self, row: Environment, change: _Change) -> None:
        """Give an environment another configuration, and more files."""
        if change.configuration == Configuration():
            return
        before, changed = await self._configure(row, change.configuration)
        try:
            if changed.has_disk:
                with faults_shown():
                    await self.client.refresh(await self.locate(row.id), row.id)
            if change.sources:
                address = await self.locate(row.id)
                await self._sources.put(address, row.id, change.sources, is_new=False)
        except BaseException:
            await asyncio.shield(self._restore(changed, before))
            raise

    async def _configure(
        self, row: Environment, wanted: Configuration
    ) -> tuple[Configuration, Environment]:
        """The configuration before the change, and the row after it."""
        text = environment_id(row.id)
        for _ in range(_TRIES):
            before = self._configuration(row)
            changed = await self._write(row, before.changed(wanted))
            if changed is not None:
                return before, changed
            row = await self._usable(row.project_id, text)
        raise Unready("The environment is being changed by others.", retry_after_s=1)

    async def _restore(self, changed: Environment, before: Configuration) -> None:
        """Take a change back, unless somebody else has made another one since."""
        if await self._write(changed, before) is not None and changed.has_disk:
            with contextlib.suppress(AppError):
                await self.client.refresh(await self.locate(changed.id), changed.id)

    async def _write(self, row: Environment, wanted: Configuration) -> Environment | None:
        sealed = self._seal(row.project_id, row.id, wanted)
        return await store.configure(self._database, row, public=wanted.public(), sealed=sealed)

    def _seal(self, project_id: UUID, key: UUID, wanted: Configuration) -> bytes:
        return self._sealer.seal(wanted.secret(), purpose=environment_purpose(project_id, key))

    def _configuration(self, row: Environment) -> Configuration:
        sealed = row.sealed
        if sealed is not None:
            purpose = environment_purpose(row.project_id, row.id)
            sealed = self._sealer.open(sealed, purpose=purpose)
        return Configuration.read(row.public, sealed)

    async def _remove(self, environment: UUID, address: str) -> None:
        """Have a broker delete the files of one that is gone; if it fails, the upkeep does so."""
        try:
            await self.client.delete(address, environment)
            await store.set_disk(self._database, environment, has_disk=False)
        except AppError as error:
            _log.warning(
                "environment.not_removed", environment_id=environment.hex, error=error.message
            )


def shown_environment(row: Environment) -> Json:
    """An environment as the contract shows it."""
    answer: Json = {
        "id": environment_id(row.id),
        "status": "expired" if row.is_expired else "active",
        "created": clock.rfc3339(row.created_at),
        "updated": clock.rfc3339(row.updated_at),
        "last_accessed": clock.rfc3339(row.accessed_at),
        "file_count": str(row.file_count),
        "size_bytes": str(row.size_bytes),
    }
    if row.expires_at is not None:
        answer["expires"] = clock.rfc3339(row.expires_at)
    return answer | orjson.loads(row.public or b"{}")


def _event(row: Json) -> Json:
    answer: Json = {"id": row.pop("id").hex, "time": clock.rfc3339(row.pop("at"))}
    for name in ("bytes_up", "bytes_down"):
        row[name] = str(row[name])
    return answer | {name: value for name, value in row.items() if value is not None}


def _full(most: int) -> QuotaReached:
    return QuotaReached(
        f"The project has {most} environments, and may have no more (setting "
        "sandbox.max_environments): delete some, or wait until unused ones expire."
    )


def _not_found(text: str) -> NotFound:
    return NotFound(f"Environment '{shown(text)}' not found.")


def _is_away(place: Place) -> Unready:
    return Unready(
        f"The sandbox broker '{place.broker}', which has this environment's files, gives no sign "
        "of life. Its operator has to start it again.",
        retry_after_s=1,
    )
