"""The actions: what each does to the page."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from openinteractions.tools.browser.inside import view
from openinteractions.tools.browser.inside.cdp import Json, Late, Refused
from openinteractions.tools.browser.inside.tab import Failed, Tab

_OPEN_S = 30.0
_EVENT_S = 1.5
_WAIT_S, _LONGEST_WAIT_S = 10.0, 60.0
_MAX_IMAGE_BYTES = 1_500_000
_MAX_HEIGHT = 8000
_MAX_SIDE = 2000
"""Pixels of a picture: more is refused in a conversation that has many."""
_QUALITIES = ((80, 1.0), (50, 1.0), (50, 0.5), (30, 0.25))
_SCHEMES = ("http://", "https://", "file://", "about:blank")
# Key, code, its number, and the text it types.
_KEYS = {
    "enter": ("Enter", "Enter", 13, "\r"),
    "tab": ("Tab", "Tab", 9, ""),
    "escape": ("Escape", "Escape", 27, ""),
    "backspace": ("Backspace", "Backspace", 8, ""),
    "delete": ("Delete", "Delete", 46, ""),
    "space": (" ", "Space", 32, " "),
    "arrowup": ("ArrowUp", "ArrowUp", 38, ""),
    "arrowdown": ("ArrowDown", "ArrowDown", 40, ""),
    "arrowleft": ("ArrowLeft", "ArrowLeft", 37, ""),
    "arrowright": ("ArrowRight", "ArrowRight", 39, ""),
    "pageup": ("PageUp", "PageUp", 33, ""),
    "pagedown": ("PageDown", "PageDown", 34, ""),
    "home": ("Home", "Home", 36, ""),
    "end": ("End", "End", 35, ""),
}

# What lies over the middle of an element, described; nothing where a click reaches it.
_COVER = """function () {
  const box = [...this.getClientRects()].find((each) => each.width && each.height);
  if (!box) return "nothing of it can be seen";
  const root = this.getRootNode();
  const hit = root.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  if (!hit || hit === this || this.contains(hit) || hit.contains(this)) return "";
  if (hit.closest("label")?.control === this) return "";
  const text = (hit.innerText || "").replace(/\\s+/g, " ").trim().slice(0, 80);
  return `it lies under <${hit.localName}>` + (text ? ` "${text}"` : "");
}"""
_FOCUS = """function () {
  this.focus();
  const type = this.localName === "input" ? this.type : "";
  if (type === "file") return "file";
  if (this.disabled || this.readOnly) return "disabled";
  if (/^(date|time|month|week|datetime-local|color|range)$/.test(type)) return "value";
  if (this.localName === "select") return "select";
  if (this.select) this.select();
  else if (this.isContentEditable) getSelection().selectAllChildren(this);
  else if (this.getAttribute("role") === null) return "no";
  return "text";
}"""
_NOT_TYPED = {
    "select": 'This is a list: use "select" with the option as text.',
    "disabled": "This input is disabled, or can only be read.",
    "no": "Nothing can be typed into this element.",
}
_SET = """function (value) {
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(this, value);
  this.dispatchEvent(new Event("input", { bubbles: true }));
  this.dispatchEvent(new Event("change", { bubbles: true }));
  return this.value;
}"""
_SELECT = """function (wanted) {
  if (this.localName !== "select") return "This is no list to select from: click it instead.";
  const all = [...this.options];
  const low = wanted.trim().toLowerCase();
  const found = all.find((each) => each.label.trim() === wanted.trim() || each.value === wanted)
    || all.find((each) => each.label.trim().toLowerCase() === low)
    || all.find((each) => low && each.label.toLowerCase().includes(low));
  if (!found) return "There is no such option. Options: "
    + all.slice(0, 100).map((each) => JSON.stringify(each.label.trim().slice(0, 80))).join(", ");
  found.selected = true;
  this.dispatchEvent(new Event("input", { bubbles: true }));
  this.dispatchEvent(new Event("change", { bubbles: true }));
  return "";
}"""


def open_(tab: Tab, asked: Json) -> None:
    """Go to an address."""
    url = str(asked.get("url") or "").strip()
    if not url:
        raise Failed('"open" needs a url.')
    if "://" not in url and url != "about:blank":
        is_local = url.startswith(("localhost", "127.0.0.1"))
        url = f"{'http' if is_local else 'https'}://{url}"
    if not url.lower().startswith(_SCHEMES):
        raise Failed("Only http, https and file addresses can be opened.")
    try:
        answer = tab.call("Page.navigate", url=url, timeout_s=_OPEN_S)
    except Late as error:
        tab.connection.send("Page.stopLoading", tab.session)
        raise Failed(
            f"{url} did not answer within {_OPEN_S:g} seconds. Try it once more, or go on without."
        ) from error
    except Refused as error:
        raise Failed(f"{url} is no address that can be opened: {error}") from error
    if answer.get("isDownload") or answer.get("errorText") == "net::ERR_ABORTED":
        tab.settle()
        if not tab.downloads:
            tab.note(f"{url} answered with nothing to show.")
        return
    tab.settle(quiet_s=0.5)


def click(tab: Tab, asked: Json) -> None:
    """Click an element as a mouse does; where something lies over it, by its script."""
    handle, label = _element(tab, asked)
    if label.startswith("select "):
        raise Failed(_NOT_TYPED["select"])
    if label.startswith("file input"):
        raise Failed('This takes files: use "type" with the path of one in the sandbox as text.')
    cover = str(view.apply(tab, handle, _COVER))
    point = None if cover else _point(tab, handle)
    if point is None:
        tab.opened.clear()
        tab.note(f"It was clicked by script: {cover or 'it is out of sight'}.")
        _patiently(tab, "function () { this.click(); }", handle)
    else:
        tab.opened.clear()
        _mouse(tab, point)
    _settle(tab)


def type_(tab: Tab, asked: Json) -> None:
    """Replace what an input holds."""
    handle, _ = _element(tab, asked)
    text = str(asked["text"]) if asked.get("text") is not None else ""
    kind = str(view.apply(tab, handle, _FOCUS))
    if kind in _NOT_TYPED:
        raise Failed(_NOT_TYPED[kind])
    if kind == "file":
        _hand_over(tab, handle, text)
    elif kind == "value":
        if not view.apply(tab, handle, _SET, text) and text:
            raise Failed(f"The input does not take {text!r}: dates are written YYYY-MM-DD.")
    elif text:
        tab.call("Input.insertText", text=text)
    else:
        _press(tab, "delete")
    if asked.get("submit"):
        _press(tab, "enter")
    _settle(tab)


def select(tab: Tab, asked: Json) -> None:
    """Choose an option of a list."""
    handle, _ = _element(tab, asked)
    if problem := view.apply(tab, handle, _SELECT, str(asked.get("text") or "")):
        raise Failed(str(problem))
    tab.settle()


def press(tab: Tab, asked: Json) -> None:
    """Press a key, on an element or wherever the focus is."""
    if asked.get("ref") is not None:
        handle, _ = _element(tab, asked)
        view.apply(tab, handle, "function () { this.focus(); }")
    _press(tab, str(asked.get("text") or ""))
    _settle(tab)


def scroll(tab: Tab, asked: Json) -> None:
    """Turn the wheel, or bring an element into sight."""
    if asked.get("ref") is not None:
        _element(tab, asked)
    else:
        way = -700 if asked.get("direction") == "up" else 700
        where = {"x": 640, "y": 450, "deltaX": 0, "deltaY": way}
        _events(tab, [("Input.dispatchMouseEvent", {"type": "mouseWheel", **where})])
    tab.settle()


def back(tab: Tab, asked: Json) -> None:
    """Go to the page before, or to the tab before."""
    del asked
    history = tab.call("Page.getNavigationHistory")
    index = history["currentIndex"]
    # The first entry of a tab of ours is empty.
    if index > 0 and history["entries"][index - 1]["url"] != "about:blank":
        entry = history["entries"][index - 1]["id"]
        tab.call("Page.navigateToHistoryEntry", entryId=entry)
    elif not tab.leave():
        raise Failed("There is no page before this one.")
    tab.settle()


def wait(tab: Tab, asked: Json) -> None:
    """Wait for a text to appear, or just so long."""
    seconds = min(max(float(asked.get("seconds") or _WAIT_S), 0.0), _LONGEST_WAIT_S)
    text = str(asked.get("text") or "")
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if text and view.contains(tab, text):
            break
        pause = time.monotonic() + min(left, 0.3)
        while (rest := pause - time.monotonic()) > 0:
            tab.connection.pump(rest)
    else:
        if text:
            tab.note(f"{text!r} did not appear within {seconds:g} seconds.")
    tab.settle(quiet_s=0.2, at_most_s=2.0)


def read(tab: Tab, asked: Json) -> None:
    """Only look."""
    del asked
    tab.settle(quiet_s=0.1, at_most_s=2.0)


def screenshot(tab: Tab, asked: Json) -> dict[str, str]:
    """A picture of what is visible, or of the whole page, as JPEG."""
    metrics = tab.call("Page.getLayoutMetrics")
    is_full = bool(asked.get("full_page"))
    size, visible = metrics["cssContentSize"], metrics["cssVisualViewport"]
    clip = {
        "x": 0 if is_full else visible["pageX"],
        "y": 0 if is_full else visible["pageY"],
        "width": min(size["width"], 2000) if is_full else visible["clientWidth"],
        "height": min(size["height"], _MAX_HEIGHT) if is_full else visible["clientHeight"],
    }
    fit = min(1.0, _MAX_SIDE / max(clip["width"], clip["height"], 1))
    for quality, scale in _QUALITIES:
        data: str = tab.call(
            "Page.captureScreenshot",
            format="jpeg",
            quality=quality,
            clip={**clip, "scale": scale * fit},
            captureBeyondViewport=is_full,
            timeout_s=20.0,
        )["data"]
        if len(data) * 3 / 4 <= _MAX_IMAGE_BYTES:
            if fit < 1:
                tab.note('The picture is made smaller. For details, "scroll" to them first.')
            return {"mime_type": "image/jpeg", "data": data}
    raise Failed("The picture is too large.")


ACTIONS: dict[str, Callable[[Tab, Json], object]] = {
    "open": open_,
    "read": read,
    "click": click,
    "type": type_,
    "select": select,
    "press": press,
    "scroll": scroll,
    "back": back,
    "wait": wait,
    "screenshot": screenshot,
}


def _settle(tab: Tab) -> None:
    """Wait for what an action brings about, in a new tab too."""
    tab.settle()
    if tab.follow():
        tab.settle()


def _hand_over(tab: Tab, handle: str, paths: str) -> None:
    """Give files of the sandbox to an input."""
    files = [line.strip() for line in paths.splitlines() if line.strip()]
    for file in files:
        if not Path(file).is_file():
            raise Failed(f"There is no file {file} in the sandbox.")
    tab.call("DOM.setFileInputFiles", objectId=handle, files=files)


def _element(tab: Tab, asked: Json) -> tuple[str, str]:
    """The element that is meant, in sight."""
    if asked.get("ref") is None:
        raise Failed('This needs a ref: the number of an element, as "read" shows it.')
    found = view.resolve(tab, asked["ref"])
    try:
        tab.call("DOM.scrollIntoViewIfNeeded", objectId=found[0])
    except Refused:
        # It has no box of its own; what can be done by script is.
        return found
    return found


def _point(tab: Tab, handle: str) -> tuple[float, float] | None:
    """The middle of an element, in pixels of the tab; None if it is out of sight."""
    try:
        quads = tab.call("DOM.getContentQuads", objectId=handle)["quads"]
    except Refused:
        return None
    visible = tab.call("Page.getLayoutMetrics")["cssLayoutViewport"]
    for quad in quads:
        x, y = sum(quad[0::2]) / 4, sum(quad[1::2]) / 4
        if 0 <= x < visible["clientWidth"] and 0 <= y < visible["clientHeight"]:
            return x, y
    return None


def _mouse(tab: Tab, point: tuple[float, float]) -> None:
    at = {"x": point[0], "y": point[1]}
    pressed = {**at, "button": "left", "clickCount": 1}
    _events(
        tab,
        [
            ("Input.dispatchMouseEvent", {"type": "mouseMoved", **at}),
            ("Input.dispatchMouseEvent", {"type": "mousePressed", "buttons": 1, **pressed}),
            ("Input.dispatchMouseEvent", {"type": "mouseReleased", **pressed}),
        ],
    )


def _press(tab: Tab, name: str) -> None:
    found = _KEYS.get(name.lower().replace(" ", "") or "?")
    if found is None:
        if len(name) != 1:
            raise Failed(f"There is no key {name!r}. Keys: {', '.join(_KEYS)}, or one character.")
        found = (name, "", 0, name)
    key, code, number, text = found
    about = {"key": key, "code": code, "windowsVirtualKeyCode": number}
    typed = {"text": text} if text else {}
    kind = "keyDown" if text else "rawKeyDown"
    _events(
        tab,
        [
            ("Input.dispatchKeyEvent", {"type": kind, **about, **typed}),
            ("Input.dispatchKeyEvent", {"type": "keyUp", **about}),
        ],
    )


def _events(tab: Tab, events: list[tuple[str, Json]]) -> None:
    """Let the page have events; one that keeps it busy is not waited for."""
    asked = [tab.connection.ask(method, tab.session, **params) for method, params in events]
    for number in asked:
        try:
            tab.connection.answer(number, timeout_s=_EVENT_S)
        except (Late, Refused):
            # A click may close its own tab, or run for long: the look afterwards says what is.
            return


def _patiently(tab: Tab, function: str, handle: str) -> None:
    number = tab.connection.ask(
        "Runtime.callFunctionOn",
        tab.session,
        objectId=handle,
        functionDeclaration=function,
        userGesture=True,
    )
    try:
        tab.connection.answer(number, timeout_s=_EVENT_S)
    except (Late, Refused):
        return


def parse(text: str) -> Json:
    """The call's arguments."""
    asked = json.loads(text)
    if asked.get("action") not in ACTIONS:
        raise Failed(f"There is no such action. Actions: {', '.join(ACTIONS)}.")
    return dict(asked)
