"""The official Python client against a running server: everything but streams, tools, errors."""

import base64
from typing import Any

import pytest
from google.genai import Client
from google.genai._gaos.lib.compat_errors import NotFoundError

from openinteractions.models.port import Finished, Media, TextDelta
from tests.e2e.reading import FAST, PNG, generated, plain
from tests.e2e.server import USAGE, Fakes, Server, answer, sdk, turn


def messages(fakes: Fakes, which: int = -1) -> list[tuple[str, Any]]:
    """Role and content of what the OpenAI-like upstream was sent."""
    sent = fakes.acme.requests[which].json["messages"]
    return [(one["role"], one["content"]) for one in sent]


def texts(fakes: Fakes, which: int = -1) -> list[str]:
    """The same, all text."""
    return [_text(content) for _, content in messages(fakes, which)]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


# ---- create


def test_a_question_is_answered(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer("Hello", " there"))
    made = client.interactions.create(model=FAST, input="Hi")
    assert made.output_text == "Hello there"
    assert made.status == "completed"
    assert made.object == "interaction"
    assert made.model == FAST
    assert made.id.startswith("v1_")
    assert made.created.endswith("Z")
    assert made.updated >= made.created
    assert [step.type for step in made.steps] == ["model_output"]
    assert fakes.acme.requests[-1].json["model"] == "fast"
    assert fakes.acme.requests[-1].headers["authorization"] == "Bearer sk-acme-upstream-secret"


FORMS = {
    "string": ("Hi", "Hi"),
    "content": ({"type": "text", "text": "Hi"}, "Hi"),
    "contents": ([{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}], "Hi you"),
    "step": ([{"type": "user_input", "content": [{"type": "text", "text": "Hi"}]}], "Hi"),
    "unicode": ("Grüße 🦕 \u2028 \r\n\t", "Grüße 🦕 \u2028 \r\n\t"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input_reaches_the_model(client: Client, fakes: Fakes, form: str) -> None:
    given, expected = FORMS[form]
    made = client.interactions.create(model=FAST, input=given)
    assert texts(fakes) == [expected]
    seen = client.interactions.get(made.id)
    assert [step.type for step in seen.steps] == ["user_input", "model_output"]
    shown = "".join(block.text for block in seen.steps[0].content)
    assert shown == expected


def test_step_list_is_a_conversation(client: Client, fakes: Fakes) -> None:
    client.interactions.create(
        model=FAST,
        input=[
            {"type": "user_input", "content": [{"type": "text", "text": "one"}]},
            {"type": "model_output", "content": [{"type": "text", "text": "two"}]},
            {"type": "user_input", "content": [{"type": "text", "text": "three"}]},
        ],
    )
    assert [role for role, _ in messages(fakes)] == ["user", "assistant", "user"]
    assert texts(fakes) == ["one", "two", "three"]


def test_image_bytes_reach_the_model_and_come_back(client: Client, fakes: Fakes) -> None:
    image = {"type": "image", "mime_type": "image/png", "data": base64.b64encode(PNG).decode()}
    made = client.interactions.create(
        model=FAST, input=[{"type": "text", "text": "What is this?"}, image]
    )
    sent = messages(fakes)[0][1]
    url = next(part["image_url"]["url"] for part in sent if part["type"] == "image_url")
    assert base64.b64decode(url.partition("base64,")[2]) == PNG
    seen = client.interactions.get(made.id, include_input=True)
    assert plain(seen.steps[0].content[1])["data"] == image["data"]
    follow_up = client.interactions.create(
        model="goog/m", input="And now?", previous_interaction_id=made.id
    )
    assert follow_up.status == "completed"
    assert base64.b64encode(PNG).decode() in str(fakes.goog.requests[-1].json)


def test_get_shows_what_create_showed_after_the_input(client: Client, fakes: Fakes) -> None:
    made = client.interactions.create(model=FAST, input="Hi", labels={"team": "a"})
    seen = client.interactions.get(made.id)
    assert seen.steps[0].type == "user_input"
    assert generated(seen) == plain(made.steps)
    # These two the client itself adds to what `create` returns.
    mine = {"continuation_ids", "initial_input_tokens"}
    shown, returned = plain(seen), plain(made)
    returned["usage"] = {k: v for k, v in returned["usage"].items() if k not in mine}
    returned = {k: v for k, v in returned.items() if k not in mine}
    assert shown | {"steps": None} == returned | {"steps": None}
    assert seen.input is None


def test_include_input_gives_the_input_in_its_form(client: Client, fakes: Fakes) -> None:
    made = client.interactions.create(model=FAST, input="Hi")
    assert client.interactions.get(made.id, include_input=True).input == "Hi"


async def test_async_client(server: Server, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer("Hello"))
    async with sdk(server).aio as client:
        made = await client.interactions.create(model=FAST, input="Hi")
        seen = await client.interactions.get(made.id)
        assert made.output_text == seen.output_text == "Hello"
        assert (await client.interactions.cancel(made.id)).status == "completed"
        await client.interactions.delete(made.id)
        with pytest.raises(NotFoundError):
            await client.interactions.get(made.id)


@pytest.mark.parametrize("version", ["v1", "v1beta", "v1alpha"])
def test_every_api_version(server: Server, fakes: Fakes, version: str) -> None:
    with sdk(server, api_version=version) as client:
        made = client.interactions.create(model="models/" + FAST, input="Hi")
        assert client.interactions.get(made.id).status == "completed"


@pytest.mark.parametrize("model", ["acme/m", "goog/m", "anth/m"])
def test_every_vendor_answers(client: Client, fakes: Fakes, model: str) -> None:
    fakes.all[model[:4]].replies.append(answer("I am ", model))
    made = client.interactions.create(model=model, input="Who are you?")
    assert made.output_text == f"I am {model}"
    assert made.model == model
    assert (made.usage.total_input_tokens, made.usage.total_output_tokens) == (7, 5)
    assert made.usage.total_tokens == 12
    assert made.usage.total_thought_tokens == made.usage.total_cached_tokens == 0


def test_instructions_and_generation_settings_reach_the_model(client: Client, fakes: Fakes) -> None:
    made = client.interactions.create(
        model=FAST,
        input="Hi",
        system_instruction="Be brief.",
        generation_config={
            "temperature": 0.25,
            "top_p": 0.5,
            "max_output_tokens": 77,
            "stop_sequences": ["END"],
            "seed": 3,
        },
        labels={"team": "a", "ünï": "ß"},
        service_tier="flex",
    )
    sent = fakes.acme.requests[-1].json
    assert _text(sent["messages"][0]["content"]) == "Be brief."
    assert sent["messages"][0]["role"] in {"system", "developer"}
    assert (sent["temperature"], sent["top_p"], sent["seed"]) == (0.25, 0.5, 3)
    assert 77 in (sent.get("max_tokens"), sent.get("max_completion_tokens"))
    assert sent["stop"] == ["END"]
    assert made.labels == {"team": "a", "ünï": "ß"}
    assert made.service_tier == "flex"
    assert client.interactions.get(made.id).service_tier == "flex"


def test_raw_response_shows_headers_and_the_same_interaction(client: Client, fakes: Fakes) -> None:
    raw = client.interactions.with_raw_response.create(model=FAST, input="Hi")
    assert raw.status_code == 200
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.headers["x-request-id"]
    assert raw.parse().output_text == "ok"


def test_images_come_out_inline(client: Client, fakes: Fakes) -> None:
    image = {"type": "image", "mime_type": "image/png", "data": base64.b64encode(PNG).decode()}
    fakes.goog.replies.append(turn(TextDelta("Here:"), Media(image), Finished("stop", USAGE)))
    made = client.interactions.create(
        model="goog/painter", input="A dot", response_modalities=["text", "image"]
    )
    assert base64.b64decode(made.output_image.data) == PNG
    seen = client.interactions.get(made.id)
    assert seen.output_image.data == made.output_image.data
    assert generated(seen) == plain(made.steps)


def test_priced_runs_end_within_their_money(client: Client, fakes: Fakes) -> None:
    made = client.interactions.create(
        model="acme/priced", input="Hi", extra_body={"limits": {"max_cost_usd": 0.5}}
    )
    assert made.status == "budget_exceeded"
    assert fakes.acme.requests == []
    within = client.interactions.create(
        model="acme/priced", input="Hi", extra_body={"limits": {"max_cost_usd": 5000}}
    )
    assert within.status == "completed"


def test_token_limit_stops_before_the_call_that_would_break_it(
    client: Client, fakes: Fakes
) -> None:
    made = client.interactions.create(
        model=FAST, input="word " * 500, extra_body={"limits": {"max_total_tokens": 50}}
    )
    assert made.status == "budget_exceeded"
    assert fakes.acme.requests == []
    assert client.interactions.get(made.id).status == "budget_exceeded"


def test_token_limit_clamps_the_answer(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(turn(TextDelta("cut"), Finished("max_tokens", USAGE)))
    made = client.interactions.create(
        model=FAST, input="Hi", extra_body={"limits": {"max_total_tokens": 500}}
    )
    sent = fakes.acme.requests[-1].json
    assert 0 < (sent.get("max_tokens") or sent["max_completion_tokens"]) <= 500
    assert made.status == "budget_exceeded"
    assert made.output_text == "cut"


def test_answer_cut_by_its_own_limit_is_incomplete(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(turn(TextDelta("cut"), Finished("max_tokens", USAGE)))
    made = client.interactions.create(
        model=FAST, input="Hi", generation_config={"max_output_tokens": 5}
    )
    assert (made.status, made.output_text) == ("incomplete", "cut")


# ---- store=False


def test_unstored_leaves_nothing(client: Client, server: Server, fakes: Fakes) -> None:
    def rows() -> list[int]:
        tables = ("interactions", "steps", "events")
        return [server.fetch(f"select count(*) from {name}")[0][0] for name in tables]

    client.interactions.create(model=FAST, input="Hi")
    before = rows()
    assert before[0] > 0
    assert before[1] > 0
    made = client.interactions.create(model=FAST, input="Hi", store=False)
    assert made.output_text == "ok"
    assert not made.id
    list(client.interactions.create(model=FAST, input="Hi", store=False, stream=True))
    assert rows() == before


def test_unstored_can_continue_a_stored_one(client: Client, fakes: Fakes) -> None:
    parent = client.interactions.create(model=FAST, input="first")
    client.interactions.create(
        model=FAST, input="second", store=False, previous_interaction_id=parent.id
    )
    assert texts(fakes) == ["first", "ok", "second"]


# ---- conversations


def test_chain_keeps_the_conversation_but_not_the_settings(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [answer("a1"), answer("a2"), answer("a3")]
    first = client.interactions.create(model=FAST, input="q1", system_instruction="Shout.")
    second = client.interactions.create(model=FAST, input="q2", previous_interaction_id=first.id)
    third = client.interactions.create(
        model="models/" + FAST, input="q3", previous_interaction_id=second.id
    )
    assert texts(fakes, 0) == ["Shout.", "q1"]
    assert texts(fakes, 1) == ["q1", "a1", "q2"]
    assert texts(fakes, 2) == ["q1", "a1", "q2", "a2", "q3"]
    assert third.previous_interaction_id == second.id
    assert client.interactions.get(third.id).previous_interaction_id == second.id


def test_two_children_of_one_parent_do_not_see_each_other(client: Client, fakes: Fakes) -> None:
    parent = client.interactions.create(model=FAST, input="root")
    left = client.interactions.create(model=FAST, input="left", previous_interaction_id=parent.id)
    right = client.interactions.create(model=FAST, input="right", previous_interaction_id=parent.id)
    client.interactions.create(model=FAST, input="on", previous_interaction_id=right.id)
    assert texts(fakes) == ["root", "ok", "right", "ok", "on"]
    client.interactions.create(model=FAST, input="on", previous_interaction_id=left.id)
    assert texts(fakes) == ["root", "ok", "left", "ok", "on"]


def test_branch_from_the_middle(client: Client, fakes: Fakes) -> None:
    parent = client.interactions.create(model=FAST, input="root")
    client.interactions.create(model=FAST, input="anew", previous_interaction_id=f"{parent.id}@0")
    assert texts(fakes) in (["root", "anew"], ["rootanew"])


def test_conversation_changes_vendors(client: Client, fakes: Fakes) -> None:
    first = client.interactions.create(model="anth/m", input="q1")
    second = client.interactions.create(
        model="goog/m", input="q2", previous_interaction_id=first.id
    )
    client.interactions.create(model=FAST, input="q3", previous_interaction_id=second.id)
    assert texts(fakes) == ["q1", "ok", "q2", "ok", "q3"]


# ---- delete and cancel


def test_deleted_is_gone_for_every_call(client: Client, fakes: Fakes) -> None:
    made = client.interactions.create(model=FAST, input="Hi")
    assert client.interactions.delete(made.id) is None
    for call in (
        client.interactions.get,
        client.interactions.cancel,
        client.interactions.delete,
        lambda id_: client.interactions.get(id_, stream=True),
        lambda id_: client.interactions.create(model=FAST, input="on", previous_interaction_id=id_),
    ):
        with pytest.raises(NotFoundError):
            call(made.id)


def test_children_outlive_a_deleted_parent(client: Client, fakes: Fakes) -> None:
    first = client.interactions.create(model=FAST, input="q1")
    second = client.interactions.create(model=FAST, input="q2", previous_interaction_id=first.id)
    client.interactions.delete(first.id)
    client.interactions.create(model=FAST, input="q3", previous_interaction_id=second.id)
    assert texts(fakes) == ["q1", "ok", "q2", "ok", "q3"]


def test_cancelling_what_has_ended_changes_nothing(client: Client, fakes: Fakes) -> None:
    made = client.interactions.create(model=FAST, input="Hi")
    seen = plain(client.interactions.get(made.id))
    assert plain(client.interactions.cancel(made.id)) == seen
    assert plain(client.interactions.cancel(made.id)) == seen
