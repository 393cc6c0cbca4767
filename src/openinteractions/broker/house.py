"""The environments of this broker: their files, and those of them that run.

An environment has a slot here from its first use. Its sandbox starts with the first command, stops
when it has been idle for long (its files stay), and comes back with the next one. Whatever changes
its state holds the slot's lock.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import structlog

from openinteractions import metrics
from openinteractions.broker import store
from openinteractions.broker.bounds import Bounds
from openinteractions.broker.egress import EgressLog, Projects
from openinteractions.broker.launcher import Launcher
from openinteractions.broker.live import DELETED, OVER_BOUND, Live
from openinteractions.broker.rules import Rules, Setup
from openinteractions.broker.shares import Shares
from openinteractions.broker.slot import Slot
from openinteractions.broker.store import Row
from openinteractions.broker.tasks import Tasks
from openinteractions.db.engine import LOST, Database
from openinteractions.errors import NotFound, Unready
from openinteractions.resources.environments import store as environments
from openinteractions.sandbox.disk import Disks
from openinteractions.sandbox.egress.state import Egress
from openinteractions.sandbox.files.threads import owned_by
from openinteractions.sandbox.files.tree import Tree
from openinteractions.sandbox.pipe import Pipe
from openinteractions.sandbox.port import BackendDown, Displaced, Gone, Json, Owner, SandboxError

_log = structlog.get_logger(__name__)

_BUSY_RETRY_S: Final = 5.0
_TIDY_S: Final = 5.0
_DISK_IDLE_S: Final = 60.0
_LOOK_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a house is built of."""

    database: Database
    disks: Disks
    launcher: Launcher
    rules: Rules
    projects: Projects
    egress_log: EgressLog
    tasks: Tasks


class House:
    """All of them."""

    def __init__(self, name: str, parts: Parts, *, max_running: int, idle_stop_s: float) -> None:
        self.name = name
        """The broker's."""
        self.parts = parts
        self.max_running = max_running
        self._idle_stop_s = idle_stop_s
        self.problem: str | None = "The broker has not asked its container engine yet."
        """Why no sandbox can be started now."""
        self.is_complete = False
        """What a broker before has left running is known."""
        self._slots: dict[UUID, Slot] = {}
        self._bounds = Bounds(parts.disks)
        self._starting: Counter[UUID] = Counter()
        """For which projects."""
        self._shares = Shares(max_running)

    # Looking.

    @property
    def running(self) -> int:
        """How many sandboxes run."""
        return self._starting.total() + sum(
            1 for slot in self._slots.values() if slot.live is not None
        )

    def slot(self, environment_id: UUID) -> Slot:
        """An environment's slot; made if it has none."""
        return self._slots.setdefault(environment_id, Slot(environment_id))

    def slots(self) -> Iterable[Slot]:
        """All slots."""
        return list(self._slots.values())

    def show(self) -> list[Json]:
        """What is here, for the operator."""
        return [
            {
                "id": slot.id.hex,
                "state": "stopped" if slot.live is None else "running",
                "idle_s": round(slot.idle_s, 3),
                "executions": sorted(slot.running),
            }
            for slot in self._slots.values()
        ]

    async def row(self, environment_id: UUID) -> Row:
        """An environment's row, which must be this broker's.

        Raises:
            NotFound: There is none, or it is deleted or expired.
            Unready: Another broker has it, or none yet.
        """
        row = await store.environment(self.parts.database, environment_id)
        if row is None or row.is_gone:
            raise NotFound(f"No such environment: {environment_id.hex}.")
        if row.broker != self.name:
            raise Unready(
                f"The environment {environment_id.hex} is not with this broker.", retry_after_s=1
            )
        return row

    # Files.

    @asynccontextmanager
    async def files(self, environment_id: UUID) -> AsyncGenerator[Path]:
        """The root of an environment's tree, mounted while the context lasts.

        Raises:
            NotFound: No such environment, or its files are lost.
        """
        async with self._files(environment_id) as (root, _):
            yield root

    @asynccontextmanager
    async def _files(self, environment_id: UUID) -> AsyncGenerator[tuple[Path, Row]]:
        slot = self.slot(environment_id)
        with slot.files_used():
            async with slot.lock:
                row = await self.row(environment_id)
                root = await self._opened(slot, row)
            yield root, row

    @asynccontextmanager
    async def tree(self, environment_id: UUID) -> AsyncGenerator[Tree]:
        """An environment's files, to be worked on. Errors as in `files`."""
        async with self._files(environment_id) as (root, row):
            slot, uid = self.slot(environment_id), self.parts.disks.uid
            quota = self._bounds.quota(environment_id)
            tree = Tree(root, uid=uid, gid=uid, environment=environment_id.hex, quota=quota)
            with owned_by(row.project_id.hex):
                if slot.is_to_be_cleaned:
                    slot.cleaned_at = time.monotonic()
                    await tree.clean()
                yield tree

    @asynccontextmanager
    async def fenced(self, environment_id: UUID, owner: Owner) -> AsyncGenerator[None]:
        """Where a run's owner changes an environment's files, while the context lasts (ruling R4).

        One at a time: what a replaced owner was just let in for is done before its successor does
        anything, and cannot undo it.

        Raises:
            Displaced: It has been replaced, or its run has ended.
        """
        async with self.slot(environment_id).landing:
            if not await store.owns(self.parts.database, owner):
                raise Displaced("The run has another owner now.")
            yield

    async def ensure(self, environment_id: UUID, source: UUID | None) -> None:
        """Have an environment's disk, empty or a copy of another one's.

        Raises:
            NotFound: No such environment, or no such source in its project.
            TooLarge: The source has more than it may.
            Unready: The broker's disk is full, or nearly so.
        """
        slot = self.slot(environment_id)
        with slot.files_used():
            origin = None if source is None else await self.row(source)
            async with slot.lock:
                row = await self.row(environment_id)
                if origin is not None and origin.project_id != row.project_id:
                    raise NotFound(f"No such environment: {origin.id.hex}.")
                if row.has_disk:
                    await self._opened(slot, row)
                elif origin is not None and origin.has_disk:
                    await self._fork(origin, row)
                else:
                    await self._opened(slot, row)

    async def add_folders(self, environment_id: UUID, names: Sequence[str]) -> None:
        """Have folders at the top of an environment, beside the three.

        Its sandbox is stopped for one that is not there yet: the next one has it.

        Raises:
            Invalid: There would be too many, or a name cannot be.
            NotFound: No such environment, or its files are lost.
            Unready: Its sandbox is in use.
        """
        slot = self.slot(environment_id)
        async with self.tree(environment_id) as tree, slot.lock:
            missing = await tree.missing_tops(names)
            if not missing:
                return
            if slot.live is not None and slot.is_at_work:
                raise Unready(
                    f"The environment gets the folder '/{missing[0]}', for which its sandbox has "
                    "to start anew: not while something runs in it. Try again when it has ended.",
                    retry_after_s=_BUSY_RETRY_S,
                )
            await self._stop(slot, "it gets another folder")
            await tree.add_tops(missing)

    async def note_change(self, environment_id: UUID) -> None:
        """Say that an environment's files were changed from outside its sandbox."""
        try:
            await environments.set_changed(self.parts.database, environment_id)
        except LOST as error:
            # They are counted anew some seconds later.
            _log.warning(
                "environment.change_not_noted",
                environment_id=environment_id.hex,
                error=type(error).__name__,
            )

    async def usage(self, environment_id: UUID) -> tuple[int, int]:
        """Files of an environment and their bytes."""
        async with self.files(environment_id):
            found = await self.parts.disks.usage(environment_id.hex)
        return found.file_count, found.size_bytes

    async def delete(self, environment_id: UUID) -> None:
        """Stop an environment and remove its files, whatever its row says."""
        slot = self.slot(environment_id)
        with slot.used():
            async with slot.lock:
                await self._stop(slot, DELETED)
                await self.parts.disks.delete(environment_id.hex)
                slot.is_open, slot.cleaned_at = False, None
                self.parts.projects.drop(environment_id)
                self._bounds.forget(environment_id, is_deleted=True)
        _log.info("environment.deleted", environment_id=environment_id.hex)

    async def _opened(self, slot: Slot, row: Row) -> Path:
        """The tree of a row's environment, made at its first use."""
        disks = self.parts.disks
        if not row.has_disk:
            await disks.ensure(row.id.hex)
            await environments.set_disk(self.parts.database, row.id, has_disk=True)
        try:
            root = await disks.open(row.id.hex)
        except Gone:
            _log.error("environment.files_lost", environment_id=row.id.hex)
            raise Gone(
                f"The files of environment {row.id.hex} are lost: its broker has no disk of it."
            ) from None
        slot.is_open = True
        return root

    async def _fork(self, origin: Row, row: Row) -> None:
        await self.parts.disks.fork(origin.id.hex, row.id.hex)
        await environments.set_disk(self.parts.database, row.id, has_disk=True)
        _log.info("environment.forked", environment_id=row.id.hex, from_environment=origin.id.hex)

    # Running.

    @asynccontextmanager
    async def sandbox(self, environment_id: UUID) -> AsyncGenerator[Live]:
        """The running sandbox of an environment, started if need be; in use meanwhile."""
        slot = self.slot(environment_id)
        with slot.used():
            async with slot.lock:
                live = await self.activate(slot, await self.row(environment_id))
            yield live

    async def activate(self, slot: Slot, row: Row) -> Live:
        """Have an environment's sandbox running; the caller holds the slot's lock.

        Raises:
            Unready: There is no room, or the engine is away.
            TooLarge: It was stopped since its files have become too large.
            SandboxError: It does not start.
        """
        slot.touch()
        live = slot.live
        if live is not None:
            try:
                await live.usable()
            except Gone:
                await self._bury(slot, live)
                live = None
        if live is None:
            self.check_ready()
            root = await self._opened(slot, row)
            await self._bounds.admit(row.id)
            await self._make_room(row.project_id)
            self._starting[row.project_id] += 1
            try:
                live = await self._start(slot, row, root)
            finally:
                self._starting[row.project_id] -= 1
        elif live.revision != row.revision:
            configure(live, await self.parts.rules.load(row))
        return live

    def check_ready(self) -> None:
        """Refuse what needs a new sandbox, where none is to be had.

        Raises:
            Unready: With the reason.
        """
        if self.problem is not None:
            raise Unready(f"No sandbox can be started: {self.problem}", retry_after_s=_BUSY_RETRY_S)

    async def refresh(self, environment_id: UUID) -> None:
        """Read an environment's rules and variables anew."""
        slot = self._slots.get(environment_id)
        if slot is None:
            return
        with slot.used():
            await self._refresh(slot)

    async def _refresh(self, slot: Slot) -> None:
        async with slot.lock:
            if slot.live is not None and not slot.live.gone.is_set():
                row = await self.row(slot.id)
                configure(slot.live, await self.parts.rules.load(row))

    async def stop(self, environment_id: UUID, why: str) -> None:
        """Stop an environment's sandbox, and what runs in it; its files stay."""
        slot = self._slots.get(environment_id)
        if slot is not None:
            with slot.used():
                async with slot.lock:
                    await self._stop(slot, why)

    def adopt(self, slot: Slot, row: Row, ref: str, pipe: Pipe, egress: Egress) -> Live:
        """Take a sandbox in that runs."""
        live = Live(row.id, row.project_id, ref, pipe, egress)
        slot.live = live
        slot.touch()
        self.parts.tasks.spawn(self._watch(slot, live), name=f"sandbox-{row.id.hex}")
        self._count()
        return live

    def egress(self, row: Row, setup: Setup) -> Egress:
        """The way out of an environment."""
        self.parts.projects.add(row.id, row.project_id)
        return Egress(row.id.hex, setup.policy, setup.credential_ids, project=row.project_id.hex)

    async def _start(self, slot: Slot, row: Row, root: Path) -> Live:
        began = time.monotonic()
        launcher = self.parts.launcher
        if slot.leftover is not None:
            await launcher.remove(slot.leftover)
            slot.leftover = None
        setup = await self.parts.rules.load(row)
        egress = self.egress(row, setup)
        ref, pipe, kind = await launcher.launch(row.id, root, egress)
        live = self.adopt(slot, row, ref, pipe, egress)
        configure(live, setup)
        seconds = time.monotonic() - began
        metrics.child(metrics.sandbox_start_seconds, kind).observe(seconds)
        _log.info(
            "environment.started",
            environment_id=row.id.hex,
            kind=kind,
            seconds=round(seconds, 3),
        )
        return live

    async def _make_room(self, project_id: UUID) -> None:
        """Stop the idlest sandboxes until there is room for one more of a project.

        Raises:
            Unready: All are busy, or what is free is for projects that have fewer.
        """
        busy = +self._starting
        busy.update(
            slot.live.project_id for slot in self._slots.values() if slot.live and slot.is_busy
        )
        if not self._shares.may_have(project_id, busy):
            raise self._refusal(project_id, "in use, or for other projects that wait for one")
        while self.running >= self.max_running:
            idle = [slot for slot in self._slots.values() if slot.live and not slot.is_busy]
            if not idle:
                raise self._refusal(project_id, "busy")
            victim = min(idle, key=lambda slot: slot.last_used)
            async with victim.lock:
                if not (victim.uses or victim.running):
                    await self._stop(victim, "room needed")
        self._shares.note_start(project_id)

    def _refusal(self, project_id: UUID, why: str) -> Unready:
        if self._shares.note_refusal(project_id):
            _log.warning("broker.full", max_running=self.max_running, project_id=project_id.hex)
        return Unready(
            f"All {self.max_running} sandboxes of this broker are {why} "
            "(setting sandbox.max_running).",
            retry_after_s=_BUSY_RETRY_S,
        )

    async def _stop(self, slot: Slot, why: str) -> None:
        """The caller holds the lock."""
        live = slot.live
        if live is not None:
            for running in list(slot.running.values()):
                running.stopped_for = why
            await live.leave()
            slot.live = None
            await self._remove(slot, live)
            self._count()
            _log.info("environment.stopped", environment_id=slot.id.hex, why=why)
        if slot.is_open and not slot.file_uses:
            slot.is_open = not await self.parts.disks.release(slot.id.hex)

    async def _bury(self, slot: Slot, live: Live) -> None:
        """Clear up after a sandbox that has ended by itself."""
        if slot.live is not live:
            return
        slot.live = None
        metrics.sandboxes_lost.inc()
        _log.warning("sandbox.lost", environment_id=slot.id.hex, executions=sorted(slot.running))
        live.is_leaving = True
        await live.pipe.close()
        await self._remove(slot, live)
        self._count()

    async def _remove(self, slot: Slot, live: Live) -> None:
        try:
            await self.parts.launcher.remove(live.ref)
        except (BackendDown, SandboxError) as error:
            slot.leftover = live.ref
            _log.warning(
                "sandbox.not_removed", environment_id=slot.id.hex, error=type(error).__name__
            )

    async def _watch(self, slot: Slot, live: Live) -> None:
        launcher = self.parts.launcher
        if await live.keep(lambda: launcher.attach(live.ref, live.egress)):
            return
        async with slot.lock:
            await self._bury(slot, live)

    def _count(self) -> None:
        live = sum(1 for slot in self._slots.values() if slot.live is not None)
        metrics.sandboxes.labels("running").set(live)
        metrics.sandboxes.labels("warm").set(self.parts.launcher.pool.warm)

    # Tidying.

    async def tidy_for_ever(self) -> None:
        """Stop what has been idle for long, and unmount what nobody reads."""
        pause_s = min(_TIDY_S, max(self._idle_stop_s / 4, 0.1))
        while True:
            await asyncio.sleep(pause_s)
            self._count()
            for slot in self.slots():
                if slot.is_busy:
                    continue
                try:
                    await self._tidy(slot)
                except Exception:  # noqa: BLE001 - the others are tidied all the same
                    _log.exception("environment.not_tidied", environment_id=slot.id.hex)

    async def _tidy(self, slot: Slot) -> None:
        async with slot.lock:
            if slot.uses or slot.running:
                return
            if slot.live is not None:
                if slot.idle_s >= self._idle_stop_s:
                    await self._stop(slot, "idle")
            elif slot.disk_idle_s >= _DISK_IDLE_S:
                if slot.is_open:
                    slot.is_open = not await self.parts.disks.release(slot.id.hex)
                if not slot.is_open and slot.leftover is None:
                    self._slots.pop(slot.id, None)
                    self._bounds.forget(slot.id)

    async def watch_sizes_for_ever(self) -> None:
        """Stop the sandboxes of environments that grow too far beyond their bound."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for slot in self.slots():
                if slot.live is None:
                    continue
                try:
                    await self._watch_size(slot)
                except Gone:
                    continue
                except Exception:  # noqa: BLE001 - the others are watched all the same
                    _log.exception("environment.not_measured", environment_id=slot.id.hex)

    async def _watch_size(self, slot: Slot) -> None:
        live = slot.live
        found = await self._bounds.is_over(slot.id)
        if found is None:
            return
        _log.warning(
            "environment.over_bound",
            environment_id=slot.id.hex,
            size_bytes=found.charged,
            bound_bytes=found.size,
        )
        async with slot.lock:
            if slot.live is live:
                await self._stop(slot, OVER_BOUND)

    async def let_go(self) -> None:
        """At the broker's end: what runs a command lives on, for the next broker; the rest goes."""
        await asyncio.gather(*(self._let_go(slot) for slot in self.slots()))

    async def _let_go(self, slot: Slot) -> None:
        if slot.running and slot.live is not None:
            await slot.live.leave()
            return
        async with slot.lock:
            await self._stop(slot, "the broker stops")


def configure(live: Live, setup: Setup) -> None:
    """Give a sandbox its rules, for whatever connects from now on, and its commands' variables."""
    live.egress.swap(setup.policy, setup.credential_ids)
    live.variables = setup.variables
    live.revision = setup.revision
