"""The browser, in a real sandbox, on a local web site; hostile pages too."""

import asyncio
import base64
import json
import re
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests import pictures
from tests.broker.stage import Stage, staged
from tests.sandbox.engine import FULL, SLIM, docker
from tests.tools.shop import Shop, shop

from openinteractions import ids
from openinteractions.db.engine import Database
from openinteractions.netguard import Fetcher, Guard
from openinteractions.resources.environments.service import Environments, Rules
from openinteractions.runs.workplace import RemoteWorkplace
from openinteractions.sandbox.egress.policy import Reach
from openinteractions.sandbox.port import Exit
from openinteractions.tools.browser.tool import Browser, page_script, program
from openinteractions.tools.port import Call, Done

MEMORY = 1024 * 2**20


@dataclass
class Seat:
    """Somebody who browses."""

    stage: Stage
    env: UUID
    place: RemoteWorkplace
    site: Shop
    count: int = 0
    took: list[tuple[str, float]] = field(default_factory=list)

    def call(self, key: str, **arguments: Any) -> Call:
        async def begin(note: Any) -> None:
            raise AssertionError

        step = {"type": "function_call", "name": "browser", "arguments": arguments}
        return Call(step=step, key=key, begun=None, begin=begin)

    async def act(self, action: str, *, bad: bool = False, **arguments: Any) -> str:
        """What an action says."""
        step = await self.step(action, **arguments)
        assert step["is_error"] is bad, step["result"]
        return str(step["result"])

    async def step(self, action: str, **arguments: Any) -> dict[str, Any]:
        self.count += 1
        began = time.monotonic()
        call = self.call(f"k{self.count}", action=action, **arguments)
        step = await Browser(self.place).run(call)
        self.took.append((action, time.monotonic() - began))
        print(action, arguments, f"{time.monotonic() - began:.2f}", str(step)[:1500])
        return step

    async def open(self, path: str, **more: Any) -> str:
        return await self.act("open", url=self.site.url + path, **more)

    async def sh(self, script: str) -> str:
        return await self.stage.sh(self.env, script)


def ref(text: str, shown: str) -> int:
    """The number before something that is shown."""
    found = re.search(r"\[(\d+)\] " + re.escape(shown), text)
    assert found is not None, (shown, text)
    return int(found[1])


@pytest.fixture(scope="module")
async def database_url(cluster) -> AsyncGenerator[str]:
    url = await cluster.create(template="template")
    yield url
    await cluster.drop(url)


@pytest.fixture(scope="module")
async def database(database_url) -> AsyncGenerator[Database]:
    opened = Database(database_url, pool_size=5)
    yield opened
    await opened.close()


@pytest.fixture(scope="module")
async def site() -> AsyncGenerator[Shop]:
    async with shop() as made:
        yield made


@pytest.fixture(scope="module")
async def stage(docker_engine, database, database_url, site) -> AsyncGenerator[Stage]:
    docker_engine.require(FULL)
    home = Path(tempfile.mkdtemp(prefix="oi-browser-", dir="/tmp"))
    settings = {
        "OI_SANDBOX__IMAGE": FULL,
        "OI_SANDBOX__MEMORY_BYTES": str(MEMORY),
        "OI_SANDBOX__PORTS": f"[{site.port}, 443]",
        "OI_NETWORK__ALLOW": f'["{site.address}/32"]',
    }
    async with staged(docker_engine, database, database_url, home, **settings) as made:
        await made.start()
        yield made
    shutil.rmtree(home, ignore_errors=True)


def workplace(stage: Stage, env: UUID) -> RemoteWorkplace:
    environments = Environments(
        stage.database,
        stage.client,
        stage.sealer,
        Fetcher(Guard([]), max_bytes=1),
        Rules(ceiling=Reach()),
    )
    return RemoteWorkplace(
        sandboxes=environments, environment_id=env, interaction_id=ids.uuid7(), epoch=1
    )


@pytest.fixture(scope="module")
async def seat(stage: Stage, site: Shop) -> Seat:
    """One environment, and one browser in it, for all tests."""
    host = site.url.split("/")[2].split(":")[0]
    env = await stage.environment(network={"allowlist": [{"domain": host}]})
    return Seat(stage, env, workplace(stage, env), site)


async def test_a_page_is_read_with_numbers(seat: Seat):
    text = await seat.open("/")
    assert text.startswith(f"Shop\n{seat.site.url}/ (HTTP 200)\n")
    assert "# Our shop\n" in text
    assert '[1] link "prices" (/prices)' in text
    assert "- one\n- two bold\n" in text
    assert "never shown" not in text


async def test_what_scripts_bring_is_waited_for(seat: Seat):
    text = await seat.open("/prices")
    assert "| Shop | Price |\n| Alpha | 12.5 € |\n| Beta | 14 € |" in text


async def test_a_link_is_followed_and_back_returns(seat: Seat):
    link = ref(await seat.open("/"), 'link "prices"')
    assert "Alpha" in await seat.act("click", ref=link)
    assert "# Our shop" in await seat.act("back")
    assert "Prices in a tab" in await seat.act("read")


async def test_a_form_is_filled_in(seat: Seat):
    text = await seat.open("/search")
    assert 'input "What" = "old"' in text
    assert 'select "Where" = "Here" of "Here", "Far away"' in text
    assert 'password input "Secret" = "•••"' in text
    assert "hush" not in text
    assert 'button "Later" (disabled)' in text
    assert '= "2026-01-02"' in await seat.act(
        "type", ref=ref(text, 'date input "Since"'), text="2026-01-02"
    )
    await seat.act("select", ref=ref(text, 'select "Where"'), text="far")
    await seat.act("type", ref=ref(text, 'textarea "Remark"'), text="two\nlines ü")
    checked = await seat.act("click", ref=ref(text, 'checkbox "Only new"'))
    assert 'checkbox "Only new" (checked)' in checked
    found = await seat.act("type", ref=ref(text, 'input "What"'), text="new", submit=True)
    assert found.startswith("Found\n")
    for shown in ("q=new", "since=2026-01-02", "where=b", "only=on", "remark=two lines ü"):
        assert shown in found


async def test_a_file_of_the_sandbox_is_given_to_a_page(seat: Seat):
    await seat.sh("printf 12345 >/workspace/a.png")
    text = await seat.open("/search")
    picture = ref(text, 'file input "Picture"')
    assert (await seat.act("type", ref=picture, text="/workspace/a.png")).startswith("a.png 5\n")
    missing = await seat.act("type", ref=picture, text="/workspace/none", bad=True)
    assert "There is no file /workspace/none" in missing


async def test_what_cannot_be_done_says_what_can(seat: Seat):
    text = await seat.open("/search")
    where = ref(text, 'select "Where"')
    assert '"Here", "Far away"' in await seat.act("select", ref=where, text="Mars", bad=True)
    assert 'use "select"' in await seat.act("click", ref=where, bad=True)
    assert 'use "select"' in await seat.act("type", ref=where, text="x", bad=True)
    button = ref(text, 'button "Search"')
    assert "Nothing can be typed" in await seat.act("type", ref=button, text="x", bad=True)
    assert "YYYY-MM-DD" in await seat.act(
        "type", ref=ref(text, 'date input "Since"'), text="tomorrow", bad=True
    )
    assert "no key" in await seat.act("press", text="Any", bad=True)
    assert "needs a ref" in await seat.act("click", bad=True)
    assert "no such action" in await seat.act("dance", bad=True)
    assert "http, https and file" in await seat.act("open", url="chrome://version", bad=True)


async def test_numbers_stay_while_the_element_does_and_are_never_used_again(seat: Seat):
    text = await seat.open("/")
    greet, more = ref(text, 'button "Greet"'), ref(text, 'button "More"')
    grown = await seat.act("click", ref=more)
    assert ref(grown, 'button "Greet"') == greet
    assert ref(grown, 'link "Item 1"') > more
    other = await seat.open("/search")
    assert f"[{greet}]" not in other
    gone = await seat.act("click", ref=greet, bad=True)
    assert f'Element [{greet}] (button "Greet") is not there any more' in gone
    assert "There is no element [99999]" in await seat.act("click", ref=99999, bad=True)


async def test_a_new_tab_is_followed(seat: Seat):
    text = await seat.open("/")
    text = await seat.act("click", ref=ref(text, 'link "Prices in a tab"'))
    assert text.startswith("Prices\n")
    assert "new tab" in text
    assert "Alpha" in text
    assert (await seat.act("back")).startswith("Shop\n")


async def test_dialogs_are_answered_and_told(seat: Seat):
    text = await seat.open("/")
    assert "alert: 'Hello 42'" in await seat.act("click", ref=ref(text, 'button "Greet"'))
    asked = ref(text, 'button "Ask"')
    dismissed = await seat.act("click", ref=asked)
    assert "'Sure?'. This was dismissed" in dismissed
    assert "\nno\n" in dismissed
    accepted = await seat.act("click", ref=asked, dialog="accept")
    assert "\nyes\n" in accepted


async def test_what_only_a_script_makes_clickable_can_be_clicked(seat: Seat):
    text = await seat.open("/")
    assert "opened card" in await seat.act("click", ref=ref(text, 'clickable "A card"'))
    text = await seat.open("/framed")
    text = await seat.act("click", ref=ref(text, 'button "In the shadow"'))
    assert text.startswith("shadow clicked\n")


async def test_frames_belong_to_the_page(seat: Seat):
    text = await seat.open("/framed")
    assert re.search(r"before\n\(frame: Inner\)\ninside \[\d+\] button \"Press\"\n", text)
    assert 'button "pressed"' in await seat.act("click", ref=ref(text, 'button "Press"'))


async def test_what_is_covered_is_clicked_by_script_and_that_is_told(seat: Seat):
    text = await seat.open("/covered")
    text = await seat.act("click", ref=ref(text, 'button "Under"'))
    assert text.startswith("reached\n")
    assert 'it lies under <div> "We use cookies"' in text


async def test_a_status_is_told(seat: Seat):
    text = await seat.open("/none")
    assert "(HTTP 404)" in text
    assert "No such page" in text


async def test_a_slow_page_is_waited_for(seat: Seat):
    assert "at last" in await seat.open("/slow")


async def test_a_page_that_never_stops_asking_its_server_is_shown(seat: Seat):
    text = await seat.open("/chatty")
    assert "talks" in text
    assert "still loading" not in text


async def test_wait_ends_when_the_text_is_there(seat: Seat):
    assert "not yet" in await seat.open("/later")
    began = time.monotonic()
    text = await seat.act("wait", text="there IT is", seconds=20)
    assert "There it is" in text
    assert time.monotonic() - began < 15
    assert "'Mars' did not appear within 0.5" in await seat.act("wait", text="Mars", seconds=0.5)


async def test_a_long_page_is_read_on(seat: Seat):
    text = await seat.open("/tall")
    assert "paragraph 0 " in text
    parts, seen = [text], text
    while (following := re.search(r'"read" with offset (\d+) goes on', seen)) is not None:
        seen = await seat.act("read", offset=int(following[1]))
        parts.append(seen)
    whole = "\n".join(parts)
    assert all(whole.count(f"paragraph {number} ") == 1 for number in range(300))
    assert len(parts) > 3
    # What an action shows begins where was read last.
    assert "paragraph 299" in await seat.act("scroll", ref=ref(seen, 'link "last link"'))
    assert (await seat.act("click", ref=ref(seen, 'link "last link"'))).startswith("Shop\n")


async def test_the_wheel_turns(seat: Seat):
    assert re.search(r"In sight: 0-900 of \d+ pixels", await seat.open("/tall"))
    assert "In sight: 700-1600" in await seat.act("scroll")
    assert "In sight: 0-900" in await seat.act("scroll", direction="up")
    assert "In sight: 0-900" not in await seat.act("press", text="End")


async def test_a_screenshot_is_a_picture(seat: Seat):
    await seat.open("/tall")
    step = await seat.step("screenshot")
    text, image = step["result"]
    assert text["text"].startswith("Tall\n")
    assert image["type"] == "image"
    picture = base64.b64decode(image["data"])
    assert size(picture) == (1280, 900)
    whole = await seat.step("screenshot", full_page=True)
    picture = base64.b64decode(whole["result"][1]["data"])
    assert 1900 < size(picture)[1] <= 2000
    assert "made smaller" in whole["result"][0]["text"]
    assert len(picture) <= 1_500_000


def size(jpeg: bytes) -> tuple[int, int]:
    found = re.search(rb"\xff[\xc0-\xc2]..\x08(..)(..)", jpeg, re.DOTALL)
    assert found is not None
    return int.from_bytes(found[2], "big"), int.from_bytes(found[1], "big")


async def test_downloads_land_in_the_workspace(seat: Seat):
    text = await seat.open("/")
    text = await seat.act("click", ref=ref(text, 'link "Download"'))
    assert "Downloaded /workspace/downloads/_.._ev il.csv (8 bytes)" in text
    assert "# Our shop" in text
    assert "_.._ev il (2).csv" in await seat.open("/file.csv")
    assert await seat.sh("cd /workspace/downloads; cat '_.._ev il (2).csv'; ls") == (
        "a,b\n1,2\n_.._ev il (2).csv\n_.._ev il.csv\n"
    )


async def test_blocked_hosts_are_told_with_the_reason(seat: Seat):
    secure = await seat.act("open", url="https://elsewhere.example/a", bad=True)
    assert "(HTTP 403)" in secure
    assert "egress blocked" in secure
    assert "allowlist" in secure
    plain = await seat.act("open", url=f"http://elsewhere.example:{seat.site.port}/", bad=True)
    assert "(HTTP 403)" in plain
    assert "allowlist" in plain
    nothing = await seat.act("open", url="http://localhost:9/", bad=True)
    assert "nothing answers there" in nothing


async def test_a_server_and_files_of_the_sandbox_are_reached(seat: Seat):
    await seat.sh("mkdir -p web; echo '<title>Mine</title>own page' >web/index.html")
    await seat.sh("cd web; python3 -m http.server 8000 >/dev/null 2>&1 & sleep 1")
    assert "own page" in await seat.act("open", url="localhost:8000")
    assert "own page" in await seat.act("open", url="file:///workspace/web/index.html")


async def test_the_same_key_acts_once(seat: Seat):
    text = await seat.open("/")
    call = seat.call("twice", action="click", ref=ref(text, 'button "More"'))
    first, again = await asyncio.gather(
        Browser(seat.place).run(call), Browser(workplace_like(seat)).run(call)
    )
    later = await Browser(seat.place).run(call)
    assert first == again == later
    assert 'link "Item 1"' in first["result"]
    now = await seat.act("read")
    assert 'link "Item 1"' in now
    assert "Item 2" not in now


def workplace_like(seat: Seat) -> RemoteWorkplace:
    """Of who has taken the run over."""
    place = workplace(seat.stage, seat.env)
    return RemoteWorkplace(
        sandboxes=place.sandboxes,
        environment_id=place.environment_id,
        interaction_id=seat.place.interaction_id,
        epoch=seat.place.epoch,
    )


# --- hostile pages --------------------------------------------------------------------------------


async def test_a_script_that_does_not_end_is_stopped(seat: Seat):
    text = await seat.open("/loop")
    assert "did not end, and was stopped" in text
    assert "caught" in text
    text = await seat.open("/clickloop")
    text = await seat.act("click", ref=ref(text, 'button "Loop"'))
    assert "did not end, and was stopped" in text
    assert "# Our shop" in await seat.open("/")


async def test_a_huge_page_is_read_in_part(seat: Seat):
    text = await seat.open("/huge")
    assert 'link "n0" (/0) n1 n2' in text
    assert len(text) < 20_000
    assert "goes on" in text
    assert "the bottom" in await seat.open("/deep")


async def test_a_page_that_never_stays_is_left_in_peace(seat: Seat):
    await seat.step("open", url=seat.site.url + "/restless")
    assert "# Our shop" in await seat.open("/")


async def test_a_page_that_wants_to_be_kept_is_left(seat: Seat):
    text = await seat.open("/stay")
    await seat.act("type", ref=ref(text, 'input "Note"'), text="x")
    text = await seat.open("/")
    assert "asked whether to leave it; it was left" in text
    assert "# Our shop" in text


async def test_dialogs_without_end_are_no_end(seat: Seat):
    await seat.step("open", url=seat.site.url + "/alerts")
    assert "# Our shop" in await seat.open("/")


async def test_popups_do_not_pile_up(seat: Seat):
    text = await seat.open("/popups")
    assert "new tab" in await seat.act("click", ref=ref(text, 'button "Pop"'))
    await asyncio.sleep(1)
    await seat.open("/")
    processes = await seat.sh("pgrep -fc type=renderer")
    assert int(processes) < 8


async def test_a_page_that_takes_all_memory_ends_alone(seat: Seat):
    text = await seat.step("open", url=seat.site.url + "/fat")
    # Whichever comes first: the kernel, or our patience with its script.
    assert re.search("crashed|ended, most likely|was stopped|was closed", text["result"])
    assert "# Our shop" in await seat.open("/")


async def test_a_browser_that_was_killed_or_hangs_starts_again(seat: Seat):
    await seat.open("/")
    await seat.sh("pkill -KILL -f [u]ser-data-dir")
    assert "# Our shop" in await seat.open("/")
    assert "no page before" in await seat.act("back", bad=True)
    await seat.sh("pkill -STOP -f [u]ser-data-dir")
    assert "# Our shop" in await seat.open("/")


async def test_a_stopped_action_leaves_a_browser_that_works(seat: Seat):
    tool = Browser(seat.place)
    call = seat.call("stopped", action="wait", seconds=50)
    running = asyncio.ensure_future(tool.run(call))
    await asyncio.sleep(1)
    await tool.stop("stopped")
    step = await asyncio.wait_for(running, 10)
    assert step["is_error"] is True
    assert "# Our shop" in await seat.open("/")


def test_an_image_without_a_browser_says_so(docker_engine):
    container = docker_engine.start(SLIM)
    argv = ("/usr/bin/python3", "-I", "-c", program(), '{"action": "read"}', page_script())
    said = docker("exec", container, *argv).stdout
    docker_engine.remove(container)
    step = Browser(None)._result(done(said))
    assert step["is_error"] is True
    assert "has no browser" in step["result"]


def done(text: str, **end: Any) -> Done:
    return Done(Exit(**{"outcome": "exited", "code": 0, **end}), text)


@pytest.mark.parametrize(
    ("text", "end", "shown"),
    [
        ("Traceback\nOSError: no", {"code": 1}, "driver failed in the sandbox: Traceback"),
        ("", {}, "driver failed"),
        ("[1]", {}, "driver failed"),
        ('{"text": 1}', {}, "driver failed"),
        ('{"text": ' + "[" * 1000 + "]" * 1000 + "}", {}, "driver failed"),
        ("[" * 100_000, {}, "driver failed"),
        ("", {"outcome": "unknown"}, "Outcome unknown"),
        ("", {"outcome": "killed", "timed_out": True}, "took too long"),
    ],
    ids=["traceback", "nothing", "no_object", "number", "deep", "too_deep", "unknown", "late"],
)
def test_what_is_no_answer_is_a_failure(text: str, end: dict[str, Any], shown: str):
    step = Browser(None)._result(done(text, **end))
    assert step["is_error"] is True
    assert shown in step["result"]


JPEG = base64.b64encode(pictures.JPEG).decode()


@pytest.mark.parametrize(
    "image",
    [
        {"data": base64.b64encode(b"<svg>").decode()},
        {"data": JPEG + "!"},
        {"data": JPEG + "é"},
        {"data": base64.b64encode(pictures.JPEG + bytes(2_000_000)).decode()},
        {"data": base64.b64encode(pictures.JPEG[:-9]).decode()},
        {"data": 7},
        "x",
    ],
    ids=["svg", "no_base64", "no_ascii", "too_large", "cut", "number", "string"],
)
def test_what_is_no_picture_is_not_passed_on(image: Any):
    answer = {"text": "t" * 50_000, "image": image}
    step = Browser(None)._result(done(json.dumps(answer)))
    assert step["result"] == "t" * 20_000


def test_a_picture_is_a_block():
    answer = {"text": "seen", "image": {"mime_type": "text/html", "data": JPEG}}
    step = Browser(None)._result(done("noise\n" + json.dumps(answer)))
    assert step == {
        "type": "function_result",
        "name": "browser",
        "is_error": False,
        "result": [
            {"type": "text", "text": "seen"},
            {"type": "image", "mime_type": "image/jpeg", "data": JPEG},
        ],
    }
