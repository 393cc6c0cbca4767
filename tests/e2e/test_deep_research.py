"""Deep research through the official client: planned, broad, cited, and always to be stopped."""

import json
import re
import time
from collections.abc import Generator
from typing import Any

import pytest
from google.genai import Client
from google.genai._gaos.lib.compat_errors import BadRequestError

from openinteractions.models.port import Finished, TextDelta, ThoughtDelta, ToolCall
from tests.e2e.localweb import (
    Found,
    Searxng,
    Served,
    Site,
    allowing,
    search_settings,
    serving_search,
    serving_site,
)
from tests.e2e.own import receiver
from tests.e2e.reading import generated, plain, read, until
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import USAGE, Fakes, Server, answer, sdk, turn
from tests.e2e.test_callbacks import check
from tests.fakes.shown import declared, result_of, results, system
from tests.fakes.upstream import Received, Reply
from tests.sandbox.engine import DockerEngine

AGENT = "deep-research-preview-04-2026"
SIBLINGS = ("deep-research-max-preview-04-2026", "deep-research-pro-preview-12-2025")
MODELS = {"acme": "acme/m", "goog": "goog/m", "anth": "anth/claude-sonnet-5"}
QUESTION = "How did battery prices develop?"
PLAN = "1. Look up prices of 2020. 2. Look up prices of 2024. Shall I go ahead?"
QUERIES = ["battery price 2020", "battery price 2024", "Batteriepreise Ursachen"]
YEARS = {"2020": "137", "2024": "115"}
PAGE = (
    "<html><head><title>Preise {year}</title></head><body><h1>Batteries in {year}</h1>"
    "<p>In {year} a pack cost {price} dollars per kWh.</p></body></html>"
)
LINK = re.compile(r"https?://\S+")
PRICE = re.compile(r"In ([0-9]+) a pack cost ([0-9]+) dollars")

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")


@pytest.fixture(scope="module")
def pages() -> Generator[Site]:
    made = {
        f"/{year}": Served(PAGE.format(year=year, price=price), delay_s=0.5)
        for year, price in YEARS.items()
    }
    made["/slow"] = Served(PAGE.format(year="1990", price="9000"), delay_s=60)
    with serving_site(Site(made)) as site:
        yield site


@pytest.fixture(scope="module")
def backend(pages: Site) -> Generator[Searxng]:
    index = [Found(f"Preise {year}", f"{pages.url}/{year}", f"battery {year}") for year in YEARS]
    with serving_search(index, delay_s=0.3) as made:
        yield made


@pytest.fixture(scope="module")
def library(upstreams: Fakes, docker_engine: DockerEngine, backend: Searxng) -> Generator[Server]:
    more = search_settings(backend) + allowing("127.0.0.0/8") + '[agents]\nmodel = "acme/m"\n'
    with serving_sandboxes(upstreams, docker_engine, name="research", more=more) as running:
        yield running


@pytest.fixture(scope="module")
def researcher(library: Server) -> Generator[Client]:
    """A client of a server whose agents can search, read and compute."""
    with sdk(library) as made:
        yield made


@pytest.fixture(autouse=True)
def _unasked(pages: Site, backend: Searxng) -> None:
    pages.forget()
    backend.forget()


def dynamic(vendor: str, **more: Any) -> dict[str, Any]:
    return {"type": "dynamic", "model": MODELS[vendor], **more}


def start(client: Client, *, agent: str = AGENT, **more: Any) -> Any:
    asked: dict[str, Any] = {"agent": agent, "input": QUESTION, "background": True, **more}
    return client.interactions.create(**asked)


def ended(client: Client, interaction_id: str) -> Any:
    until(lambda: client.interactions.get(interaction_id).status != "in_progress", within_s=60)
    return client.interactions.get(interaction_id)


def researched(client: Client, **more: Any) -> Any:
    """A run that has ended."""
    made = start(client, **more)
    assert made.status == "in_progress"
    return ended(client, made.id)


# ---- a model that goes by what it is shown


def calls(*wanted: ToolCall, thought: str | None = None) -> Reply:
    begun = () if thought is None else (ThoughtDelta(thought),)
    return turn(*begun, *wanted, Finished("tool_calls", USAGE))


def scholar(received: Received) -> Reply:
    """Searches where it can, reads what it found, reports what it read."""
    names = declared(received)
    if not names:
        return answer(PLAN)
    done = [shown.name for shown in results(received)]
    if "google_search" in names and "google_search" not in done:
        return calls(ToolCall("c1", "google_search", {"queries": QUERIES}))
    if "url_context" not in done:
        told = result_of(received, "google_search") if "google_search" in done else said(received)
        urls = list(dict.fromkeys(LINK.findall(told)))
        return calls(ToolCall("c2", "url_context", {"urls": urls}))
    return turn(TextDelta(report(result_of(received, "url_context"))), Finished("stop", USAGE))


def said(received: Received) -> str:
    """All that stands in a request, for a model whose vendor searches."""
    return " ".join(re.split(r'["\\]', json.dumps(received.json)))


def report(text: str) -> str:
    lines = ["# Preisentwicklung: Überblick"]
    for page in re.split(r"^\[\d+\] ", text, flags=re.MULTILINE)[1:]:
        price = PRICE.search(page)
        assert price is not None, page
        url = page.partition("\n")[0].strip()
        lines.append(f"Im Jahr {price[1]}: {price[2]} $ je kWh ([Quelle]({url})).")
    return "\n\n".join(lines)


def citations(interaction: Any) -> list[tuple[str, str]]:
    """Each citation of the report: the page's title, and the text that it covers."""
    found: list[tuple[str, str]] = []
    for step in generated(interaction):
        for block in step["content"] if step["type"] == "model_output" else ():
            text = block["text"].encode()
            found += [
                (note["title"], text[note["start_index"] : note["end_index"]].decode())
                for note in block.get("annotations", ())
            ]
    return found


def expected(pages: Site) -> list[tuple[str, str]]:
    return [
        (f"Preise {year}", f"Im Jahr {year}: {price} $ je kWh ([Quelle]({pages.url}/{year})).")
        for year, price in YEARS.items()
    ]


STEPS = [
    "google_search_call",
    "google_search_result",
    "url_context_call",
    "url_context_result",
    "model_output",
]


# ---- what it takes


@pytest.mark.parametrize("agent", [AGENT, *SIBLINGS])
def test_it_runs_in_the_background_only(researcher: Client, agent: str) -> None:
    for more in ({}, {"background": False}, {"stream": True}):
        with pytest.raises(BadRequestError, match="'background'"):
            list(researcher.interactions.create(agent=agent, input=QUESTION, **more))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"response_format": {"type": "object"}}, "response_format"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "function"),
        ({"agent_config": {"type": "antigravity"}}, "agent_config.type"),
        ({"agent_config": {"type": "deep-research", "enable_bigquery_tool": True}}, "bigquery"),
    ],
    ids=["format", "function", "config", "bigquery"],
)
def test_what_it_cannot_do_is_refused(researcher: Client, more: Any, named: str) -> None:
    with pytest.raises(BadRequestError, match=named):
        start(researcher, **more)


# ---- plan, research, follow-up


@pytest.mark.parametrize("vendor", ["acme", "anth"])
def test_a_plan_is_made_then_carried_out_then_asked_about(
    researcher: Client, library: Server, fakes: Fakes, pages: Site, backend: Searxng, vendor: str
) -> None:
    fake = fakes.all[vendor]
    fake.default = scholar
    planned = researched(researcher, agent_config=dynamic(vendor, collaborative_planning=True))
    assert (planned.status, planned.output_text) == ("completed", PLAN), planned
    assert [step["type"] for step in generated(planned)] == ["model_output"]
    (asked,) = fake.requests
    assert "tools" not in asked.json
    assert "this turn is for planning" in system(asked)

    revised = researched(
        researcher,
        input="Leave out the causes.",
        previous_interaction_id=planned.id,
        agent_config=dynamic(vendor, collaborative_planning=True),
    )
    assert revised.output_text == PLAN
    assert "tools" not in fake.requests[-1].json
    assert (pages.asked, backend.asked) == ([], [])

    with receiver() as hook:
        done = researched(
            researcher,
            input="Go ahead.",
            previous_interaction_id=revised.id,
            agent_config=dynamic(vendor, collaborative_planning=False),
            webhook_config={"uris": [hook.url]},
        )
        until(lambda: bool(hook.calls))
        payload = check(library, hook, hook.calls[0])
        time.sleep(0.3)
        assert len(hook.calls) == 1
    assert payload["type"] == "interaction.completed"
    assert payload["data"]["id"] == done.id
    assert (done.status, done.agent) == ("completed", AGENT), done
    assert [step["type"] for step in generated(done)] == STEPS
    assert citations(done) == expected(pages)
    # All queries in one call, and all pages in one: at the same time.
    assert sorted(backend.queries) == sorted(QUERIES)
    assert (backend.most_at_once, pages.most_at_once) == (3, 2)
    first = fake.requests[2]
    assert sorted(declared(first)) == ["code_execution", "google_search", "url_context"]
    assert "that is your plan" in system(first)
    assert PLAN in json.dumps(first.json)
    assert "Leave out the causes." in json.dumps(first.json)

    assert_known_to_others(researcher, fakes, done.id)


def assert_known_to_others(client: Client, fakes: Fakes, interaction_id: str) -> None:
    """A plain model of any vendor knows the report, and what it rests on."""
    for model in ("acme/other", "anth/m", "goog/m"):
        other = fakes.all[model.partition("/")[0]]
        other.default = answer("The one of 2020.")
        after = client.interactions.create(
            model=model, input="Which was dearer?", previous_interaction_id=interaction_id
        )
        assert (after.status, after.output_text) == ("completed", "The one of 2020.")
        shown = json.dumps(other.requests[-1].json, ensure_ascii=False)
        for told in (QUESTION, "Im Jahr 2024: 115 $ je kWh", "a pack cost 137 dollars"):
            assert told in shown
        assert "research agent" not in shown


def test_it_thinks_with_what_its_operator_chose(
    researcher: Client, fakes: Fakes, pages: Site
) -> None:
    fakes.acme.default = scholar
    done = researched(
        researcher, agent_config={"type": "deep-research", "thinking_summaries": "auto"}
    )
    assert done.status == "completed", done
    assert citations(done) == expected(pages)
    # Whoever comes later reads the same.
    replayed = list(researcher.interactions.get(done.id, stream=True))
    steps = read(replayed)
    assert steps == [without_usage(step) for step in generated(done)]
    deltas = [event.delta.type for event in replayed if event.event_type == "step.delta"]
    assert deltas[-1] == "text_annotation_delta"


def without_usage(step: dict[str, Any]) -> dict[str, Any]:
    """A step as a stream builds it up; what it took comes with its end."""
    return {key: value for key, value in step.items() if key not in ("usage", "step_usage")}


def test_gemini_searches_itself_and_reads_with_our_tool(
    researcher: Client, fakes: Fakes, pages: Site, backend: Searxng
) -> None:
    fakes.goog.default = scholar
    urls = " ".join(f"{pages.url}/{year}" for year in YEARS)
    done = researched(researcher, input=f"{QUESTION} {urls}", agent_config=dynamic("goog"))
    assert done.status == "completed", done
    assert [step["type"] for step in generated(done)] == STEPS[2:]
    assert citations(done) == expected(pages)
    names = declared(fakes.goog.requests[0])
    assert sorted(names) == ["code_execution", "googleSearch", "url_context"]
    assert backend.asked == []
    assert "warnings" not in plain(done)


THOUGHT = "First the older prices, then the newer ones."


@pytest.mark.parametrize("vendor", ["goog", "anth"])
def test_thoughts_are_shown_where_they_are_asked_for(
    researcher: Client, fakes: Fakes, pages: Site, vendor: str
) -> None:
    fake = fakes.all[vendor]
    urls = [f"{pages.url}/{year}" for year in YEARS]
    fake.replies.append(calls(ToolCall("c1", "url_context", {"urls": urls}), thought=THOUGHT))
    fake.default = scholar
    done = researched(
        researcher,
        agent_config=dynamic(vendor, thinking_summaries="auto"),
    )
    assert done.status == "completed", done
    thought = generated(done)[0]
    assert thought["type"] == "thought"
    assert thought["summary"] == [{"type": "text", "text": THOUGHT}]
    events = list(researcher.interactions.get(done.id, stream=True))
    deltas = [event.delta for event in events if event.event_type == "step.delta"]
    summaries = [delta.content.text for delta in deltas if delta.type == "thought_summary"]
    assert "".join(summaries) == THOUGHT
    assert asks_for_thoughts(vendor, fake.requests[0])

    fake.requests.clear()
    researched(researcher, agent_config=dynamic(vendor, collaborative_planning=True))
    assert not asks_for_thoughts(vendor, fake.requests[0])


def asks_for_thoughts(vendor: str, received: Received) -> bool:
    if vendor == "goog":
        config = received.json.get("generationConfig", {}).get("thinkingConfig", {})
        return config.get("includeThoughts", False)
    return received.json.get("thinking", {}).get("display") == "summarized"


def test_charts_are_asked_for_where_they_are_wanted(researcher: Client, fakes: Fakes) -> None:
    config = {"type": "deep-research", "visualization": "auto"}
    done = researched(researcher, agent_config=config)
    assert "matplotlib" in system(fakes.acme.requests[-1])
    assert [warning["field"] for warning in done.warnings] == ["agent_config.visualization"]
    researched(researcher, agent_config={**config, "visualization": "off"})
    assert "matplotlib" not in system(fakes.acme.requests[-1])


def test_more_effort_is_another_prompt(researcher: Client, fakes: Fakes) -> None:
    for agent in (AGENT, *SIBLINGS):
        assert researched(researcher, agent=agent).status == "completed"
    standard, most, older = (system(received) for received in fakes.acme.requests)
    assert "5 to 15 rounds" in standard
    assert "20 to 60 rounds" in most
    assert older == standard


# ---- limits and ends


def test_it_says_what_it_works_without(client: Client, fakes: Fakes) -> None:
    """On a server that has neither a search backend nor sandboxes."""
    made = start(client, agent_config=dynamic("acme"))
    done = ended(client, made.id)
    assert done.status == "completed", done
    for interaction in (made, done):
        warned = {warning["field"]: warning["message"] for warning in interaction.warnings}
        assert set(warned) == {"tools.google_search", "tools.code_execution"}
        assert "works without google_search" in warned["tools.google_search"]
        assert "search backend" in warned["tools.google_search"]
    (asked,) = fakes.acme.requests
    assert declared(asked) == ["url_context"]
    assert "google_search" not in system(asked)
    with pytest.raises(BadRequestError, match="search backend"):
        start(client, agent_config=dynamic("acme"), tools=[{"type": "google_search"}])


@pytest.mark.parametrize(("asked", "kept"), [(None, 3600), (7200, 3600), (90, 90)])
def test_it_takes_an_hour_at_most(
    researcher: Client, library: Server, asked: float | None, kept: float
) -> None:
    config = dynamic("acme") if asked is None else dynamic("acme", max_seconds=asked)
    researched(researcher, agent_config=config)
    (row,) = library.fetch("select spec from interactions order by created_at desc limit 1")
    assert json.loads(row[0])["limits"]["max_seconds"] == kept


def test_its_time_is_kept(researcher: Client, fakes: Fakes, pages: Site) -> None:
    slow = {"urls": [f"{pages.url}/slow"]}
    fakes.acme.replies.append(calls(ToolCall("c1", "url_context", slow)))
    began = time.monotonic()
    done = researched(researcher, agent_config=dynamic("acme", max_seconds=1.5))
    assert time.monotonic() - began < 45
    assert done.status == "budget_exceeded"
    assert "max_seconds = 1.5" in done.errors[0].message
    _, found = plain(done.steps)[1:]
    assert found["type"] == "url_context_result"
    assert len(fakes.acme.requests) == 1


def test_it_is_cancelled_while_it_reads(researcher: Client, fakes: Fakes, pages: Site) -> None:
    slow = {"urls": [f"{pages.url}/slow"]}
    fakes.acme.replies.append(calls(ToolCall("c1", "url_context", slow)))
    made = start(researcher, agent_config=dynamic("acme"))
    until(lambda: pages.asked == ["/slow"], within_s=20)
    began = time.monotonic()
    stopped = researcher.interactions.cancel(made.id)
    assert time.monotonic() - began < 45
    assert stopped.status == "cancelled"
    steps = generated(stopped)
    assert [step["type"] for step in steps][:1] == ["url_context_call"]
    assert plain(researcher.interactions.get(made.id)) == plain(stopped)
    # It can be gone on with: nothing of it is left open.
    fakes.acme.replies.append(answer("Then not."))
    after = researcher.interactions.create(
        model="acme/m", input="Never mind.", previous_interaction_id=made.id
    )
    assert (after.status, after.output_text) == ("completed", "Then not.")
