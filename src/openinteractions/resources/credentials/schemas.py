"""What is shown of credentials: never a secret."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel


class Credential(BaseModel):
    """A stored secret, without it."""

    id: str
    type: Literal["bearer_token", "oauth2", "environment_variable"]
    status: Literal["active", "revoked"]
    create_time: datetime
    update_time: datetime


class CredentialList(BaseModel):
    """One page of credentials, newest first."""

    credentials: list[Credential]
    next_page_token: str | None = None
