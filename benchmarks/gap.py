"""`make gap`: the coordination gap, in one run, side by side.

A run is six model turns, each continuing the one before; three turns in a hundred fail (a 500, a
cut, a stall). The naive chain calls the model itself, one step after the other, and ends where a
step fails: 0.97 ** 6 = 83 %. Ours asks the server for each step in the background, while workers
are killed -9 and started again. Then the same with agents whose steps are commands and edits in
their sandboxes (`gap_agent`); without a container engine that half says so and is left out. Exit
status 1 if fewer than 99.9 % of our runs end well, or if any step was done twice.
"""

import argparse
import asyncio
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import uvloop

from benchmarks import gap_agent
from benchmarks import gap_upstream as upstream
from benchmarks.gap_stage import LONGEST_S, Failed, Tally, all_runs, created, served, session
from benchmarks.gap_upstream import STEPS, Record, answer, prompt
from benchmarks.run import _folder, _load, _show_logs
from openinteractions import telemetry
from openinteractions.db.embedded import EmbeddedPostgres

_GOAL = 0.999
_SILENCE_S = 1.0
_KILL_EVERY_S = 10.0


# ---- the naive chain


async def naive_step(http: aiohttp.ClientSession, base: str, messages: list[Any]) -> str:
    """One call of the model; whatever goes wrong ends the run."""
    body = {"model": "m", "messages": messages, "stream": True}
    text, is_whole = "", False
    try:
        async with http.post(f"{base}/chat/completions", json=body) as response:
            if response.status != 200:
                raise Failed(f"the model answered {response.status}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choices = orjson.loads(line[6:])["choices"]
                    text += choices[0]["delta"].get("content", "") if choices else ""
                is_whole = is_whole or line.startswith(b"data: [DONE]")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Failed(type(error).__name__) from error
    if not is_whole:
        raise Failed("the answer was cut off")
    return text


async def naive_run(http: aiohttp.ClientSession, base: str, run: int) -> None:
    """Six calls, one after the other."""
    messages: list[Any] = []
    for step in range(STEPS):
        messages.append({"role": "user", "content": prompt(run, step)})
        text = await naive_step(http, base, messages)
        messages.append({"role": "assistant", "content": text})


# ---- ours


async def our_run(http: aiohttp.ClientSession, base: str, run: int, tally: Tally) -> None:
    """Six background interactions, each read as a stream to its end, then looked at."""
    previous: str | None = None
    for step in range(STEPS):
        asked = prompt(run, step)
        body = {"model": "gap/m", "input": asked, "background": True, "stream": True}
        if previous is not None:
            body["previous_interaction_id"] = previous
        previous = await created(http, base, body)
        async with http.get(f"{base}/{previous}") as response:
            _judge(asked, await response.json(), tally)


def _judge(asked: str, shown: Any, tally: Tally) -> None:
    """One step's end: the right answer, once; tries that broke off are marked as such."""
    answers = [step for step in shown["steps"] if step["type"] == "model_output"]
    whole = [_text(step) for step in answers if not step.get("error")]
    if len(whole) > 1:
        tally.doubled.append(asked)
    if shown["status"] != "completed" or whole != [answer(asked)]:
        raise Failed(f"{asked} is {shown['status']} with {whole}")


def _text(step: Any) -> str:
    return "".join(block.get("text", "") for block in step["content"])


async def measure_naive(runs: int, concurrency: int) -> tuple[Tally, Record]:
    """The naive chain."""
    tally, record = Tally(), Record()
    async with upstream.serving(record) as base, session(_SILENCE_S) as http:
        await all_runs(runs, concurrency, lambda run: naive_run(http, base, run), tally)
    return tally, record


async def measure_ours(runs: int, concurrency: int, folder: Path) -> tuple[Tally, Record, int]:
    """The same through the server; how many workers were killed meanwhile."""
    tally, record = Tally(), Record()
    async with (
        upstream.serving(record) as model,
        EmbeddedPostgres(folder / "home") as postgres,
        served(folder, postgres.url, model) as (port, fleet),
        session(LONGEST_S) as http,
    ):
        base = f"http://127.0.0.1:{port}/v1beta/interactions"
        killer = asyncio.ensure_future(fleet.kill_now_and_then(_KILL_EVERY_S))
        await all_runs(runs, concurrency, lambda run: our_run(http, base, run, tally), tally)
        killer.cancel()
        await asyncio.wait([killer])
        connection = await asyncpg.connect(postgres.url)
        made = await connection.fetchval("select count(*) from interactions")
        await connection.close()
    if made > runs * STEPS:
        tally.doubled.append(f"{made} interactions for {runs * STEPS} steps")
    tally.doubled += [prompt(*late) for late in record.late]
    tally.bad += [f"the model saw a wrong history of {asked}" for asked in record.wrong]
    return tally, record, fleet.kills


# ---- the report


def _line(name: str, tally: Tally, runs: int, more: str) -> None:
    share = 100 * tally.good / runs
    print(
        f"{name}: {tally.good} of {runs} runs ended well, {share:.1f} % · {more} · "
        f"{tally.seconds:.0f} s",
        flush=True,
    )


async def _models(runs: int, concurrency: int) -> bool:
    """Both sides with a model's turns; whether the goal is met."""
    print(
        f"{runs} runs of {STEPS} steps, {100 * upstream.FAULTS:.0f} % of the steps fail, "
        f"{concurrency} at once; machine: {os.cpu_count()} cores, load {_load()}"
    )
    with _reported() as folder:
        naive, plain = await measure_naive(runs, concurrency)
        _line("naive chain     ", naive, runs, f"faults {sum(plain.faults.values())}")
        ours, record, kills = await measure_ours(runs, concurrency, folder)
        again = sum(record.whole.values()) - len(record.whole)
        _line(
            "OpenInteractions",
            ours,
            runs,
            f"faults {sum(record.faults.values())} {dict(record.faults)}, "
            f"workers killed {kills}, model calls repeated for them {again}",
        )
        return _judged(ours, runs, folder)


async def _agents(runs: int, concurrency: int) -> bool:
    """The same with an agent in a sandbox; whether the goal is met."""
    problem = await gap_agent.problem()
    if problem is not None:
        print(f"agents in sandboxes: left out. {problem}")
        return True
    print(
        f"{runs} agents of {STEPS} steps in sandboxes, {100 * upstream.FAULTS:.0f} % of the model "
        f"calls fail, {concurrency} at once; load {_load()}"
    )
    with _reported() as folder:
        ours, script, kills = await gap_agent.measure(runs, concurrency, folder)
        _line(
            "agents          ",
            ours,
            runs,
            f"faults {sum(script.faults.values())} {dict(script.faults)}, workers killed {kills}, "
            f"outcome unknown {len(script.unknown)}, other errors {len(script.errors)}",
        )
        for (run, place), text in list(script.errors.items())[:5]:
            print(f"  run {run}, result {place}: {text[:200]}")
        return _judged(ours, runs, folder)


@contextmanager
def _reported() -> Generator[Path]:
    folder = _folder()
    try:
        yield folder
    except BaseException:
        _show_logs(folder)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _judged(ours: Tally, runs: int, folder: Path) -> bool:
    print(f"steps done twice: {len(ours.doubled)}")
    # What is bad beyond the runs that did not end well is a wrong history.
    is_good = ours.good >= _GOAL * runs and not ours.doubled and len(ours.bad) == runs - ours.good
    for line in [*ours.bad, *ours.doubled][:20]:
        print("  " + line[:500])
    if not is_good:
        _show_logs(folder)
    print(f"goal: >= {100 * _GOAL:.1f} %, nothing twice: {'met' if is_good else 'NOT MET'}")
    return is_good


async def _main(given: argparse.Namespace) -> int:
    telemetry.configure(level="warning", form="text")
    met = [await _models(given.runs, given.concurrency)] if given.runs else []
    if given.agents:
        met.append(await _agents(given.agents, given.agents_at_once))
    return 0 if all(met) else 1


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make gap")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument("--agents", type=int, default=40)
    parser.add_argument("--agents-at-once", type=int, default=4)
    sys.exit(uvloop.run(_main(parser.parse_args())))


if __name__ == "__main__":
    main()
