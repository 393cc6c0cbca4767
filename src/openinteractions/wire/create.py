"""The request that creates an interaction."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from openinteractions.errors import Invalid
from openinteractions.wire import check
from openinteractions.wire.body import read
from openinteractions.wire.environment import Environment
from openinteractions.wire.explain import validated
from openinteractions.wire.fields import FIRST_FAULT, REQUEST, Json, Name
from openinteractions.wire.normalise import InputForm, check_calls, to_steps
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
from openinteractions.wire.steps import Input
from openinteractions.wire.tools import Tool

MAX_STEPS = 30_000
"""A step's number has 15 bits in the database; the rest is left to what is generated."""

_BRANCH = re.compile(r"(?P<id>[^@]+)@(?P<step>[0-9]{1,9})")


@with_config({**REQUEST, "title": "CreateInteraction"})
class CreateInteractionBody(TypedDict, total=False):
    """Asks a `model` or an `agent` (exactly one of them) for an interaction."""

    model: str
    agent: str
    input: Input
    """May be absent only with a `continuation_token`."""
    stream: bool
    """Answer with server-sent events."""
    store: bool
    """Keep the interaction, so that it can be read and continued. On unless false."""
    background: bool
    """Answer at once, and go on when the client has gone."""
    previous_interaction_id: Name
    """Continue that conversation; `<id>@<step>` branches off after one of its steps."""
    continuation_token: Name
    system_instruction: str
    tools: Annotated[list[Tool], FIRST_FAULT]
    generation_config: GenerationConfig
    """Models only."""
    agent_config: AgentConfig
    """Agents only."""
    response_format: ResponseFormats
    response_mime_type: str
    """Deprecated: use `response_format`."""
    response_modalities: list[Modality]
    safety_settings: Annotated[list[SafetySetting], FIRST_FAULT]
    service_tier: ServiceTier
    labels: dict[str, str]
    webhook_config: WebhookConfig
    """Needs `background`."""
    environment: Environment
    cached_content: str
    limits: Limits


def request_schemas(prefix: str = "#/components/schemas/") -> dict[str, Json]:
    """JSON Schemas by name: `CreateInteraction` and everything that it refers to."""
    schema = CREATE.json_schema(ref_template=prefix + "{model}")
    named: dict[str, Json] = schema.pop("$defs", {})
    return {"CreateInteraction": schema, **named}


CREATE: TypeAdapter[CreateInteractionBody] = TypeAdapter(CreateInteractionBody)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateInteraction:
    """A valid request in normal form. Its values are plain JSON."""

    model: str | None
    agent: str | None
    steps: list[Json]
    """The input as steps; empty with a `continuation_token` only."""
    input_form: InputForm
    answers: list[str]
    """Call ids of function results whose calls must be pending in the previous interaction."""
    stream: bool = False
    store: bool = True
    background: bool = False
    previous_interaction_id: str | None = None
    """Without the branch's suffix."""
    branch_step: int | None = None
    """The last step of the previous interaction that counts, as GET numbers them."""
    continuation_token: str | None = None
    system_instruction: str | None = None
    tools: list[Json] = field(default_factory=list[Json])
    """With their secrets. Absent and empty are told apart by `tools_given`."""
    tools_given: bool = False
    tool_choice: str | Json | None = None
    generation_config: Json = field(default_factory=dict[str, Any])
    """Without `tool_choice`."""
    json_schema: Json | None = None
    """The answer must be one JSON document of this schema; `{}` means any JSON."""
    media_formats: list[Json] = field(default_factory=list[Json])
    response_modalities: list[str] = field(default_factory=list[str])
    safety_settings: list[Json] = field(default_factory=list[Json])
    service_tier: str | None = None
    labels: dict[str, str] = field(default_factory=dict[str, str])
    webhook_config: Json | None = None
    environment: str | Json | None = None
    """With its secrets."""
    agent_config: Json | None = None
    limits: Json = field(default_factory=dict[str, Any])
    cached_content: str | None = None
    echo: Json = field(default_factory=dict[str, Any])
    """What responses repeat of the request, without secrets."""


def parse_create(raw: bytes | Json, *, max_depth: int) -> CreateInteraction:
    """Read, validate and normalise a request.

    Args:
        raw: The body, or an object that stands for one (a trigger's `interaction`).
        max_depth: How deep the JSON may be nested; never more than MAX_DEPTH.

    Raises:
        Invalid: The first and most useful thing that is wrong with it.
    """
    body = cast("Json", validated(CREATE, read(CREATE, raw, max_depth=max_depth)))
    body = check.named_agent(body)
    check.combinations(body)
    form, steps = _steps(body)
    previous, branch_step = _branch(body.get("previous_interaction_id"))
    json_schema, media_formats = check.formats(body)
    generation = body.get("generation_config", {})
    tool_choice = generation.get("tool_choice")
    if tool_choice is not None:
        generation = {key: item for key, item in generation.items() if key != "tool_choice"}
    return CreateInteraction(
        model=check.model_id(body["model"]) if "model" in body else None,
        agent=check.agent_id(body["agent"]) if "agent" in body else None,
        steps=steps,
        input_form=form,
        answers=check_calls(steps, chained=previous is not None),
        stream=body.get("stream", False),
        store=body.get("store", True),
        background=body.get("background", False),
        previous_interaction_id=previous,
        branch_step=branch_step,
        continuation_token=body.get("continuation_token"),
        system_instruction=body.get("system_instruction"),
        tools=body.get("tools", []),
        tools_given="tools" in body,
        tool_choice=tool_choice,
        generation_config=generation,
        json_schema=json_schema,
        media_formats=media_formats,
        response_modalities=body.get("response_modalities", []),
        safety_settings=body.get("safety_settings", []),
        service_tier=body.get("service_tier"),
        labels=body.get("labels", {}),
        webhook_config=body.get("webhook_config"),
        environment=body.get("environment"),
        agent_config=body.get("agent_config"),
        limits=body.get("limits", {}),
        cached_content=body.get("cached_content"),
        echo=check.echo(body),
    )


def _steps(body: Json) -> tuple[InputForm, list[Json]]:
    if "input" in body:
        form, steps = to_steps(body["input"])
        if len(steps) > MAX_STEPS:
            raise Invalid(f"Invalid value at 'input': more than {MAX_STEPS} steps.")
        return form, steps
    if "continuation_token" in body:
        return "absent", []
    raise Invalid("Missing input.")


def _branch(previous: str | None) -> tuple[str | None, int | None]:
    if previous is None or "@" not in previous:
        return previous, None
    match = _BRANCH.fullmatch(previous)
    if not match:
        raise Invalid(
            "Invalid value at 'previous_interaction_id': expected '<id>' or '<id>@<step>'."
        )
    return match["id"], int(match["step"])
