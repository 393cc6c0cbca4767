"""Arithmetic on the contract's token counts."""

from typing import Any, Final, cast

from openinteractions.wire.fields import Json

EMPTY_USAGE: Final[Json] = {
    "total_input_tokens": 0,
    "total_cached_tokens": 0,
    "total_output_tokens": 0,
    "total_tool_use_tokens": 0,
    "total_thought_tokens": 0,
    "total_tokens": 0,
}
"""The totals that are written even when zero. To be copied, never changed."""

# What names an entry of each list, and what is counted in it.
_LISTS = {
    "input_tokens_by_modality": ("modality", "tokens"),
    "output_tokens_by_modality": ("modality", "tokens"),
    "cached_tokens_by_modality": ("modality", "tokens"),
    "tool_use_tokens_by_modality": ("modality", "tokens"),
    "grounding_tool_count": ("type", "count"),
}


def add_usage(first: Json, second: Json) -> Json:
    """The sum of two usages, the earlier one first.

    Lists are summed by modality or tool. `initial_input_tokens` says how long the conversation was
    at the start, so it is the first one's.
    """
    total = {**EMPTY_USAGE, **first}
    for key, value in second.items():
        if key in _LISTS:
            total[key] = _merged(total.get(key, []), value, *_LISTS[key])
        elif key == "initial_input_tokens":
            total.setdefault(key, value)
        else:
            total[key] = total.get(key, 0) + value
    return total


def _merged(first: Any, second: Any, name: str, amount: str) -> list[Json]:  # noqa: ANN401 - JSON
    sums: dict[str, int] = {}
    for entry in (*cast("list[Json]", first), *cast("list[Json]", second)):
        sums[entry[name]] = sums.get(entry[name], 0) + entry.get(amount, 0)
    return [{name: key, amount: value} for key, value in sums.items()]
