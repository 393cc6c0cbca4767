"""All commands of a sandbox by their ids. An id is started once, ever."""

from __future__ import annotations

import time
from typing import Any

from openinteractions.sandbox.supervisor.execution import (
    Command,
    Execution,
    Lingering,
    Order,
    Refusal,
)
from openinteractions.sandbox.supervisor.processes import Marker, Nursery, kill_tree
from openinteractions.sandbox.supervisor.sessions import Cell, Sessions

_MAX_RUNNING = 256
_MAX_KEPT = 2048
_MAX_REMEMBERED = 20_000
_MAX_SPOOLED = 128 << 20
_SWEEP_EVERY = 16


class Table:
    """Starts commands and keeps their results until they are forgotten."""

    def __init__(self, nursery: Nursery, notebook: str, base_env: dict[str, str]) -> None:
        self._nursery = nursery
        self._base_env = base_env
        self._lingering = Lingering()
        self.sessions = Sessions(nursery, notebook, base_env)
        self._executions: dict[str, Execution] = {}
        self._forgotten: dict[str, None] = {}
        self._starts = 0

    def start(self, order: Order) -> bool:
        """Start a command; False if this id was started before, forgotten or not.

        Raises:
            Refusal: Too many are running.
        """
        if order.id in self._executions or order.id in self._forgotten:
            return False
        if self.running >= _MAX_RUNNING:
            raise Refusal("busy", f"{_MAX_RUNNING} commands are running already")
        self._sweep()
        execution: Command | Cell
        if order.session is None:
            execution = Command(order, self._nursery, self._lingering, self._base_env)
        else:
            execution = Cell(order, self.sessions)
        self._executions[order.id] = execution
        execution.start()
        return True

    def get(self, name: str) -> Execution:
        """A command that is running, or whose result is kept.

        Raises:
            Refusal: There is none of this id.
        """
        try:
            return self._executions[name]
        except KeyError:
            raise Refusal("unknown", "no such execution") from None

    def forget(self, name: str) -> None:
        """Drop the output and result of a command that has ended.

        Raises:
            Refusal: It is still running.
        """
        execution = self._executions.get(name)
        if execution is None:
            return
        if execution.result is None:
            raise Refusal("busy", "the execution is still running")
        self._forget(name)

    def list(self) -> list[dict[str, Any]]:
        """All that are known, oldest first."""
        now = time.monotonic()
        return [
            {
                "id": name,
                "epoch": execution.order.epoch,
                "is_running": execution.result is None,
                "age_s": round(now - execution.started_at, 3),
                "output_bytes": execution.spool.end,
            }
            for name, execution in self._executions.items()
        ]

    @property
    def running(self) -> int:
        """How many have not ended."""
        return sum(execution.result is None for execution in self._executions.values())

    @property
    def kept(self) -> int:
        """How many are known, running or not."""
        return len(self._executions)

    async def kill_all(self) -> None:
        """Kill everything, also what commands left running in the background."""
        await kill_tree(Marker(None), None)

    def _forget(self, name: str) -> None:
        self._executions.pop(name).spool.drop()
        self._forgotten[name] = None
        while len(self._forgotten) > _MAX_REMEMBERED:
            del self._forgotten[next(iter(self._forgotten))]

    def _sweep(self) -> None:
        """Make room at the cost of the oldest that have ended."""
        ended = [name for name, one in self._executions.items() if one.result is not None]
        for name in ended[: max(0, len(self._executions) - _MAX_KEPT + 1)]:
            self._forget(name)
        self._starts += 1
        if self._starts % _SWEEP_EVERY:
            return
        spooled = sum(one.spool.held for one in self._executions.values())
        for name in ended:
            if spooled <= _MAX_SPOOLED:
                return
            if name in self._executions:
                spooled -= self._executions[name].spool.held
                self._executions[name].spool.drop()
