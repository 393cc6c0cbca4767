"""Job kind `deliver`: one callback to one URI, tried again for a day."""

from datetime import datetime

import structlog

from openinteractions import metrics
from openinteractions.db.engine import Database
from openinteractions.jobs import queue
from openinteractions.jobs.queue import Job
from openinteractions.jobs.runner import Handler
from openinteractions.resources.webhooks.service import (
    RETRY_AFTER,
    Deliverer,
    Delivery,
    Refused,
)

_log = structlog.get_logger(__name__)

KIND = "deliver"


def handler(database: Database, deliverer: Deliverer) -> Handler:
    """The handler of this kind. A delivery is at least once, with a stable id (ruling R5)."""

    async def deliver(job: Job) -> None:
        try:
            await deliverer.deliver(_delivery(job))
        except Refused as refusal:
            await _put_off(database, job, str(refusal))
            return
        metrics.deliveries.labels("delivered").inc()
        await queue.drop(database, job)

    return deliver


async def _put_off(database: Database, job: Job, reason: str) -> None:
    if job.attempt > len(RETRY_AFTER):
        metrics.deliveries.labels("given_up").inc()
        metrics.jobs_failed.labels(KIND).inc()
        _log.error("webhook.given_up", job_id=job.id.hex, attempts=job.attempt, reason=reason)
        await queue.fail(database, job, error=reason)
        return
    metrics.deliveries.labels("refused").inc()
    _log.warning("webhook.refused", job_id=job.id.hex, attempt=job.attempt, reason=reason)
    await queue.retry(database, job, error=reason, delay=RETRY_AFTER[job.attempt - 1])


def _delivery(job: Job) -> Delivery:
    args = job.args
    return Delivery(
        message_id=f"msg_{job.id.hex}",
        uri=args["uri"],
        event=args["event"],
        interaction_id=args["interaction_id"],
        ended_at=datetime.fromisoformat(args["ended_at"]),
        error=args.get("error"),
        user_metadata=args.get("user_metadata"),
    )
