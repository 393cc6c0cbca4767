"""The `environment` of a request: sources, network and variables of a sandbox."""

import re
from typing import Annotated, Literal, Required, TypeAlias, cast

from pydantic import Tag, with_config
from typing_extensions import TypedDict

from openinteractions.errors import Invalid
from openinteractions.wire.explain import shown
from openinteractions.wire.fields import BY_SHAPE, LOWER, REQUEST, Json, Name

MAX_VARIABLES = 500
MAX_VALUE_BYTES = 64 * 1024

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")


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
    from_environment: Name
    """Make a copy of this one, to which the other fields are added. An addition to the contract."""
    sources: list[Source]
    network: Network
    env: Env


Environment: TypeAlias = Annotated[
    Annotated[Name, Tag("string")] | Annotated[EnvironmentConfig, Tag("object")], BY_SHAPE
]
"""`"remote"`, the id of an environment, or a configuration."""


def named_in(config: Json) -> tuple[str | None, str | None]:
    """The ids of the environment that a configuration changes, and of the one that it copies.

    Raises:
        Invalid: It has both.
    """
    changed, copied = config.get("environment_id"), config.get("from_environment")
    if changed is not None and copied is not None:
        raise Invalid("Only one of 'environment_id' and 'from_environment' may be given.")
    return changed, copied


def variables(env: Json | list[Json]) -> dict[str, Json]:
    """The variables of an `env`, whichever form it has: name → `{"value"}` or `{"credential"}`.

    Raises:
        Invalid: A name is none, a value cannot be one, or a name is given twice.
    """
    maps = env if isinstance(env, list) else [env]
    found: dict[str, Json] = {}
    for name, value in (pair for one in maps for pair in one.items()):
        if not _VARIABLE.fullmatch(name):
            raise Invalid(
                f"Invalid name '{shown(name)}' at 'env': expected at most 255 letters, "
                "digits and '_', no digit first."
            )
        if name in found:
            raise Invalid(f"Duplicate name '{shown(name)}' at 'env'.")
        found[name] = _variable(name, value)
    if len(found) > MAX_VARIABLES:
        raise Invalid(f"Invalid value at 'env': expected at most {MAX_VARIABLES} variables.")
    return found


def _variable(name: str, value: str | Json) -> Json:
    given: Json = {"value": value} if isinstance(value, str) else value
    if len(given) != 1:
        raise Invalid(f"Invalid value at 'env.{name}': expected one of 'value' and 'credential'.")
    text: str = given.get("value", "")
    if "\0" in text:
        raise Invalid(f"Invalid value at 'env.{name}': it holds a NUL character.")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_VALUE_BYTES:
        raise Invalid(f"Invalid value at 'env.{name}': expected at most {MAX_VALUE_BYTES} bytes.")
    return dict(given)


def public_source(source: Json) -> Json:
    """A source as its caller may see it again.

    Contents may be large and may be secret, as may be what stands before an `@` in a URL.
    """
    public = {key: value for key, value in source.items() if key != "content"}
    if "source" in public:
        public["source"] = _USERINFO.sub("", public["source"])
    return public


def public_network(network: str | Json) -> str | Json:
    """A network configuration as its caller may see it again: without what `transform` adds."""
    allowed = network if isinstance(network, str) else network.get("allowlist")
    if not isinstance(allowed, list):
        return network
    entries = cast("list[Json]", allowed)
    return {
        "allowlist": [
            {key: value for key, value in entry.items() if key != "transform"} for entry in entries
        ]
    }
