"""The tasks of `benchmarks/agent_tasks`, replayed by a scripted model: the harness around a run.

What a good model would do is written down with each task. Here it does that, in real sandboxes,
through the official client; so what fails is the harness.
"""

import json
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
from benchmarks.agent_tasks.__main__ import line, main, summary
from benchmarks.agent_tasks.catalog import TASKS, chosen
from benchmarks.agent_tasks.drive import Result, perform
from benchmarks.agent_tasks.task import Task
from google.genai import Client

from openinteractions.models.port import Finished, ToolCall
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import USAGE, Fakes, Server, answer, sdk, turn
from tests.fakes.upstream import Received, Reply
from tests.sandbox.engine import DockerEngine

BY_PROMPT = {task.prompt: task for task in TASKS}
IDS = [task.id for task in TASKS]
ONLY_THE_ANSWER = {"units", "long_output", "answer_form"}
"""Tasks that leave nothing in the environment to look at."""

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")


class Script:
    """A model that knows each task's solution, and keeps what it was shown."""

    def __init__(self) -> None:
        self.systems: dict[str, str] = {}
        self.declared: dict[str, set[str]] = {}
        self.results: dict[str, list[str]] = {}
        self._lock = threading.Lock()

    def __call__(self, received: Received) -> Reply:
        messages = received.json["messages"]
        task = next(BY_PROMPT[text] for text in map(_text, messages) if text in BY_PROMPT)
        with self._lock:
            self.systems[task.id] = _text(messages[0])
            tools = received.json.get("tools", [])
            self.declared[task.id] = {tool["function"]["name"] for tool in tools}
            self.results[task.id] = [_text(m) for m in messages if m["role"] == "tool"]
        turns = sum(message["role"] == "assistant" for message in messages)
        if turns == len(task.script):
            return answer(task.answer)
        calls = [
            ToolCall(f"call_{turns}_{number}", name, dict(arguments))
            for number, (name, arguments) in enumerate(task.script[turns])
        ]
        return turn(*calls, Finished("tool_calls", USAGE))


def _text(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


@pytest.fixture(scope="module")
def script(upstreams: Fakes) -> Script:
    return Script()


@pytest.fixture(scope="module")
def sandboxes(upstreams: Fakes, docker_engine: DockerEngine) -> Generator[Server]:
    with serving_sandboxes(upstreams, docker_engine, name="tasks") as running:
        yield running


@pytest.fixture(scope="module")
def client(sandboxes: Server) -> Generator[Client]:
    with sdk(sandboxes) as made:
        yield made


@pytest.fixture(autouse=True)
def _scripted(fakes: Fakes, script: Script) -> None:
    fakes.acme.default = script


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_the_script_solves_its_task(client: Client, script: Script, task: Task) -> None:
    result = perform(client, task, model="acme/m", within_s=60)
    assert (result.problem, result.status) == (None, "completed"), script.results.get(task.id)
    calls = [call for calls in task.script for call in calls]
    assert sum(result.tool_calls.values()) == len(calls)
    assert result.steps == 2 * len(calls) + 2
    assert result.tokens == USAGE["total_tokens"] * (len(task.script) + 1)
    assert {name for name, _ in calls} <= script.declared[task.id]
    _look_at_what_the_model_saw(task, script)


def _look_at_what_the_model_saw(task: Task, script: Script) -> None:
    system, results = script.systems[task.id], script.results[task.id]
    assert "Network: none" in system
    match task.id:
        case "agents_md_rule":
            assert "# owner: team-blue" in system
        case "use_a_skill":
            assert "- invoice-number: How invoice numbers of our company are made." in system
            assert "/.agents/skills/invoice-number/SKILL.md" in system
            assert "check digit" not in system
            assert "check digit" in results[0]
        case "long_output":
            assert len(results[0]) < 60_000
            assert "left out" in results[0]
        case "missing_module":
            assert "No module named 'prettytable'" in results[0]
        case "untrusted_page":
            assert "pwned" in results[0]
        case _:
            assert "<project_instructions" not in system


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_doing_nothing_solves_no_task(task: Task) -> None:
    assert task.problem(task.untouched(), "") is not None
    claimed = task.problem(task.untouched(), task.answer)
    assert (claimed is None) == (task.id in ONLY_THE_ANSWER), "what is claimed is not checked"


def test_there_are_twenty() -> None:
    assert len(TASKS) == len(BY_PROMPT) == len(set(IDS)) == 20
    assert {task.id for task in chosen(["units"])} == {"units"}
    assert len(chosen([])) == 20
    with pytest.raises(ValueError, match="nonsense"):
        chosen(["units", "nonsense"])


def test_results_are_shown_and_kept() -> None:
    good = Result(id="a", problem=None, status="completed", seconds=1.5, steps=4, tokens=1000)
    bad = Result(id="b", problem="x.txt is missing", status="completed", seconds=2.5)
    assert line(good).split() == ["a", "ok", "4", "1000", "1.5"]
    assert line(bad).endswith("x.txt is missing")
    assert summary([good, bad]) == "1 of 2 passed, 1000 tokens, median 2.0 s"
    assert json.loads(json.dumps(good.json()))["tokens"] == 1000


def test_the_command_line(
    sandboxes: Server, fakes: Fakes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "out.json"
    server = ["--base-url", sandboxes.url, "--api-key", sandboxes.key, "--json", str(record)]
    asked = ["--model", "acme/m", "--only", "units,answer_form", "--at-once", "2", *server]
    assert main(asked) == 0
    assert "2 of 2 passed" in capsys.readouterr().out
    assert [entry["problem"] for entry in json.loads(record.read_text())["results"]] == [None, None]
    fakes.acme.default = answer("I do not know.")
    assert main(asked) == 1
    assert "0 of 2 passed" in capsys.readouterr().out
    assert main(["--model", "nonsense/m", "--only", "units", *server]) == 1
    assert json.loads(record.read_text())["results"][0]["status"] == "error"


GATE = """\
import json, sys
call = json.load(sys.stdin)["tool_call"]
print("looking", file=sys.stderr)
if "rm -rf" in call["args"]["code"]:
    print(json.dumps({"decision": "deny", "reason": "Nothing is removed here."}))
"""
HOOKS = {
    "gate": {
        "pre_tool_execution": [
            {
                "matcher": "code_execution",
                "hooks": [{"type": "command", "command": "python3 /.agents/gate.py"}],
            }
        ]
    },
    "log": {
        "post_tool_execution": [
            {
                "matcher": ".*_file|code_.*",
                "hooks": [{"type": "command", "command": "cat >> log.jsonl; echo >> log.jsonl"}],
            }
        ]
    },
}


def test_hooks_run_in_the_sandbox(client: Client, fakes: Fakes) -> None:
    def runs(code: str) -> Reply:
        call = ToolCall("c", "code_execution", {"language": "bash", "code": code})
        return turn(call, Finished("tool_calls", USAGE))

    written = ToolCall("w", "write_file", {"path": "/workspace/ä.txt", "content": "ö"})
    fakes.acme.replies += [
        runs("rm -rf /workspace/*"),
        turn(written, Finished("tool_calls", USAGE)),
        runs("ls; exit 3"),
        answer("ok"),
    ]
    sources = [
        {"type": "inline", "target": ".agents/hooks.json", "content": json.dumps(HOOKS)},
        {"type": "inline", "target": ".agents/gate.py", "content": GATE},
    ]
    done = client.interactions.create(
        agent="antigravity",
        input="tidy up",
        environment={"type": "remote", "sources": sources},
        agent_config={"type": "antigravity", "model": "acme/m"},
    )
    assert done.status == "completed", done
    denied, wrote, listed = (step for step in done.steps if step.type.endswith("_result"))
    assert denied.type == "code_execution_result"
    assert denied.is_error
    assert denied.result == "Denied by a hook: Nothing is removed here."
    assert not wrote.is_error
    assert "ä.txt" in listed.result
    log = client.environments.files.download(
        environment=done.environment_id, path="workspace/log.jsonl"
    )
    first, second = (json.loads(entry) for entry in log.decode().splitlines())
    assert first["tool_call"] == {"name": "write_file", "args": written.arguments}
    assert first["environment_id"] == done.environment_id
    assert "error" not in first
    assert "Exit code 3" in second["error"]
