"""Callbacks of single interactions (`webhook_config`): payload, signature, delivery.

There is no shared secret, so a callback is signed with a JSON Web Token (RS256) that anybody can
verify with the key set at `/.well-known/jwks.json`. Its claims: `iss`, `aud` (the URI), `iat`,
`exp`, `jti` (the message's id, the same in every try) and `sha256` (of the body).
"""

import hashlib
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson

from openinteractions import clock
from openinteractions.crypto import Sealer, TokenSigner
from openinteractions.db.engine import Database
from openinteractions.errors import Invalid
from openinteractions.netguard import Fetcher
from openinteractions.resources.webhooks import store

_PURPOSE = "webhook-signing-key"
_VALID_S = 300
_ISSUER = "openinteractions"

EVENTS = {
    "completed": "interaction.completed",
    "incomplete": "interaction.completed",
    "budget_exceeded": "interaction.completed",
    "requires_action": "interaction.requires_action",
    "failed": "interaction.failed",
    "cancelled": "interaction.cancelled",
}
"""The event that each end of an interaction fires."""

RETRY_AFTER = tuple(
    timedelta(seconds=seconds)
    for seconds in (5, 30, 120, 600, 1800, 3600, 7200, 14400, 21600, 21600, 14400)
)
"""Waits between the tries of one delivery: twelve tries over a day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One callback to one URI."""

    message_id: str
    """The same in every try: a receiver that has seen it can drop the message."""
    uri: str
    event: str
    interaction_id: str
    ended_at: datetime
    error: dict[str, Any] | None
    user_metadata: dict[str, Any] | None

    def body(self) -> bytes:
        """The thin payload: what happened to what. The receiver reads the rest itself."""
        data: dict[str, Any] = {"id": self.interaction_id}
        if self.error is not None:
            data |= {"error_code": self.error["code"], "error_message": self.error["message"]}
        if self.user_metadata:
            data["user_metadata"] = self.user_metadata
        payload = {
            "type": self.event,
            "version": "v1",
            "timestamp": clock.rfc3339(self.ended_at),
            "data": data,
        }
        return orjson.dumps(payload)


class Refused(Exception):
    """The receiver did not take a delivery; another try may help."""


class Deliverer:
    """Sends callbacks through the SSRF guard."""

    def __init__(self, database: Database, sealer: Sealer, fetcher: Fetcher) -> None:
        self._database = database
        self._sealer = sealer
        self._fetcher = fetcher
        self._signer: TokenSigner | None = None

    async def deliver(self, delivery: Delivery) -> None:
        """Send one callback.

        Raises:
            Refused: It was not answered with a 2xx; the message says what happened.
        """
        body = delivery.body()
        signer = await self._ready()
        now = int(time.time())
        claims = {
            "iss": _ISSUER,
            "aud": delivery.uri,
            "iat": now,
            "exp": now + _VALID_S,
            "jti": delivery.message_id,
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        headers = {
            "Content-Type": "application/json",
            "webhook-id": delivery.message_id,
            "webhook-timestamp": str(now),
            "Webhook-Signature": signer.sign(claims),
        }
        try:
            status = await self._fetcher.post(delivery.uri, body, headers)
        except Invalid as error:
            raise Refused(error.message) from error
        if not 200 <= status < 300:  # noqa: PLR2004 - HTTP's success
            raise Refused(f"it answered {status}")

    async def key_set(self) -> dict[str, Any]:
        """The public keys, as a JSON Web Key Set."""
        await self._ready()
        sealed = await store.signing_keys_of_all_time(self._database)
        return {"keys": [self._open(key).jwk() for key in sealed]}

    async def _ready(self) -> TokenSigner:
        if self._signer is None:
            sealed = await store.signing_key(self._database)
            if sealed is None:
                fresh = TokenSigner.generate()
                sealed = await store.keep_first_signing_key(
                    self._database, fresh.kid, self._sealer.seal(fresh.dump(), purpose=_PURPOSE)
                )
            self._signer = self._open(sealed)
        return self._signer

    def _open(self, sealed: bytes) -> TokenSigner:
        return TokenSigner.load(self._sealer.open(sealed, purpose=_PURPOSE))
