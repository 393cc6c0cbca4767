"""Executing the calls of this server's tools: each once, its result committed behind it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from openinteractions import metrics
from openinteractions.errors import EngineError, LeaseLost, RequestError
from openinteractions.loop import repeats
from openinteractions.loop.record import Record
from openinteractions.loop.spec import RunState
from openinteractions.loop.structured import arguments_mismatch
from openinteractions.models.port import Json
from openinteractions.tools.port import Call, Tool
from openinteractions.tools.toolbox import Toolbox

_log = structlog.get_logger(__name__)

_AT_ONCE = 8
"""Calls of pure tools that run at the same time."""

_Open: TypeAlias = tuple[int, Json, Tool]


class Calls:
    """Runs what the model has called, in its order."""

    def __init__(self, record: Record, state: RunState, tools: Toolbox) -> None:
        self._record = record
        self._state = state
        self._tools = tools

    async def run_open(self, refusal: Callable[[], str | None]) -> None:
        """Execute the committed calls that have no result yet, and commit each result.

        Calls of pure tools that stand beside each other run at the same time; all others one after
        the other, since the model may count on their order.

        Args:
            refusal: Why no further call may run; None: it may.
        """
        for group in _groups(self._record.own_open_calls(self._tools)):
            reason = refusal()
            if reason is not None:
                results = [tool.failure(f"Not executed: {reason}") for _, _, tool in group]
            else:
                results = await _all([self._run(*each) for each in group])
            for (index, step, _), result in zip(group, results, strict=True):
                self._state.begun.pop(self._record.key(index), None)
                answered = {**result, "call_id": step["id"]}
                self._record.add(repeats.remarked(self._record.generated, step, answered))
            await self._record.commit()

    async def stop_open(self, message: str) -> None:
        """Give every open call a failure for a result, and end what runs of it (ruling R18)."""
        for index, step, tool in self._record.own_open_calls(self._tools):
            await tool.stop(self._record.key(index))
            self._record.add({**tool.failure(message), "call_id": step["id"]})

    async def _run(self, index: int, step: Json, tool: Tool) -> Json:
        name = _label(step)
        problem = arguments_mismatch(step["arguments"], tool.declaration())
        if problem is not None:
            metrics.child(metrics.tool_calls, name, "refused").inc()
            return tool.failure(f"Not executed: {problem}.")
        key = self._record.key(index)
        call = Call(
            step=step,
            key=key,
            begun=self._state.begun.get(key),
            begin=lambda note: self._begin(key, note),
        )
        with _counted(name) as counted:
            try:
                result = await tool.run(call)
            except LeaseLost:
                raise
            except (RequestError, EngineError) as error:
                _log.warning("tool.failed", tool=name, code=error.code, error=error.message)
                result = tool.failure(error.message)
            counted.outcome = "failed" if result.get("is_error") else "finished"
        return result

    async def _begin(self, key: str, note: Json) -> None:
        self._state.begun[key] = note
        await self._record.commit()


@dataclass(slots=True)
class _Counted:
    outcome: str = "broken"
    """Where nothing else is said: the run was lost, cancelled or crashed meanwhile."""


@contextmanager
def _counted(tool: str) -> Generator[_Counted]:
    """Count a call while it runs, and how it ended."""
    counted = _Counted()
    began = time.monotonic()
    with metrics.child(metrics.tool_calls_active, tool).track_inprogress():
        try:
            yield counted
        finally:
            metrics.child(metrics.tool_calls, tool, counted.outcome).inc()
            metrics.child(metrics.tool_seconds, tool).observe(time.monotonic() - began)


def _label(step: Json) -> str:
    """A tool's name in metrics and logs: never one that a caller or another server has made up."""
    kind: str = step["type"]
    return step["name"] if kind == "function_call" else kind.removesuffix("_call")


def _groups(calls: Sequence[_Open]) -> list[list[_Open]]:
    """Calls in their order; those that may run at the same time are together."""
    groups: list[list[_Open]] = []
    for call in calls:
        last = groups[-1] if groups else None
        if last and call[2].is_pure and last[-1][2].is_pure and len(last) < _AT_ONCE:
            last.append(call)
        else:
            groups.append([call])
    return groups


async def _all(runs: Sequence[Awaitable[Json]]) -> list[Json]:
    """Every result, in order. Should one raise, the others are ended first."""
    if len(runs) == 1:
        return [await runs[0]]
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
