"""What a broker does about the past: sandboxes that still run, commands in them, what is nobody's.

A broker that was killed has left its containers running. They are found by their labels, attached
to, and their commands followed on; what belongs to nobody any more goes.
"""

import asyncio
import contextlib
import time
from typing import Final
from uuid import UUID

import structlog

from openinteractions.broker import store
from openinteractions.broker.executions import LONGEST_S, Bounds, Executions, interaction_of
from openinteractions.broker.house import House, configure
from openinteractions.broker.live import Live
from openinteractions.broker.rules import Setup
from openinteractions.broker.slot import Slot
from openinteractions.broker.store import Row, Unfinished
from openinteractions.db.engine import LOST
from openinteractions.errors import AppError, SetupError
from openinteractions.sandbox import messages
from openinteractions.sandbox.port import BackendDown, Exit, SandboxError

_log = structlog.get_logger(__name__)

_GRACE_S: Final = 3600.0
"""An environment that the database does not know keeps its files here for so long, in case that
the broker was started on the wrong database."""
_ADOPT_S: Final = 45.0
_MAX_ERROR: Final = 200
_AT_ONCE: Final = 8
_FORGET_S: Final = 60.0
_MAX_FORGOTTEN: Final = 2048
_ABANDONED_S: Final = 5.0
_KILL: Final = 9
_UNKNOWN: Final = Exit(outcome="unknown")


class Boot:
    """Takes over from the broker before; once, when the engine answers for the first time."""

    def __init__(self, house: House, executions: Executions) -> None:
        self._house = house
        self._executions = executions
        self._parts = house.parts
        self._strangers: dict[str, float] = {}
        self._followed: set[tuple[UUID, str]] = set()
        """Commands that ran on, and how they end is known."""
        self.is_done = False

    async def take_over(self) -> None:
        """Attach to what runs, follow what runs in it, and end the rest.

        Raises:
            BackendDown: The engine does not answer.
        """
        if self.is_done:
            return
        parts = self._parts
        found = await parts.launcher.pool.recover()
        rows = await store.environments(parts.database, [UUID(env) for env in found])
        unfinished: dict[UUID, list[Unfinished]] = {}
        for each in await store.unfinished(parts.database, self._house.name):
            unfinished.setdefault(each.environment_id, []).append(each)
        # One that answers slowly does not hold up the others, nor the broker for long.
        turns = asyncio.Semaphore(_AT_ONCE)

        async def adopt(environment_id: UUID, ref: str) -> None:
            async with turns:
                mine = unfinished.get(environment_id, [])
                await self._adopt(environment_id, rows.get(environment_id), ref, mine)

        adopting = (adopt(UUID(env), ref) for env, ref in found.items())
        for problem in await asyncio.gather(*adopting, return_exceptions=True):
            if problem is not None:
                raise problem
        for env in await parts.disks.mounted():
            # Where nobody uses it, it is unmounted when it has been idle.
            self._house.slot(UUID(env)).is_open = True
        for environment_id, executions in unfinished.items():
            await self._give_up(self._house.slot(environment_id), executions)
        self._followed.clear()
        self.is_done = self._house.is_complete = True
        parts.tasks.spawn(self._end_abandoned_for_ever(), name="abandoned")
        _log.info("broker.recovered", running=self._house.running, found=len(found))

    async def _adopt(
        self, environment_id: UUID, row: Row | None, ref: str, unfinished: list[Unfinished]
    ) -> None:
        """Take a container in; where that cannot be, it is removed."""
        slot = self._house.slot(environment_id)
        if slot.live is not None:
            # By an attempt before, which the absence of the engine or the database broke off.
            return
        if row is not None and not row.is_gone and row.broker == self._house.name:
            try:
                setup = await self._parts.rules.load(row)
            except SetupError as error:
                self._refused(slot, error)
            else:
                try:
                    async with asyncio.timeout(_ADOPT_S):
                        await self._attach(slot, row, setup, ref, unfinished)
                except BackendDown:
                    raise
                except Exception as error:  # noqa: BLE001 - no sandbox keeps the broker from starting
                    self._refused(slot, error)
                else:
                    return
        _log.info("sandbox.orphan_removed", environment_id=environment_id.hex)
        await self._discard(slot, ref)

    def _refused(self, slot: Slot, error: Exception) -> None:
        _log.warning(
            "sandbox.not_adopted", environment_id=slot.id.hex, error=repr(error)[:_MAX_ERROR]
        )

    async def _discard(self, slot: Slot, ref: str) -> None:
        if slot.live is not None:
            await slot.live.leave()
            slot.live = None
        try:
            await self._parts.launcher.remove(ref)
        except SandboxError as error:
            slot.leftover = ref
            _log.warning(
                "sandbox.not_removed", environment_id=slot.id.hex, error=type(error).__name__
            )

    async def _attach(
        self, slot: Slot, row: Row, setup: Setup, ref: str, unfinished: list[Unfinished]
    ) -> None:
        async with slot.lock:
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
                    left_s = max(LONGEST_S - each.age_s, 0.0)
                    bounds = Bounds(timeout_s=left_s)
                    self._executions.follow(slot, live, each.id, each.epoch, bounds)
                    self._followed.add((slot.id, each.id))
        ended = [name for name, fields in known.items() if not fields["is_running"]]
        self._parts.tasks.spawn(_forget(live, ended), name=f"forget-{row.id.hex}")
        _log.info("environment.adopted", environment_id=row.id.hex, executions=sorted(slot.running))

    async def _give_up(self, slot: Slot, executions: list[Unfinished]) -> None:
        """Say of what is not followed that nobody knows how it ended."""
        fields = messages.exit_fields(_UNKNOWN)
        async with slot.lock:
            for each in executions:
                if (slot.id, each.id) not in self._followed and each.id not in slot.running:
                    _log.warning(
                        "execution.unknown", environment_id=slot.id.hex, execution_id=each.id
                    )
                    await store.end(
                        self._parts.database, slot.id, each.id, fields=fields, output=b""
                    )

    async def _end_abandoned_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_ABANDONED_S)
            try:
                await self.end_abandoned()
            except LOST as error:
                _log.warning("broker.sweep_failed", error=type(error).__name__)

    async def end_abandoned(self) -> None:
        """Kill what runs for an interaction that has ended: whoever started it cannot."""
        running = [
            (slot.id, each.id)
            for slot in self._house.slots()
            for each in slot.running.values()
            if not each.is_killed and interaction_of(each.id) is not None
        ]
        if not running:
            return
        found = await store.abandoned(self._parts.database, running)
        await asyncio.gather(*(self._kill(*each) for each in found))

    async def _kill(self, environment_id: UUID, name: str) -> None:
        _log.warning("execution.abandoned", environment_id=environment_id.hex, execution_id=name)
        with contextlib.suppress(AppError, ConnectionError):
            await self._executions.signal(environment_id, name, _KILL, epoch=None)

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


async def _forget(live: Live, names: list[str]) -> None:
    """What has ended, and has its result in the database, need not be kept in the sandbox."""
    with contextlib.suppress(AppError, ConnectionError, TimeoutError):
        async with asyncio.timeout(_FORGET_S):
            for name in names[:_MAX_FORGOTTEN]:
                await live.pipe.forget(name)
