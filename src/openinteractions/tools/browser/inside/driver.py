"""The program: one action, then what the page shows, as one line of JSON."""

import contextlib
import fcntl
import json
import sys
import time
from http import HTTPStatus

from openinteractions.tools.browser.inside import chromium, view
from openinteractions.tools.browser.inside.actions import ACTIONS, parse, screenshot
from openinteractions.tools.browser.inside.cdp import Json, Late, Lost, Refused
from openinteractions.tools.browser.inside.tab import DOWNLOADS, Crashed, Failed, Hung, Known, Tab

_LOCK_S = 60.0
_ABSENT = (
    "This sandbox's image has no browser: its operator can set `sandbox.image` to the full image, "
    "which has one."
)
_HUNG = (
    "The page is busy without end, and was closed. Open another page, or fetch this one in another "
    "way."
)
_CRASHED = (
    "The page crashed, most likely because it needs more memory than the sandbox has; it was "
    "closed. Open another page, or fetch this one in another way."
)
_LOST = (
    "The browser ended, most likely because the sandbox has too little memory. It starts again "
    "with the next action: open the page again."
)


def main() -> None:
    """Do what the first argument says; the second is `page.js`."""
    answer: Json = {}
    try:
        answer = _run(parse(sys.argv[1]), sys.argv[2])
    except Failed as error:
        answer = {"text": str(error), "is_error": True}
    except chromium.Absent:
        answer = {"text": _ABSENT, "is_error": True}
    except chromium.Broken as error:
        answer = {"text": f"The browser did not start. {error}", "is_error": True}
    except Lost:
        answer = {"text": _LOST, "is_error": True}
    except OSError as error:
        answer = {"text": f"The browser has no room to work: {error}", "is_error": True}
    sys.stdout.write(json.dumps(answer) + "\n")


def _run(asked: Json, script: str) -> Json:
    chromium.FOLDER.mkdir(parents=True, exist_ok=True)
    with (chromium.FOLDER / "lock").open("w") as lock:
        _lock(lock.fileno())
        with contextlib.suppress(OSError):
            DOWNLOADS.mkdir(parents=True, exist_ok=True)
        connection = chromium.connect()
        known = Known()
        tab = Tab(connection, known, accepts_dialogs=asked.get("dialog") == "accept")
        try:
            return _act(tab, asked, script)
        finally:
            known.save()
            connection.close()


def _lock(fd: int) -> None:
    """One action at a time."""
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise Failed("Another action is still running. Try again later.") from error
            time.sleep(0.05)
        else:
            return


def _act(tab: Tab, asked: Json, script: str) -> Json:
    try:
        _enter(tab, asked)
        return _done(tab, asked, script)
    except (Hung, Late):
        text = _HUNG
    except Crashed:
        text = _CRASHED
    except Refused as error:
        return _said(tab, f'The browser could not do this: {error}. Look with "read".', bad=True)
    with contextlib.suppress(Hung, Late, Crashed, Refused):
        tab.replace()
    return _said(tab, text, bad=True)


def _enter(tab: Tab, asked: Json) -> None:
    """Go to the current tab; one that hangs is no hindrance to opening another page."""
    try:
        tab.enter()
    except (Hung, Crashed, Late):
        if asked["action"] != "open":
            raise
        tab.replace()


def _done(tab: Tab, asked: Json, script: str) -> Json:
    action = asked["action"]
    if action == "screenshot":
        seen = view.look(tab, script)
        image = screenshot(tab, asked)
        return {**_said(tab, "", seen=seen), "image": image}
    try:
        ACTIONS[action](tab, asked)
        problem = ""
    except Failed as error:
        problem = str(error)
    tab.take_downloads()
    if problem:
        return _said(tab, problem, bad=True)
    seen = view.look(tab, script)
    if seen.failed_url:
        return _said(tab, _why(seen.failed_url), bad=True)
    text = view.shown(tab, seen, _offset(tab, asked, seen))
    is_refused = seen.status >= HTTPStatus.BAD_REQUEST and text.startswith("egress ")
    return _said(tab, text, seen=seen, bad=is_refused)


def _offset(tab: Tab, asked: Json, seen: view.View) -> int:
    """Where to read from: in a page that was read on already, from there again."""
    if asked["action"] in ("read", "open"):
        return int(asked.get("offset") or 0)
    document, offset = tab.known.place
    return offset if document == seen.document and offset < len(seen.text) else 0


def _said(tab: Tab, text: str, *, seen: view.View | None = None, bad: bool = False) -> Json:
    lines: list[str] = []
    if seen is not None:
        status = f" (HTTP {seen.status})" if seen.status else ""
        lines.append(f"{seen.title or '(no title)'}\n{seen.url}{status}")
        top, height, whole = seen.scroll
        if whole > height + 1:
            lines[0] += f"\nIn sight: {top}-{top + height} of {whole} pixels"
    lines += [f"Note: {note}" for note in tab.notes]
    if text:
        # An error comes first, what the page shows comes last.
        lines = [text, *lines] if bad else [*lines, "", text]
    return {"text": "\n".join(lines), "is_error": bad}


def _why(url: str) -> str:
    """Why a page could not be had; what the proxy refuses is a page, with its own words."""
    return (
        f"{url} could not be opened: nothing answers there, its name does not exist, or its "
        "certificate is not valid. Check the address."
    )
