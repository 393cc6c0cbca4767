"""`code_execution` for any model, driven by the official client, in a real sandbox."""

import base64
import json
import re
import time
from collections.abc import Generator, Sequence
from typing import Any

import pytest
from google.genai import Client

from openinteractions import ids
from openinteractions.models.port import Finished, TextDelta, ToolCall
from openinteractions.resources.files.media import KEEP_INLINE_BYTES
from tests.e2e import wire
from tests.e2e.reading import generated, plain, read
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import USAGE, Fakes, Server, answer, sdk, turn
from tests.fakes.upstream import Reply
from tests.sandbox.engine import DockerEngine

MODELS = {"acme": "acme/m", "goog": "goog/m", "anth": "anth/m"}
CODE = [{"type": "code_execution"}]
PNG = b"\x89PNG"
NOISE = """
import random, matplotlib.pyplot as plt
plt.imshow([[random.random() for _ in range(100)] for _ in range(100)])
print("drawn")
"""
EVENT_ID = re.compile(rb'"event_id":"[^"]*"')

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")


@pytest.fixture(scope="module")
def sandboxes(upstreams: Fakes, docker_engine: DockerEngine) -> Generator[Server]:
    with serving_sandboxes(upstreams, docker_engine, name="code") as running:
        yield running


@pytest.fixture(scope="module")
def client(sandboxes: Server) -> Generator[Client]:
    with sdk(sandboxes) as made:
        yield made


def runs(code: str, language: str = "python", call_id: str = "call_a") -> ToolCall:
    return ToolCall(call_id, "code_execution", {"language": language, "code": code})


def calls(*wanted: ToolCall, text: str | None = None) -> Reply:
    said = () if text is None else (TextDelta(text),)
    return turn(*said, *wanted, Finished("tool_calls", USAGE))


def kinds(interaction: Any) -> list[str]:
    return [step.type for step in interaction.steps]


@pytest.mark.parametrize("vendor", MODELS)
def test_every_vendors_model_runs_code(client: Client, fakes: Fakes, vendor: str) -> None:
    fakes.all[vendor].replies += [calls(runs("print(6 * 7)"), text="Let me see."), answer("42.")]
    done = client.interactions.create(model=MODELS[vendor], input="6*7?", tools=CODE)
    assert done.status == "completed", done
    assert kinds(done) == [
        "model_output",
        "code_execution_call",
        "code_execution_result",
        "model_output",
    ]
    call, result = done.steps[1], done.steps[2]
    assert (call.arguments.language, call.arguments.code) == ("python", "print(6 * 7)")
    assert (result.result, result.is_error, result.call_id) == ("42\n", False, call.id)
    assert done.output_text == "42."
    sent = json.dumps(fakes.all[vendor].requests[-1].json)
    assert "print(6 * 7)" in sent
    assert "42" in sent


def test_variables_files_and_figures(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [
        calls(runs("import matplotlib.pyplot as plt\nx = 41\nplt.plot([1, 2])\nx")),
        calls(runs("open('answer.txt', 'w').write(str(x + 1))")),
        calls(runs("cat answer.txt; node --version; id -u", "bash")),
        answer("Done."),
    ]
    done = client.interactions.create(model="acme/m", input="go", tools=CODE)
    assert done.status == "completed", done
    first, _, third = (step.result for step in done.steps if step.type.endswith("_result"))
    assert first[0].text.strip() == "41"
    assert base64.b64decode(first[1].data).startswith(PNG)
    assert third.startswith("42v")
    assert third.endswith("\n1000\n")
    # The next turn works in the same place, and the caller can fetch what lies there.
    fakes.acme.replies += [calls(runs("print(x, open('answer.txt').read())")), answer("Yes.")]
    again = client.interactions.create(
        model="acme/m", input="still?", tools=CODE, previous_interaction_id=done.id
    )
    assert again.steps[1].result == "41 42\n"
    assert again.environment_id == done.environment_id
    found = client.environments.files.download(
        environment=done.environment_id, path="workspace/answer.txt"
    )
    assert found == b"42"


def test_an_environment_of_the_callers(client: Client, fakes: Fakes) -> None:
    made = client.environments.create(
        sources=[{"type": "inline", "target": "workspace/in.txt", "content": "from the caller"}]
    )
    fakes.acme.replies += [calls(runs("cat in.txt", "bash")), answer("Read.")]
    done = client.interactions.create(
        model="acme/m", input="read it", tools=CODE, environment=made.id
    )
    assert done.steps[1].result == "from the caller"
    assert done.environment_id == made.id


def test_a_stream_shows_the_steps_as_they_come(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [calls(runs("print('hi')"), text="Now:"), answer("Said hi.")]
    events = list(
        client.interactions.create(model="acme/m", input="say hi", tools=CODE, stream=True)
    )
    starts = [event.step.type for event in events if event.event_type == "step.start"]
    assert starts == [
        "model_output",
        "code_execution_call",
        "code_execution_result",
        "model_output",
    ]
    assert events[-1].event_type == "interaction.completed"


def test_a_stream_has_the_figures_too(client: Client, fakes: Fakes, sandboxes: Server) -> None:
    fakes.acme.replies += [calls(runs(NOISE)), answer("A figure.")]
    body = {"model": "acme/m", "input": "draw", "tools": CODE, "stream": True}
    live = frames(wire.create(sandboxes, body))
    public_id = json.loads(live[0])["interaction"]["id"]
    start, delta, _ = (json.loads(frame) for frame in of_step(1, live))
    shown = client.interactions.get(public_id)
    result = plain(shown.steps[2])
    assert start["step"] == {
        "type": "code_execution_result",
        "result": "",
        "call_id": result["call_id"],
    }
    assert delta["delta"] == {
        "type": "code_execution_result",
        "result": "drawn\n",
        "is_error": False,
        "content": result["result"],
    }
    text, image = result["result"]
    assert text == {"type": "text", "text": "drawn\n"}
    assert base64.b64decode(image["data"]).startswith(PNG)
    assert len(image["data"]) > KEEP_INLINE_BYTES

    events = list(client.interactions.get(public_id, stream=True))
    assert read(events) == generated(shown)
    kinds_of_deltas = [type(e.delta).__name__ for e in events if e.event_type == "step.delta"]
    assert kinds_of_deltas[:2] == ["CodeExecutionCallDelta", "CodeExecutionResultDelta"]

    path = f"{wire.V}/interactions/{public_id}?stream=true"
    assert frames(wire.call(sandboxes, "GET", path)) == live
    # What comes from the steps has other cursors, and nothing else.
    key = ids.parse_interaction_id(public_id)
    sandboxes.fetch("delete from events where interaction_id = $1", key)
    sandboxes.fetch("update interactions set logged = false where id = $1", key)
    again = frames(wire.call(sandboxes, "GET", path))
    assert again[0] != live[0]
    for index in (0, 1):
        steps = [[EVENT_ID.sub(b"", one) for one in of_step(index, way)] for way in (live, again)]
        assert steps[0] == steps[1]


def frames(got: wire.Answer) -> list[bytes]:
    """The JSON of each event of a stream."""
    assert got.status == 200, got.body
    lines = (line for line in got.body.splitlines() if line.startswith(b"data: {"))
    return [line.removeprefix(b"data: ") for line in lines]


def of_step(index: int, stream: Sequence[bytes]) -> list[bytes]:
    return [frame for frame in stream if json.loads(frame).get("index") == index]


def test_in_the_background_and_cancelled(client: Client, fakes: Fakes, sandboxes: Server) -> None:
    fakes.acme.replies.append(calls(runs("echo $$ > pid; sleep 600", "bash")))
    made = client.interactions.create(model="acme/m", input="x", tools=CODE, background=True)
    environment = _until(lambda: client.interactions.get(made.id).environment_id)
    pid = _until(lambda: _content(client, environment, "workspace/pid"))
    assert pid
    began = time.monotonic()
    ended = client.interactions.cancel(made.id)
    assert ended.status == "cancelled"
    assert time.monotonic() - began < 60
    shown = client.interactions.get(made.id)
    assert kinds(shown)[-2:] == ["code_execution_call", "code_execution_result"]
    assert shown.steps[-1].is_error
    fakes.acme.replies += [calls(runs("pgrep -c sleep || true", "bash")), answer("ok")]
    after = client.interactions.create(
        model="acme/m", input="left?", tools=CODE, environment=environment
    )
    assert after.steps[1].result.strip() == "0"


def test_what_is_not_stored_leaves_no_sandbox(
    client: Client, fakes: Fakes, sandboxes: Server
) -> None:
    # The second one's output becomes a file: a change by a run that has no job.
    two = runs("print('once')"), runs("print('x' * 50_000)", call_id="call_b")
    fakes.acme.replies += [calls(*two), answer("ok")]
    before = sandboxes.fetch("select count(*) from environments where deleted_at is null")[0][0]
    done = client.interactions.create(model="acme/m", input="x", tools=CODE, store=False)
    said = [step.result for step in done.steps if step.type == "code_execution_result"]
    assert said[0] == "once\n"
    assert "the whole output is in " in said[1]
    after = sandboxes.fetch("select count(*) from environments where deleted_at is null")[0][0]
    assert after == before


def test_two_interactions_in_one_environment_take_turns(client: Client, fakes: Fakes) -> None:
    made = client.environments.create()
    script = (
        "import time\nlog = open('log', 'a', buffering=1)\n"
        "log.write('in ')\ntime.sleep(1)\nlog.write('out ')\nlog.close()"
    )
    fakes.acme.default = lambda received: (
        answer("ok") if "tool" in json.dumps(received.json["messages"][-1]) else calls(runs(script))
    )
    started = [
        client.interactions.create(
            model="acme/m", input="x", tools=CODE, environment=made.id, background=True
        )
        for _ in range(3)
    ]
    for one in started:
        _until(lambda one=one: client.interactions.get(one.id).status == "completed")
    log = client.environments.files.download(environment=made.id, path="workspace/log")
    assert log == b"in out in out in out "


def _content(client: Client, environment: str, path: str) -> bytes | None:
    try:
        return client.environments.files.download(environment=environment, path=path)
    except Exception:  # noqa: BLE001 - not there yet
        return None


def _until(probe: Any, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = probe()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come to pass")
