"""What a run may still take, checked before the call that would break it (ruling R24)."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from openinteractions.errors import EngineError
from openinteractions.loop.spec import Limits, RunState
from openinteractions.models.catalog import Price
from openinteractions.models.port import Json

_BYTES_PER_TOKEN = 4
_MEDIA_BYTES = 64 * 1024
_MEDIA_TOKENS = 2_000


class BudgetSpent(EngineError):
    """A limit of the run, its key or its project does not leave room for the next call."""

    code = "budget_exceeded"


def estimate_tokens(
    messages: Sequence[bytes], system: str | None, tools: Sequence[Json] = ()
) -> int:
    """About how many tokens an input is, from its size: four bytes each, media a flat rate."""
    total = len(system or "") + (len(orjson.dumps(tools)) if tools else 0)
    media = 0
    for message in messages:
        if len(message) > _MEDIA_BYTES and b"base64" in message[:4096] + message[-4096:]:
            media += 1
        else:
            total += len(message)
    return total // _BYTES_PER_TOKEN + media * _MEDIA_TOKENS + 1


def spent_tokens(usage: Mapping[str, Any]) -> int:
    """Tokens that count against a limit: input, output and thinking, cached ones left out."""
    return int(usage.get("total_tokens", 0)) - int(usage.get("total_cached_tokens", 0))


def cost_nanousd(usage: Mapping[str, Any], price: Price | None) -> int | None:
    """What a call cost, in billionths of a dollar; None where no price is known."""
    if price is None:
        return None
    cached = int(usage.get("total_cached_tokens", 0))
    fresh = int(usage.get("total_input_tokens", 0)) - cached
    tool = int(usage.get("total_tool_use_tokens", 0))
    written = int(usage.get("total_output_tokens", 0)) + int(usage.get("total_thought_tokens", 0))
    return round(
        (fresh + tool) * price.input + cached * price.cached_input + written * price.output
    )


def worst_case(input_tokens: int, output_tokens: int, price: Price | None) -> dict[str, int]:
    """The most that a call can take: `tokens`, and `nanousd` where a price is known."""
    cost = input_tokens * price.input + output_tokens * price.output if price else 0
    return {"tokens": input_tokens + output_tokens, "nanousd": round(cost)}


def room_for_output(
    limits: Limits, state: RunState, *, input_tokens: int, price: Price | None
) -> int | None:
    """How many tokens the next answer may have; None where no limit of the run says.

    Raises:
        BudgetSpent: Not even one.
    """
    rooms: list[int] = []
    if limits.max_total_tokens is not None:
        used = spent_tokens(state.usage)
        rooms.append(limits.max_total_tokens - used - input_tokens)
        _require(
            rooms[-1],
            f"max_total_tokens = {limits.max_total_tokens} ({used} used)",
            f"has about {input_tokens} tokens",
        )
    if limits.max_cost_nanousd is not None:
        if price is None or state.cost_nanousd is None:
            raise BudgetSpent("The cost limit cannot be kept: the model has no known price.")
        left = limits.max_cost_nanousd - state.cost_nanousd - input_tokens * price.input
        rooms.append(int(left / price.output) if price.output else max(0, int(left)))
        _require(
            int(left) if not price.output else rooms[-1],
            f"max_cost_usd = {limits.max_cost_nanousd / 1e9:g} "
            f"({state.cost_nanousd / 1e9:.6f} spent)",
            f"costs about ${input_tokens * price.input / 1e9:.6f}",
        )
        if not price.output:
            rooms.pop()
    return min(rooms) if rooms else None


def _require(room: int, what: str, needed: str) -> None:
    if room < 1:
        raise BudgetSpent(
            f"The limit {what} leaves no room for another model call: its input alone {needed}."
        )
