"""What a run works with: its tools, connected, and what its environment's files tell it."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from openinteractions.errors import RequestError
from openinteractions.loop.spec import RunSpec
from openinteractions.models.port import Json, Warning  # noqa: A004 - the contract's word
from openinteractions.resources.environments.service import Environments
from openinteractions.runs.agents import guidance, prompt
from openinteractions.runs.agents.guidance import Guidance, Note
from openinteractions.runs.web import Reaches
from openinteractions.runs.workplace import RemoteWorkplace
from openinteractions.tools.hooks import hooked
from openinteractions.tools.port import McpServer, Means, Web, Workplace
from openinteractions.tools.toolbox import Toolbox, toolbox
from openinteractions.wire.environments import environment_id

if TYPE_CHECKING:
    from openinteractions.runs.mcp import McpServers

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Whose tools they are."""

    spec: RunSpec
    project_id: UUID
    interaction_id: UUID
    environment_id: UUID | None
    epoch: int
    secrets: Json | None
    is_stored: bool = True
    is_ending: bool = False
    """It is not to go on: what is open is only closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """One run's tools and instructions."""

    spec: RunSpec
    """With what the environment's files add to the instructions."""
    tools: Toolbox
    failure: RequestError | None = None
    """Why the run cannot go on: the files of its environment cannot be read."""
    warnings: Sequence[Warning] = ()
    """What of the environment's files was left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """What all runs of this process draw on."""

    sandboxes: Environments
    web: Reaches
    mcp: Callable[[], Awaitable["McpServers"]]
    """Loaded where a request names such a server."""

    @asynccontextmanager
    async def kit(self, run: Run) -> AsyncGenerator[Kit]:
        """A run's tools, while the context lasts."""
        spec = run.spec
        if not spec.own_tools and not spec.guided:
            yield Kit(spec=spec, tools=Toolbox({}))
            return
        place = self._workplace(run)
        found, failure = await self._guidance(run, place)
        async with self._servers(run) as servers:
            means = Means(workplace=place, web=self._web(run), servers=servers)
            tools = toolbox(spec.own_tools, means)
            if found.hooks and run.environment_id is not None:
                public = environment_id(run.environment_id)
                tools = Toolbox(
                    hooked(tools.all(), found.hooks, workplace=place, environment_id=public)
                )
            if spec.system is not None:
                spec = replace(spec, system=prompt.guided(spec.system, found))
            warnings = [_warning(note) for note in found.notes]
            yield Kit(spec=spec, tools=tools, failure=failure, warnings=warnings)

    @asynccontextmanager
    async def _servers(self, run: Run) -> AsyncGenerator[Mapping[str, McpServer]]:
        """The MCP servers that the run's tools belong to, by name."""
        entries = run.spec.own_tools
        if not any(entry["type"] == "mcp_server" for entry in entries):
            yield {}
            return
        mcp = await self.mcp()
        async with mcp.servers(run.project_id, entries, run.secrets) as servers:
            yield servers

    async def _guidance(
        self, run: Run, place: Workplace | None
    ) -> tuple[Guidance, RequestError | None]:
        """What the environment's files say; or why they cannot be read."""
        if not run.spec.guided or place is None or run.is_ending:
            return Guidance(), None
        try:
            found = await guidance.read(place)
        except RequestError as error:
            return Guidance(), error
        if run.spec.approve:
            found = guidance.supervised(found, run.spec.approve)
        for note in found.notes:
            # A hook that is left out stops nothing, which somebody may rely on.
            log = _log.warning if note.about == "hooks" else _log.info
            log(
                "guidance.left_out",
                interaction_id=run.interaction_id.hex,
                about=note.about,
                reason=note.text,
            )
        return found, None

    def _workplace(self, run: Run) -> Workplace | None:
        if run.environment_id is None:
            return None
        return RemoteWorkplace(
            sandboxes=self.sandboxes,
            environment_id=run.environment_id,
            interaction_id=run.interaction_id,
            epoch=run.epoch,
            is_stored=run.is_stored,
        )

    def _web(self, run: Run) -> Web:
        """The web within the rules of the run's environment."""
        environment = run.environment_id
        if environment is None:
            return self.web.web(owner=run.project_id.hex)
        return self.web.web(
            lambda: self.sandboxes.network_of(run.project_id, environment),
            owner=run.project_id.hex,
        )


def _warning(note: Note) -> Warning:
    return Warning("guidance_left_out", f"environment.{note.about}", note.text)
