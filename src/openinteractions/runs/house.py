"""Everything that runs in this process share."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from openinteractions.crypto import Sealer
from openinteractions.db.engine import Database
from openinteractions.errors import Invalid, NotFound, Unready
from openinteractions.events.follow import Hub
from openinteractions.events.log import Writer
from openinteractions.jobs.runner import Member
from openinteractions.loop.ports import Journal, Patience, Ports
from openinteractions.loop.spec import Limits
from openinteractions.models.catalog import Catalog
from openinteractions.models.port import Json
from openinteractions.netguard import Fetcher
from openinteractions.resources.agents.service import Agents
from openinteractions.resources.environments.service import Environments
from openinteractions.runs.assign import Powers
from openinteractions.runs.equip import Equipment
from openinteractions.runs.history import Cache, Inliner, LineHistory, Ready
from openinteractions.runs.purse import DayPurse
from openinteractions.runs.store import Line
from openinteractions.tools.toolbox import Toolbox


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """The connections of the execution wing."""

    database: Database
    hub: Hub
    writer: Writer
    member: Member
    catalog: Catalog
    fetcher: Fetcher
    cache: Cache
    patience: Patience
    limits: Limits
    """What the server itself allows a run."""
    equipment: Equipment
    sealer: Sealer
    agents: Agents
    agent_models: Sequence[str]
    """What agents think with that name no model: the first of these that there is."""
    vendor_runs_code: bool
    """Whether a vendor that can run `code_execution` itself does so."""

    @property
    def sandboxes(self) -> Environments:
        """The environments."""
        return self.equipment.sandboxes

    def agent_model(self) -> str:
        """What an agent thinks with that names no model.

        Raises:
            Invalid: No provider serves any of those.
        """
        for model in self.agent_models:
            with contextlib.suppress(NotFound):
                self.catalog.resolve(model)
                return model
        raise Invalid(
            "This server has no model for agents: name one in 'agent_config.model', or have its "
            "operator set agents.model."
        )

    def inliner(self, project_id: UUID) -> Inliner:
        """Puts media back for a project's runs."""
        return Inliner(self.database, self.fetcher, project_id)

    def history(
        self, project_id: UUID, line: Line | None, ready: Ready | None = None
    ) -> LineHistory:
        """The turns up to a place."""
        return LineHistory(self.database, self.cache, self.inliner(project_id), line, ready)

    async def powers(
        self, project_id: UUID, tools: Sequence[Json], *, is_sandbox_optional: bool
    ) -> Powers:
        """What this server can do for a request.

        Args:
            project_id: Whose.
            tools: The request's, or its agent's.
            is_sandbox_optional: Tools that need a sandbox may be left out where there is none.

        Raises:
            Invalid: An MCP server among the tools cannot be used.
        """
        missing = None
        if is_sandbox_optional:
            try:
                await self.sandboxes.require_broker()
            except (Invalid, Unready) as error:
                missing = error.message
        entries: Mapping[int, Json] = {}
        secrets: Json | None = None
        if any(tool["type"] == "mcp_server" for tool in tools):
            mcp = await self.equipment.mcp()
            entries, secrets = await mcp.prepared(project_id, tools)
        return Powers(
            vendor_runs_code=self.vendor_runs_code,
            search_types=self.equipment.web.search_types,
            servers=entries,
            secrets=secrets,
            no_sandbox=missing,
        )

    def ports(
        self, history: LineHistory, journal: Journal, purse: DayPurse | None, tools: Toolbox
    ) -> Ports:
        """What one run is connected to."""
        return Ports(
            models=self.catalog,
            history=history,
            journal=journal,
            tools=tools,
            purse=purse,
            patience=self.patience,
        )
