"""Background runs through the official client: polled, streamed, cancelled, repeated, deleted."""

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Generator
from typing import Any

import pytest
from google.genai import Client
from google.genai._gaos.lib.compat_errors import (
    APIConnectionError,
    BadRequestError,
    ConflictError,
    NotFoundError,
)
from google.genai.types import HttpOptions

from tests.e2e import wire
from tests.e2e.own import Own, own_server
from tests.e2e.reading import FAST, generated, ids, plain, read, until
from tests.e2e.server import Fakes, Server, answer, sdk
from tests.fakes.upstream import Reply

SLOW = [f"{n} " for n in range(200)]
QUICK_LEASES = {"OI_WORKER__HEARTBEAT": "0.5", "OI_WORKER__DEAD_AFTER": "2"}


@pytest.fixture(scope="module")
def own(upstreams: Fakes) -> Generator[Own]:
    """A server that may be killed."""
    with own_server(upstreams, **QUICK_LEASES) as running:
        yield running


@pytest.fixture
def its_client(own: Own, fakes: Fakes) -> Generator[Client]:
    with sdk(own) as made:
        yield made


def background(client: Client, **request: Any) -> Any:
    return client.interactions.create(
        **{"model": FAST, "input": "Hi", "background": True, **request}
    )


def ended(client: Client, interaction_id: str, *, within_s: float = 20) -> Any:
    found: list[Any] = []

    def look() -> bool:
        found[:] = [client.interactions.get(interaction_id)]
        return found[0].status != "in_progress"

    until(look, within_s=within_s)
    return found[0]


def asked(fakes: Fakes, count: int = 1) -> None:
    until(lambda: len(fakes.acme.requests) >= count)


# ---- the plain way


def test_it_returns_at_once_and_is_polled(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer("Hello", " there", delay_s=0.7))
    made = background(client)
    assert (made.status, made.steps or []) == ("in_progress", [])
    seen = ended(client, made.id)
    assert (seen.status, seen.output_text) == ("completed", "Hello there")
    assert [step["type"] for step in generated(seen)] == ["model_output"]
    assert seen.usage.total_tokens == 12


def test_it_needs_to_be_stored(client: Client, fakes: Fakes) -> None:
    with pytest.raises(BadRequestError, match="store"):
        background(client, store=False)
    assert fakes.acme.requests == []


def test_it_is_streamed_and_taken_up_again(client: Client, fakes: Fakes) -> None:
    words = [f"word{n} " for n in range(20)]
    fakes.acme.replies.append(answer(*words, gap_s=0.05))
    first: list[Any] = []
    with background(client, stream=True) as stream:
        for event in stream:
            first.append(event)
            if len(first) == 6:
                break
    key = first[0].interaction.id
    rest = list(client.interactions.get(key, stream=True, last_event_id=first[-1].event_id))
    steps = read([*first, *rest])
    assert steps[0]["content"] == [{"type": "text", "text": "".join(words)}]
    assert generated(client.interactions.get(key)) == steps
    # Whoever comes later sees the same events, ids and all.
    assert ids(client.interactions.get(key, stream=True)) == ids([*first, *rest])
    assert len(fakes.acme.requests) == 1


def test_one_that_was_not_streamed_can_be_followed_all_the_same(
    client: Client, fakes: Fakes
) -> None:
    fakes.acme.replies.append(answer("Hello", gap_s=0.5))
    made = background(client)
    steps = read(list(client.interactions.get(made.id, stream=True)))
    assert steps == generated(client.interactions.get(made.id))


# ---- cancel and delete


def test_a_running_one_is_cancelled_and_not_waited_for(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*SLOW, gap_s=0.1))
    stream = iter(background(client, stream=True))
    seen = [next(stream) for _ in range(5)]
    key = seen[0].interaction.id
    began = time.monotonic()
    stopped = client.interactions.cancel(key)
    assert time.monotonic() - began < 10
    assert stopped.status == "cancelled"
    until(lambda: fakes.acme.open == 0, within_s=10)
    seen += stream
    assert seen[-1].event_type == "interaction.completed"
    assert seen[-1].interaction.status == "cancelled"
    kept = generated(stopped)[0]["content"][0]["text"]
    assert kept
    assert "".join(SLOW).startswith(kept)
    again = client.interactions.cancel(key)
    assert plain(again) == plain(stopped) == plain(client.interactions.get(key))


def test_one_that_has_ended_stays_as_it_is(client: Client, fakes: Fakes) -> None:
    done = ended(client, background(client).id)
    assert plain(client.interactions.cancel(done.id)) == plain(done)


def test_a_running_one_is_deleted(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*SLOW, gap_s=0.1))
    made = background(client)
    asked(fakes)
    client.interactions.delete(made.id)
    with pytest.raises(NotFoundError):
        client.interactions.get(made.id)
    until(lambda: fakes.acme.open == 0, within_s=2)
    assert len(fakes.acme.requests) == 1


def test_a_running_one_cannot_be_continued(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer(*SLOW, gap_s=0.1))
    made = background(client)
    for continued in (True, False):
        with pytest.raises(BadRequestError, match="in_progress"):
            background(client, previous_interaction_id=made.id, background=continued)
    client.interactions.cancel(made.id)
    follow_up = background(client, previous_interaction_id=made.id)
    assert ended(client, follow_up.id).output_text == "ok"


# ---- the same request again


@pytest.mark.parametrize("is_background", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_key_makes_one_interaction(
    own: Own, its_client: Client, fakes: Fakes, is_background: bool, stream: bool
) -> None:
    key = {"Idempotency-Key": f"once-{is_background}-{stream}"}
    request = {"model": FAST, "input": "Once", "background": is_background, "stream": stream}

    def create(**more: Any) -> tuple[str, Any]:
        made = its_client.interactions.create(**request, **more, extra_headers=key)
        if not stream:
            return made.id, None
        events = list(made)
        return events[0].interaction.id, [plain(event) for event in events]

    first, shown = create()
    assert create() == (first, shown)
    with pytest.raises(ConflictError):
        create(system_instruction="Other")
    ended(its_client, first)
    own.kill()
    own.start()
    assert create() == (first, shown)
    assert len(fakes.acme.requests) == 1


def test_a_lost_create_is_joined_when_the_client_asks_again(own: Own, fakes: Fakes) -> None:
    """Ruling R15: the server dies with the answer, and the SDK asks again without any key."""
    before = listed(own)
    fakes.acme.replies.append(answer(*SLOW, gap_s=0.1))
    fakes.acme.default = answer(*"Here I am", gap_s=0.2)
    made: list[Any] = []

    def insist() -> None:
        # As an application makes it, with the SDK's own retries: they last some seconds, and a
        # start may take longer.
        with Client(api_key=own.key, http_options=HttpOptions(base_url=own.url)) as client:
            while not made:
                with contextlib.suppress(APIConnectionError):
                    made.append(client.interactions.create(model=FAST, input="Lost"))

    asking = threading.Thread(target=insist)
    asking.start()
    asked(fakes)
    own.kill()
    until(lambda: fakes.acme.open == 0)
    own.start()
    asking.join(timeout=60)
    assert made[0].output_text == "Here I am"
    assert listed(own) == [made[0].id, *before]
    assert len(fakes.acme.requests) == 2


def test_two_equal_live_requests_are_two_interactions(
    own: Own, its_client: Client, fakes: Fakes
) -> None:
    before = listed(own)
    fakes.acme.default = answer("Yes", delay_s=0.8)
    made: list[Any] = []
    both = [
        threading.Thread(
            target=lambda: made.append(its_client.interactions.create(model=FAST, input="Twin"))
        )
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(timeout=30)
    assert sorted(listed(own)[: -len(before) or None]) == sorted({one.id for one in made})
    assert len({one.id for one in made}) == 2


def listed(own: Own) -> list[str]:
    page = wire.call(own, "GET", f"{wire.V}/interactions?page_size=100").json()
    return [one["id"] for one in page["interactions"]]


# ---- what dies goes on


def test_a_killed_servers_runs_go_on_after_its_start(
    own: Own, its_client: Client, fakes: Fakes
) -> None:
    fakes.acme.replies.append(answer("Half of", " an answer", stall_after=2))
    fakes.acme.default = answer("Whole")
    stream = iter(background(its_client, stream=True))
    seen = [next(stream) for _ in range(4)]
    own.kill()
    own.start()
    key = seen[0].interaction.id
    rest = its_client.interactions.get(key, stream=True, last_event_id=seen[-1].event_id)
    steps = read([*seen, *rest])
    got = ended(its_client, key)
    assert [step["type"] for step in steps] == [s["type"] for s in generated(got)]
    assert got.output_text == "Whole"


# ---- the operator's view


def test_without_a_worker_a_run_waits_and_is_cancelled(upstreams: Fakes) -> None:
    upstreams.clear()
    with own_server(upstreams, "--no-worker", **QUICK_LEASES) as server, sdk(server) as client:
        unwanted, wanted = background(client), background(client)
        began = time.monotonic()
        assert client.interactions.cancel(unwanted.id).status == "cancelled"
        assert time.monotonic() - began < 30
        assert client.interactions.cancel(unwanted.id).status == "cancelled"
        report = server.run("doctor")
        assert report.returncode == 1, report.stdout + report.stderr
        assert "no worker is alive" in report.stdout
        assert "1 jobs of kind run are queued" in report.stdout
        (row,) = rows_of(server.run("interactions", "list"))
        assert row[:3] == [wanted.id, "default", "queued"]
        server.stop()
        server.start()
        assert ended(client, wanted.id).output_text == "ok"
        assert rows_of(server.run("interactions", "list")) == []
        report = server.run("doctor")
        assert report.returncode == 0, report.stdout + report.stderr
        assert "agents think with Gemini" in report.stdout
        assert "web search: Gemini's own only" in report.stdout
        assert len(upstreams.acme.requests) == 1
        nowhere = "postgresql://postgres@127.0.0.1:9/none"
        report = server.run("doctor", DATABASE_URL=nowhere)
        assert report.returncode == 2, report.stdout + report.stderr
        assert "cannot be" in report.stdout


def rows_of(listing: "subprocess.CompletedProcess[str]") -> list[list[str]]:
    assert listing.returncode == 0, listing.stderr
    header, *rows = listing.stdout.splitlines()
    assert header.split() == ["INTERACTION", "PROJECT", "STATE", "AGE", "WORKER", "DOES"]
    return [row.split() for row in rows]


def test_the_operator_finds_what_hangs_and_ends_it(upstreams: Fakes) -> None:
    upstreams.clear()
    upstreams.acme.replies.append(answer(*SLOW * 30, gap_s=0.1))
    with own_server(upstreams) as server, sdk(server) as client:
        hangs = background(client)
        asked(upstreams)
        metrics = wire.call(server, "GET", "/metrics").body.decode()
        (oldest,) = re.findall(r"^oi_runs_oldest_seconds (\S+)$", metrics, re.MULTILINE)
        assert float(oldest) > 0
        (row,) = rows_of(server.run("interactions", "list"))
        assert row[:3] == [hangs.id, "default", "running"]
        assert "last user_input" in " ".join(row)
        done = server.run("interactions", "cancel", hangs.id)
        assert (done.returncode, done.stdout) == (0, f"{hangs.id} is cancelled\n"), done.stderr
        assert client.interactions.get(hangs.id).status == "cancelled"
        again = server.run("interactions", "cancel", hangs.id)
        assert again.stdout == f"{hangs.id} is cancelled: nothing runs\n"
        for text, why in [("x", "is not the id of"), ("v1_" + "0" * 32, "there is no interaction")]:
            refused = server.run("interactions", "cancel", text)
            assert refused.returncode == 2
            assert why in refused.stderr
    until(lambda: upstreams.acme.open == 0)


def test_metrics_need_a_key_and_count(server: Server, client: Client, fakes: Fakes) -> None:
    ended(client, background(client).id)
    list(client.interactions.create(model=FAST, input="Hi", stream=True))
    assert wire.call(server, "GET", "/metrics", key=None).status == 401
    shown = wire.call(server, "GET", "/metrics")
    assert shown.status == 200
    assert shown.headers["content-type"].startswith("text/plain")
    counted = [line for line in shown.body.decode().splitlines() if not line.startswith("#")]
    for name in (
        'oi_runs_total{status="completed"}',
        'oi_jobs_claimed_total{kind="run"}',
        "oi_events_written_total",
        "oi_model_calls_total{",
        'oi_workers_alive{role="all"}',
    ):
        values = [line for line in counted if line.startswith(name)]
        assert values, (name, counted)
        assert float(values[0].rsplit(" ", 1)[1]) >= 1


def test_what_is_over_is_dropped_and_streams_are_read_from_their_steps(upstreams: Fakes) -> None:
    upstreams.clear()
    brief = {"OI_WORKER__UPKEEP_INTERVAL": "0.5", "OI_EVENT_RETENTION": "3", "OI_RETENTION": "12"}
    with own_server(upstreams, **QUICK_LEASES, **brief) as server, sdk(server) as client:
        words = [f"word{n} " for n in range(10)]
        upstreams.acme.replies.append(answer(*words))
        events = list(background(client, stream=True))
        key = events[0].interaction.id
        until(lambda: server.fetch("select count(*) from events")[0][0] == 0, within_s=20)
        again = list(client.interactions.get(key, stream=True))
        assert read(again) == read(events)
        # A cursor from the log goes on in the steps, in the middle of a text.
        seen = next(n for n, event in enumerate(events) if event.event_type == "step.delta") + 4
        rest = list(
            client.interactions.get(key, stream=True, last_event_id=events[seen - 1].event_id)
        )
        assert read([*events[:seen], *rest]) == read(events)

        def is_gone() -> bool:
            try:
                client.interactions.get(key)
            except NotFoundError:
                return True
            return False

        until(is_gone, within_s=30)
        assert server.fetch("select count(*) from steps")[0][0] == 0


def test_a_hopeless_upstream_fails_the_run(client: Client, fakes: Fakes) -> None:
    fakes.acme.default = Reply(status=500, message="out of order")
    seen = ended(client, background(client).id)
    assert seen.status == "failed"
    assert "out of order" in plain(seen)["errors"][0]["message"]
