"""What a broker does about the past: sandboxes that still run, commands in them, what is nobody's.

A broker that was killed has left its containers running. They are found by their labels, attached
to, and their commands followed on; what belongs to nobody any more goes.
"""

import contextlib
import time
from typing import Final
from uuid import UUID

import structlog

from openinteractions.broker import store
from openinteractions.broker.executions import Executions
from openinteractions.broker.house import House, configure
from openinteractions.broker.live import Live
from openinteractions.broker.store import Row, Unfinished
from openinteractions.errors import AppError
from openinteractions.sandbox import messages
from openinteractions.sandbox.port import Exit

_log = structlog.get_logger(__name__)

_GRACE_S: Final = 3600.0
"""An environment that the database does not know keeps its files here for so long, in case that
the broker was started on the wrong database."""
_UNKNOWN: Final = Exit(outcome="unknown")


class Boot:
    """Takes over from the broker before; once, when the engine answers for the first time."""

    def __init__(self, house: House, executions: Executions) -> None:
        self._house = house
        self._executions = executions
        self._parts = house.parts
        self._strangers: dict[str, float] = {}
        self.is_done = False

    async def take_over(self) -> None:
        """Attach to what runs, follow what runs in it, and end the rest.

        Raises:
            BackendDown: The engine does not answer.
        """
        if self.is_done:
            return
        found = await self._parts.launcher.pool.recover()
        rows = await store.environments(self._parts.database, [UUID(env) for env in found])
        unfinished: dict[UUID, list[Unfinished]] = {}
        for each in await store.unfinished(self._parts.database, self._house.name):
            unfinished.setdefault(each.environment_id, []).append(each)
        for env, ref in found.items():
            environment_id = UUID(env)
            row = rows.get(environment_id)
            if await self._adopt(environment_id, row, ref, unfinished.get(environment_id, [])):
                unfinished.pop(environment_id, None)
        for executions in unfinished.values():
            for each in executions:
                await self._give_up(each)
        self.is_done = self._house.is_complete = True
        _log.info("broker.recovered", running=self._house.running, found=len(found))

    async def _adopt(
        self, environment_id: UUID, row: Row | None, ref: str, unfinished: list[Unfinished]
    ) -> bool:
        """Take a container in; False where that cannot be: it is removed then."""
        if row is not None and not row.is_gone and row.broker == self._house.name:
            try:
                await self._attach(row, ref, unfinished)
            except (AppError, ConnectionError) as error:
                _log.warning(
                    "sandbox.not_adopted",
                    environment_id=environment_id.hex,
                    error=str(error),
                )
            else:
                return True
        _log.info("sandbox.orphan_removed", environment_id=environment_id.hex)
        self._house.slot(environment_id).live = None
        await self._parts.launcher.remove(ref)
        return False

    async def _attach(self, row: Row, ref: str, unfinished: list[Unfinished]) -> None:
        slot = self._house.slot(row.id)
        async with slot.lock:
            setup = await self._parts.rules.load(row)
            # The disk is mounted for the container; now it is known to be.
            await self._parts.disks.open(row.id.hex)
            slot.is_open = True
            egress = self._house.egress(row, setup)
            pipe = await self._parts.launcher.attach(ref, egress)
            try:
                known = {str(each["id"]): each for each in await pipe.list()}
            except BaseException:
                await pipe.close()
                raise
            live = self._house.adopt(slot, row, ref, pipe, egress)
            configure(live, setup)
            for each in unfinished:
                if known.pop(each.id, None) is not None:
                    self._executions.follow(slot, live, each.id, each.epoch)
                else:
                    await self._give_up(each)
            await self._forget(live, known)
        _log.info("environment.adopted", environment_id=row.id.hex, executions=sorted(slot.running))

    async def _forget(self, live: Live, known: dict[str, messages.Json]) -> None:
        """What has ended, and has its result in the database, need not be kept in the sandbox."""
        for name, fields in known.items():
            if not fields["is_running"]:
                with contextlib.suppress(AppError, ConnectionError):
                    await live.pipe.forget(name)

    async def _give_up(self, each: Unfinished) -> None:
        _log.warning(
            "execution.unknown", environment_id=each.environment_id.hex, execution_id=each.id
        )
        fields = messages.exit_fields(_UNKNOWN)
        await store.end(
            self._parts.database, each.environment_id, each.id, fields=fields, output=b""
        )

    async def sweep(self) -> None:
        """Remove files of environments that the database has not known for long."""
        now = time.monotonic()
        disks = self._parts.disks
        found = [UUID(env) for env in await disks.list()]
        rows = await store.environments(self._parts.database, found)
        strangers = {each.hex for each in found if each not in rows}
        self._strangers = {env: self._strangers.get(env, now) for env in strangers}
        for env, since in list(self._strangers.items()):
            if now - since >= _GRACE_S:
                await self._house.delete(UUID(env))
                _log.warning("environment.stranger_removed", environment_id=env)
