"""One broker: its parts opened in order, and let go of in the reverse one.

When it ends, however that is, its sandboxes and the commands in them run on; the next broker of
the same name takes them over.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import structlog

from openinteractions import __version__
from openinteractions.broker import engine
from openinteractions.broker.boot import Boot
from openinteractions.broker.egress import Credentials, EgressLog, Projects
from openinteractions.broker.executions import Executions
from openinteractions.broker.house import House, Parts
from openinteractions.broker.launcher import Launcher, Recipe, write_bundle
from openinteractions.broker.listen import Listener, listening
from openinteractions.broker.registry import Registry
from openinteractions.broker.rules import Rules
from openinteractions.broker.server import Desk, create_app, serving
from openinteractions.broker.store import Card
from openinteractions.broker.tasks import Tasks
from openinteractions.broker.watch import Watch
from openinteractions.crypto import Sealer, sealer
from openinteractions.db.engine import LOST, Database
from openinteractions.errors import AppError, SetupError
from openinteractions.jobs.runner import machine
from openinteractions.netguard import Fetcher, Guard
from openinteractions.resources.credentials.service import Vault
from openinteractions.sandbox import mounts
from openinteractions.sandbox.disk import Disks
from openinteractions.sandbox.docker import DockerBackend
from openinteractions.sandbox.egress import ca
from openinteractions.sandbox.egress.policy import Reach
from openinteractions.sandbox.egress.proxy import Proxy
from openinteractions.sandbox.port import Json, Limits
from openinteractions.settings import NetworkPolicy, Settings

_log = structlog.get_logger(__name__)

_SWEEP_S: Final = 900.0


@dataclass(frozen=True, slots=True)
class Broker:
    """What a running broker has open."""

    address: str
    house: House
    executions: Executions
    watch: Watch
    beating: asyncio.Task[None]
    """Ends only where another broker has taken the name."""


@asynccontextmanager
async def opened(settings: Settings, database: Database) -> AsyncGenerator[Broker]:
    """Be the broker that the settings name, until the context ends.

    The engine may be away: files can be worked on then, and commands are refused with the reason.

    Raises:
        SetupError: The folder or the name is another broker's, or a setting is wrong.
    """
    sandbox = settings.sandbox
    home = sandbox.home(settings.home())
    key, old = settings.master_keys()
    seal = await asyncio.to_thread(sealer, key, old, settings.home())
    async with AsyncExitStack() as stack:
        disks = Disks(home, kind=sandbox.disk, size_bytes=sandbox.disk_bytes)
        stack.push_async_callback(disks.close)
        await disks.recover()
        listener = stack.enter_context(listening(sandbox, home))
        backend = engine.backend(sandbox)
        stack.push_async_callback(backend.close)
        parts = await _parts(settings, database, seal, disks, backend, stack)
        house = House(
            sandbox.broker,
            parts,
            max_running=sandbox.max_running,
            idle_stop_s=sandbox.idle_stop.total_seconds(),
        )
        executions = Executions(house)
        registry = Registry(database, _card(settings, listener))
        beating = await stack.enter_async_context(
            registry.entered(lambda: house.running, lambda: house.problem)
        )
        await stack.enter_async_context(parts.egress_log.writing())
        watch = await _watch(settings, backend, house, executions, stack)
        broker = Broker(listener.address, house, executions, watch, beating)
        desk = Desk(
            house=house,
            executions=executions,
            health=lambda: _health(settings, broker),
            is_token=seal.is_broker_token,
        )
        await stack.enter_async_context(serving(create_app(desk), listener.socket, listener.tls))
        _log.info(
            "broker.ready",
            name=sandbox.broker,
            address=listener.address,
            disk=disks.kind,
            problem=house.problem,
        )
        for problem in (*await disks.problems(), *parts.launcher.pool.problems):
            _log.warning("broker.weak", problem=problem)
        yield broker
        _log.info("broker.stopping", running=house.running)


async def _watch(
    settings: Settings,
    backend: DockerBackend,
    house: House,
    executions: Executions,
    stack: AsyncExitStack,
) -> Watch:
    """Take over from the broker before, now or when the engine answers, and start all loops."""
    parts = house.parts
    warm = settings.sandbox.home(settings.home()).resolve() / "warm"
    boot = Boot(house, executions)
    # The pool is entered late, and left before the engine.
    late = await stack.enter_async_context(AsyncExitStack())
    # The tasks end first: to them, a pipe that is let go of would be a sandbox that has ended.
    stack.push_async_callback(house.let_go)
    await stack.enter_async_context(parts.tasks.running())

    async def on_up() -> None:
        if not boot.is_done:
            await boot.take_over()
            # Nothing of ours stays mounted that no sandbox needs.
            late.callback(mounts.unmount, warm)
            await late.enter_async_context(parts.launcher.pool)

    watch = Watch(backend, settings.sandbox, on_up, house)
    await watch.look()
    parts.tasks.spawn(watch.for_ever(), name="engine-watch")
    parts.tasks.spawn(house.tidy_for_ever(), name="tidy")
    parts.tasks.spawn(house.watch_sizes_for_ever(), name="sizes")
    parts.tasks.spawn(_sweep_for_ever(boot), name="sweep")
    return watch


async def _parts(
    settings: Settings,
    database: Database,
    seal: Sealer,
    disks: Disks,
    backend: DockerBackend,
    stack: AsyncExitStack,
) -> Parts:
    sandbox = settings.sandbox
    home = sandbox.home(settings.home())
    guard = Guard(settings.network.allow)
    fetcher = Fetcher(guard, max_bytes=settings.limits.max_fetch_bytes)
    stack.push_async_callback(fetcher.close)
    vault = Vault(database, seal, fetcher)
    stack.push_async_callback(vault.close)
    projects = Projects()
    log = EgressLog(database, projects)
    authority = await asyncio.to_thread(ca.load_or_make, home)
    bundle = await asyncio.to_thread(lambda: write_bundle(home, authority.bundle()))
    proxy = Proxy(authority, guard, Credentials(vault, projects), log, ports=sandbox.ports)
    stack.callback(proxy.close)
    recipe = Recipe(
        image=sandbox.image,
        runtime=sandbox.runtime,
        limits=Limits(
            cpus=sandbox.cpus,
            memory_bytes=sandbox.memory_bytes,
            pids=sandbox.pids,
            disk_bytes=sandbox.disk_bytes,
            tmp_bytes=sandbox.tmp_bytes,
        ),
        uid=disks.uid,
        bundle=bundle,
    )
    return Parts(
        database=database,
        disks=disks,
        launcher=Launcher(backend, home, proxy, recipe, broker=sandbox.broker, warm=sandbox.warm),
        egress_log=log,
        rules=Rules(
            database, seal, default=_reach(sandbox.network), ceiling=_reach(sandbox.ceiling)
        ),
        projects=projects,
        tasks=Tasks(),
    )


def _reach(policy: NetworkPolicy) -> Reach:
    try:
        return Reach(policy.mode, policy.domains)
    except ValueError as error:
        raise SetupError(f"sandbox.network and sandbox.ceiling: a domain {error}") from error


def _card(settings: Settings, listener: Listener) -> Card:
    return Card(
        name=settings.sandbox.broker,
        address=listener.address,
        host=machine(),
        pid=os.getpid(),
        backend="docker",
        capacity=settings.sandbox.max_running,
    )


def _health(settings: Settings, broker: Broker) -> Json:
    sandbox, house = settings.sandbox, broker.house
    return {
        "name": sandbox.broker,
        "backend": "docker",
        "engine": broker.watch.version,
        "version": __version__,
        "problem": house.problem,
        "running": house.running,
        "warm": house.parts.launcher.pool.warm,
        "environments": len(list(house.slots())),
        "disk": house.parts.disks.kind,
        "limits": {
            "max_running": sandbox.max_running,
            "cpus": sandbox.cpus,
            "memory_bytes": sandbox.memory_bytes,
            "pids": sandbox.pids,
            "disk_bytes": sandbox.disk_bytes,
        },
    }


async def _sweep_for_ever(boot: Boot) -> None:
    while True:
        try:
            await boot.sweep()
        except (AppError, *LOST) as error:
            _log.warning("broker.sweep_failed", error=type(error).__name__)
        await asyncio.sleep(_SWEEP_S)
