"""The bodies that create and update custom agents."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Required, TypeAlias, cast

from pydantic import AfterValidator, Field, Tag, TypeAdapter, with_config
from typing_extensions import TypedDict

from openinteractions.errors import Invalid
from openinteractions.wire import check, hidden
from openinteractions.wire.body import chosen, read
from openinteractions.wire.environment import Environment, named_in
from openinteractions.wire.explain import validated
from openinteractions.wire.fields import BY_TYPE, FIRST_FAULT, LOWER, REQUEST, Json, refusal
from openinteractions.wire.options import AntigravityConfig, DynamicConfig
from openinteractions.wire.tools import (
    BrowserTool,
    CodeExecutionTool,
    FunctionTool,
    GoogleSearchTool,
    McpServerTool,
    ToolSearchTool,
    UrlContextTool,
)

MAX_DESCRIPTION_CHARS = 10_000
MAX_INSTRUCTION_CHARS = 200_000
MAX_TOOLS = 128
_MAX_VERSION_DIGITS = 9

RESERVED_PREFIXES = (
    "antigravity-",
    "veo-",
    "omni-",
    "lyria-",
    "imagen-",
    "gemma-",
    "gemini-",
    "google-",
    "youtube-",
    "android-",
    "chrome-",
    "pixel-",
    "waze-",
    "fitbit-",
    "nest-",
    "kaggle-",
)
"""No custom agent's id begins so, in any case."""
BUILT_IN = frozenset(
    {
        "antigravity",
        "code-mender",
        "deep-research",
        "deep-research-pro-preview-12-2025",
        "deep-research-preview-04-2026",
        "deep-research-max-preview-04-2026",
    }
)
"""Agents that every project has, beside those that begin with `antigravity-`."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_VERSION = re.compile(rf"[1-9][0-9]{{0,{_MAX_VERSION_DIGITS - 1}}}")


def _id(value: str) -> str:
    lower = value.lower()
    prefix = next((one for one in RESERVED_PREFIXES if lower.startswith(one)), None)
    if prefix is not None:
        raise refusal(f"Invalid value{{at}}: the prefix '{prefix}' is reserved.")
    if lower in BUILT_IN:
        raise refusal(f"Invalid value{{at}}: '{value}' is a built-in agent.")
    if _ID.fullmatch(value) is None:
        raise refusal(
            "Invalid value{at}: expected 1 to 63 letters, digits, '.', '_' and '-', a letter or "
            "digit first."
        )
    return value


AgentId: TypeAlias = Annotated[str, AfterValidator(_id)]
BaseAgent: TypeAlias = Annotated[
    Literal[
        "antigravity",
        "antigravity-preview-05-2026",
        "antigravity-preview-09-2026",
        "antigravity-preview-latest",
    ],
    LOWER,
]
Description: TypeAlias = Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)]
Instruction: TypeAlias = Annotated[str, Field(max_length=MAX_INSTRUCTION_CHARS)]
CustomConfig: TypeAlias = Annotated[
    Annotated[AntigravityConfig, Tag("antigravity")] | Annotated[DynamicConfig, Tag("dynamic")],
    BY_TYPE,
]


AgentTool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CodeExecutionTool, Tag("code_execution")]
    | Annotated[UrlContextTool, Tag("url_context")]
    | Annotated[GoogleSearchTool, Tag("google_search")]
    | Annotated[McpServerTool, Tag("mcp_server")]
    | Annotated[BrowserTool, Tag("browser")]
    | Annotated[ToolSearchTool, Tag("tool_search")],
    BY_TYPE,
]
AgentTools: TypeAlias = Annotated[list[AgentTool], FIRST_FAULT, Field(max_length=MAX_TOOLS)]


@with_config({**REQUEST, "title": "CreateAgent"})
class CreateAgentBody(TypedDict, total=False):
    """Defines an agent: a base agent with instructions, tools and files of your own."""

    id: Required[AgentId]
    """1 to 63 letters, digits, `.`, `_` and `-`; some prefixes are reserved."""
    base_agent: Required[BaseAgent]
    description: Description
    """For people."""
    system_instruction: Instruction
    """Added to the base agent's own."""
    agent_config: CustomConfig
    tools: AgentTools
    """Without it: `code_execution`, `google_search` and `url_context`."""
    base_environment: Environment
    """`"remote"`, the id of an environment, or a configuration: each call gets a copy."""


@with_config({**REQUEST, "title": "UpdateAgent"})
class UpdateAgentBody(TypedDict, total=False):
    """What changes of an agent: it becomes a new version. An optional field that is null goes.

    What answers do not show stays where the body does not name it.
    """

    id: str
    """Must be the agent's own, if it is there."""
    version: int
    """Cannot be set: must be the current one, if it is there, as must be the times."""
    created: str
    updated: str
    base_agent: BaseAgent
    description: Description
    system_instruction: Instruction
    agent_config: CustomConfig
    tools: AgentTools
    base_environment: Environment


CREATE: TypeAdapter[CreateAgentBody] = TypeAdapter(CreateAgentBody)
UPDATE: TypeAdapter[UpdateAgentBody] = TypeAdapter(UpdateAgentBody)
_ANY_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_READ_ONLY = ("version", "created", "updated")
_OPTIONAL = tuple(
    name
    for name in UpdateAgentBody.__annotations__
    if name not in ("id", "base_agent", *_READ_ONLY)
)


@dataclass(frozen=True, slots=True)
class Change:
    """What an update changes of a definition."""

    given: Json = field(repr=False)
    removed: frozenset[str]
    seen: Json
    """What the body repeats of an answer, and what cannot be set."""
    nulls: hidden.Nulls = frozenset()

    def check(self, shown: Json) -> None:
        """See that what cannot be set is as answers show it.

        Raises:
            Invalid: It is not.
        """
        for name, value in self.seen.items():
            if value != shown[name]:
                raise Invalid(
                    f"Invalid value at '{name}': it is {shown[name]!r}, and cannot be set. The "
                    "agent may have changed since it was read: read it again, or leave this out."
                )

    def over(self, definition: Json) -> Json:
        """A definition with the change applied.

        Raises:
            Invalid: A variable of the environment is wrong.
        """
        kept = {name: value for name, value in definition.items() if name not in self.removed}
        given = dict(self.given)
        if "tools" in given:
            before = definition.get("tools", ())
            given["tools"] = hidden.tools(given["tools"], before, self.nulls)
        if "base_environment" in given:
            given["base_environment"] = hidden.environment(
                given["base_environment"], definition.get("base_environment"), self.nulls
            )
        return kept | given


def parse_create(raw: bytes, *, max_depth: int) -> tuple[str, Json]:
    """Read and validate the body of a create; the new agent's id, and its definition.

    Raises:
        Invalid: The first and most useful thing that is wrong with it.
    """
    body = cast("Json", validated(CREATE, read(CREATE, raw, max_depth=max_depth)))
    name: str = body.pop("id")
    _combinations(body)
    return name, body


def parse_update(
    raw: bytes, agent_id: str, *, update_mask: str | None = None, max_depth: int
) -> Change:
    """Read and validate the body of an update of an agent.

    Args:
        raw: The body. Fields that it does not have stay as they are.
        agent_id: Whose.
        update_mask: Names of fields, with commas between them: only these are changed.
        max_depth: How deep the JSON may be nested.

    Raises:
        Invalid: The first and most useful thing that is wrong with it.
    """
    # Here a null says something, so it must not be left out before it is seen.
    given = read(_ANY_OBJECT, raw, max_depth=max_depth)
    if "base_agent" in given and given["base_agent"] is None:
        raise Invalid("'base_agent' can be changed, but not removed.")
    nulls = frozenset(hidden.nulls(given))
    if "base_environment" in given:
        environment = hidden.without_null_variables(given["base_environment"])
        given = {**given, "base_environment": environment}
    body = cast("Json", validated(UPDATE, read(UPDATE, given, max_depth=max_depth)))
    if body.pop("id", agent_id) != agent_id:
        raise Invalid(f"Invalid value at 'id': it is '{agent_id}', and that cannot be changed.")
    seen = {name: body.pop(name) for name in _READ_ONLY if name in body}
    removed = frozenset(name for name in _OPTIONAL if (name,) in nulls)
    if update_mask:
        names = chosen(update_mask, known=("base_agent", *_OPTIONAL), body=given)
        body = {name: value for name, value in body.items() if name in names}
        removed, seen = removed & names, {}
    _combinations(body)
    return Change(body, removed, seen, nulls)


def _combinations(body: Json) -> None:
    check.tools({"tools": body.get("tools", [])})
    if "version" in body.get("agent_config", {}):
        raise Invalid("'agent_config.version' pins a version in a call; an agent cannot have it.")
    environment = body.get("base_environment")
    if isinstance(environment, dict):
        named_in(cast("Json", environment))


def parse_name(text: str) -> tuple[str, int | None] | None:
    """An agent's id and the version that is pinned, from `id` or `id@3`; None: it can be neither.

    `agents/` may stand before it.
    """
    name, at, number = text.removeprefix("agents/").partition("@")
    if _ID.fullmatch(name) is None or (at and _VERSION.fullmatch(number) is None):
        return None
    return name, int(number) if at else None


def public(definition: Mapping[str, Any]) -> Json:
    """A definition as its caller may see it again: without contents and secrets."""
    shown = dict(definition)
    if "tools" in shown:
        shown["tools"] = [check.public_tool(tool) for tool in shown["tools"]]
    if "base_environment" in shown:
        shown["base_environment"] = check.public_environment(shown["base_environment"])
    return shown


def request_schemas(prefix: str = "#/components/schemas/") -> dict[str, Json]:
    """JSON Schemas by name: `CreateAgent`, `UpdateAgent` and everything that they refer to."""
    named: dict[str, Json] = {}
    for name, adapter in (("CreateAgent", CREATE), ("UpdateAgent", UPDATE)):
        schema = adapter.json_schema(ref_template=prefix + "{model}")
        named |= schema.pop("$defs", {})
        named[name] = schema
    return named
