"""The official Python client's streams: order, resuming, breaking off, leaving, cancelling."""

import base64
import json
import threading
from typing import Any

import pytest
from google.genai import Client
from google.genai._gaos.lib.compat_errors import BadRequestError, NotFoundError

from openinteractions.models.port import (
    Finished,
    Media,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
)
from tests.e2e.reading import FAST, PNG, generated, ids, kinds, output_text, plain, read, until
from tests.e2e.server import USAGE, Fakes, Server, answer, sdk, turn
from tests.fakes.upstream import Reply

WORDS = [f"word{n} " for n in range(12)]
SLOW = [f"{n} " for n in range(200)]


def streamed(client: Client, **request: Any) -> list[Any]:
    """All events of a new stream."""
    return list(
        client.interactions.create(**{"model": FAST, "input": "Hi", **request}, stream=True)
    )


def resumed(client: Client, interaction_id: str, after: str | None = None) -> list[Any]:
    """All events of a GET stream."""
    return list(client.interactions.get(interaction_id, stream=True, last_event_id=after))


def summary(events: list[Any]) -> list[Any]:
    return [plain(event) for event in events]


def last_usage(events: list[Any]) -> Any:
    return plain(events[-1].interaction.usage)


# ---- order


def test_plain_text_has_the_contracts_events(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*WORDS))
    events = streamed(client)
    assert kinds(events) == [
        "interaction.created",
        "interaction.status_update",
        "step.start",
        *["step.delta"] * len(WORDS),
        "step.stop",
        "interaction.completed",
    ]
    steps = read(events)
    assert [step["type"] for step in steps] == ["model_output"]
    assert output_text(steps) == "".join(WORDS)
    end = events[-1].interaction
    assert (end.status, end.model, end.object) == ("completed", FAST, "interaction")
    assert end.service_tier == "standard"
    seen = client.interactions.get(end.id)
    assert generated(seen) == steps
    assert last_usage(events) == plain(seen.usage)
    assert seen.output_text == "".join(WORDS)
    assert end.created == seen.created


async def test_async_stream(server: Server, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*WORDS))
    async with sdk(server).aio as client:
        stream = await client.interactions.create(model=FAST, input="Hi", stream=True)
        events = [event async for event in stream]
        again = await client.interactions.get(
            events[0].interaction.id, stream=True, last_event_id=events[4].event_id
        )
        assert summary([event async for event in again]) == summary(events[5:])
    assert output_text(read(events)) == "".join(WORDS)


def test_unstored_stream_has_no_way_back(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*WORDS))
    events = streamed(client, store=False)
    assert output_text(read(events, stored=False)) == "".join(WORDS)
    assert events[-1].interaction.status == "completed"
    assert not any(event.event_id for event in events)


def test_deltas_arrive_while_the_model_is_still_writing(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*SLOW[:20], gap_s=0.05))
    idle, still_open = fakes.acme.open, 0
    for event in client.interactions.create(model=FAST, input="Hi", stream=True):
        if event.event_type == "step.delta":
            still_open += fakes.acme.open - idle
    assert still_open >= 5


@pytest.mark.parametrize("vendor", ["goog", "anth"])
def test_thoughts_are_summed_up_and_signed(client: Client, fakes: Fakes, vendor: str) -> None:
    usage = {**USAGE, "total_thought_tokens": 4, "total_tokens": 16}
    fakes.all[vendor].replies.append(
        turn(
            ThoughtDelta("I "),
            ThoughtDelta("think"),
            ThoughtSignature("c2lnbmVk"),
            TextDelta("done"),
            Finished("stop", usage),
        )
    )
    settings = {"thinking_summaries": "auto", "thinking_level": "low"}
    events = streamed(client, model=f"{vendor}/thinker", generation_config=settings)
    steps = read(events)
    assert [step["type"] for step in steps] == ["thought", "model_output"]
    assert steps[0]["summary"] == [{"type": "text", "text": "I think"}]
    assert steps[0]["signature"]
    deltas = [event.delta.type for event in events if event.event_type == "step.delta"]
    assert deltas == ["thought_summary", "thought_summary", "thought_signature", "text"]
    interaction_id = events[0].interaction.id
    seen = client.interactions.get(interaction_id)
    assert generated(seen) == steps
    assert seen.usage.total_thought_tokens == 4
    # The vendor gets its own signature back, as it was.
    client.interactions.create(
        model=f"{vendor}/thinker", input="On", previous_interaction_id=interaction_id
    )
    assert "c2lnbmVk" in str(fakes.all[vendor].requests[-1].json)
    assert steps[0]["signature"] not in str(fakes.all[vendor].requests[-1].json)


def test_images_arrive_whole_in_one_delta(client: Client, fakes: Fakes) -> None:
    image = {"type": "image", "mime_type": "image/png", "data": base64.b64encode(PNG).decode()}
    fakes.goog.replies.append(
        turn(TextDelta("Here:"), Media(image), TextDelta("there"), Finished("stop", USAGE))
    )
    events = streamed(client, model="goog/painter", response_modalities=["text", "image"])
    steps = read(events)
    assert [block["type"] for block in steps[0]["content"]] == ["text", "image", "text"]
    assert steps[0]["content"][1]["data"] == image["data"]
    assert generated(client.interactions.get(events[0].interaction.id)) == steps


def test_failure_ends_the_stream(client: Client, fakes: Fakes) -> None:
    fakes.acme.default = Reply(status=400, message="no such luck")
    events = streamed(client)
    assert events[-1].event_type in {"error", "interaction.completed"}
    seen = client.interactions.get(events[0].interaction.id)
    assert seen.status == "failed"
    assert "no such luck" in seen.errors[0].message
    assert kinds(resumed(client, seen.id)) == kinds(events)


# ---- resuming


def test_resuming_after_any_event_gives_the_rest(client: Client, fakes: Fakes) -> None:
    fakes.goog.replies.append(
        turn(
            ThoughtDelta("Hm."),
            ThoughtSignature("c2ln"),
            *(TextDelta(word) for word in WORDS),
            Finished("stop", USAGE),
        )
    )
    events = streamed(client, model="goog/m", generation_config={"thinking_summaries": "auto"})
    whole = summary(events)
    interaction_id = events[0].interaction.id
    assert summary(resumed(client, interaction_id)) == whole
    for position, event_id in enumerate(ids(events)[:-1]):
        assert summary(resumed(client, interaction_id, event_id)) == whole[position + 1 :]


def test_a_failure_that_was_not_streamed_ends_its_stream_alike(
    client: Client, fakes: Fakes
) -> None:
    fakes.acme.default = Reply(status=400, message="no such luck")
    made = client.interactions.create(model=FAST, input="Hi")
    assert made.status == "failed"
    events = resumed(client, made.id)
    assert kinds(events) == kinds(streamed(client))
    assert "no such luck" in events[-1].error.message


def test_resuming_after_the_last_event_repeats_it(client: Client, fakes: Fakes) -> None:
    events = streamed(client)
    again = resumed(client, events[0].interaction.id, events[-1].event_id)
    assert summary(again) == summary(events[-1:])


def test_what_was_not_streamed_can_be_streamed_afterwards(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*WORDS))
    made = client.interactions.create(model=FAST, input="Hi")
    events = resumed(client, made.id)
    assert read(events) == plain(made.steps)
    whole = summary(events)
    for position, event_id in enumerate(ids(events)[:-1]):
        assert summary(resumed(client, made.id, event_id)) == whole[position + 1 :]
    assert summary(resumed(client, made.id, events[-1].event_id)) == whole[-1:]


def test_two_readers_see_the_same_while_it_runs(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*SLOW[:25], gap_s=0.03))
    stream = iter(client.interactions.create(model=FAST, input="Hi", stream=True))
    events = [next(stream) for _ in range(5)]
    follower: list[Any] = []
    reader = threading.Thread(
        target=lambda: follower.extend(resumed(client, events[0].interaction.id))
    )
    reader.start()
    events += stream
    reader.join(timeout=20)
    assert summary(follower) == summary(events)


@pytest.mark.parametrize("wrong", ["x", "!!!", "MTA0ODU3Ny4tMS4wLjQ0OWIyMzUz", "é", "A" * 5000])
def test_an_event_id_that_is_not_ours_is_refused(client: Client, fakes: Fakes, wrong: str) -> None:
    made = client.interactions.create(model=FAST, input="Hi")
    with pytest.raises(BadRequestError):
        resumed(client, made.id, wrong)


def test_an_event_id_of_another_interaction_is_refused(client: Client, fakes: Fakes) -> None:
    mine, other = streamed(client), streamed(client)
    with pytest.raises(BadRequestError):
        resumed(client, mine[0].interaction.id, other[2].event_id)


# ---- breaking off


@pytest.mark.parametrize("vendor", ["acme", "goog", "anth"])
@pytest.mark.parametrize("how", ["cut_after", "stall_after", "error_after"])
def test_broken_answer_is_closed_and_starts_anew(
    client: Client, fakes: Fakes, vendor: str, how: str
) -> None:
    chunks = {"acme": 3, "goog": 2, "anth": 5}[vendor]
    fakes.all[vendor].replies += [
        answer("Half ", "an ", "answer", **{how: chunks}),
        answer("Whole"),
    ]
    events = streamed(client, model=f"{vendor}/m")
    steps = read(events)
    assert [step["type"] for step in steps] == ["model_output", "thought", "model_output"]
    assert steps[0]["content"][0]["text"] == "Half an "
    assert output_text(steps) == "Whole"
    assert events[-1].interaction.status == "completed"
    seen = client.interactions.get(events[0].interaction.id)
    shown = generated(seen)
    assert shown[0].pop("error")["code"]
    assert shown == steps
    assert summary(resumed(client, seen.id)) == summary(events)
    # The model is not shown its own torso in the next turn.
    client.interactions.create(model=f"{vendor}/m", input="On", previous_interaction_id=seen.id)
    sent = str(fakes.all[vendor].requests[-1].json)
    assert "Whole" in sent
    assert "Half" not in sent


def test_output_text_after_a_break_is_the_new_answer_alone(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [answer("Half ", "an ", "answer", cut_after=3), answer("Whole")]
    events = streamed(client)
    seen = client.interactions.get(events[0].interaction.id)
    assert seen.output_text == "Whole"


def test_break_before_any_delta_leaves_no_trace(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [answer("Half", cut_after=0), answer("Whole")]
    steps = read(streamed(client))
    assert [step["type"] for step in steps] == ["model_output"]
    assert output_text(steps) == "Whole"


def test_break_in_an_answer_that_nobody_watches_leaves_no_trace(
    client: Client, fakes: Fakes
) -> None:
    fakes.acme.replies += [answer("Half ", "an ", "answer", cut_after=3), answer("Whole")]
    made = client.interactions.create(model=FAST, input="Hi")
    assert [step.type for step in made.steps] == ["model_output"]
    assert made.output_text == "Whole"


# ---- leaving and stopping


def test_run_goes_on_when_its_reader_leaves(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*SLOW[:20], gap_s=0.03))
    with client.interactions.create(model=FAST, input="Hi", stream=True) as stream:
        events = [next(iter(stream)) for _ in range(1)]
    interaction_id = events[0].interaction.id
    until(lambda: client.interactions.get(interaction_id).status != "in_progress")
    seen = client.interactions.get(interaction_id)
    assert (seen.status, seen.output_text) == ("completed", "".join(SLOW[:20]))
    rest = resumed(client, interaction_id, events[0].event_id)
    assert output_text(read(events + rest)) == "".join(SLOW[:20])


def test_cancel_stops_a_running_stream(client: Client, fakes: Fakes) -> None:
    idle = fakes.acme.open
    fakes.acme.replies.append(answer(*SLOW, gap_s=0.05))
    stream = iter(client.interactions.create(model=FAST, input="Hi", stream=True))
    events = [next(stream) for _ in range(5)]
    interaction_id = events[0].interaction.id
    assert client.interactions.get(interaction_id).status == "in_progress"
    cancelled = client.interactions.cancel(interaction_id)
    assert cancelled.status == "cancelled"
    events += stream
    until(lambda: fakes.acme.open == idle, within_s=1)
    updates = [e.status for e in events if e.event_type == "interaction.status_update"]
    assert updates == ["in_progress", "cancelled"]
    steps = read(events)
    assert events[-1].interaction.status == "cancelled"
    seen = client.interactions.get(interaction_id)
    assert seen.status == "cancelled"
    shown = generated(seen)
    for step in shown:
        step.pop("error", None)
    assert shown == steps
    assert "".join(SLOW).startswith(steps[0]["content"][0]["text"])
    assert plain(client.interactions.cancel(interaction_id)) == plain(seen)


def test_cancel_stops_a_run_whose_client_waits(client: Client, fakes: Fakes) -> None:
    idle = fakes.acme.open
    fakes.acme.replies.append(answer(*SLOW, gap_s=0.05))
    answers: list[Any] = []
    labels = {"waits": "yes"}
    waiting = threading.Thread(
        target=lambda: answers.append(
            client.interactions.create(model=FAST, input="Hi", labels=labels)
        )
    )
    waiting.start()
    until(lambda: fakes.acme.open == idle + 1)
    listed = client._api_client.request(
        "get", "interactions?label=waits:yes&status=in_progress", {}, None
    )
    [running] = _json(listed)["interactions"]
    client.interactions.cancel(running["id"])
    waiting.join(timeout=10)
    assert answers[0].status == "cancelled"
    until(lambda: fakes.acme.open == idle, within_s=1)


def _json(response: Any) -> Any:
    return json.loads(response.body)


def test_deleting_a_running_interaction_stops_it(client: Client, fakes: Fakes) -> None:
    idle = fakes.acme.open
    fakes.acme.replies.append(answer(*SLOW, gap_s=0.05))
    stream = iter(client.interactions.create(model=FAST, input="Hi", stream=True))
    interaction_id = next(stream).interaction.id
    next(stream)
    until(lambda: fakes.acme.open == idle + 1)
    client.interactions.delete(interaction_id)
    with pytest.raises(NotFoundError):
        client.interactions.get(interaction_id)
    until(lambda: fakes.acme.open == idle, within_s=1)
    list(stream)  # it ends


def test_what_is_running_cannot_be_continued(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*SLOW, gap_s=0.05))
    stream = iter(client.interactions.create(model=FAST, input="Hi", stream=True))
    interaction_id = next(stream).interaction.id
    with pytest.raises(BadRequestError):
        client.interactions.create(model=FAST, input="On", previous_interaction_id=interaction_id)
    client.interactions.cancel(interaction_id)
    list(stream)
    # What was cancelled can be continued.
    made = client.interactions.create(
        model=FAST, input="On", previous_interaction_id=interaction_id
    )
    assert made.status == "completed"
