"""Noticing that a run goes in circles: the same call, with the same result, again and again.

Calls that stand beside each other count once: the model had no result of any of them yet.
Everything follows from the steps, so another worker comes to the same conclusion.
"""

from collections.abc import Sequence
from typing import Any, cast

from openinteractions.models.port import Json

WARN_AT = 3
END_AT = 6
_LOOK_BACK = 16
"""So many turns back a repetition counts."""
_MARK = "\n\n[This is the same call with the same result as before, "


def remarked(steps: Sequence[Json], call: Json, result: Json) -> Json:
    """A result, with a remark for the model where it has seen it often enough.

    Args:
        steps: Those before the result.
        call: The call that it answers.
        result: Its step.
    """
    times = 1 + _seen(steps, call, result)
    if times < WARN_AT:
        return result
    remark = (
        f"{_MARK}{times} times now. Repeating it changes nothing: try something else, or answer "
        "with what you have and say what is missing.]"
    )
    text = result["result"]
    if isinstance(text, str):
        return {**result, "result": text + remark}
    if isinstance(text, list) and _is_content(cast("list[Any]", text)):
        return {**result, "result": [*text, {"type": "text", "text": remark.strip()}]}
    return result


def is_stuck(steps: Sequence[Json]) -> bool:
    """Whether the last result came so often that the run is to end."""
    last = steps[-1] if steps else None
    if last is None or not last["type"].endswith("_result"):
        return False
    call = next((s for s in reversed(steps) if s.get("id") == last["call_id"]), None)
    return call is not None and 1 + _seen(steps[:-1], call, last) >= END_AT


def _seen(steps: Sequence[Json], call: Json, result: Json) -> int:
    """In how many of the turns before it this call had this result."""
    wanted = (_identity(call), _bare(result))
    calls: dict[str, tuple[int, Json]] = {}
    found: set[int] = set()
    turn, is_answered = 0, False
    for step in steps:
        kind: str = step["type"]
        if kind.endswith("_call"):
            turn, is_answered = turn + is_answered, False
            calls[step["id"]] = turn, step
        elif kind.endswith("_result") and step["call_id"] in calls:
            is_answered = True
            number, asked = calls[step["call_id"]]
            if (_identity(asked), _bare(step)) == wanted:
                found.add(number)
    own = calls[call["id"]][0]
    return sum(own - _LOOK_BACK <= number < own for number in found)


def _identity(call: Json) -> tuple[Any, ...]:
    return (call["type"], call.get("server_name"), call.get("name"), call.get("arguments"))


def _bare(result: Json) -> tuple[bool, Any]:
    """What a result says, without a remark of ours."""
    said: Any = result.get("result")
    if isinstance(said, str):
        said = said.partition(_MARK)[0]
    elif isinstance(said, list):
        items = cast("list[Any]", said)
        said = [item for item in items if not _is_remark(item)]
    return bool(result.get("is_error")), said


def _is_remark(item: Any) -> bool:  # noqa: ANN401 - any JSON
    return isinstance(item, dict) and str(item.get("text", "")).startswith(_MARK.strip())  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _is_content(items: list[Any]) -> bool:
    return all(isinstance(item, dict) and item.get("type") in ("text", "image") for item in items)  # pyright: ignore[reportUnknownMemberType] - any JSON
