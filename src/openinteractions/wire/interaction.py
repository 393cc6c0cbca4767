"""The interaction as responses show it. For documentation: answers are built as plain JSON."""

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from openinteractions.wire.environment import Environment
from openinteractions.wire.options import (
    AgentConfig,
    GenerationConfig,
    Limits,
    Modality,
    ResponseFormats,
    SafetySetting,
    ServiceTier,
    WebhookConfig,
)
from openinteractions.wire.steps import AnyStep, Input
from openinteractions.wire.tools import Tool

Status: TypeAlias = Literal[
    "in_progress",
    "requires_action",
    "completed",
    "failed",
    "cancelled",
    "incomplete",
    "budget_exceeded",
    "queued",
    "requires_continuation",
]


class ModalityTokens(TypedDict):
    """Tokens of one modality."""

    modality: Modality
    tokens: int


class GroundingToolCount(TypedDict):
    """Calls of one search tool."""

    type: Literal["google_search", "google_maps", "retrieval"]
    count: int


class Usage(TypedDict, total=False):
    """Tokens that an interaction used. The total is input, output, thought and tool use."""

    total_input_tokens: int
    total_cached_tokens: int
    total_output_tokens: int
    total_thought_tokens: int
    total_tool_use_tokens: int
    total_tokens: int
    initial_input_tokens: int
    input_tokens_by_modality: list[ModalityTokens]
    output_tokens_by_modality: list[ModalityTokens]
    cached_tokens_by_modality: list[ModalityTokens]
    tool_use_tokens_by_modality: list[ModalityTokens]
    grounding_tool_count: list[GroundingToolCount]


class Fault(TypedDict):
    """What went wrong."""

    code: str
    message: str


class Warned(TypedDict):
    """A part of the request that was honoured only in part."""

    code: str
    field: str
    message: str


class Interaction(BaseModel):
    """One turn of a conversation with a model or an agent."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    id: str | None = None
    """Absent with `store=false`: nothing can be done with such a one."""
    object: Literal["interaction"] = "interaction"
    status: Status
    model: str | None = None
    agent: str | None = None
    created: str | None = None
    """RFC 3339, UTC."""
    updated: str | None = None
    """RFC 3339, UTC."""
    steps: list[AnyStep] | None = None
    """What was generated; GET shows this turn's input first."""
    usage: Usage | None = None
    service_tier: ServiceTier | None = None
    environment_id: str | None = None
    environment: Environment | None = None
    previous_interaction_id: str | None = None
    input: Input | None = None
    """Only with `include_input=true`."""
    labels: dict[str, str] | None = None
    tools: list[Tool] | None = None
    system_instruction: str | None = None
    generation_config: GenerationConfig | None = None
    agent_config: AgentConfig | None = None
    response_format: ResponseFormats | None = None
    response_modalities: list[Modality] | None = None
    safety_settings: list[SafetySetting] | None = None
    webhook_config: WebhookConfig | None = None
    limits: Limits | None = None
    errors: list[Fault] | None = None
    error: Fault | None = None
    warnings: list[Warned] | None = None
    continuation_token: str | None = None


class InteractionList(BaseModel):
    """A page of interactions, newest first."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    interactions: list[Interaction]
    next_page_token: str | None = None
    """Absent on the last page."""
