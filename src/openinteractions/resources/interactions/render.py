"""Interactions as the contract shows them: stored JSON, spliced together unparsed."""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from openinteractions import clock, ids
from openinteractions.resources.interactions.runner import Ended
from openinteractions.resources.interactions.store import Interaction, StoredStep
from openinteractions.wire.create import CreateInteraction
from openinteractions.wire.environments import environment_id
from openinteractions.wire.normalise import InputForm, restore_input

PREVIOUS = "previous_interaction_id"
_BRANCH = b'{"%b":' % PREVIOUS.encode()
"""How the echo of a branch begins: it names the step, which the row's own column does not."""


def head(row: Interaction) -> dict[str, Any]:
    """The fields that both a response and a stream's `interaction` have."""
    result: dict[str, Any] = {
        "id": ids.interaction_id(row.id),
        "object": "interaction",
        "status": row.status,
        "created": clock.rfc3339(row.created_at),
        "updated": clock.rfc3339(row.updated_at),
    }
    if row.model is not None:
        result["model"] = row.model
    if row.agent is not None:
        result["agent"] = row.agent
    if row.environment_id is not None:
        result["environment_id"] = environment_id(row.environment_id)
    return result


def interaction(
    row: Interaction, steps: Iterable[StoredStep] | None, *, include_input: bool = False
) -> bytes:
    """A whole interaction as JSON.

    Args:
        row: The interaction.
        steps: Its steps with their media inline; None leaves them out (lists, cancels).
        include_input: Show the input in the form in which it came; needs the input's steps.
    """
    steps = None if steps is None else list(steps)
    fields = head(row)
    is_branch = row.echo is not None and row.echo.startswith(_BRANCH)
    if row.previous_id is not None and not is_branch:
        fields[PREVIOUS] = ids.interaction_id(row.previous_id)
    if include_input and steps is not None:
        form: InputForm = row.input_form  # pyright: ignore[reportAssignmentType] - as written by create
        given = [orjson.loads(step.data) for step in steps if step.index < row.input_count]
        restored = restore_input(form, given)
        if restored is not None:
            fields["input"] = restored
    parts = [orjson.dumps(fields)[:-1]]
    if row.echo is not None and row.echo != b"{}":
        parts.append(row.echo[1:-1])
    parts += _named(row)
    if steps is not None:
        parts.append(b'"steps":[%b]' % b",".join(step.data for step in steps))
    return b",".join(parts) + b"}"


def _named(row: Interaction | Ended) -> list[bytes]:
    parts: list[bytes] = []
    if row.usage is not None:
        parts.append(b'"usage":' + row.usage)
    if row.errors is not None:
        parts.append(b'"errors":' + row.errors)
        if row.status == "failed":
            parts.append(b'"error":' + orjson.dumps(orjson.loads(row.errors)[0]))
    if row.warnings is not None:
        parts.append(b'"warnings":' + row.warnings)
    return parts


def unstored(request: CreateInteraction, ended: Ended) -> bytes:
    """An interaction that was not stored: without an id, since nothing can be done with it."""
    fields: dict[str, Any] = {
        "object": "interaction",
        "status": ended.status,
        "created": clock.rfc3339(ended.created_at),
        "updated": clock.rfc3339(ended.updated_at),
    }
    if request.model is not None:
        fields["model"] = request.model
    fields |= request.echo
    parts = [orjson.dumps(fields)[:-1], *_named(ended)]
    parts.append(b'"steps":[%b]' % b",".join(step.data for step in ended.steps))
    return b",".join(parts) + b"}"


def page(rows: Sequence[bytes], next_page_token: str | None) -> bytes:
    """One page of interactions."""
    token = (
        b"" if next_page_token is None else b',"next_page_token":"%b"' % next_page_token.encode()
    )
    return b'{"interactions":[%b]%b}' % (b",".join(rows), token)
