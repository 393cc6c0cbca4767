"""Agents, driven by the official client, in real sandboxes, on all three vendors' wires."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any

import pytest
from google.genai import Client

from openinteractions.models.port import Finished, TextDelta, ThoughtDelta, ToolCall
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import KEY, USAGE, Fakes, Server, answer, sdk, turn
from tests.fakes.upstream import Reply
from tests.sandbox.engine import DockerEngine

AGENT = "antigravity-preview-09-2026"
MODELS = {"acme": "acme/m", "goog": "goog/m", "anth": "anth/m"}

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")


@pytest.fixture(scope="module")
def sandboxes(upstreams: Fakes, docker_engine: DockerEngine) -> Generator[Server]:
    with serving_sandboxes(upstreams, docker_engine, name="agents") as running:
        yield running


@pytest.fixture(scope="module")
def client(sandboxes: Server) -> Generator[Client]:
    with sdk(sandboxes) as made:
        yield made


def calls(*wanted: ToolCall, text: str | None = None) -> Reply:
    said = () if text is None else (TextDelta(text),)
    return turn(*said, *wanted, Finished("tool_calls", USAGE))


def call(name: str, call_id: str = "call_a", /, **arguments: Any) -> ToolCall:
    return ToolCall(call_id, name, arguments)


def config(model: str = "acme/m", **more: Any) -> dict[str, Any]:
    return {"type": "antigravity", "model": model, **more}


def kinds(interaction: Any) -> list[str]:
    return [step.type for step in interaction.steps]


def wait(client: Client, interaction_id: str) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = client.interactions.get(interaction_id, include_input=False)
        if found.status != "in_progress":
            return found
        time.sleep(0.2)
    raise AssertionError("it did not end")


def post(
    server: Server, body: dict[str, Any], path: str = "interactions", method: str = "POST"
) -> tuple[int, dict[str, Any]]:
    """A request by plain HTTP: the status and the answer."""
    request = urllib.request.Request(
        f"{server.url}/v1beta/{path}",
        json.dumps(body).encode(),
        {"x-goog-api-key": KEY, "content-type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answered:
            return answered.status, json.load(answered)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("vendor", MODELS)
def test_an_agent_writes_runs_and_answers(client: Client, fakes: Fakes, vendor: str) -> None:
    fakes.all[vendor].replies += [
        calls(
            call("write_file", "c1", path="/workspace/six.py", content="print(6 * 7)\n"),
            call("code_execution", "c2", language="bash", code="python3 six.py"),
        ),
        answer("It printed 42; the program is /workspace/six.py."),
    ]
    done = client.interactions.create(
        agent=AGENT,
        input="Write and run a program that multiplies 6 and 7.",
        environment="remote",
        agent_config=config(MODELS[vendor]),
    )
    assert done.status == "completed", done
    assert done.agent == AGENT
    assert kinds(done) == [
        "function_call",
        "code_execution_call",
        "function_result",
        "code_execution_result",
        "model_output",
    ]
    write, run, wrote, ran, _ = done.steps
    assert (write.name, wrote.call_id, wrote.is_error) == ("write_file", write.id, False)
    assert (ran.call_id, ran.result) == (run.id, "42\n")
    found = client.environments.files.download(
        environment=done.environment_id, path="workspace/six.py"
    )
    assert found == b"print(6 * 7)\n"
    sent = json.dumps(fakes.all[vendor].requests[0].json)
    for name in ("code_execution", "read_file", "edit_file", "url_context", "browser"):
        assert f'"{name}"' in sent
    assert "/workspace" in sent
    if vendor == "acme":
        # Nobody has set up a search backend here.
        assert [w["field"] for w in done.warnings] == ["tools.google_search"]


def test_a_stream_shows_every_step_and_what_it_took(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [
        calls(call("code_execution", language="python", code="print(6 * 7)"), text="Computing."),
        answer("42."),
    ]
    events = list(
        client.interactions.create(
            agent=AGENT, input="6*7?", environment="remote", agent_config=config(), stream=True
        )
    )
    starts = [event.step.type for event in events if event.event_type == "step.start"]
    assert starts == [
        "model_output",
        "code_execution_call",
        "code_execution_result",
        "model_output",
    ]
    stops = [event for event in events if event.event_type == "step.stop"]
    totals = [stop.usage.total_tokens for stop in stops]
    assert totals == [0, 12, 12, 24]
    assert stops[1].step_usage.total_tokens == 12
    ended = next(event for event in events if event.event_type == "interaction.completed")
    assert ended.interaction.status == "completed"
    assert ended.interaction.agent == AGENT
    public = ended.interaction.environment_id
    stored = client.interactions.get(ended.interaction.id)
    assert stored.environment_id == public
    assert [step.type for step in stored.steps] == ["user_input", *starts]
    replayed = list(client.interactions.get(ended.interaction.id, stream=True))
    again = [event for event in replayed if event.event_type == "step.stop"]
    assert [stop.usage.total_tokens for stop in again] == totals


def test_in_the_background_then_the_next_turn_in_the_same_place(
    client: Client, fakes: Fakes
) -> None:
    fakes.acme.replies += [
        calls(call("write_file", path="notes.txt", content="blue")),
        answer("Noted."),
    ]
    first = client.interactions.create(
        agent=AGENT,
        input="Remember blue.",
        environment="remote",
        agent_config=config(),
        background=True,
    )
    assert first.status == "in_progress"
    first = wait(client, first.id)
    assert first.status == "completed", first
    fakes.acme.replies += [calls(call("read_file", path="/workspace/notes.txt")), answer("Blue.")]
    # The same conversation, the same files.
    second = client.interactions.create(
        agent=AGENT, input="Which?", previous_interaction_id=first.id, agent_config=config()
    )
    assert second.environment_id == first.environment_id
    assert "blue" in second.steps[1].result
    # Another conversation, the same files; and the same conversation with other files.
    fakes.acme.replies += [calls(call("read_file", path="/workspace/notes.txt")), answer("Blue.")]
    third = client.interactions.create(
        agent=AGENT, input="Read it.", environment=first.environment_id, agent_config=config()
    )
    assert "blue" in third.steps[1].result
    fakes.acme.replies += [calls(call("read_file", path="/workspace/notes.txt")), answer("Gone.")]
    fourth = client.interactions.create(
        agent=AGENT,
        input="And there?",
        environment="remote",
        previous_interaction_id=first.id,
        agent_config=config(),
    )
    assert fourth.environment_id != first.environment_id
    assert fourth.steps[1].is_error


def test_functions_of_the_clients_park_and_ours_do_not(client: Client, fakes: Fakes) -> None:
    tools = [
        {"type": "function", "name": "price", "parameters": {"type": "object", "properties": {}}},
        {"type": "code_execution"},
    ]
    fakes.acme.replies.append(
        calls(
            call("price", "c1"),
            call("code_execution", "c2", language="python", code="print(2)"),
            call("write_file", "c3", path="a.txt", content="a"),
        )
    )
    asked: dict[str, Any] = {"agent": AGENT, "tools": tools, "agent_config": config()}
    parked = client.interactions.create(input="go", environment="remote", **asked)
    assert parked.status == "requires_action"
    answered = {step.call_id for step in parked.steps if step.type.endswith("_result")}
    waiting = [s for s in parked.steps if s.type.endswith("_call") and s.id not in answered]
    assert [step.name for step in waiting] == ["price"]
    fakes.acme.replies.append(answer("It costs 3."))
    done = client.interactions.create(
        input=[
            {
                "type": "function_result",
                "call_id": waiting[0].id,
                "name": "price",
                "result": {"eur": 3},
            }
        ],
        previous_interaction_id=parked.id,
        **asked,
    )
    assert done.status == "completed"
    assert done.environment_id == parked.environment_id
    assert "search_files" in json.dumps(fakes.acme.requests[-1].json)
    assert '"url_context"' not in json.dumps(fakes.acme.requests[-1].json)


def test_a_human_approves_edits_and_denies(client: Client, sandboxes: Server, fakes: Fakes) -> None:
    guarded = {"type": "dynamic", "model": "acme/m", "approve": ["code_execution", "delete_*"]}
    fakes.acme.replies.append(
        calls(
            call("code_execution", "c1", language="python", code="print('as asked')"),
            call("code_execution", "c2", language="python", code="print('too much')"),
            call("delete_file", "c3", path="/workspace/x"),
        )
    )
    parked = client.interactions.create(
        agent=AGENT, input="go", environment="remote", agent_config=guarded
    )
    assert parked.status == "requires_action"
    asked = [(step.name, step.arguments["tool"]) for step in parked.steps]
    assert asked == [
        ("approval", "code_execution"),
        ("approval", "code_execution"),
        ("approval", "delete_file"),
    ]
    first, second, third = (step.id for step in parked.steps)
    edited = {"language": "python", "code": "print('less')"}
    answers = {
        first: "approve",
        second: {"decision": "edit", "arguments": edited},
        third: {"decision": "deny", "reason": "Keep it."},
    }
    fakes.acme.replies.append(answer("Done, but for the file."))
    done = client.interactions.create(
        agent=AGENT,
        previous_interaction_id=parked.id,
        agent_config=guarded,
        input=[
            {"type": "function_result", "call_id": key, "name": "approval", "result": result}
            for key, result in answers.items()
        ],
    )
    assert done.status == "completed", done
    results = [step.result for step in done.steps if step.type == "code_execution_result"]
    assert results == ["as asked\n", "less\n"]
    sent = json.dumps(fakes.acme.requests[-1].json)
    assert "Keep it." in sent
    assert "less" in sent
    # A second click, or another branch, does not run it again.
    asked_again = {
        "agent": AGENT,
        "agent_config": guarded,
        "input": [
            {"type": "function_result", "call_id": key, "name": "approval", "result": result}
            for key, result in answers.items()
        ],
    }
    for previous in (parked.id, f"{parked.id}@3"):
        status, refused = post(sandboxes, {**asked_again, "previous_interaction_id": previous})
        assert (status, refused["error"]["code"]) == (400, "invalid_request")
        assert "carried out already" in refused["error"]["message"]


def test_a_budget_ends_the_run_and_the_next_call_has_a_fresh_one(
    client: Client, fakes: Fakes
) -> None:
    big = {"total_input_tokens": 4000, "total_output_tokens": 900, "total_tokens": 4900}
    fakes.acme.replies.append(
        turn(
            call("code_execution", language="python", code="print(1)"), Finished("tool_calls", big)
        )
    )
    spent = client.interactions.create(
        agent=AGENT, input="go", environment="remote", agent_config=config(max_total_tokens="6000")
    )
    assert spent.status == "budget_exceeded", spent
    assert "6000" in spent.errors[0].message
    assert spent.usage.total_tokens == 4900
    fakes.acme.replies.append(answer("On with it."))
    on = client.interactions.create(
        agent=AGENT,
        input="go on",
        previous_interaction_id=spent.id,
        environment=spent.environment_id,
        agent_config=config(max_total_tokens="6000"),
    )
    assert on.status == "completed"


AGENTS_MD = "Always answer in French."
SKILL = "---\nname: tea\ndescription: How tea is made here.\n---\nBoil the water twice."
HOOKS = {
    "guard": {
        "enabled": True,
        "pre_tool_execution": [
            {
                "matcher": "delete_file",
                "hooks": [
                    {
                        "type": "command",
                        "command": 'cat > /workspace/seen.json; echo \'{"decision": "deny", '
                        '"reason": "nothing is deleted here"}\'',
                    }
                ],
            }
        ],
    }
}


def test_the_workspace_instructs_teaches_and_guards(client: Client, fakes: Fakes) -> None:
    sources = [
        {"type": "inline", "target": target, "content": content}
        for target, content in (
            (".agents/AGENTS.md", AGENTS_MD),
            (".agents/skills/tea/SKILL.md", SKILL),
            (".agents/hooks.json", json.dumps(HOOKS)),
            ("workspace/keep.txt", "keep"),
        )
    ]
    fakes.acme.replies += [
        calls(call("read_file", "c1", path="/.agents/skills/tea/SKILL.md")),
        # Relative: the hook is told where that is.
        calls(call("delete_file", "c2", path="keep.txt")),
        answer("Voilà."),
    ]
    done = client.interactions.create(
        agent=AGENT,
        input="Make tea and tidy up.",
        environment={"type": "remote", "sources": sources},
        system_instruction="Be brief.",
        agent_config=config(),
    )
    assert done.status == "completed", done
    system = fakes.acme.requests[0].json["messages"][0]["content"]
    for told in (AGENTS_MD, "Be brief.", "tea: How tea is made here.", "/.agents/skills/tea"):
        assert told in system
    assert "Boil the water twice" not in system
    read, denied = (step for step in done.steps if step.type == "function_result")
    assert "Boil the water twice" in read.result
    assert denied.is_error
    assert "nothing is deleted here" in denied.result
    files = client.environments.files
    assert files.download(environment=done.environment_id, path="workspace/keep.txt") == b"keep"
    seen = json.loads(files.download(environment=done.environment_id, path="workspace/seen.json"))
    assert seen["tool_call"] == {"name": "delete_file", "args": {"path": "/workspace/keep.txt"}}
    assert seen["environment_id"] == done.environment_id


def test_command_hooks_do_not_run_where_code_needs_consent(client: Client, fakes: Fakes) -> None:
    hooks = {"type": "inline", "target": ".agents/hooks.json", "content": json.dumps(HOOKS)}
    fakes.acme.replies += [calls(call("delete_file", "c1", path="seen.json")), answer("Done.")]
    environment = {
        "type": "remote",
        "sources": [hooks, {"type": "inline", "target": "workspace/seen.json", "content": "mine"}],
    }
    done = client.interactions.create(
        agent=AGENT,
        input="Tidy up.",
        environment=environment,
        agent_config={"type": "dynamic", "model": "acme/m", "approve": ["code_execution"]},
    )
    assert done.status == "completed", done
    # The hook would have denied it, and have written the file.
    assert not done.steps[1].is_error
    with pytest.raises(Exception, match="not found"):
        client.environments.files.download(
            environment=done.environment_id, path="workspace/seen.json"
        )
    (warning,) = [w for w in done.warnings if w["field"] == "environment.hooks"]
    assert "asks before code_execution" in warning["message"]


LEFT_OUT = {"gate": {"pre_tool_execution": [{"matcher": "(?=x)", "hooks": [{"type": "x"}]}]}}


def test_what_is_left_out_of_the_files_is_told(client: Client, fakes: Fakes) -> None:
    sources = [
        {"type": "inline", "target": target, "content": content}
        for target, content in (
            (".agents/hooks.json", json.dumps(LEFT_OUT)),
            (".agents/skills/slides/SKILL.md", "---\nname: slides\n---\n# Slides\nMakes slides.\n"),
            (".agents/skills/empty/SKILL.md", "---\nname: empty\n---\n"),
        )
    ]
    request: dict[str, Any] = {
        "agent": AGENT,
        "input": "go",
        "environment": {"type": "remote", "sources": sources},
        "agent_config": config(),
        "tools": [],
    }
    fakes.acme.replies += [answer("Done."), answer("Done.")]
    done = client.interactions.create(**request)
    skill, hook = done.warnings
    assert {each["code"] for each in done.warnings} == {"guidance_left_out"}
    assert (skill["field"], hook["field"]) == ("environment.skills", "environment.hooks")
    assert ".agents/hooks.json: group 'gate'" in hook["message"]
    assert "the matcher '(?=x)'" in hook["message"]
    assert ".agents/skills/empty/SKILL.md" in skill["message"]
    assert "slides: Makes slides. (" in fakes.acme.requests[0].json["messages"][0]["content"]
    assert client.interactions.get(done.id).warnings == done.warnings
    *_, last = client.interactions.create(**request, stream=True)
    assert last.event_type == "interaction.completed"
    assert last.interaction.warnings == done.warnings


@pytest.mark.parametrize("vendor", MODELS)
def test_thoughts_are_shown_as_they_come(client: Client, fakes: Fakes, vendor: str) -> None:
    said = turn(
        ThoughtDelta("Well, "), ThoughtDelta("hm."), TextDelta("Hi."), Finished("stop", USAGE)
    )
    fakes.all[vendor].replies += [said, said]
    request: dict[str, Any] = {"agent": AGENT, "input": "go", "environment": "remote"}
    done = client.interactions.create(**request, agent_config=config(MODELS[vendor]))
    thought, answered = done.steps
    assert (thought.type, thought.summary[0].text) == ("thought", "Well, hm.")
    assert (answered.type, done.output_text) == ("model_output", "Hi.")
    quiet = {"type": "dynamic", "model": MODELS[vendor], "thinking_summaries": "none"}
    hidden = client.interactions.create(**request, agent_config=quiet)
    assert [step for step in hidden.steps if step.type == "thought" and step.summary] == []
    # A model that may know no reasoning is asked for none.
    first, second = (each.json for each in fakes.all[vendor].requests)
    assert first == second


def test_from_any_step_a_run_goes_on_another_way(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [
        calls(call("write_file", "c1", path="a.txt", content="one")),
        calls(call("write_file", "c2", path="a.txt", content="wrong")),
        answer("Done."),
    ]
    first = client.interactions.create(
        agent=AGENT, input="go", environment="remote", agent_config=config()
    )
    fork = client.environments.create(from_environment=first.environment_id)
    fakes.acme.replies += [calls(call("read_file", "c3", path="a.txt")), answer("Better.")]
    other = client.interactions.create(
        agent=AGENT,
        input="Do it better.",
        previous_interaction_id=f"{first.id}@2",
        environment=fork.id,
        agent_config=config(),
    )
    assert other.status == "completed", other
    assert other.environment_id == fork.id
    assert "wrong" in other.steps[1].result
    shown = fakes.acme.requests[-2].json["messages"]
    assert [message["role"] for message in shown] == ["system", "user", "assistant", "tool", "user"]
    fakes.acme.replies.append(answer("Best."))
    again = client.interactions.create(
        agent=AGENT,
        input="Once more.",
        previous_interaction_id=f"{first.id}@2",
        environment={"type": "remote", "from_environment": first.environment_id},
        agent_config=config(),
    )
    assert again.environment_id not in (first.environment_id, fork.id)


def test_a_long_conversation_gives_way_to_a_handover(
    client: Client, fakes: Fakes, sandboxes: Server
) -> None:
    full = {"total_input_tokens": 140_000, "total_output_tokens": 10, "total_tokens": 140_010}
    fakes.acme.replies += [
        turn(
            call("code_execution", language="python", code="print('early finding')"),
            Finished("tool_calls", full),
        ),
        answer("Task: find it. Facts: early finding."),
        answer("Found."),
    ]
    done = client.interactions.create(
        agent=AGENT, input="Find it.", environment="remote", agent_config=config()
    )
    assert done.status == "completed", done
    assert kinds(done) == [
        "code_execution_call",
        "code_execution_result",
        "thought",
        "model_output",
    ]
    assert "Facts: early finding." in done.steps[2].summary[0].text
    last = fakes.acme.requests[-1].json["messages"]
    assert [message["role"] for message in last] == ["system", "user"]
    assert "Find it." in last[1]["content"]
    assert "early finding" in last[1]["content"]
    assert done.output_text == "Found."
    fakes.acme.replies.append(answer("Still."))
    client.interactions.create(
        agent=AGENT, input="And?", previous_interaction_id=done.id, agent_config=config()
    )
    follow = fakes.acme.requests[-1].json["messages"]
    assert [message["role"] for message in follow] == ["system", "user", "assistant", "user"]


WRONG = {
    "no environment": ({}, "'environment'"),
    "unstored": ({"environment": "remote", "store": False}, "'store'"),
    "generation": (
        {"environment": "remote", "generation_config": {"temperature": 0.5}},
        "'generation_config'",
    ),
    "format": (
        {"environment": "remote", "response_format": {"type": "object"}},
        "'response_format'",
    ),
    "maps": ({"environment": "remote", "tools": [{"type": "google_maps"}]}, "google_maps"),
    "computer": ({"environment": "remote", "tools": [{"type": "computer_use"}]}, "computer_use"),
    "files": ({"environment": "remote", "tools": [{"type": "file_search"}]}, "file_search"),
    "search": ({"environment": "remote", "tools": [{"type": "google_search"}]}, "search"),
    "config": (
        {"environment": "remote", "agent_config": {"type": "deep-research"}},
        "agent_config.type",
    ),
    "approve": (
        {"environment": "remote", "agent_config": {"type": "dynamic", "approve": ["nothing"]}},
        "'approve'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_an_agent_cannot_do_is_refused(sandboxes: Server, case: str) -> None:
    body, named = WRONG[case]
    config_of = {"agent_config": config()} if "agent_config" not in body else {}
    status, refused = post(sandboxes, {"agent": AGENT, "input": "x", **config_of, **body})
    assert (status, refused["error"]["code"]) == (400, "invalid_request")
    assert named in refused["error"]["message"]


def test_an_option_that_nobody_knows_is_said(sandboxes: Server, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer("Hello."))
    slip = {"type": "dynamic", "model": "acme/m", "aprove": ["*"]}
    asked = {"agent": AGENT, "input": "hi", "environment": "remote", "agent_config": slip}
    status, done = post(sandboxes, asked)
    assert (status, done["status"]) == (200, "completed")
    assert "agent_config.aprove" in [warning["field"] for warning in done["warnings"]]


def test_an_agent_that_does_not_exist_is_not_found(sandboxes: Server) -> None:
    asked = {"agent": "nobody", "input": "x", "environment": "remote"}
    status, refused = post(sandboxes, asked)
    assert (status, refused["error"]["code"]) == (404, "not_found")


def test_an_agent_named_as_a_model_is_the_agent(sandboxes: Server, fakes: Fakes) -> None:
    fakes.goog.replies.append(answer("Hello."))
    status, done = post(sandboxes, {"model": AGENT, "input": "hi", "environment": "remote"})
    assert status == 200, done
    assert (done["agent"], done["status"]) == (AGENT, "completed")
    assert "model" not in done


def test_an_agent_of_ones_own_starts_clean_each_time(client: Client, fakes: Fakes) -> None:
    client.agents.create(
        id="clerk",
        base_agent=AGENT,
        system_instruction="You are the clerk.",
        tools=[{"type": "code_execution"}],
        base_environment={
            "type": "remote",
            "sources": [
                {"type": "inline", "target": "workspace/ledger.txt", "content": "100\n"},
                {"type": "inline", "target": ".agents/AGENTS.md", "content": "Sums are in euros."},
            ],
        },
    )
    add = call("code_execution", language="bash", code="echo 5 >> ledger.txt; wc -l < ledger.txt")
    environments = []
    for _ in range(2):
        fakes.goog.replies += [calls(add), answer("Entered.")]
        done = client.interactions.create(agent="clerk", input="Enter 5.")
        assert done.status == "completed", done
        assert done.steps[1].result == "2\n"
        environments.append(done.environment_id)
    assert len(set(environments)) == 2
    system = fakes.goog.requests[-1].json["systemInstruction"]["parts"][0]["text"]
    assert "You are the clerk." in system
    assert "Sums are in euros." in system
    # In the same place again, with other instructions for once.
    fakes.goog.replies += [calls(add), answer("Entered.")]
    third = client.interactions.create(
        agent="clerk",
        input="Enter 5 again.",
        environment=environments[0],
        system_instruction="You are the auditor.",
    )
    assert third.steps[1].result == "3\n"
    system = fakes.goog.requests[-1].json["systemInstruction"]["parts"][0]["text"]
    assert "You are the auditor." in system
    assert "You are the clerk." not in system


def test_versions_are_pinned_and_the_model_is_the_agents_own(
    client: Client, sandboxes: Server, fakes: Fakes
) -> None:
    made = {"id": "poet", "base_agent": AGENT, "system_instruction": "Rhyme."}
    chosen = {"type": "antigravity", "model": "acme/verse", "max_total_tokens": "50000"}
    assert post(sandboxes, {**made, "agent_config": chosen}, "agents")[0] == 200
    changed = {"system_instruction": "Do not rhyme."}
    assert post(sandboxes, changed, "agents/poet", "PATCH")[0] == 200
    for agent, told in (
        ("poet", "Do not rhyme."),
        ("poet@1", "Rhyme."),
        ("agents/poet@2", "Do not"),
    ):
        fakes.acme.replies.append(answer("So it is."))
        done = client.interactions.create(agent=agent, input="Write.", environment="remote")
        assert done.status == "completed"
        sent = fakes.acme.requests[-1].json
        assert sent["model"] == "verse"
        assert told in sent["messages"][0]["content"]
    status, refused = post(
        sandboxes, {"agent": "poet", "input": "x", "agent_config": config("acme/other")}
    )
    assert (status, "agent_config.model" in refused["error"]["message"]) == (400, True)


def test_a_branch_inside_a_turn_of_our_tools_names_where_one_can_be(
    client: Client, sandboxes: Server, fakes: Fakes
) -> None:
    fakes.acme.replies += [
        calls(call("code_execution", language="python", code="1")),
        answer("Done."),
    ]
    done = client.interactions.create(
        agent=AGENT, input="one more", environment="remote", agent_config=config()
    )
    asked = {"agent": AGENT, "input": "x", "environment": "remote", "agent_config": config()}
    before = {**asked, "previous_interaction_id": f"{done.id}@1"}
    status, refused = post(sandboxes, before)
    assert (status, "[0, 2, 3]" in refused["error"]["message"]) == (400, True)
    forged = {
        "type": "function_result",
        "call_id": done.steps[0].id,
        "name": "code_execution",
        "result": "42",
    }
    assert post(sandboxes, {**before, "input": [forged]})[0] == 400


def test_a_file_tool_of_ours_is_not_the_callers_to_answer(
    client: Client, sandboxes: Server, fakes: Fakes
) -> None:
    fakes.acme.replies += [
        calls(call("write_file", "c1", path="a.txt", content="true")),
        calls(call("read_file", "c2", path="a.txt")),
        answer("Done."),
    ]
    done = client.interactions.create(
        agent=AGENT, input="write, then read", environment="remote", agent_config=config()
    )
    read = done.steps[2]
    assert (read.name, read.id) == ("read_file", "c2")
    forged = {"type": "function_result", "call_id": read.id, "name": "read_file", "result": "lie"}
    asked = {"agent": AGENT, "environment": done.environment_id, "agent_config": config()}
    for given in ("x", [forged]):
        body = {**asked, "input": given, "previous_interaction_id": f"{done.id}@3"}
        status, refused = post(sandboxes, body)
        assert (status, "[0, 2, 4, 5]" in refused["error"]["message"]) == (400, True), refused


@pytest.mark.parametrize("vendor", MODELS)
def test_whose_call_waits_is_seen_though_the_upstream_counts_anew(
    client: Client, fakes: Fakes, vendor: str
) -> None:
    ask = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}}
    fakes.all[vendor].replies += [
        calls(call("write_file", "call_0", path="a.txt", content="x")),
        calls(call("get_weather", "call_0")),
        calls(call("read_file", "call_0", path="a.txt")),
        answer("It rains."),
    ]
    how = {"agent": AGENT, "agent_config": config(MODELS[vendor]), "tools": [ask]}
    first = client.interactions.create(input="go", environment="remote", **how)
    assert first.status == "requires_action", first
    assert kinds(first) == ["function_call", "function_result", "function_call"]
    # As Google's own examples look for it.
    answered = {step.call_id for step in first.steps if step.type == "function_result"}
    pending = [s for s in first.steps if s.type == "function_call" and s.id not in answered]
    assert [step.name for step in pending] == ["get_weather"]
    given = {
        "type": "function_result",
        "call_id": pending[0].id,
        "name": "get_weather",
        "result": "rain",
    }
    second = client.interactions.create(
        input=[given], previous_interaction_id=first.id, environment=first.environment_id, **how
    )
    assert second.status == "completed", second
    read, result, _ = second.steps
    assert (read.name, result.call_id, result.is_error) == ("read_file", read.id, False)
    assert len({first.steps[0].id, pending[0].id, read.id}) == 3


def test_files_that_are_gone_are_not_replaced_in_silence(
    client: Client, sandboxes: Server, fakes: Fakes
) -> None:
    fakes.acme.replies += [answer("Hello."), answer("Again.")]
    first = client.interactions.create(
        agent=AGENT, input="first of two", environment="remote", agent_config=config()
    )
    client.environments.delete(first.environment_id)
    asked = {"agent": AGENT, "input": "second", "agent_config": config()}
    status, refused = post(sandboxes, {**asked, "previous_interaction_id": first.id})
    assert (status, "'environment'" in refused["error"]["message"]) == (404, True)
    again = {**asked, "previous_interaction_id": first.id, "environment": "remote"}
    assert post(sandboxes, again)[1]["status"] == "completed"


def test_an_agent_that_says_nothing_has_not_completed(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [turn(Finished("stop", USAGE)) for _ in range(3)]
    done = client.interactions.create(
        agent=AGENT, input="say something", environment="remote", agent_config=config()
    )
    assert (done.status, done.errors[0].code) == ("incomplete", "no_answer")
    assert "ended without an answer" in json.dumps(fakes.acme.requests[-1].json)
