"""`doctor`: what is wrong, in plain words, and what to do about it."""

import shutil
from collections.abc import Iterator

from openinteractions import ids
from openinteractions.cli import database as databases
from openinteractions.cli import doctor_sandbox
from openinteractions.cli.finding import BAD, EXIT, OK, WARN, Finding
from openinteractions.cli.interactions import does, lasted
from openinteractions.db import migrate
from openinteractions.db.engine import LOST, Database
from openinteractions.errors import SetupError
from openinteractions.jobs.overview import Overview, overview
from openinteractions.settings import Settings

_LEAST_FREE_BYTES = 2**30
_OLD_S = 60.0
_LONG_S = 600.0
"""A run that takes longer is worth a look."""


async def examine(settings: Settings) -> int:
    """Look at everything, print what was found, and return the exit code."""
    findings = list(_machine(settings))
    findings += await doctor_sandbox.sandboxes(settings)
    try:
        async with databases.opened(settings, pool_size=2, attach=True) as database:
            findings += await _database(settings, database)
    except (SetupError, *LOST) as error:
        text = error.message if isinstance(error, SetupError) else f"{type(error).__name__}"
        findings.append(Finding(BAD, f"the database cannot be opened: {text}", _DATABASE_ADVICE))
    for finding in findings:
        print(f"{finding.level:8} {finding.what}")
        if finding.advice:
            print(f"{'':8} → {finding.advice}")
    return max(EXIT[finding.level] for finding in findings)


_DATABASE_ADVICE = "is it running, and is DATABASE_URL (or --data-dir) the one that `serve` uses?"


def _machine(settings: Settings) -> Iterator[Finding]:
    if settings.providers:
        names = ", ".join(f"{name} ({p.kind})" for name, p in settings.providers.items())
        yield Finding(OK, f"providers: {names}")
        for name, provider in settings.providers.items():
            try:
                provider.key()
            except SetupError as error:
                yield Finding(BAD, f"provider {name}: {error.message}")
    else:
        yield Finding(
            WARN,
            "no provider is configured: only the local model can answer",
            "set OPENAI_API_KEY, GEMINI_API_KEY or ANTHROPIC_API_KEY, or add [providers.<name>]",
        )
    yield _agents(settings)
    kind = settings.search.kind
    yield Finding(
        OK, "web search: Gemini's own only" if kind is None else f"web search: Gemini's own, {kind}"
    )
    home = settings.home()
    if home.exists():
        free = shutil.disk_usage(home).free
        level = OK if free > _LEAST_FREE_BYTES else WARN
        yield Finding(level, f"{free / 2**30:.1f} GiB are free in {home}")


def _agents(settings: Settings) -> Finding:
    """What agents think with that name no model."""
    chosen = settings.agents.model or settings.models.default
    has_gemini = any(provider.kind == "gemini" for provider in settings.providers.values())
    if settings.agents.model is None and has_gemini:
        return Finding(OK, "agents think with Gemini, as the hosted ones do (agents.model)")
    if chosen is not None:
        return Finding(OK, f"agents think with {chosen} (agents.model)")
    return Finding(
        WARN,
        "agents that name no model have only the local one, which is too small for most tasks",
        "set agents.model to a model of your provider",
    )


async def _database(settings: Settings, database: Database) -> list[Finding]:
    if not await migrate.is_current(database):
        if settings.database_url is None:
            return [Finding(OK, "the embedded database's schema is made by the next `serve`")]
        return [
            Finding(BAD, "the schema is not this version's", "run `openinteractions migrate`"),
        ]
    seen = await overview(database, dead_after=settings.worker.dead_after)
    findings = [Finding(OK, "the database answers, and its schema is this version's")]
    findings += _workers(settings, seen)
    findings += _queue(seen)
    findings += await doctor_sandbox.brokers(database)
    return findings


def _workers(settings: Settings, seen: Overview) -> Iterator[Finding]:
    limit = settings.worker.dead_after.total_seconds()
    alive = [worker for worker in seen.workers if worker.silent_s <= limit]
    for worker in alive:
        yield Finding(
            OK, f"{worker.role} {worker.id} (pid {worker.pid}) beats and runs {worker.jobs} jobs"
        )
    for worker in seen.workers:
        if worker.silent_s > limit:
            yield Finding(
                WARN,
                f"{worker.role} {worker.id} (pid {worker.pid} on {worker.host.split('/')[0]}) has "
                f"been silent for {worker.silent_s:.0f} s and owns {worker.jobs} jobs",
                "a live worker takes its jobs over; if that does not happen, start one",
            )
    if not any(worker.role != "api" for worker in alive):
        yield Finding(
            WARN if not seen.ownerless else BAD,
            "no worker is alive: background work waits, and nothing is taken over",
            "start `openinteractions serve`, or `openinteractions worker`",
        )
    if seen.ownerless:
        yield Finding(
            WARN, f"{seen.ownerless} running jobs belong to dead owners and wait for a sweep"
        )


def _queue(seen: Overview) -> Iterator[Finding]:
    for count in seen.counts:
        level = WARN if count.state == "failed" or count.oldest_s > _OLD_S else OK
        age = f", the oldest due for {count.oldest_s:.0f} s" if count.state == "queued" else ""
        yield Finding(level, f"{count.jobs} jobs of kind {count.kind} are {count.state}{age}")
    for one in seen.active:
        if one.state == "running" and one.age_s > _LONG_S:
            yield Finding(
                WARN,
                f"{ids.interaction_id(one.id)} of project {one.project} runs for "
                f"{lasted(one.age_s)} on worker {one.worker_id} (its {one.attempt}. try): "
                f"{does(one)}",
                "a hung one is ended by `openinteractions interactions cancel`; its `limits` "
                "would have done so",
            )
    for job in seen.troubled:
        yield Finding(
            BAD if job.state == "failed" else WARN,
            f"{job.kind} {job.id.hex} is {job.state} after {job.attempt} of {job.max_attempts} "
            f"tries: {job.last_error}",
        )
    for stuck in seen.stuck:
        yield Finding(
            BAD,
            f"interaction v1_{stuck.id.hex} is {stuck.status} for {stuck.age_s:.0f} s and has no "
            "job: nobody will end it",
            "cancel it (POST …/cancel), and report this: it must not happen",
        )
