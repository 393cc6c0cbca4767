"""What can be done with custom agents: made, read, changed in versions, called, deleted."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast
from uuid import UUID
from weakref import WeakValueDictionary

import orjson
import structlog

from openinteractions import clock
from openinteractions.api import pages
from openinteractions.api.pages import Page
from openinteractions.crypto import Sealer
from openinteractions.db.engine import Database
from openinteractions.db.sealed import agent_purpose
from openinteractions.errors import Conflict, Invalid, NotFound, Unready
from openinteractions.resources.agents import store
from openinteractions.resources.agents.store import NewVersion, Version
from openinteractions.resources.credentials import store as credentials
from openinteractions.resources.environments.service import Environments
from openinteractions.wire.agents import Change, parse_name, public
from openinteractions.wire.environment import named_in
from openinteractions.wire.explain import shown
from openinteractions.wire.fields import Json

_log = structlog.get_logger(__name__)

MAX_AGENTS: Final = 1000
"""Of one project."""
MAX_BYTES: Final = 512 * 1024
"""Of what is shown of a definition, as JSON: lists hold many."""
_TRIES: Final = 5
_REMOTE: Final = "remote"
_VARIABLE: Final = "environment_variable"
_SECRET_FIELDS: Final = ("tools", "base_environment")
_PAGES: Final = {"resource": "agents"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """One version of an agent, for a call of it."""

    id: str
    version: int
    base_agent: str
    description: str | None = None
    system_instruction: str | None = None
    """To be added to the base agent's own."""
    agent_config: Json = field(default_factory=dict[str, Any])
    """Of the type `antigravity` or `dynamic`; empty: none was given."""
    tools: list[Json] | None = field(default=None, repr=False)
    """With their secrets. None: the base agent's own; empty: none."""
    base_environment: str | Json | None = field(default=None, repr=False)
    """With its secrets."""
    template: UUID | None = None
    """The environment that calls get copies of, where one was made already."""


class Agents:
    """Keeps custom agents."""

    def __init__(self, database: Database, sealer: Sealer, environments: Environments) -> None:
        self._database = database
        self._sealer = sealer
        self._environments = environments
        self._making: WeakValueDictionary[tuple[UUID, str, int], asyncio.Lock] = (
            WeakValueDictionary()
        )

    # For the routes.

    async def create(self, project_id: UUID, agent_id: str, definition: Json) -> bytes:
        """Keep a new agent; it as JSON.

        Args:
            project_id: Whose.
            agent_id: A valid id.
            definition: A valid one, with its secrets.

        Raises:
            Conflict: There is one of this id.
            Invalid: The project has as many as it may; or something that the definition names is
                not there, or cannot be had.
            NotFound: The base environment is not there.
        """
        for _ in range(_TRIES):
            found = await store.standing(self._database, project_id, agent_id, most=MAX_AGENTS)
            if found.lives:
                raise Conflict(f"Agent '{agent_id}' already exists.")
            if found.count >= MAX_AGENTS:
                raise Invalid(
                    f"The project has {MAX_AGENTS} agents, and may have no more: delete some."
                )
            await self._check(project_id, definition)
            new = self._new(project_id, agent_id, found.last_version + 1, definition)
            if await store.create(self._database, new):
                _log.info("agent.created", agent_id=agent_id, version=new.version)
                return await self.get(project_id, agent_id)
        raise _busy(agent_id)

    async def get(self, project_id: UUID, text: str) -> bytes:
        """An agent as JSON: the current version, or the one that `id@3` pins.

        Raises:
            NotFound: The project has none of this id, or no such version of it.
        """
        return orjson.dumps(_shown(await self._find(project_id, text)))

    async def listing(self, project_id: UUID, page: Page) -> bytes:
        """One page of a project's agents, newest first, as JSON.

        Raises:
            Invalid: The token is none of this list.
        """
        before = page.after_moment(_PAGES)
        found = await store.page(self._database, project_id, before=before, limit=page.limit)
        rows, last = page.cut(found)
        answer: Json = {"agents": [_shown(row) for row in rows]}
        if last is not None:
            mark = pages.moment_token(last.created_at, last.agent_id, _PAGES)
            answer["next_page_token"] = mark
        return orjson.dumps(answer)

    async def versions(self, project_id: UUID, text: str, page: Page) -> bytes:
        """One page of an agent's versions, newest first, as JSON.

        Raises:
            NotFound: The project has none of this id.
            Invalid: The token is none of this list.
        """
        agent_id = (await self._find(project_id, text)).agent_id
        filters = {"resource": "agent_versions", "agent": agent_id}
        before = page.after_number(filters)
        found = await store.versions(
            self._database, project_id, agent_id, before=before, limit=page.limit
        )
        rows, last = page.cut(found)
        answer: Json = {"agent_versions": [_shown(row) for row in rows]}
        if last is not None:
            answer["next_page_token"] = pages.text_token(str(last.version), filters)
        return orjson.dumps(answer)

    async def update(self, project_id: UUID, agent_id: str, change: Change) -> bytes:
        """Make a new version of an agent, unless nothing changes; the agent as JSON.

        Raises:
            NotFound: The project has none of this id, or the base environment is not there.
            Invalid: Something that the definition names is not there, or cannot be had; or the
                change was made from an older answer.
        """
        if "@" in agent_id:
            raise Invalid("A version cannot be changed: leave '@' and what follows out.")
        for _ in range(_TRIES):
            row = await self._find(project_id, agent_id)
            change.check(_shown(row))
            before = self._opened(project_id, row)
            definition = change.over(before)
            if definition == before:
                return orjson.dumps(_shown(row))
            await self._check(project_id, {name: definition[name] for name in change.given})
            keeps = definition.get("base_environment") == before.get("base_environment")
            template = row.template_id if keeps else None
            new = self._new(project_id, agent_id, row.version + 1, definition, template=template)
            if await store.change(self._database, new):
                _log.info("agent.updated", agent_id=agent_id, version=new.version)
                return await self.get(project_id, f"{agent_id}@{new.version}")
        raise _busy(agent_id)

    async def delete(self, project_id: UUID, text: str) -> None:
        """Delete an agent with all its versions; what its calls have made stays.

        Raises:
            NotFound: The project has none of this id.
            Invalid: It is the id of a version.
        """
        agent_id, version = parse_name(text) or (text, None)
        if version is not None:
            raise Invalid("A version cannot be deleted: leave '@' and what follows out.")
        templates = await store.delete(self._database, project_id, agent_id)
        if templates is None:
            raise _missing(text)
        _log.info("agent.deleted", agent_id=agent_id)
        for template in templates:
            await self._environments.discard(project_id, template)

    # For interactions.

    async def find(self, project_id: UUID, text: str) -> Definition:
        """The definition that `id`, or `id@3` for a version, means.

        Raises:
            NotFound: The project has none of this id, or no such version of it.
        """
        row = await self._find(project_id, text)
        definition = self._opened(project_id, row)
        return Definition(
            id=row.agent_id, version=row.version, template=row.template_id, **definition
        )

    async def environment_for(
        self, project_id: UUID, definition: Definition, override: str | Json | None
    ) -> UUID:
        """The environment of a call of an agent, made where it is not one that is named.

        A call that names none, or `"remote"`, gets a copy of the agent's base environment, so that
        each one starts clean. A configuration without an environment's id goes on top of that copy:
        its network replaces the agent's, its sources and variables are added.

        Args:
            project_id: Whose.
            definition: The agent's.
            override: The call's own valid `environment`; None: it has none.

        Raises:
            Invalid: A source, the network or a variable is wrong; nothing is left behind.
            NotFound: The environment that is named, or that is to be copied, is not there.
            QuotaReached: The project has as many as it may.
            Unready: No broker can make it.
        """
        if isinstance(override, str) and override.lower() != _REMOTE:
            return await self._environments.resolve(project_id, override)
        change = override if isinstance(override, dict) else {}
        if any(named_in(change)):
            return await self._environments.resolve(project_id, change)
        base = definition.base_environment
        config = base if isinstance(base, dict) else {}
        changed, copied = named_in(config)
        parent = changed or copied
        if isinstance(base, str) and base.lower() != _REMOTE:
            parent = base
        if parent is None and config.get("sources"):
            return await self._copy(project_id, definition, config, change)
        try:
            return await self._environments.derive(
                project_id, parent, config, change, is_tentative=override is None
            )
        except NotFound as error:
            raise NotFound(
                f"The base environment of agent '{definition.id}' is gone: {error.message} "
                "Give the agent another one."
            ) from error

    # Inside.

    async def _copy(
        self, project_id: UUID, definition: Definition, config: Json, change: Json
    ) -> UUID:
        """A copy of the environment that was made from a definition's sources once."""
        template, worn = definition.template, None
        for _ in range(_TRIES):
            if template is None:
                template = await self._template(project_id, definition, config, worn)
            try:
                return await self._environments.derive(project_id, template.hex, change=change)
            except NotFound:
                # It has expired, was deleted, or its broker has lost it: another one, then.
                template, worn = None, template
        raise _busy(definition.id)

    async def _template(
        self, project_id: UUID, definition: Definition, config: Json, worn: UUID | None
    ) -> UUID:
        """The template of a version, made anew where it has none but one that is worn out.

        Several processes may make one at once: the first that is noted stays.
        """
        key = (project_id, definition.id, definition.version)
        lock = self._making.setdefault(key, asyncio.Lock())
        async with lock:
            row = await self._find(project_id, f"{definition.id}@{definition.version}")
            if row.template_id is not None and row.template_id != worn:
                return row.template_id
            made = await self._environments.derive(project_id, None, config)
            try:
                is_noted = await store.set_template(self._database, project_id, row, made)
            except BaseException:
                await asyncio.shield(self._environments.discard(project_id, made))
                raise
            if is_noted:
                if worn is not None:
                    await self._environments.discard(project_id, worn)
                return made
            await self._environments.discard(project_id, made)
            row = await self._find(project_id, f"{definition.id}@{definition.version}")
            if row.template_id is None:
                raise _busy(definition.id)
            return row.template_id

    async def _find(self, project_id: UUID, text: str) -> Version:
        name = parse_name(text)
        row = None if name is None else await store.find(self._database, project_id, *name)
        if row is None:
            raise _missing(text)
        return row

    async def _check(self, project_id: UUID, definition: Json) -> None:
        """See that what a definition names is there, as far as can be told before a call."""
        environment: str | Json | None = definition.get("base_environment")
        if environment is not None:
            await self._environments.check(project_id, environment)
        for index, tool in enumerate(cast("Sequence[Json]", definition.get("tools", ()))):
            if "credential" in tool:
                where = f"tools[{index}].credential"
                await self._check_credential(project_id, tool["credential"], where)

    async def _check_credential(self, project_id: UUID, given: str, where: str) -> None:
        name = given.removeprefix("credentials/")
        row = await credentials.find(self._database, project_id, name)
        if row is None:
            raise Invalid(f"Credential '{shown(name)}' at '{where}' does not exist.")
        if row.type == _VARIABLE:
            raise Invalid(
                f"Credential '{shown(name)}' at '{where}' is of type {row.type}: "
                f"expected no {_VARIABLE}."
            )

    def _new(
        self,
        project_id: UUID,
        agent_id: str,
        version: int,
        definition: Json,
        *,
        template: UUID | None = None,
    ) -> NewVersion:
        visible = public(definition)
        shown_bytes = orjson.dumps(visible)
        if len(shown_bytes) > MAX_BYTES:
            raise Invalid(
                f"The definition has more than {MAX_BYTES} bytes, not counting contents of files."
            )
        sealed = None
        if visible != definition:
            secret = {name: definition[name] for name in _SECRET_FIELDS if name in definition}
            purpose = agent_purpose(project_id, agent_id, version)
            sealed = self._sealer.seal(orjson.dumps(secret), purpose=purpose)
        return NewVersion(
            project_id=project_id,
            agent_id=agent_id,
            version=version,
            public=shown_bytes,
            sealed=sealed,
            template_id=template,
        )

    def _opened(self, project_id: UUID, row: Version) -> Json:
        """A version's definition, with its secrets."""
        definition: Json = orjson.loads(row.public)
        if row.sealed is not None:
            purpose = agent_purpose(project_id, row.agent_id, row.version)
            definition |= orjson.loads(self._sealer.open(row.sealed, purpose=purpose))
        return definition


def _shown(row: Version) -> Json:
    return {
        "id": row.agent_id,
        **orjson.loads(row.public),
        "version": row.version,
        "created": clock.rfc3339(row.created_at),
        "updated": clock.rfc3339(row.updated_at),
    }


def _missing(text: str) -> NotFound:
    return NotFound(f"Agent '{shown(text)}' not found.")


def _busy(agent_id: str) -> Unready:
    return Unready(f"Agent '{agent_id}' is being changed by others.", retry_after_s=1)
