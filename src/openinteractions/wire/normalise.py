"""Input forms: whatever form the input has, it becomes a list of steps."""

from typing import Any, Literal, TypeAlias, cast

from openinteractions.errors import Invalid
from openinteractions.wire.explain import shown
from openinteractions.wire.fields import Json

InputForm: TypeAlias = Literal["absent", "text", "content", "contents", "steps"]
"""Nothing, a string, one block, blocks, or steps (also turns and mixtures)."""

_BLOCKS = frozenset({"text", "image", "audio", "document", "video"})
_ROLES = {"user": "user_input", "model": "model_output", "assistant": "model_output"}


def to_steps(value: Any) -> tuple[InputForm, list[Json]]:  # noqa: ANN401 - any JSON that validated
    """Turn a validated input into its form and steps.

    Raises:
        Invalid: There is nothing in it.
    """
    if isinstance(value, str):
        form, steps = "text", [_said(value)]
    elif isinstance(value, dict):
        form, steps = _single(cast("Json", value))
    else:
        form, steps = _many(cast("list[Json]", value))
    if not any(_says_something(step) for step in steps):
        raise Invalid("Request has empty input.")
    return form, steps


def restore_input(form: InputForm, steps: list[Json]) -> str | Json | list[Json] | None:
    """Give the input back in the form in which it came.

    A mixture of blocks and steps, older role turns and a step outside a list come back as steps.
    """
    if form == "absent" or not steps:
        return None
    if form == "steps":
        return steps
    blocks: list[Json] = steps[0]["content"]
    if form == "contents":
        return blocks
    return blocks[0]["text"] if form == "text" else blocks[0]


def _said(text: str) -> Json:
    return {"type": "user_input", "content": [{"type": "text", "text": text}]}


def _single(item: Json) -> tuple[InputForm, list[Json]]:
    if _is_block(item):
        return "content", [{"type": "user_input", "content": [_typed(item)]}]
    return "steps", _step(item)


def _many(items: list[Json]) -> tuple[InputForm, list[Json]]:
    if items and all(_is_block(item) for item in items):
        return "contents", [{"type": "user_input", "content": [_typed(item) for item in items]}]
    steps: list[Json] = []
    loose: list[Json] | None = None
    for item in items:
        if not _is_block(item):
            steps += _step(item)
            loose = None
        elif loose is None:
            loose = [_typed(item)]
            steps.append({"type": "user_input", "content": loose})
        else:
            loose.append(_typed(item))
    return "steps", steps


def _is_block(item: Json) -> bool:
    return item.get("type", "text") in _BLOCKS and "role" not in item


def _typed(block: Json) -> Json:
    return block if "type" in block else {"type": "text", **block}


def _step(item: Json) -> list[Json]:
    """One step in normal form, after the function results that were nested in it."""
    if "role" in item and "type" not in item:
        return _lifted({"type": _ROLES[item["role"]], "content": item["content"]})
    match item["type"]:
        case "user_input":
            return _lifted(item)
        case (
            "model_output" | "code_execution_result" | "function_result" | "mcp_server_tool_result"
        ):
            return [_blocks_typed(item)]
        case "thought" if "summary" in item:
            return [{**item, "summary": [_typed(block) for block in item["summary"]]}]
        case _:
            return [item]


def _lifted(item: Json) -> list[Json]:
    content: list[Json] = _blocks_typed(item).get("content", [])
    results = [_blocks_typed(block) for block in content if block["type"] == "function_result"]
    said = [block for block in content if block["type"] != "function_result"]
    return [*results, {**item, "content": said}] if said else results


def _blocks_typed(item: Json) -> Json:
    """The step with every text block's `type` filled in, and string content as a block."""
    key = "content" if "content" in item else "result"
    value = item.get(key)
    if key == "content" and isinstance(value, str):
        return {**item, key: [{"type": "text", "text": value}] if value else []}
    if isinstance(value, list):
        return {**item, key: [_typed(block) for block in cast("list[Json]", value)]}
    return item


def _says_something(step: Json) -> bool:
    if step["type"] != "user_input":
        return True
    return any(block["type"] != "text" or block["text"] for block in step["content"])


def check_calls(steps: list[Json], *, chained: bool) -> list[str]:
    """See that function calls and their results go together.

    Args:
        steps: The input, in normal form.
        chained: Whether an earlier interaction may hold the calls that are answered here.

    Returns:
        The call ids of results whose calls are not among the steps, in order; these have to be
        pending in the previous interaction.

    Raises:
        Invalid: A call has no result, an id is used twice, or a result has no call.
    """
    pending: dict[str, None] = {}
    foreign: dict[str, None] = {}
    for step in steps:
        match step["type"]:
            case "function_call":
                if step["id"] in pending:
                    raise Invalid(f"Duplicate function_call id '{shown(step['id'])}' in the input.")
                pending[step["id"]] = None
            case "function_result":
                _settle(step["call_id"], pending, foreign, chained=chained)
            case "user_input" if pending:
                raise Invalid(
                    f"The function_call '{shown(next(iter(pending)))}' has no function_result "
                    "before the next user_input."
                )
            case _:
                pass
    if pending:
        raise Invalid(
            f"The input ends with an unanswered function_call '{shown(next(iter(pending)))}'."
        )
    return list(foreign)


def _settle(
    call_id: str, pending: dict[str, None], foreign: dict[str, None], *, chained: bool
) -> None:
    if call_id in pending:
        del pending[call_id]
    elif not chained:
        raise Invalid(f"The function_result for call_id '{shown(call_id)}' answers no call.")
    elif call_id in foreign:
        raise Invalid(f"The call_id '{shown(call_id)}' is answered twice.")
    else:
        foreign[call_id] = None
