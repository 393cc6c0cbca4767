"""The exchange of a refresh token for an access token (RFC 6749, section 6)."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeAlias, cast
from urllib.parse import quote_plus

import orjson

from openinteractions.errors import Invalid
from openinteractions.netguard import Fetcher

_MAX_ANSWER_BYTES = 256 * 1024
_OK = 200
_UNAUTHORIZED = 401
_LASTS_S = 3600.0
"""Of a token whose answer does not say."""
_LONGEST_S = 30 * 86400.0
_TOKEN = re.compile(r"[\x21-\x7e]{1,32768}")
_REFRESH_TOKEN = re.compile(r"[\x20-\x7e]{1,32768}")
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")

ClientAuth: TypeAlias = Literal["post", "basic"]
"""How the client says who it is: in the form, or in the `Authorization` header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What an access token is got with."""

    token_url: str
    client_id: str
    client_secret: str = field(repr=False)
    refresh_token: str = field(repr=False)
    scopes: Sequence[str] = ()
    auth: ClientAuth | None = None
    """What this token URL is known to take; None: not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What an exchange gave."""

    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    """The one to use from now on."""
    lasts: timedelta
    auth: ClientAuth


class ExchangeFailed(Exception):
    """There is no access token. The reason is safe to show."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


async def exchange(fetcher: Fetcher, grant: Grant, *, owner: str) -> Token:
    """Get an access token.

    Args:
        fetcher: Reaches the token URL.
        grant: What is exchanged.
        owner: For whom; see `Fetcher.fetch`.

    Raises:
        ExchangeFailed: The token URL refused, could not be reached, or its answer makes no sense.
    """
    auth = grant.auth or "post"
    status, answer = await _ask(fetcher, grant, auth, owner)
    is_unknown = answer.get("error") == "invalid_client" or status == _UNAUTHORIZED
    if grant.auth is None and is_unknown:
        # Refused before the refresh token was looked at: asked once more, in the other way.
        auth = "basic"
        status, answer = await _ask(fetcher, grant, auth, owner)
    if status != _OK or "error" in answer:
        raise ExchangeFailed(_refusal(grant, status, answer))
    return _token(grant, answer, auth)


async def _ask(
    fetcher: Fetcher, grant: Grant, auth: ClientAuth, owner: str
) -> tuple[int, Mapping[str, Any]]:
    form = {"grant_type": "refresh_token", "refresh_token": grant.refresh_token}
    headers = {"Accept": "application/json"}
    if grant.scopes:
        form["scope"] = " ".join(grant.scopes)
    if auth == "post":
        form |= {"client_id": grant.client_id, "client_secret": grant.client_secret}
    else:
        pair = f"{quote_plus(grant.client_id)}:{quote_plus(grant.client_secret)}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    try:
        status, body = await fetcher.post_form(
            grant.token_url, form, headers, max_bytes=_MAX_ANSWER_BYTES, owner=owner
        )
    except Invalid as error:
        raise ExchangeFailed(error.message) from None
    try:
        answer: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    return status, cast("Mapping[str, Any]", answer) if isinstance(answer, dict) else {}


def _token(grant: Grant, answer: Mapping[str, Any], auth: ClientAuth) -> Token:
    access, rotated = answer.get("access_token"), answer.get("refresh_token")
    kind = answer.get("token_type", "bearer")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise ExchangeFailed("The token URL answered with a token that is no bearer token.")
    if not isinstance(access, str) or _TOKEN.fullmatch(access) is None:
        raise ExchangeFailed("The token URL answered without an access token for a header.")
    if not isinstance(rotated, str) or _REFRESH_TOKEN.fullmatch(rotated) is None:
        rotated = grant.refresh_token
    return Token(
        access_token=access,
        refresh_token=rotated,
        lasts=timedelta(seconds=_lasts_s(answer.get("expires_in"))),
        auth=auth,
    )


def _lasts_s(value: object) -> float:
    try:
        seconds = float(value) if isinstance(value, (int, float, str)) else _LASTS_S
    except (ValueError, OverflowError):
        seconds = _LASTS_S
    # Also where it is not a number at all (NaN).
    return min(seconds, _LONGEST_S) if seconds >= 1 else 1.0


def _refusal(grant: Grant, status: int, answer: Mapping[str, Any]) -> str:
    """What happened, with the upstream's code; its description may repeat what it was sent."""
    code = answer.get("error")
    hidden = (grant.client_secret, grant.refresh_token)
    if not isinstance(code, str) or _CODE.fullmatch(code) is None or code in hidden:
        return f"The token URL answered {status}."
    return f"The token URL answered {status}: {code}."
