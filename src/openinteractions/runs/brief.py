"""What a request asks a run to be, before its models and tools are looked at.

A model with tools and an agent are the same thing: model, instructions, tools, limits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openinteractions.models.port import Json, Warning  # noqa: A004 - the contract's word
from openinteractions.wire.create import CreateInteraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What instructions are written for."""

    tools: Sequence[str]
    """Names of the functions that the model has."""
    context_tokens: int
    """What the model can read at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """One run, as asked for."""

    models: Sequence[str]
    """The id to ask, and those that take over while it stays down."""
    tools: list[Json]
    """Contract tools, with their secrets."""
    is_default: bool = False
    """The tools are an agent's own choice: what cannot be had is left out, and said."""
    instructions: Callable[[Situation], str | None]
    generation: Json = field(default_factory=dict[str, Any])
    limits: Json = field(default_factory=dict[str, Any])
    """As the request's `limits`."""
    most: Json = field(default_factory=dict[str, Any])
    """Of the same form: what the agent itself may take at most."""
    agent: str | None = None
    guided: bool = False
    """Whether AGENTS.md, skills and hooks of the environment are honoured."""
    warnings: list[Warning] = field(default_factory=list[Warning])


def of_model(request: CreateInteraction) -> Brief:
    """A request that names a model."""
    assert request.model is not None
    return Brief(
        models=[request.model],
        tools=request.tools,
        instructions=lambda _: request.system_instruction,
        generation=request.generation_config,
        limits=request.limits,
    )
