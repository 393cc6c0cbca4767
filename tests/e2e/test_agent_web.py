"""Search and pages, for models and agents, through the official client: what is found is cited."""

import json
import re
from collections.abc import Generator
from typing import Any

import pytest
from google.genai import Client
from google.genai._gaos.lib.compat_errors import BadRequestError

from openinteractions.models.port import Annotations, Finished, TextDelta, ToolCall, VendorStep
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
from tests.e2e.reading import generated, plain, read
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import USAGE, Fakes, Server, answer, sdk, turn
from tests.fakes.shown import declared, result_of, system
from tests.fakes.upstream import Received, Reply
from tests.sandbox.engine import DockerEngine

AGENT = "antigravity-preview-09-2026"
MODELS = {"acme": "acme/m", "goog": "goog/m", "anth": "anth/m"}
OURS = ("acme", "anth")
"""Vendors whose models search with the server's backend, and read with its own tool."""
WEB = [{"type": "google_search"}, {"type": "url_context"}]
READ = [{"type": "url_context"}]
KETTLE = (
    "<html><head><title>Nordlicht</title></head><body><h1>Kettle</h1>"
    "<p>The kettle <b>Polaris</b> costs 49.90 euros.</p></body></html>"
)
TEAPOT = (
    "<html><head><title>Südstern</title></head><body><h1>Teapot</h1>"
    "<p>The teapot <b>Canopus</b> costs 31.20 euros.</p></body></html>"
)
PRICE = re.compile(r"costs ([0-9.]+) euros")
LINK = re.compile(r"https?://\S+")

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")


@pytest.fixture(scope="module")
def shops() -> Generator[Site]:
    pages = {"/kettle": Served(KETTLE, delay_s=0.5), "/teapot": Served(TEAPOT, delay_s=0.5)}
    with serving_site(Site(pages)) as site:
        yield site


@pytest.fixture(scope="module")
def backend(shops: Site) -> Generator[Searxng]:
    index = [
        Found("Nordlicht", f"{shops.url}/kettle", "The kettle Polaris."),
        Found("Südstern", f"{shops.url}/teapot", "The teapot Canopus."),
    ]
    with serving_search(index, delay_s=0.3) as made:
        yield made


@pytest.fixture(scope="module")
def web_server(
    upstreams: Fakes, docker_engine: DockerEngine, backend: Searxng
) -> Generator[Server]:
    more = search_settings(backend) + allowing("127.0.0.0/8")
    with serving_sandboxes(upstreams, docker_engine, name="web", more=more) as running:
        yield running


@pytest.fixture(scope="module")
def connected(web_server: Server) -> Generator[Client]:
    """A client of a server that can search, and read this machine's pages."""
    with sdk(web_server) as made:
        yield made


@pytest.fixture(autouse=True)
def _unasked(shops: Site, backend: Searxng) -> None:
    shops.forget()
    backend.forget()


def calls(*wanted: ToolCall) -> Reply:
    return turn(*wanted, Finished("tool_calls", USAGE))


def call(name: str, call_id: str = "call_a", /, **arguments: Any) -> ToolCall:
    return ToolCall(call_id, name, arguments)


# ---- a model that goes by what it is shown


def opens_what_was_found(received: Received) -> Reply:
    urls = list(dict.fromkeys(LINK.findall(result_of(received, "google_search"))))
    return calls(call("url_context", "call_read", urls=urls))


def reports(received: Received) -> Reply:
    """The answer, from the pages: each number with a link to where it stands."""
    told = report_of(result_of(received, "url_context"))
    half = len(told) // 2
    return turn(TextDelta(told[:half]), TextDelta(told[half:]), Finished("stop", USAGE))


def report_of(text: str) -> str:
    pages = re.split(r"^\[\d+\] ", text, flags=re.MULTILINE)[1:]
    lines = ["Größenvergleich: 価格 💶. Nichts davon ist geschätzt."]
    for page in pages:
        url, price = page.split()[0], PRICE.search(page)
        told = "kein Preis" if price is None else f"{price[1]} €"
        lines.append(f"Es kostet {told} ([Seite]({url})). Das ist alles.")
    lines.append("Mehr steht [anderswo](https://elsewhere.example/x).")
    return "\n\n".join(lines)


def citations(step: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    """Each citation of an answer: the page, the text that it covers, and the page's title."""
    (block,) = step["content"]
    text = block["text"].encode()
    return [
        (note["url"], text[note["start_index"] : note["end_index"]].decode(), note.get("title"))
        for note in block.get("annotations", ())
    ]


def expected(shops: Site) -> list[tuple[str, str, str | None]]:
    kettle, teapot = f"{shops.url}/kettle", f"{shops.url}/teapot"
    return [
        (kettle, f"Es kostet 49.90 € ([Seite]({kettle})).", "Nordlicht"),
        (teapot, f"Es kostet 31.20 € ([Seite]({teapot})).", "Südstern"),
    ]


RESEARCH = [
    calls(call("google_search", "call_find", queries=["kettle", "teapot"])),
    opens_what_was_found,
    reports,
]
STEPS = [
    "google_search_call",
    "google_search_result",
    "url_context_call",
    "url_context_result",
    "model_output",
]


@pytest.mark.parametrize("vendor", OURS)
def test_a_model_searches_reads_and_cites(
    connected: Client, fakes: Fakes, shops: Site, backend: Searxng, vendor: str
) -> None:
    fakes.all[vendor].replies += RESEARCH
    done = connected.interactions.create(
        model=MODELS[vendor], input="What do kettles cost?", tools=WEB
    )
    assert done.status == "completed", done
    steps = plain(done.steps)
    assert [step["type"] for step in steps] == STEPS
    assert not done.environment_id
    find, found, ask, pages, said = steps
    assert (find["search_type"], find["arguments"]) == (
        "web_search",
        {"queries": ["kettle", "teapot"]},
    )
    assert found["call_id"] == find["id"]
    assert [(hit["query"], hit["title"]) for hit in found["result"]] == [
        ("kettle", "Nordlicht"),
        ("teapot", "Südstern"),
    ]
    urls = [f"{shops.url}/kettle", f"{shops.url}/teapot"]
    assert (pages["call_id"], ask["arguments"]) == (ask["id"], {"urls": urls})
    assert [(page["url"], page["status"]) for page in pages["result"]] == [
        (url, "success") for url in urls
    ]
    assert citations(said) == expected(shops)
    # At the same time, both.
    assert sorted(backend.queries) == ["kettle", "teapot"]
    assert (backend.most_at_once, shops.most_at_once) == (2, 2)
    assert declared(fakes.all[vendor].requests[0]) == ["google_search", "url_context"]
    assert generated(connected.interactions.get(done.id)) == steps


@pytest.mark.parametrize("vendor", OURS)
def test_a_stream_has_the_same_citations(
    connected: Client, fakes: Fakes, shops: Site, vendor: str
) -> None:
    fakes.all[vendor].replies += RESEARCH
    events = list(
        connected.interactions.create(
            model=MODELS[vendor], input="What do kettles cost?", tools=WEB, stream=True
        )
    )
    steps = read(events)
    assert [step["type"] for step in steps] == STEPS
    assert citations(steps[-1]) == expected(shops)
    last = [e.delta.type for e in events if e.event_type == "step.delta" and e.index == 4]
    assert last == ["text", "text", "text_annotation_delta"]
    stored = connected.interactions.get(events[0].interaction.id)
    assert generated(stored) == steps
    replayed = list(connected.interactions.get(stored.id, stream=True))
    assert citations(read(replayed)[-1]) == expected(shops)


def test_gemini_searches_and_reads_itself(
    connected: Client, fakes: Fakes, shops: Site, backend: Searxng
) -> None:
    find = {"type": "google_search_call", "id": "g", "arguments": {"queries": ["kettle"]}}
    cited = {
        "type": "url_citation",
        "url": "https://elsewhere.example/kettle",
        "title": "Elsewhere",
        "start_index": 0,
        "end_index": 5,
    }
    fakes.goog.replies.append(
        turn(
            VendorStep(find),
            TextDelta("50 €."),
            Annotations([cited]),
            Finished("stop", USAGE),
        )
    )
    done = connected.interactions.create(model="goog/m", input="What do kettles cost?", tools=WEB)
    assert done.status == "completed", done
    assert fakes.goog.requests[0].json["tools"] == [{"googleSearch": {}}, {"urlContext": {}}]
    (said,) = (step for step in plain(done.steps) if step["type"] == "model_output")
    notes = said["content"][0]["annotations"]
    assert [(note["url"], note["title"]) for note in notes] == [(cited["url"], "Elsewhere")]
    assert (backend.asked, shops.asked) == ([], [])


def test_without_a_backend_anthropics_own_search_is_used(client: Client, fakes: Fakes) -> None:
    done = client.interactions.create(
        model="anth/m", input="What do kettles cost?", tools=[{"type": "google_search"}]
    )
    assert done.status == "completed"
    (tool,) = fakes.anth.requests[0].json["tools"]
    assert tool["type"].startswith("web_search_")


def test_without_a_backend_the_answer_says_what_to_do(client: Client, fakes: Fakes) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.interactions.create(model="acme/m", input="What do kettles cost?", tools=WEB)
    for told in ("google_search", "tools[0]", "search backend", "search."):
        assert told in str(refused.value)
    assert fakes.acme.requests == []


@pytest.mark.parametrize("vendor", MODELS)
def test_an_agent_reads_and_cites(
    connected: Client, fakes: Fakes, shops: Site, backend: Searxng, vendor: str
) -> None:
    urls = [f"{shops.url}/kettle", f"{shops.url}/teapot"]
    ours = vendor in OURS
    script = RESEARCH if ours else [calls(call("url_context", urls=urls)), reports]
    fakes.all[vendor].replies += script
    done = connected.interactions.create(
        agent=AGENT,
        input="What do kettles cost?",
        environment="remote",
        agent_config={"type": "antigravity", "model": MODELS[vendor]},
    )
    assert done.status == "completed", done
    steps = plain(done.steps)
    assert [step["type"] for step in steps] == (STEPS if ours else STEPS[2:])
    titles = [title for _, _, title in expected(shops)]
    assert citations(steps[-1]) == expected(shops)
    assert [page["title"] for page in steps[-2]["result"]] == titles
    first = fakes.all[vendor].requests[0]
    names = declared(first)
    assert "url_context" in names
    assert ("google_search" in names, "googleSearch" in names) == (ours, not ours)
    assert "[title or host](URL)" in system(first)
    assert len(backend.queries) == (2 if ours else 0)
    assert generated(connected.interactions.get(done.id)) == steps


RULES: dict[str, tuple[Any, str, str]] = {
    "none": ("disabled", "unsafe", "has no network access"),
    "others": ({"allowlist": [{"domain": "example.com"}]}, "unsafe", "allowlist (example.com)"),
    "this": ({"allowlist": [{"domain": "127.0.0.1"}]}, "success", ""),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("who", ["model", "agent"])
def test_the_environments_rules_hold_for_pages_and_not_for_search(
    connected: Client, fakes: Fakes, shops: Site, backend: Searxng, who: str, rule: str
) -> None:
    network, status, why = RULES[rule]
    fakes.acme.replies += RESEARCH
    asked: dict[str, Any] = {"model": "acme/m"}
    if who == "agent":
        asked = {"agent": AGENT, "agent_config": {"type": "antigravity", "model": "acme/m"}}
    done = connected.interactions.create(
        input="What do kettles cost?",
        tools=WEB,
        environment={"type": "remote", "network": network},
        **asked,
    )
    assert done.status == "completed", done
    _, found, _, pages, said = plain(done.steps)
    assert [hit["title"] for hit in found["result"]] == ["Nordlicht", "Südstern"]
    assert [page["status"] for page in pages["result"]] == [status, status]
    assert all(why in page["message"] for page in pages["result"])
    assert pages.get("is_error", False) is (status == "unsafe")
    assert bool(shops.asked) is (status == "success")
    assert len(backend.queries) == 2
    if status == "unsafe":
        # The model was told, and what a search has found can still be cited.
        assert why in result_of(fakes.acme.requests[-1], "url_context")
        assert "kein Preis" in said["content"][0]["text"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0"])
def test_this_machine_cannot_be_read_unless_its_operator_allows_it(
    client: Client, fakes: Fakes, shops: Site, host: str
) -> None:
    url = f"http://{host}:{shops.port}/kettle"
    fakes.acme.replies += [calls(call("url_context", urls=[url])), answer("It is not public.")]
    done = client.interactions.create(model="acme/m", input="What does it cost?", tools=READ)
    assert done.status == "completed", done
    _, pages, _ = plain(done.steps)
    (page,) = pages["result"]
    assert (page["url"], page["status"], pages["is_error"]) == (url, "unsafe", True)
    assert "not public" in page["message"]
    assert shops.asked == []
    assert "not public" in result_of(fakes.acme.requests[-1], "url_context")


# ---- functions that are loaded when they are needed

PRICES = {
    "type": "function",
    "name": "get_price",
    "description": "The price of an article, of which there are very many.",
    "short_description": "Prices.",
    "parameters": {
        "type": "object",
        "properties": {"article_number": {"type": "string"}},
        "required": ["article_number"],
    },
}
STOCK = {**PRICES, "name": "get_stock", "short_description": "What is in stock."}
LATER = [{**PRICES, "defer_loading": True}, {**STOCK, "defer_loading": True}]


def answered(parked: Any, step: Any, result: Any) -> dict[str, Any]:
    """What goes on with an interaction that waits for a function."""
    return {
        "previous_interaction_id": parked.id,
        "input": [
            {"type": "function_result", "call_id": step.id, "name": step.name, "result": result}
        ],
    }


@pytest.mark.parametrize("vendor", MODELS)
def test_a_model_loads_functions_when_it_needs_them(
    client: Client, fakes: Fakes, vendor: str
) -> None:
    fake = fakes.all[vendor]
    fake.replies += [
        calls(call("tool_search", "c1", function_names=["get_price"])),
        calls(call("get_price", "c2", article_number="7")),
    ]
    asked: dict[str, Any] = {"model": MODELS[vendor], "tools": [*LATER, {"type": "tool_search"}]}
    parked = client.interactions.create(input="What does 7 cost?", **asked)
    assert parked.status == "requires_action"
    search, found, wanted = parked.steps
    assert [step.type for step in parked.steps] == [
        "tool_search_call",
        "tool_search_result",
        "function_call",
    ]
    assert plain(search)["arguments"] == {"function_names": ["get_price"]}
    assert (found.call_id, [f.name for f in found.result]) == (search.id, ["get_price"])
    first, second = fake.requests
    assert declared(first) == ["tool_search"]
    shown = json.dumps(first.json["tools"])
    assert "get_price: Prices." in shown
    assert "get_stock: What is in stock." in shown
    assert "article_number" not in shown
    assert sorted(declared(second)) == ["get_price", "tool_search"]
    assert "article_number" in json.dumps(second.json["tools"])
    fake.replies.append(answer("It costs 5."))
    done = client.interactions.create(**answered(parked, wanted, {"eur": 5}), **asked)
    assert (done.status, done.output_text) == ("completed", "It costs 5.")


def test_a_client_finds_functions_for_a_model(client: Client, fakes: Fakes) -> None:
    finder = {
        "type": "tool_search",
        "execution": "client",
        "name": "find_functions",
        "description": "Finds functions by what they do.",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string"}},
            "required": ["what"],
        },
    }
    fakes.acme.replies.append(calls(call("find_functions", what="prices")))
    asked: dict[str, Any] = {"model": "acme/m", "tools": [LATER[1], finder]}
    parked = client.interactions.create(input="What does 7 cost?", **asked)
    assert parked.status == "requires_action"
    (wanted,) = parked.steps
    assert (wanted.type, wanted.name, wanted.arguments) == (
        "function_call",
        "find_functions",
        {"what": "prices"},
    )
    assert declared(fakes.acme.requests[0]) == ["find_functions"]
    # One that the request never named, and one that it did.
    fakes.acme.replies.append(calls(call("get_price", article_number="7")))
    found = [PRICES, {"type": "function", "name": "get_stock"}]
    parked = client.interactions.create(**answered(parked, wanted, found), **asked)
    assert parked.status == "requires_action"
    names = sorted(declared(fakes.acme.requests[1]))
    assert names == ["find_functions", "get_price", "get_stock"]
    (wanted,) = parked.steps
    assert (wanted.name, wanted.arguments) == ("get_price", {"article_number": "7"})


def test_what_could_never_be_loaded_is_refused(client: Client) -> None:
    for tools, named in ((LATER, "tool_search"), ([{"type": "tool_search"}], "defer_loading")):
        with pytest.raises(BadRequestError, match=named):
            client.interactions.create(model="acme/m", input="Hi", tools=tools)


# ---- consent

DECISIONS: dict[str, tuple[Any, str]] = {
    "approve": ("approve", "49.90"),
    "edit": ({"decision": "edit", "arguments": {"urls": ["{shops}/teapot"]}}, "31.20"),
    "deny": ({"decision": "deny", "reason": "Not that shop."}, "Not that shop."),
}


@pytest.mark.parametrize("decision", DECISIONS)
def test_a_plain_model_asks_before_it_reads(
    connected: Client, fakes: Fakes, shops: Site, decision: str
) -> None:
    result, told = DECISIONS[decision]
    result = json.loads(json.dumps(result).replace("{shops}", shops.url))
    asked: dict[str, Any] = {
        "model": "acme/m",
        "tools": WEB,
        "extra_body": {"limits": {"approve": ["url_context"]}},
    }
    urls = [f"{shops.url}/kettle"]
    fakes.acme.replies += [
        calls(call("google_search", queries=["kettle"])),
        calls(call("url_context", urls=urls)),
    ]
    parked = connected.interactions.create(input="What does it cost?", **asked)
    assert parked.status == "requires_action"
    # What needs no consent has run.
    assert [step.type for step in parked.steps] == [*STEPS[:2], "function_call"]
    wanted = parked.steps[-1]
    assert wanted.name == "approval"
    assert wanted.arguments == {"tool": "url_context", "arguments": {"urls": urls}}
    assert shops.asked == []
    fakes.acme.replies.append(answer("So it is."))
    done = connected.interactions.create(**answered(parked, wanted, result), **asked)
    assert (done.status, done.output_text) == ("completed", "So it is.")
    ran = [] if decision == "deny" else ["url_context_call", "url_context_result"]
    assert [step.type for step in done.steps] == [*ran, "model_output"]
    assert told in json.dumps(fakes.acme.requests[-1].json)
    pages = {"approve": ["/kettle"], "edit": ["/teapot"], "deny": []}
    assert shops.asked == pages[decision]
