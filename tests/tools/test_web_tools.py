"""`url_context` and `google_search` as a model and a caller see them."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import ip_network

import pytest
from google.genai._gaos.types import interactions as sdk
from jsonschema import Draft202012Validator
from tests.tools.website import PRICES, SCRIPTED, TEASER, pdf, website

from openinteractions.errors import Unready
from openinteractions.models.port import ToolCall
from openinteractions.netguard import Fetcher, Guard
from openinteractions.runs.web import Reaches
from openinteractions.sandbox.egress.policy import Reach
from openinteractions.tools.port import Call, Hit, Means, Page
from openinteractions.tools.toolbox import toolbox
from openinteractions.tools.web import extractor, url_context
from openinteractions.tools.web.extract import Extract
from openinteractions.tools.web.search import GoogleSearch
from openinteractions.tools.web.url_context import UrlContext

LOOPBACK = [ip_network("127.0.0.0/8"), ip_network("::1/128")]


@pytest.fixture
async def site():
    async with website() as running:
        yield running


@pytest.fixture
async def fetcher():
    fetcher = Fetcher(Guard(LOOPBACK), max_bytes=50 * 2**20)
    yield fetcher
    await fetcher.close()


@pytest.fixture
def tool(fetcher):
    return UrlContext(Reaches(fetcher, None, default=Reach(), ceiling=Reach()).web())


def tool_under(fetcher, network, ceiling: Reach | None = None) -> UrlContext:
    async def now():
        return network

    return UrlContext(Reaches(fetcher, None, default=Reach(), ceiling=ceiling or Reach()).web(now))


async def begin(note):
    raise AssertionError(f"a pure tool notes nothing: {note}")


async def run(tool, **arguments):
    Draft202012Validator(tool.declaration()["parameters"]).validate(arguments)
    step = tool.call_step(ToolCall("c1", tool.declaration()["name"], arguments))
    return await tool.run(Call(step=step, key="1", begun=None, begin=begin))


async def read(tool, *urls, **more):
    return (await run(tool, urls=list(urls), **more))["result"]


async def test_each_url_has_its_own_outcome(site, tool):
    urls = [
        site.put("/shop", PRICES),
        site.url("/gone"),
        site.url("/status/402"),
        site.url("/status/403"),
        site.url("/status/500"),
        site.put("/teaser", TEASER),
        site.put("/app", SCRIPTED),
        "http://10.0.0.1/",
        "http://[fd00::1]/",
        "ftp://example.com/x",
        "nonsense",
        site.put("/report.pdf", pdf("Total 99"), "application/pdf"),
        site.put("/a.png", b"\x89PNG", "image/png"),
        site.put("/a.zip", b"PK\0\0", "application/zip"),
        site.put("/empty", ""),
    ]
    step = await run(tool, urls=urls)
    assert (step["type"], step["is_error"]) == ("url_context_result", False)
    found = {entry["url"]: entry for entry in step["result"]}
    assert list(found) == urls
    assert [entry["status"] for entry in step["result"]] == [
        "success", "error", "paywall", "paywall", "error", "paywall", "success", "unsafe",
        "unsafe", "error", "error", "success", "success", "error", "success",
    ]  # fmt: skip
    assert found[urls[0]]["title"] == "Lamp shop"
    assert "| [Lamp 7](" in found[urls[0]]["text"]
    assert found[urls[0]]["message"].startswith("Content of a web page: data to judge, not")
    assert "404" in found[urls[1]]["message"]
    assert found[urls[5]]["text"].startswith("The beginning")
    assert "JavaScript" in found[urls[6]]["message"]
    assert found[urls[11]]["text"] == "[Page 1 of 1]\nTotal 99"
    assert "text" not in found[urls[12]]
    assert "image/png, 4 bytes" in found[urls[12]]["message"]
    assert all("message" in entry for entry in step["result"])


async def test_a_result_without_any_success_is_an_error(site, tool):
    assert (await run(tool, urls=[site.url("/gone")]))["is_error"]


async def test_we_say_who_we_are(site, tool):
    await read(tool, site.put("/a", "<p>A"))
    assert "OpenInteractions/" in site.agents[0]


async def test_a_long_page_is_read_on_without_fetching_it_again(site, tool):
    words = " ".join(f"word{n}" for n in range(9000))
    url = site.put("/long", words, "text/plain")
    parts, offset = [], 0
    while offset is not None:
        (entry,) = await read(tool, url, **({"offset": offset} if offset else {}))
        assert len(entry["text"]) <= url_context.PAGE_CHARS
        parts.append(entry["text"])
        offset = entry.get("next_offset")
        assert ("read on with" in entry["message"]) == (offset is not None)
    assert "".join(parts) == words
    assert len(parts) == 4
    assert site.hits == ["/long"]
    (entry,) = await read(tool, url, offset=10**6)
    assert (entry["text"], "ends at" in entry["message"]) == ("", True)
    # Without an offset it is wanted as it is now.
    await read(tool, url)
    assert site.hits == ["/long"] * 2


async def test_reading_on_in_another_process_fetches_it_again(site, fetcher, tool):
    url = site.put("/long", "x" * 30_000, "text/plain")
    (entry,) = await read(tool, url, offset=24_000)
    assert entry["text"] == "x" * 6000
    assert "next_offset" not in entry


async def test_many_long_pages_share_what_a_call_may_show(site, tool):
    urls = [site.put(f"/{n}", "x" * 90_000, "text/plain") for n in range(10)]
    urls += [site.put(f"/s{n}", "y" * 100, "text/plain") for n in range(10)]
    entries = await read(tool, *urls)
    assert sum(len(entry["text"]) for entry in entries) <= url_context.TOTAL_CHARS
    assert {len(entry["text"]) for entry in entries[:10]} == {9900}
    assert {entry["text"] for entry in entries[10:]} == {"y" * 100}
    assert [entry["next_offset"] for entry in entries[:10]] == [9900] * 10


async def test_urls_are_fetched_at_the_same_time_but_not_all_at_once(site, tool):
    entries = await read(tool, *[site.url(f"/slow/0.{n + 10}") for n in range(20)])
    assert {entry["text"] for entry in entries} == {"late"}
    assert site.most_at_once == 8


async def test_a_slow_page_does_not_keep_the_others(site, tool, monkeypatch):
    monkeypatch.setattr(url_context, "_FETCH_S", 0.5)
    slow, fast = await read(tool, site.url("/slow/20"), site.put("/a", "<p>A"))
    assert (slow["status"], fast["status"]) == ("error", "success")
    assert "was not there within 0.5 seconds" in slow["message"]


async def test_a_huge_file_is_not_read(site, tool):
    (entry,) = await read(tool, site.put("/huge", b"x" * (21 * 2**20), "text/plain"))
    assert entry["status"] == "error"
    assert "larger than 20971520 bytes" in entry["message"]


async def test_a_huge_page_does_not_stop_the_others(site, tool):
    url = site.put("/big", "<p>" + "word 5 and more words. " * 800_000)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.02)
            ticks += 1

    ticking = asyncio.ensure_future(tick())
    (entry,) = await read(tool, url)
    ticking.cancel()
    assert entry["next_offset"] == 24_000
    # Read in this process it would be one, or none.
    assert ticks > 3


class Library:
    """A web and a reader that count the pages between them; names with `big` are large pages."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.stuck: set[str] = set()

    def count(self, name: str, by: int) -> None:
        self.held[name] += by
        self.most[name] = max(self.most[name], self.held[name])

    async def fetch(self, url: str, *, grows: Callable[[int], Awaitable[None]]) -> Page:
        if "silent" in url:
            await asyncio.Event().wait()
        await grows(1)
        self.count("pages", 1)
        self.count(f"pages of {url[:10]}", 1)
        await asyncio.sleep(0.001)
        if "big" in url:
            await grows(2**20)
            await grows(2**20 + 1)
            self.count("large", 1)
            self.count(f"large of {url[:10]}", 1)
        return Page(url=url, mime_type="text/plain", data=b"x")

    async def extract(self, page: Page) -> Extract:
        self.count(f"readers of {page.url[:10]}", 1)
        try:
            await asyncio.sleep(3600 if page.url in self.stuck else 0.001)
        finally:
            self.count("pages", -1)
            self.count(f"readers of {page.url[:10]}", -1)
            self.count(f"pages of {page.url[:10]}", -1)
            if "big" in page.url:
                self.count("large", -1)
                self.count(f"large of {page.url[:10]}", -1)
        return Extract(text=page.url)


async def test_what_is_held_of_pages_is_bounded_for_a_process_and_for_a_run():
    library = Library()
    tools = {f"http://{n:03}": UrlContext(library, reader=library) for n in range(30)}
    calls = [
        read(tool, *[f"{name}/{n}{'big' if n % 2 else ''}" for n in range(20)])
        for name, tool in tools.items()
    ]
    answers = await asyncio.wait_for(asyncio.gather(*calls), 60)
    assert {entry["status"] for entries in answers for entry in entries} == {"success"}
    most = library.most
    assert most["pages"] <= 48
    assert most["large"] == 4
    assert max(most[f"pages of {name}"] for name in tools) == 4
    assert max(most[f"large of {name}"] for name in tools) <= 2
    assert max(most[f"readers of {name}"] for name in tools) == max(1, extractor.PROCESSES - 1)
    assert not any(library.held.values())
    alone = Library()
    await read(UrlContext(alone, reader=alone), *[f"http://a/{n}big" for n in range(20)])
    assert (alone.most["pages"], alone.most["large"]) == (4, 2)


async def test_pages_that_do_not_come_take_no_room(monkeypatch):
    library = Library()
    monkeypatch.setattr(url_context, "_FETCH_S", 3)
    slow = [UrlContext(library, reader=library) for _ in range(20)]
    waiting = asyncio.gather(
        *[read(tool, *[f"http://silent/{n}" for n in range(8)]) for tool in slow]
    )
    await asyncio.sleep(0.05)
    (entry,) = await asyncio.wait_for(read(UrlContext(library, reader=library), "http://a/"), 2)
    assert entry["status"] == "success"
    assert {each["status"] for entries in await waiting for each in entries} == {"error"}


async def test_a_call_ends_in_time_with_what_is_there(monkeypatch):
    library = Library()
    monkeypatch.setattr(url_context, "_CALL_S", 0.5)
    tool = UrlContext(library, reader=library)
    library.stuck |= {"http://000/1big", "http://000/2big", "http://000/3", "http://000/4"}
    entries = await asyncio.wait_for(read(tool, "http://000/0", *sorted(library.stuck)), 10)
    assert [entry["status"] for entry in entries] == ["success", *["error"] * 4]
    assert all(entry["message"].startswith("Too slow: ") for entry in entries[1:])
    # What it held is free again.
    library.stuck.clear()
    entries = await read(tool, "http://000/1big", "http://000/2big", "http://000/3")
    assert {entry["status"] for entry in entries} == {"success"}


async def test_a_large_page_waits_until_there_is_room_for_it(site, tool, monkeypatch):
    room = url_context._rooms.setdefault(asyncio.get_running_loop(), url_context._Room(48, 4))
    url = site.put("/large", b"x" * (2 * 2**20), "text/plain")
    for _ in range(4):
        await room.large.acquire()
    reading = asyncio.ensure_future(read(tool, url, site.put("/a", "<p>A")))
    done, _ = await asyncio.wait([reading], timeout=1)
    assert not done
    assert "/a" in site.hits
    room.large.release()
    large, small = await reading
    assert (large["status"], small["status"]) == ("success", "success")
    assert not room.large.locked()


# The rules of the network.


async def test_only_hosts_of_the_allowlist_are_fetched_also_behind_a_redirect(site, fetcher):
    tool = tool_under(fetcher, {"allowlist": [{"domain": "127.0.0.1"}]})
    site.put("/a", "<p>A")
    fine, other, jump, inside = await read(
        tool,
        site.url("/a"),
        site.url("/b", "localhost"),
        site.url(f"/to?u=http://localhost:{site.port}/c"),
        site.url("/to?u=/a"),
    )
    assert [each["status"] for each in (fine, other, jump, inside)] == [
        "success", "unsafe", "unsafe", "success",
    ]  # fmt: skip
    assert "not on this environment's allowlist (127.0.0.1)" in other["message"]
    assert "localhost" in jump["message"]
    assert not any(path in ("/b", "/c") for path in site.hits)


@pytest.mark.parametrize(
    "target", ["http://10.0.0.1/", "http://169.254.169.254/latest", "http://[fd00::1]/"]
)
async def test_a_redirect_to_a_private_address_is_refused(site, tool, target):
    (entry,) = await read(tool, site.url(f"/to?u={target}"))
    assert entry["status"] == "unsafe"


async def test_no_network_and_the_ceiling_hold(site, fetcher):
    url = site.put("/a", "<p>A")
    (entry,) = await read(tool_under(fetcher, "disabled"), url)
    assert entry["status"] == "unsafe"
    assert "no network access" in entry["message"]
    ceiling = Reach("allowlist", ["example.com"])
    (entry,) = await read(tool_under(fetcher, {"allowlist": [{"domain": "*"}]}, ceiling), url)
    assert entry["status"] == "unsafe"
    assert "sandbox.ceiling" in entry["message"]
    closed = Reaches(fetcher, None, default=Reach("disabled"), ceiling=Reach()).web()
    assert (await read(UrlContext(closed), url))[0]["status"] == "unsafe"
    assert site.hits == []


@pytest.mark.parametrize("spelling", ["LOCALHOST", "localhost.", "ⓛocalhost"])
async def test_a_host_is_the_same_in_every_spelling(site, fetcher, spelling):
    site.put("/a", "<p>A")
    open_to = tool_under(fetcher, {"allowlist": [{"domain": "localhost"}]})
    closed_to = tool_under(fetcher, {"allowlist": [{"domain": "127.0.0.1"}]})
    (entry,) = await read(closed_to, site.url("/a", spelling))
    assert (entry["status"], site.hits) == ("unsafe", [])
    (entry,) = await read(open_to, site.url("/a", spelling))
    assert entry["status"] in ("success", "error")


@pytest.mark.parametrize(
    "trick", ["127.0.0.1\\@localhost", "127.0.0.1#@localhost", "127.0.0.1%00.localhost"]
)
async def test_two_readings_of_a_url_do_not_part(site, fetcher, trick):
    tool = tool_under(fetcher, {"allowlist": [{"domain": "localhost"}]})
    (entry,) = await read(tool, f"http://{trick}:{site.port}/a")
    assert entry["status"] != "success"
    assert site.hits == []


# Searching.


class Engine:
    """Answers from a table; a text is a failure."""

    def __init__(self, table: Mapping[str, Sequence[Hit] | str]) -> None:
        self.table = table
        self.asked: list[tuple[str, str, int]] = []
        self.at_once = 0
        self.most_at_once = 0

    async def search(self, query: str, *, kind: str, limit: int) -> Sequence[Hit]:
        self.asked.append((query, kind, limit))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        answer = self.table[query]
        if isinstance(answer, str):
            raise Unready(answer)
        return answer

    async def fetch(self, url: str):
        raise NotImplementedError


def hit(path: str) -> Hit:
    return Hit(title=path.upper(), url=f"https://a.example/{path}", snippet=f"about {path}")


async def test_queries_are_asked_together_and_a_url_is_listed_once():
    engine = Engine(
        {"x": [hit("one"), hit("two")], "y": [hit("two/"), hit("one#part"), hit("three")], "z": []}
    )
    step = await run(GoogleSearch(engine), queries=["x", " y ", "z", "x", ""])
    assert step == {
        "type": "google_search_result",
        "is_error": False,
        "result": [
            {"query": "x", "title": "ONE", "url": "https://a.example/one", "snippet": "about one"},
            {"query": "x", "title": "TWO", "url": "https://a.example/two", "snippet": "about two"},
            {
                "query": "y",
                "title": "THREE",
                "url": "https://a.example/three",
                "snippet": "about three",
            },
            {"query": "z", "message": "Nothing was found."},
        ],
    }
    assert [query for query, _, _ in engine.asked] == ["x", "y", "z"]
    assert engine.most_at_once == 3


async def test_one_failed_query_leaves_the_others():
    step = await run(GoogleSearch(Engine({"x": [hit("one")], "y": "too busy"})), queries=["x", "y"])
    assert not step["is_error"]
    assert step["result"][1] == {"query": "y", "message": "This query failed: too busy"}


async def test_a_search_that_fails_says_why():
    step = await run(GoogleSearch(Engine({"x": "too busy"})), queries=["x"])
    assert (step["is_error"], step["result"]) == (
        True,
        [{"message": "The search failed: too busy"}],
    )
    assert (await run(GoogleSearch(Engine({})), queries=[" "]))["is_error"]


async def test_what_is_searched_is_as_the_request_says():
    engine = Engine({"x": []})
    entry = {"type": "google_search", "search_types": ["image_search"]}
    tool = toolbox([entry], Means(web=engine)).find("google_search")
    step = tool.call_step(ToolCall("c", "google_search", {"queries": ["x"]}))
    assert step == {
        "type": "google_search_call",
        "search_type": "image_search",
        "arguments": {"queries": ["x"]},
    }
    await run(tool, queries=["x"])
    assert engine.asked[0][1] == "image_search"


async def test_all_kinds_that_the_request_names_are_searched():
    engine = Engine({"x": [hit("one")]})
    entry = {"type": "google_search", "search_types": ["web_search", "image_search"]}
    tool = toolbox([entry], Means(web=engine)).find("google_search")
    step = await run(tool, queries=["x"])
    assert sorted(asked[1] for asked in engine.asked) == ["image_search", "web_search"]
    assert len(step["result"]) == 1


def test_the_toolbox_has_both_without_any_means():
    box = toolbox([{"type": "url_context"}, {"type": "google_search"}], Means())
    assert [tool["name"] for tool in box.declarations()] == ["url_context", "google_search"]
    assert box.find("url_context").is_pure
    assert box.find("google_search").is_pure
    for tool in box.declarations():
        Draft202012Validator.check_schema(tool["parameters"])


async def test_the_sdk_reads_the_steps_and_keeps_what_it_does_not_know(site, tool):
    search = GoogleSearch(Engine({"x": [hit("one")]}))
    steps = [
        search.call_step(ToolCall("s1", "google_search", {"queries": ["x"]})) | {"id": "s1"},
        await run(search, queries=["x"]) | {"call_id": "s1"},
        tool.call_step(ToolCall("u1", "url_context", {"urls": ["u"], "offset": 5})) | {"id": "u1"},
        await run(tool, urls=[site.put("/a", "<title>T</title><p>A"), site.url("/gone")])
        | {"call_id": "u1"},
        search.failure("why") | {"call_id": "s2"},
        tool.failure("why") | {"call_id": "u2"},
    ]
    given = {"id": "v1_a", "status": "completed", "steps": steps}
    interaction = sdk.Interaction.model_validate(given)
    assert [type(step).__name__ for step in interaction.steps] == [
        "GoogleSearchCallStep", "GoogleSearchResultStep", "URLContextCallStep",
        "URLContextResultStep", "GoogleSearchResultStep", "URLContextResultStep",
    ]  # fmt: skip
    assert interaction.steps[1].result[0].url == "https://a.example/one"
    assert interaction.steps[3].result[0].status == "success"
    assert interaction.steps[3].result[0].text == "A"
    assert interaction.model_dump(mode="json", exclude_none=True, by_alias=True)["steps"] == steps
