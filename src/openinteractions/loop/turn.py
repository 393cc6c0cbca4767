"""One model turn as it grows: events from the model become steps, and what a stream shows.

Tool calls are held back until the turn is whole (ruling R18), so that a turn which breaks off has
never shown a call. Citations are held back to the end of their text block, so that a stream read
back from the steps shows everything in the same order.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import orjson

from openinteractions import ids
from openinteractions.events.types import STOP, Event, Position
from openinteractions.loop.context import cut_mark, seal_signature
from openinteractions.models.port import (
    Annotations,
    Finished,
    Json,
    Media,
    ModelEvent,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
    VendorStep,
)
from openinteractions.tools.toolbox import Toolbox
from openinteractions.wire import deltas
from openinteractions.wire.events import encode, step_delta, step_start, step_stop

RPC_UNAVAILABLE = 14


class Show(Protocol):
    """Takes what the stream is to show; one that shows nothing is fine."""

    def __call__(self, *events: Event) -> None:
        """Queue events, in order."""
        ...


class Turn:
    """Builds the steps of one model turn."""

    def __init__(self, show: Show | None, *, first_index: int, provider: str, model: str) -> None:
        self._show = show
        self._next = first_index
        self._provider = provider
        self._model = model
        self._open: Json | None = None
        self._offset = 0
        self._text: list[str] = []
        self._held: list[Json] = []
        self.steps: list[Json] = []
        """Finished steps, in order."""
        self._call_steps: list[Json] = []
        self.calls: list[ToolCall] = []
        """Calls of the turn, held back; see `reveal_calls`."""
        self.finished: Finished | None = None

    @property
    def has_shown(self) -> bool:
        """Whether a stream has seen anything of this turn."""
        return self._show is not None and (bool(self.steps) or self._open is not None)

    def add(self, event: ModelEvent) -> None:
        """Take the model's next event."""
        match event:
            case TextDelta():
                self._add_answer(event.text)
            case ThoughtDelta(text):
                delta = {"type": "thought_summary", "content": {"type": "text", "text": text}}
                self._add_text("thought", delta, text)
            case ThoughtSignature(signature):
                self._add_signature(signature)
            case Annotations(annotations):
                self._held += annotations
            case Media(content):
                self._add_media(content)
            case ToolCall():
                self.calls.append(event)
            case VendorStep(step):
                self._close()
                self.add_whole(self._sealed(step))
            case Finished():
                self.finished = event

    def add_whole(self, step: Json, *, show: Show | None = None) -> None:
        """Add a step that is there all at once; `show` takes its events, if not the turn's own."""
        index = self._next
        self.steps.append(step)
        self._next += 1
        if self._show is not None:
            (show or self._show)(*whole_step_events(index, step))

    def call_steps(self) -> list[Json]:
        """The held-back calls as `function_call` steps; a missing id is minted once."""
        if not self._call_steps:
            self._call_steps = [
                self._sealed(
                    {
                        "type": "function_call",
                        "id": call.id or ids.call_id(),
                        "name": call.name,
                        "arguments": call.arguments,
                    }
                    | ({"signature": call.signature} if call.signature else {})
                )
                for call in self.calls
            ]
        return self._call_steps

    def reveal_calls(self, tools: Toolbox, hold: Show) -> None:
        """Close what is open and add the held-back calls to the steps.

        Where one of them is this server's, none is shown before it is committed: a reader must not
        see a call that no worker knows of.
        """
        self._close()
        own = [tools.find(call.name) for call in self.calls]
        show = hold if any(own) else None
        for call, step, tool in zip(self.calls, self.call_steps(), own, strict=True):
            if tool is not None:
                kept = {key: step[key] for key in ("id", "signature") if key in step}
                self.add_whole({**tool.call_step(call), **kept}, show=show)
            else:
                self.add_whole(step, show=show)

    def close(self) -> list[Json]:
        """Close what is open; every step of the turn. Until then the turn can be broken off."""
        self._close()
        return self.steps

    def break_off(self, code: int, message: str, *, starts_anew: bool) -> list[Json]:
        """Close the turn as broken and return every step that was begun.

        Calls that were held back are dropped: no reader has seen them.

        Args:
            code: An RPC status code, for `model_output.error`.
            message: Why.
            starts_anew: An answer follows, which must not be read as the rest of this one.
        """
        self.calls.clear()
        is_open = self._is_answer
        if is_open and starts_anew:
            self._close_block()
            self._add_media(cut_mark())
        self._close()
        answers = [step for step in self.steps if step["type"] == "model_output"]
        for step in answers:
            step["error"] = {"code": code, "message": message}
        if answers and starts_anew and not is_open:
            self.add_whole({**answers[-1], "content": [cut_mark()]})
        return self.steps

    def text(self) -> str:
        """All text of the turn's answer, across its steps, the open one included."""
        steps = self.steps if self._open is None else [*self.steps, self._open]
        closed = "".join(
            block["text"]
            for step in steps
            if step["type"] == "model_output"
            for block in step["content"]
            if block["type"] == "text"
        )
        return closed + "".join(self._text) if self._is_answer else closed

    # ---- growing the open step

    def _start(self, kind: str) -> Json:
        if self._open is not None and self._open["type"] == kind:
            return self._open
        self._close()
        self._open = {"type": kind} | ({"content": []} if kind == "model_output" else {})
        self._offset = 0
        self._emit("s", -1, step_start, {"type": kind})
        return self._open

    def _add_answer(self, text: str) -> None:
        if self._show is None and text and self._is_answer:
            # Nobody watches the block grow: by far the most frequent way.
            self._text.append(text)
            self._offset += len(text)
            return
        self._add_text("model_output", {"type": "text", "text": text}, text)

    @property
    def _is_answer(self) -> bool:
        return self._open is not None and self._open["type"] == "model_output"

    def _add_text(self, kind: str, delta: Json, text: str) -> None:
        if not text:
            return
        self._start(kind)
        self._text.append(text)
        self._offset += len(text)
        self._emit("d", self._offset, step_delta, delta)

    def _add_signature(self, signature: str) -> None:
        step = self._start("thought")
        step["signature"] = self._seal(signature)
        self._delta({"type": "thought_signature", "signature": step["signature"]})
        self._close()

    def _add_media(self, content: Json) -> None:
        step = self._start("model_output")
        self._close_block()
        step["content"].append(content)
        self._delta({key: value for key, value in content.items() if key != "blob"})

    def _delta(self, delta: Json) -> None:
        self._offset += 1
        self._emit("d", self._offset, step_delta, delta)

    def _close_block(self) -> None:
        """Turn the text gathered so far into a content block, with its citations."""
        step = self._open
        if step is None:
            return
        if self._text:
            block: Json = {"type": "text", "text": "".join(self._text)}
            if step["type"] == "thought":
                step["summary"] = [block]
            else:
                step["content"].append(block)
            self._text = []
            if self._held and step["type"] == "model_output":
                block["annotations"] = self._held
                self._delta({"type": "text_annotation_delta", "annotations": self._held})
                self._held = []

    def _close(self) -> None:
        step = self._open
        if step is None:
            return
        self._close_block()
        self._emit("t", STOP, step_stop)
        self.steps.append(step)
        self._next += 1
        self._open = None

    def _emit(self, kind: str, offset: int, shape: Callable[..., Json], *content: Json) -> None:
        """Show an event of the open step; where nobody watches, it is not even built."""
        if self._show is not None:
            data = encode(shape(self._next, *content))
            self._show(Event(kind, Position(self._next, offset), data))

    # ---- signatures

    def _seal(self, signature: str) -> str:
        return seal_signature(signature, provider=self._provider, model=self._model)

    def _sealed(self, step: Json) -> Json:
        signature = step.get("signature")
        return {**step, "signature": self._seal(signature)} if signature else step


def whole_step_events(index: int, step: Json) -> list[Event]:
    """Everything that a stream shows of a finished step."""
    events = [
        Event("s", Position(index, -1), encode(step_start(index, deltas.step_skeleton(step))))
    ]
    offset = 0
    for delta in deltas.step_deltas(step):
        offset += units(delta)
        events.append(Event("d", Position(index, offset), encode(step_delta(index, delta))))
    events.append(Event("t", Position(index, STOP), encode(step_stop(index))))
    return events


def units(delta: Json) -> int:
    """How far a delta moves the position in its step: characters of text, else one."""
    if delta["type"] == "text":
        return len(delta["text"])
    if delta["type"] == "thought_summary" and delta["content"].get("type") == "text":
        return len(delta["content"]["text"])
    return 1


def fold(events: Sequence[Event]) -> list[tuple[Json, bool]]:
    """Read steps back from what a stream has shown: each step, and whether it was finished."""
    steps: list[Json] = []
    finished: set[int] = set()
    for event in events:
        if event.kind == "s":
            steps.append(orjson.loads(event.data)["step"])
        elif event.kind == "d":
            deltas.merge(steps[-1], orjson.loads(event.data)["delta"])
        elif event.kind == "t":
            finished.add(len(steps) - 1)
    return [(deltas.joined(step), number in finished) for number, step in enumerate(steps)]
