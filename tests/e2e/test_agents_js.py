"""An agent, driven by the official JavaScript SDK; see `js/agent_run.test.mjs`."""

import os
import re
import subprocess
from typing import Any

from openinteractions.models.port import Finished, ToolCall
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import USAGE, Fakes, answer, turn
from tests.e2e.test_sdk_js import JS, node
from tests.fakes.upstream import Received, Reply
from tests.sandbox.engine import DockerEngine

__all__ = ["node"]

_TESTS = 4
DRAWING = """
import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.savefig("line.png")
print("drawn")
"""


def call(name: str, call_id: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(call_id, name, arguments)


def bash(call_id: str, code: str) -> ToolCall:
    return call("code_execution", call_id, language="bash", code=code)


def calls(*wanted: ToolCall) -> Reply:
    return turn(*wanted, Finished("tool_calls", USAGE))


def script(received: Received) -> Reply:
    """What the model does: by the question, and by how much of it is done."""
    messages = received.json["messages"]
    results = [message["content"] for message in messages if message["role"] == "tool"]
    if "Multiply" in str(messages):
        program = call("write_file", "c1", path="/workspace/six.py", content="print(6 * 7)\n")
        return answer("It printed 42.") if results else calls(program, bash("c2", "python3 six.py"))
    if "Draw" in str(messages):
        steps = (
            calls(call("code_execution", "c1", language="python", code=DRAWING)),
            calls(call("view_image", "c2", path="/workspace/line.png")),
            answer("A line."),
        )
        return steps[len(results)]
    match len(results):
        case 0:
            note = bash("c1", "echo tea: asked > note.txt; echo noted")
            return calls(note, call("get_price", "c2", item="tea"))
        case 2:
            return calls(bash("c3", "cat note.txt"))
        case _:
            return answer(f"I was told {results[1]}.")


def test_the_javascript_sdk_runs_an_agent(
    upstreams: Fakes, fakes: Fakes, docker_engine: DockerEngine, node: str
) -> None:
    fakes.acme.default = script
    more = '\n[agents]\nmodel = "acme/m"\n'
    with serving_sandboxes(upstreams, docker_engine, name="js", more=more) as server:
        done = subprocess.run(
            [node, "--test", "--test-reporter=tap", "agent_run.test.mjs"],
            cwd=JS,
            env={"PATH": os.environ["PATH"], "OI_URL": server.url, "OI_KEY": server.key},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^# pass {_TESTS}$", done.stdout, re.MULTILINE), done.stdout
