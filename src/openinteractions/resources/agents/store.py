"""All SQL of agents."""

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from openinteractions.db.engine import Database

_COLUMNS = "a.id, v.version, v.public, v.sealed, v.template_id, a.created_at, v.created_at"
# Sealed are the contents of files too: megabytes, which no list needs.
_LISTED = _COLUMNS.replace("v.sealed", "null::bytea")

# Rows of versions before the first one are what was left of an agent of the same id.
_OF = """agent_versions v on v.project_id = a.project_id and v.agent_id = a.id
 and v.version >= a.first_version"""

_FIND = f"""
select {_COLUMNS} from agents a join {_OF} and v.version = coalesce($3::int, a.version)
 where a.project_id = $1 and a.id = $2 and a.deleted_at is null
"""  # noqa: S608 - our own words

_PAGE = f"""
select {_LISTED} from agents a join {_OF} and v.version = a.version
 where a.project_id = $1 and a.deleted_at is null
   and ($2::timestamptz is null or (a.created_at, a.id) < ($2, $3::text))
 order by a.created_at desc, a.id desc limit $4
"""  # noqa: S608 - our own words

_VERSIONS = f"""
select {_LISTED} from agents a join {_OF} and ($3::int is null or v.version < $3)
 where a.project_id = $1 and a.id = $2 and a.deleted_at is null
 order by v.version desc limit $4
"""  # noqa: S608 - our own words

_LAST = """
select coalesce(max(version), 0) as last, coalesce(bool_or(deleted_at is null), false) as lives,
       (select count(*) from (select from agents
                               where project_id = $1 and deleted_at is null limit $3) as live)
  from agents where project_id = $1 and id = $2
"""

_PUT = """
insert into agent_versions (project_id, agent_id, version, public, sealed, template_id)
select $1, put.id, put.version, $4, $5, $6::uuid from put
returning version, created_at
"""

_CREATE = f"""
with put as (
  insert into agents as a (project_id, id, version, first_version) values ($1, $2, $3, $3)
  on conflict (project_id, id) do update
     set version = $3, first_version = $3, created_at = now(), deleted_at = null
   where a.deleted_at is not null and a.version = $3 - 1
  returning id, version)
{_PUT}
"""  # noqa: S608 - our own words

_CHANGE = f"""
with put as (
  update agents set version = $3
   where project_id = $1 and id = $2 and version = $3 - 1 and deleted_at is null
  returning id, version)
{_PUT}
"""  # noqa: S608 - our own words


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an agent's definition."""

    agent_id: str
    version: int
    public: bytes
    """JSON."""
    sealed: bytes | None = field(repr=False)
    """None also in lists."""
    template_id: UUID | None
    created_at: datetime
    """The agent's."""
    updated_at: datetime
    """This version's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """What a version's row begins with."""

    project_id: UUID
    agent_id: str
    version: int
    public: bytes
    sealed: bytes | None = field(repr=False)
    template_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What there is already where an agent is to be made."""

    last_version: int
    """Of the agent that has, or had, the id; 0: none ever did."""
    lives: bool
    """Whether there is one of the id now."""
    count: int
    """How many the project has, up to the bound that was asked for."""


async def standing(database: Database, project_id: UUID, agent_id: str, *, most: int) -> Standing:
    """What there is already of an id, and in the project."""
    async with database.hot() as connection:
        return Standing(*await connection.fetchrow(_LAST, project_id, agent_id, most))


async def create(database: Database, new: NewVersion) -> bool:
    """Keep a new agent with its first version; False if another one came in between."""
    return await _put(database, _CREATE, new)


async def change(database: Database, new: NewVersion) -> bool:
    """Keep a new version as the current one; False if it does not follow the current one."""
    return await _put(database, _CHANGE, new)


async def _put(database: Database, statement: str, new: NewVersion) -> bool:
    async with database.hot() as connection:
        row = await connection.fetchrow(
            statement,
            new.project_id,
            new.agent_id,
            new.version,
            new.public,
            new.sealed,
            new.template_id,
        )
    return row is not None


async def find(
    database: Database, project_id: UUID, agent_id: str, version: int | None
) -> Version | None:
    """A version of an agent; None for `version`: the current one."""
    async with database.hot() as connection:
        row = await connection.fetchrow(_FIND, project_id, agent_id, version)
    return None if row is None else Version(*row)


async def page(
    database: Database, project_id: UUID, *, before: tuple[datetime, str] | None, limit: int
) -> list[Version]:
    """Agents in their current versions, newest first, from behind a time and id on."""
    async with database.hot() as connection:
        rows = await connection.fetch(_PAGE, project_id, *(before or (None, None)), limit)
    return [Version(*row) for row in rows]


async def versions(
    database: Database, project_id: UUID, agent_id: str, *, before: int | None, limit: int
) -> list[Version]:
    """Versions of an agent, newest first; empty where there is no such agent."""
    async with database.hot() as connection:
        rows = await connection.fetch(_VERSIONS, project_id, agent_id, before, limit)
    return [Version(*row) for row in rows]


async def set_template(database: Database, project_id: UUID, seen: Version, made: UUID) -> bool:
    """Note a version's template; False if it has another one than it was seen with, or is gone."""
    async with database.hot() as connection:
        row = await connection.fetchrow(
            "update agent_versions set template_id = $4 where project_id = $1 and agent_id = $2 "
            "and version = $3 and template_id is not distinct from $5::uuid returning version",
            project_id,
            seen.agent_id,
            seen.version,
            made,
            seen.template_id,
        )
    return row is not None


async def delete(database: Database, project_id: UUID, agent_id: str) -> set[UUID] | None:
    """Delete an agent with its versions; their templates, None if there is no such agent.

    Its id stays, so that its versions' numbers are not given again.
    """
    # Two statements: the second one sees a version that was added while the first one waited.
    async with database.hot() as connection, connection.transaction():
        gone = await connection.fetchrow(
            "update agents set deleted_at = now() "
            "where project_id = $1 and id = $2 and deleted_at is null returning id",
            project_id,
            agent_id,
        )
        if gone is None:
            return None
        rows = await connection.fetch(
            "delete from agent_versions where project_id = $1 and agent_id = $2 "
            "returning template_id",
            project_id,
            agent_id,
        )
    return {row[0] for row in rows if row[0] is not None}
