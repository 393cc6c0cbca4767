"""Tasks of the broker that outlive whoever asked for them."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog

_log = structlog.get_logger(__name__)


class Tasks:
    """Keeps and names them; a failure of one is logged, and costs no other."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator["Tasks"]:
        """Take tasks until the context ends; what runs then is cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                yield self
            finally:
                self._group = None
                for task in list(self._tasks):
                    task.cancel()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run it.

        Raises:
            RuntimeError: The broker is about to stop.
        """
        if self._group is None:
            work.close()
            raise RuntimeError("the broker is about to stop")
        task = self._group.create_task(_guarded(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _guarded(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except Exception:  # noqa: BLE001 - the task boundary
        _log.exception("broker.task_failed", task=name)
