"""The tab that an action is for, and what happens in it meanwhile."""

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from openinteractions.tools.browser.inside import chromium
from openinteractions.tools.browser.inside.cdp import Connection, Json, Late, Refused

DOWNLOADS = Path("/workspace/downloads")

_TIME_S = 80.0
_ANSWER_S = 5.0
_RESCUE_S = 6.0
_BUSY_S = 8.0
"""A page is given so long to come to rest before the script that it runs is stopped."""
_CHATTER_S = 4.0
"""So long a loaded page is waited for that asks its server again and again, or for an answer."""
_DOWNLOAD_S = 45.0
_MAX_TABS = 6
_MAX_NAVIGATIONS = 10
_MAX_NOTES = 8
_MAX_REFS = 4000
_STATE = chromium.FOLDER / "state.json"
_ENDLESS = frozenset({"WebSocket", "EventSource", "Ping", "Media"})


class Failed(Exception):
    """The action could not be done; the message tells the model what to do next."""


class Hung(Exception):
    """The page's scripts leave no time for anything else."""


class Crashed(Exception):
    """The page's process has ended."""


class Known:
    """What is remembered from action to action, while one browser runs."""

    def __init__(self) -> None:
        found: Json = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(_STATE.read_text())
        identity = chromium.identity()
        if found.get("browser") != identity:
            # Numbers go on, so that one of an earlier browser never means something else.
            found = {"browser": identity, "next": found.get("next", 1)}
        self.tabs: list[str] = found.get("tabs", [])
        """The last one is current; the one before has opened it."""
        self.refs: dict[str, list[Any]] = found.get("refs", {})
        """By number: frame, its document, the node there, and how it was shown."""
        self.place: tuple[str, int] = tuple(found.get("place", ("", 0)))
        """The document and the offset that were shown last."""
        self._next = int(found.get("next", 1))
        self._numbers = {(ref[1], ref[2]): number for number, ref in self.refs.items()}

    def number(self, frame: str, document: str, node: int, label: str) -> str:
        """An element's number: the same as long as the element is there."""
        number = self._numbers.get((document, node))
        if number is None:
            number = self._numbers[document, node] = str(self._next)
            self._next += 1
        self.refs[number] = [frame, document, node, label]
        return number

    def save(self) -> None:
        """Write it down."""
        kept = {number: self.refs[number] for number in list(self.refs)[-_MAX_REFS:]}
        text = json.dumps(
            {
                "browser": chromium.identity(),
                "tabs": self.tabs,
                "refs": kept,
                "place": self.place,
                "next": self._next,
            }
        )
        fresh = _STATE.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(_STATE)


class Tab:
    """The current tab. Every method may raise Hung, Crashed, and what `Connection.call` does."""

    def __init__(self, connection: Connection, known: Known, *, accepts_dialogs: bool) -> None:
        self.connection = connection
        self.known = known
        self.session = self.id = ""
        self.notes: list[str] = []
        """What happened besides, for the model."""
        self.opened: list[str] = []
        """Tabs that the page has opened during this action."""
        self.downloads: dict[str, Json] = {}
        self._accepts = accepts_dialogs
        self._deadline = time.monotonic() + _TIME_S
        self._requests: dict[str, float] = {}
        self._loading: set[str] = set()
        self._seen: set[str] = set()
        self._last = 0.0
        self._has_crashed = False
        self._navigated = 0

    @property
    def left_s(self) -> float:
        """What there is of this action's time."""
        return max(self._deadline - time.monotonic(), 0.1)

    def call(self, method: str, *, timeout_s: float = _ANSWER_S, **params: Any) -> Json:  # noqa: ANN401 - JSON
        """Ask the tab."""
        return self.connection.call(
            method, self.session, timeout_s=min(timeout_s, self.left_s), **params
        )

    def browser(self, method: str, **params: Any) -> Json:  # noqa: ANN401 - JSON
        """Ask the browser itself."""
        return self.connection.call(method, timeout_s=_ANSWER_S, **params)

    def note(self, text: str) -> None:
        """Tell the model."""
        if len(self.notes) < _MAX_NOTES and text not in self.notes:
            self.notes.append(text)

    def enter(self) -> None:
        """Find the current tab, or make one; others that nobody asked for are closed."""
        self.connection.on_event = self._on_event
        self.browser("Target.setDiscoverTargets", discover=True)
        self.browser(
            "Browser.setDownloadBehavior",
            behavior="allowAndName",
            downloadPath=str(DOWNLOADS),
            eventsEnabled=True,
        )
        pages = self.pages()
        tabs = [tab for tab in self.known.tabs if tab in pages] or pages[:1]
        for page in pages:
            if page not in tabs:
                self.connection.send("Target.closeTarget", targetId=page)
        self.known.tabs = tabs
        self.opened.clear()
        if tabs:
            self.attach(tabs[-1])
        else:
            self.replace()

    def pages(self) -> list[str]:
        """All tabs there are."""
        targets = self.browser("Target.getTargets")["targetInfos"]
        found = [each["targetId"] for each in targets if each["type"] == "page"]
        self._seen.update(found)
        return found

    def attach(self, tab: str) -> None:
        """Make a tab the current one."""
        self.id, self._has_crashed = tab, False
        self._requests.clear()
        self._loading.clear()
        self.session = self.browser("Target.attachToTarget", targetId=tab, flatten=True)[
            "sessionId"
        ]
        for method in ("Page.bringToFront", "Inspector.enable"):
            self.connection.send(method, self.session)
        self.connection.send("Emulation.setFocusEmulationEnabled", self.session, enabled=True)
        asked = [
            self.connection.ask(method, self.session)
            for method in ("Page.enable", "Network.enable")
        ]
        for number in asked:
            try:
                self.connection.answer(number, timeout_s=_ANSWER_S)
            except Late:
                self.rescue()

    def rescue(self) -> None:
        """Stop a script that does not end.

        Raises:
            Hung: It cannot be stopped.
        """
        self._check()
        self.connection.send("Runtime.terminateExecution", self.session)
        self.connection.send("Page.stopLoading", self.session)
        try:
            self.call("Runtime.evaluate", timeout_s=_RESCUE_S, expression="1")
        except (Late, Refused) as error:
            raise Hung from error
        self.note("A script of the page did not end, and was stopped.")

    def replace(self) -> None:
        """Give up the current tab for an empty one."""
        old = self.known.tabs
        fresh = self.browser("Target.createTarget", url="about:blank")["targetId"]
        self._seen.add(fresh)
        for tab in old:
            self.connection.send("Target.closeTarget", targetId=tab)
        self.known.tabs = [fresh]
        self.attach(fresh)

    def follow(self) -> bool:
        """Go to the tab that the page has opened, if it has."""
        pages = self.pages() if self.opened else []
        opened = [tab for tab in self.opened if tab in pages]
        self.opened.clear()
        if not opened:
            return False
        for tab in opened[1:]:
            self.connection.send("Target.closeTarget", targetId=tab)
        self.known.tabs.append(opened[0])
        while len(self.known.tabs) > _MAX_TABS:
            self.connection.send("Target.closeTarget", targetId=self.known.tabs.pop(0))
        self.attach(opened[0])
        self.note('It opened a new tab, which is shown now; "back" returns to the one before.')
        return True

    def leave(self) -> bool:
        """Close the current tab for the one that opened it, if there is one."""
        if len(self.known.tabs) < 2:  # noqa: PLR2004 - this one and the one before
            return False
        self.connection.send("Target.closeTarget", targetId=self.known.tabs.pop())
        self.attach(self.known.tabs[-1])
        return True

    def settle(self, *, quiet_s: float = 0.4, at_most_s: float = 10.0) -> None:
        """Wait until nothing has been loading for a while; a page that never rests is left so."""
        self._last = time.monotonic()
        end = self._last + min(at_most_s, self.left_s)
        sign, before = self._ask_for_a_sign(), self._navigated
        loaded = time.monotonic()
        while (now := time.monotonic()) < end:
            self._check()
            loaded = now if self._loading else loaded
            sign = self._next_sign(sign)
            is_at_rest = self._is_quiet(quiet_s) or now - loaded > _CHATTER_S
            if is_at_rest and not self.connection.is_open(sign[0]):
                return
            if self._navigated - before > _MAX_NAVIGATIONS:
                self.note("The page does not stop going on to other pages; it was stopped.")
                self.connection.send("Page.stopLoading", self.session)
                return
            self.connection.pump(0.05)
        self.note("The page was still loading when this was taken.")

    def take_downloads(self) -> None:
        """Wait for the files that come; give them their names, and report them."""
        end = time.monotonic() + min(_DOWNLOAD_S, self.left_s - 10)
        while time.monotonic() < end and any(map(_is_coming, self.downloads.values())):
            self.connection.pump(0.2)
        for guid, each in self.downloads.items():
            path = DOWNLOADS / guid
            if each.get("state") == "completed" and path.exists():
                named = _free(DOWNLOADS / each["name"])
                path.rename(named)
                self.note(f"Downloaded {named} ({named.stat().st_size} bytes).")
                continue
            self.connection.send("Browser.cancelDownload", guid=guid)
            late = " within the time of one action; fetch it in the sandbox by a command"
            self.note(f"The download of {each['name']} did not end{late}.")

    def _ask_for_a_sign(self) -> tuple[int, float]:
        """A question that every page answers at once, if its scripts let it; and when."""
        number = self.connection.ask("Runtime.evaluate", self.session, expression="1")
        return number, time.monotonic()

    def _next_sign(self, asked: tuple[int, float]) -> tuple[int, float]:
        """Ask again after an answer; stop the script that keeps one from coming."""
        number, at = asked
        if time.monotonic() - at < (_BUSY_S if self.connection.is_open(number) else 1.0):
            return asked
        if self.connection.is_open(number):
            self.rescue()
        return self._ask_for_a_sign()

    def _is_quiet(self, quiet_s: float) -> bool:
        now = time.monotonic()
        if self._loading or now - self._last < quiet_s:
            return False
        return all(now - began > _CHATTER_S for began in self._requests.values())

    def _check(self) -> None:
        if self._has_crashed:
            raise Crashed

    def _on_event(self, name: str, event: Json, session: str) -> None:
        if name.startswith(("Target.", "Browser.", "Inspector.")):
            self._on_browser(name, event, session)
        elif session == self.session:
            self._on_page(name, event)

    def _on_page(self, name: str, event: Json) -> None:
        match name:
            case "Network.requestWillBeSent":
                if event.get("type") in _ENDLESS:
                    return
                self._requests[event["requestId"]] = time.monotonic()
            case "Network.loadingFinished" | "Network.loadingFailed":
                self._requests.pop(event["requestId"], None)
            case "Page.frameStartedLoading":
                self._loading.add(event["frameId"])
            case "Page.frameStoppedLoading" | "Page.frameDetached":
                self._loading.discard(event["frameId"])
            case "Page.frameNavigated":
                self._navigated += "parentId" not in event["frame"]
            case "Page.javascriptDialogOpening":
                self._on_dialog(event)
            case _:
                return
        self._last = time.monotonic()

    def _on_dialog(self, event: Json) -> None:
        kind, said = event.get("type"), str(event.get("message"))[:500]
        accept = self._accepts or kind in ("alert", "beforeunload")
        self.connection.send(
            "Page.handleJavaScriptDialog",
            self.session,
            accept=accept,
            promptText=str(event.get("defaultPrompt") or ""),
        )
        if kind == "beforeunload":
            self.note("The page asked whether to leave it; it was left.")
        elif kind == "alert":
            self.note(f"The page showed an alert: {said!r}")
        else:
            answer = (
                "accepted" if accept else 'dismissed; to accept it, repeat with dialog "accept"'
            )
            self.note(f"The page asked ({kind}): {said!r}. This was {answer}.")

    def _on_browser(self, name: str, event: Json, session: str) -> None:
        match name:
            case "Target.targetCreated":
                info = event["targetInfo"]
                if info["type"] == "page" and info["targetId"] not in self._seen:
                    self._seen.add(info["targetId"])
                    self.opened.append(info["targetId"])
            case "Target.targetCrashed":
                self._has_crashed = self._has_crashed or event["targetId"] == self.id
            case "Inspector.targetCrashed":
                self._has_crashed = self._has_crashed or session == self.session
            case "Browser.downloadWillBegin":
                self.downloads[event["guid"]] = {"name": _safe(event)}
            case "Browser.downloadProgress":
                self.downloads.setdefault(event["guid"], {"name": "download"}).update(event)
            case _:
                pass


def _is_coming(download: Json) -> bool:
    return download.get("state") not in ("completed", "canceled")


def _safe(event: Json) -> str:
    said = str(event.get("suggestedFilename") or unquote(urlsplit(str(event["url"])).path))
    name = re.sub(r"[^\w.()+, -]", "_", os.path.basename(said)).strip(". ")  # noqa: PTH119
    return name[-120:] or "download"


def _free(path: Path) -> Path:
    """The path, or one like it where nothing lies yet."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem} ({number}){path.suffix}")
    return found
