"""Server-side tools in the loop: committed before they run, run once, and never left open."""

import base64
import re

import orjson
import pytest
from tests import pictures
from tests.loop.stage import Bench, ScriptedModel, answer, down, play, said

from openinteractions.errors import NotFound, Unready
from openinteractions.loop.context import open_calls
from openinteractions.loop.spec import Limits
from openinteractions.loop.turn import fold
from openinteractions.models.port import Finished, TextDelta, ToolCall
from openinteractions.sandbox.port import Exit, NotBegun, SandboxError
from openinteractions.tools.port import Done

CODE = [{"type": "code_execution"}]
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
FINISHED = Finished("tool_calls", {"total_input_tokens": 1, "total_tokens": 1})
PNG = pictures.PNG_BASE64


def runs(code: str, language: str = "python", call_id: str = "c1", **more):
    arguments = {"language": language, "code": code}
    return ToolCall(call_id, "code_execution", arguments, **more)


def done(text: str = "", **end) -> Done:
    return Done(Exit(**{"outcome": "exited", "code": 0, **end}), text)


def call_step(code: str, language: str = "python", call_id: str = "c1") -> dict:
    arguments = {"language": language, "code": code}
    return {"type": "code_execution_call", "arguments": arguments, "id": call_id}


def result_step(result, call_id: str = "c1", *, is_error: bool = False) -> dict:
    return {
        "type": "code_execution_result",
        "result": result,
        "is_error": is_error,
        "call_id": call_id,
    }


async def test_code_is_run_and_its_output_goes_back_to_the_model():
    bench = Bench([done("42\n")])
    model = ScriptedModel([TextDelta("Let me see."), runs("6*7"), FINISHED], answer("It is 42."))
    scene = await play(model, bench=bench, own_tools=CODE)
    assert scene.outcome.status == "completed"
    assert scene.steps == [
        said("Let me see."),
        call_step("6*7"),
        result_step("42\n"),
        said("It is 42."),
    ]
    assert bench.executed == [("2", ["6*7"], "main")]
    assert model.calls[0].tools[0]["name"] == "code_execution"
    assert model.shown(1)[-2:] == [call_step("6*7"), result_step("42\n")]
    assert [step for step, _ in fold(scene.journal.events)] == scene.steps[:3] + scene.steps[3:]


async def test_a_call_is_committed_before_it_runs_and_its_result_after():
    bench = Bench([done("a"), done("b")])
    calls = [runs("1", call_id="c1"), runs("ls", "bash", call_id="c2"), FINISHED]
    scene = await play(ScriptedModel(calls, answer("ok")), bench=bench, own_tools=CODE)
    committed = [[s["type"] for s in steps] for steps, _ in scene.journal.commits]
    assert committed == [
        ["code_execution_call", "code_execution_call"],
        ["code_execution_result"],
        ["code_execution_result"],
    ]
    assert bench.commits_seen == [1, 2]
    assert [key for key, _, _ in bench.executed] == ["1", "2"]
    assert bench.executed[1][1] == ["/bin/bash", "-c", "ls"]


async def test_who_takes_over_runs_what_is_open_with_the_same_key():
    generated = [call_step("1"), call_step("2", call_id="c2"), result_step("one")]
    bench = Bench([done("two")])
    model = ScriptedModel(answer("ok"))
    scene = await play(model, bench=bench, own_tools=CODE, generated=generated)
    assert [(key, argv) for key, argv, _ in bench.executed] == [("2", ["2"])]
    assert scene.steps[3] == result_step("two", "c2")
    assert scene.outcome.status == "completed"


async def test_a_call_of_the_callers_waits_beside_ours():
    bench = Bench([done("x")])
    turn = [runs("1"), ToolCall("f1", "look", {}), FINISHED]
    scene = await play(ScriptedModel(turn), bench=bench, own_tools=CODE, tools=[LOOK])
    assert scene.outcome.status == "requires_action"
    assert [s["type"] for s in scene.steps] == [
        "code_execution_call",
        "function_call",
        "code_execution_result",
    ]
    assert [step["id"] for _, step in open_calls(scene.steps)] == ["f1"]
    # Who takes over between the result and the end asks no model.
    again = await play(
        ScriptedModel(), bench=Bench(), own_tools=CODE, tools=[LOOK], generated=scene.steps
    )
    assert again.outcome.status == "requires_action"


async def test_wrong_arguments_are_the_result():
    bench = Bench()
    calls = [ToolCall("c1", "code_execution", {"code": 1}), FINISHED]
    scene = await play(ScriptedModel(calls, answer("sorry")), bench=bench, own_tools=CODE)
    assert scene.outcome.status == "completed"
    assert bench.executed == []
    assert scene.steps[1]["is_error"]
    assert "language" in scene.steps[1]["result"] or "code" in scene.steps[1]["result"]


@pytest.mark.parametrize(
    ("given", "meant", "argv"),
    [
        ({"language": "python3"}, "python", ["1"]),
        ({"language": "Python"}, "python", ["1"]),
        ({}, "python", ["1"]),
        ({"language": "sh"}, "bash", ["/bin/bash", "-c", "1"]),
        ({"language": "node"}, "javascript", ["node", "-e", "1"]),
    ],
)
@pytest.mark.parametrize("approve", [(), ("code_execution",)], ids=["plain", "approved"])
async def test_a_language_may_have_another_name_or_none(given, meant, argv, approve):
    bench = Bench([done("ok")])
    model = ScriptedModel(
        [ToolCall("c1", "code_execution", {**given, "code": "1"}), FINISHED], answer("ok")
    )
    scene = await play(model, bench=bench, own_tools=CODE, approve=approve)
    arguments = {"language": meant, "code": "1"}
    if approve:
        assert scene.outcome.status == "requires_action"
        asked = {"tool": "code_execution", "arguments": arguments}
        assert scene.steps[0]["arguments"] == asked
        return
    assert scene.steps[0]["arguments"] == arguments
    assert bench.executed[0][1] == argv


async def test_a_session_that_ends_by_itself_is_told():
    bench = Bench([done("bye", has_ended_session=True)])
    scene = await play(
        ScriptedModel([runs("os._exit(0)"), FINISHED], answer("ok")), bench=bench, own_tools=CODE
    )
    assert not scene.steps[1]["is_error"]
    assert "bye\n[The Python session has ended with it" in scene.steps[1]["result"]


async def test_a_function_that_does_not_exist_is_told_to_the_model():
    bench = Bench()
    calls = [ToolCall("c1", "nonsense", {}), FINISHED]
    scene = await play(ScriptedModel(calls, answer("ok")), bench=bench, own_tools=CODE)
    assert (scene.outcome.status, scene.steps) == ("completed", [said("ok")])


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (done("boom\n", code=1), "boom\n[Exit code 1.]"),
        (done("", code=3), "[Exit code 3.]"),
        (done("..", timed_out=True), "longer than 600 seconds"),
        (done("", code=None, signal=9), "[Ended by signal 9.]"),
        (done("", code=None, signal=9, out_of_memory=True), "signal 9. The sandbox ran out of mem"),
        (done("", code=137, out_of_memory=True), "Exit code 137. The sandbox ran out of memory"),
        (done("", code=3, has_ended_session=True), "Exit code 3. The Python session has ended"),
        (done("NameError", code=1, is_fresh_session=True), "session is a new one"),
        (done("", outcome="unknown", code=None), "Outcome unknown"),
        (done("", outcome="killed", code=None, signal=9), "[Stopped, since its end was asked"),
        (
            done("", outcome="killed", code=None, signal=9, stopped_for="deleted"),
            "[Stopped: its environment was deleted.]",
        ),
        (
            done("", outcome="killed", code=None, signal=9, stopped_for="size"),
            "[Stopped: the environment holds more than it may.]",
        ),
        (
            done("", outcome="killed", code=None, signal=9, stopped_for="other"),
            "[Stopped: its sandbox was stopped.]",
        ),
        (Unready("No broker answers."), "it is unknown whether this ran: No broker answers."),
        (NotBegun("All 6 are busy."), "Not run: All 6 are busy."),
        (NotFound("Environment 'e' not found."), "could not run this: Environment"),
        (SandboxError("It does not start."), "could not run this: It does not start."),
    ],
)
async def test_what_goes_wrong_is_said(end, says):
    model = ScriptedModel([runs("x", "bash"), FINISHED], answer("ok"))
    scene = await play(model, bench=Bench([end]), own_tools=CODE)
    assert scene.outcome.status == "completed"
    assert scene.steps[1]["is_error"]
    assert says in scene.steps[1]["result"]


async def test_open_figures_are_images():
    bench = Bench([done("drawn\n"), done(f"{PNG}\n{PNG}\n")])
    model = ScriptedModel([runs("plt.plot([1])"), FINISHED], answer("ok"))
    scene = await play(model, bench=bench, own_tools=CODE)
    image = {"type": "image", "mime_type": "image/png", "data": PNG}
    assert scene.steps[1]["result"] == [{"type": "text", "text": "drawn\n"}, image, image]
    assert [key for key, _, _ in bench.executed] == ["1", "1.figures"]


@pytest.mark.parametrize(
    "junk",
    [
        "iVBOR", "iVBORw0KGgo=!", "iVBORw0KGA==", "iVBORw0KGgoé", "/9j/4AAQSkZJRg==",
        "iVBORw0KGgo" + "A" * 4 * 2**20 + "=",
    ],
    ids=["magic", "no base64", "no PNG", "no ASCII", "JPEG", "too large"],
)  # fmt: skip
async def test_what_is_no_figure_is_left_out(junk):
    bench = Bench([done("drawn"), done(f"{junk}\n{PNG} {junk}\n")])
    scene = await play(
        ScriptedModel([runs("plt.x"), FINISHED], answer("ok")), bench=bench, own_tools=CODE
    )
    assert [block["type"] for block in scene.steps[1]["result"]] == ["text", "image"]


@pytest.mark.parametrize(
    ("png", "why"),
    [
        (pictures.png(9360, 197), "has 9360 x 197 pixels"),
        (pictures.PNG[:40], "is cut off"),
    ],
    ids=["large", "cut"],
)
async def test_a_figure_that_vendors_refuse_is_told(png, why):
    bench = Bench([done("drawn"), done(f"{base64.b64encode(png).decode()}\n{PNG}\n")])
    scene = await play(
        ScriptedModel([runs("plt.x"), FINISHED], answer("ok")), bench=bench, own_tools=CODE
    )
    _, told, image = scene.steps[1]["result"]
    assert told["type"] == "text"
    assert why in told["text"]
    assert image["type"] == "image"


async def test_there_are_only_so_many_figures():
    bench = Bench([done(), done(f"{PNG}\n" * 100_000)])
    scene = await play(
        ScriptedModel([runs("plt.x"), FINISHED], answer("ok")), bench=bench, own_tools=CODE
    )
    assert len(scene.steps[1]["result"]) == 4
    bench = Bench([done("x"), done("iVBOR " * 1000 + PNG)])
    scene = await play(
        ScriptedModel([runs("plt.x"), FINISHED], answer("ok")), bench=bench, own_tools=CODE
    )
    assert scene.steps[1]["result"] == "x"


def in_order(count: int) -> str:
    return "".join(f"line {number}\n" for number in range(count))


@pytest.mark.parametrize("language", ["python", "bash"])
async def test_of_a_long_output_two_ends_are_shown_and_a_file_has_the_whole(language):
    text = in_order(100_000)
    bench = Bench([done(text, code=1)])
    model = ScriptedModel([runs("x", language), FINISHED], answer("ok"))
    scene = await play(model, bench=bench, own_tools=CODE)
    ((path, kept),) = bench.files.items()
    assert kept.decode() == text
    shown = scene.steps[1]["result"]
    head, mark, tail = re.split(r"\n\[… (.*) …]\n", shown)
    name = path.removeprefix("home/outputs/")
    assert name.startswith("1-")
    assert name.endswith(".txt")
    left_out = len(text) - len(head) - len(tail.removesuffix("[Exit code 1.]"))
    assert mark == f"{left_out} bytes left out; the whole output is in /home/agent/outputs/{name}"
    assert text.startswith(head + "\n")
    assert tail.endswith("line 99999\n[Exit code 1.]")
    assert re.match(r"line \d+\n", tail)
    assert 20_000 < len(shown) < 25_000


async def test_a_taken_over_call_keeps_its_output_once():
    bench = Bench([done(in_order(9000)), done(in_order(9000)), done(in_order(9001))])
    for _ in range(3):
        generated = [call_step("1", "bash")]
        await play(ScriptedModel(answer("ok")), bench=bench, own_tools=CODE, generated=generated)
    # The same output of the same call, and then another turn's with the same key.
    assert len(bench.changes) == 3
    assert len(bench.files) == 2


async def test_an_output_of_which_not_all_was_kept_does_not_claim_it():
    bench = Bench([done("é" * 300_000, truncated=True)])
    model = ScriptedModel([runs("x", "bash"), FINISHED], answer("ok"))
    shown = (await play(model, bench=bench, own_tools=CODE)).steps[1]["result"]
    assert "whole output" not in shown
    assert "what was kept of the output, 1 MiB of it, is in /home/agent/outputs/1-" in shown
    assert len(shown.encode()) < 25_000


@pytest.mark.parametrize(
    "error",
    [Unready("Away."), NotFound("Gone."), SandboxError("Broken."), TimeoutError()],
    ids=repr,
)
async def test_an_output_that_cannot_be_kept_is_shown_all_the_same(error):
    def fail(_: str) -> None:
        raise error

    bench = Bench([done(in_order(9000))], disturb=fail)
    model = ScriptedModel([runs("x", "bash"), FINISHED], answer("ok"))
    step = (await play(model, bench=bench, own_tools=CODE)).steps[1]
    assert not step["is_error"]
    assert "bytes left out …]" in step["result"]
    assert "/home/agent" not in step["result"]


async def test_an_output_that_is_not_long_is_whole_and_in_no_file():
    text = "x" * 24 * 1024
    bench = Bench([done(text)])
    model = ScriptedModel([runs("x", "bash"), FINISHED], answer("ok"))
    scene = await play(model, bench=bench, own_tools=CODE)
    assert scene.steps[1]["result"] == text
    assert bench.files == {}


async def test_an_unknown_language_and_code_that_is_too_long():
    calls = [runs("x", "cobol", "c1"), runs("#" * 200_000, "bash", "c2"), FINISHED]
    bench = Bench()
    scene = await play(ScriptedModel(calls, answer("ok")), bench=bench, own_tools=CODE)
    assert bench.executed == []
    assert [s["is_error"] for s in scene.steps[2:4]] == [True, True]
    assert "100 kB" in scene.steps[3]["result"]


async def test_the_time_limit_stops_what_runs_and_leaves_nothing_open():
    bench = Bench(is_stuck=True)
    limits = Limits(max_seconds=0.1)
    model = ScriptedModel([runs("while True: pass"), FINISHED])
    scene = await play(model, bench=bench, own_tools=CODE, limits=limits)
    assert scene.outcome.status == "budget_exceeded"
    # The code, and the call for its figures: either may be what runs.
    assert bench.killed == ["1", "1.figures"]
    assert open_calls(scene.steps) == []
    assert scene.run.uncommitted == [result_step("The run's time limit is reached.", is_error=True)]


async def test_a_model_that_must_call_may_answer_once_it_has():
    bench = Bench([done("x")])
    model = ScriptedModel([runs("1"), FINISHED], answer("ok"))
    await play(model, bench=bench, own_tools=CODE, tool_choice="any")
    assert [call.tool_choice for call in model.calls] == ["any", "auto"]


async def test_a_broken_turn_shows_no_call():
    bench = Bench([done("1")])
    model = ScriptedModel(
        [TextDelta("a"), runs("0"), down()], [TextDelta("b"), runs("1"), FINISHED], answer("ok")
    )
    scene = await play(model, bench=bench, own_tools=CODE)
    assert [argv for _, argv, _ in bench.executed] == [["1"]]
    assert [s["type"] for s in scene.steps].count("code_execution_call") == 1
    # The broken text and the note about it come first: the key counts them.
    place = [s["type"] for s in scene.steps].index("code_execution_call")
    assert bench.executed[0][0] == str(place + 1)


async def test_an_unwatched_run_is_the_same():
    bench = Bench([done("42")])
    model = ScriptedModel([runs("6*7"), FINISHED], answer("ok"))
    scene = await play(model, bench=bench, own_tools=CODE, watched=False)
    assert scene.steps == [call_step("6*7"), result_step("42"), said("ok")]
    assert scene.journal.events == []
    assert orjson.dumps(scene.steps)


async def test_calls_beyond_the_limit_of_steps_are_not_executed():
    bench = Bench([done("a")])
    calls = [runs("1", call_id="c1"), runs("2", call_id="c2"), FINISHED]
    scene = await play(
        ScriptedModel(calls), bench=bench, own_tools=CODE, limits=Limits(max_steps=3)
    )
    assert scene.outcome.status == "budget_exceeded"
    assert len(bench.executed) == 1
    assert open_calls(scene.steps) == []
    assert "max_steps = 3" in scene.steps[-1]["result"]
