"""Commands in sandboxes: each id is started once, followed to its end, and its result kept (R4).

The row in `executions` is written before the command is sent. From then on the answer to the same
id is the running command, its stored result, or `unknown`; never a second run.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

import structlog

from openinteractions import metrics
from openinteractions.broker import store
from openinteractions.broker.house import House
from openinteractions.broker.live import DELETED, OVER_BOUND, Live, Running
from openinteractions.broker.record import Record
from openinteractions.broker.slot import Slot
from openinteractions.db.engine import LOST
from openinteractions.errors import Invalid, RequestError, TooMany, Unready
from openinteractions.sandbox import messages
from openinteractions.sandbox.pipe import Pipe
from openinteractions.sandbox.port import (
    Command,
    Displaced,
    Exit,
    Gone,
    NotBegun,
    SandboxError,
    StoppedFor,
)

_log = structlog.get_logger(__name__)

MIN_OUTPUT_BYTES: Final = 4096
MAX_OUTPUT_BYTES: Final = 16 * 2**20
"""Bounds on what is kept of an execution's output."""
_MAX_MISTAKES: Final = 5
_MAX_ID: Final = 200
_HEX: Final = 32
_KILL: Final = 9
_GRACE_S: Final = 30.0
"""How much later than its time limit a command may say how it ended."""
_KILL_GRACE_S: Final = 5.0
LONGEST_S: Final = 24 * 3600.0
"""The time limit of a command that has none."""
_STOP_S: Final = 15.0
_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 10.0
_UNKNOWN: Final = Exit(outcome="unknown")
_KILLED: Final = Exit(outcome="killed", signal=_KILL)
_TIMED_OUT: Final = replace(_KILLED, timed_out=True)
_WHYS: Final[Mapping[str, StoppedFor]] = {DELETED: "deleted", OVER_BOUND: "size"}


@dataclass(frozen=True, slots=True)
class Joined:
    """What a caller follows."""

    event: str
    """`started`: by this very request; `attached`: before."""
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a command may take of its follower's memory and time."""

    max_bytes: int = MAX_OUTPUT_BYTES
    timeout_s: float | None = None
    session: str | None = None


_WIDEST: Final = Bounds()


class Executions:
    """Of all environments of this broker."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._database = house.parts.database

    async def start(self, environment_id: UUID, command: Command) -> Joined:
        """Start a command, or join it where it was started before.

        Raises:
            Displaced: A higher epoch of the same interaction has been seen.
            NotFound: No such environment.
            NotBegun: It cannot be started now, and was not.
        """
        check_id(command.id)
        slot = self._house.slot(environment_id)
        with slot.used():
            async with slot.lock:
                joined = await self._joined(slot, command.id, command.epoch)
                return joined or Joined("started", await self._start(slot, command))

    async def join(self, environment_id: UUID, name: str) -> Joined:
        """Follow a command that was started before.

        Raises:
            Gone: It never was.
        """
        slot = self._house.slot(environment_id)
        with slot.used():
            async with slot.lock:
                joined = await self._joined(slot, name, None)
        if joined is None:
            raise Gone(f"No such execution: {name}.")
        return joined

    async def signal(
        self, environment_id: UUID, name: str, number: int, *, epoch: int | None
    ) -> None:
        """Signal a command and its children.

        A kill with an epoch also stops what has not been started yet: the id then counts as killed.

        Raises:
            Gone: It does not run.
            Displaced: The epoch is lower than one that was seen.
        """
        running = await self._find(environment_id, name, epoch=epoch, number=number)
        if running is None:
            return
        if epoch is not None:
            _fence(epoch, running.epoch)
        # Whoever has ended meanwhile needs no signal.
        with contextlib.suppress(ConnectionError, Gone):
            if number == _KILL:
                running.hurry(_KILL_GRACE_S)
                await (await running.live.usable()).kill(name)
            else:
                await (await running.live.usable()).signal(name, number)
        if epoch is not None and epoch > running.epoch:
            await store.raise_epoch(self._database, environment_id, name, epoch)
            running.epoch = epoch

    async def running(self, environment_id: UUID, name: str) -> Running:
        """A command that runs.

        Raises:
            Gone: It does not.
        """
        slot = self._house.slot(environment_id)
        async with slot.lock:
            running = slot.running.get(name)
        if running is None:
            raise Gone(f"No such execution runs: {name}.")
        slot.touch()
        return running

    def follow(
        self,
        slot: Slot,
        live: Live,
        name: str,
        epoch: int,
        bounds: Bounds = _WIDEST,
    ) -> Running:
        """Follow a command to its end, and store the result.

        What does not end in its time is ended, with its sandbox: nothing that a sandbox does, or
        fails to do, keeps a caller waiting for ever.
        """
        record = Record(min(max(bounds.max_bytes, MIN_OUTPUT_BYTES), MAX_OUTPUT_BYTES))
        limit_s = LONGEST_S if bounds.timeout_s is None else min(bounds.timeout_s, LONGEST_S)
        ends_by = _begins_by(slot, bounds.session) + limit_s + _GRACE_S
        running = Running(name, epoch, record, live, ends_by, bounds.session)
        slot.running[name] = running
        running.task = self._house.parts.tasks.spawn(
            self._follow(slot, running), name=f"execution-{slot.id.hex}-{name}"
        )
        return running

    async def _find(
        self, environment_id: UUID, name: str, *, epoch: int | None, number: int
    ) -> Running | None:
        """A command that runs; None where a kill has come before its start."""
        check_id(name)
        slot = self._house.slot(environment_id)
        running = slot.running.get(name)
        if running is None:
            # It may be about to start.
            async with slot.lock:
                running = slot.running.get(name)
                if running is None and epoch is not None and number == _KILL:
                    row = await self._house.row(environment_id)
                    if await self._begin(row, name, epoch=epoch, sandbox=""):
                        await self._end(environment_id, name, _KILLED, b"")
                        return None
        if running is None:
            raise Gone(f"No such execution runs: {name}.")
        return running

    async def _joined(self, slot: Slot, name: str, epoch: int | None) -> Joined | None:
        """What is known of an id; None: nothing. The caller holds the lock."""
        running = slot.running.get(name)
        if running is not None:
            if epoch is not None:
                _fence(epoch, running.epoch)
                await self._raise(slot.id, name, running.epoch, epoch)
                running.epoch = epoch
            return Joined("attached", running.record)
        found = await store.execution(self._database, slot.id, name)
        if found is None:
            return None
        if epoch is not None:
            _fence(epoch, found.epoch)
            await self._raise(slot.id, name, found.epoch, epoch)
        if found.exit is None:
            if not self._house.is_complete:
                # It may run in a sandbox that was not looked for yet.
                self._house.check_ready()
            # Written down, and nobody here follows it: it cannot be known whether it ran.
            _log.warning("execution.unknown", environment_id=slot.id.hex, execution_id=name)
            await self._end(slot.id, name, _UNKNOWN, b"")
            return Joined("attached", Record.load(b"", messages.exit_fields(_UNKNOWN)))
        return Joined("attached", Record.load(found.output or b"", found.exit))

    async def _raise(self, environment_id: UUID, name: str, old: int, new: int) -> None:
        if new > old:
            await store.raise_epoch(self._database, environment_id, name, new)

    async def _start(self, slot: Slot, command: Command) -> Record:
        row = await self._house.row(slot.id)
        try:
            live = await self._house.activate(slot, row)
        except Unready as error:
            raise NotBegun(error.message, retry_after_s=error.retry_after_s) from error
        pipe = await live.usable()
        if not await self._begin(row, command.id, epoch=command.epoch, sandbox=live.ref):
            raise Displaced("The run has another owner now.")
        command = replace(command, env={**live.variables, **command.env})
        try:
            await pipe.start(command)
        except (TooMany, SandboxError) as error:
            if not await _is_known(pipe, command.id):
                await store.withdraw(self._database, slot.id, command.id)
                raise
            _log.warning("execution.unsure", execution_id=command.id, error=error.message)
        except ConnectionError:
            # It may have arrived: whoever follows finds out.
            _log.warning("execution.unsure", environment_id=slot.id.hex, execution_id=command.id)
        bounds = Bounds(
            max_bytes=command.max_output_bytes,
            timeout_s=command.timeout_s,
            session=command.session,
        )
        return self.follow(slot, live, command.id, command.epoch, bounds).record

    async def _begin(self, row: store.Row, name: str, *, epoch: int, sandbox: str) -> bool:
        return await store.begin(
            self._database,
            row,
            name,
            interaction_id=interaction_of(name),
            epoch=epoch,
            sandbox=sandbox,
        )

    async def _follow(self, slot: Slot, running: Running) -> None:
        ended = await self._outcome(slot, running)
        running.record.finish(ended)
        slot.touch()
        metrics.child(metrics.executions, ended.outcome).inc()
        try:
            await self._keep(slot.id, running, ended)
            # Only now may the sandbox forget it.
            if not running.live.pipe.lost.is_set():
                await running.live.pipe.forget(running.id)
        except (ConnectionError, SandboxError, RequestError):
            pass
        except Exception:  # noqa: BLE001 - it must not count as running for ever
            _log.exception("execution.not_kept", execution_id=running.id)
        if slot.running.get(running.id) is running:
            del slot.running[running.id]
        slot.touch()

    async def _outcome(self, slot: Slot, running: Running) -> Exit:
        """How a command ended, whatever its sandbox says or does not say."""
        try:
            async with asyncio.timeout_at(running.ends_by) as running.timeout:
                return await _until_end(running)
        except Gone:
            return _stopped(running.stopped_for)
        except TimeoutError:
            ended = _KILLED if running.is_killed else _TIMED_OUT
        except Exception as error:  # noqa: BLE001 - what a sandbox says must not keep a run waiting
            ended = _UNKNOWN
            _log.warning("execution.senseless", execution_id=running.id, error=repr(error)[:200])
        finally:
            running.timeout = None
        _log.warning(
            "execution.not_ended",
            environment_id=slot.id.hex,
            execution_id=running.id,
            outcome=ended.outcome,
        )
        if slot.live is running.live:
            await self._stop(slot)
        return ended

    async def _stop(self, slot: Slot) -> None:
        """Stop a sandbox in which a command may run on: nothing else ends it for sure."""
        stopping = self._house.parts.tasks.spawn(
            self._house.stop(slot.id, "a command did not end"), name=f"stop-{slot.id.hex}"
        )
        await asyncio.wait({stopping}, timeout=_STOP_S)

    async def _keep(self, environment_id: UUID, running: Running, ended: Exit) -> None:
        """Store a result; however long the database is away."""
        pause_s = _PAUSE_S
        output = running.record.dump()
        while True:
            try:
                await self._end(environment_id, running.id, ended, output)
            except LOST as error:
                _log.warning(
                    "execution.not_stored",
                    environment_id=environment_id.hex,
                    execution_id=running.id,
                    error=type(error).__name__,
                )
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _MAX_PAUSE_S)
            else:
                return

    async def _end(self, environment_id: UUID, name: str, ended: Exit, output: bytes) -> None:
        fields = messages.exit_fields(ended)
        await store.end(self._database, environment_id, name, fields=fields, output=output)


def _stopped(why: str | None) -> Exit:
    """The end of a command whose sandbox is gone; None: not because we stopped it."""
    return _UNKNOWN if why is None else replace(_KILLED, stopped_for=_WHYS.get(why, "other"))


async def _until_end(running: Running) -> Exit:
    """Take in everything that a command says, over as many pipes as it takes.

    Raises:
        Gone: Its sandbox has ended, or does not know it.
        SandboxError: It says what makes no sense, again and again.
    """
    record, mistakes = running.record, 0
    while True:
        pipe = await running.live.usable()
        before = record.position
        try:
            async for piece in pipe.follow(running.id, record.position):
                if isinstance(piece, Exit):
                    return piece
                record.add(piece)
        except ConnectionError:
            pass
        except SandboxError:
            mistakes = 0 if record.position > before else mistakes + 1
            if mistakes > _MAX_MISTAKES:
                raise
        await asyncio.sleep(_PAUSE_S)


def _begins_by(slot: Slot, session: str | None) -> float:
    """When a command begins at the latest: cells of one session wait for each other."""
    now = asyncio.get_running_loop().time()
    if session is None:
        return now
    others = (each.ends_by for each in slot.running.values() if each.session == session)
    return max(now, *others, now)


async def _is_known(pipe: Pipe, name: str) -> bool:
    """Whether a command was started; where that cannot be found out, it counts as such."""
    try:
        return any(each["id"] == name for each in await pipe.list())
    except (ConnectionError, SandboxError):
        return True


def check_id(name: str) -> None:
    """Refuse what cannot be an execution's id.

    Raises:
        Invalid: It is too long, or has characters that ids do not have.
    """
    if not 0 < len(name) <= _MAX_ID or not name.isascii() or not name.isprintable():
        raise Invalid("The id of an execution must have 1 to 200 printable ASCII characters.")


def interaction_of(name: str) -> UUID | None:
    """The interaction that an id was minted for: it begins with its 32 digits and a dot."""
    digits, dot, _ = name.partition(".")
    if len(digits) != _HEX or not dot:
        return None
    try:
        return UUID(digits)
    except ValueError:
        return None


def _fence(epoch: int, seen: int) -> None:
    if epoch < seen:
        raise Displaced("The run has another owner now.")
