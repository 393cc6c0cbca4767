"""One process of the server: its connections opened in order, and closed in the reverse one.

The api and the worker are the same process with other tasks in it; a small set-up runs both in one.
"""

import asyncio
import importlib
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
import structlog

from openinteractions import __version__, tracing
from openinteractions.crypto import Sealer, sealer
from openinteractions.db.engine import Database
from openinteractions.events.follow import Hub, Notifier, Tail
from openinteractions.events.log import Writer
from openinteractions.jobs.queue import Share
from openinteractions.jobs.runner import Claimer, Member, Timing
from openinteractions.loop.ports import Patience
from openinteractions.loop.spec import Limits
from openinteractions.models.catalog import Catalog
from openinteractions.models.port import Model
from openinteractions.netguard import Fetcher, Guard
from openinteractions.resources.agents.service import Agents
from openinteractions.resources.credentials.service import Vault
from openinteractions.resources.environments.service import Environments, Rules
from openinteractions.resources.interactions.lost import LostResponses
from openinteractions.resources.webhooks.service import Deliverer
from openinteractions.runs.equip import Equipment
from openinteractions.runs.executor import Executor
from openinteractions.runs.history import Cache
from openinteractions.runs.house import House
from openinteractions.runs.search import SearchBackend, SearchOptions
from openinteractions.runs.web import Reaches
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.egress.policy import Reach
from openinteractions.settings import SandboxSettings, SearchSettings, Settings
from openinteractions.worker import deliver, run, upkeep

if TYPE_CHECKING:
    from openinteractions.runs.mcp import McpServers

_log = structlog.get_logger(__name__)

_HOSTED_AGENT_MODELS = ("gemini-3.8-flash", "gemini-3.6-flash")
"""What the hosted API's agents think with; they are there where a Gemini provider, or an alias, is.

Source: https://ai.google.dev/gemini-api/docs/antigravity-agent
"""
_HISTORY_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a running process has open."""

    database: Database
    hub: Hub
    tail: Tail
    member: Member
    catalog: Catalog
    executor: Executor
    lost: LostResponses
    deliverer: Deliverer
    vault: Vault
    sealer: Sealer
    environments: Environments
    agents: Agents


@asynccontextmanager
async def opened(settings: Settings, database: Database, *, role: str) -> AsyncGenerator[Process]:
    """Open everything that an api or a worker needs; its runs end, or go back, when this closes.

    Args:
        settings: The whole tree.
        database: Migrated; closed by the caller.
        role: `api`, `worker` or `all`; only the last two take work from the queue.
    """
    if settings.traces:
        tracing.configure(version=__version__, role=role)
    async with AsyncExitStack() as stack:
        hub, tail = Hub(), Tail(database)
        writer = Writer(database, hub, interval=settings.worker.flush_interval)
        guard = Guard(settings.network.allow)
        fetchers = _Fetchers(guard, settings.limits.max_fetch_bytes, stack)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
                auto_decompress=True,
            )
        )
        local = await _local(settings, session, stack)
        catalog = Catalog(
            settings.providers,
            settings.models,
            session,
            local=local,
            local_context_tokens=settings.local.context_tokens // settings.local.parallel,
        )
        await stack.enter_async_context(Notifier(database, hub).running())
        await stack.enter_async_context(tail.running())
        await stack.enter_async_context(writer.running())
        timing = Timing(settings.worker.heartbeat, settings.worker.dead_after)
        member = await stack.enter_async_context(Member(database, timing, role=role).joined())
        key, old = settings.master_keys()
        seal = await asyncio.to_thread(sealer, key, old, settings.home())
        client = BrokerClient(seal.broker_token, tls=_tls(settings.sandbox))
        stack.push_async_callback(client.close)
        environments = Environments(
            database, client, seal, fetchers.opened(), _rules(settings.sandbox)
        )
        agents = Agents(database, seal, environments)
        vault = Vault(database, seal, fetchers.opened())
        stack.push_async_callback(vault.close)
        executor = Executor(
            House(
                database=database,
                hub=hub,
                writer=writer,
                member=member,
                catalog=catalog,
                fetcher=fetchers.opened(200),
                cache=Cache(_HISTORY_CACHE_BYTES),
                patience=Patience(settings.models.attempts, settings.models.max_retry_wait),
                limits=Limits(
                    max_steps=settings.limits.max_steps,
                    max_seconds=settings.limits.max_run_time.total_seconds(),
                ),
                equipment=Equipment(
                    sandboxes=environments,
                    web=_reaches(settings, fetchers, session),
                    mcp=_mcp(settings, fetchers, vault),
                ),
                sealer=seal,
                agents=agents,
                agent_models=_agent_models(settings),
                vendor_runs_code=settings.sandbox.code_execution == "vendor",
            )
        )
        deliverer = Deliverer(database, seal, fetchers.opened())
        if role != "api":
            await stack.enter_async_context(
                _working(settings, database, member, executor, deliverer, environments)
            )
        _log.info("process.ready", role=role, worker_id=member.worker_id)
        lost = LostResponses()
        await stack.enter_async_context(lost.watching(database))
        yield Process(
            database=database,
            hub=hub,
            tail=tail,
            member=member,
            catalog=catalog,
            executor=executor,
            lost=lost,
            deliverer=deliverer,
            vault=vault,
            sealer=seal,
            environments=environments,
            agents=agents,
        )
        _log.info("process.stopping", role=role, jobs=member.running)


@asynccontextmanager
async def _working(
    settings: Settings,
    database: Database,
    member: Member,
    executor: Executor,
    deliverer: Deliverer,
    environments: Environments,
) -> AsyncGenerator[None]:
    """Take work from the queue while the context lasts."""
    claimer = Claimer(
        database,
        member,
        {run.KIND: run.handler(executor), deliver.KIND: deliver.handler(database, deliverer)},
        concurrency=settings.worker.concurrency,
        share=Share(
            of_project=settings.worker.project_concurrency,
            of_provider=settings.worker.provider_concurrency,
        ),
    )
    async with claimer.running(), asyncio.TaskGroup() as group:
        task = group.create_task(
            upkeep.for_ever(
                database,
                every=settings.worker.upkeep_interval,
                keep_events=settings.event_retention,
                expire_environments=environments.expire,
            ),
            name="upkeep",
        )
        try:
            yield
        finally:
            task.cancel()


def _agent_models(settings: Settings) -> list[str]:
    """What agents think with, the most wanted first."""
    wanted = [settings.agents.model, *_HOSTED_AGENT_MODELS, settings.models.default]
    return [model for model in wanted if model is not None] + ["local/default"]


@dataclass(frozen=True, slots=True)
class _Fetchers:
    """Makes the ways out: each kind of work has one of its own, so that none holds up another."""

    guard: Guard
    max_bytes: int
    stack: AsyncExitStack
    """Closes them."""

    def opened(self, connections: int = 100) -> Fetcher:
        """A way with so many connections at once."""
        made = Fetcher(self.guard, max_bytes=self.max_bytes, connections=connections)
        self.stack.push_async_callback(made.close)
        return made


def _mcp(
    settings: Settings, fetchers: _Fetchers, vault: Vault
) -> Callable[[], Awaitable["McpServers"]]:
    """The way to MCP servers, for whoever needs it first: its library is large."""
    # Calls of tools take their time.
    slow = fetchers.opened(1000)
    ceiling = settings.sandbox.ceiling
    made: list[McpServers] = []

    async def opened() -> "McpServers":
        if not made:
            module = await asyncio.to_thread(importlib.import_module, "openinteractions.runs.mcp")
            reach = Reach(ceiling.mode, ceiling.domains)
            made.append(module.McpServers(slow, vault, ceiling=reach))
        return made[0]

    return opened


def _reaches(settings: Settings, fetchers: _Fetchers, session: aiohttp.ClientSession) -> Reaches:
    chosen = _search(settings.search)
    rules = settings.sandbox
    return Reaches(
        fetchers.opened(500),
        None if chosen is None else SearchBackend(chosen, session),
        default=Reach(rules.network.mode, rules.network.domains),
        ceiling=Reach(rules.ceiling.mode, rules.ceiling.domains),
    )


def _search(settings: SearchSettings) -> SearchOptions | None:
    if settings.kind is None:
        return None
    return SearchOptions(
        kind=settings.kind,
        url=settings.url,
        api_key=settings.key(),
        results=settings.results,
        timeout=settings.timeout,
        key_header=settings.key_header,
        results_field=settings.results_field,
        title_field=settings.title_field,
        url_field=settings.url_field,
        snippet_field=settings.snippet_field,
    )


def _rules(settings: SandboxSettings) -> Rules:
    return Rules(
        ttl=settings.ttl,
        log_retention=settings.log_retention,
        ceiling=Reach(settings.ceiling.mode, settings.ceiling.domains),
        skills_dir=settings.skills_dir,
        gcs_url=settings.gcs_url,
        max_environments=settings.max_environments,
        is_off=settings.enabled == "off",
    )


def _tls(settings: SandboxSettings) -> ssl.SSLContext | None:
    """What brokers' certificates are checked with; None: the system's roots."""
    return None if settings.tls_ca is None else ssl.create_default_context(cafile=settings.tls_ca)


async def _local(
    settings: Settings, session: aiohttp.ClientSession, stack: AsyncExitStack
) -> Model | None:
    """The local model, where its runtime is installed; it starts with its first request."""
    try:
        from openinteractions.models.local.runtime import LocalRuntime  # noqa: PLC0415 - optional
    except ImportError:
        return None
    runtime = LocalRuntime(settings.local, settings.models_home(), session)
    await stack.enter_async_context(runtime)
    return runtime.model()
