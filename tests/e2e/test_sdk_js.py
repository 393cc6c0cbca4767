"""The official JavaScript SDK against a running server; see `js/sdk.test.mjs`."""

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from openinteractions.models.port import Finished, ToolCall
from tests.e2e.server import USAGE, Fakes, Server, answer, turn
from tests.fakes.upstream import Received, Reply

JS = Path(__file__).parent / "js"
OLDEST_NODE = 18

SCRIPTS = {
    "words": answer("one ", "two ", "three ", "four "),
    "slow": answer(*(f"{n} " for n in range(200)), gap_s=0.05),
    "fails": Reply(status=400, message="no luck"),
    "tools": turn(
        ToolCall("call_a", "get_weather", {"city": "Rome"}),
        ToolCall("call_b", "get_weather", {"city": "Oslo"}),
        Finished("tool_calls", USAGE),
    ),
}


def script(received: Received) -> Reply:
    """What the model does, by its name."""
    name = received.json["model"]
    if name == "echo":
        return answer("|".join(_words(message) for message in received.json["messages"]))
    return SCRIPTS.get(name, answer("ok"))


def _words(message: dict[str, object]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    assert isinstance(content, list)
    return "".join(part.get("text", "") for part in content)


@pytest.fixture(scope="session")
def node() -> str:
    """Node, with the SDK installed as the lock file says."""
    found = shutil.which("node")
    if found is None or shutil.which("npm") is None:
        pytest.skip("there is no Node here; scripts/test installs it where it can")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    if int(re.findall(r"\d+", version.stdout)[0]) < OLDEST_NODE:
        pytest.skip(f"the SDK needs Node {OLDEST_NODE}, here is {version.stdout.strip()}")
    with (JS / "package-lock.json").open() as lock:
        # Several test processes may come here at once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        installed = JS / "node_modules" / ".package-lock.json"
        if not installed.exists() or installed.stat().st_mtime < os.fstat(lock.fileno()).st_mtime:
            _install()
    return found


def _install() -> None:
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=JS, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"npm ci: {done.stdout}{done.stderr}"


def test_the_lock_file_names_no_registry() -> None:
    assert '"resolved"' not in (JS / "package-lock.json").read_text()


def test_javascript_sdk(server: Server, fakes: Fakes, node: str) -> None:
    fakes.acme.default = script
    done = subprocess.run(
        [node, "--test", "--test-reporter=tap", "sdk.test.mjs"],
        cwd=JS,
        env={"PATH": os.environ["PATH"], "OI_URL": server.url, "OI_KEY": server.key},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^# pass 6$", done.stdout, re.MULTILINE), done.stdout
