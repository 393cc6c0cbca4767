"""All tasks."""

from collections.abc import Collection, Sequence

from benchmarks.agent_tasks import code, conduct, records
from benchmarks.agent_tasks.task import Task

TASKS: Sequence[Task] = (*code.TASKS, *records.TASKS, *conduct.TASKS)


def chosen(ids: Collection[str]) -> list[Task]:
    """The tasks of these ids, or all.

    Raises:
        ValueError: There is no task of one of them.
    """
    unknown = set(ids) - {task.id for task in TASKS}
    if unknown:
        raise ValueError(f"There is no task {', '.join(sorted(unknown))}.")
    return [task for task in TASKS if not ids or task.id in ids]
