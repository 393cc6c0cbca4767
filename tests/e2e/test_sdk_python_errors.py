"""The official Python client: what is raised, and how failures of the upstream end."""

import base64
import time
from typing import Any

import pytest
from google.genai import Client
from google.genai._gaos.lib import compat_errors as raised

from openinteractions.models.port import Finished, TextDelta
from tests.e2e.reading import FAST, PNG, generated, kinds, plain, read
from tests.e2e.server import USAGE, Fakes, Server, answer, sdk, turn
from tests.fakes.upstream import Reply

NOWHERE = "v1_" + "0" * 32


def fault(error: raised.APIStatusError) -> dict[str, str]:
    """The contract's error object, checked for its form."""
    assert isinstance(error.body, dict)
    found = error.body["error"]
    assert set(found) == {"code", "message", "status"}
    assert all(isinstance(value, str) and value for value in found.values())
    assert type(error.__cause__).__name__.endswith("ClientError")
    return found


# ---- requests


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"extra_body": {"flavour": "x"}}, "flavour"),
    "camel case": ({"extra_body": {"systemInstruction": "x"}}, "system_instruction"),
    "nested unknown": (
        {"input": "Hi", "extra_body": {"generation_config": {"temprature": 1}}},
        "temperature",
    ),
    "bad enum": ({"extra_body": {"service_tier": "gold"}}, "service_tier"),
    "bad range": ({"extra_body": {"generation_config": {"temperature": 9}}}, "temperature"),
    "no input": ({"extra_body": {"input": None}}, "input"),
    "unstored background": ({"background": True, "store": False}, "background"),
    "agent": ({"model": None, "agent": "deep-research-preview-04-2026"}, "agent"),
    "model and agent": ({"extra_body": {"agent": "x"}}, "agent"),
    "environment": ({"extra_body": {"environment": {"type": "teleport"}}}, "environment"),
    "webhook": ({"webhook_config": {"uris": ["https://a.example"]}}, "webhook_config"),
    "continuation": ({"extra_body": {"continuation_token": "x"}}, "continuation_token"),
    "tool": ({"extra_body": {"tools": [{"type": "teleport"}]}}, "tools[0]"),
    "bad schema": (
        {"extra_body": {"response_format": {"type": "text", "schema": {"type": "objekt"}}}},
        "response_format",
    ),
    "same name twice": (
        {"tools": [{"type": "function", "name": "f"}, {"type": "function", "name": "f"}]},
        "f",
    ),
    "limits": ({"extra_body": {"limits": {"max_total_tokens": -1}}}, "max_total_tokens"),
    "no price": ({"extra_body": {"limits": {"max_cost_usd": 1}}}, "max_cost_usd"),
    "answer without a call": (
        {"input": [{"type": "function_result", "call_id": "a", "name": "f", "result": "x"}]},
        "call_id",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_requests_name_what_is_wrong(client: Client, fakes: Fakes, case: str) -> None:
    fields, word = WRONG[case]
    request = {"model": FAST, "input": "Hi"} | fields
    request = {key: value for key, value in request.items() if value is not None}
    for stream in (False, True):
        with pytest.raises(raised.BadRequestError) as caught:
            client.interactions.create(**request, stream=stream)
        found = fault(caught.value)
        assert caught.value.status_code == 400
        assert found["code"] == "invalid_request"
        assert word in found["message"]
    assert fakes.acme.requests == []


@pytest.mark.parametrize("model", ["nosuch/model", "nosuch", "acme/", "/", "é/é"])
def test_unknown_models(client: Client, fakes: Fakes, model: str) -> None:
    with pytest.raises((raised.NotFoundError, raised.BadRequestError)) as caught:
        client.interactions.create(model=model, input="Hi")
    fault(caught.value)


@pytest.mark.parametrize("odd", [NOWHERE, "x", "v1_x", "interactions/" + NOWHERE, "é", "a" * 3000])
def test_unknown_interactions(client: Client, fakes: Fakes, odd: str) -> None:
    for call in (
        client.interactions.get,
        client.interactions.cancel,
        client.interactions.delete,
        lambda id_: client.interactions.get(id_, stream=True),
        lambda id_: client.interactions.create(model=FAST, input="Hi", previous_interaction_id=id_),
    ):
        with pytest.raises(raised.NotFoundError) as caught:
            call(odd)
        assert fault(caught.value)["code"] == "not_found"
        assert caught.value.status_code == 404


def test_wrong_key(server: Server, fakes: Fakes) -> None:
    with sdk(server, key="oi_wrong") as client:
        for call in (
            lambda: client.interactions.create(model=FAST, input="Hi"),
            lambda: client.interactions.create(model=FAST, input="Hi", stream=True),
            lambda: client.interactions.get(NOWHERE),
            lambda: client.interactions.cancel(NOWHERE),
            lambda: client.interactions.delete(NOWHERE),
        ):
            with pytest.raises(raised.AuthenticationError) as caught:
                call()
            assert caught.value.status_code == 401
            assert fault(caught.value)["code"] == "unauthenticated"
    assert fakes.acme.requests == []


async def test_async_errors(server: Server, fakes: Fakes) -> None:
    async with sdk(server).aio as client:
        with pytest.raises(raised.NotFoundError):
            await client.interactions.get(NOWHERE)
        with pytest.raises(raised.BadRequestError):
            await client.interactions.create(model=FAST, input="")


def test_the_default_client_is_not_made_to_wait(server: Server, fakes: Fakes) -> None:
    # It retries 409, 429 and 5xx, up to seven seconds: no plain mistake may be one of those.
    began = time.monotonic()
    with sdk(server, attempts=5) as client:
        for call in (
            lambda: client.interactions.get(NOWHERE),
            lambda: client.interactions.create(model=FAST, input=""),
            lambda: client.interactions.create(model="nosuch/x", input="Hi"),
        ):
            with pytest.raises(raised.APIStatusError):
                call()
    assert time.monotonic() - began < 6


# ---- upstreams


@pytest.mark.parametrize("vendor", ["acme", "goog", "anth"])
@pytest.mark.parametrize(
    "trouble",
    [
        Reply(status=500),
        Reply(status=503),
        Reply(status=429, headers={"Retry-After": "30"}),
        answer("x", cut_after=0),
        answer("x", error_after=0),
    ],
    ids=["500", "503", "429", "cut", "error event"],
)
def test_passing_trouble_is_not_seen(
    client: Client, fakes: Fakes, vendor: str, trouble: Reply
) -> None:
    fakes.all[vendor].replies += [trouble, answer("fine")]
    began = time.monotonic()
    made = client.interactions.create(model=f"{vendor}/m", input="Hi")
    assert (made.status, made.output_text) == ("completed", "fine")
    assert [step.type for step in made.steps] == ["model_output"]
    assert len(fakes.all[vendor].requests) == 2
    assert time.monotonic() - began < 25  # max_retry_wait bounds what the upstream asks


def test_a_stalled_upstream_is_left(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [answer("x", stall_after=0), answer("fine")]
    made = client.interactions.create(model=FAST, input="Hi")
    assert (made.status, made.output_text) == ("completed", "fine")


@pytest.mark.parametrize("status", [500, 429, 401, 404])
def test_fallback_takes_over(client: Client, fakes: Fakes, status: int) -> None:
    fakes.acme.default = Reply(status=status)
    fakes.anth.replies.append(answer("from the second"))
    made = client.interactions.create(model="with-fallback", input="Hi")
    assert (made.status, made.output_text) == ("completed", "from the second")
    assert made.model == "with-fallback"
    assert len(fakes.acme.requests) == (2 if status in {500, 429} else 1)
    assert len(fakes.anth.requests) == 1
    assert fakes.anth.requests[0].json["model"] == "second"


def test_fallback_takes_over_in_the_middle_of_a_stream(client: Client, fakes: Fakes) -> None:
    fakes.acme.default = answer("Half ", "an ", "answer", cut_after=3)
    fakes.anth.replies.append(answer("Whole"))
    events = list(client.interactions.create(model="with-fallback", input="Hi", stream=True))
    steps = read(events)
    assert steps[-1]["content"][0]["text"] == "Whole"
    seen = generated(client.interactions.get(events[0].interaction.id))
    assert [step.get("error") is None for step in seen if step["type"] == "model_output"] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 500, 503])
def test_lasting_trouble_ends_as_failed(client: Client, fakes: Fakes, status: int) -> None:
    fakes.acme.default = Reply(status=status, message="the upstream's own words")
    made = client.interactions.create(model=FAST, input="Hi")
    assert made.status == "failed"
    assert "the upstream's own words" in made.errors[0].message
    assert plain(made)["error"] == plain(made)["errors"][0]
    seen = client.interactions.get(made.id)
    assert plain(seen)["error"] == plain(made)["error"]
    assert len(fakes.acme.requests) == (2 if status in {429, 500, 503} else 1)
    # It can be continued all the same.
    fakes.acme.default = answer("back")
    on = client.interactions.create(model=FAST, input="Again", previous_interaction_id=made.id)
    assert on.output_text == "back"


def test_no_upstream_secret_reaches_the_caller(client: Client, fakes: Fakes) -> None:
    fakes.acme.default = Reply(status=401, message="Incorrect API key: sk-acme-upstream-secret")
    made = client.interactions.create(model=FAST, input="Hi")
    assert made.status == "failed"
    assert "sk-acme-upstream-secret" not in made.model_dump_json()
    events = list(client.interactions.create(model=FAST, input="Hi", stream=True))
    assert kinds(events)[-1] == "error"
    assert "sk-acme-upstream-secret" not in str(events)


def test_a_filtered_answer_says_so(client: Client, fakes: Fakes) -> None:
    fakes.goog.replies.append(turn(TextDelta("Well"), Finished("content_filter", USAGE)))
    made = client.interactions.create(model="goog/m", input="Hi")
    assert made.status == "incomplete"
    assert made.errors[0].code == "content_filter"


def test_media_that_a_model_cannot_take_is_refused_or_noted(client: Client, fakes: Fakes) -> None:
    video = {"type": "video", "mime_type": "video/mp4", "data": base64.b64encode(PNG).decode()}
    with pytest.raises(raised.BadRequestError) as caught:
        client.interactions.create(model="anth/m", input=[video])
    assert "video" in fault(caught.value)["message"]


def test_private_addresses_are_not_fetched(client: Client, server: Server, fakes: Fakes) -> None:
    image = {"type": "image", "mime_type": "image/png", "uri": server.url + "/healthz"}
    with pytest.raises(raised.BadRequestError):
        client.interactions.create(model="goog/m", input=[image])
    assert fakes.goog.requests == []
