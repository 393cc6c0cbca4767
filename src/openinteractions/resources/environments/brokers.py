"""What is said where no broker lives."""

from typing import Final

from openinteractions.db.engine import Database
from openinteractions.errors import Invalid, RequestError, Unready
from openinteractions.resources.environments import store

_NONE: Final = (
    "No sandbox broker is running. One that has just been started takes some seconds; else its "
    "operator has to install and start Docker, then restart the server: `openinteractions doctor` "
    "says what is missing."
)
_OFF: Final = (
    "This server has no sandboxes: its operator has turned them off (setting sandbox.enabled), and "
    "no broker runs elsewhere."
)


async def missing(database: Database, *, is_off: bool) -> RequestError:
    """Why there is none; where none was ever there, and none is to be, no retry will help.

    Args:
        database: Where brokers say that they live.
        is_off: `serve` runs none here.
    """
    if is_off and not await store.had_broker(database):
        return Invalid(_OFF)
    return Unready(_NONE, retry_after_s=1)
