"""Conversations are trees: whatever is forked and deleted, every living turn keeps its history."""

import asyncio
import base64
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import house
from tests.fakes.upstream import Reply
from tests.house import Server

from openinteractions.db.engine import Database
from openinteractions.loop import pictures
from openinteractions.models.port import Finished, Json, ToolCall
from openinteractions.resources.files import store as files
from openinteractions.resources.interactions import store as interactions
from openinteractions.runs.history import Cache
from openinteractions.runs.store import Line

GONE_WITH_THE_TREE = (
    "interactions", "steps", "segments", "blobs", "blob_uses", "events", "jobs",
)  # fmt: skip
SLOW = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    async with house.upstream() as fake, house.opened(database_url, fake) as opened:
        opened.fake = fake  # type: ignore[attr-defined]
        yield opened


@dataclass(eq=False)
class Node:
    """A turn in the model: all steps that it stands on, and its own."""

    id: str
    history: list[str]
    own: list[str]

    def path(self, cut: int | None = None) -> list[str]:
        return self.history + (self.own if cut is None else self.own[: cut + 1])


@dataclass
class Tree:
    """What the server should remember: plain lists, copied at every turn."""

    living: list[Node] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    turns: int = 0


# Which living turn is meant (modulo how many there are), and where it is cut.
PICK = st.integers(0, 1000)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("root"), PICK, PICK),
        st.tuples(st.just("continue"), PICK, PICK),
        st.tuples(st.just("continue"), PICK, PICK),
        st.tuples(st.just("branch"), PICK, PICK),
        st.tuples(st.just("delete"), PICK, PICK),
        st.tuples(st.just("unstored"), PICK, PICK),
        st.tuples(st.just("forget"), PICK, PICK),
    ),
    min_size=3,
    max_size=12,
)


def shown(server: Server) -> list[str]:
    """The texts that the upstream was last shown."""
    return [text for _, text in house.said(server.fake.requests[-1])]  # type: ignore[attr-defined]


def the_cache(server: Server) -> Cache:
    return server.process.executor._house.cache


async def ask(server: Server, tree: Tree, parent: Node | None, cut: int | None, **how) -> None:
    tree.turns += 1
    inputs = [f"u{tree.turns}.{part}" for part in range(1 + tree.turns % 2)]
    previous = {}
    history: list[str] = []
    if parent is not None:
        at = "" if cut is None else f"@{cut}"
        previous = {"previous_interaction_id": parent.id + at}
        history = parent.path(cut)
    given = [{"type": "user_input", "content": [{"type": "text", "text": t}]} for t in inputs]
    answer = await server.create(given, stream=False, **previous, **how)
    assert shown(server) == history + inputs
    if "id" in answer:
        own = [*inputs, house.answer(answer)]
        tree.living.append(Node(answer["id"], history, own))


async def step(server: Server, tree: Tree, what: str, pick: int, where: int) -> None:
    node = tree.living[pick % len(tree.living)] if tree.living else None
    cut = None if node is None else where % len(node.own)
    if what == "root" or node is None:
        await ask(server, tree, None, None)
    elif what == "continue":
        await ask(server, tree, node, None)
    elif what == "branch":
        await ask(server, tree, node, cut)
    elif what == "unstored":
        await ask(server, tree, node, cut if where % 2 else None, store=False)
    elif what == "forget":
        forget(server)
    elif what == "delete":
        await delete(server, tree, node)


def forget(server: Server) -> None:
    cache = the_cache(server)
    cache._lines.clear()
    cache._size = 0


async def delete(server: Server, tree: Tree, node: Node) -> None:
    status, answer = await server.call("DELETE", f"interactions/{node.id}")
    assert (status, answer) == (200, {})
    tree.living.remove(node)
    tree.dead.append(node.id)


async def check(server: Server, tree: Tree) -> None:
    for node in tree.living:
        assert await cold_history(server, node.id) == node.history
        stored = await server.get(node.id)
        assert [house.text_of(s["content"]) for s in stored["steps"]] == node.own
    for dead in tree.dead:
        assert (await server.call("GET", f"interactions/{dead}"))[0] == 404
        assert (await server.call("DELETE", f"interactions/{dead}"))[0] == 404
        status, _ = await server.call(
            "POST",
            "interactions",
            {"model": house.MODEL, "input": "x", "previous_interaction_id": dead},
        )
        assert status == 404


async def cold_history(server: Server, public_id: str) -> list[str]:
    """The turns before one, straight from the rows."""
    async with server.database.hot() as connection:
        project, segment, depth = await connection.fetchrow(
            "select project_id, segment_id, depth from interactions where id = $1",
            house.uuid_of(public_id),
        )
    if depth == 0:
        return []
    rooms = server.process.executor._house
    line = Line(project_id=project, segment_id=segment, depth=depth - 1)
    history = rooms.history(project, line)
    history._cache = Cache(0)
    target = rooms.catalog.open(house.MODEL)
    return [house.text_of(orjson.loads(m)["content"]) for m in await history.messages(target)]


async def left_over(database: Database) -> dict[str, int]:
    counts = {table: await house.rows(database, table) for table in GONE_WITH_THE_TREE}
    return {table: count for table, count in counts.items() if count}


@SLOW
@given(operations=OPERATIONS)
async def test_every_living_turn_has_its_history(
    server: Server, operations: Sequence[tuple[str, int, int]]
):
    tree = Tree()
    for what, pick, where in operations:
        await step(server, tree, what, pick, where)
    await check(server, tree)
    cache = the_cache(server)
    assert cache._size == sum(line.size for line in cache._lines.values())
    for node in list(tree.living):
        await delete(server, tree, node)
    assert await left_over(server.database) == {}


async def test_a_branch_says_where_it_was_cut(server: Server):
    first = await server.create("one")
    at = f"{first['id']}@0"
    branch = await server.create("another", previous_interaction_id=f"interactions/{at}")
    assert branch["previous_interaction_id"] == at
    assert (await server.get(branch["id"]))["previous_interaction_id"] == at
    status, page = await server.call("GET", "interactions")
    assert status == 200
    named = {row["id"]: row.get("previous_interaction_id") for row in page["interactions"]}
    assert named == {first["id"]: None, branch["id"]: at}
    later = await server.create("on", previous_interaction_id=branch["id"])
    assert later["previous_interaction_id"] == branch["id"]
    path = f"/v1beta/interactions/{branch['id']}"
    async with server.http.get(path, headers={"x-goog-api-key": house.KEY}) as answered:
        assert (await answered.text()).count('"previous_interaction_id"') == 1


async def test_a_deleted_parent_leaves_its_children_working(server: Server):
    root = await server.create("one")
    middle = await server.create("two", previous_interaction_id=root["id"])
    fork = await server.create("other", previous_interaction_id=f"{root['id']}@0")
    for gone in (root, middle):
        assert (await server.call("DELETE", f"interactions/{gone['id']}"))[0] == 200
    await server.create("three", previous_interaction_id=fork["id"])
    assert shown(server) == ["one", "other", "re: other", "three"]


async def test_steps_go_when_nobody_builds_on_them(server: Server):
    """Ruling R19: a deleted end of a line is gone at once; a tombstone keeps its slot."""
    root = await server.create("one")
    end = await server.create("two", previous_interaction_id=root["id"])
    await server.call("DELETE", f"interactions/{end['id']}")
    assert await house.rows(server.database, "steps") == 2
    again = await server.create("two again", previous_interaction_id=root["id"])
    assert shown(server) == ["one", "re: one", "two again"]
    for gone in (again, root):
        await server.call("DELETE", f"interactions/{gone['id']}")
    assert await left_over(server.database) == {}


async def test_a_tombstone_keeps_nothing_of_the_request(server: Server):
    root = await server.create("one", labels={"secret": "yes"}, system_instruction="hush")
    await server.create("two", previous_interaction_id=root["id"])
    await server.call("DELETE", f"interactions/{root['id']}")
    async with server.database.hot() as connection:
        row = await connection.fetchrow(
            "select echo, spec, run_state, labels, usage, sealed, webhook, idempotency_key "
            "from interactions where id = $1",
            house.uuid_of(root["id"]),
        )
    assert [value for value in row if value is not None] == []


async def test_the_log_goes_with_its_interaction(server: Server):
    frames = await server.streamed("one")
    public_id = frames[0].data["interaction"]["id"]
    assert await house.rows(server.database, "events") > 0
    await server.call("DELETE", f"interactions/{public_id}")
    assert await left_over(server.database) == {}


async def test_children_created_at_once_all_have_the_parents_history(server: Server):
    root = await server.create("one")
    parent = await server.create("two", previous_interaction_id=root["id"])
    server.fake.requests.clear()
    children = await asyncio.gather(
        *(server.create(f"c{n}", previous_interaction_id=parent["id"]) for n in range(3))
    )
    assert len({child["id"] for child in children}) == 3
    seen = sorted([text for _, text in house.said(r)] for r in server.fake.requests)
    assert seen == [["one", "re: one", "two", "re: two", f"c{n}"] for n in range(3)]
    for n, child in enumerate(children):
        await server.create("on", previous_interaction_id=child["id"])
        assert shown(server)[-3:] == [f"c{n}", f"re: c{n}", "on"]


async def test_a_crowd_of_children_is_served_or_told_to_come_back(server: Server):
    parent = await server.create("one")
    body = {"model": house.MODEL, "input": "c", "previous_interaction_id": parent["id"]}
    answers = await asyncio.gather(*(server.call("POST", "interactions", body) for _ in range(12)))
    assert {status for status, _ in answers} == {200}


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_delete_that_races_with_a_create_loses_no_history(server: Server, streamed: bool):
    outcomes = set()
    for _ in range(12):
        parent = await server.create("one")
        body = {"model": house.MODEL, "input": "two", "previous_interaction_id": parent["id"]}
        (status, child), (deleted, _) = await asyncio.gather(
            server.call("POST", "interactions", body | {"stream": streamed}),
            server.call("DELETE", f"interactions/{parent['id']}"),
        )
        outcomes.add(status)
        assert deleted == 200
        assert status in {200, 404}
        if status == 200 and not streamed:
            await server.create("three", previous_interaction_id=child["id"])
            assert shown(server) == ["one", "re: one", "two", "re: two", "three"]
    async with server.database.hot() as connection:
        living = await connection.fetch("select id from interactions where deleted_at is null")
    for row in living:
        await server.call("DELETE", f"interactions/v1_{row[0].hex}")
    assert await left_over(server.database) == {}


async def test_deletes_at_once_leave_nothing(server: Server):
    """Two deletes of neighbours: whichever commits last clears the tree."""
    for _ in range(6):
        root = await server.create("one")
        ids = [root["id"]]
        for place in ("", "", "@0", "@1"):
            child = await server.create("x", previous_interaction_id=ids[0] + place)
            ids.append(child["id"])
            grandchild = await server.create("y", previous_interaction_id=child["id"])
            ids.append(grandchild["id"])
        answers = await asyncio.gather(*(server.call("DELETE", f"interactions/{i}") for i in ids))
        assert {status for status, _ in answers} == {200}
        assert await left_over(server.database) == {}


async def test_a_delete_while_it_runs_ends_the_run(server: Server):
    server.fake.replies.append(house.reply("a", "b", stall_after=2))
    async with server.stream(
        "interactions", {"model": house.MODEL, "input": "x", "stream": True}
    ) as frames:
        first = await frames.next()
        await frames.until(lambda f: f.kind == "step.delta")
        path = f"interactions/{first.data['interaction']['id']}"
        assert (await server.call("DELETE", path))[0] == 200
        await frames.rest()
    assert (await server.call("GET", path))[0] == 404
    assert await left_over(server.database) == {}


# ---- the cache


async def test_readers_of_one_line_at_once_each_get_their_own_end(server: Server):
    """A warm line that two runs extend at the same time shows neither the other's turns."""
    ids: list[str] = []
    for n in range(8):
        more = {"previous_interaction_id": ids[-1]} if ids else {}
        ids.append((await server.create(f"u{n}", **more))["id"])
    whole = [t for n in range(8) for t in (f"u{n}", f"re: u{n}")]
    for _ in range(5):
        forget(server)
        # Warm up to the first turn only.
        await server.create("w", previous_interaction_id=ids[0], store=False)
        server.fake.requests.clear()
        await asyncio.gather(
            *(
                server.create(f"at {n}", previous_interaction_id=ids[n], store=False)
                for n in (2, 7, 4, 6)
            )
        )
        for request in server.fake.requests:
            *history, last = [text for _, text in house.said(request)]
            assert history == whole[: 2 * int(last.removeprefix("at ")) + 2]


async def test_a_small_cache_changes_nothing(database_url: str):
    async with house.upstream() as fake, house.opened(database_url, fake) as server:
        the_cache(server)._max_bytes = 300
        previous: dict[str, str] = {}
        expected: list[str] = []
        for n in range(12):
            answer = await server.create(f"u{n}", **previous)
            expected.append(f"u{n}")
            assert [text for _, text in house.said(fake.requests[-1])] == expected
            expected.append(f"re: u{n}")
            previous = {"previous_interaction_id": answer["id"]}
            assert the_cache(server)._size <= 300


# ---- media

PICTURE = base64.b64encode(b"\x89PNG" + bytes(range(256)) * 200).decode()


def with_picture(text: str) -> list[Json]:
    return [{
        "type": "user_input",
        "content": [
            {"type": "text", "text": text},
            {"type": "image", "mime_type": "image/png", "data": PICTURE},
        ],
    }]  # fmt: skip


async def test_media_are_kept_once_and_go_with_their_last_turn(server: Server):
    first = await server.create(with_picture("a"))
    second = await server.create(with_picture("b"), previous_interaction_id=first["id"])
    other = await server.create(with_picture("c"))
    assert await house.rows(server.database, "blobs") == 1
    for gone in (first, other):
        await server.call("DELETE", f"interactions/{gone['id']}")
    stored = await server.get(second["id"])
    assert stored["steps"][0]["content"][1]["data"] == PICTURE
    for cold in (False, True):
        if cold:
            forget(server)
        await server.create("look", previous_interaction_id=second["id"], store=False)
        sent = orjson.dumps(server.fake.requests[-1].json)
        assert sent.count(PICTURE.encode()) == 2
    await server.call("DELETE", f"interactions/{second['id']}")
    assert await left_over(server.database) == {}


async def test_a_result_whose_picture_is_refused_does_not_end_the_line(server: Server):
    look = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    server.fake.replies.append(
        Reply(events=(ToolCall("c1", "look", {}), Finished("tool_calls", {})))
    )
    first = await server.create("see", tools=[look], stream=False)
    refused = Reply(status=400, message="Could not process image")
    server.fake.replies.append(refused)
    picture = {"type": "image", "mime_type": "image/png", "data": PICTURE}
    result = {"type": "function_result", "call_id": "c1", "name": "look", "result": [picture]}
    second = await server.create(
        [result], tools=[look], previous_interaction_id=first["id"], stream=False
    )
    assert second["status"] == "completed"
    for cold in (False, True):
        if cold:
            forget(server)
        server.fake.replies.append(refused)
        later = await server.create("on", previous_interaction_id=second["id"], stream=False)
        assert later["status"] == "completed"
        asked, again = [orjson.dumps(request.json) for request in server.fake.requests[-2:]]
        assert PICTURE.encode() in asked
        assert PICTURE.encode() not in again
        assert pictures.LEFT_OUT.encode() in again


async def test_a_blob_is_not_dropped_under_a_turn_that_is_being_created(server: Server):
    first = await server.create(with_picture("a"))
    row = await interactions.get(
        server.database, await project_of(server), house.uuid_of(first["id"])
    )
    async with server.database.hot() as connection, connection.transaction():
        blobs = await files.get(server.database, row.project_id, await hashes(server))
        (blob,) = blobs.values()
        await connection.execute(
            files._PUT, row.project_id, [blob.sha256], [blob.mime_type], [blob.data],
            uuid4(), 0,
        )  # fmt: skip
        deleting = asyncio.create_task(server.call("DELETE", f"interactions/{first['id']}"))
        await asyncio.sleep(0.3)
    assert (await deleting)[0] == 200
    assert await house.rows(server.database, "blobs") == 1


async def project_of(server: Server):
    async with server.database.hot() as connection:
        return await connection.fetchval("select project_id from interactions limit 1")


async def hashes(server: Server) -> list[bytes]:
    async with server.database.hot() as connection:
        return [row[0] for row in await connection.fetch("select sha256 from blobs")]
