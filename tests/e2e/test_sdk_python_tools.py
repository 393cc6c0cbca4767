"""The official Python client: function tools and structured output."""

import json
from typing import Any

import pytest
from google.genai import Client
from google.genai._gaos.lib.compat_errors import BadRequestError

from openinteractions.models.port import (
    Finished,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
)
from tests.e2e.reading import FAST, WEATHER, generated, plain, read
from tests.e2e.server import USAGE, Fakes, answer, turn
from tests.fakes.upstream import Reply

ROME = ToolCall("call_a", "get_weather", {"city": "Rome"})
OSLO = ToolCall("call_b", "get_weather", {"city": "Oslo"})
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
FORMAT = {"type": "text", "mime_type": "application/json", "schema": SCHEMA}
VENDORS = {"acme": FAST, "goog": "goog/m", "anth": "anth/m"}


def calls(*wanted: ToolCall) -> Reply:
    return turn(*wanted, Finished("tool_calls", USAGE))


def result(call: Any, text: str) -> dict[str, Any]:
    return {"type": "function_result", "call_id": call.id, "name": call.name, "result": text}


@pytest.mark.parametrize("vendor", VENDORS)
def test_parallel_calls_are_answered_and_the_model_goes_on(
    client: Client, fakes: Fakes, vendor: str
) -> None:
    fakes.all[vendor].replies += [calls(ROME, OSLO), answer("Rome is warmer.")]
    asked = client.interactions.create(model=VENDORS[vendor], input="Where?", tools=[WEATHER])
    assert asked.status == "requires_action"
    assert [step.type for step in asked.steps] == ["function_call", "function_call"]
    assert [step.arguments for step in asked.steps] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert len({step.id for step in asked.steps}) == 2
    # The answers may come in any order.
    given = [result(asked.steps[1], "4C"), result(asked.steps[0], "22C")]
    done = client.interactions.create(
        model=VENDORS[vendor], input=given, tools=[WEATHER], previous_interaction_id=asked.id
    )
    assert (done.status, done.output_text) == ("completed", "Rome is warmer.")
    sent = json.dumps(fakes.all[vendor].requests[-1].json)
    assert "22C" in sent
    assert "4C" in sent
    assert "Where?" in sent


def test_streamed_calls_come_with_whole_arguments(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(
        turn(TextDelta("Looking."), ROME, OSLO, Finished("tool_calls", USAGE))
    )
    events = list(
        client.interactions.create(model=FAST, input="Where?", tools=[WEATHER], stream=True)
    )
    steps = read(events)
    assert [step["type"] for step in steps] == ["model_output", "function_call", "function_call"]
    assert [step["arguments"] for step in steps[1:]] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert events[-1].interaction.status == "requires_action"
    seen = client.interactions.get(events[0].interaction.id)
    assert seen.status == "requires_action"
    assert generated(seen) == steps


def test_every_call_needs_its_answer(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(calls(ROME, OSLO))
    asked = client.interactions.create(model=FAST, input="Where?", tools=[WEATHER])
    first, second = asked.steps
    unknown = {**result(first, "22C"), "call_id": "nosuch00"}
    for given in (
        [result(first, "22C")],
        [result(first, "22C"), unknown],
        [result(first, "22C"), result(second, "4C"), unknown],
        "never mind",
    ):
        with pytest.raises(BadRequestError):
            client.interactions.create(model=FAST, input=given, previous_interaction_id=asked.id)
    assert len(fakes.acme.requests) == 1


@pytest.mark.parametrize("vendor", VENDORS)
def test_stateless_replay_of_the_clients_own_step_objects(
    client: Client, fakes: Fakes, vendor: str
) -> None:
    thought = (ThoughtDelta("Hm."), ThoughtSignature("c2lnbmVk")) if vendor != "acme" else ()
    fakes.all[vendor].replies += [
        turn(*thought, ROME, Finished("tool_calls", USAGE)),
        answer("Warm."),
        answer("Bye."),
    ]
    request: dict[str, Any] = {"model": VENDORS[vendor], "tools": [WEATHER], "store": False}
    history: list[Any] = [{"type": "user_input", "content": [{"type": "text", "text": "Where?"}]}]
    asked = client.interactions.create(
        **request, input=history, generation_config={"thinking_summaries": "auto"}
    )
    assert asked.status == "requires_action"
    history += [*asked.steps, result(asked.steps[-1], "22C")]
    done = client.interactions.create(**request, input=history)
    assert done.output_text == "Warm."
    history += [
        *done.steps,
        {"type": "user_input", "content": [{"type": "text", "text": "Thanks"}]},
    ]
    last = client.interactions.create(**request, input=history)
    assert last.output_text == "Bye."
    sent = json.dumps(fakes.all[vendor].requests[-1].json)
    for word in ("Where?", "Rome", "22C", "Warm.", "Thanks"):
        assert word in sent
    assert ("c2lnbmVk" in sent) == bool(thought)


def test_tool_choice_reaches_the_model(client: Client, fakes: Fakes) -> None:
    def sent(choice: Any) -> Any:
        fakes.acme.replies.append(calls(ROME))
        client.interactions.create(
            model=FAST,
            input="Hi",
            tools=[WEATHER, {**WEATHER, "name": "get_tide"}],
            generation_config={"tool_choice": choice},
        )
        return fakes.acme.requests[-1].json

    assert sent("any")["tool_choice"] == "required"
    assert sent("auto").get("tool_choice") in {None, "auto"}
    assert sent("none")["tool_choice"] == "none"
    allowed = sent({"allowed_tools": {"mode": "any", "tools": ["get_weather"]}})
    # Some upstreams know no list of allowed tools: then only those are shown.
    assert "get_tide" not in json.dumps(allowed)
    tool = allowed["tools"][0]["function"]
    assert (tool["name"], tool["parameters"]["required"]) == ("get_weather", ["city"])


@pytest.mark.parametrize(
    "bad",
    [
        ToolCall("call_x", "get_weather", {}, malformed='{"city": "Ro'),
        ToolCall("call_x", "get_weather", {"town": "Rome"}),
        ToolCall("call_x", "get_waether", {"city": "Rome"}),
    ],
    ids=["no JSON", "wrong arguments", "no such function"],
)
def test_wrong_calls_are_asked_for_again_unseen(
    client: Client, fakes: Fakes, bad: ToolCall
) -> None:
    fakes.acme.replies += [calls(bad), calls(ROME)]
    events = list(
        client.interactions.create(model=FAST, input="Where?", tools=[WEATHER], stream=True)
    )
    steps = read(events)
    assert [step["type"] for step in steps] == ["function_call"]
    assert steps[0]["arguments"] == {"city": "Rome"}
    assert events[-1].interaction.usage.total_tokens == 24
    assert len(fakes.acme.requests) == 2


def test_calls_that_stay_wrong_fail(client: Client, fakes: Fakes) -> None:
    fakes.acme.default = calls(ToolCall("call_x", "nope", {}))
    made = client.interactions.create(model=FAST, input="Where?", tools=[WEATHER])
    assert made.status == "failed"
    assert made.errors[0].code == "invalid_tool_call"
    assert 2 <= len(fakes.acme.requests) <= 4


def test_failed_tool_is_told_to_the_model(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [calls(ROME), answer("Sorry.")]
    asked = client.interactions.create(model=FAST, input="Where?", tools=[WEATHER])
    given = {**result(asked.steps[0], "out of order"), "is_error": True}
    done = client.interactions.create(model=FAST, input=[given], previous_interaction_id=asked.id)
    assert done.output_text == "Sorry."
    assert "out of order" in json.dumps(fakes.acme.requests[-1].json)
    assert plain(client.interactions.get(done.id).steps[0])["is_error"] is True


@pytest.mark.parametrize("form", ["object", "list of parts"])
def test_results_of_every_form(client: Client, fakes: Fakes, form: str) -> None:
    value: Any = {"temp": 22, "unit": "C"}
    if form != "object":
        value = [{"type": "text", "text": "temp 22"}]
    fakes.acme.replies += [calls(ROME), answer("Warm.")]
    asked = client.interactions.create(model=FAST, input="Where?", tools=[WEATHER])
    done = client.interactions.create(
        model=FAST,
        input=[{**result(asked.steps[0], ""), "result": value}],
        previous_interaction_id=asked.id,
    )
    assert done.output_text == "Warm."
    assert "22" in json.dumps(fakes.acme.requests[-1].json["messages"][-1])


# ---- structured output


def test_valid_json_is_handed_on(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer('{"name": "Ada", ', '"age": 36}'))
    made = client.interactions.create(model=FAST, input="Who?", response_format=FORMAT)
    assert json.loads(made.output_text) == {"name": "Ada", "age": 36}
    assert made.status == "completed"
    sent = json.dumps(fakes.acme.requests[-1].json["response_format"])
    assert '"age"' in sent


@pytest.mark.parametrize("stream", [False, True])
def test_invalid_json_is_asked_for_again(client: Client, fakes: Fakes, stream: bool) -> None:
    fakes.acme.replies += [answer('{"name": "Ada"}'), answer('{"name": "Ada", "age": 36}')]
    made = client.interactions.create(
        model=FAST, input="Who?", response_format=FORMAT, stream=stream
    )
    if stream:
        events = list(made)
        assert events[-1].interaction.status == "completed"
        assert events[-1].interaction.usage.total_tokens == 24
        steps = read(events)
        assert steps[-1]["content"][0]["text"] == '{"name": "Ada", "age": 36}'
        seen = generated(client.interactions.get(events[0].interaction.id))
        seen[0].pop("error")
        assert seen == steps
    else:
        assert made.status == "completed"
        assert made.steps[-1].content[0].text == '{"name": "Ada", "age": 36}'
        assert made.usage.total_tokens == 24
    told = fakes.acme.requests[-1].json["messages"]
    assert "age" in json.dumps(told[-1])
    assert [one["role"] for one in told] == ["user", "assistant", "user"]


def test_output_text_after_a_repair_is_the_good_answer_alone(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [answer('{"name": "Ada"}'), answer('{"name": "Ada", "age": 36}')]
    made = client.interactions.create(model=FAST, input="Who?", response_format=FORMAT)
    assert json.loads(made.output_text) == {"name": "Ada", "age": 36}


def test_json_that_stays_invalid_fails(client: Client, fakes: Fakes) -> None:
    fakes.acme.default = answer("I would rather chat.")
    made = client.interactions.create(model=FAST, input="Who?", response_format=FORMAT)
    assert made.status == "failed"
    assert made.errors[0].code == "schema_mismatch"
    assert plain(made)["error"]["code"] == "schema_mismatch"
    assert 2 <= len(fakes.acme.requests) <= 4
    assert client.interactions.get(made.id).status == "failed"
