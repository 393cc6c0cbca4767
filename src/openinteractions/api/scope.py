"""Whom a request speaks for."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Protocol
from uuid import UUID

import structlog
from fastapi import Depends, Request

from openinteractions.errors import Unauthenticated

_KEY_HEADER = "x-goog-api-key"
_BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated request's project and key."""

    project_id: UUID
    key_id: UUID | None
    """None only with `--no-auth`."""
    is_budgeted: bool
    """A budget is set for the key or its project."""
    retention: timedelta | None = None
    """How long the project's interactions are kept; None: as the server's setting says."""


class Authenticator(Protocol):
    """Knows the keys. Handed in by `app`."""

    async def __call__(self, key: str | None) -> Caller | None:
        """Whom a key speaks for; None if it is missing, unknown or revoked."""
        ...


def presented_key(request: Request) -> str | None:
    """The key of a request: `x-goog-api-key`, `Authorization: Bearer`, or `?key=`."""
    key = request.headers.get(_KEY_HEADER)
    if key:
        return key
    authorization = request.headers.get("authorization", "")
    if authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip() or None
    return request.query_params.get("key")


async def caller(request: Request) -> Caller:
    """Authenticate a request.

    Raises:
        Unauthenticated: No key, or one that is unknown or revoked.
    """
    key = presented_key(request)
    authenticate: Authenticator = request.app.state.authenticate
    found = await authenticate(key)
    if found is None:
        if key is None:
            raise Unauthenticated(
                "No API key. Send it as 'x-goog-api-key' or 'Authorization: Bearer'."
            )
        raise Unauthenticated("The API key is unknown or revoked.")
    structlog.contextvars.bind_contextvars(project_id=found.project_id.hex)
    return found


CallerDep = Annotated[Caller, Depends(caller)]
