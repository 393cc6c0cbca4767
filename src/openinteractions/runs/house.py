"""Everything that runs in this process share."""

from dataclasses import dataclass
from uuid import UUID

from openinteractions.db.engine import Database
from openinteractions.events.follow import Hub
from openinteractions.events.log import Writer
from openinteractions.jobs.runner import Member
from openinteractions.loop.ports import Journal, Patience, Ports
from openinteractions.loop.spec import Limits
from openinteractions.models.catalog import Catalog
from openinteractions.netguard import Fetcher
from openinteractions.resources.environments.service import Environments
from openinteractions.runs.history import Cache, Inliner, LineHistory, Ready
from openinteractions.runs.purse import DayPurse
from openinteractions.runs.store import Line
from openinteractions.runs.workplace import RemoteWorkplace
from openinteractions.tools.port import Workplace
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
    sandboxes: Environments
    vendor_runs_code: bool
    """Whether a vendor that can run `code_execution` itself does so."""

    def inliner(self, project_id: UUID) -> Inliner:
        """Puts media back for a project's runs."""
        return Inliner(self.database, self.fetcher, project_id)

    def history(
        self, project_id: UUID, line: Line | None, ready: Ready | None = None
    ) -> LineHistory:
        """The turns up to a place."""
        return LineHistory(self.database, self.cache, self.inliner(project_id), line, ready)

    def workplace(
        self, environment_id: UUID | None, interaction_id: UUID, epoch: int
    ) -> Workplace | None:
        """The sandbox of a run that this process owns; None where it has none."""
        if environment_id is None:
            return None
        return RemoteWorkplace(
            sandboxes=self.sandboxes,
            environment_id=environment_id,
            interaction_id=interaction_id,
            epoch=epoch,
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
