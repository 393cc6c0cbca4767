"""`make chaos`: hundreds of background runs, while everything that can die does.

    python -m tests.chaos.run --runs 200 --seed 7

The seed decides what the upstream says and how it fails, what callers do, and what the monkey
breaks; how these meet in time is the machine's.
"""

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openinteractions import telemetry
from tests.chaos import clients, stage, verify
from tests.chaos.clients import World
from tests.chaos.monkey import Monkey
from tests.chaos.script import TURNS, Upstream
from tests.chaos.stage import Stage

_GAP_S = 0.12


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it went."""

    wrong: list[str]
    text: str


async def chaos(
    *, runs: int, seed: int, limit_s: float, log: bool = False, keep_logs: Path | None = None
) -> Verdict:
    """Do it all once."""
    chains = -(-runs // TURNS)
    upstream = Upstream(seed, gap_s=_GAP_S)
    async with upstream.serve(), stage.opened(upstream.url, keep_logs=keep_logs) as it:
        world = World(seed, [slot.port for slot in it.apis if slot.port], limit_s)
        monkey = Monkey(it, seed, log=log)
        began = time.monotonic()
        await _all_runs(world, it, monkey, chains, log=log)
        seconds = time.monotonic() - began
        await it.all_ready()
        shown = await _settled(it, world)
        wrong = await verify.everything(it, world, upstream, shown)
        wrong += await it.close()
        wrong += it.crashes()
        marks = {
            mark: it.count(mark)
            for mark in ("job.lease_lost", "declared_dead", "worker.buried", "database_lost")
        }
    text = (
        f"seed {seed}: {verify.summary(upstream, shown)}\n"
        f"  {seconds:.0f} s, monkey {dict(monkey.deeds)}\n"
        f"  {len(world.readings)} readers over "
        f"{sum(r.connections for r in world.readings)} connections, {world.retries} waits of "
        f"callers; in the logs {marks}, processes started {sum(s.starts for s in it.slots)} times"
    )
    return Verdict(wrong, text)


async def _all_runs(world: World, it: Stage, monkey: Monkey, chains: int, *, log: bool) -> None:
    """Start the callers a little apart, and the monkey; it stops before the last answers."""
    enough = asyncio.Event()
    rng = random.Random(f"{world.seed} starts")
    spread_s = chains * 0.6

    async def callers() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(chains):
                delay_s = rng.uniform(0, spread_s)
                group.create_task(clients.chain(world, number, delay_s=delay_s))
            for number in range(chains // 2):
                delay_s = rng.uniform(0, spread_s)
                group.create_task(clients.foreground(world, number, delay_s=delay_s))

    async def watch() -> None:
        while True:
            await asyncio.sleep(5)
            done = sum(bool(asked.status) for asked in world.asked)
            print(f"{done} of {len(world.asked)} asked have ended", flush=True)

    async with asyncio.TaskGroup() as group:
        group.create_task(monkey.play(enough))
        watcher = group.create_task(watch()) if log else None
        working = group.create_task(callers())
        # Long enough for everything to be hit; then what is left must heal by itself.
        await asyncio.wait([working], timeout=spread_s + 12)
        enough.set()
        await working
        if watcher is not None:
            watcher.cancel()


async def _settled(it: Stage, world: World) -> dict[str, Any]:
    """Every interaction there is, as GET shows it, once none runs: also those nobody waits for."""
    rng = random.Random(0)
    deadline = time.monotonic() + 30
    running = "select id from interactions where status in ('in_progress', 'queued')"
    while await verify.rows(it, running) and time.monotonic() < deadline:  # noqa: ASYNC110 - other processes
        await asyncio.sleep(0.2)
    shown: dict[str, Any] = {}
    async with world.session() as http:
        for (key,) in await verify.rows(it, "select id from interactions order by id"):
            got = await world.call(http, rng, "GET", f"interactions/v1_{key.hex}")
            shown[got["id"]] = got
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--limit", type=float, default=900, help="seconds")
    parser.add_argument("--keep-logs", type=Path, help="a folder for the processes' logs")
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    telemetry.configure(level="error", form="text")
    print(f"seed {given.seed}", flush=True)
    verdict = asyncio.run(
        chaos(
            runs=given.runs,
            seed=given.seed,
            limit_s=given.limit,
            log=not given.quiet,
            keep_logs=given.keep_logs,
        )
    )
    print(verdict.text)
    for line in verdict.wrong[:40]:
        print("WRONG:", line[:1500])
    print("FAILED" if verdict.wrong else "ok")
    sys.exit(bool(verdict.wrong))


if __name__ == "__main__":
    main()
