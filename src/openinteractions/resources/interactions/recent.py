"""Interactions that ended here a moment ago: most turns continue one of them.

An ended row changes in one way only: it is deleted. The create statement itself makes sure of its
parent, so a row from here costs a read less and can not resurrect anything.
"""

from collections import OrderedDict
from uuid import UUID

from openinteractions.resources.interactions.store import Interaction

_MOST = 5_000


class RecentRows:
    """The last interactions that this process saw the end of, by project and id."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[UUID, UUID], Interaction] = OrderedDict()

    def keep(self, row: Interaction) -> None:
        """Remember an interaction that has ended."""
        self._rows[row.project_id, row.id] = row
        if len(self._rows) > _MOST:
            self._rows.popitem(last=False)

    def find(self, project_id: UUID, interaction_id: UUID) -> Interaction | None:
        """What is remembered of an interaction."""
        return self._rows.get((project_id, interaction_id))

    def forget(self, project_id: UUID, interaction_id: UUID) -> None:
        """It was deleted, or the memory of it was wrong."""
        self._rows.pop((project_id, interaction_id), None)
