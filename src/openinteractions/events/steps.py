"""What a stream shows of a step that is there all at once."""

from collections.abc import Iterator

from openinteractions.events.types import STOP, Event, Position
from openinteractions.wire import deltas
from openinteractions.wire.events import encode, step_delta, step_start, step_stop
from openinteractions.wire.fields import Json


def step_events(index: int, step: Json, *, max_chars: int | None = None) -> Iterator[Event]:
    """The events of a finished step, in order.

    Args:
        index: Its place among the generated steps.
        step: The step.
        max_chars: Longest text of one event; None leaves texts whole.
    """
    yield Event("s", Position(index, -1), encode(step_start(index, deltas.step_skeleton(step))))
    offset = 0
    for delta in deltas.step_deltas(step):
        for piece in (delta,) if max_chars is None else deltas.pieces(delta, max_chars):
            offset += deltas.units(piece)
            yield Event("d", Position(index, offset), encode(step_delta(index, piece)))
    yield Event("t", Position(index, STOP), encode(stop_of(index, step)))


def stop_of(index: int, step: Json) -> Json:
    """A finished step's `step.stop`, with the token counts that the step keeps."""
    return step_stop(index, usage=step.get("usage"), step_usage=step.get("step_usage"))
