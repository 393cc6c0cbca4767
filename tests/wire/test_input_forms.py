import pytest

from openinteractions.errors import Invalid
from openinteractions.wire.create import parse_create
from openinteractions.wire.normalise import restore_input

HI = {"type": "text", "text": "Hi"}
YO = {"type": "text", "text": "Yo"}
CALL = {"type": "function_call", "id": "c1", "name": "f", "arguments": {}}
RESULT = {"type": "function_result", "call_id": "c1", "result": "r"}


def user(*blocks):
    return {"type": "user_input", "content": list(blocks)}


def model(*blocks):
    return {"type": "model_output", "content": list(blocks)}


def parse(value, **more):
    return parse_create({"model": "m", "input": value, **more}, max_depth=64)


@pytest.mark.parametrize(
    ("value", "steps", "form"),
    [
        ("Hi", [user(HI)], "text"),
        (HI, [user(HI)], "content"),
        ({"text": "Hi"}, [user(HI)], "content"),
        ([HI, YO], [user(HI, YO)], "contents"),
        ([{"text": "Hi"}], [user(HI)], "contents"),
        ([user(HI)], [user(HI)], "steps"),
        (user(HI), [user(HI)], "steps"),
        ({"type": "user_input", "content": "Hi"}, [user(HI)], "steps"),
        (
            [
                {"type": "user_input", "content": "Hi"},
                {"type": "model_output", "content": "Yo"},
                user(HI),
            ],
            [user(HI), model(YO), user(HI)],
            "steps",
        ),
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "model", "content": [YO]},
                {"role": "USER", "content": "Hi"},
            ],
            [user(HI), model(YO), user(HI)],
            "steps",
        ),
        ({"role": "user", "content": "Hi"}, [user(HI)], "steps"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
            [user(HI), model(YO)],
            "steps",
        ),
        ([HI, model(YO), YO, HI], [user(HI), model(YO), user(YO, HI)], "steps"),
        ([user(HI), CALL, user(RESULT, YO)], [user(HI), CALL, RESULT, user(YO)], "steps"),
        ([user(HI), CALL, user(RESULT)], [user(HI), CALL, RESULT], "steps"),
        ([user(HI), CALL, user(YO, RESULT)], [user(HI), CALL, RESULT, user(YO)], "steps"),
        ([user(HI), user()], [user(HI)], "steps"),
        (
            [user(HI), {"type": "model_output"}, user(YO)],
            [user(HI), {"type": "model_output"}, user(YO)],
            "steps",
        ),
        (
            [{"type": "thought", "signature": "s", "new_key": 1}, user(HI)],
            [{"type": "thought", "signature": "s", "new_key": 1}, user(HI)],
            "steps",
        ),
    ],
)
def test_every_form_becomes_steps(value, steps, form):
    parsed = parse(value)
    assert (parsed.steps, parsed.input_form) == (steps, form)


@pytest.mark.parametrize("value", ["Hi", HI, [HI, YO], [user(HI), model(YO), user(HI)]])
def test_the_contracts_forms_can_be_given_back(value):
    parsed = parse(value)
    assert restore_input(parsed.input_form, parsed.steps) == value


def test_a_continuation_needs_no_input():
    body = {"model": "m", "continuation_token": "t"}
    parsed = parse_create(body, max_depth=64)
    assert (parsed.steps, parsed.input_form) == ([], "absent")
    assert restore_input("absent", []) is None


def test_results_may_answer_the_previous_interaction():
    parsed = parse([RESULT, {**RESULT, "call_id": "c2"}], previous_interaction_id="v1_x")
    assert parsed.answers == ["c1", "c2"]
    assert parse([user(HI), CALL, RESULT], previous_interaction_id="v1_x").answers == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([RESULT], "The function_result for call_id 'c1' answers no call."),
        ([user(HI), CALL], "The input ends with an unanswered function_call 'c1'."),
        (
            [user(HI), CALL, user(YO)],
            "The function_call 'c1' has no function_result before the next user_input.",
        ),
        ([user(HI), CALL, CALL, RESULT], "Duplicate function_call id 'c1' in the input."),
        ([user(HI), CALL, RESULT, RESULT], "The function_result for call_id 'c1' answers no call."),
    ],
)
def test_calls_and_results_go_together(value, message):
    with pytest.raises(Invalid) as caught:
        parse(value)
    assert caught.value.message == message


def test_one_call_is_not_answered_twice_across_interactions():
    with pytest.raises(Invalid, match="answered twice"):
        parse([RESULT, RESULT], previous_interaction_id="v1_x")


@pytest.mark.parametrize(
    "result", ["x", {"content": [1]}, [HI], [{"type": "function", "name": "f"}], []]
)
def test_results_have_three_forms(result):
    assert parse([user(HI), CALL, {**RESULT, "result": result}]).steps[2]["result"] == result


@pytest.mark.parametrize("result", [1, True, [1], [{"a": 1}]])
def test_other_results_are_refused(result):
    with pytest.raises(Invalid, match=r"input\[2\]\.result"):
        parse([user(HI), CALL, {**RESULT, "result": result}])


def test_steps_of_ours_can_be_sent_back_as_they_were_shown():
    """Every generated step of an agent says what was taken with it, results of its tools too."""
    usage = {"total_tokens": 5}
    steps = [
        user(HI),
        {"type": "thought", "summary": [YO], "note": {"kind": "compacted"}, "usage": usage},
        {"type": "function_call", "id": "a", "name": "f", "arguments": {}, "step_usage": usage},
        {"type": "function_result", "call_id": "a", "name": "f", "result": "r", "usage": usage},
        {**model(YO), "usage": usage, "step_usage": usage},
    ]
    assert parse([*steps, user(HI)]).steps == [*steps, user(HI)]
