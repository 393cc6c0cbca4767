"""Calls of an interaction that wait for a result, and the answers that a new one has to give."""

from collections.abc import Sequence

from openinteractions.errors import Invalid
from openinteractions.wire.fields import Json

_MOST_NAMED = 50


def at(steps: Sequence[Json], cut: int | None, *, given: int) -> list[Json]:
    """The calls that have no result up to a step.

    Args:
        steps: The interaction's, its input first.
        cut: The last one that counts; None: all.
        given: How many of the steps are its input.

    Raises:
        Invalid: One of them is of a tool of the server's own; the message names steps to cut at.
    """
    pending = _open(steps[: None if cut is None else cut + 1])
    own = _answered_here(steps, given)
    if any(call["type"] != "function_call" or index in own for index, call in pending):
        # Only functions of the caller's have results that a caller may give.
        whole = _whole(steps)
        raise Invalid(
            f"Invalid value for 'previous_interaction_id': at step {cut} calls of the server's own "
            f"tools have no result yet. Branch at one of these steps: {whole[:_MOST_NAMED]}."
        )
    return [call for _, call in pending]


def _answered_here(steps: Sequence[Json], given: int) -> set[int]:
    """Calls that the run itself has answered, by their places: some of our tools are functions."""
    waiting: dict[str, int] = {}
    found: set[int] = set()
    for index, step in enumerate(steps):
        if step["type"].endswith("_call"):
            waiting[step["id"]] = index
        elif step["type"].endswith("_result") and index >= given and step["call_id"] in waiting:
            found.add(waiting.pop(step["call_id"]))
    return found


def _whole(steps: Sequence[Json]) -> list[int]:
    """The steps after which nothing waits for a result."""
    waiting: set[str] = set()
    found: list[int] = []
    for index, step in enumerate(steps):
        if step["type"].endswith("_call"):
            waiting.add(step["id"])
        elif step["type"].endswith("_result"):
            waiting.discard(step["call_id"])
        if not waiting:
            found.append(index)
    return found


def _open(steps: Sequence[Json]) -> list[tuple[int, Json]]:
    calls: dict[str, tuple[int, Json]] = {}
    for index, step in enumerate(steps):
        if step["type"].endswith("_call"):
            calls[step["id"]] = (index, step)
        elif step["type"].endswith("_result"):
            calls.pop(step["call_id"], None)
    return list(calls.values())


def require_answers(pending: Sequence[str], answers: Sequence[str]) -> None:
    """See that an input answers what waits, and nothing else.

    Raises:
        Invalid: The message names the call.
    """
    unknown = [call for call in answers if call not in pending]
    if unknown:
        raise Invalid(
            f"The function_result with call_id '{unknown[0]}' matches no pending function call "
            "of the previous interaction."
        )
    missing = [call for call in pending if call not in answers]
    if missing:
        raise Invalid(
            "The previous interaction waits for function results: the input needs one for "
            + ", ".join(f"'{call}'" for call in missing)
            + "."
        )
