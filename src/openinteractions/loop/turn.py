"""One model turn as it grows: events from the model become steps, and what a stream shows.

Tool calls are held back until the turn is whole (ruling R18), so that a turn which breaks off has
never shown a call. Citations are held back to the end of their text block, so that a stream read
back from the steps shows everything in the same order.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol, TypeAlias

import orjson

from openinteractions import ids
from openinteractions.events.steps import step_events, stop_of
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
from openinteractions.wire.events import encode, step_delta, step_start
from openinteractions.wire.usage import EMPTY_USAGE, add_usage

RPC_UNAVAILABLE = 14


class Show(Protocol):
    """Takes what the stream is to show; one that shows nothing is fine."""

    def __call__(self, *events: Event) -> None:
        """Queue events, in order."""
        ...


Cite: TypeAlias = Callable[[str], list[Json]]


class Turn:
    """Builds the steps of one model turn."""

    def __init__(
        self,
        show: Show | None,
        *,
        first_index: int,
        provider: str,
        model: str,
        cite: Cite | None = None,
        usage_before: Json | None = None,
    ) -> None:
        """Nothing is shown yet.

        Args:
            show: Takes the events of the stream; None where nobody watches.
            first_index: The place of the turn's first step among the generated ones.
            provider: Whose signatures the turn's are.
            model: Likewise.
            cite: Gives the citations of a text of the answer.
            usage_before: What the interaction has taken before this turn. The steps then say what
                it has taken with them; None says nothing.
        """
        self._show = show
        self._cite = cite
        self._usage = usage_before
        self._is_counted = False
        self._next = first_index
        self._provider = provider
        self._model = model
        self._open: Json | None = None
        self._offset = 0
        self._text: list[str] = []
        self._held: list[Json] = []
        self.steps: list[Json] = []
        """Finished steps, in order."""
        self.calls: list[ToolCall] = []
        """Calls of the turn, held back; see `name_calls` and `reveal_calls`."""
        self.finished: Finished | None = None
        self.taken: Json = {}
        """What the model call took: as it said, or about that where it broke off before."""

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
                self.taken = event.usage

    def add_whole(self, step: Json, *, show: Show | None = None, is_last: bool = False) -> None:
        """Add a step that is there all at once.

        Args:
            step: The step.
            show: Takes its events, if not the turn's own.
            is_last: Nothing of the turn follows it.
        """
        index = self._next
        step = self._counted(step, is_last=is_last)
        self.steps.append(step)
        self._next += 1
        if self._show is not None:
            (show or self._show)(*whole_step_events(index, step))

    def name_calls(self, taken: Collection[str]) -> None:
        """Give each held-back call an id that no other one has: a result names what it answers.

        The vendor's own stays where it can. Some count anew with each answer.

        Args:
            taken: Ids that calls before this turn have.
        """
        known = set(taken)
        for at, call in enumerate(self.calls):
            if not call.id or call.id in known:
                self.calls[at] = replace(call, id=ids.call_id())
            known.add(self.calls[at].id or "")

    def call_steps(self) -> list[Json]:
        """The held-back calls as `function_call` steps; see `name_calls` for their ids."""
        return [
            self._sealed(
                {
                    "type": "function_call",
                    "id": call.id,
                    "name": call.name,
                    "arguments": call.arguments,
                }
                | ({"signature": call.signature} if call.signature else {})
            )
            for call in self.calls
        ]

    def reveal_calls(self, tools: Toolbox, hold: Show) -> None:
        """Close what is open and add the held-back calls to the steps.

        Where one of them is this server's, none is shown before it is committed: a reader must not
        see a call that no worker knows of.
        """
        self._close(is_last=not self.calls)
        own = [tools.find(call.name) for call in self.calls]
        show = hold if any(own) else None
        last = len(self.calls) - 1
        for at, (call, step, tool) in enumerate(
            zip(self.calls, self.call_steps(), own, strict=True)
        ):
            shown = step
            if tool is not None:
                kept = {key: step[key] for key in ("id", "signature") if key in step}
                shown = {**tool.call_step(call), **kept}
            self.add_whole(shown, show=show, is_last=at == last)

    def close(self) -> list[Json]:
        """Close what is open; every step of the turn. Until then the turn can be broken off."""
        self._close(is_last=True)
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
        self._close(is_last=True)
        answers = [step for step in self.steps if step["type"] == "model_output"]
        for step in answers:
            step["error"] = {"code": code, "message": message}
        if answers and starts_anew and not is_open:
            self.add_whole({**answers[-1], "content": [cut_mark()]}, is_last=True)
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
            if step["type"] == "model_output":
                self._annotate(block)

    def _annotate(self, block: Json) -> None:
        """Add the vendor's citations of a text, and ours of what it has not cited itself."""
        held, self._held = self._held, []
        if self._cite is not None:
            cited = {note.get("url") for note in held}
            held += [note for note in self._cite(block["text"]) if note.get("url") not in cited]
        if held:
            block["annotations"] = held
            self._delta({"type": "text_annotation_delta", "annotations": held})

    def _close(self, *, is_last: bool = False) -> None:
        if self._open is None:
            return
        self._close_block()
        step = self._counted(self._open, is_last=is_last)
        self._emit("t", STOP, stop_of, step)
        self.steps.append(step)
        self._next += 1
        self._open = None

    def _counted(self, step: Json, *, is_last: bool) -> Json:
        """The step with what the interaction has taken with it; the turn's own with its last."""
        if self._usage is None:
            return step
        own: Json = {}
        if is_last and self.taken and not self._is_counted:
            self._is_counted = True
            own = self.taken
            self._usage = add_usage(self._usage, own)
        return with_usage(step, self._usage, own)

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
    return list(step_events(index, step))


def with_usage(step: Json, total: Json | None, own: Json | None = None) -> Json:
    """The step with the token counts that its `step.stop` shows, which a response shows too.

    Args:
        step: The step.
        total: Of the interaction so far, this step included; None shows none.
        own: Of the model call that this step is the last of.
    """
    bare = {key: value for key, value in step.items() if key not in deltas.AT_STOP}
    if total is None:
        return bare
    counted = {**bare, "usage": {**EMPTY_USAGE, **total}}
    return {**counted, "step_usage": own} if own else counted


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
            stop = orjson.loads(event.data)
            steps[-1].update({key: stop[key] for key in deltas.AT_STOP if key in stop})
            finished.add(len(steps) - 1)
    return [(deltas.joined(step), number in finished) for number, step in enumerate(steps)]
