"""kill -9 in the middle of a long command: nothing is lost, and nothing runs twice."""

import time
from collections.abc import Callable, Generator
from typing import Any

import psutil
import pytest
from google.genai import Client

from openinteractions.models.port import Finished, ToolCall
from tests.e2e.own import Own, own_server
from tests.e2e.server import USAGE, Fakes, answer, sdk, turn
from tests.sandbox.engine import SLIM, DockerEngine, docker

LINES = 60
COUNT = "echo begun >> runs; for i in $(seq {lines}); do echo line $i; sleep 0.1; done; echo $$"

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")


@pytest.fixture(scope="module")
def broker(docker_engine: DockerEngine) -> Generator[str]:
    name = docker_engine.broker_name("kills")
    yield name
    for container in docker_engine.containers(f"openinteractions.broker={name}"):
        docker_engine.remove(container)


@pytest.fixture(scope="module")
def own(upstreams: Fakes, broker: str) -> Generator[Own]:
    variables = {
        "OI_WORKER__HEARTBEAT": "0.5",
        "OI_WORKER__DEAD_AFTER": "2",
        "OI_SANDBOX__ENABLED": "on",
        "OI_SANDBOX__BROKER": broker,
        "OI_SANDBOX__IMAGE": SLIM,
        "OI_SANDBOX__MEMORY_BYTES": str(2**29),
        "OI_SANDBOX__TMP_BYTES": str(2**26),
    }
    with own_server(upstreams, **variables) as running:
        until(lambda: running.fetch("select from brokers where problem is null"))
        yield running


@pytest.fixture
def client(own: Own, fakes: Fakes) -> Generator[Client]:
    with sdk(own, attempts=5) as made:
        yield made


def begin(client: Client, fakes: Fakes, lines: int = LINES) -> Any:
    """An interaction whose command is on its way."""
    code = {"language": "bash", "code": COUNT.format(lines=lines)}
    call = ToolCall("call_a", "code_execution", code)
    fakes.acme.replies += [turn(call, Finished("tool_calls", USAGE)), answer("Counted.")]
    # A repeat of what a dead api process took a moment ago would join that one.
    made = client.interactions.create(
        model="acme/m",
        input=f"count to {lines}",
        tools=[{"type": "code_execution"}],
        background=True,
    )
    until(lambda: content(client, made.id, "workspace/runs"))
    time.sleep(1.0)
    return made


def finish(client: Client, made: Any) -> Any:
    """The interaction's end, and that its command ran once."""
    until(lambda: client.interactions.get(made.id).status != "in_progress", within_s=40)
    done = client.interactions.get(made.id)
    assert done.status == "completed", done
    assert content(client, made.id, "workspace/runs") == b"begun\n"
    return next(step for step in done.steps if step.type == "code_execution_result")


def is_whole(result: Any) -> bool:
    *lines, pid = result.result.splitlines()
    return lines == [f"line {n}" for n in range(1, LINES + 1)] and pid.isdigit()


def brokers(own: Own) -> list[psutil.Process]:
    assert own.process is not None
    children = psutil.Process(own.process.pid).children(recursive=True)
    return [child for child in children if "broker" in child.cmdline()]


def test_the_broker(own: Own, client: Client, fakes: Fakes) -> None:
    made = begin(client, fakes)
    victims = brokers(own)
    assert victims
    for victim in victims:
        victim.kill()
    result = finish(client, made)
    assert is_whole(result), result
    assert not result.is_error


def test_the_whole_server(own: Own, client: Client, fakes: Fakes) -> None:
    made = begin(client, fakes)
    own.kill()
    time.sleep(1.0)
    own.start()
    result = finish(client, made)
    assert is_whole(result), result
    # The model was asked for each turn once: the call was found, not made again.
    assert len(fakes.acme.requests) == 2


def test_the_sandbox(
    own: Own, client: Client, fakes: Fakes, broker: str, docker_engine: DockerEngine
) -> None:
    made = begin(client, fakes, lines=10 * LINES)
    # A warm one cannot be told from the environment's by its name: all of them.
    docker("kill", *docker_engine.containers(f"openinteractions.broker={broker}"))
    result = finish(client, made)
    assert result.is_error
    assert "Outcome unknown" in result.result
    assert f"line {10 * LINES}" not in result.result


def content(client: Client, interaction: str, path: str) -> bytes | None:
    environment = client.interactions.get(interaction).environment_id
    try:
        return client.environments.files.download(environment=environment, path=path)
    except Exception:  # noqa: BLE001 - not there yet
        return None


def until(probe: Callable[[], Any], within_s: float = 60) -> Any:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = probe()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come to pass")
