"""One environment's running sandbox: its container, the pipe into it, and what runs there."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import structlog

from openinteractions.broker.record import Record
from openinteractions.sandbox.egress.state import Egress
from openinteractions.sandbox.pipe import Pipe
from openinteractions.sandbox.port import BackendDown, Gone, SandboxError

_log = structlog.get_logger(__name__)

DELETED: Final = "deleted"
OVER_BOUND: Final = "over its bound"
"""Why a sandbox is stopped: what those who run commands there are told apart."""
_REATTACH_S: Final = 30.0
_PAUSE_S: Final = 0.5

Reattach = Callable[[], Awaitable[Pipe]]


class Live:
    """A sandbox that runs."""

    def __init__(
        self, environment_id: UUID, project_id: UUID, ref: str, pipe: Pipe, egress: Egress
    ) -> None:
        self.environment_id = environment_id
        self.project_id = project_id
        self.ref = ref
        """The container."""
        self.pipe = pipe
        self.egress = egress
        self.revision = 0
        """Of the configuration that it was given."""
        self.variables: Mapping[str, str] = {}
        """What each of its commands gets."""
        self.is_leaving = False
        """It is being stopped, or let go of: the end of its pipe means nothing."""
        self.gone = asyncio.Event()
        """Set when the container has ended, or cannot be reached any more."""
        self._changed = asyncio.Event()

    async def usable(self) -> Pipe:
        """The pipe, once it works.

        Raises:
            Gone: The container has ended.
        """
        while self.pipe.lost.is_set():
            if self.gone.is_set() or self.is_leaving:
                raise Gone("The sandbox has ended.")
            changed = self._changed
            await changed.wait()
        return self.pipe

    async def keep(self, reattach: Reattach) -> bool:
        """Watch the pipe, and open it again while the container lives; False once it does not."""
        while True:
            await self.pipe.lost.wait()
            if self.is_leaving:
                return True
            pipe = await self._again(reattach)
            if pipe is None:
                self.gone.set()
                self._tell()
                return False
            self.pipe = pipe
            self._tell()

    async def leave(self) -> None:
        """Let go of the pipe; the container runs on."""
        self.is_leaving = True
        self._tell()
        await self.pipe.close()

    async def _again(self, reattach: Reattach) -> Pipe | None:
        deadline = time.monotonic() + _REATTACH_S
        while time.monotonic() < deadline and not self.is_leaving:
            try:
                pipe = await reattach()
            except Gone:
                return None
            except (BackendDown, SandboxError, OSError, TimeoutError) as error:
                _log.warning(
                    "sandbox.not_attached",
                    environment_id=self.environment_id.hex,
                    error=type(error).__name__,
                )
                await asyncio.sleep(_PAUSE_S)
            else:
                _log.info("sandbox.attached_again", environment_id=self.environment_id.hex)
                return pipe
        return None

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


@dataclass(eq=False)
class Running:
    """A command whose result is not stored yet."""

    id: str
    epoch: int
    record: Record
    live: Live
    ends_by: float
    """On the event loop's clock: what has not said by then how it ended is ended."""
    session: str | None = None
    is_killed: bool = False
    """Somebody has asked for its end."""
    stopped_for: str | None = None
    """Why its sandbox was stopped by us."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    timeout: asyncio.Timeout | None = field(default=None, repr=False)

    def hurry(self, seconds: float) -> None:
        """It is being killed, and has to say so soon."""
        self.is_killed = True
        self.ends_by = min(self.ends_by, asyncio.get_running_loop().time() + seconds)
        if self.timeout is not None and not self.timeout.expired():
            self.timeout.reschedule(self.ends_by)
