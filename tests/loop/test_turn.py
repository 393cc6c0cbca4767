"""One turn of a model as it grows: citations of ours, and token counts with each step."""

from collections.abc import Sequence

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openinteractions.events.steps import step_events
from openinteractions.events.types import Event
from openinteractions.loop.citations import annotations
from openinteractions.loop.turn import Turn, fold, whole_step_events, with_usage
from openinteractions.models.port import (
    Annotations,
    Finished,
    Json,
    Media,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
    VendorStep,
)
from openinteractions.tools.port import Means
from openinteractions.tools.toolbox import toolbox
from openinteractions.wire.usage import EMPTY_USAGE

PAGE = "https://a.example/x"
OWN = {"total_input_tokens": 100, "total_output_tokens": 20, "total_tokens": 120}
BEFORE = {"total_input_tokens": 7, "total_tokens": 7}
AFTER = {**EMPTY_USAGE, **OWN, "total_input_tokens": 107, "total_tokens": 127}
IMAGE = {"type": "image", "mime_type": "image/png", "data": "AAAA"}
SEARCH = {"type": "google_search_call", "id": "s", "arguments": {"queries": ["q"]}}


def grown(*events: object, usage_before: Json | None = None, cites: bool = False):
    """A turn that has taken these events, and what it has shown."""
    shown: list[Event] = []
    turn = Turn(
        lambda *some: shown.extend(some),
        first_index=0,
        provider="p",
        model="m",
        cite=(lambda text: annotations(text, {PAGE: "A"})) if cites else None,
        usage_before=usage_before,
    )
    for event in events:
        turn.add(event)  # type: ignore[arg-type]
    return turn, shown


def stops(shown: Sequence[Event]) -> list[tuple[Json | None, Json | None]]:
    data = [orjson.loads(event.data) for event in shown if event.kind == "t"]
    return [(stop.get("usage"), stop.get("step_usage")) for stop in data]


# ---- citations


def test_a_text_that_closes_is_cited():
    turn, shown = grown(TextDelta("It is 5 "), TextDelta(f"({PAGE})."), cites=True)
    (step,) = turn.close()
    (block,) = step["content"]
    assert block["text"] == f"It is 5 ({PAGE})."
    assert block["annotations"] == [
        {"type": "url_citation", "url": PAGE, "title": "A", "start_index": 0, "end_index": 30}
    ]
    assert fold(shown) == [(step, True)]
    assert [event.kind for event in shown] == ["s", "d", "d", "d", "t"]


def test_a_vendors_own_citation_is_not_repeated():
    own = {"type": "url_citation", "url": PAGE, "start_index": 0, "end_index": 2}
    turn, _ = grown(TextDelta(f"It is {PAGE}"), Annotations([own]), cites=True)
    assert turn.close()[0]["content"][0]["annotations"] == [own]
    other = {**own, "url": "https://b.example"}
    turn, _ = grown(TextDelta(f"It is {PAGE}"), Annotations([other]), cites=True)
    notes = turn.close()[0]["content"][0]["annotations"]
    assert [note["url"] for note in notes] == ["https://b.example", PAGE]


def test_each_text_of_an_answer_has_its_own_citations():
    turn, shown = grown(
        TextDelta(f"One {PAGE}."), Media(IMAGE), TextDelta("None."), Media(IMAGE),
        ThoughtDelta(f"hm {PAGE}"), TextDelta(f"Two {PAGE}."), cites=True,
    )  # fmt: skip
    first, thought, last = turn.close()
    assert [len(block.get("annotations", ())) for block in first["content"]] == [1, 0, 0, 0]
    assert "annotations" not in thought["summary"][0]
    assert len(last["content"][0]["annotations"]) == 1
    assert [step for step, _ in fold(shown)] == turn.steps


# ---- token counts


def test_the_last_step_says_what_the_turn_took():
    turn, shown = grown(
        ThoughtSignature("s"), TextDelta("hi"), Finished("stop", OWN), usage_before=BEFORE
    )
    steps = turn.close()
    before = {**EMPTY_USAGE, **BEFORE}
    assert stops(shown) == [(before, None), (AFTER, OWN)]
    assert [(step.get("usage"), step.get("step_usage")) for step in steps] == stops(shown)


def test_of_calls_the_last_one_says_it():
    box = toolbox([{"type": "code_execution"}], Means())
    code = ToolCall("a", "code_execution", {"language": "python", "code": "1"})
    turn, shown = grown(
        TextDelta("hi"), ToolCall("b", "f", {}), code, Finished("tool_calls", OWN), usage_before={}
    )
    held: list[Event] = []
    turn.reveal_calls(box, lambda *some: held.extend(some))
    assert [step.get("step_usage") for step in turn.steps] == [None, None, OWN]
    assert [step["usage"]["total_tokens"] for step in turn.steps] == [0, 0, 120]
    assert [step for step, _ in fold([*shown, *held])] == turn.steps


def test_a_step_that_is_there_at_once_counts_too():
    turn, shown = grown(
        VendorStep(SEARCH), TextDelta("a"), Finished("stop", OWN), usage_before=BEFORE
    )
    turn.close()
    assert [bool(own) for _, own in stops(shown)] == [False, True]
    assert "usage" not in SEARCH


def test_nothing_is_counted_unless_asked():
    turn, shown = grown(VendorStep(SEARCH), TextDelta("hi"), Finished("stop", OWN))
    steps = turn.close()
    assert stops(shown) == [(None, None), (None, None)]
    assert all("usage" not in step for step in steps)


@pytest.mark.parametrize("after", [(), (ThoughtSignature("s"),), (ThoughtDelta("hm"),)])
def test_what_was_taken_is_said_once_though_the_answer_is_asked_for_again(after: tuple):
    turn, shown = grown(TextDelta("no json"), *after, Finished("stop", OWN), usage_before={})
    turn.break_off(3, "no json", starts_anew=True)
    said = [step.get("step_usage") for step in turn.steps]
    assert [own for own in said if own] == [OWN]
    assert [step.get("usage") for step in turn.steps] == [usage for usage, _ in stops(shown)]


EVENTS = st.lists(
    st.one_of(
        st.text("ab é.", min_size=1, max_size=9).map(TextDelta),
        st.just(TextDelta(f" {PAGE}. ")),
        st.text("xy", min_size=1, max_size=5).map(ThoughtDelta),
        st.just(ThoughtSignature("s")),
        st.just(Media(IMAGE)),
        st.just(VendorStep(SEARCH)),
    ),
    max_size=8,
)


@given(EVENTS, st.sampled_from([None, {}, BEFORE]))
def test_a_stream_from_the_steps_shows_the_same(events: list, usage_before: Json | None):
    """Live, folded after a takeover, and read back from the steps."""
    turn, shown = grown(*events, Finished("stop", OWN), usage_before=usage_before, cites=True)
    steps = turn.close()
    assert [step for step, _ in fold(shown)] == steps
    again = [event for at, step in enumerate(steps) for event in step_events(at, step, max_chars=9)]
    assert [step for step, _ in fold(again)] == steps
    ends = [event for event in shown if event.kind in "st"]
    assert [event for event in again if event.kind in "st"] == ends
    last = {event.position.index: event.position for event in shown if event.kind == "d"}
    assert {e.position.index: e.position for e in again if e.kind == "d"} == last


def test_usage_is_kept_out_of_the_start_of_a_step():
    step = with_usage({"type": "function_call", "id": "a", "name": "f", "arguments": {}}, OWN, OWN)
    start, *_, stop = (orjson.loads(event.data) for event in whole_step_events(0, step))
    assert start["step"] == {"type": "function_call", "id": "a", "name": "f", "arguments": {}}
    assert (stop["usage"], stop["step_usage"]) == ({**EMPTY_USAGE, **OWN}, OWN)
    assert with_usage(step, None) == start["step"]
