"""Environments, their files and their network log, as requests and answers show them.

The answers' types are for documentation: answers are built as plain JSON.
"""

from typing import Literal, TypeAlias
from uuid import UUID

from pydantic import BaseModel, ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from openinteractions.wire.environment import Env, Network, Source
from openinteractions.wire.fields import REQUEST, Json, Name

_ANSWER = ConfigDict(extra="allow", use_attribute_docstrings=True)
_HEX_DIGITS = 32
_LONGEST_ID = 36


@with_config({**REQUEST, "title": "CreateEnvironment"})
class CreateEnvironmentBody(TypedDict, total=False):
    """Makes an environment: a new one, or a copy of another one's files."""

    from_environment: Name
    """Copy this one: its id, or `environments/` and its id. Goes with `network` only."""
    sources: list[Source]
    network: Network
    """Without it: as the server's setting says, or as the copied environment's."""
    env: Env


CREATE: TypeAdapter[CreateEnvironmentBody] = TypeAdapter(CreateEnvironmentBody)


def request_schemas(prefix: str = "#/components/schemas/") -> dict[str, Json]:
    """JSON Schemas by name: `CreateEnvironment` and everything that it refers to."""
    schema = CREATE.json_schema(ref_template=prefix + "{model}")
    named: dict[str, Json] = schema.pop("$defs", {})
    return {"CreateEnvironment": schema, **named}


def environment_id(value: UUID) -> str:
    """The public form of an environment's UUID: 32 hexadecimal digits."""
    return value.hex


def parse_environment_id(text: str) -> UUID | None:
    """Read an environment's public id, or return None if it cannot be one of ours."""
    digits = text.removeprefix("environments/")
    if len(digits) not in {_HEX_DIGITS, _LONGEST_ID}:
        return None
    try:
        found = UUID(digits)
    except ValueError:
        return None
    return found if digits.lower() in {found.hex, str(found)} else None


class Environment(BaseModel):
    """A sandbox with files of its own."""

    model_config = _ANSWER

    id: str
    status: Literal["active", "expired"]
    created: str
    """RFC 3339, UTC."""
    updated: str
    """When its configuration was last changed; RFC 3339, UTC."""
    last_accessed: str
    """RFC 3339, UTC."""
    expires: str | None = None
    """When it is deleted, unless it is used before; RFC 3339, UTC. An addition to the contract."""
    file_count: str
    """A whole number, as a string."""
    size_bytes: str
    """A whole number, as a string."""
    sources: list[Source] | None = None
    """Without contents."""
    network: Network | None = None
    """Without the headers that `transform` adds."""


class EnvironmentList(BaseModel):
    """A page of environments, newest first."""

    model_config = _ANSWER

    environments: list[Environment]
    next_page_token: str | None = None
    """Absent on the last page."""


EntryType: TypeAlias = Literal["FILE", "DIRECTORY", "SYMLINK"]


class EnvironmentFile(BaseModel):
    """A file or folder of an environment."""

    model_config = _ANSWER

    name: str
    path: str
    """From the environment's root, without a leading slash: `workspace/src/main.py`."""
    type: EntryType
    size_bytes: str | None = None
    """A whole number, as a string. Files only."""
    mime_type: str | None = None
    """By its name. Files only."""
    created: str
    """RFC 3339, UTC."""
    modified: str
    """RFC 3339, UTC."""


class EnvironmentFiles(BaseModel):
    """A file, a page of a folder, or what an upload wrote; by path."""

    model_config = _ANSWER

    files: list[EnvironmentFile]
    next_page_token: str | None = None
    """Absent on the last page."""


class NetworkEvent(BaseModel):
    """A connection or request of a sandbox, and what became of it."""

    model_config = _ANSWER

    id: str
    time: str
    """RFC 3339, UTC."""
    host: str
    port: int
    kind: str
    """`tunnel`: passed on unopened; `https`: opened, since a rule adds to it; `http`."""
    method: str | None = None
    path: str | None = None
    """Without its query; only where the connection is opened."""
    decision: str
    reason: str | None = None
    rule: str | None = None
    """The domain of the allowlist's entry that matched."""
    credential: str | None = None
    """The id of the credential that was added; of several, all with commas between."""
    status: int | None = None
    """The other side's answer; only where the connection is opened."""
    bytes_up: str
    """A whole number, as a string."""
    bytes_down: str
    """A whole number, as a string."""
    duration_ms: int | None = None


class NetworkLog(BaseModel):
    """A page of what an environment's sandbox connected to, newest first."""

    model_config = _ANSWER

    events: list[NetworkEvent]
    next_page_token: str | None = None
    """Absent on the last page."""
