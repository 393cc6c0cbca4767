"""What the queue ought to hold: the model that the state machine compares the database with."""

from dataclasses import dataclass, field
from uuid import UUID

from openinteractions.jobs.queue import Job

QUEUED, RUNNING, FAILED, DONE = "queued", "running", "failed", "done"


@dataclass(eq=False)
class Expected:
    """One job as it ought to be."""

    id: UUID
    project: UUID
    provider: str
    key: str | None
    is_due: bool
    state: str = QUEUED
    epoch: int = 0
    attempt: int = 0
    owner: int | None = None
    is_stolen: bool = False
    """Taken by a cancel, which asks for nobody's share."""
    is_cancelled: bool = False
    steps: int = 0

    @property
    def is_suspect(self) -> bool:
        return self.state == RUNNING and self.attempt > 2

    def run(self, worker_id: int) -> None:
        self.state, self.owner, self.is_stolen = RUNNING, worker_id, False
        self.epoch += 1
        self.attempt += 1

    def queue(self) -> None:
        self.state, self.owner, self.is_stolen = QUEUED, None, False


@dataclass(eq=False)
class Process:
    """One worker process: what it is registered as, and what it believes to own."""

    number: int
    worker_id: int
    is_awake: bool = True
    is_silent: bool = False
    """For longer than a worker may be."""
    held: list[Job] = field(default_factory=list[Job])


@dataclass(eq=False)
class Model:
    """All jobs, and the workers on the list."""

    jobs: dict[UUID, Expected] = field(default_factory=dict[UUID, Expected])
    listed: set[int] = field(default_factory=set[int])

    def of(self, worker_id: int) -> list[Expected]:
        return [job for job in self.jobs.values() if job.owner == worker_id]

    def owns(self, claimed: Job) -> bool:
        """Whether a claim still holds."""
        job = self.jobs[claimed.id]
        return job.state == RUNNING and job.epoch == claimed.epoch

    def give_back(self, dead: set[int]) -> int:
        """Dead workers' jobs go back; suspects are charged for the death, their neighbours not."""
        self.listed -= dead
        back = [j for j in self.jobs.values() if j.state == RUNNING and j.owner in dead]
        accused = {job.owner for job in back if job.is_suspect}
        for job in back:
            if job.owner in accused and not job.is_suspect:
                job.attempt = max(job.attempt - 1, 0)
        for job in back:
            job.queue()
        return len(back)

    def leave(self, worker_id: int) -> None:
        self.listed.discard(worker_id)
        for job in self.of(worker_id):
            job.attempt = max(job.attempt - 1, 0)
            job.queue()

    def can_claim(self, job: Expected) -> bool:
        """Whether nothing but shares and suspicion keeps a job from being claimed."""
        blocked = job.key is not None and any(
            other.state == RUNNING and other.key == job.key for other in self.jobs.values()
        )
        return job.state == QUEUED and job.is_due and not blocked
