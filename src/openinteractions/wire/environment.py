"""The `environment` of a request: sources, network and variables of a sandbox."""

from typing import Annotated, Literal, Required, TypeAlias

from pydantic import Tag, with_config
from typing_extensions import TypedDict

from openinteractions.wire.fields import BY_SHAPE, LOWER, REQUEST, Name


@with_config(REQUEST)
class Source(TypedDict, total=False):
    """What lies in the workspace at the start."""

    type: Required[Annotated[Literal["inline", "repository", "gcs", "skill_registry"], LOWER]]
    target: Required[Name]
    source: str
    content: str
    encoding: str


@with_config(REQUEST)
class AllowlistEntry(TypedDict, total=False):
    """A host that the sandbox may reach."""

    domain: Required[Name]
    credential: Name
    """The id of a stored credential, which the egress proxy adds."""
    transform: Annotated[
        Annotated[dict[str, str], Tag("object")] | Annotated[list[dict[str, str]], Tag("list")],
        BY_SHAPE,
    ]
    """Headers that the egress proxy adds; never given back."""


_Disabled: TypeAlias = Annotated[Literal["disabled"], LOWER, Tag("string")]


@with_config(REQUEST)
class Allowlist(TypedDict, total=False):
    """The only hosts that the sandbox may reach."""

    allowlist: Annotated[_Disabled | Annotated[list[AllowlistEntry], Tag("list")], BY_SHAPE]


@with_config(REQUEST)
class EnvVar(TypedDict, total=False):
    """The value of an environment variable, or the credential that holds it."""

    value: str
    credential: Name


EnvValue: TypeAlias = Annotated[
    Annotated[str, Tag("string")] | Annotated[EnvVar, Tag("object")], BY_SHAPE
]
Env: TypeAlias = Annotated[
    Annotated[dict[str, EnvValue], Tag("object")]
    | Annotated[list[dict[str, EnvValue]], Tag("list")],
    BY_SHAPE,
]
Network: TypeAlias = Annotated[_Disabled | Annotated[Allowlist, Tag("object")], BY_SHAPE]


@with_config(REQUEST)
class EnvironmentConfig(TypedDict, total=False):
    """A new sandbox, or with `environment_id` an existing one with a new network and more files."""

    type: Required[Annotated[Literal["remote"], LOWER]]
    environment_id: Name
    sources: list[Source]
    network: Network
    env: Env


Environment: TypeAlias = Annotated[
    Annotated[Name, Tag("string")] | Annotated[EnvironmentConfig, Tag("object")], BY_SHAPE
]
"""`"remote"`, the id of an environment, or a configuration."""
