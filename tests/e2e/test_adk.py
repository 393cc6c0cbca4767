"""google-adk against a running server: an agent of its loop, and one of ours that it manages.

See `adk/drive.py`, which runs with the google-adk that `scripts/adk` installs.
"""

import json
import os
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from openinteractions.models.port import Finished, TextDelta, ToolCall
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import USAGE, Fakes, Server, answer, turn
from tests.fakes.upstream import Reply
from tests.sandbox.engine import DockerEngine

ROOT = Path(__file__).parents[2]
ADK = Path(__file__).parent / "adk"
TOTAL = USAGE["total_tokens"]
_END = Finished("tool_calls", USAGE)


@pytest.fixture(scope="module")
def python() -> Path:
    """A Python that has google-adk."""
    done = subprocess.run(
        [ROOT / "scripts/adk"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return ADK / ".venv/bin/python"


@pytest.fixture(scope="module")
def sandboxes(upstreams: Fakes, docker_engine: DockerEngine) -> Generator[Server]:
    more = '\n[agents]\nmodel = "acme/m"\n'
    with serving_sandboxes(upstreams, docker_engine, name="adk", more=more) as running:
        yield running


def drive(python: Path, server: Server, scene: str, *texts: str) -> list[list[list[Any]]]:
    """The events of every turn, read whole and then streamed."""
    done = subprocess.run(
        [python, ADK / "drive.py", scene, *texts],
        env={"PATH": os.environ["PATH"], "OI_URL": server.url, "GEMINI_API_KEY": server.key},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def call(name: str, call_id: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(call_id, name, arguments)


def calls(*wanted: ToolCall) -> Reply:
    return turn(*wanted, _END)


def whole(events: list[Any]) -> list[tuple[str, Any]]:
    """The parts of a turn's events that are not pieces of later ones: kind and value."""
    return [
        (kind, value)
        for event in events
        if not event.get("partial")
        for part in event["content"]["parts"]
        for kind, value in part.items()
    ]


def spoken(events: list[Any]) -> str:
    return "".join(value for kind, value in whole(events) if kind == "text")


def pieces(events: list[Any]) -> list[str]:
    """Texts as they came in pieces."""
    parts = [p for e in events if e.get("partial") for p in e["content"]["parts"]]
    return [part["text"] for part in parts if "text" in part]


def test_an_agent_of_adk_thinks_with_our_model(server: Server, fakes: Fakes, python: Path) -> None:
    script = [
        turn(TextDelta("Let me see."), call("price_of", "c1", item="tea"), _END),
        answer("Tea costs ", "3 euros."),
        answer("Bye."),
    ]
    fakes.acme.replies += script * 2
    told = drive(python, server, "shopkeeper", "What does tea cost?", "Thanks")
    for mode, (first, second) in zip(("whole", "streamed"), told, strict=True):
        kinds = [kind for kind, _ in whole(first)]
        assert kinds[:3] == ["text", "function_call", "function_response"], mode
        _, asked, answered = [value for _, value in whole(first)][:3]
        assert (asked["name"], asked["args"]) == ("price_of", {"item": "tea"})
        assert answered["response"] == {"item": "tea", "euros": 3}
        assert spoken(first) == "Let me see.Tea costs 3 euros."
        assert spoken(second) == "Bye."
        assert first[-1]["usage_metadata"]["total_token_count"] == TOTAL
    assert pieces(told[0][0]) == []
    assert pieces(told[1][0]) == ["Let me see.", "Tea costs ", "3 euros."]
    assert len(fakes.acme.requests) == 6
    for number in (2, 5):
        # Only what is new was sent to us: the rest is what we have kept.
        sent = fakes.acme.requests[number].json["messages"]
        roles = ["system", "user", "assistant", "tool", "assistant", "user"]
        assert [message["role"] for message in sent] == roles
        assert json.loads(sent[3]["content"]) == {"item": "tea", "euros": 3}


def test_an_agent_of_ours_is_managed_by_adk(sandboxes: Server, fakes: Fakes, python: Path) -> None:
    script = [
        calls(
            call("write_file", "c1", path="/workspace/six.py", content="print(6 * 7)\n"),
            call("code_execution", "c2", language="bash", code="python3 six.py"),
        ),
        answer("It printed ", "42."),
        calls(call("code_execution", "c3", language="bash", code="cat six.py")),
        answer("Still there."),
    ]
    fakes.acme.replies += script * 2
    told = drive(python, sandboxes, "programmer", "Multiply 6 and 7.", "Is the program there?")
    for first, second in told:
        parts = whole(first)
        assert [kind for kind, _ in parts[:4]] == [
            "function_call",
            "executable_code",
            "function_response",
            "code_execution_result",
        ]
        wanted, run, wrote, ran = (value for _, value in parts[:4])
        assert (wanted["name"], wrote["name"]) == ("write_file", "write_file")
        assert wrote["id"] == wanted["id"]
        assert run["code"] == "python3 six.py"
        assert (ran["outcome"], ran["output"]) == ("OUTCOME_OK", "42\n")
        assert spoken(first) == "It printed 42."
        assert first[-1]["usage_metadata"]["total_token_count"] == 2 * TOTAL
        # The second turn goes on where the first did: the same chain, the same environment.
        assert whole(second)[1][1]["output"] == "print(6 * 7)\n"
        assert spoken(second) == "Still there."
        assert second[-1]["environment_id"] == first[-1]["environment_id"]
        assert second[-1]["interaction_id"] != first[-1]["interaction_id"]
    assert pieces(told[0][0]) == []
    assert pieces(told[1][0]) == ["It printed ", "42."]
    sent = fakes.acme.requests[3].json["messages"]
    assert "Multiply 6 and 7." in json.dumps(sent)
    assert "Be brief." in json.dumps(sent)
    assert len({turns[0][-1]["environment_id"] for turns in told}) == 2


def test_the_lock_file_pins_hashes_and_names_no_registry() -> None:
    lines = (ADK / "requirements.lock").read_text().splitlines()
    assert all("--hash=sha256:" in line or "==" in line for line in lines)
    assert not any("://" in line for line in lines)
