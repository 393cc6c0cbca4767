"""A line begins at its last handover; branches from before it still have everything."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import house
from tests.house import Server

from openinteractions.loop.context import compaction_note, compacts, visible
from openinteractions.models.port import Json
from openinteractions.runs.history import Cache
from openinteractions.runs.store import Line

SLOW = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    async with house.upstream() as fake, house.opened(database_url, fake) as opened:
        opened.fake = fake  # type: ignore[attr-defined]
        yield opened


def says(text: str, kind: str = "user_input") -> Json:
    return {"type": kind, "content": [{"type": "text", "text": text}]}


def note(handover: str) -> Json:
    return compaction_note(handover, request_chars=1000, images=1)


def shown(server: Server) -> list[str]:
    return [text for _, text in house.said(server.fake.requests[-1])]  # type: ignore[attr-defined]


@dataclass(eq=False)
class Node:
    """A turn: its own steps, and the turns before it, each cut where the line leaves it."""

    id: str
    steps: list[Json]
    before: list[list[Json]] = field(default_factory=list)

    def line(self, cut: int | None = None) -> list[list[Json]]:
        return [*self.before, self.steps if cut is None else self.steps[: cut + 1]]


def seen(turns: Sequence[Sequence[Json]]) -> list[str]:
    """What a model is shown of a line of turns."""
    texts: list[str] = []
    for turn in turns:
        if compacts(turn):
            texts = []
        texts += [house.text_of(step["content"]) for step in visible(turn)]
    return texts


async def ask(
    server: Server, number: int, parent: Node | None, cut: int | None, *, compacted: bool
) -> Node:
    inputs = [says(f"u{number}")]
    if compacted:
        inputs += [says(f"old {number}", "model_output"), note(f"handover {number}")]
        inputs += [says(f"more {number}")]
    previous = {}
    before: list[list[Json]] = []
    if parent is not None:
        at = "" if cut is None else f"@{cut}"
        previous = {"previous_interaction_id": parent.id + at}
        before = parent.line(cut)
    answer = await server.create(inputs, **previous)
    expected = seen([*before, inputs])
    # What the loop itself leaves out while it runs is not the line's matter.
    assert (shown(server)[-len(expected) :] if compacted else shown(server)) == expected
    return Node(answer["id"], [*inputs, says(house.answer(answer), "model_output")], before)


PICK = st.integers(0, 1000)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["go", "go", "compact", "branch", "unstored", "forget"]), PICK, PICK),
    min_size=4,
    max_size=12,
)


@SLOW
@given(operations=OPERATIONS)
async def test_every_turn_sees_its_line_from_the_last_handover_on(
    server: Server, operations: Sequence[tuple[str, int, int]]
):
    cache = server.process.executor._house.cache
    nodes = [await ask(server, 0, None, None, compacted=False)]
    for number, (what, pick, where) in enumerate(operations, 1):
        node = nodes[pick % len(nodes)]
        # A note is no place to branch at: what it leaves out is not answered there.
        cut = where % len(node.steps) if what == "branch" else None
        if what == "forget":
            cache._lines.clear()
            cache._size = 0
        elif what == "unstored":
            await server.create(
                "look", previous_interaction_id=f"{node.id}", store=False, stream=False
            )
            assert shown(server) == [*seen(node.line()), "look"]
        else:
            nodes.append(await ask(server, number, node, cut, compacted=what == "compact"))
    assert cache._size == sum(line.size for line in cache._lines.values())


async def test_a_warm_line_and_a_cold_one_are_the_same(server: Server):
    root = await ask(server, 1, None, None, compacted=False)
    middle = await ask(server, 2, root, None, compacted=True)
    end = await ask(server, 3, middle, None, compacted=False)
    for cold in (False, True, False):
        if cold:
            server.process.executor._house.cache._lines.clear()
        for node in (end, root, middle):
            await server.create("look", previous_interaction_id=node.id, store=False)
            assert shown(server) == [*seen(node.line()), "look"]


async def test_a_handover_is_not_compiled_with_what_it_replaces(server: Server):
    """A cold line is read from its last handover on: older media are not even fetched."""
    server.process.executor._house.cache._max_bytes = 0
    root = await server.create("see")
    compacted = [says("u"), note("handover"), says("more")]
    answer = await server.create(compacted, previous_interaction_id=root["id"])
    gone = {"type": "image", "mime_type": "image/png", "uri": "http://127.0.0.1:9/gone.png"}
    await spoil(server, root["id"], gone)
    body = {"model": house.MODEL, "input": "look", "previous_interaction_id": root["id"]}
    _, failed = await server.call("POST", "interactions", body)
    assert failed["status"] == "failed"
    told = await server.create("look", previous_interaction_id=answer["id"])
    assert told["status"] == "completed", told["errors"]
    assert shown(server)[1:] == ["more", "re: more", "look"]


async def spoil(server: Server, public_id: str, block: Json) -> None:
    """Let an interaction's input refer to something that cannot be fetched any more."""
    step = {"type": "user_input", "content": [block]}
    async with server.database.hot() as connection:
        await connection.execute(
            "update steps set data = $2, media = true where depth = 0 and idx = 0 and segment_id = "
            "(select segment_id from interactions where id = $1)",
            house.uuid_of(public_id),
            orjson.dumps(step),
        )


# ---- for a transcript


async def steps_before(server: Server, node: Node, max_chars: int) -> list[Json]:
    async with server.database.hot() as connection:
        project, segment, depth = await connection.fetchrow(
            "select project_id, segment_id, depth from interactions where id = $1",
            house.uuid_of(node.id),
        )
    rooms = server.process.executor._house
    line = None
    if depth:
        line = Line(project_id=project, segment_id=segment, depth=depth - 1)
    found = rooms.history(project, line)
    found._cache = Cache(0)
    return await found.steps(max_chars)


async def test_earlier_turns_are_given_as_steps(server: Server):
    root = await ask(server, 1, None, None, compacted=False)
    middle = await ask(server, 2, root, None, compacted=False)
    end = await ask(server, 3, middle, None, compacted=False)
    assert await steps_before(server, root, 10_000) == []
    whole = await steps_before(server, end, 10_000)
    assert [house.text_of(step["content"]) for step in whole] == ["u1", "re: u1", "u2", "re: u2"]
    newest = await steps_before(server, end, 160)
    assert [house.text_of(step["content"]) for step in newest] == ["u2", "re: u2"]
    assert await steps_before(server, end, 0) == []


async def test_earlier_turns_begin_at_a_handover_however_long_they_are(server: Server):
    root = await ask(server, 1, None, None, compacted=False)
    middle = await ask(server, 2, root, None, compacted=True)
    later = await ask(server, 3, middle, None, compacted=False)
    end = await ask(server, 4, later, None, compacted=False)
    whole = await steps_before(server, end, 10_000)
    assert whole[0]["handover"]["text"] == "handover 2"
    assert [house.text_of(step["content"]) for step in whole[1:]] == [
        "more 2", "re: more 2", "u3", "re: u3",
    ]  # fmt: skip
    first, *rest = await steps_before(server, end, 100)
    assert first["handover"]["text"] == "handover 2"
    assert [house.text_of(step["content"]) for step in rest] == ["re: u3"]


async def test_media_are_left_out_of_earlier_steps(server: Server):
    image = {"type": "image", "mime_type": "image/png", "data": "iVBORw0KGgo="}
    root = await server.create([{"type": "user_input", "content": [image]}])
    end = await server.create("next", previous_interaction_id=root["id"])
    first, _ = await steps_before(server, Node(end["id"], []), 10_000)
    assert first["content"] == [{"type": "image", "mime_type": "image/png"}]
