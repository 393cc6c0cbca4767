"""The loop: patience with upstreams, one answer in the end, and nothing shown twice."""

import asyncio
import time
from collections.abc import AsyncIterator

import orjson
import pytest
from tests.loop.stage import USAGE, Coins, ScriptedModel, answer, down, play, said
from tests.loop.stage import Break as Breaks

from openinteractions.errors import ContextOverflow, ModelRejected
from openinteractions.loop.context import NOTE
from openinteractions.loop.spec import Limits, RunState
from openinteractions.loop.turn import fold
from openinteractions.models.catalog import Price
from openinteractions.models.port import (
    Finished,
    ModelEvent,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
)
from openinteractions.wire.usage import EMPTY_USAGE

LOOK = {
    "type": "function",
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {"q": {"type": "string"}},
        "required": ["q"],
        "additionalProperties": False,
    },
}
PRICE = Price(input=10.0, cached_input=1.0, output=100.0)


def shown(scene) -> list[dict]:
    """What a reader of the stream has in the end."""
    folded = fold(scene.journal.events)
    assert all(finished for _, finished in folded)
    return [step for step, _ in folded]


def plain(steps: list[dict]) -> list[dict]:
    return [{k: v for k, v in step.items() if k != "error"} for step in steps]


async def test_an_answer_is_an_answer():
    scene = await play(ScriptedModel(answer("He", "llo")))
    assert scene.outcome.status == "completed"
    assert scene.steps == [said("Hello")]
    assert scene.run.uncommitted == scene.steps
    assert shown(scene) == scene.steps
    assert scene.run.state.usage["total_tokens"] == 120


# ---- patience


async def test_a_model_that_is_down_is_asked_again():
    model = ScriptedModel([down()], [down()], answer("Hello"))
    scene = await play(model)
    assert (scene.outcome.status, scene.texts()) == ("completed", ["Hello"])
    assert len(model.calls) == 3
    assert scene.journal.commits == []


async def test_patience_ends():
    model = ScriptedModel([down()], [down()], [down()])
    scene = await play(model)
    assert scene.outcome.status == "failed"
    assert scene.outcome.errors == [{"code": "model_error", "message": "p0/m: It is down."}]


async def test_retry_after_is_kept_to_but_not_beyond_the_longest_wait():
    began = time.monotonic()
    await play(ScriptedModel([down(3600.0)], answer("x")))
    assert 0.01 < time.monotonic() - began < 60


async def test_a_model_that_stays_down_gives_way_to_the_next_in_the_chain():
    first, second = ScriptedModel([down()], [down()]), ScriptedModel(answer("Here"))
    scene = await play(first, second, attempts=2)
    assert (scene.outcome.status, scene.texts()) == ("completed", ["Here"])
    assert scene.run.state.fallback == 1


async def test_a_provider_that_is_not_configured_any_more_gives_way_too():
    model = ScriptedModel(answer("Here"))
    scene = await play(model, chain=["gone/m", "p0/m"])
    assert scene.texts() == ["Here"]


@pytest.mark.parametrize(("status", "helps"), [(401, True), (403, True), (404, True), (400, False)])
async def test_a_refusal_is_final_unless_another_model_may_help(status: int, helps: bool):
    refusal = Breaks(ModelRejected("No.", upstream_status=status))
    first, second = ScriptedModel([refusal]), ScriptedModel(answer("Here"))
    scene = await play(first, second)
    assert len(first.calls) == 1
    assert len(second.calls) == helps
    assert scene.outcome.status == ("completed" if helps else "failed")


async def test_a_conversation_that_is_too_long_is_final():
    first = ScriptedModel([Breaks(ContextOverflow("Too long.", upstream_status=400))])
    scene = await play(first, ScriptedModel(answer("Here")))
    assert scene.outcome.status == "failed"
    assert "Too long." in scene.outcome.errors[0]["message"]


async def test_a_stream_that_ends_without_its_end_broke_off():
    scene = await play(ScriptedModel([TextDelta("Half")], answer("Whole")))
    assert scene.texts()[-1] == "Whole"


# ---- invariant 3


async def test_a_turn_that_broke_after_deltas_is_closed_and_starts_anew():
    model = ScriptedModel(
        [ThoughtDelta("hm"), TextDelta("Half"), TextDelta(" an"), down()],
        [TextDelta("Again"), down()],
        answer("Whole"),
    )
    scene = await play(model)
    kinds = [(s["type"], "error" in s, NOTE in s) for s in scene.steps]
    assert kinds == [
        ("thought", False, False),
        ("model_output", True, False),
        ("thought", False, True),
        ("model_output", True, False),
        ("thought", False, True),
        ("model_output", False, False),
    ]
    assert scene.texts()[1] == "Half an"
    assert plain(shown(scene)) == plain(scene.steps)
    assert model.shown(1) == model.shown(2) == [said("hi", kind="user_input")]
    # What was shown is durable before the model is asked again.
    assert [len(steps) for steps, _ in scene.journal.commits] == [3, 2]
    assert scene.run.uncommitted == scene.steps[5:]


async def test_what_nobody_saw_is_not_kept():
    scene = await play(ScriptedModel([TextDelta("Half"), down()], answer("Whole")), watched=False)
    assert scene.texts() == ["Whole"]
    assert scene.journal.commits == []


async def test_a_call_in_a_broken_turn_was_never_shown():
    model = ScriptedModel(
        [TextDelta("Let me"), ToolCall("c1", "look", {"q": "x"}), down()], answer("Whole")
    )
    scene = await play(model, tools=[LOOK])
    assert all(step["type"] != "function_call" for step in [*scene.steps, *shown(scene)])


async def test_an_interrupted_turn_keeps_what_it_has_shown():
    model = ScriptedModel([TextDelta("Half"), Breaks(KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        await play(model)


# ---- what ends a run


async def test_calls_wait_for_the_caller():
    calls = [ToolCall(None, "look", {"q": "a"}), ToolCall("c2", "look", {"q": "b"}, signature="s")]
    model = ScriptedModel([TextDelta("Let me."), *calls, Finished("tool_calls", USAGE)])
    scene = await play(model, tools=[LOOK])
    assert scene.outcome.status == "requires_action"
    text, first, second = scene.steps
    assert first == {
        "type": "function_call", "id": first["id"], "name": "look", "arguments": {"q": "a"},
    }  # fmt: skip
    assert len(first["id"]) == 8
    assert second["id"] == "c2"
    assert second["signature"] != "s"
    assert shown(scene) == [text, first, second]


async def test_an_answer_that_was_cut_is_incomplete():
    scene = await play(ScriptedModel(answer("Half", reason="max_tokens")))
    assert (scene.outcome.status, scene.texts()) == ("incomplete", ["Half"])
    assert scene.outcome.errors == []


@pytest.mark.parametrize(("texts", "status"), [((), "failed"), (("Half",), "incomplete")])
async def test_filtered_content_is_said_to_be_so(texts: tuple[str, ...], status: str):
    scene = await play(ScriptedModel(answer(*texts, reason="content_filter")))
    assert scene.outcome.status == status
    assert scene.outcome.errors[0]["code"] == "content_filter"


# ---- repair


async def test_wrong_arguments_go_back_to_the_model():
    bad = ToolCall("c1", "look", {"p": 1})
    good = ToolCall("c2", "look", {"q": "x"})
    model = ScriptedModel(
        [bad, good, Finished("tool_calls", USAGE)], [good, Finished("tool_calls", USAGE)]
    )
    scene = await play(model, tools=[LOOK])
    assert scene.outcome.status == "requires_action"
    assert [(s["name"], s["arguments"]) for s in scene.steps] == [("look", {"q": "x"})]
    results = [s for s in model.shown() if s["type"] == "function_result"]
    assert [(r["call_id"], r["is_error"]) for r in results] == [("c1", True), ("c2", True)]
    assert "required" in results[0]["result"] or "Additional" in results[0]["result"]
    assert scene.run.state.repairs == 1
    assert scene.run.state.usage["total_tokens"] == 240


async def test_arguments_that_stay_wrong_reach_the_caller_with_a_warning():
    turn = [ToolCall("c1", "look", {}), Finished("tool_calls", USAGE)]
    model = ScriptedModel(turn, turn, turn)
    scene = await play(model, tools=[LOOK])
    assert len(model.calls) == 3
    assert scene.outcome.status == "requires_action"
    assert [warning.code for warning in scene.outcome.warnings] == ["arguments_mismatch"]


@pytest.mark.parametrize(
    "call",
    [ToolCall("c1", "nope", {}), ToolCall("c1", "look", {}, malformed='{"q": ')],
)
async def test_calls_that_nobody_can_run_end_the_run_in_the_end(call: ToolCall):
    turn = [call, Finished("tool_calls", USAGE)]
    model = ScriptedModel(turn, turn, turn)
    scene = await play(model, tools=[LOOK])
    assert len(model.calls) == 3
    assert scene.outcome.status == "failed"
    assert scene.outcome.errors[0]["code"] == "invalid_tool_call"
    assert scene.steps == []


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


async def test_an_answer_that_breaks_its_schema_is_asked_for_again():
    model = ScriptedModel(answer('{"n": "one"}'), answer('{"n": 1}'))
    scene = await play(model, json_schema=SCHEMA)
    assert scene.outcome.status == "completed"
    assert scene.texts()[-1] == '{"n": 1}'
    assert [("error" in s, NOTE in s) for s in scene.steps] == [
        (True, False), (False, True), (False, False),
    ]  # fmt: skip
    # The model sees its wrong answer and why it was wrong, once.
    _, wrong, ask = model.shown()
    assert wrong == said('{"n": "one"}')
    assert "$.n" in ask["content"][0]["text"]
    assert plain(shown(scene)) == plain(scene.steps)


async def test_schema_repairs_are_bounded():
    model = ScriptedModel(*[answer("no JSON")] * 3)
    scene = await play(model, json_schema=SCHEMA)
    assert len(model.calls) == 3
    assert scene.outcome.status == "failed"
    assert scene.outcome.errors[0]["code"] == "schema_mismatch"


async def test_repairs_are_counted_over_a_takeover():
    state = RunState.load(RunState(repairs=2).dump())
    scene = await play(ScriptedModel(answer("no JSON")), json_schema=SCHEMA, state=state)
    assert scene.outcome.errors[0]["code"] == "schema_mismatch"


async def test_a_repair_that_breaks_off_is_asked_for_again_with_its_reason():
    model = ScriptedModel(answer("bad"), [TextDelta("{"), down()], answer('{"n": 2}'))
    scene = await play(model, json_schema=SCHEMA)
    assert scene.texts()[-1] == '{"n": 2}'
    assert [s["type"] for s in model.shown()] == ["user_input", "model_output", "user_input"]


# ---- limits


async def test_a_token_limit_clamps_the_answer():
    model = ScriptedModel(answer("x"))
    limits = Limits(max_total_tokens=1000)
    await play(model, limits=limits, earlier=[b"x" * 400], generation={"max_output_tokens": 5000})
    room = model.calls[0].generation["max_output_tokens"]
    assert 800 < room < 900


async def test_a_smaller_wish_is_left_alone():
    model = ScriptedModel(answer("x"))
    limits = Limits(max_total_tokens=1000)
    await play(model, limits=limits, generation={"max_output_tokens": 7})
    assert model.calls[0].generation["max_output_tokens"] == 7


async def test_a_limit_without_room_is_checked_before_the_call():
    model = ScriptedModel()
    scene = await play(model, limits=Limits(max_total_tokens=50), earlier=[b"x" * 400])
    assert scene.outcome.status == "budget_exceeded"
    assert model.calls == []
    message = scene.outcome.errors[0]["message"]
    assert message.startswith("The limit max_total_tokens = 50 (0 used) leaves no room for another")
    needed = int(message.removesuffix(" tokens.").rpartition(" ")[2])
    assert 100 < needed < 150


async def test_an_answer_that_fills_the_room_ends_the_budget():
    model = ScriptedModel(answer("x", reason="max_tokens"))
    scene = await play(model, limits=Limits(max_total_tokens=500))
    assert (scene.outcome.status, scene.texts()) == ("budget_exceeded", ["x"])


async def test_every_call_of_a_run_counts():
    """Two repairs cost 120 tokens each: the third call does not fit any more."""
    model = ScriptedModel(*[answer("bad")] * 3)
    scene = await play(model, json_schema=SCHEMA, limits=Limits(max_total_tokens=230))
    assert scene.outcome.status == "budget_exceeded"
    assert len(model.calls) == 2


async def test_a_cost_limit_clamps_and_ends():
    model = ScriptedModel(answer("x"))
    limits = Limits(max_cost_nanousd=10_000)
    await play(model, limits=limits, price=PRICE, earlier=[b"x" * 400])
    assert 80 < model.calls[0].generation["max_output_tokens"] < 90
    broke = ScriptedModel()
    limits = Limits(max_cost_nanousd=1000)
    scene = await play(broke, limits=limits, price=PRICE, earlier=[b"x" * 400])
    assert (scene.outcome.status, broke.calls) == ("budget_exceeded", [])
    assert ": its input alone costs about $0.00000" in scene.outcome.errors[0]["message"]


async def test_a_cost_limit_without_a_price_is_refused():
    scene = await play(ScriptedModel(), limits=Limits(max_cost_nanousd=10**9))
    assert scene.outcome.status == "budget_exceeded"


async def test_cost_is_counted_in_billionths():
    model = ScriptedModel(answer("x", total_cached_tokens=40))
    scene = await play(model, price=PRICE)
    assert scene.run.state.cost_nanousd == 60 * 10 + 40 * 1 + 20 * 100


async def test_the_purse_is_asked_before_and_settled_after_every_call():
    purse = Coins(2_000_000)
    await play(ScriptedModel([down()], answer("x")), purse=purse)
    assert [what for what, *_ in purse.log] == ["reserve", "settle"] * 2
    assert [tokens for what, tokens, _ in purse.log if what == "settle"] == [0, 120]
    assert purse.tokens == 2_000_000 - 120


async def test_what_a_call_took_that_broke_off_is_estimated_and_shown():
    purse = Coins(2_000_000)
    model = ScriptedModel([TextDelta("Half" * 40), down()], answer("Whole"))
    scene = await play(
        model, purse=purse, price=PRICE, agent="a", earlier=[b"x" * 4000], chain=["p0/m"]
    )
    usage = scene.run.state.usage
    given = usage["total_input_tokens"] - 100
    assert 1000 < given < 1100
    assert usage["total_output_tokens"] == 20 + 41
    assert usage["total_tokens"] == 120 + given + 41
    assert scene.run.state.cost_nanousd == 10 * (given + 100) + 100 * (41 + 20)
    settled = [tokens for what, tokens, _ in purse.log if what == "settle"]
    assert settled == [given + 41, 120]
    # The steps say the same: what broke off with its last one, and the sum in the end.
    own = [step.get("step_usage", {}).get("total_tokens") for step in scene.steps]
    assert own == [given + 41, None, 120]
    assert scene.steps[-1]["usage"]["total_tokens"] == usage["total_tokens"]
    assert shown(scene) == [{k: v for k, v in s.items() if k != "error"} for s in scene.steps]


async def test_what_a_thought_took_that_broke_off_is_said_by_the_note_behind_it():
    model = ScriptedModel([ThoughtSignature("s"), down()], answer("Whole"))
    scene = await play(model, agent="a")
    own = [step.get("step_usage", {}).get("total_output_tokens") for step in scene.steps]
    assert own == [None, 1, 20]


async def test_a_call_that_the_limit_of_time_stops_is_counted_too():
    class Slow(ScriptedModel):
        async def _play(self, script: object) -> AsyncIterator[ModelEvent]:
            yield TextDelta("Half")
            await asyncio.Event().wait()

    scene = await play(Slow([]), agent="a", price=PRICE, limits=Limits(max_seconds=0.01))
    assert (scene.outcome.status, scene.texts()) == ("budget_exceeded", ["Half"])
    usage = scene.run.state.usage
    assert usage["total_output_tokens"] == 2
    assert scene.steps[-1]["usage"] == usage
    assert scene.run.state.cost_nanousd == 10 * usage["total_input_tokens"] + 100 * 2


async def test_an_answer_whose_upstream_does_not_count_is_estimated():
    scene = await play(ScriptedModel([TextDelta("Four"), Finished("stop", {})]), agent="a")
    usage = scene.run.state.usage
    assert usage["total_output_tokens"] == 2
    assert scene.steps[-1]["usage"] == usage
    assert usage["total_tokens"] == usage["total_input_tokens"] + 2


async def test_an_upstream_that_never_began_took_nothing():
    scene = await play(ScriptedModel([down()], answer("x")), agent="a")
    assert scene.run.state.usage == {**EMPTY_USAGE, **USAGE}


async def test_an_empty_purse_ends_the_run():
    model = ScriptedModel()
    scene = await play(model, purse=Coins(3))
    assert (scene.outcome.status, model.calls) == ("budget_exceeded", [])


async def test_a_step_limit_is_kept():
    model = ScriptedModel(*[answer("bad")] * 3)
    scene = await play(model, json_schema=SCHEMA, limits=Limits(max_steps=2))
    assert scene.outcome.status in {"budget_exceeded", "incomplete"}


async def test_a_run_goes_on_from_its_committed_steps():
    model = ScriptedModel(answer("more"))
    scene = await play(model, generated=[said("First.")], state=RunState(seconds=5.0))
    assert model.shown() == [said("hi", kind="user_input"), said("First.")]
    assert scene.texts() == ["First.", "more"]
    assert scene.run.uncommitted == [said("more")]
    assert scene.run.state.seconds >= 5.0
    assert orjson.loads(scene.run.state.dump())["seconds"] >= 5.0
