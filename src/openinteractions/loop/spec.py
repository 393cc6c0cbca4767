"""What a run is told (frozen at create) and what it remembers beyond its steps (ruling R17)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from openinteractions.models.port import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may take. None: no limit of its own."""

    max_total_tokens: int | None = None
    max_cost_nanousd: int | None = None
    max_steps: int | None = None
    max_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """A request, resolved: aliases, defaults and limits decided."""

    chain: list[str]
    """`provider/model` to ask, then those that take over while it stays down."""
    system: str | None = None
    tools: list[Json] = field(default_factory=list[Json])
    """Functions of the client, and tools that the vendor runs."""
    own_tools: list[Json] = field(default_factory=list[Json])
    """Tools that this server runs."""
    tool_choice: str | Json | None = None
    generation: Json = field(default_factory=dict[str, Any])
    json_schema: Json | None = None
    response_formats: list[Json] = field(default_factory=list[Json])
    modalities: list[str] = field(default_factory=list[str])
    safety_settings: list[Json] = field(default_factory=list[Json])
    service_tier: str | None = None
    media_url: str = ""
    """This server's base URL, for media that are delivered by `uri`."""
    limits: Limits = field(default_factory=Limits)
    agent: str | None = None
    """The agent that this is, where it is one."""
    guided: bool = False
    """Whether AGENTS.md, skills and hooks of the environment are honoured."""
    approve: list[str] = field(default_factory=list[str])
    """Names of tools, or patterns, that need a human's consent."""
    approved: list[Json] = field(default_factory=list[Json])
    """Calls that it begins with, `{call_id, tool, arguments}`: a human has consented to them."""

    def dump(self) -> bytes:
        """As JSON, for the interaction's row."""
        return orjson.dumps(self)

    @classmethod
    def load(cls, data: bytes) -> "RunSpec":
        """Read it back from the interaction's row."""
        values: dict[str, Any] = orjson.loads(data)
        values["limits"] = Limits(**values["limits"])
        return cls(**values)


@dataclass(slots=True, kw_only=True)
class RunState:
    """What the steps do not tell. Written in every step commit."""

    fallback: int = 0
    """Position in the spec's chain."""
    repairs: int = 0
    """Answers that broke their schema and were asked for again."""
    seconds: float = 0.0
    """Time that earlier owners of this run have spent on it."""
    cost_nanousd: int | None = 0
    """None once a call was made whose price is unknown."""
    usage: Json = field(default_factory=dict[str, Any])
    """What all model calls took; of one that broke off before it said so, about what."""
    begun: dict[str, Json] = field(default_factory=dict[str, Any])
    """Notes of calls that have begun and have no result yet, by their keys (ruling R5)."""

    def dump(self) -> bytes:
        """As JSON, for the interaction's row."""
        return orjson.dumps(self)

    @classmethod
    def load(cls, data: bytes | None) -> "RunState":
        """Read it back; None gives a fresh one."""
        values: Mapping[str, Any] = orjson.loads(data) if data else {}
        return cls(**values)
