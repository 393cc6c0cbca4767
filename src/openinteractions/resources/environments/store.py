"""All SQL of environments, seen as a resource."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from openinteractions.db.engine import Database

BROKER_DEAD_AFTER = timedelta(seconds=15)
"""A broker that has said nothing for so long is not asked."""
_TOUCH_EVERY = timedelta(minutes=1)

_COUNT_EVERY = "interval '5 seconds'"
_COLUMNS = f"""id, project_id, broker, has_disk, public, sealed, revision, file_count, size_bytes,
 created_at, updated_at, accessed_at, expires_at,
 expired_at is not null or coalesce(expires_at < now(), false) as is_expired, is_tentative,
 has_disk and coalesce(changed_at >= counted_at, false) as is_outdated,
 has_disk and counted_at < now() - {_COUNT_EVERY} as is_counted_long_ago, now() as read_at"""

_USABLE = """deleted_at is null and expired_at is null
 and (expires_at is null or expires_at >= now())"""

_CREATE = f"""
insert into environments
  (id, project_id, broker, public, sealed, expires_at, file_count, size_bytes, is_tentative)
select $1, $2, $3, $4, $5, now() + $6::interval, $8, $9, $10::boolean
 where $10 or $7::int is null
    or (select count(*)
          from (select from environments
                 where project_id = $2 and not is_tentative and {_USABLE} limit $7) as live) < $7
returning {_COLUMNS}
"""  # noqa: S608 - our own words

# Of two first uses at once the second one waits, and finds no row.
_CLAIM = f"""
update environments e
   set is_tentative = (
         select count(*) >= $2
           from (select from environments
                  where project_id = e.project_id and not is_tentative and {_USABLE}
                  limit $2) as live)
 where id = $1 and is_tentative and {_USABLE}
returning is_tentative
"""  # noqa: S608 - our own words

_PAGE = f"""
select {_COLUMNS} from environments
 where project_id = $1 and deleted_at is null and ($2::uuid is null or id < $2)
 order by id desc limit $3
"""  # noqa: S608 - our own words

_CONFIGURE = f"""
update environments
   set public = $3, sealed = $4, revision = revision + 1, updated_at = now()
 where project_id = $1 and id = $2 and revision = $5 and {_USABLE}
returning {_COLUMNS}
"""  # noqa: S608 - our own words

_LOCATE = f"""
select e.broker, e.has_disk, b.address, e.accessed_at < now() - $2::interval as is_stale,
       e.is_tentative
  from environments e
  left join brokers b on b.name = e.broker and b.seen > now() - $3::interval
 where e.id = $1 and {_USABLE}
"""  # noqa: S608 - our own words

# The least loaded one that can start sandboxes; one that cannot only where there is no other, since
# files can be had without. Of two processes that place it at once, the second one sees the first's.
_PLACE = f"""
update environments e
   set broker = coalesce(e.broker, (
         select b.name from brokers b
          where b.seen > now() - $2::interval
          order by b.problem is not null, b.running::float / greatest(b.capacity, 1),
                   (select count(*) from environments o where o.broker = b.name and o.has_disk),
                   b.name
          limit 1)),
       accessed_at = now(),
       expires_at = now() + $3::interval
 where e.id = $1 and {_USABLE}
returning e.broker, e.has_disk,
          (select b.address from brokers b
            where b.name = e.broker and b.seen > now() - $2::interval) as address
"""  # noqa: S608 - our own words

_READINESS = """
select count(*), min(problem) filter (where not exists (
         select from brokers o where o.seen > now() - $1::interval and o.problem is null))
  from brokers where seen > now() - $1::interval
"""

_TOUCH = f"""
update environments set accessed_at = now(), expires_at = now() + $2::interval
 where id = $1 and accessed_at < now() - $3::interval and {_USABLE}
"""  # noqa: S608 - our own words

_EXPIRE = """
update environments set expired_at = now()
 where id in (select id from environments
               where expires_at < now() and expired_at is null
               order by expires_at limit $1
               for update skip locked)
   and expires_at < now()
returning id
"""

# A run in it, and one that waits for its turn, may still come to use it: the key of a run's job is
# its environment.
_EXPIRE_UNUSED = """
update environments set expired_at = now()
 where id in (select e.id from environments e
               where e.is_tentative and e.expired_at is null and e.deleted_at is null
                 and e.accessed_at < now() - $2::interval
                 and not exists (select from jobs
                                  where key = e.id::text and state = 0)
                 and not exists (select from jobs
                                  where key = e.id::text and state = 1)
               order by e.accessed_at limit $1
               for update of e skip locked)
   and is_tentative
returning id
"""

# The request was never more than a copy for its owner; a key to other hosts is not kept for longer.
_FORGET = """
update environments set sealed = null
 where id = any($1::uuid[]) and (expired_at is not null or deleted_at is not null)
"""

_LEFT_BEHIND = """
select e.id, b.address from environments e
  join brokers b on b.name = e.broker and b.seen > now() - $1::interval
 where e.has_disk and (e.expired_at is not null or e.deleted_at is not null)
   and ($2::uuid is null or e.id > $2)
 order by e.id limit $3
"""

_DROP_ROWS = """
delete from environments
 where not has_disk and least(expired_at, deleted_at) < now() - $1::interval
"""

_LOG = """
select id, at, host, port, kind, method, path, decision, reason, rule, credential, status,
       bytes_up, bytes_down, duration_ms
  from egress_log
 where project_id = $1 and environment_id = $2 and ($3::uuid is null or id < $3)
 order by id desc limit $4
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """One environment's row."""

    id: UUID
    project_id: UUID
    broker: str | None
    has_disk: bool
    public: bytes | None
    sealed: bytes | None
    revision: int
    file_count: int
    size_bytes: int
    created_at: datetime
    updated_at: datetime
    accessed_at: datetime
    expires_at: datetime | None
    is_expired: bool
    is_tentative: bool
    """It was made for a run that may need it, and not used yet."""
    is_outdated: bool
    """Something may have changed its files since they were counted."""
    is_counted_long_ago: bool
    """What runs in it by itself may have changed them since."""
    read_at: datetime
    """By the database's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEnvironment:
    """What an environment's row begins with."""

    id: UUID
    project_id: UUID
    public: bytes
    sealed: bytes
    broker: str | None = None
    """None: placed when it is first needed."""
    file_count: int = 0
    size_bytes: int = 0
    is_tentative: bool = False
    """It is counted at its first use (`claim`)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an environment is kept."""

    broker: str | None
    """None: nowhere yet."""
    has_disk: bool
    address: str | None
    """None: the broker gives no sign of life."""
    is_stale: bool = False
    """Its last use was noted a while ago."""
    is_tentative: bool = False
    """It has to be claimed before it is used."""


async def create(
    database: Database, new: NewEnvironment, *, ttl: timedelta, most: int | None = None
) -> Environment | None:
    """Insert a row; nothing is made anywhere else.

    Args:
        database: Where.
        new: The row.
        ttl: How long it lives unused.
        most: None is inserted where the project has so many that can be used, unless it is
            tentative; with requests at the same moment it may get a few more.
    """
    async with database.hot() as connection:
        row = await connection.fetchrow(
            _CREATE,
            new.id,
            new.project_id,
            new.broker,
            new.public,
            new.sealed,
            ttl,
            most,
            new.file_count,
            new.size_bytes,
            new.is_tentative,
        )
    return None if row is None else Environment(*row)


async def claim(database: Database, environment_id: UUID, *, most: int) -> bool:
    """Count a tentative environment from now on; False if its project has `most` without it."""
    async with database.hot() as connection:
        return not await connection.fetchval(_CLAIM, environment_id, most)


async def was_used(database: Database, project_id: UUID, environment_id: UUID) -> bool:
    """Whether somebody asked for an environment, or used it; True if it is long forgotten."""
    async with database.hot() as connection:
        return not await connection.fetchval(
            "select is_tentative from environments where project_id = $1 and id = $2",
            project_id,
            environment_id,
        )


async def get(database: Database, project_id: UUID, environment_id: UUID) -> Environment | None:
    """An environment that is not deleted; it may have expired."""
    async with database.hot() as connection:
        row = await connection.fetchrow(
            f"select {_COLUMNS} from environments "  # noqa: S608 - our own words
            "where project_id = $1 and id = $2 and deleted_at is null",
            project_id,
            environment_id,
        )
    return None if row is None else Environment(*row)


async def page(
    database: Database, project_id: UUID, *, before: UUID | None, limit: int
) -> list[Environment]:
    """Environments of a project, newest first."""
    async with database.hot() as connection:
        rows = await connection.fetch(_PAGE, project_id, before, limit)
    return [Environment(*row) for row in rows]


async def configure(
    database: Database, row: Environment, *, public: bytes, sealed: bytes
) -> Environment | None:
    """Change the configuration; None if it is not what `row` says any more, or cannot be used."""
    async with database.hot() as connection:
        new = await connection.fetchrow(
            _CONFIGURE, row.project_id, row.id, public, sealed, row.revision
        )
    return None if new is None else Environment(*new)


async def locate(database: Database, environment_id: UUID) -> Place | None:
    """Where an environment is kept; None if there is none, or none that can be used."""
    async with database.hot() as connection:
        row = await connection.fetchrow(_LOCATE, environment_id, _TOUCH_EVERY, BROKER_DEAD_AFTER)
    return None if row is None else Place(*row)


async def place(database: Database, environment_id: UUID, *, ttl: timedelta) -> Place | None:
    """Choose a broker where none was chosen yet, and note the use."""
    async with database.hot() as connection:
        row = await connection.fetchrow(_PLACE, environment_id, BROKER_DEAD_AFTER, ttl)
    return None if row is None else Place(*row)


async def touch(database: Database, environment_id: UUID, *, ttl: timedelta) -> None:
    """Note a use, at most once a minute."""
    async with database.hot() as connection:
        await connection.execute(_TOUCH, environment_id, ttl, _TOUCH_EVERY)


async def set_disk(database: Database, environment_id: UUID, *, has_disk: bool) -> None:
    """Note that the broker has files of it, or has none any more."""
    async with database.hot() as connection:
        await connection.execute(
            "update environments set has_disk = $2 where id = $1 and has_disk <> $2",
            environment_id,
            has_disk,
        )


async def set_changed(database: Database, environment_id: UUID) -> None:
    """Note that an environment's files are not what was counted last."""
    async with database.hot() as connection:
        await connection.execute(
            "update environments set changed_at = now() where id = $1", environment_id
        )


async def set_usage(
    database: Database, row: Environment, *, file_count: int, size_bytes: int
) -> None:
    """Keep what the broker counted after `row` was read: a change since then is not in it."""
    async with database.hot() as connection:
        await connection.execute(
            "update environments set file_count = $2, size_bytes = $3, counted_at = $4 "
            "where id = $1 and counted_at <= $4",
            row.id,
            file_count,
            size_bytes,
            row.read_at,
        )


async def delete(database: Database, project_id: UUID, environment_id: UUID) -> Place | None:
    """Mark as deleted; where its files are, None if there is no such environment."""
    async with database.hot() as connection:
        row = await connection.fetchrow(
            "update environments set deleted_at = now(), public = null, sealed = null "
            "where project_id = $1 and id = $2 and deleted_at is null "
            "returning broker, has_disk, (select address from brokers b where b.name = broker "
            "and b.seen > now() - $3::interval)",
            project_id,
            environment_id,
            BROKER_DEAD_AFTER,
        )
    return None if row is None else Place(*row)


async def readiness(database: Database) -> tuple[int, str | None]:
    """How many brokers live, and why none of them can start a sandbox; None: one can."""
    async with database.hot() as connection:
        row = await connection.fetchrow(_READINESS, BROKER_DEAD_AFTER)
    return row[0], row[1]


async def had_broker(database: Database) -> bool:
    """Whether a broker has ever been there: its row, or an environment that lives with one."""
    async with database.hot() as connection:
        return await connection.fetchval(
            "select exists (select from brokers) "
            "or exists (select from environments where broker is not null)"
        )


async def expire(database: Database, *, unused: timedelta, limit: int) -> Sequence[UUID]:
    """Mark environments whose time is over as expired; which they were.

    Args:
        database: Where.
        unused: How long those last that nobody has asked for, and nobody uses.
        limit: Of each kind at most so many.
    """
    async with database.hot() as connection:
        rows = await connection.fetch(_EXPIRE, limit)
        rows += await connection.fetch(_EXPIRE_UNUSED, limit, unused)
        expired = [row[0] for row in rows]
        await connection.execute(_FORGET, expired)
    return expired


async def left_behind(
    database: Database, *, after: UUID | None, limit: int
) -> list[tuple[UUID, str]]:
    """Environments that are gone, and whose files a broker that lives still has; by id."""
    async with database.hot() as connection:
        rows = await connection.fetch(_LEFT_BEHIND, BROKER_DEAD_AFTER, after, limit)
    return [(row[0], row[1]) for row in rows]


async def clean(database: Database, *, keep_rows: timedelta, keep_logs: timedelta) -> None:
    """Drop rows of environments that went long ago, and old logs."""
    async with database.hot() as connection:
        await connection.execute(_DROP_ROWS, keep_rows)
        await connection.execute(
            "delete from egress_log where at < now() - $1::interval", keep_logs
        )
        await connection.execute(
            "delete from executions where ended_at is not null "
            "and started_at < now() - $1::interval",
            keep_logs,
        )


async def network_log(
    database: Database,
    project_id: UUID,
    environment_id: UUID,
    *,
    before: UUID | None,
    limit: int,
) -> list[Any]:
    """What an environment's sandbox connected to, newest first."""
    async with database.hot() as connection:
        return await connection.fetch(_LOG, project_id, environment_id, before, limit)
