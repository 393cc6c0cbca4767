"""`secrets rotate`: a new master key, and everything sealed with it."""

import asyncio
import time
from pathlib import Path

from openinteractions import crypto
from openinteractions.cli import database as databases
from openinteractions.crypto import Sealer
from openinteractions.db import migrate as migrations
from openinteractions.db import sealed
from openinteractions.db.engine import Database
from openinteractions.errors import SetupError
from openinteractions.settings import Settings

_SETTLE_S = 3 * crypto.FOLLOWED_S
"""What a running process sealed just before it noticed the new key is stored by then."""
_MOST_PASSES = 5


async def rotate(settings: Settings, new_key_file: Path | None) -> None:
    """Seal everything with the current master key, after making a new one where it is in a file.

    Raises:
        SetupError: Something is left that needs an older key.
    """
    configured, old = settings.master_keys()
    home = settings.home()
    if configured is not None and new_key_file is not None:
        raise SetupError(
            "OI_MASTER_KEY is set, so there is no key file to change: set OI_MASTER_KEY to the new "
            "key and OI_OLD_MASTER_KEYS to the old one, restart every process, then run this "
            "without --new-key-file"
        )
    async with databases.opened(settings, pool_size=2, attach=True) as database:
        await migrations.require_current(database)
        if configured is not None:
            await _everything(database, crypto.sealer(configured, old, home))
            print("No secret needs the keys of OI_OLD_MASTER_KEYS any more.")
            return
        new = None if new_key_file is None else await asyncio.to_thread(_key_in, new_key_file)
        key = await asyncio.to_thread(crypto.add_master_key, home, new)
        await _everything(database, crypto.sealer(None, old, home))
        await asyncio.to_thread(crypto.drop_old_master_keys, home, key)
    print("The new key is in the data folder; no secret needs the old one any more.")


async def _everything(database: Database, sealer: Sealer) -> None:
    """Seal everything anew, until nobody seals with another key any more."""
    began = time.monotonic()
    for _ in range(_MOST_PASSES):
        settled = time.monotonic() - began >= _SETTLE_S
        counts = [
            (column.name, await sealed.reseal(database, sealer, column))
            for column in sealed.COLUMNS
        ]
        changed = sum(count.changed for _, count in counts)
        for name, count in counts:
            if count.changed:
                print(f"{name}: {count.changed} of {count.seen} sealed anew")
        closed = [f"{count.closed} of {name}" for name, count in counts if count.closed]
        if closed:
            raise SetupError(
                f"these open with no known key: {', '.join(closed)}. They were left as they are, "
                "and every key stays where it is; add theirs to OI_OLD_MASTER_KEYS"
            )
        if settled and not changed:
            return
        await asyncio.sleep(_SETTLE_S)
    raise SetupError(
        "a process goes on sealing with an older key: restart every process with the new one, "
        "then run this again"
    )


def _key_in(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read the key file {path}: {error}") from error
