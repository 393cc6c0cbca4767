"""Commands that do one thing to the database and end."""

from openinteractions.cli import database as databases
from openinteractions.db import migrate as migrations
from openinteractions.errors import SetupError
from openinteractions.resources.keys import service, store
from openinteractions.resources.keys.service import DayBudget
from openinteractions.settings import Settings, duration


def budget(max_cost: float | None, max_tokens: int | None) -> DayBudget | None:
    """A day's budget from options; None if none is given."""
    if max_cost is None and max_tokens is None:
        return None
    return DayBudget(max_cost_usd=max_cost, max_tokens=max_tokens)


async def migrate(settings: Settings, revision: str) -> None:
    """Bring the schema to a revision."""
    async with databases.opened(settings, pool_size=2, attach=True) as database:
        if revision == "head":
            await migrations.upgrade(database)
        else:
            await migrations.downgrade(database, revision)
    print(f"The schema is at {revision}.")


async def create_key(
    settings: Settings, *, name: str, project: str, budget: DayBudget | None
) -> None:
    """Make a key and print it."""
    async with databases.opened(settings, pool_size=2, attach=True) as database:
        await migrations.require_current(database)
        key = await service.create(database, name=name, project=project, budget=budget)
    print(key)


async def list_keys(settings: Settings) -> None:
    """Print the keys, one a line."""
    async with databases.opened(settings, pool_size=2, attach=True) as database:
        await migrations.require_current(database)
        keys = await store.list_keys(database)
    print(f"{'KEY':14}{'PROJECT':20}{'NAME':20}{'CREATED':22}STATE")
    for key in keys:
        state = "valid" if key.revoked_at is None else f"revoked {key.revoked_at:%Y-%m-%d}"
        print(
            f"{key.prefix + '…':14}{key.project:20}{key.name:20}"
            f"{key.created_at:%Y-%m-%d %H:%M}      {state}"
        )


async def revoke_key(settings: Settings, key: str) -> None:
    """Revoke a key by itself or by how it begins; the beginning has to tell it from the others."""
    prefix = key.removesuffix("…")[: service.PREFIX_CHARS]
    async with databases.opened(settings, pool_size=2, attach=True) as database:
        await migrations.require_current(database)
        found = [
            item.prefix
            for item in await store.list_keys(database)
            if item.revoked_at is None and item.prefix.startswith(prefix)
        ]
        if not prefix or not found:
            raise SetupError(f"no valid key begins with {prefix!r}")
        if len(found) > 1 and len(prefix) < service.PREFIX_CHARS:
            raise SetupError(f"{len(found)} keys begin with {prefix!r}: give more of the one")
        revoked = await store.revoke(database, prefix)
    for item in revoked:
        print(f"revoked {item}…")


async def keep_project(settings: Settings, *, project: str, retention: str) -> None:
    """Set how long a project's new interactions are kept."""
    kept = None if retention == "default" else duration(retention)
    async with databases.opened(settings, pool_size=2, attach=True) as database:
        await migrations.require_current(database)
        await store.set_retention(
            database, project_id=await store.ensure_project(database, project), retention=kept
        )
    print(f"New interactions of project {project!r} are kept for {kept or settings.retention}.")


async def limit_project(settings: Settings, *, project: str, budget: DayBudget | None) -> None:
    """Set or lift a project's budget of the day."""
    async with databases.opened(settings, pool_size=2, attach=True) as database:
        await migrations.require_current(database)
        await service.limit(database, project=project, key_id=None, budget=budget or DayBudget())
    print(f"The budget of project {project!r} is {'set' if budget else 'lifted'}.")
