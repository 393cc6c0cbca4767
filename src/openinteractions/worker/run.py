"""Job kind `run`: an interaction whose owner was lost, or that was left to the queue."""

from openinteractions.jobs.queue import Job
from openinteractions.jobs.runner import Handler
from openinteractions.runs.executor import Executor

KIND = "run"


def handler(executor: Executor) -> Handler:
    """The handler of this kind."""

    async def run(job: Job) -> None:
        await executor.run_job(job)

    return run
