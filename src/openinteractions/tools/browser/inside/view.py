"""What a page shows: text with numbers where something can be clicked or typed."""

import json
import re
import time
from dataclasses import dataclass, field

from openinteractions.tools.browser.inside.cdp import Json, Late, Refused
from openinteractions.tools.browser.inside.tab import Failed, Tab

SHOWN_CHARS = 8000
"""Of one answer."""

_LIMITS = {"ms": 3000, "chars": 300_000, "elements": 10_000}
_TIMEOUT_S = 15.0
_WORLD = "openinteractions"
_MAX_DEPTH, _MAX_FRAMES = 3, 20
_ATTEMPTS = 4
_MARK = re.compile("\ue000(\\d+)\ue001")
_FRAME = re.compile("\ue002(\\d+)\ue003")
_PART_OF_A_MARK = re.compile("[\ue000\ue002]\\d*$")


@dataclass
class View:
    """A page as it was at one moment."""

    title: str
    url: str
    status: int
    document: str
    """Which document of the tab it is."""
    text: str
    """With marks: the indexes into `elements`."""
    scroll: list[int]
    """Pixels: where the visible part begins, how high it is, and the page."""
    failed_url: str = ""
    """What should have been shown instead, where there is only the browser's own error page."""
    is_cut: bool = False
    elements: list[tuple[str, str, str, int, str]] = field(default_factory=list)
    """Frame, its document, the handle of its list of elements, the place there, the label."""


def look(tab: Tab, script: str) -> View:
    """Take in the page; a script of its own that does not end is stopped for it."""
    for attempt in range(_ATTEMPTS):
        try:
            return _look(tab, script)
        except Late:
            tab.rescue()
        except Refused:
            # It has gone on to another page meanwhile.
            if attempt == _ATTEMPTS - 2:
                tab.note("The page does not stop going on to other pages; it was stopped.")
                tab.connection.send("Page.stopLoading", tab.session)
            _pause(tab, 0.3)
    raise Failed("The page does not stay long enough to be read. Open another one.")


def shown(tab: Tab, view: View, offset: int) -> str:
    """The part of a page from `offset` on, its elements numbered, and how to read on."""
    offset = min(max(offset, 0), len(view.text))
    end = _cut(view.text, offset)
    part = view.text[offset:end]
    numbers = _numbers(tab, view, [int(each) for each in _MARK.findall(part)])
    tab.known.place = (view.document, offset)
    text = _MARK.sub(lambda found: numbers.get(int(found[1]), ""), part).strip("\n")
    if not text:
        text = "(nothing to read here)"
    if offset or end < len(view.text):
        rest = f'; "read" with offset {end} goes on' if end < len(view.text) else ""
        text += f"\n[Characters {offset}-{end} of {len(view.text)}{rest}]"
    if view.is_cut and end == len(view.text):
        text += "\n[The page is longer than can be read]"
    return text


def resolve(tab: Tab, number: object) -> tuple[str, str]:
    """The handle of the element with this number, and how it was shown.

    Raises:
        Failed: It is not there any more.
    """
    ref = tab.known.refs.get(str(number))
    if ref is None:
        raise Failed(f'There is no element [{number}] here. Look at the page again with "read".')
    frame, document, node, label = ref
    gone = Failed(
        f"Element [{number}] ({label}) is not there any more: the page has changed. Look at it "
        'again with "read", and use the numbers that it shows then.'
    )
    if _documents(tab).get(frame) != document:
        raise gone
    try:
        world = _world(tab, frame)
        found = tab.call("DOM.resolveNode", backendNodeId=node, executionContextId=world)
        handle: str = found["object"]["objectId"]
    except Refused as error:
        raise gone from error
    if not apply(tab, handle, "function () { return this.isConnected; }"):
        raise gone
    return handle, label


def apply(tab: Tab, handle: str, function: str, *arguments: object) -> object:
    """What a function says that is called with an element as `this`."""
    answer = tab.call(
        "Runtime.callFunctionOn",
        objectId=handle,
        functionDeclaration=function,
        arguments=[{"value": each} for each in arguments],
        returnByValue=True,
        timeout_s=_TIMEOUT_S,
    )
    return _value(answer)


def contains(tab: Tab, text: str) -> bool:
    """Whether the page, or a frame of it, shows a text."""
    code = f"document.body.innerText.toLowerCase().includes({json.dumps(text.lower())})"
    for frame in list(_documents(tab))[:_MAX_FRAMES]:
        try:
            world = _world(tab, frame)
            answer = tab.call(
                "Runtime.evaluate", expression=code, contextId=world, returnByValue=True
            )
        except Refused:
            continue
        if answer["result"].get("value") is True:
            return True
    return False


def _look(tab: Tab, script: str) -> View:
    frame = tab.call("Page.getFrameTree", timeout_s=_TIMEOUT_S)["frameTree"]["frame"]
    look = _Look(tab, script, _documents(tab))
    answer = _outline(tab, script, frame["id"])
    return View(
        title=answer["title"],
        url=answer["url"],
        status=answer["status"],
        document=look.documents[frame["id"]],
        text=look.text(frame["id"], answer),
        scroll=answer["view"],
        failed_url=frame.get("unreachableUrl", ""),
        is_cut=answer["is_cut"],
        elements=look.elements,
    )


@dataclass
class _Look:
    """Puts the frames of a page together."""

    tab: Tab
    script: str
    documents: dict[str, str]
    elements: list[tuple[str, str, str, int, str]] = field(default_factory=list)
    frames: int = 0

    def text(self, frame: str, answer: Json, depth: int = 0) -> str:
        """A frame's text with those of the frames in it, its marks counted through all of them."""
        first = len(self.elements)
        document = self.documents.get(frame, "")
        self.elements.extend(
            (frame, document, answer["handle"], index, label)
            for index, label in enumerate(answer["labels"])
        )
        text = _MARK.sub(lambda mark: f"\ue000{first + int(mark[1])}\ue001", answer["text"])
        return _FRAME.sub(lambda mark: self._inner(answer, int(mark[1]), depth + 1), text)

    def _inner(self, answer: Json, index: int, depth: int) -> str:
        name = answer["frames"][index]
        self.frames += 1
        if depth > _MAX_DEPTH or self.frames > _MAX_FRAMES:
            return f"(frame: {name})"
        try:
            child = _frame_of(self.tab, answer["handle"], index)
            said = self.text(child, _outline(self.tab, self.script, child), depth)
        except (Refused, KeyError):
            return f"(frame, not readable: {name})"
        return f"(frame: {name})\n{said}\n(end of frame)" if said.strip() else ""


def _outline(tab: Tab, script: str, frame: str) -> Json:
    """A frame's own part: what `page.js` says, and the handle of its result."""
    world = _world(tab, frame)
    answer = tab.call(
        "Runtime.evaluate",
        expression=f"({script})({json.dumps(_LIMITS)})",
        contextId=world,
        timeout_s=_TIMEOUT_S,
    )
    _value(answer)
    handle = answer["result"]["objectId"]
    said = apply(tab, handle, "function () { return this.json; }")
    return {**json.loads(str(said)), "handle": handle}


def _numbers(tab: Tab, view: View, marks: list[int]) -> dict[int, str]:
    """How the marked elements are written: `[12] `."""
    wanted: dict[str, list[int]] = {}
    for mark in marks:
        wanted.setdefault(view.elements[mark][2], []).append(mark)
    asked: list[tuple[int, int]] = []
    for handle, group in wanted.items():
        answer = tab.call(
            "Runtime.callFunctionOn",
            objectId=handle,
            functionDeclaration="function (all) { return all.map((each) => this.elements[each]); }",
            arguments=[{"value": [view.elements[mark][3] for mark in group]}],
        )
        found = tab.call(
            "Runtime.getProperties", objectId=answer["result"]["objectId"], ownProperties=True
        )
        handles = {
            each["name"]: each["value"]["objectId"]
            for each in found["result"]
            if each["name"].isdigit() and "objectId" in each.get("value", {})
        }
        for index, mark in enumerate(group):
            if str(index) in handles:
                number = tab.connection.ask(
                    "DOM.describeNode", tab.session, objectId=handles[str(index)]
                )
                asked.append((mark, number))
    numbers: dict[int, str] = {}
    for mark, question in asked:
        node = tab.connection.answer(question, timeout_s=_TIMEOUT_S)["node"]["backendNodeId"]
        frame, document, _, _, label = view.elements[mark]
        numbers[mark] = f"[{tab.known.number(frame, document, node, label)}] "
    return numbers


def _frame_of(tab: Tab, handle: str, index: int) -> str:
    answer = tab.call(
        "Runtime.callFunctionOn",
        objectId=handle,
        functionDeclaration="function (index) { return this.frames[index]; }",
        arguments=[{"value": index}],
    )
    node = tab.call("DOM.describeNode", objectId=answer["result"]["objectId"])["node"]
    return str(node["frameId"])


def _world(tab: Tab, frame: str) -> int:
    made = tab.call(
        "Page.createIsolatedWorld", frameId=frame, worldName=_WORLD, timeout_s=_TIMEOUT_S
    )
    return int(made["executionContextId"])


def _documents(tab: Tab) -> dict[str, str]:
    """All frames, and which document each shows."""
    found: dict[str, str] = {}
    trees = [tab.call("Page.getFrameTree", timeout_s=_TIMEOUT_S)["frameTree"]]
    while trees:
        tree = trees.pop()
        found[tree["frame"]["id"]] = tree["frame"]["loaderId"]
        trees += tree.get("childFrames", [])
    return found


def _value(answer: Json) -> object:
    if "exceptionDetails" in answer:
        details = answer["exceptionDetails"]
        raise Refused(str(details.get("exception", {}).get("description", details.get("text"))))
    return answer["result"].get("value")


def _cut(text: str, offset: int) -> int:
    """Where a part ends: after a line if there is one, never within a mark."""
    end = offset + SHOWN_CHARS
    if end >= len(text):
        return len(text)
    line = text.rfind("\n", offset + SHOWN_CHARS // 2, end)
    if line >= 0:
        return line + 1
    part = _PART_OF_A_MARK.search(text, offset, end)
    return part.start() if part and part.start() > offset else end


def _pause(tab: Tab, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        tab.connection.pump(left)
