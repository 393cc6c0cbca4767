"""The day's budgets of a key and its project: set aside before a call, settled after it."""

from uuid import UUID

import structlog

from openinteractions.db.engine import LOST, Database
from openinteractions.loop.limits import BudgetSpent
from openinteractions.models.catalog import Price

_log = structlog.get_logger(__name__)

_MOST_AT_ONCE = 32_768

_ROWS = """
select id, max_nanousd, max_tokens,
       case when day = (now() at time zone 'utc')::date then used_nanousd else 0 end,
       case when day = (now() at time zone 'utc')::date then used_tokens else 0 end
  from budgets where project_id = $1 and (key_id is null or key_id = $2)
 order by id for update
"""
# Never below zero: what was set aside before midnight is no credit for the day after it.
_TAKE = """
update budgets
   set used_nanousd = greatest(0, $2 + case when day = (now() at time zone 'utc')::date
                                            then used_nanousd else 0 end),
       used_tokens = greatest(0, $3 + case when day = (now() at time zone 'utc')::date
                                           then used_tokens else 0 end),
       day = (now() at time zone 'utc')::date
 where id = any($1::uuid[])
"""


class DayPurse:
    """Implements `loop.ports.Purse` on the `budgets` table.

    What was set aside by a process that then died stays counted until the day ends: a budget may
    give less than it has, never more.
    """

    def __init__(self, database: Database, project_id: UUID, key_id: UUID | None) -> None:
        self._database = database
        self._project_id = project_id
        self._key_id = key_id
        self._held = (0, 0)

    async def room(self, *, input_tokens: int, price: Price | None) -> int:
        """How many tokens the next answer may have: a share, so that others fit beside it."""
        async with self._database.hot() as connection, connection.transaction():
            rows = await connection.fetch(_ROWS, self._project_id, self._key_id)
        room = _MOST_AT_ONCE
        for _, max_nanousd, max_tokens, used_nanousd, used_tokens in rows:
            if max_tokens is not None:
                room = min(room, max_tokens - used_tokens - input_tokens)
            if max_nanousd is None:
                continue
            if price is None:
                raise BudgetSpent("The day's budget cannot be kept: the model has no known price.")
            left = max_nanousd - used_nanousd - input_tokens * price.input
            if left < 0:
                room = 0
            elif price.output:
                room = min(room, int(left / price.output))
        if room < 1:
            raise BudgetSpent("The day's budget leaves no room for another model call.")
        return room

    async def reserve(self, *, tokens: int, nanousd: int) -> None:
        """Set the worst case of one call aside, in every budget that applies or in none."""
        async with self._database.hot() as connection, connection.transaction():
            rows = await connection.fetch(_ROWS, self._project_id, self._key_id)
            for _, max_nanousd, max_tokens, used_nanousd, used_tokens in rows:
                if max_nanousd is not None and used_nanousd + nanousd > max_nanousd:
                    raise BudgetSpent(
                        f"The day's budget of ${max_nanousd / 1e9:g} leaves no room for this call."
                    )
                if max_tokens is not None and used_tokens + tokens > max_tokens:
                    raise BudgetSpent(
                        f"The day's budget of {max_tokens} tokens leaves no room for this call."
                    )
            await connection.execute(_TAKE, [row[0] for row in rows], nanousd, tokens)
        self._held = (tokens, nanousd)

    async def settle(self, *, tokens: int, nanousd: int) -> None:
        """Replace what was set aside by what the call took."""
        held_tokens, held_nanousd = self._held
        self._held = (0, 0)
        try:
            async with self._database.hot() as connection, connection.transaction():
                rows = await connection.fetch(_ROWS, self._project_id, self._key_id)
                ids = [row[0] for row in rows]
                await connection.execute(_TAKE, ids, nanousd - held_nanousd, tokens - held_tokens)
        except LOST:
            _log.warning("budget.settle_failed", project_id=self._project_id.hex)
