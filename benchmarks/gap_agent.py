"""The second half of `make gap`: the same six steps, done by an agent in a sandbox.

A run is one background interaction of the agent `antigravity`. Each of its six steps is a real
command or a real edit that adds a line to one file of its sandbox: a line that is there twice is a
step that was done twice. Three model calls in a hundred fail, and workers are killed -9 meanwhile,
often in the middle of a command. A step whose result says that its outcome is unknown is counted
apart: the model then looks into the file before it goes on, as its instructions say.
"""

import asyncio
import re
import secrets
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import gap_upstream as upstream
from benchmarks.gap_stage import Failed, Tally, all_runs, created, served, session
from benchmarks.gap_upstream import STEPS, called, fault_of, said, text_of
from openinteractions.broker import engine
from openinteractions.db.embedded import EmbeddedPostgres
from openinteractions.errors import AppError
from openinteractions.settings import SandboxSettings

IMAGE = "openinteractions/sandbox:slim"
_LONGEST_S = 180.0
_KILL_EVERY_S = 5.0
_FILE = "/workspace/log.txt"
_LAST = "end"
_MOST_RESULTS = 4 * STEPS
_DONE = re.compile(r"^(done|Edited )")


@dataclass(slots=True)
class Script:
    """The model: what it does next follows from the results that it is shown."""

    faults: Counter[str] = field(default_factory=Counter[str])
    tries: Counter[tuple[int, int]] = field(default_factory=Counter[tuple[int, int]])
    unknown: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    """Runs and the places of results that said that the outcome is unknown."""
    errors: dict[tuple[int, int], str] = field(default_factory=dict[tuple[int, int], str])
    """Other results that were not what the step gives, by run and place."""

    def plan(self, messages: list[Any]) -> tuple[list[bytes], str]:
        """The next call or the answer, and how to fail (empty: not)."""
        asked = next(text_of(m) for m in reversed(messages) if m["role"] == "user")
        run = int(re.findall(r"Run (\d+)", asked)[0])
        results = [text_of(message) for message in messages if message["role"] == "tool"]
        self.tries[run, len(results)] += 1
        fault = fault_of(f"agent {run} {len(results)} {self.tries[run, len(results)]}")
        if fault:
            self.faults[fault] += 1
        return self._next(run, results), fault

    def _next(self, run: int, results: list[str]) -> list[bytes]:
        step, is_looking = 0, False
        for place, text in enumerate(results):
            if is_looking:
                is_looking = False
                step += not text.startswith("0")
            elif text.startswith("Outcome unknown"):
                is_looking = True
                self.unknown.add((run, place))
            elif _DONE.match(text):
                step += 1
            else:
                self.errors[run, place] = text
        if step == STEPS or len(results) > _MOST_RESULTS:
            return said(f"Done: {step} steps.")
        call_id = f"call_{run}_{len(results)}"
        if is_looking:
            return called(call_id, "code_execution", _bash(f"grep -c '{_line(step)}$' {_FILE}"))
        return called(call_id, *_action(step))


def _line(step: int) -> str:
    return f"step {step}"


def _bash(code: str) -> dict[str, str]:
    return {"language": "bash", "code": f"{code}; true"}


def _action(step: int) -> tuple[str, dict[str, str]]:
    """What a step does: a command that takes a while, or an edit, in turns."""
    line = _line(step)
    if step % 2:
        return "edit_file", {"path": _FILE, "old_text": _LAST, "new_text": f"{line}\n{_LAST}"}
    lines = line if step else f"{line}\n{_LAST}"
    code = f"sleep 0.4; printf '{lines}\n' >> {_FILE}; sleep 0.4; echo done"
    return "code_execution", _bash(code)


async def problem() -> str | None:
    """Why no agent can have a sandbox here; None: it can."""
    settings = SandboxSettings(image=IMAGE)
    try:
        backend = engine.backend(settings)
        try:
            await engine.examine(backend, settings)
        finally:
            await backend.close()
    except AppError as error:
        return error.message
    return None


async def measure(runs: int, concurrency: int, folder: Path) -> tuple[Tally, Script, int]:
    """Run the agents; how many workers were killed meanwhile."""
    tally, script = Tally(), Script()
    sandboxes = {
        "OI_AGENTS__MODEL": "gap/m",
        "OI_SANDBOX__BROKER": f"gap-{secrets.token_hex(4)}",
        "OI_SANDBOX__IMAGE": IMAGE,
        "OI_SANDBOX__MEMORY_BYTES": str(2**28),
        "OI_SANDBOX__TMP_BYTES": str(2**24),
        "OI_SANDBOX__DISK_BYTES": str(2**26),
    }
    async with (
        upstream.serving(script) as model,
        EmbeddedPostgres(folder / "home") as postgres,
        served(folder, postgres.url, model, sandboxes) as (port, fleet),
        session(_LONGEST_S) as http,
    ):
        base = f"http://127.0.0.1:{port}/v1beta"
        await _until_up(http, base)
        killer = asyncio.ensure_future(fleet.kill_now_and_then(_KILL_EVERY_S))
        try:
            await all_runs(
                runs,
                concurrency,
                lambda run: _run(http, base, run, tally),
                tally,
                longest_s=_LONGEST_S,
            )
        finally:
            killer.cancel()
            await asyncio.wait([killer])
    return tally, script, fleet.kills


async def _until_up(http: aiohttp.ClientSession, base: str) -> None:
    """Until a sandbox could be had: a command in one says so."""
    body = {"sources": [{"type": "inline", "target": "workspace/a.txt", "content": "a"}]}
    for _ in range(120):
        async with http.post(f"{base}/environments", json=body) as response:
            if response.status == 200:
                await _forget(http, base, (await response.json())["id"])
                return
            why = await response.text()
        await asyncio.sleep(0.5)
    raise RuntimeError(f"no sandbox could be had: {why}")


async def _run(http: aiohttp.ClientSession, base: str, run: int, tally: Tally) -> None:
    """One agent, from its start to a look at what it has left behind."""
    body = {
        "agent": "antigravity",
        "input": f"Run {run}: do the {STEPS} steps.",
        "environment": "remote",
        "background": True,
        "stream": True,
    }
    key = await created(http, f"{base}/interactions", body)
    async with http.get(f"{base}/interactions/{key}") as response:
        shown = await response.json()
    if shown["status"] != "completed":
        raise Failed(f"{key} is {shown['status']}: {shown.get('errors')}")
    environment = shown["environment_id"]
    path = f"{base}/environments/{environment}/files/workspace/log.txt"
    async with http.get(path, params={"alt": "media"}) as response:
        lines = Counter((await response.text()).splitlines())
    await _forget(http, base, environment)
    wanted = [_line(step) for step in range(STEPS)]
    tally.doubled += [f"run {run}: {line}" for line in wanted if lines[line] > 1]
    missing = [line for line in wanted if not lines[line]]
    if missing:
        raise Failed(f"{key} has left out {missing}")


async def _forget(http: aiohttp.ClientSession, base: str, environment: str) -> None:
    async with http.delete(f"{base}/environments/{environment}") as response:
        await response.read()
