"""The bodies that create and update credentials."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Annotated, Any, Literal, Required, TypeAlias, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, Tag, TypeAdapter, with_config
from typing_extensions import TypedDict

from openinteractions.errors import Invalid
from openinteractions.wire.body import chosen, read
from openinteractions.wire.explain import validated
from openinteractions.wire.fields import (
    BY_SHAPE,
    BY_TYPE,
    FIRST_FAULT,
    LOWER,
    REQUEST,
    Json,
    refusal,
)

MAX_SECRET_CHARS = 32_768
_MAX_ID_CHARS = 63
_MAX_URL_CHARS = 2048
_MAX_DOMAIN_CHARS = 253

_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_DOMAIN = re.compile(rf"\*|(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")
_VISIBLE = re.compile(r"[\x21-\x7e]+(?:[\x20\t]+[\x21-\x7e]+)*")
_URL = re.compile(r"[\x21-\x7e]+")
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,500}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PRIVATE_NAME = re.compile(r"[^.]+|.*\.(?:localhost|local|internal|lan|home\.arpa)")
# What the proxy itself needs to say, or what belongs to one connection only.
_NOT_A_CREDENTIALS = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

SECRETS: Mapping[str, frozenset[str]] = {
    "bearer_token": frozenset({"token"}),
    "oauth2": frozenset({"client_secret", "refresh_token"}),
    "environment_variable": frozenset({"value"}),
}
"""The fields of each type that are stored encrypted."""


def is_credential_id(text: str) -> bool:
    """Whether a text can be the id of a credential.

    It stands inside a placeholder, `__GEMINI_CRED_<id>__`, in URLs too: nothing that is escaped
    there, and none may look like the beginning of another one's placeholder.
    """
    return len(text) <= _MAX_ID_CHARS and _ID.fullmatch(text) is not None and "__" not in text


def _id(value: str) -> str:
    if not is_credential_id(value):
        raise refusal(
            f"Invalid value{{at}}: expected 1 to {_MAX_ID_CHARS} letters, digits, '.', '_' and "
            "'-', a letter or digit first and last, and no '__'."
        )
    return value


def _header_name(value: str) -> str:
    if _HEADER.fullmatch(value) is None:
        raise refusal("Invalid value{at}: expected the name of an HTTP header.")
    if value.lower() in _NOT_A_CREDENTIALS:
        raise refusal(f"Invalid value{{at}}: the header '{value}' cannot carry a credential.")
    return value


def _visible(value: str) -> str:
    if value and _VISIBLE.fullmatch(value) is None:
        raise refusal("Invalid value{at}: an HTTP header cannot carry it.")
    return value


def _printable(value: str) -> str:
    if _CONTROL.search(value) or not value.isascii():
        raise refusal("Invalid value{at}: expected printable ASCII.")
    return value


def _domain(value: str) -> str:
    name = value.lower().removesuffix(".")
    if len(name) > _MAX_DOMAIN_CHARS or _DOMAIN.fullmatch(name) is None:
        raise refusal("Invalid value{at}: expected a host name, '*.example.com' or '*'.")
    return name


def _scope(value: str) -> str:
    if _SCOPE.fullmatch(value) is None:
        raise refusal("Invalid value{at}: expected one OAuth scope, without blanks.")
    return value


def _token_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if not host or _URL.fullmatch(value) is None or len(value) > _MAX_URL_CHARS:
        raise refusal("Invalid value{at}: expected an https URL.")
    if parts.fragment or parts.username is not None or parts.password is not None:
        raise refusal("Invalid value{at}: expected a URL without user, password and fragment.")
    # The client secret travels to it.
    if parts.scheme != "https" and not (parts.scheme == "http" and is_private_host(host)):
        raise refusal("Invalid value{at}: expected https (http only inside a private network).")
    return value


def is_private_host(host: str) -> bool:
    """Whether a host is inside a private network by its looks: then secrets may go over http."""
    try:
        return not ip_address(host).is_global
    except ValueError:
        return _PRIVATE_NAME.fullmatch(host) is not None


def _some(values: list[str]) -> list[str]:
    if not values:
        raise refusal("Invalid value{at}: expected at least one.")
    return list(dict.fromkeys(values))


CredentialId: TypeAlias = Annotated[str, AfterValidator(_id)]
_HeaderName: TypeAlias = Annotated[str, AfterValidator(_header_name)]
_Prefix: TypeAlias = Annotated[str, Field(max_length=200), AfterValidator(_visible)]
_Secret: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_SECRET_CHARS)]
_Token: TypeAlias = Annotated[_Secret, AfterValidator(_visible)]
_ClientId: TypeAlias = Annotated[
    str, Field(min_length=1, max_length=1000), AfterValidator(_printable)
]
_ClientSecret: TypeAlias = Annotated[_Secret, AfterValidator(_printable)]
_TokenUrl: TypeAlias = Annotated[str, AfterValidator(_token_url)]
_Scopes: TypeAlias = Annotated[
    list[Annotated[str, AfterValidator(_scope)]], FIRST_FAULT, Field(max_length=100)
]
_Domains: TypeAlias = Annotated[
    list[Annotated[str, AfterValidator(_domain)]], FIRST_FAULT, Field(max_length=100)
]
_Location: TypeAlias = Annotated[Literal["header", "query", "body"], LOWER]
_Locations: TypeAlias = Annotated[
    Annotated[_Location, Tag("string")]
    | Annotated[
        list[_Location], FIRST_FAULT, Field(max_length=10), AfterValidator(_some), Tag("list")
    ],
    BY_SHAPE,
]


@with_config(REQUEST)
class BearerToken(TypedDict, total=False):
    """A token that goes into a header of requests to a host."""

    type: Required[Annotated[Literal["bearer_token"], LOWER]]
    id: CredentialId
    """Made up if left out."""
    token: Required[_Token]
    """Never given back."""
    header_name: _HeaderName
    """`Authorization` unless said otherwise."""
    prefix: _Prefix
    """`Bearer` unless said otherwise; an empty one: the token alone."""


@with_config(REQUEST)
class OAuth2(TypedDict, total=False):
    """A grant whose access tokens the server gets, and renews, by itself."""

    type: Required[Annotated[Literal["oauth2"], LOWER]]
    id: CredentialId
    """Made up if left out."""
    client_id: Required[_ClientId]
    client_secret: Required[_ClientSecret]
    """Never given back."""
    refresh_token: Required[_ClientSecret]
    """Never given back."""
    token_url: Required[_TokenUrl]
    """Asked at once: what it refuses is refused."""
    scopes: _Scopes


@with_config(REQUEST)
class EnvironmentVariable(TypedDict, total=False):
    """A value that a sandbox only has a placeholder for."""

    type: Required[Annotated[Literal["environment_variable"], LOWER]]
    id: CredentialId
    """Made up if left out."""
    value: Required[_Secret]
    """Never given back."""
    injection_location: Required[_Locations]
    """Where in a request the placeholder is replaced; elsewhere the request is refused."""
    trusted_domains: _Domains
    """The hosts that may get the value: exact names, `*.example.com` or `*`. Without any, none."""


@with_config(REQUEST)
class BearerTokenChange(TypedDict, total=False):
    """What changes of a bearer token."""

    type: Required[Annotated[Literal["bearer_token"], LOWER]]
    token: _Token
    header_name: _HeaderName
    prefix: _Prefix


@with_config(REQUEST)
class OAuth2Change(TypedDict, total=False):
    """What changes of an OAuth grant."""

    type: Required[Annotated[Literal["oauth2"], LOWER]]
    client_id: _ClientId
    client_secret: _ClientSecret
    refresh_token: _ClientSecret
    token_url: _TokenUrl
    scopes: _Scopes


@with_config(REQUEST)
class EnvironmentVariableChange(TypedDict, total=False):
    """What changes of an environment variable."""

    type: Required[Annotated[Literal["environment_variable"], LOWER]]
    value: _Secret
    injection_location: _Locations
    trusted_domains: _Domains


_Create: TypeAlias = Annotated[
    Annotated[BearerToken, Tag("bearer_token")]
    | Annotated[OAuth2, Tag("oauth2")]
    | Annotated[EnvironmentVariable, Tag("environment_variable")],
    BY_TYPE,
]
_Update: TypeAlias = Annotated[
    Annotated[BearerTokenChange, Tag("bearer_token")]
    | Annotated[OAuth2Change, Tag("oauth2")]
    | Annotated[EnvironmentVariableChange, Tag("environment_variable")],
    BY_TYPE,
]
CREATE: TypeAdapter[Any] = TypeAdapter(_Create)
UPDATE: TypeAdapter[Any] = TypeAdapter(_Update)
_FIELDS: Mapping[str, Sequence[str]] = {
    "bearer_token": tuple(BearerTokenChange.__annotations__),
    "oauth2": tuple(OAuth2Change.__annotations__),
    "environment_variable": tuple(EnvironmentVariableChange.__annotations__),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a credential is made of, or what changes of it, in normal form."""

    type: str
    public: Json
    secret: Json = field(repr=False)

    def over(self, public: Json, secret: Json) -> "Content":
        """This, and what it does not name as it was.

        Raises:
            Invalid: The two do not go together.
        """
        merged = Content(type=self.type, public=public | self.public, secret=secret | self.secret)
        merged.check()
        return merged

    def check(self) -> None:
        """See that the fields go together.

        Raises:
            Invalid: They do not.
        """
        if self.type != "environment_variable":
            return
        if "header" in self.public["injection_location"]:
            value: str = self.secret["value"]
            if _VISIBLE.fullmatch(value) is None:
                raise Invalid(
                    "Invalid value at 'value': an HTTP header cannot carry it, and "
                    "'injection_location' names 'header'."
                )


_DEFAULTS: Mapping[str, Json] = {
    "bearer_token": {"header_name": "Authorization", "prefix": "Bearer"},
    "oauth2": {"scopes": []},
    "environment_variable": {},
}


def parse_create(raw: bytes, *, max_depth: int) -> tuple[str | None, Content]:
    """Read and validate the body of a create; the id that it asks for, and the rest.

    Raises:
        Invalid: The first and most useful thing that is wrong with it.
    """
    body = cast("Json", validated(CREATE, read(CREATE, raw, max_depth=max_depth)))
    content = _content(body)
    made = Content(
        type=content.type,
        public=_DEFAULTS[content.type] | content.public,
        secret=content.secret,
    )
    made.check()
    return body.get("id"), made


def parse_update(raw: bytes, *, update_mask: str | None, max_depth: int) -> Content:
    """Read and validate the body of an update; what it changes.

    Args:
        raw: The body. Fields that it does not have stay as they are.
        update_mask: Names of fields, with commas between them: only these are changed.
        max_depth: How deep the JSON may be nested.

    Raises:
        Invalid: The first and most useful thing that is wrong with it.
    """
    body = cast("Json", validated(UPDATE, read(UPDATE, raw, max_depth=max_depth)))
    if update_mask:
        body = _masked(body, update_mask)
    return _content(body)


def request_schemas(prefix: str = "#/components/schemas/") -> dict[str, Json]:
    """JSON Schemas by name: `CreateCredential` and `UpdateCredential`."""
    named: dict[str, Json] = {}
    for name, adapter in (("CreateCredential", CREATE), ("UpdateCredential", UPDATE)):
        schema = adapter.json_schema(ref_template=prefix + "{model}")
        named |= schema.pop("$defs", {})
        named[name] = schema
    return named


def _content(body: Json) -> Content:
    kind: str = body["type"]
    fields = {name: value for name, value in body.items() if name not in ("type", "id")}
    if isinstance(fields.get("injection_location"), str):
        fields["injection_location"] = [fields["injection_location"]]
    secrets = SECRETS[kind]
    return Content(
        type=kind,
        public={name: value for name, value in fields.items() if name not in secrets},
        secret={name: value for name, value in fields.items() if name in secrets},
    )


def _masked(body: Json, mask: str) -> Json:
    names = chosen(mask, known=_FIELDS[body["type"]], body=body)
    return {name: value for name, value in body.items() if name in names or name == "type"}
