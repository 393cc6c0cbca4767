"""Search backends, each on its own wire; and the network rules that a run's web obeys."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pydantic import ValidationError
from structlog.testing import capture_logs
from tests import house

from openinteractions import ids
from openinteractions.errors import Invalid, NotFound, SetupError, Unready
from openinteractions.netguard import Fetcher, Guard, Refused
from openinteractions.process import _search
from openinteractions.runs.search import SearchBackend, SearchOptions
from openinteractions.runs.web import Reaches
from openinteractions.sandbox.egress.policy import Reach
from openinteractions.settings import SearchSettings, Settings
from openinteractions.wire.environments import parse_environment_id

SECRET = "sk-very-secret"
PAGES = [
    {
        "title": "One",
        "url": "https://one.example/a",
        "text": "The <strong>first</strong> &amp; best",
    },
    {"title": "Two", "url": "http://two.example/", "text": "x" * 2000},
    {"title": "Bad", "url": "javascript:alert(1)", "text": "no page"},
    {"title": "Three", "url": "https://three.example/", "text": None},
]


@dataclass
class Engines:
    """All backends in one server, with the fields of the real ones' answers."""

    base: str = ""
    asked: list[web.Request] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    troubles: list[web.Response] = field(default_factory=list)
    """Given first, instead of results."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        if self.troubles:
            return self.troubles.pop(0)
        if request.method == "POST":
            return await self.tavily(request)
        known = {"/search": self.searxng, "/res/v1/web/search": self.brave, "/any": self.any_json}
        return known[request.path](request)

    def searxng(self, request: web.Request) -> web.Response:
        if request.query.get("format") != "json":
            return web.Response(text="<html>", content_type="text/html")
        kind = request.query.get("categories", "general")
        results = [
            {
                "url": page["url"], "title": page["title"], "content": page["text"],
                "engine": "duckduckgo", "parsed_url": ["https", "x", "/", "", "", ""],
                "template": "default.html", "engines": ["duckduckgo"], "positions": [1],
                "score": 1.0, "category": kind,
            }
            for page in PAGES
        ]  # fmt: skip
        return web.json_response(
            {
                "query": request.query["q"], "number_of_results": 0, "results": results,
                "answers": [], "corrections": [], "infoboxes": [], "suggestions": [],
                "unresponsive_engines": [],
            }
        )  # fmt: skip

    def brave(self, request: web.Request) -> web.Response:
        if request.headers.get("X-Subscription-Token") != SECRET:
            return web.json_response({"type": "ErrorResponse"}, status=422)
        if not 1 <= int(request.query["count"]) <= 20:
            return web.json_response({"type": "ErrorResponse"}, status=422)
        results = [
            {
                "type": "search_result", "title": page["title"], "url": page["url"],
                "description": page["text"], "language": "en", "family_friendly": True,
            }
            for page in PAGES
        ]  # fmt: skip
        query = {"original": request.query["q"], "more_results_available": True}
        return web.json_response(
            {"type": "search", "query": query, "web": {"type": "search", "results": results}}
        )

    async def tavily(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {SECRET}":
            return web.json_response({"detail": {"error": "Unauthorized"}}, status=401)
        body = await request.json()
        self.bodies.append(body)
        results = [
            {
                "title": page["title"], "url": page["url"], "content": page["text"], "score": 0.9,
                "raw_content": None,
            }
            for page in PAGES
        ]  # fmt: skip
        return web.json_response(
            {
                "query": body["query"], "answer": None, "images": [], "results": results,
                "follow_up_questions": None, "response_time": 0.5,
            }
        )  # fmt: skip

    def any_json(self, request: web.Request) -> web.Response:
        if request.headers.get("X-Key") != SECRET:
            return web.Response(status=403)
        items = [
            {"name": page["title"], "link": {"href": page["url"]}, "body": page["text"]}
            for page in PAGES
        ]
        return web.json_response({"data": {"items": items, "q": request.query["q"]}})


@pytest.fixture
async def engines() -> AsyncGenerator[Engines]:
    engines = Engines()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", engines.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    engines.base = f"http://127.0.0.1:{listening._server.sockets[0].getsockname()[1]}"
    yield engines
    await runner.cleanup()


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def options(engines: Engines, kind: str, **more: Any) -> SearchOptions:
    """As settings give them."""
    values: dict[str, Any] = {"kind": kind, "url": engines.base, "api_key": SECRET, **more}
    if kind == "json":
        values |= {
            "url": engines.base + "/any?q={query}&n={limit}", "key_header": "X-Key",
            "results_field": "data.items", "title_field": "name", "url_field": "link.href",
            "snippet_field": "body",
        }  # fmt: skip
    found = _search(SearchSettings.model_validate(values))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["searxng", "brave", "tavily", "json"])
async def test_every_backend_gives_the_same_hits(engines, session, kind):
    backend = SearchBackend(options(engines, kind), session)
    hits = await backend.search("lamps & <prices>/ä", kind="web_search", limit=20)
    assert [(hit.title, hit.url) for hit in hits] == [
        ("One", "https://one.example/a"),
        ("Two", "http://two.example/"),
        ("Three", "https://three.example/"),
    ]
    assert hits[0].snippet == "The first & best"
    assert len(hits[1].snippet) == 800
    assert hits[2].snippet == ""
    (request,) = engines.asked
    sent = engines.bodies[0]["query"] if kind == "tavily" else request.query["q"]
    assert sent == "lamps & <prices>/ä"


@pytest.mark.parametrize("kind", ["searxng", "brave", "tavily", "json"])
async def test_the_operator_bounds_the_results(engines, session, kind):
    backend = SearchBackend(options(engines, kind, results=2), session)
    assert len(await backend.search("x", kind="web_search", limit=20)) == 2
    assert len(await backend.search("x", kind="web_search", limit=1)) == 1
    if kind == "tavily":
        assert [body["max_results"] for body in engines.bodies] == [2, 1]
    if kind == "json":
        assert [request.query["n"] for request in engines.asked] == ["2", "1"]


async def test_pictures_are_searched_where_the_backend_can(engines, session):
    backend = SearchBackend(options(engines, "searxng"), session)
    await backend.search("x", kind="image_search", limit=5)
    await backend.search("x", kind="web_search", limit=5)
    assert [one.query["categories"] for one in engines.asked] == ["images", "general"]
    with pytest.raises(Invalid, match=r"\(brave\) has no image_search"):
        await SearchBackend(options(engines, "brave"), session).search(
            "x", kind="image_search", limit=5
        )


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_backend_in_trouble_is_asked_once_more(engines, session, status):
    backend = SearchBackend(options(engines, "searxng"), session)
    engines.troubles = [web.Response(status=status, headers={"Retry-After": "0"})]
    assert len(await backend.search("x", kind="web_search", limit=5)) == 3
    assert len(engines.asked) == 2
    engines.troubles = [web.Response(status=status, headers={"Retry-After": "0"}) for _ in range(3)]
    with pytest.raises(Unready):
        await backend.search("x", kind="web_search", limit=5)
    assert len(engines.troubles) == 1


async def test_it_is_not_waited_for_long(engines, session):
    engines.troubles = [web.Response(status=429, headers={"Retry-After": "3600"})]
    start = time.monotonic()
    with pytest.raises(Unready, match="too often"):
        await SearchBackend(options(engines, "brave"), session).search(
            "x", kind="web_search", limit=5
        )
    assert time.monotonic() - start < 60
    assert len(engines.asked) == 1


async def test_failures_say_what_to_mend_and_no_secret(engines, session):
    for kind, hint in (("tavily", r"search\.api_key"), ("json", r"search\.api_key")):
        wrong = options(engines, kind, api_key="sk-wrong-secret")
        assert "secret" not in repr(wrong)
        with pytest.raises(Unready, match=hint) as caught:
            await SearchBackend(wrong, session).search("x", kind="web_search", limit=5)
        assert "secret" not in caught.value.message
    engines.troubles = [web.Response(status=403)]
    with pytest.raises(Unready, match=r"search\.formats"):
        await SearchBackend(options(engines, "searxng"), session).search(
            "x", kind="web_search", limit=5
        )


async def test_strange_answers_are_no_results_or_a_clear_error(engines, session):
    backend = SearchBackend(options(engines, "searxng"), session)
    for answer in ({"results": []}, {"results": None}, {"results": ["x", {"url": "y"}, {}]}):
        engines.troubles = [web.json_response(answer)]
        assert await backend.search("x", kind="web_search", limit=5) == []
    engines.troubles = [web.Response(text="<html>")]
    with pytest.raises(Unready, match="not JSON"):
        await backend.search("x", kind="web_search", limit=5)
    engines.troubles = [web.Response(body=b" " * (5 * 2**20))]
    with pytest.raises(Unready, match="more than 4194304 bytes"):
        await backend.search("x", kind="web_search", limit=5)
    engines.troubles = [web.Response(status=302, headers={"Location": "/search"})]
    with pytest.raises(Invalid, match="302"):
        await backend.search("x", kind="web_search", limit=5)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ([], "no list of results at 'results'"), ("text", "no list of results at 'results'"),
        ({}, "no list of results at 'results'"), ({"results": {}}, "no list of results"),
        ({"results": ["x", {"url": 5}, {}]}, "no result has a URL at 'url'"),
    ],
)  # fmt: skip
async def test_an_answer_of_another_shape_is_told_and_logged(engines, session, answer, hint):
    engines.troubles = [web.json_response(answer)]
    with capture_logs() as logs, pytest.raises(Unready, match=hint):
        await SearchBackend(options(engines, "searxng"), session).search(
            "x", kind="web_search", limit=5
        )
    assert [(entry["event"], entry["kind"]) for entry in logs] == [("search.misread", "searxng")]


@pytest.mark.parametrize("wrong", [{"results_field": "data.q"}, {"url_field": "href"}])
async def test_wrong_fields_are_told_and_logged(engines, session, wrong):
    backend = SearchBackend(replace(options(engines, "json"), **wrong), session)
    with capture_logs() as logs, pytest.raises(Unready, match=r"settings search\.\*"):
        await backend.search("x", kind="web_search", limit=5)
    assert [entry["event"] for entry in logs] == ["search.misread"]


async def test_a_list_that_is_left_out_is_logged(engines, session):
    wrong = replace(options(engines, "json"), results_field="data.hits")
    with capture_logs() as logs:
        found = await SearchBackend(wrong, session).search("x", kind="web_search", limit=5)
    # Some leave it out where nothing was found.
    assert found == []
    assert [entry["event"] for entry in logs] == ["search.no_list"]


async def test_brave_leaves_the_list_out_where_nothing_was_found(engines, session):
    engines.troubles = [web.json_response({"type": "search", "query": {}})]
    backend = SearchBackend(options(engines, "brave"), session)
    assert await backend.search("x", kind="web_search", limit=5) == []


async def test_a_backend_that_is_away_or_silent(engines, session):
    away = options(engines, "searxng", url="http://127.0.0.1:9")
    with pytest.raises(Unready, match="cannot be reached"):
        await SearchBackend(away, session).search("x", kind="web_search", limit=5)
    brief = SearchOptions(kind="searxng", url=engines.base, timeout=timedelta(microseconds=1))
    with capture_logs() as logs, pytest.raises(Unready, match="in time"):
        await SearchBackend(brief, session).search("x", kind="web_search", limit=5)
    assert [entry["event"] for entry in logs] == ["search.unreachable"]


async def test_without_a_backend_the_reason_is_said():
    fetcher = Fetcher(Guard(), max_bytes=1000)
    reaches = Reaches(fetcher, None, default=Reach(), ceiling=Reach())
    assert reaches.search_types == frozenset()
    with pytest.raises(Invalid, match=r"search\.kind"):
        await reaches.web().search("x", kind="web_search", limit=5)


WRONG = {
    "searxng-url": ({"kind": "searxng"}, "needs search.url"),
    "json-url": ({"kind": "json"}, "needs search.url"),
    "json-query": ({"kind": "json", "url": "http://x/"}, "{query}"),
    "brave-key": ({"kind": "brave"}, "needs search.api_key"),
    "kind": ({"kind": "bing"}, "searxng"),
    "results": ({"results": 21}, "20"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_cannot_work_stop_the_start(case):
    values, hint = WRONG[case]
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"search": values})
    assert hint in str(caught.value)


def test_the_key_can_come_from_the_environment(monkeypatch):
    values = {"kind": "brave", "api_key": "env:SEARCH_KEY_OF_TEST"}
    chosen = SearchSettings.model_validate(values)
    with pytest.raises(SetupError, match="SEARCH_KEY_OF_TEST"):
        chosen.key()
    monkeypatch.setenv("SEARCH_KEY_OF_TEST", SECRET)
    assert chosen.key() == SECRET
    assert _search(chosen).api_key == SECRET
    assert _search(SearchSettings()) is None
    literal = SearchSettings.model_validate({"kind": "brave", "api_key": SECRET})
    assert SECRET not in repr(literal)


async def test_a_run_obeys_its_environments_rules_as_they_are_now(database_url, engines):
    async with house.opened(
        database_url,
        None,
        role="api",
        sandbox={"enabled": "off", "network": {"mode": "disabled"}},
        network={"allow": ["127.0.0.0/8"]},
        search={"kind": "searxng", "url": engines.base},
    ) as server:
        body = {"network": {"allowlist": [{"domain": "127.0.0.1"}]}}
        status, made = await server.call("POST", "environments", body)
        assert status == 200, made
        key = parse_environment_id(made["id"])
        async with server.database.hot() as connection:
            project = await connection.fetchval(
                "select project_id from environments where id = $1", key
            )
        reaches = server.process.executor._house.equipment.web
        run = reaches.web(lambda: server.process.environments.network_of(project, key))
        fine = await run.fetch(f"{engines.base}/search?q=x&format=json")
        assert fine.mime_type == "application/json"
        assert [hit.title for hit in await run.search("x", kind="web_search", limit=2)] == [
            "One",
            "Two",
        ]
        with pytest.raises(Refused, match="allowlist"):
            await run.fetch("http://elsewhere.example/")
        # Without an environment, what the server says holds.
        with pytest.raises(Refused, match="no network access"):
            await reaches.web().fetch(engines.base)
        with pytest.raises(NotFound):
            await server.process.environments.network_of(ids.uuid7(), key)
        change = {"environment_id": made["id"], "network": "disabled"}
        await server.process.environments.resolve(project, change)
        with pytest.raises(Refused, match="no network access"):
            await run.fetch(engines.base)
        status, _ = await server.call("DELETE", f"environments/{made['id']}")
        assert status == 200
        with pytest.raises(NotFound):
            await run.fetch(engines.base)
