"""The product's worked example, as docs/examples/prices.md has it, on a web of five shops.

The program is run as it is written there. The model is scripted, but knows nothing: what it asks
for and answers follows from what the requests show it.
"""

import contextlib
import csv
import io
import json
import re
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from openinteractions.models.port import Finished, TextDelta, ToolCall
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
from tests.e2e.reading import generated, plain, until
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import KEY, USAGE, Fakes, Server, turn
from tests.e2e.test_callbacks import check
from tests.fakes.shown import declared, result_of, results
from tests.fakes.upstream import Received, Reply
from tests.sandbox.engine import FULL, DockerEngine

DOCUMENT = Path(__file__).parents[2] / "docs" / "examples" / "prices.md"
MODEL = "gemini-3.5-flash"
MODELS = {"acme": MODEL, "anth": "anth/m"}
"""The document's own is an alias here, for an OpenAI-compatible vendor's."""
SLOW_S = 3.0
PRICES = {"Alpha": "199.00", "Beta": "239.00", "Gamma": "189.00", "Delta": "219.90"}
ROWS = [
    {"shop": "Gamma", "price": "189.00", "percent_above": "0.0", "flag": ""},
    {"shop": "Alpha", "price": "199.00", "percent_above": "5.3", "flag": ""},
    {"shop": "Delta", "price": "219.90", "percent_above": "16.3", "flag": "yes"},
    {"shop": "Beta", "price": "239.00", "percent_above": "26.5", "flag": "yes"},
]
"""Without Gamma, whose page needs JavaScript, Delta would not be flagged."""
PLAIN = (
    "<!doctype html><meta charset=utf-8><title>{shop}</title><h1>Espresso machine X100</h1>"
    "<table><tr><th>Article<th>Price<tr><td>X100<td>{price} €<tr><td>Cups<td>9,95 EUR</table>"
)
SCRIPTED = (
    "<!doctype html><meta charset=utf-8><title>Gamma</title><h1>Espresso machine X100</h1>"
    "<p id=price>…</p><script>fetch('/gamma.json').then((answer) => answer.json()).then((made) => {"
    "document.getElementById('price').textContent = `${(made.cents / 100).toFixed(2)} €`; });"
    "</script>"
)

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")


# ---- the shops, and who finds them


def plain_page(shop: str, **more: Any) -> Served:
    return Served(PLAIN.format(shop=shop, price=PRICES[shop]), **more)


@pytest.fixture(scope="module")
def shops() -> Generator[Site]:
    pages = {
        "/alpha": plain_page("Alpha", delay_s=0.2),
        "/beta": plain_page("Beta", delay_s=0.2),
        "/gamma": Served(SCRIPTED),
        "/gamma.json": Served('{"cents": 18900}', "application/json", delay_s=0.2),
        "/delta": plain_page("Delta", delay_s=SLOW_S),
        "/epsilon": Served("<h1>Out of order</h1><p>1.00 €", status=500),
    }
    # By this machine's name: a browser goes to `localhost` without its proxy.
    with serving_site(Site(pages), host=socket.gethostname()) as site:
        yield site


@pytest.fixture(scope="module")
def backend(shops: Site) -> Generator[Searxng]:
    names = ("Alpha", "Beta", "Gamma", "Delta", "Epsilon")
    index = [
        Found(name, f"{shops.url}/{name.lower()}", f"{name} sells the espresso machine X100.")
        for name in names
    ]
    with serving_search(index, delay_s=0.3) as made:
        yield made


@pytest.fixture(scope="module")
def sandboxes(
    upstreams: Fakes, docker_engine: DockerEngine, shops: Site, backend: Searxng
) -> Generator[Server]:
    docker_engine.require(FULL)
    more = f"ports = [{shops.port}]\n" + search_settings(backend)
    more += allowing("127.0.0.0/8", f"{shops.address}/32")
    with serving_sandboxes(
        upstreams, docker_engine, name="prices", image=FULL, more=more, memory=2**30
    ) as running:
        yield running


# ---- the model

QUERIES = ["espresso machine X100 price", "X100 shop"]
CODE = """\
prices = {prices}
cheapest = min(prices.values())
for shop, price in sorted(prices.items(), key=lambda item: item[1]):
    above = (price / cheapest - 1) * 100
    print(f"{{shop}},{{price:.2f}},{{above:.1f}},{{'yes' if above > 15 else ''}}")
"""
PRICE = re.compile(r"([0-9]+\.[0-9]{2}) €")
ROW = re.compile(r"^(\w+),([0-9.]+),([0-9.]+),(yes|)$", re.MULTILINE)


@dataclass
class Notes:
    """What the model has understood of what it was shown."""

    urls: dict[str, str] = field(default_factory=dict[str, str])
    """Shop → page."""
    prices: dict[str, float] = field(default_factory=dict[str, float])
    scripted: list[str] = field(default_factory=list[str])
    """Pages that can be had but show no price."""
    broken: dict[str, str] = field(default_factory=dict[str, str])
    """Shop → what it answered."""


def noted(received: Received) -> Notes:
    notes = Notes()
    for shown in results(received):
        match shown.name:
            case "google_search":
                found = re.findall(
                    r"^\[\d+\] (\S+)\n(?:.*\n)*?<page \w+>\n(\w+)", shown.text, re.MULTILINE
                )
                notes.urls |= {shop: url for url, shop in found}
            case "url_context":
                for page in re.split(r"^\[\d+\] ", shown.text, flags=re.MULTILINE)[1:]:
                    take_page(notes, page)
            case "browser":
                price = PRICE.search(shown.text)
                assert price is not None, shown.text
                notes.prices[shown.text.split()[0]] = float(price[1])
            case _:
                pass
    return notes


def take_page(notes: Notes, page: str) -> None:
    url = page.partition("\n")[0].strip()
    shop = next(name for name, place in notes.urls.items() if place == url)
    if "\nStatus: " in page:
        told = re.search(r"it answered ([0-9]+)", page)
        notes.broken[shop] = told[0] if told else "it cannot be read"
        return
    price = PRICE.search(page)
    if price is None:
        notes.scripted.append(url)
    else:
        notes.prices[shop] = float(price[1])


def shopper(received: Received) -> Reply:
    """The next thing that somebody does who works through the task."""
    done = [shown.name for shown in results(received)]
    notes = noted(received)
    unseen = notes.scripted[done.count("browser") :]
    if "google_search" not in done:
        reply = calls("google_search", queries=QUERIES)
    elif "url_context" not in done:
        reply = calls("url_context", urls=list(notes.urls.values()))
    elif unseen:
        reply = calls("browser", action="open", url=unseen[0])
    elif "code_execution" not in done:
        reply = calls("code_execution", language="python", code=CODE.format(prices=notes.prices))
    else:
        rows = ROW.findall(result_of(received, "code_execution"))
        reply = writes(rows) if "write_file" not in done else told(notes, rows)
    return reply


def writes(rows: list[tuple[str, ...]]) -> Reply:
    lines = ["shop,price,percent_above,flag", *(",".join(row) for row in rows)]
    return calls("write_file", path="/workspace/prices.csv", content="\n".join(lines) + "\n")


def told(notes: Notes, rows: list[tuple[str, ...]]) -> Reply:
    lines = ["| Shop | Price | Above the cheapest | Flag |", "|---|---|---|---|"]
    for shop, price, above, flag in rows:
        said = " more than 15 % |" if flag else " |"
        lines.append(f"| [{shop}]({notes.urls[shop]}) | {price} € | {above} % |{said}")
    broken = ", ".join(f"{shop} ({why})" for shop, why in notes.broken.items())
    lines += ["", f"Not available: {broken}.", "", "The table is in /workspace/prices.csv."]
    return turn(TextDelta("\n".join(lines)), Finished("stop", USAGE))


def calls(name: str, **arguments: Any) -> Reply:
    return turn(ToolCall(f"call_{name}", name, arguments), Finished("tool_calls", USAGE))


# ---- the program


def program() -> tuple[str, str]:
    """The document's program, and what it says comes out."""
    found = re.findall(r"```(python|text)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (code, printed) = (text for _, text in found)
    return code, printed


def ran(server: Server, hook: str, model: str) -> tuple[Any, str]:
    """The interaction that the program has made, and what it has printed."""
    code, _ = program()
    for written, here in (
        ("oi_…", KEY),
        ("http://127.0.0.1:8080", server.url),
        ("https://example.com/hooks/prices", hook),
        (f'"{MODEL}"', f'"{model}"'),
    ):
        assert code.count(written) == 1, written
        code = code.replace(written, here)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(DOCUMENT), "exec"), names)
    finally:
        names["client"].close()
    return names["run"], printed.getvalue()


@pytest.mark.parametrize("vendor", MODELS)
def test_prices_are_compared(
    sandboxes: Server, fakes: Fakes, shops: Site, backend: Searxng, vendor: str
) -> None:
    fakes.all[vendor].default = shopper
    shops.forget()
    backend.forget()
    with receiver() as hook:
        run, printed = ran(sandboxes, hook.url, MODELS[vendor])
        until(lambda: bool(hook.calls))
        time.sleep(0.5)
        (called,) = hook.calls
        payload = check(sandboxes, hook, called)
    assert (run.status, run.errors) == ("completed", None), run
    assert payload["type"] == "interaction.completed"
    assert payload["data"]["id"] == run.id

    assert_printed(printed, shops)
    assert_worked(generated(run), shops)
    (answer,) = (step for step in plain(run.steps) if step["type"] == "model_output")
    assert_cited(answer["content"][0], shops)
    text = run.output_text
    assert "Not available: Epsilon (it answered 500)." in text
    assert text.count("more than 15 %") == 2
    assert run.usage.total_tokens == 6 * USAGE["total_tokens"]

    # Side by side: the searches, and the pages.
    assert sorted(backend.queries) == sorted(QUERIES)
    assert backend.most_at_once == 2
    assert shops.most_at_once >= 3
    asked = sorted(set(shops.asked) - {"/favicon.ico"})
    assert asked == ["/alpha", "/beta", "/delta", "/epsilon", "/gamma", "/gamma.json"]
    names = declared(fakes.all[vendor].requests[0])
    assert {"google_search", "url_context", "browser", "code_execution", "write_file"} <= set(names)


def assert_printed(printed: str, shops: Site) -> None:
    """The program says what its document says that it does; the table is right."""
    _, documented = program()
    lines = printed.replace(shops.url, "http://shops.example").splitlines()
    assert [line.rstrip() for line in lines if line] == [x for x in documented.splitlines() if x]
    table = printed[printed.index("shop,price") :]
    assert list(csv.DictReader(io.StringIO(table.strip()))) == ROWS


def assert_worked(steps: list[dict[str, Any]], shops: Site) -> None:
    """Every step is there, and none has failed but the one that had to."""
    pages = next(step for step in steps if step["type"] == "url_context_result")
    found = {page["url"].rpartition("/")[2]: page for page in pages["result"]}
    assert {name: page["status"] for name, page in found.items()} == {
        "alpha": "success",
        "beta": "success",
        "gamma": "success",
        "delta": "success",
        "epsilon": "error",
    }
    assert "browser" in found["gamma"]["message"]
    assert "189" not in json.dumps(found["gamma"])
    browsed = next(step for step in steps if step.get("name") == "browser" and "result" in step)
    assert f"{shops.url}/gamma (HTTP 200)" in browsed["result"]
    failed = [step["type"] for step in steps if step.get("is_error")]
    assert failed == []


def assert_cited(block: dict[str, Any], shops: Site) -> None:
    """Each row of the table rests on its shop's page."""
    text = block["text"].encode()
    cited = {
        note["url"]: text[note["start_index"] : note["end_index"]].decode()
        for note in block["annotations"]
    }
    assert set(cited) == {f"{shops.url}/{shop.lower()}" for shop in PRICES}
    for shop, price in PRICES.items():
        row = cited[f"{shops.url}/{shop.lower()}"]
        assert row.startswith(f"| [{shop}](")
        assert f"| {price} € |" in row
        assert row.endswith("|")
        assert "\n" not in row
