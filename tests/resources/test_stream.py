"""A stream can be left and taken up again anywhere, from its log or, later, from its steps (R3)."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import house
from tests.fakes.upstream import Reply
from tests.house import Frame, Server

from openinteractions.events.types import Position, decode_cursor, encode_cursor
from openinteractions.models.port import (
    Finished,
    Json,
    ModelEvent,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
)
from openinteractions.wire import deltas

SLOW = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TOOL = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1)
PIECES = st.lists(
    st.one_of(
        TEXT.map(TextDelta),
        st.text("aé€😀\n\u2028", min_size=1, max_size=40).map(TextDelta),
        TEXT.map(ThoughtDelta),
    ),
    min_size=1,
    max_size=5,
)
CALLS = st.lists(TEXT.map(lambda q: ToolCall(None, "look", {"q": q})), max_size=2)


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    async with house.upstream() as fake, house.opened(database_url, fake) as opened:
        opened.fake = fake  # type: ignore[attr-defined]
        yield opened


def folded(frames: Sequence[Frame]) -> list[Json]:
    """What a client that reads a stream has in the end."""
    steps: dict[int, Json] = {}
    stopped: set[int] = set()
    for frame in frames:
        index = frame.data.get("index")
        if frame.kind == "step.start":
            assert index not in steps
            assert all(i in stopped for i in steps)
            steps[index] = orjson.loads(orjson.dumps(frame.data["step"]))
        elif frame.kind == "step.delta":
            assert index not in stopped
            deltas.merge(steps[index], frame.data["delta"])
        elif frame.kind == "step.stop":
            assert index not in stopped
            stopped.add(index)
    assert sorted(steps) == list(range(len(steps)))
    return [deltas.joined(steps[i]) for i in sorted(steps)]


def shape(frames: Sequence[Frame]) -> list[str]:
    """The order of events; neighbouring deltas of one step count as one."""
    result: list[str] = []
    for frame in frames:
        name = f"{frame.kind} {frame.data.get('index', '')}"
        if not (frame.kind == "step.delta" and result and result[-1] == name):
            result.append(name)
    return result


def ending(frames: Sequence[Frame]) -> Json:
    last = frames[-1].data["interaction"]
    return {key: value for key, value in last.items() if key != "updated"}


async def drop_log(server: Server, public_id: str) -> None:
    """What retention will do: the deltas go, the steps stay."""
    key = house.uuid_of(public_id)
    async with server.database.hot() as connection:
        await connection.execute("delete from events where interaction_id = $1", key)
        await connection.execute("update interactions set logged = false where id = $1", key)


def turn(pieces: Sequence[ModelEvent], calls: Sequence[ToolCall]) -> Reply:
    reason = "tool_calls" if calls else "stop"
    return Reply((*pieces, *calls, Finished(reason, dict(house.USAGE))))


@SLOW
@given(pieces=PIECES, calls=CALLS)
async def test_a_stream_goes_on_from_anywhere(
    server: Server, pieces: list[ModelEvent], calls: list[ToolCall]
):
    server.fake.replies.append(turn(pieces, calls))
    live = await server.streamed(
        "x", tools=[TOOL], generation_config={"thinking_summaries": "auto"}
    )
    public_id = live[0].data["interaction"]["id"]
    stored = await server.get(public_id)
    generated = [deltas.joined(step) for step in stored["steps"][1:]]
    assert folded(live) == generated
    assert await server.read(public_id) == live
    for at, frame in enumerate(live[:-1]):
        assert await server.read(public_id, frame.id) == live[at + 1 :]
    assert await server.read(public_id, live[-1].id) == live[-1:]

    await drop_log(server, public_id)
    again = await server.read(public_id)
    assert folded(again) == generated
    assert shape(again) == shape(live)
    for at, frame in enumerate(live):
        rest = await server.read(public_id, frame.id)
        assert folded([*live[: at + 1], *rest]) == generated, frame
        expected = live[at + 1 :] or live[-1:]
        assert ending(rest) == ending(live)
        assert shape(rest) == shape(expected), frame
    for at, frame in enumerate(again):
        rest = await server.read(public_id, frame.id)
        assert folded([*again[: at + 1], *rest]) == generated


@pytest.mark.parametrize("logged", [True, False])
@given(offset=st.integers(1, 11))
@SLOW
async def test_the_middle_of_a_text_is_a_place_too(server: Server, logged: bool, offset: int):
    """A delta that begins before the reader's position is shown from there on."""
    live = await server.streamed("😀é€")
    public_id = live[0].data["interaction"]["id"]
    await drop_log(server, public_id)
    text = house.texts(live)
    key = house.uuid_of(public_id)
    position = decode_cursor(key, live[3].id or "").position._replace(offset=offset)
    rest = await server.read(public_id, encode_cursor(key, 0, position))
    assert house.texts(rest) == text[offset:]


async def test_a_long_text_comes_in_pieces_that_can_be_resumed_between(server: Server):
    text = "".join(chr(0x61 + n % 26) for n in range(50_000)) + "😀"
    server.fake.replies.append(house.reply(text))
    live = await server.streamed("x")
    public_id = live[0].data["interaction"]["id"]
    await drop_log(server, public_id)
    again = await server.read(public_id)
    pieces = [frame for frame in again if frame.kind == "step.delta"]
    assert len(pieces) == 4
    for at, frame in enumerate(again):
        rest = await server.read(public_id, frame.id)
        assert house.texts(again[: at + 1]) + house.texts(rest) == text


async def test_one_that_was_never_streamed_is_read_from_its_steps(server: Server):
    answer = await server.create("x")
    frames = await server.read(answer["id"])
    assert shape(frames) == [
        "interaction.created ",
        "interaction.status_update ",
        "step.start 0",
        "step.delta 0",
        "step.stop 0",
        "interaction.completed ",
    ]
    for at, frame in enumerate(frames):
        rest = await server.read(answer["id"], frame.id)
        expected = shape(frames[at + 1 :]) or ["interaction.completed "]
        assert shape(rest) == expected


@pytest.mark.parametrize("streamed", [True, False])
async def test_forged_cursors_are_an_answer_and_never_a_crash(server: Server, streamed: bool):
    made = await server.streamed("y") if streamed else None
    public_id = made[0].data["interaction"]["id"] if made else (await server.create("x"))["id"]
    key = house.uuid_of(public_id)
    cursors = [
        encode_cursor(key, seq, Position(index, offset))
        for index in (0, 40_000, 2**31 - 2, 2**31 - 1)
        for offset in (-1, 2**31 - 1)
        for seq in (0, 2**62)
    ]
    async with asyncio.timeout(15):
        answers = await asyncio.gather(*(server.read(public_id, cursor) for cursor in cursors))
    assert all(frame.kind for answer in answers for frame in answer)


async def test_a_thought_with_its_signature_can_be_resumed(server: Server):
    """From the steps, a signature follows the summary, as in the log."""
    from openinteractions.events.steps import step_events  # noqa: PLC0415
    from openinteractions.loop.turn import Turn  # noqa: PLC0415 - only here

    shown: list = []
    grown = Turn(lambda *events: shown.extend(events), first_index=0, provider="p", model="m")
    for event in (ThoughtDelta("hm"), ThoughtDelta(" so"), ThoughtSignature("s"), TextDelta("a")):
        grown.add(event)
    grown.add(Finished("stop", {}))
    for index, step in enumerate(grown.steps):
        mine = [event for event in shown if event.position.index == index]
        from_steps = list(step_events(index, step))
        assert {e.position for e in from_steps} <= {e.position for e in mine}
        assert from_steps[-2].position == mine[-2].position


@pytest.mark.parametrize("ending", ["failed", "cancelled", "incomplete"])
async def test_other_endings_read_the_same_from_log_and_steps(server: Server, ending: str):
    if ending == "failed":
        server.fake.replies.append(Reply(status=400))
        live = await server.streamed("x")
    elif ending == "incomplete":
        server.fake.replies.append(house.reply("half", reason="max_tokens"))
        live = await server.streamed("x")
    else:
        server.fake.replies.append(house.reply("a", "b", stall_after=2))
        body = {"model": house.MODEL, "input": "x", "stream": True}
        async with server.stream("interactions", body) as frames:
            live = await frames.until(lambda f: f.kind == "step.delta")
            key = live[0].data["interaction"]["id"]
            status, answer = await server.call("POST", f"interactions/{key}/cancel")
            assert (status, answer["status"]) == (200, "cancelled")
            live += await frames.rest()
    public_id = live[0].data["interaction"]["id"]
    await drop_log(server, public_id)
    again = await server.read(public_id)
    assert shape(again) == shape(live)
    assert again[-1].data.get("error") == live[-1].data.get("error")
