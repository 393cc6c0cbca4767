"""The demo's agent: shown step by step, judged by its file, and nothing of it left behind."""

import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from openinteractions.models.port import Finished, ToolCall
from tests.cli.command import run
from tests.cli.test_demo import assert_nothing_is_left, fakes, home
from tests.e2e.server import USAGE, Fakes, answer, turn
from tests.fakes.upstream import Received, Reply
from tests.sandbox.engine import SLIM, DockerEngine, docker

__all__ = ["fakes", "home"]

PROGRAM = """\
found = []
number = 2
while len(found) < {many}:
    if all(number % prime for prime in found):
        found.append(number)
    number += 1
open("/workspace/primes.txt", "w").write("".join(f"{{prime}}\\n" for prime in found))
"""


def call(name: str, call_id: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(call_id, name, arguments)


def calls(*wanted: ToolCall) -> Reply:
    return turn(*wanted, Finished("tool_calls", USAGE))


def programmer(many: int) -> Any:
    """A model that talks, and programs if it has the tools."""

    def script(received: Received) -> Reply:
        messages = received.json["messages"]
        if "primes.py" not in str(messages):
            return answer("Hello, ", "Ada.")
        match sum(message["role"] == "tool" for message in messages):
            case 0:
                program = PROGRAM.format(many=many)
                return calls(call("write_file", "c1", path="/workspace/primes.py", content=program))
            case 1:
                code = "python3 primes.py && cat primes.txt"
                return calls(call("code_execution", "c2", language="bash", code=code))
            case _:
                return answer("Their sum is 129.", "\nReally." * 14)

    return script


@pytest.fixture
def sandboxed(docker_engine: DockerEngine) -> Generator[dict[str, str]]:
    """Variables that give the demo sandboxes; none of them may be left."""
    yield {
        "OI_SANDBOX__ENABLED": "auto",
        "OI_SANDBOX__IMAGE": SLIM,
        "OI_SANDBOX__MEMORY_BYTES": str(2**28),
        "OI_SANDBOX__DISK_BYTES": str(2**26),
    }
    names = docker("ps", "--all", "--format", '{{.Label "openinteractions.broker"}}').stdout
    assert [name for name in names.splitlines() if name.startswith("demo-")] == []


def demo(home: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    return run(home, "demo", TMPDIR=str(home / "tmp"), **variables)


def test_an_agent_works_and_its_file_is_fetched(
    home: Path, fakes: Fakes, sandboxed: dict[str, str]
) -> None:
    fakes.acme.default = programmer(10)
    shown = demo(home, **sandboxed)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    part = shown.stdout.partition("5. An agent, in the background")[2]
    expected = [
        "in_progress; the caller is free",
        "→ write_file /workspace/primes.py",
        "found = []",
        'open("/workspace/primes.txt"',
        "← Wrote /workspace/primes.py (7 lines",
        "→ code_execution bash python3 primes.py && cat primes.txt",
        "← 2",
        "Their sum is 129.",
        "… 3 more lines",
        "completed, 21 tokens in, 15 out",
        "Fetched workspace/primes.txt: 2 3 5 7 11 13 17 19 23 29",
        "All of it holds.",
    ]
    places = [part.find(words) for words in expected]
    assert -1 not in places, (expected[places.index(-1)], part)
    assert places == sorted(places), part
    assert_nothing_is_left(home)


def test_a_wrong_file_is_called_wrong(home: Path, fakes: Fakes, sandboxed: dict[str, str]) -> None:
    fakes.acme.default = programmer(9)
    shown = demo(home, **sandboxed)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "It ended as completed and left a primes.txt that is wrong" in shown.stdout
    assert "Fetched workspace/primes.txt" not in shown.stdout


def test_a_model_that_only_talks_is_shown_as_it_is(
    home: Path, fakes: Fakes, sandboxed: dict[str, str]
) -> None:
    fakes.acme.default = answer("I have done it, Ada.")
    shown = demo(home, **sandboxed)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "It ended as completed and left no primes.txt" in shown.stdout


def test_without_an_engine_it_says_so_and_goes_on(home: Path, fakes: Fakes) -> None:
    fakes.acme.default = programmer(10)
    nowhere = f"unix://{home}/docker.sock"
    shown = demo(home, OI_SANDBOX__ENABLED="auto", OI_SANDBOX__DOCKER_URL=nowhere)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    part = shown.stdout.partition("5. An agent, in the background")[2]
    assert "Left out: it needs Docker and an image." in part
    assert str(home / "docker.sock") in part
    assert "`make sandbox` sets both up." in part
    assert "All of it holds." in part
    assert len(fakes.acme.requests) == 3


def test_a_missing_image_is_named(home: Path, fakes: Fakes, sandboxed: dict[str, str]) -> None:
    fakes.acme.default = programmer(10)
    shown = demo(home, **{**sandboxed, "OI_SANDBOX__IMAGE": "none/such:image"})
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "The engine has no image 'none/such:image'" in shown.stdout
