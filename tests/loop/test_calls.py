"""Calls of this server's tools: side by side where it is safe, noted first, and supervised."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import orjson
import pytest
from tests.loop.stage import Break, ScriptedModel, answer, play, said

from openinteractions.errors import Invalid, LeaseLost, Unready
from openinteractions.loop import approval, repeats
from openinteractions.loop.context import resumption_note
from openinteractions.loop.spec import RunState
from openinteractions.models.port import Finished, Json, ModelEvent, ToolCall
from openinteractions.tools import function
from openinteractions.tools.port import Call, Tool
from openinteractions.tools.toolbox import Toolbox

FINISHED = Finished("tool_calls", {"total_input_tokens": 1, "total_tokens": 1})


async def nothing(call: Call) -> str:
    return f"did {call.step['arguments'].get('n')}"


@dataclass
class Double:
    """A tool that obeys the port."""

    name: str
    act: Callable[[Call], Awaitable[object]] = nothing
    is_pure: bool = False
    ran: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def declaration(self) -> Json:
        parameters = {"type": "object", "properties": {"n": {"type": "integer"}}}
        return {"type": "function", "name": self.name, "parameters": parameters}

    def call_step(self, call: ToolCall) -> Json:
        return function.call_step(call)

    async def run(self, call: Call) -> Json:
        self.ran.append(call.key)
        return function.result_step(self.name, await self.act(call))

    def failure(self, message: str) -> Json:
        return function.result_step(self.name, message, is_error=True)

    async def stop(self, key: str) -> None:
        self.stopped.append(key)


def calls(*wanted: tuple[str, int], start: int = 0) -> list:
    made = [ToolCall(f"c{start + place}", name, {"n": n}) for place, (name, n) in enumerate(wanted)]
    return [*made, FINISHED]


def results(steps: list[Json]) -> list[object]:
    return [step["result"] for step in steps if step["type"] == "function_result"]


def boxed(*doubles: Double) -> dict[str, Tool]:
    return {double.name: double for double in doubles}


async def test_pure_calls_beside_each_other_run_at_the_same_time_and_keep_their_order():
    arrived = asyncio.Event()

    async def meet(call: Call) -> str:
        # The first waits for the second: one after the other they would wait for ever.
        if call.step["arguments"]["n"] == 2:
            arrived.set()
        async with asyncio.timeout(5):
            await arrived.wait()
        return f"did {call.step['arguments']['n']}"

    look = Double("look", meet, is_pure=True)
    scene = await play(
        ScriptedModel(calls(("look", 1), ("look", 2)), answer("ok")), box=boxed(look)
    )
    assert results(scene.steps) == ["did 1", "did 2"]
    committed = [[step["type"] for step in steps] for steps, _ in scene.journal.commits]
    assert committed == [["function_call"] * 2, ["function_result"] * 2]


def waiting(steps: list[Json]) -> list[Json]:
    """What Google's own clients take for calls that are theirs to answer."""
    answered = {step["call_id"] for step in steps if step["type"] == "function_result"}
    return [s for s in steps if s["type"] == "function_call" and s["id"] not in answered]


@pytest.mark.parametrize("approve", [[], ["write"]])
async def test_an_upstream_that_counts_its_calls_anew_does_not_repeat_an_id(approve: list[str]):
    look, write = Double("look"), Double("write")
    mine = {"type": "function", "name": "ask", "parameters": {"type": "object"}}
    asks = "write" if approve else "ask"
    model = ScriptedModel(
        calls(("look", 1), start=1), calls(("look", 2)), calls((asks, 3), start=1)
    )
    given = [{"type": "function_call", "id": "c0", "name": "look", "arguments": {}}, consents("x")]
    scene = await play(model, box=boxed(look, write), tools=[mine], approve=approve, inputs=given)
    assert scene.outcome.status == "requires_action"
    ids = [step["id"] for step in [*given, *scene.steps] if step["type"] == "function_call"]
    assert len(set(ids)) == 4
    assert waiting([*given, *scene.steps]) == [scene.steps[-1]]
    assert write.ran == []
    # The model is shown the same ids, each result behind its call.
    told = [step.get("call_id") or step["id"] for step in model.shown()]
    assert told == ["c0", "c0", "c1", "c1", ids[2], ids[2]]


async def test_an_id_of_an_earlier_turn_is_not_used_again():
    earlier = orjson.dumps({"type": "function_call", "id": "c0"})
    scene = await play(
        ScriptedModel(calls(("look", 1), ("look", 2)), answer("ok")),
        box=boxed(Double("look")),
        earlier=[earlier],
    )
    first, second = scene.steps[:2]
    assert first["id"] != "c0"
    # Who is the only one keeps what the vendor has said.
    assert second["id"] == "c1"


async def test_a_call_that_readers_saw_before_a_takeover_keeps_its_id_to_itself():
    seen = {"type": "function_call", "id": "c0", "name": "look", "arguments": {}}
    note = resumption_note(kind="resumed", text="", discards=1)
    scene = await play(
        ScriptedModel(calls(("look", 1)), answer("ok")),
        box=boxed(Double("look")),
        generated=[seen, note],
    )
    call, result = scene.steps[2:4]
    assert call["id"] == result["call_id"] != "c0"


async def test_what_was_wrong_with_a_call_is_not_said_again_behind_the_right_one():
    wrong = [ToolCall("c0", "nope", {}), FINISHED]
    model = ScriptedModel(wrong, wrong, calls(("look", 1)), answer("ok"))
    scene = await play(model, box=boxed(Double("look")))
    assert scene.outcome.status == "completed"
    told = [step for step in model.shown(2) if step["type"] == "function_call"]
    assert len({step["id"] for step in told}) == 2
    assert [step["type"] for step in model.shown()] == [
        "user_input",
        "function_call",
        "function_result",
    ]


async def test_calls_that_change_something_run_one_after_the_other():
    under_way: list[int] = []

    async def alone(call: Call) -> str:
        assert not under_way
        under_way.append(1)
        await asyncio.sleep(0.01)
        under_way.pop()
        return "done"

    look, write = Double("look", alone, is_pure=True), Double("write", alone)
    script = calls(("write", 1), ("write", 2), ("look", 3), ("write", 4))
    scene = await play(ScriptedModel(script, answer("ok")), box=boxed(look, write))
    assert results(scene.steps) == ["done"] * 4
    assert (write.ran, look.ran) == (["1", "2", "4"], ["3"])


async def test_one_crash_among_pure_calls_ends_the_others():
    ended: list[int] = []

    async def crash(call: Call) -> str:
        if call.step["arguments"]["n"] == 1:
            raise ZeroDivisionError
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(1)
        return "never"

    model = ScriptedModel(calls(("look", 1), ("look", 2)))
    with pytest.raises(ZeroDivisionError):
        await play(model, box=boxed(Double("look", crash, is_pure=True)))
    assert ended == [1]


async def test_a_failure_that_the_tool_lets_through_is_a_result():
    async def away(call: Call) -> str:
        raise Unready("The broker is away.")

    scene = await play(ScriptedModel(calls(("w", 1)), answer("ok")), box=boxed(Double("w", away)))
    assert scene.outcome.status == "completed"
    assert results(scene.steps) == ["The broker is away."]
    assert scene.steps[1]["is_error"]


async def test_a_lost_lease_is_no_result():
    async def lost(call: Call) -> str:
        raise LeaseLost("Another worker owns it.")

    with pytest.raises(LeaseLost):
        await play(ScriptedModel(calls(("w", 1))), box=boxed(Double("w", lost)))


async def test_a_note_is_durable_before_the_tool_acts_and_gone_with_its_result():
    async def noted(call: Call) -> str:
        assert call.begun is None
        await call.begin({"about": "this"})
        return "done"

    scene = await play(ScriptedModel(calls(("w", 1)), answer("ok")), box=boxed(Double("w", noted)))
    states = [orjson.loads(state)["begun"] for _, state in scene.journal.commits]
    assert states == [{}, {"1": {"about": "this"}}, {}]
    assert [len(steps) for steps, _ in scene.journal.commits] == [1, 0, 1]


async def test_who_takes_over_is_told_what_was_noted():
    async def look_at_it(call: Call) -> object:
        return call.begun or "nothing"

    generated = [{"type": "function_call", "id": "c1", "name": "w", "arguments": {"n": 1}}]
    scene = await play(
        ScriptedModel(answer("ok")),
        box=boxed(Double("w", look_at_it)),
        generated=generated,
        state=RunState(begun={"1": {"about": "this"}}),
    )
    assert results(scene.steps) == [{"about": "this"}]


async def test_two_calls_of_one_id_both_run_and_have_their_own_results():
    same = [ToolCall("c0", "look", {"n": 1}), ToolCall("c0", "look", {"n": 2}), FINISHED]
    scene = await play(ScriptedModel(same, answer("ok")), box=boxed(Double("look")))
    assert results(scene.steps) == ["did 1", "did 2"]
    first, second = (step["id"] for step in scene.steps[:2])
    assert first == "c0" != second
    assert [step["call_id"] for step in scene.steps[2:4]] == [first, second]


# ---- going in circles


async def test_the_same_call_with_the_same_result_is_remarked_and_then_ended():
    same = [calls(("look", 1), start=number) for number in range(repeats.END_AT)]
    scene = await play(ScriptedModel(*same), box=boxed(Double("look")))
    assert scene.outcome.status == "incomplete"
    assert scene.outcome.errors[0]["code"] == "loop_detected"
    said_to_model = results(scene.steps)
    assert said_to_model[:2] == ["did 1", "did 1"]
    assert "3 times now" in str(said_to_model[2])
    assert len(said_to_model) == repeats.END_AT


async def test_the_same_call_many_times_at_once_counts_once():
    count = repeats.END_AT + 2
    turns = [calls(*[("look", 1)] * count, start=count * turn) for turn in range(2)]
    model = ScriptedModel(*turns, answer("ok"))
    scene = await play(model, box=boxed(Double("look")))
    assert scene.outcome.status == "completed"
    assert "times now" not in str(results(scene.steps))


async def test_a_circle_of_many_calls_at_once_is_noticed():
    turns = [
        calls(*[("look", n) for n in range(20)], start=20 * turn) for turn in range(repeats.END_AT)
    ]
    scene = await play(ScriptedModel(*turns), box=boxed(Double("look")))
    assert scene.outcome.errors[0]["code"] == "loop_detected"
    assert ["times now" in str(said) for said in results(scene.steps)].index(True) == 40


async def test_what_changes_is_no_circle():
    number = iter(range(100))

    async def other(call: Call) -> str:
        return f"{next(number)}"

    same = [calls(("look", 1), start=n) for n in range(repeats.END_AT + 2)]
    scene = await play(ScriptedModel(*same, answer("ok")), box=boxed(Double("look", other)))
    assert scene.outcome.status == "completed"
    assert "times now" not in str(results(scene.steps))


# ---- consent


def consents(result: object, **more: object) -> Json:
    return {
        "type": "function_result",
        "call_id": "c0",
        "name": "approval",
        "result": result,
        **more,
    }


async def test_a_tool_that_needs_consent_asks_for_it_and_does_not_run():
    write, look = Double("write"), Double("look", is_pure=True)
    model = ScriptedModel(calls(("write", 1), ("look", 2)))
    scene = await play(model, box=boxed(write, look), approve=["WR*"])
    assert scene.outcome.status == "requires_action"
    assert scene.steps[0] == {
        "type": "function_call",
        "name": "approval",
        "arguments": {"tool": "write", "arguments": {"n": 1}},
        "asks_for_consent": True,
        "id": "c0",
    }
    # What needs none has run; its result is there.
    assert (write.ran, look.ran) == ([], ["2"])
    assert results(scene.steps) == ["did 2"]


async def test_arguments_that_cannot_be_right_are_not_put_to_a_human():
    write = Double("write")
    wrong = [ToolCall("c0", "write", {"n": "one"}), FINISHED]
    model = ScriptedModel(wrong, calls(("write", 1)))
    scene = await play(model, box=boxed(write), approve=["write"])
    assert scene.outcome.status == "requires_action"
    assert scene.steps[-1]["arguments"]["arguments"] == {"n": 1}
    assert len(scene.steps) == 1


async def test_what_was_approved_runs_first_once_and_in_the_next_interaction():
    write = Double("write")
    model = ScriptedModel(answer("Written."))
    approved = [{"tool": "write", "arguments": {"n": 7}}]
    scene = await play(
        model, box=boxed(write), approve=["write"], approved=approved, inputs=[consents("yes")]
    )
    assert scene.outcome.status == "completed"
    kinds = [step["type"] for step in scene.steps]
    assert kinds == ["function_call", "function_result", "model_output"]
    assert scene.steps[0]["name"] == "write"
    assert results(scene.steps) == ["did 7"]
    # Taken over after its call was committed, it is not begun again.
    again = await play(
        ScriptedModel(answer("Written.")),
        box=boxed(write),
        approved=approved,
        inputs=[consents("yes")],
        generated=scene.steps[:2],
    )
    assert [step["type"] for step in again.steps] == kinds
    assert write.ran == ["1"]


PENDING = [
    {
        "type": "function_call",
        "id": "c0",
        "name": "approval",
        "arguments": {"tool": "write", "arguments": {"n": 1}},
        "asks_for_consent": True,
    }
]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("approve", {"n": 1}),
        (" Yes. ", {"n": 1}),
        ({"decision": "approve"}, {"n": 1}),
        ({"approved": True}, {"n": 1}),
        ('{"decision": "approve"}', {"n": 1}),
        ([{"type": "text", "text": "approved"}], {"n": 1}),
        ({"decision": "edit", "arguments": {"n": 2}}, {"n": 2}),
        ("deny", None),
        ({"decision": "deny", "reason": "no"}, None),
        ({"approved": False}, None),
        ([{"type": "text", "text": '{"decision": "deny"}'}], None),
    ],
)
def test_an_answer_approves_denies_or_edits(result: object, expected: object):
    box = Toolbox(boxed(Double("write")))
    found = approval.carried_out(PENDING, [consents(result)], box)
    wanted = [] if expected is None else [{"call_id": "c0", "tool": "write", "arguments": expected}]
    assert found == wanted


@pytest.mark.parametrize(
    "result",
    [
        "maybe",
        "edit",
        {},
        {"decision": "edit"},
        {"decision": "edit", "arguments": "x"},
        {"decision": "perhaps", "arguments": {}},
        [],
        None,
        7,
        ["approve"],
    ],
)
def test_an_answer_that_says_neither_is_refused(result: object):
    with pytest.raises(Invalid, match="approval 'c0'"):
        approval.carried_out(PENDING, [consents(result)], Toolbox(boxed(Double("write"))))


def test_an_error_is_no_consent():
    said_no = consents("approve", is_error=True)
    assert approval.carried_out(PENDING, [said_no], Toolbox(boxed(Double("write")))) == []


def test_a_tool_that_is_gone_cannot_be_approved():
    with pytest.raises(Invalid, match="'write' was approved"):
        approval.carried_out(PENDING, [consents("yes")], Toolbox({}))


# ---- functions that are loaded when they are needed


LATER = {
    "type": "function",
    "name": "convert",
    "short_description": "Converts units.",
    "description": "Converts a length from one unit to another.",
    "parameters": {"type": "object", "properties": {"x": {"type": "number"}}},
    "defer_loading": True,
}
SEARCH = {"type": "tool_search", "functions": [LATER]}


async def test_a_deferred_function_is_declared_once_the_model_has_loaded_it():
    model = ScriptedModel(
        [ToolCall("c0", "tool_search", {"function_names": ["convert"]}), FINISHED],
        [ToolCall("c1", "convert", {"x": 1}), FINISHED],
    )
    scene = await play(model, tools=[LATER], own_tools=[SEARCH])
    assert [tool["name"] for tool in model.calls[0].tools] == ["tool_search"]
    assert "convert: Converts units." in model.calls[0].tools[0]["description"]
    assert [tool["name"] for tool in model.calls[1].tools] == ["convert", "tool_search"]
    assert "defer_loading" not in model.calls[1].tools[0]
    assert scene.outcome.status == "requires_action"
    call, result, last = scene.steps
    assert call == {
        "type": "tool_search_call",
        "arguments": {"function_names": ["convert"]},
        "id": "c0",
    }
    assert [f["name"] for f in result["result"]] == ["convert"]
    assert last["name"] == "convert"


def searched(*names: str) -> list[ModelEvent | Break]:
    return [ToolCall("c0", "tool_search", {"function_names": list(names)}), FINISHED]


async def test_a_wrong_name_is_told_and_keeps_no_other_from_being_loaded():
    model = ScriptedModel(searched("convert", "covnert"), searched("covnert"), answer("ok"))
    scene = await play(model, tools=[LATER], own_tools=[SEARCH])
    first, second = [step for step in scene.steps if step["type"] == "tool_search_result"]
    assert [f["name"] for f in first["result"]] == ["convert"]
    assert not first.get("is_error")
    assert [tool["name"] for tool in model.calls[1].tools] == ["convert", "tool_search"]
    assert (second["result"], second["is_error"]) == ([], True)
    # What the model reads has the reason in it.
    shown = [step for step in model.shown() if step["type"] == "tool_search_result"]
    assert shown[0]["result"].startswith("There is no function 'covnert'")
    assert '"name":"convert"' in shown[0]["result"]
    assert shown[1]["result"] == "There is no function 'covnert'; load only what is listed."


async def test_arguments_that_are_no_names_are_told():
    model = ScriptedModel(
        [ToolCall("c0", "tool_search", {"function_names": []}), FINISHED], answer("ok")
    )
    await play(model, tools=[LATER], own_tools=[SEARCH])
    assert "Not executed: at $.function_names" in model.shown()[-1]["result"]


LOADED = {"type": "tool_search_result", "call_id": "s1", "result": [LATER]}


async def test_what_an_earlier_turn_has_loaded_stays_declared():
    model = ScriptedModel(answer("ok"))
    await play(model, tools=[LATER], own_tools=[SEARCH], earlier=[orjson.dumps(LOADED)])
    assert [tool["name"] for tool in model.calls[0].tools] == ["convert", "tool_search"]


async def test_what_this_request_does_not_offer_is_not_declared():
    model = ScriptedModel(answer("ok"))
    other = {**LATER, "name": "other"}
    search = {**SEARCH, "functions": [other]}
    await play(model, tools=[other], own_tools=[search], earlier=[orjson.dumps(LOADED)])
    assert [tool["name"] for tool in model.calls[0].tools] == ["tool_search"]


async def test_functions_that_the_client_gives_are_declared():
    given = {"type": "function", "name": "extra", "parameters": {"type": "object"}}
    model = ScriptedModel(answer("ok"))
    inputs = [
        said("hi", kind="user_input"),
        {"type": "function_call", "id": "c9", "name": "find_tools", "arguments": {}},
        {"type": "function_result", "call_id": "c9", "name": "find_tools", "result": [given]},
    ]
    searches = {"type": "function", "name": "find_tools", "loads": True}
    await play(model, inputs=inputs, tools=[searches])
    assert [tool["name"] for tool in model.calls[0].tools] == ["find_tools", "extra"]
