"""Unstored runs (`store=false`): in memory, for one caller, and gone with it (ruling R16)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import asdict

import orjson
import structlog

from openinteractions import clock, ids
from openinteractions.db.engine import LOST
from openinteractions.errors import AppError
from openinteractions.events.types import CREATED, ENDED, IN_PROGRESS, Event
from openinteractions.loop.run import Outcome, Run
from openinteractions.loop.spec import RunSpec, RunState
from openinteractions.resources.interactions.runner import Ended, Unstored
from openinteractions.resources.interactions.store import StoredStep
from openinteractions.runs import equip, store
from openinteractions.runs.house import House
from openinteractions.runs.journal import MemoryJournal
from openinteractions.runs.purse import DayPurse
from openinteractions.runs.store import Line
from openinteractions.runs.stored import spend_of
from openinteractions.wire.events import completed, created, encode, error, status_update
from openinteractions.wire.usage import EMPTY_USAGE

_log = structlog.get_logger(__name__)
_SIGN_OF_LIFE_S = 15.0


class InMemory:
    """Implements the resource's `MemoryRun`."""

    def __init__(self, house: House, unstored: Unstored) -> None:
        self._house = house
        self._unstored = unstored
        self._journal = MemoryJournal(stream=unstored.stream)
        self._began = clock.now()
        # A task of its own, since it runs while its caller writes to the client; `stop` ends it.
        self._task = asyncio.get_running_loop().create_task(self._run(), name="unstored-run")
        self._task.add_done_callback(lambda _: self._journal.wake.set())

    async def ended(self) -> Ended:
        """Wait for its end."""
        return await asyncio.shield(self._task)

    async def events(self) -> AsyncIterator[list[Event]]:
        """What its stream shows, in batches; an empty one is a sign of life."""
        # Nothing can be looked up by this id: it only joins the events of one stream.
        public = ids.interaction_id(ids.uuid7())
        fields: dict[str, object] = {
            "id": public,
            "object": "interaction",
            "model": self._unstored.model,
        }
        yield [
            Event("c", CREATED, encode(created({**fields, "status": "in_progress"}))),
            Event("u", IN_PROGRESS, encode(status_update(public, "in_progress"))),
        ]
        journal = self._journal
        while not self._task.done() or journal.events:
            journal.wake.clear()
            batch, journal.events = journal.events, []
            if not batch and not self._task.done():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SIGN_OF_LIFE_S):
                        await journal.wake.wait()
                if journal.events or self._task.done():
                    continue
            yield batch
        yield [self._last(await self._task, fields)]

    async def stop(self) -> None:
        """Stop it; nothing happens if it has ended."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def _last(self, ended: Ended, fields: dict[str, object]) -> Event:
        if ended.status == "failed" and ended.errors is not None:
            fault = orjson.loads(ended.errors)[0]
            return Event("e", ENDED, encode(error(fault["code"], fault["message"])))
        shown = {
            **fields,
            "status": ended.status,
            "created": clock.rfc3339(ended.created_at),
            "updated": clock.rfc3339(ended.updated_at),
            "usage": orjson.loads(ended.usage or b"{}"),
            "warnings": None if ended.warnings is None else orjson.loads(ended.warnings),
        }
        return Event("f", ENDED, encode(completed(shown)))

    async def _run(self) -> Ended:
        asked = self._unstored
        line = None
        if asked.history is not None:
            line = Line(
                project_id=asked.project_id,
                segment_id=asked.history.segment_id,
                depth=asked.history.depth,
                idx=asked.history_idx,
            )
        house = self._house
        purse = None
        if asked.is_budgeted:
            purse = DayPurse(house.database, asked.project_id, asked.key_id)
        history = house.history(asked.project_id, line)
        async with house.equipment.kit(self._wanted()) as kit:
            run = Run(
                kit.spec,
                RunState(),
                inputs=asked.steps,
                generated=[],
                ports=house.ports(history, self._journal, purse, kit.tools),
            )
            try:
                outcome = await run.drive()
            finally:
                # Also where the caller went away: what was answered was paid for.
                await asyncio.shield(self._end(run))
        return self._ended(run, outcome)

    def _wanted(self) -> equip.Run:
        asked = self._unstored
        return equip.Run(
            spec=RunSpec.load(asked.spec),
            project_id=asked.project_id,
            interaction_id=ids.uuid7(),
            environment_id=asked.environment_id,
            epoch=1,
            secrets=asked.secrets,
            is_stored=False,
        )

    async def _end(self, run: Run) -> None:
        await self._pay(run)
        environment_id = self._unstored.environment_id
        if environment_id is None:
            return
        try:
            await self._house.sandboxes.delete(self._unstored.project_id, environment_id.hex)
        except (AppError, *LOST) as error:
            # It expires like any other.
            _log.warning("environment.not_removed", error=str(error))

    async def _pay(self, run: Run) -> None:
        paid = spend_of(run, self._unstored.key_id)
        try:
            await store.spend(self._house.database, self._unstored.project_id, paid)
        except LOST:
            _log.error("spend.lost", model=paid.model, cost_nanousd=paid.cost_nanousd)

    def _ended(self, run: Run, outcome: Outcome) -> Ended:
        warnings = [*self._unstored.warnings, *map(asdict, outcome.warnings)]
        return Ended(
            status=outcome.status,
            created_at=self._began,
            updated_at=clock.now(),
            steps=[
                StoredStep(number, step["type"], media=False, data=orjson.dumps(step))
                for number, step in enumerate(run.generated)
            ],
            usage=orjson.dumps(run.state.usage or EMPTY_USAGE),
            errors=orjson.dumps(outcome.errors) if outcome.errors else None,
            warnings=orjson.dumps(warnings) if warnings else None,
        )
