"""What has to be done now and then, by any worker; two that do it at once do no harm.

- The event log's partitions of the coming days are made ahead, and those whose time is over are
  dropped, once no interaction in them runs any more. Streams of their interactions are then read
  from the steps.
- Interactions whose retention is over are deleted, a few at a time, as their owner would.
- Environments that were not used for long expire, and their brokers remove their files.
- Small leftovers go: lost answers, given-up deliveries, blobs that nothing refers to.
"""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import structlog

from openinteractions.db.engine import LOST, Database
from openinteractions.resources.interactions import store

_log = structlog.get_logger(__name__)

_DAYS_AHEAD = 3
_BATCH = 100
_BLOB_GRACE = timedelta(hours=1)
"""A blob is written before the turn that uses it."""

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
    execute format(
      'create table if not exists %I partition of events for values from (%L) to (%L)',
      name, first, first + interval '1 day');
  end if;
end $$
"""

# Whoever waits for the whole log's lock makes every reader and writer wait behind it. They hold it
# for a moment only, a backup for longer: who cannot get it tries next time.
_SHORT_WAIT = "set local lock_timeout = '2s'"

_PARTITIONS = """
select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
 where i.inhparent = 'events'::regclass and c.relname ~ '^events_[0-9]{8}$'
"""

_UNLOG = """
update interactions set logged = false
 where id in (select id from interactions
               where logged and created_at >= $1 and created_at < $2 limit 10000)
returning id
"""

_RUNNING = """
select exists (select from jobs j join interactions i on i.id = j.id
                where j.kind = 'run' and i.created_at >= $1 and i.created_at < $2)
"""

# Rows that no partition of a day took.
_DROP_DEFAULT = """
with ended as (
  select id, created_at from interactions i
   where logged and created_at < now() - $1::interval
     and not exists (select from jobs j where j.id = i.id)
   limit 500
), unlogged as (
  update interactions set logged = false where id in (select id from ended)
)
delete from events_default e using ended
 where e.born = ended.created_at and e.interaction_id = ended.id
"""

_EXPIRED = """
select project_id, id from interactions
 where expires_at < now() and deleted_at is null
   and not exists (select from jobs j where j.id = interactions.id)
 order by expires_at limit $1
"""

_LEFTOVERS = (
    "delete from lost_responses where at < now() - interval '5 minutes'",
    """delete from consents c where given_at < now() - interval '7 days'
       and not exists (select from interactions i where i.id = c.interaction_id)""",
    "delete from jobs where state = 3 and run_at < now() - interval '7 days'",
)

# Uses by turns that were never written, and blobs that nothing uses.
_ORPHANED_USES = """
delete from blob_uses u
 using blobs b
 where b.project_id = u.project_id and b.sha256 = u.sha256
   and b.created_at < now() - $1::interval
   and not exists (select from interactions i
                    where i.segment_id = u.segment_id and i.depth = u.depth)
   and not exists (select from steps s
                    where s.segment_id = u.segment_id and s.depth = u.depth)
"""

_ORPHANED_BLOBS = """
delete from blobs b
 where b.created_at < now() - $1::interval
   and not exists (select from blob_uses u
                    where u.project_id = b.project_id and u.sha256 = b.sha256)
"""


async def for_ever(
    database: Database,
    *,
    every: timedelta,
    keep_events: timedelta,
    expire_environments: Callable[[], Awaitable[object]],
) -> None:
    """Do the upkeep again and again.

    Args:
        database: Where.
        every: How often.
        keep_events: How long the event log of an interaction that has ended is kept.
        expire_environments: Lets environments go that were not used for long.
    """
    while True:
        try:
            await once(database, keep_events=keep_events)
            await expire_environments()
        except LOST as error:
            _log.warning("upkeep.failed", error=type(error).__name__)
        except Exception:  # noqa: BLE001 - what is put off till next time must not end the process
            _log.exception("upkeep.crashed")
        await asyncio.sleep(every.total_seconds())


async def once(database: Database, *, keep_events: timedelta) -> None:
    """Do all of it, once."""
    await make_partitions(database)
    await drop_events(database, keep_events)
    await expire(database)
    async with database.hot() as connection:
        for statement in _LEFTOVERS:
            await connection.execute(statement)
        await connection.execute(_ORPHANED_USES, _BLOB_GRACE)
        await connection.execute(_ORPHANED_BLOBS, _BLOB_GRACE)


async def make_partitions(database: Database) -> None:
    """Make the event log's partitions of the coming days.

    Today's rows may be in the default partition already, so today's is never made; the next days'
    are, before anything is written to them.
    """
    for day in range(1, _DAYS_AHEAD + 1):
        async with database.hot() as connection:
            with contextlib.suppress(asyncpg.LockNotAvailableError):
                async with connection.transaction():
                    await connection.execute(_SHORT_WAIT)
                    await connection.execute(_PARTITION.format(day=day))


async def drop_events(database: Database, keep: timedelta) -> int:
    """Drop the partitions whose time is over; return how many."""
    async with database.hot() as connection:
        now = await connection.fetchval("select now()")
        rows = await connection.fetch(_PARTITIONS)
        await connection.execute(_DROP_DEFAULT, keep)
    dropped = 0
    for (name,) in rows:
        digits = re.sub(r"[^0-9]", "", name)
        first = datetime.strptime(digits, "%Y%m%d").replace(tzinfo=UTC)
        last = first + timedelta(days=1)
        if last < now - keep and await _drop_partition(database, name, first, last):
            dropped += 1
    return dropped


async def _drop_partition(database: Database, name: str, first: datetime, last: datetime) -> bool:
    async with database.hot() as connection:
        if await connection.fetchval(_RUNNING, first, last):
            return False
        while await connection.fetch(_UNLOG, first, last):
            pass
        try:
            async with connection.transaction():
                await connection.execute(_SHORT_WAIT)
                await connection.execute(f'drop table "{name}"')
        except asyncpg.LockNotAvailableError:
            return False
    _log.info("upkeep.events_dropped", partition=name)
    return True


async def expire(database: Database) -> int:
    """Delete interactions whose retention is over; return how many."""
    count = 0
    while True:
        async with database.hot() as connection:
            rows: list[tuple[UUID, UUID]] = await connection.fetch(_EXPIRED, _BATCH)
        for project_id, interaction_id in rows:
            await store.delete(database, project_id, interaction_id)
        count += len(rows)
        if len(rows) < _BATCH:
            break
    if count:
        _log.info("upkeep.expired", interactions=count)
    return count
