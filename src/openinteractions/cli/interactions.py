"""What an operator does about interactions of any project: find the one that hangs, end it."""

import asyncio
import time
from typing import Final
from uuid import UUID

from openinteractions import ids
from openinteractions.cli import database as databases
from openinteractions.db import migrate as migrations
from openinteractions.db.engine import Database
from openinteractions.errors import SetupError
from openinteractions.jobs import queue
from openinteractions.jobs.overview import Active, active
from openinteractions.settings import Settings

_ENDS_S: Final = 30.0
_LOOK_S: Final = 0.2
_SECONDS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"))


async def show(settings: Settings, *, limit: int) -> None:
    """Print the interactions that are under way, the oldest first."""
    async with databases.opened(settings, pool_size=2, attach=True) as database:
        await migrations.require_current(database)
        found = await active(database, most=limit)
    print(f"{'INTERACTION':37}{'PROJECT':20}{'STATE':10}{'AGE':9}{'WORKER':9}DOES")
    for one in found:
        print(
            f"{ids.interaction_id(one.id):37}{one.project:20}{one.state:10}"
            f"{lasted(one.age_s):9}{one.worker_id or '-'!s:9}{does(one)}"
        )


async def cancel(settings: Settings, text: str) -> None:
    """Ask who runs an interaction to end it, and wait until it has."""
    interaction_id = ids.parse_interaction_id(text)
    if interaction_id is None:
        raise SetupError(f"{text!r} is not the id of an interaction: v1_ and 32 digits")
    async with databases.opened(settings, pool_size=2, attach=True) as database:
        await migrations.require_current(database)
        status = await _status(database, interaction_id)
        if status is None:
            raise SetupError(f"there is no interaction {text}")
        if not await queue.request_cancel(database, interaction_id):
            print(f"{text} is {status}: nothing runs")
            return
        await queue.wake(database)
        deadline = time.monotonic() + _ENDS_S
        while await _is_under_way(database, interaction_id):
            if time.monotonic() > deadline:
                raise SetupError(
                    f"{text} is marked as cancelled, and nobody has ended it yet: is a worker "
                    "alive? `openinteractions doctor` knows"
                )
            await asyncio.sleep(_LOOK_S)
        print(f"{text} is {await _status(database, interaction_id)}")


def does(one: Active) -> str:
    """What a run has in hand, for a person."""
    what = one.agent or one.model or "?"
    if one.state != "running":
        return what
    return f"{what}: step {one.steps}, last {one.last_step or 'none'}, {one.quiet_s:.0f} s ago"


def lasted(seconds: float) -> str:
    """A time in the largest unit that it fills."""
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


async def _is_under_way(database: Database, interaction_id: UUID) -> bool:
    async with database.hot() as connection:
        return await connection.fetchval(
            "select exists (select from jobs where id = $1 and state in (0, 1))", interaction_id
        )


async def _status(database: Database, interaction_id: UUID) -> str | None:
    async with database.hot() as connection:
        return await connection.fetchval(
            "select status from interactions where id = $1 and deleted_at is null", interaction_id
        )
