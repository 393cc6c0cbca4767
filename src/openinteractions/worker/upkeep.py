"""What has to be done now and then, by any worker: partitions of the event log, made ahead."""

import asyncio

import structlog

from openinteractions.db.engine import LOST, Database

_log = structlog.get_logger(__name__)

_EVERY_S = 3600.0
_DAYS_AHEAD = 3

# The name and the bounds are made by the database, from its own clock.
_PARTITION = """
do $$
declare
  first timestamptz := date_trunc('day', now() at time zone 'utc') at time zone 'utc'
                       + make_interval(days => {day});
  name text := 'events_' || to_char(first at time zone 'utc', 'YYYYMMDD');
begin
  if to_regclass(name) is null then
    perform pg_advisory_xact_lock(hashtext('oi_partitions'));
    execute format('create table if not exists %I partition of events for values from (%L) to (%L)',
                   name, first, first + interval '1 day');
  end if;
end $$
"""


async def partitions(database: Database) -> None:
    """Make the event log's partitions of the coming days.

    Today's is left to the default one where rows of today are there already; the next days' are
    made before anything is written to them.
    """
    for day in range(1, _DAYS_AHEAD + 1):
        async with database.hot() as connection:
            await connection.execute(_PARTITION.format(day=day))


async def for_ever(database: Database) -> None:
    """Do the upkeep every hour."""
    while True:
        try:
            await partitions(database)
        except LOST as error:
            _log.warning("upkeep.failed", error=type(error).__name__)
        await asyncio.sleep(_EVERY_S)
