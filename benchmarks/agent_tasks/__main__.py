"""`python -m benchmarks.agent_tasks --model <id>`: run the tasks on a running server."""

import argparse
import json
import os
import statistics
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from google.genai import Client
from google.genai.types import HttpOptions

from benchmarks.agent_tasks.catalog import TASKS, chosen
from benchmarks.agent_tasks.drive import AGENT, Result, perform
from benchmarks.agent_tasks.task import Task


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agent_tasks", description=__doc__)
    parser.add_argument("--model", help="a model id that the server knows")
    parser.add_argument("--agent", default=AGENT)
    parser.add_argument("--base-url", default="http://127.0.0.1:8080")
    parser.add_argument("--api-key", default=os.environ.get("OI_API_KEY", "none"))
    parser.add_argument("--only", default="", help="ids of tasks, with commas")
    parser.add_argument("--at-once", type=int, default=1, help="how many at the same time")
    parser.add_argument("--within", type=float, default=600, help="seconds for each")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    parser.add_argument("--json", type=Path, default=Path("agent_tasks.json"))
    parser.add_argument("--list", action="store_true", help="only show the tasks")
    found = parser.parse_args(given)
    if not found.list and not found.model:
        parser.error("--model is needed")
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Run what is asked for, print a table, write a JSON file; 0 if every task passed."""
    asked = _arguments(given)
    tasks = chosen({name.strip() for name in asked.only.split(",") if name.strip()})
    if asked.list:
        for task in tasks:
            print(f"{task.id:20} {task.prompt[:110]}")
        return 0
    warnings.filterwarnings("ignore", message=".*experimental.*")
    client = Client(api_key=asked.api_key, http_options=HttpOptions(base_url=asked.base_url))

    def perform_one(task: Task) -> Result:
        try:
            result = perform(
                client,
                task,
                model=asked.model,
                agent=asked.agent,
                within_s=asked.within,
                keeps=asked.keep,
            )
        except Exception as error:  # noqa: BLE001 - one task's failure is no reason to lose the rest
            problem = f"{type(error).__name__}: {error}"[:500]
            result = Result(id=task.id, problem=problem, status="error", seconds=0.0)
        print(line(result), flush=True)
        return result

    print(HEAD)
    with client, ThreadPoolExecutor(max_workers=asked.at_once) as pool:
        results = list(pool.map(perform_one, tasks))
    print(summary(results))
    record = {"model": asked.model, "agent": asked.agent, "of": len(TASKS)}
    record["results"] = [result.json() for result in results]
    asked.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return int(any(result.problem is not None for result in results))


HEAD = f"{'task':20} {'':4} {'steps':>5} {'tokens':>8} {'seconds':>7}"


def line(result: Result) -> str:
    """A task's row."""
    mark = "ok" if result.problem is None else "FAIL"
    row = f"{result.id:20} {mark:4} {result.steps:5} {result.tokens:8} {result.seconds:7.1f}"
    return row if result.problem is None else f"{row}  {result.problem[:160]}"


def summary(results: Sequence[Result]) -> str:
    """The last row."""
    passed = sum(result.problem is None for result in results)
    tokens = sum(result.tokens for result in results)
    middle = statistics.median(result.seconds for result in results)
    return f"{passed} of {len(results)} passed, {tokens} tokens, median {middle:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
