"""Whatever dies, every run ends, and nobody sees anything twice, lost or rewritten."""
# ruff: noqa: ASYNC110 - a test looks again until it is so

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from structlog.testing import capture_logs
from tests import house
from tests.db import postgres
from tests.fakes.upstream import Received, Reply
from tests.house import Frame, Server
from tests.resources.test_stream import folded
from tests.runs import abandoned

from openinteractions.db.engine import LOST
from openinteractions.jobs import runner
from openinteractions.loop.run import Run
from openinteractions.models.port import Json, TextDelta, ThoughtDelta

NOTE = "The answer was interrupted; it starts again below."


@pytest.fixture
async def fake() -> AsyncGenerator:
    async with house.upstream() as upstream:
        yield upstream


@pytest.fixture
async def server(database_url: str, fake) -> AsyncGenerator[Server]:
    """An api that owns nothing and takes nothing: it looks on."""
    async with house.opened(database_url, fake, role="api") as opened:
        yield opened


def worker(url: str, fake, **tree: object):
    return house.opened(url, fake, role="worker", **tree)


def text(value: str, **more: object) -> Json:
    return {"type": "model_output", "content": [{"type": "text", "text": value}], **more}


def without_errors(steps: list[Json]) -> list[Json]:
    """The stream shows a broken step before it is known to be one."""
    return [{k: v for k, v in step.items() if k != "error"} for step in steps]


def shown(frames: list[Frame]) -> list[Json]:
    return without_errors(folded(frames))


# ---- invariant 3


async def test_a_broken_answer_is_closed_and_the_answer_starts_anew(
    server: Server, database_url: str, fake
):
    key = await abandoned.leave(
        server, fake, given="hi", shown=[TextDelta("Half an"), TextDelta(" ans")]
    )
    async with abandoned.following(server, key) as reading:
        await asyncio.sleep(0.1)
        async with worker(database_url, fake):
            got = await abandoned.ended(server, key)
    frames = reading.result()
    user, broken, note, answer = got["steps"]
    assert user["type"] == "user_input"
    assert house.text_of(broken["content"]) == "Half an ans"
    assert broken["error"]["code"] == 14
    assert note["type"] == "thought"
    assert note["summary"] == [{"type": "text", "text": NOTE}]
    assert answer == text("re: hi")
    assert house.answer(got) == "re: hi"
    assert got["status"] == "completed"
    # The stream shows the same, each thing once, to who was there and to who comes later.
    assert shown(frames) == without_errors(got["steps"][1:])
    assert await server.read(key) == frames
    assert [frame.kind for frame in frames].count("interaction.completed") == 1
    # No model sees the broken text.
    assert [house.said(request) for request in fake.requests] == [[("user", "hi")]]


async def test_later_turns_do_not_see_the_broken_text_either(
    server: Server, database_url: str, fake
):
    first = await server.create("one")
    key = await abandoned.leave(
        server, fake, given="two", shown=[TextDelta("Half")], previous_interaction_id=first["id"]
    )
    async with worker(database_url, fake) as there:
        await abandoned.ended(server, key)
        whole = ["one", "re: one", "two", "re: two", "three"]
        for place in (there, server):
            for _ in range(2):
                await place.create("three", previous_interaction_id=key, store=False)
                assert [t for _, t in house.said(fake.requests[-1])] == whole


async def test_thoughts_and_finished_steps_of_a_broken_turn_stay_as_they_were_shown(
    server: Server, database_url: str, fake
):
    """A step that was shown whole but not committed is kept, and given to no model."""
    key = await abandoned.leave(
        server,
        fake,
        given="hi",
        shown=[ThoughtDelta("hm"), TextDelta("Half"), ThoughtDelta("more"), TextDelta("Quar")],
        generation_config={"thinking_summaries": "auto"},
    )
    async with worker(database_url, fake):
        got = await abandoned.ended(server, key)
    kinds = [(s["type"], "error" in s) for s in got["steps"][1:]]
    assert kinds == [
        ("thought", False),
        ("model_output", True),
        ("thought", False),
        ("model_output", True),
        ("thought", False),
        ("model_output", False),
    ]
    assert house.answer(got) == "re: hi"
    assert shown(await server.read(key)) == without_errors(got["steps"][1:])
    assert house.said(fake.requests[0]) == [("user", "hi")]


async def test_committed_steps_are_kept_and_never_asked_for_again(
    server: Server, database_url: str, fake
):
    done = [{"type": "thought", "summary": [{"type": "text", "text": "so"}]}, text("First.")]
    key = await abandoned.leave(server, fake, given="hi", committed=done)
    async with worker(database_url, fake):
        got = await abandoned.ended(server, key)
    assert got["steps"][1:3] == done
    assert got["steps"][3:] == [text("re: First.")]
    assert house.said(fake.requests[0]) == [("user", "hi"), ("assistant", "First.")]
    assert shown(await server.read(key)) == without_errors(got["steps"][1:])


async def test_a_second_takeover_closes_what_the_first_one_left(
    server: Server, database_url: str, fake
):
    """Broken twice: the model still sees the whole input, and only it."""
    key = await abandoned.leave(server, fake, given="hi", shown=[TextDelta("One")])
    fake.replies.append(house.reply("Two", "", stall_after=2))
    dead = await abandoned.stalled_worker(server.database)
    async with house.opened(database_url, fake, role="api") as doomed:
        job = await abandoned.claim(server.database, house.uuid_of(key), dead)
        task = asyncio.create_task(doomed.process.executor.run_job(job))
        await until_shown(server, key, "Two")
        task.cancel()
        await asyncio.wait([task])
        await abandoned.sweep(server.database, house.uuid_of(key))
    async with worker(database_url, fake):
        got = await abandoned.ended(server, key)
    texts = [house.text_of(s.get("content")) for s in got["steps"]]
    assert texts == ["hi", "One", "", "Two", "", "re: hi"]
    assert house.answer(got) == "re: hi"
    assert [house.said(request) for request in fake.requests] == [[("user", "hi")]] * 2
    assert shown(await server.read(key)) == without_errors(got["steps"][1:])


async def test_an_owner_that_died_between_the_note_and_its_commit_costs_no_input(
    server: Server, database_url: str, fake
):
    """The upstream broke off, the note about it was shown, and then the worker died."""
    from openinteractions.loop.context import resumption_note  # noqa: PLC0415 - only here

    first = await server.create("one")
    key = await abandoned.leave(server, fake, given="two", previous_interaction_id=first["id"])
    note = resumption_note(kind="resumed", text=NOTE, discards=1)
    events: list = []
    from openinteractions.loop.turn import Turn  # noqa: PLC0415 - only here

    grown = Turn(lambda *e: events.extend(e), first_index=0, provider="fake", model="m")
    grown.add(TextDelta("Half"))
    grown.break_off(14, "gone", starts_anew=True)
    grown.add_whole(note)
    await abandoned.append(server.database, house.uuid_of(key), events)
    fake.requests.clear()
    async with worker(database_url, fake):
        got = await abandoned.ended(server, key)
    assert house.said(fake.requests[0])[-1] == ("user", "two")
    assert [t for _, t in house.said(fake.requests[0])] == ["one", "re: one", "two"]
    assert house.answer(got) == "re: two"
    assert shown(await server.read(key)) == without_errors(got["steps"][1:])


async def until_shown(server: Server, key: str, what: str) -> None:
    async def look() -> bool:
        return (
            await house.rows(
                server.database,
                "events",
                "interaction_id = $1 and position($2 in convert_from(data, 'utf8')) > 0",
                house.uuid_of(key),
                what,
            )
            > 0
        )

    await house.eventually(look)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_run_that_had_shown_nothing_just_runs(
    server: Server, database_url: str, fake, stream: bool
):
    key = await abandoned.leave(server, fake, given="hi", stream=stream)
    async with worker(database_url, fake):
        got = await abandoned.ended(server, key)
    assert got["steps"][1:] == [text("re: hi")]
    assert len(fake.requests) == 1


# ---- invariants 1 and 2


@pytest.mark.parametrize("owner", ["silent", "unknown"])
async def test_a_lone_server_heals_at_its_next_start(database_url: str, fake, owner: str):
    async with house.opened(database_url, fake, role="api") as before:
        gone = 99 if owner == "unknown" else await abandoned.dead_worker(before.database)
        keys = [await abandoned.leave(before, fake, owner=gone, given=f"{n}") for n in range(3)]
    async with house.opened(database_url, fake) as after:
        for number, key in enumerate(keys):
            got = await abandoned.ended(after, key, within_s=6)
            assert house.answer(got) == f"re: {number}"
        assert await house.rows(after.database, "jobs") == 0


async def test_an_owner_that_lives_keeps_its_run(server: Server, database_url: str, fake):
    """Two healthy servers beat and sweep beside each other: nobody takes anything."""
    fake.default = house.reply(*"abcdefghij", gap_s=0.25)
    async with house.opened(database_url, fake), house.opened(database_url, fake) as second:
        frames = await second.streamed("x")
    assert house.texts(frames) == "abcdefghij"
    assert len(fake.requests) == 1


async def test_a_zombie_writes_nothing_and_its_reader_sees_the_rest(
    server: Server, database_url: str, fake
):
    """Ruling R12: the handler that lost its lease goes on from the log, to the end."""
    fake.replies.append(house.reply(*(f"z{n} " for n in range(12)), gap_s=0.1))
    async with house.opened(database_url, fake, role="api") as slow:
        body = {"model": house.MODEL, "input": "hi", "stream": True}
        async with slow.stream("interactions", body) as frames:
            seen = await frames.until(lambda f: "z2" in house.texts([f]))
            key = seen[0].data["interaction"]["id"]
            await abandoned.sweep(server.database, house.uuid_of(key))
            async with worker(database_url, fake):
                got = await abandoned.ended(server, key)
                seen += await frames.rest()
                await asyncio.sleep(0.8)
            later = await server.get(key)
    assert later == got
    assert house.answer(got) == "re: hi"
    assert [s["type"] for s in got["steps"][1:]] == ["model_output", "thought", "model_output"]
    assert shown(seen) == without_errors(got["steps"][1:])
    assert await server.read(key) == seen
    assert await house.rows(server.database, "spend") == 1


async def test_a_create_that_lost_its_lease_still_answers(server: Server, database_url: str, fake):
    fake.replies.append(house.reply("slow", delay_s=1.0))
    async with house.opened(database_url, fake, role="api") as slow:
        creating = asyncio.create_task(slow.create("hi"))
        await house.eventually(lambda: house.rows(server.database, "jobs"))
        async with server.database.hot() as connection:
            key = await connection.fetchval("select id from jobs")
        await abandoned.sweep(server.database, key)
        async with worker(database_url, fake):
            answer = await creating
    assert answer["status"] == "completed"
    assert house.answer(answer) == "re: hi"


async def test_a_stopping_server_hands_its_runs_back(
    server: Server, database_url: str, fake, monkeypatch
):
    monkeypatch.setattr(runner, "_STOP_GRACE_S", 0.2)
    fake.replies.append(house.reply("Half", "", stall_after=2))
    async with house.opened(database_url, fake, role="all") as stopping:
        project = await abandoned.project_of(server.database)
        dead = stopping.process.member.worker_id
        key = await abandoned.leave(server, fake, owner=dead, given="hi")
        job = await abandoned.claim(server.database, house.uuid_of(key), dead)
        stopping.process.member.own(job.id, job.epoch, stopping.process.executor.run_job(job))
        await until_shown(server, key, "Half")
    async with server.database.hot() as connection:
        state, attempt = await connection.fetchrow(
            "select state, attempt from jobs where project_id = $1", project
        )
    assert (state, attempt) == (0, 1)
    assert await house.rows(server.database, "workers", "id = $1", dead) == 0
    async with worker(database_url, fake):
        got = await abandoned.ended(server, key, within_s=2)
    assert house.answer(got) == "re: hi"
    assert shown(await server.read(key)) == without_errors(got["steps"][1:])


# ---- ruling R6


@pytest.mark.parametrize("shows", [False, True])
async def test_a_poison_run_ends(server: Server, database_url: str, fake, shows: bool):
    """Every worker that takes it dies of it, before or after it has shown something."""
    key = await abandoned.leave(server, fake, given="hi")
    fake.default = house.reply("Boom", "", stall_after=2 if shows else 0)
    dead = await abandoned.stalled_worker(server.database)
    deaths = 0
    async with house.opened(database_url, fake, role="api") as doomed:
        while (await server.get(key))["status"] == "in_progress":
            await abandoned.sweep(server.database, house.uuid_of(key))
            job = await abandoned.claim(server.database, house.uuid_of(key), dead)
            asked = len(fake.requests)
            task = asyncio.create_task(doomed.process.executor.run_job(job))
            while len(fake.requests) == asked and not task.done():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.15)
            if not task.done():
                deaths += 1
                task.cancel()
                await asyncio.wait([task])
            assert deaths < 8, "it would never end"
    got = await server.get(key)
    assert got["status"] == "failed"
    assert got["error"]["code"] == "worker_lost"
    assert (await server.read(key))[-1].kind == "error"
    assert await house.rows(server.database, "jobs") == 0


async def test_the_operator_says_how_many_deaths_are_too_many(
    server: Server, database_url: str, fake
):
    async with house.opened(database_url, fake, role="api", worker={"max_attempts": 2}) as strict:
        key = await abandoned.leave(strict, fake, given="hi")
    async with server.database.hot() as connection:
        await connection.execute("update jobs set attempt = 2")
    async with worker(database_url, fake):
        got = await abandoned.ended(server, key)
    assert got["status"] == "failed"
    assert fake.requests == []


# ---- ruling R10


@pytest.mark.parametrize("half", [[], [TextDelta("Half")]])
async def test_a_run_of_a_dead_owner_is_cancelled_by_who_was_asked(
    server: Server, fake, half: list
):
    dead = await abandoned.dead_worker(server.database, silent_for=timedelta(0))
    key = await abandoned.leave(server, fake, owner=dead, shown=half)
    async with asyncio.timeout(30):
        status, got = await server.call("POST", f"interactions/{key}/cancel")
    assert (status, got["status"]) == (200, "cancelled")
    assert [house.text_of(s["content"]) for s in got["steps"][1:]] == ["Half"] * len(half)
    assert await house.rows(server.database, "jobs") == 0
    frames = await server.read(key)
    assert [f.data["status"] for f in frames if f.kind == "interaction.status_update"] == [
        "in_progress",
        "cancelled",
    ]
    assert fake.requests == []


async def test_a_run_in_another_process_is_cancelled_there(server: Server, database_url: str, fake):
    fake.replies.append(house.reply(*"Half of it, then more", gap_s=0.1))
    async with house.opened(database_url, fake, role="api") as owner:
        body = {"model": house.MODEL, "input": "hi", "stream": True}
        async with owner.stream("interactions", body) as frames:
            seen = await frames.until(lambda f: f.kind == "step.delta")
            key = seen[0].data["interaction"]["id"]
            async with asyncio.timeout(30):
                status, got = await server.call("POST", f"interactions/{key}/cancel")
            seen += await frames.rest()
        await house.eventually(lambda: is_idle(fake))
    assert (status, got["status"]) == (200, "cancelled")
    assert shown(seen) == without_errors(got["steps"][1:])
    assert seen[-1].data["interaction"]["status"] == "cancelled"


async def is_idle(fake) -> bool:
    return fake.open == 0


async def test_a_cancelled_run_that_ends_slowly_is_passed_to_nobody(
    server: Server, database_url: str, fake, monkeypatch
):
    """As with a command that does not let itself be killed: many beats of all processes long."""
    interrupt = Run.interrupt
    ended = []

    async def slowly(self: Run, why: str) -> None:
        await asyncio.sleep(1.5)
        await interrupt(self, why)
        ended.append(await house.rows(server.database, "jobs"))

    monkeypatch.setattr(Run, "interrupt", slowly)
    dead = await abandoned.dead_worker(server.database, silent_for=timedelta(0))
    key = await abandoned.leave(server, fake, owner=dead, shown=[TextDelta("Half")])
    async with worker(database_url, fake), asyncio.timeout(30):
        with capture_logs() as log:
            answers = await asyncio.gather(
                *(server.call("POST", f"interactions/{key}/cancel") for _ in range(3))
            )
    assert [(s, a.get("status")) for s, a in answers] == [(200, "cancelled")] * 3
    assert ended == [1]
    assert not [line for line in log if line["event"] in {"job.unowned", "job.stopped"}]
    assert fake.requests == []


async def test_cancels_at_once_all_get_an_answer(server: Server, database_url: str, fake):
    dead = await abandoned.dead_worker(server.database, silent_for=timedelta(0))
    async with house.opened(database_url, fake, role="api") as other:
        for number in range(3):
            key = await abandoned.leave(
                server, fake, owner=dead, given=f"{number}", shown=[TextDelta("Half")]
            )
            answers = await asyncio.gather(
                *(
                    place.call("POST", f"interactions/{key}/cancel")
                    for place in (server, other, server, other)
                )
            )
            assert [(s, a.get("status")) for s, a in answers] == [(200, "cancelled")] * 4
            assert len((await server.get(key))["steps"]) == 2


async def test_cancel_and_delete_at_once_leave_nothing_running(server: Server, fake):
    dead = await abandoned.dead_worker(server.database, silent_for=timedelta(0))
    key = await abandoned.leave(server, fake, owner=dead)
    answers = await asyncio.gather(
        server.call("POST", f"interactions/{key}/cancel"),
        server.call("DELETE", f"interactions/{key}"),
    )
    assert {status for status, _ in answers} <= {200, 404}
    assert await house.rows(server.database, "jobs") == 0


# ---- ruling R7


async def kill_backends(url: str) -> None:
    connection = await postgres.asyncpg.connect(url)
    await connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid()"
    )
    await connection.close()


async def test_lost_connections_do_not_double_or_lose_a_step(database_url: str, fake):
    fake.default = lambda received: house.reply(*(f"{n} " for n in range(10)), gap_s=0.04)
    async with house.opened(database_url, fake, worker={"dead_after": 5}) as server:
        streams = [asyncio.create_task(server.streamed(f"s{n}")) for n in range(6)]
        await house.eventually(lambda: has_asked(fake, 6))
        for _ in range(3):
            await kill_backends(database_url)
            await asyncio.sleep(0.12)
        for stream in streams:
            frames = await stream
            assert house.texts(frames) == "".join(f"{n} " for n in range(10))
            got = await ready(server, frames[0].data["interaction"]["id"])
            assert shown(frames) == without_errors(got["steps"][1:])
            assert got["status"] == "completed"
        assert await house.rows(server.database, "jobs") == 0
        assert await house.rows(server.database, "spend") == 6
    assert len(fake.requests) == 6


async def ready(server: Server, key: str) -> Json:
    """Read an interaction, as a client that tries again after a 503."""
    for _ in range(30):
        status, got = await server.call("GET", f"interactions/{key}")
        if status == 200:
            return got
        assert status == 503
    raise AssertionError("still no answer")


async def test_after_an_outage_the_first_request_already_works(server: Server, database_url: str):
    """Every pooled connection is dead: that is found out once, not once for each."""
    answer = await server.create("x")
    await asyncio.gather(*(server.get(answer["id"]) for _ in range(30)))
    await kill_backends(database_url)
    statuses = [(await server.call("GET", f"interactions/{answer['id']}"))[0] for _ in range(12)]
    assert statuses.count(503) <= 1, statuses


@pytest.mark.timeout(90)
async def test_the_database_is_killed_in_the_middle_of_runs(fake):
    """kill -9 of the postmaster: it comes back, and the runs end as if nothing had been."""
    fake.default = slow_echo
    async with durable_cluster() as own:
        url = own.url
        database = house.Database(url, pool_size=2)
        await house_migrate(database)
        async with house.opened(url, fake, worker={"dead_after": 3}) as server:
            creating = [asyncio.create_task(server.call(*post(f"c{n}"))) for n in range(4)]
            streams = [asyncio.create_task(server.streamed(f"s{n}")) for n in range(4)]
            await house.eventually(lambda: has_asked(fake, 8))
            postgres.os.kill(own._server.pid, postgres.SIGKILL)
            for number, stream in enumerate(streams):
                frames = await stream
                assert house.texts(frames).endswith(f"re: s{number}")
                got = await ready(server, frames[0].data["interaction"]["id"])
                assert shown(frames) == without_errors(got["steps"][1:])
                assert house.answer(got) == f"re: s{number}"
            await asyncio.gather(*creating)
            await house.eventually(lambda: none_runs(server), within_s=15)
            async with server.database.hot() as connection:
                rows = await connection.fetch(
                    "select i.id, i.status, count(*) from interactions i join steps using "
                    "(segment_id, depth) group by 1, 2"
                )
            assert len(rows) == 8
            assert {row[1] for row in rows} == {"completed"}
            assert await house.rows(server.database, "spend") == 8
        await database.close()


@asynccontextmanager
async def durable_cluster() -> AsyncGenerator[postgres.EmbeddedPostgres]:
    """Unlike the quick cluster of the other tests, it keeps what it has committed."""
    with postgres.scratch() as home:
        server = postgres.EmbeddedPostgres(
            home, settings={"fsync": "off"}, system_folder=home / "system"
        )
        async with server:
            yield server


def post(given: str) -> tuple[str, str, Json]:
    return "POST", "interactions", {"model": house.MODEL, "input": given}


def slow_echo(received: Received) -> Reply:
    words = f"re: {house.said(received)[-1][1]}"
    return house.reply(*words, gap_s=0.15)


async def has_asked(fake, count: int) -> bool:
    return len(fake.requests) >= count


async def none_runs(server: Server) -> bool:
    try:
        return await house.rows(server.database, "jobs") == 0
    except LOST:
        return False


async def house_migrate(database) -> None:
    from openinteractions.db import migrate  # noqa: PLC0415 - only here

    await migrate.upgrade(database)
