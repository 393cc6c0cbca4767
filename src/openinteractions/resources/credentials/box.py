"""A credential's secrets, in and out of their encryption."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson

from openinteractions.crypto import Sealer
from openinteractions.db.sealed import access_token_purpose, credential_purpose
from openinteractions.resources.credentials.oauth import Grant, Token
from openinteractions.resources.credentials.store import Parts, Row
from openinteractions.wire.credentials import Content
from openinteractions.wire.fields import Json

_MARGIN_S = 60.0
_LAST_S = 5.0


@dataclass(frozen=True, slots=True)
class AccessToken:
    """An access token, and how long it lasts."""

    text: str = field(repr=False)
    left_s: float
    margin_s: float

    @property
    def is_fresh(self) -> bool:
        """It need not be renewed yet."""
        return self.left_s > self.margin_s

    @property
    def is_good(self) -> bool:
        """It can still be used."""
        return self.left_s > min(_LAST_S, self.margin_s)


class Box:
    """Seals and opens, each value for the one place that it is in."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def parts(self, project_id: UUID, credential_id: str, content: Content) -> Parts:
        """What is written of a credential without access tokens."""
        return Parts(
            public=content.public,
            sealed=self._seal(content.secret, credential_purpose(project_id, credential_id)),
        )

    def parts_with_token(
        self, project_id: UUID, credential_id: str, content: Content, token: Token
    ) -> Parts:
        """What is written of an oauth2 credential after an exchange."""
        secret = content.secret | {"refresh_token": token.refresh_token, "auth": token.auth}
        lasts_s = token.lasts.total_seconds()
        # Of one that lasts a minute at all, half of that has to do.
        access = {"token": token.access_token, "margin_s": min(_MARGIN_S, lasts_s / 2)}
        return Parts(
            public=content.public,
            sealed=self._seal(secret, credential_purpose(project_id, credential_id)),
            token_sealed=self._seal(access, access_token_purpose(project_id, credential_id)),
            token_lasts=token.lasts,
        )

    def secret(self, project_id: UUID, row: Row) -> Json:
        """The secret fields of a credential."""
        return self._open(row.sealed, credential_purpose(project_id, row.id))

    def access_token(self, project_id: UUID, row: Row) -> AccessToken | None:
        """The access token that an oauth2 credential has, good or not."""
        if row.token_sealed is None or row.token_left_s is None:
            return None
        found = self._open(row.token_sealed, access_token_purpose(project_id, row.id))
        return AccessToken(found["token"], row.token_left_s, found["margin_s"])

    def _seal(self, value: Json, purpose: str) -> bytes:
        return self._sealer.seal(orjson.dumps(value), purpose=purpose)

    def _open(self, sealed: bytes, purpose: str) -> Any:  # noqa: ANN401 - JSON of ours
        return orjson.loads(self._sealer.open(sealed, purpose=purpose))


def grant(content: Content) -> Grant:
    """What an oauth2 credential gets its access tokens with."""
    return Grant(
        token_url=content.public["token_url"],
        client_id=content.public["client_id"],
        client_secret=content.secret["client_secret"],
        refresh_token=content.secret["refresh_token"],
        scopes=content.public["scopes"],
        auth=content.secret.get("auth"),
    )
