"""kill -9 in the middle of an agent's work: nothing is lost, and nothing happens twice."""

import asyncio
import itertools
import signal
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from google.genai import Client

from openinteractions import ids as public_ids
from openinteractions.models.port import Finished, TextDelta, ToolCall
from tests.e2e.fleet import WORKERS, Fleet, Gate, fleet, gate, until
from tests.e2e.reading import ids, plain, read
from tests.e2e.server import USAGE, Fakes, answer, sdk, turn
from tests.fakes.mcp import FakeMcp
from tests.fakes.upstream import Reply
from tests.sandbox.engine import DockerEngine

AGENT = "antigravity-preview-09-2026"
CONFIG: dict[str, Any] = {"type": "antigravity", "model": "acme/m"}
LINES = 40
COUNT = "echo begun >> runs; for i in $(seq {lines}); do echo line $i; sleep 0.1; done"
NOTHING = "It was lost."

_numbers = itertools.count()

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")


# ---- the stage


@pytest.fixture(scope="module")
def parts(upstreams: Fakes, docker_engine: DockerEngine) -> Generator[Fleet]:
    variables = {
        "OI_NETWORK__ALLOW": '["127.0.0.0/8"]',
        "OI_PROVIDERS__ACME__IDLE_TIMEOUT": "60",
    }
    with fleet(upstreams, docker_engine, name="agent-kills", **variables) as running:
        yield running


@pytest.fixture
def client(parts: Fleet, fakes: Fakes) -> Generator[Client]:
    parts.ready()
    with sdk(parts.own, attempts=5) as made:
        yield made


@pytest.fixture
def at_gate(parts: Fleet) -> Generator[Gate]:
    with gate(parts) as made:
        yield made


def calls(*wanted: ToolCall) -> Reply:
    return turn(*wanted, Finished("tool_calls", USAGE))


def call(name: str, call_id: str = "c1", /, **arguments: Any) -> ToolCall:
    return ToolCall(call_id, name, arguments)


def bash(code: str, call_id: str = "c1") -> ToolCall:
    return call("code_execution", call_id, language="bash", code=code)


class Watched:
    """An agent's run in the background, and all that its one reader is shown."""

    def __init__(self, client: Client, **request: Any) -> None:
        asked = {
            "agent": AGENT,
            # What a dead api process took a moment ago would be joined by its repeat.
            "input": f"go {next(_numbers)}",
            "environment": "remote",
            "agent_config": CONFIG,
        }
        stream = client.interactions.create(background=True, stream=True, **{**asked, **request})
        self.client = client
        self.stream = iter(stream)
        self.events: list[Any] = [next(self.stream)]
        self.id: str = self.events[0].interaction.id
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        for event in self.stream:
            self.events.append(event)

    @property
    def text(self) -> str:
        """What has been said so far."""
        deltas = [event.delta for event in self.events if event.event_type == "step.delta"]
        return "".join(delta.text for delta in deltas if delta.type == "text")

    def file(self, path: str) -> bytes | None:
        environment = self.client.interactions.get(self.id).environment_id
        try:
            return self.client.environments.files.download(environment=environment, path=path)
        except Exception:  # noqa: BLE001 - not there yet
            return None

    def ended(self, parts: Fleet, text: str, status: str = "completed") -> list[dict[str, Any]]:
        """Its steps, once it has ended; they and their stream are whole."""
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
        whole(parts, self.client, self.id, self.events)
        got = self.client.interactions.get(self.id)
        assert got.status == status, got
        assert (got.output_text or "") == text
        return plain(got.steps[1:])


def whole(parts: Fleet, client: Client, key: str, events: list[Any]) -> None:
    """Everything that holds of every run, whatever has happened to it."""
    steps = plain(client.interactions.get(key).steps[1:])
    # What the reader was shown is what there is, and every event came once.
    assert [step["type"] for step in read(events)] == [step["type"] for step in steps]
    assert ids(client.interactions.get(key, stream=True)) == ids(events)
    rows = parts.own.fetch(
        "select s.idx from steps s join interactions i using (segment_id, depth) "
        "where i.id = $1 order by s.idx",
        public_ids.parse_interaction_id(key),
    )
    assert [row[0] for row in rows] == list(range(len(steps) + 1))
    called = [step["id"] for step in steps if step["type"].endswith("_call")]
    answered = [step["call_id"] for step in steps if step["type"].endswith("_result")]
    assert len(set(called)) == len(called)
    is_open = client.interactions.get(key).status == "requires_action"
    assert is_open or sorted(answered) == sorted(called)
    state = parts.own.fetch(
        "select convert_from(run_state, 'utf8')::jsonb -> 'begun' = '{}' from interactions "
        "where id = $1",
        public_ids.parse_interaction_id(key),
    )
    assert state[0][0], "a note was left"


def results(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [step for step in steps if step["type"].endswith("_result")]


def kinds(steps: list[dict[str, Any]]) -> list[str]:
    return [step["type"] for step in steps]


# ---- a turn of the model


@pytest.mark.parametrize("pieces", [0, 2])
def test_a_turn_of_the_model(parts: Fleet, client: Client, fakes: Fakes, pieces: int) -> None:
    said = [TextDelta(text) for text in ("Half ", "of ", "an answer.")]
    fakes.acme.replies += [
        calls(bash("echo once | tee -a log")),
        turn(*said, Finished("stop", USAGE), delay_s=0 if pieces else 30, stall_after=pieces + 1),
        answer("Done."),
    ]
    watched = Watched(client)
    until(lambda: len(fakes.acme.requests) == 2)
    until(lambda: watched.text == "Half of " if pieces else True)
    parts.kill_owner(watched.id)
    steps = watched.ended(parts, "Done.")
    broken = ["model_output", "thought"] if pieces else []
    assert kinds(steps) == [
        "code_execution_call",
        "code_execution_result",
        *broken,
        "model_output",
    ]
    assert len(fakes.acme.requests) == 3
    # It is asked again with the same conversation: nothing of what broke off.
    asked = [request.json["messages"] for request in fakes.acme.requests]
    assert asked[1] == asked[2]
    assert watched.file("workspace/log") == b"once\n"


def test_what_was_left_out_is_told_once_whoever_ends_the_run(
    parts: Fleet, client: Client, fakes: Fakes
) -> None:
    """Each owner reads the environment's files anew."""
    fakes.acme.replies += [
        turn(TextDelta("Half"), Finished("stop", USAGE), delay_s=30, stall_after=1),
        answer("Done."),
    ]
    source = {"type": "inline", "target": ".agents/hooks.json", "content": "{"}
    watched = Watched(client, environment={"type": "remote", "sources": [source]}, tools=[])
    until(lambda: fakes.acme.requests)
    (warning,) = client.interactions.get(watched.id).warnings
    parts.kill_owner(watched.id)
    watched.ended(parts, "Done.")
    assert len(fakes.acme.requests) == 2
    assert warning["field"] == "environment.hooks"
    assert client.interactions.get(watched.id).warnings == [warning]
    assert watched.events[-1].interaction.warnings == [warning]


def test_a_stream_is_taken_up_where_it_broke_off(
    parts: Fleet, client: Client, fakes: Fakes
) -> None:
    """Everything but the database and the broker dies, the reader's connection too."""
    said = [TextDelta(f"{n} ") for n in range(8)]
    fakes.acme.replies += [
        calls(bash("echo once >> log")),
        turn(*said, Finished("stop", USAGE), stall_after=4),
        answer("The ", "whole ", "answer."),
    ]
    stream = iter(
        client.interactions.create(
            agent=AGENT,
            input="go",
            environment="remote",
            agent_config=CONFIG,
            background=True,
            stream=True,
        )
    )
    seen = [next(stream)]
    while "2 " not in [getattr(getattr(e, "delta", None), "text", "") for e in seen]:
        seen.append(next(stream))
    key = seen[0].interaction.id
    worker = parts.owner(key)
    parts.own.kill()
    parts.kill_worker(worker)
    parts.own.start("--no-worker")
    rest = list(client.interactions.get(key, stream=True, last_event_id=seen[-1].event_id))
    whole(parts, client, key, [*seen, *rest])
    got = client.interactions.get(key)
    assert (got.status, got.output_text) == ("completed", "The whole answer.")
    assert (
        client.environments.files.download(environment=got.environment_id, path="workspace/log")
        == b"once\n"
    )


# ---- a command


def test_a_long_command(parts: Fleet, client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [calls(bash(COUNT.format(lines=LINES))), answer("Counted.")]
    watched = Watched(client)
    until(lambda: watched.file("workspace/runs"))
    parts.kill_owner(watched.id)
    (result,) = results(watched.ended(parts, "Counted."))
    assert result["result"].splitlines() == [f"line {n}" for n in range(1, LINES + 1)]
    assert watched.file("workspace/runs") == b"begun\n"
    # The model was asked for each turn once: the call was found, not made again.
    assert len(fakes.acme.requests) == 2


def test_the_database_is_away_in_the_middle(parts: Fleet, client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [
        calls(
            call("write_file", "c1", path="a.txt", content="a\n"),
            bash(COUNT.format(lines=LINES), "c2"),
            call("edit_file", "c3", path="a.txt", old_text="a", new_text="aa", replace_all=True),
        ),
        answer("Counted."),
    ]
    # One that is just starting without a database ends, for its supervisor to try again.
    parts.ready(WORKERS)
    watched = Watched(client)
    until(lambda: watched.file("workspace/runs"))
    parts.kill_database()
    steps = watched.ended(parts, "Counted.")
    assert [bool(result.get("is_error")) for result in results(steps)] == [False] * 3
    assert results(steps)[1]["result"].splitlines() == [f"line {n}" for n in range(1, LINES + 1)]
    assert watched.file("workspace/runs") == b"begun\n"
    assert watched.file("workspace/a.txt") == b"aa\n"
    assert len(fakes.acme.requests) == 2


# ---- files

EDIT = call("edit_file", path="a.txt", old_text="a", new_text="aa", replace_all=True)
"""Done twice, it would show."""


def edited(client: Client, fakes: Fakes, at_gate: Gate, *more: ToolCall) -> Watched:
    """A run whose edit stands at its first commit."""
    fakes.acme.replies += [
        calls(call("write_file", "c0", path="a.txt", content="a\n")),
        at_gate.before(calls(EDIT, *more)),
        answer("Edited."),
    ]
    return Watched(client)


def is_edited_once(parts: Fleet, fakes: Fakes, watched: Watched) -> None:
    steps = watched.ended(parts, "Edited.")
    assert kinds(steps) == ["function_call", "function_result"] * 2 + ["model_output"]
    assert "Edited /workspace/a.txt" in steps[3]["result"]
    assert not steps[3].get("is_error")
    assert watched.file("workspace/a.txt") == b"aa\n"
    assert len(fakes.acme.requests) == 3


# An edit commits its call, then the note of what it is about to do, then its result.
INSTANTS = {
    "before its note": (1, False),
    "after its note": (1, True),
    "before its result": (2, False),
    "after its result": (2, True),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_an_edit(parts: Fleet, client: Client, fakes: Fakes, at_gate: Gate, instant: str) -> None:
    commits, is_written = INSTANTS[instant]
    watched = edited(client, fakes, at_gate)
    at_gate.step(commits)
    assert watched.file("workspace/a.txt") == (b"a\n" if commits == 1 else b"aa\n")
    parts.kill_owner(watched.id)
    if not is_written:
        at_gate.drop()
    at_gate.open()
    is_edited_once(parts, fakes, watched)


def test_an_edit_that_is_on_its_way(
    parts: Fleet, client: Client, fakes: Fakes, at_gate: Gate
) -> None:
    """The dead worker's write arrives when another one has the run already."""
    watched = edited(client, fakes, at_gate)
    at_gate.step()
    parts.signal_broker(signal.SIGSTOP)
    try:
        at_gate.let_through()
        time.sleep(0.5)
        parts.kill_owner(watched.id)
        at_gate.open()
        until(lambda: parts.epoch(watched.id) == 2)
        time.sleep(0.5)
    finally:
        parts.signal_broker(signal.SIGCONT)
    is_edited_once(parts, fakes, watched)


def test_a_worker_that_only_slept_changes_no_file(
    parts: Fleet, client: Client, fakes: Fakes, at_gate: Gate
) -> None:
    """It wakes up between its note and its write, when the run has gone on elsewhere.

    Its next heartbeat would stop it, but may come later than the write.
    """
    later = call("write_file", "c9", path="a.txt", content="later\n")
    fakes.acme.replies += [
        calls(call("write_file", "c0", path="a.txt", content="a\n")),
        at_gate.before(calls(EDIT)),
        calls(later),
        answer("Written."),
    ]
    watched = Watched(client)
    at_gate.step()
    sleeper = parts.owner(watched.id)
    sleeper.send_signal(signal.SIGSTOP)
    try:
        at_gate.open()
        watched.ended(parts, "Written.")
        assert watched.file("workspace/a.txt") == b"later\n"
        with at_gate.no_beats():
            sleeper.send_signal(signal.SIGCONT)
            time.sleep(1.0)
        assert watched.file("workspace/a.txt") == b"later\n"
    finally:
        sleeper.send_signal(signal.SIGCONT)


def test_the_broker_dies_under_file_operations(
    parts: Fleet, client: Client, fakes: Fakes, at_gate: Gate
) -> None:
    """Once while it has a write in its hands, and once before it."""
    append = call("edit_file", "c2", path="a.txt", old_text="aa", new_text="aaa", replace_all=True)
    watched = edited(client, fakes, at_gate, append, call("read_file", "c3", path="a.txt"))
    at_gate.step()
    parts.signal_broker(signal.SIGSTOP)
    at_gate.let_through()
    time.sleep(0.5)
    parts.kill_broker()
    # The result of the first, then the note of the second.
    at_gate.step()
    parts.kill_broker()
    at_gate.open()
    steps = watched.ended(parts, "Edited.")
    assert [bool(result.get("is_error")) for result in results(steps)] == [False] * 4
    assert "aaa" in str(results(steps)[-1]["result"])
    assert watched.file("workspace/a.txt") == b"aaa\n"


def test_between_two_calls_of_a_turn(
    parts: Fleet, client: Client, fakes: Fakes, at_gate: Gate
) -> None:
    fakes.acme.replies += [
        at_gate.before(
            calls(
                call("write_file", "c1", path="a.sh", content="echo ran >> log; echo hello\n"),
                bash("bash a.sh", "c2"),
            )
        ),
        answer("Ran."),
    ]
    watched = Watched(client)
    at_gate.step(2)
    parts.kill_owner(watched.id)
    at_gate.open()
    steps = watched.ended(parts, "Ran.")
    assert kinds(steps) == [
        "function_call",
        "code_execution_call",
        "function_result",
        "code_execution_result",
        "model_output",
    ]
    assert steps[3]["result"] == "hello\n"
    assert watched.file("workspace/log") == b"ran\n"
    assert len(fakes.acme.requests) == 2


# ---- the world outside


class Page:
    """A page that comes slowly to the first who asks."""

    def __init__(self) -> None:
        self.hits = 0
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page.hits += 1
                if page.hits == 1:
                    time.sleep(20)
                body = b"<html><title>Tea</title><p>Boil the water twice.</p></html>"
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Whoever asked is dead."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/tea"


@pytest.fixture
def page() -> Generator[Page]:
    made = Page()
    threading.Thread(target=made.server.serve_forever, daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_page_that_is_fetched(parts: Fleet, client: Client, fakes: Fakes, page: Page) -> None:
    fakes.acme.replies += [calls(call("url_context", urls=[page.url])), answer("Twice.")]
    watched = Watched(client)
    until(lambda: page.hits == 1)
    parts.kill_owner(watched.id)
    steps = watched.ended(parts, "Twice.")
    assert kinds(steps) == ["url_context_call", "url_context_result", "model_output"]
    (entry,) = steps[1]["result"]
    assert entry["status"] == "success"
    assert "Boil the water twice." in entry["text"]
    assert page.hits == 2


@pytest.fixture
def tools() -> Generator[FakeMcp]:
    made = FakeMcp()
    loop = asyncio.new_event_loop()
    ready, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with made.serve():
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(30)
    yield made
    loop.call_soon_threadsafe(over.set)
    thread.join(timeout=30)
    loop.close()


@pytest.mark.parametrize("instant", ["before the call", "in the call"])
def test_a_call_of_a_tool_that_is_elsewhere(
    parts: Fleet, client: Client, fakes: Fakes, tools: FakeMcp, at_gate: Gate, instant: str
) -> None:
    """Nobody can look whether it was done: the model is told so, and it is not done again."""
    is_called = instant == "in the call"
    wanted = calls(call("docs__slow", seconds=30))
    fakes.acme.replies += [wanted if is_called else at_gate.before(wanted), answer(NOTHING)]
    server = {"type": "mcp_server", "name": "docs", "url": tools.url}
    watched = Watched(client, tools=[server])
    if is_called:
        until(lambda: tools.calls)
        parts.kill_owner(watched.id)
    else:
        at_gate.step()
        parts.kill_owner(watched.id)
        at_gate.open()
    steps = watched.ended(parts, NOTHING)
    assert kinds(steps) == ["mcp_server_tool_call", "mcp_server_tool_result", "model_output"]
    assert steps[1]["is_error"]
    assert "Outcome unknown" in str(steps[1]["result"])
    assert tools.calls == (["slow"] if is_called else [])
    told = fakes.acme.requests[1].json["messages"][-1]
    assert "Outcome unknown" in str(told)


# ---- a human


def test_what_a_human_approves_happens_once(
    parts: Fleet, client: Client, fakes: Fakes, at_gate: Gate
) -> None:
    """Workers die while it waits, and when it has been approved."""
    guarded = {"type": "dynamic", "model": "acme/m", "approve": ["code_execution"]}
    fakes.acme.replies.append(calls(bash("echo begun >> runs; sleep 3; echo did it")))
    parked = Watched(client, agent_config=guarded)
    parker = parts.owner(parked.id)
    (asked,) = parked.ended(parts, "", status="requires_action")
    parts.kill_worker(parker)
    fakes.acme.replies.append(answer("Done."))
    result = {
        "type": "function_result",
        "call_id": asked["id"],
        "name": "approval",
        "result": "approve",
    }
    watched = Watched(
        client, previous_interaction_id=parked.id, agent_config=guarded, input=[result]
    )
    until(lambda: watched.file("workspace/runs"))
    parts.kill_owner(watched.id)
    steps = watched.ended(parts, "Done.")
    assert kinds(steps) == ["code_execution_call", "code_execution_result", "model_output"]
    assert steps[1]["result"] == "did it\n"
    assert watched.file("workspace/runs") == b"begun\n"
