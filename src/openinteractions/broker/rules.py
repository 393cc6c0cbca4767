"""What an environment's row says about its sandbox: variables, and where it may connect to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import structlog

from openinteractions.broker import store
from openinteractions.broker.store import Row
from openinteractions.crypto import Sealer
from openinteractions.db.engine import Database
from openinteractions.db.sealed import environment_purpose
from openinteractions.resources.environments.schemas import Configuration
from openinteractions.sandbox.egress.inject import placeholder
from openinteractions.sandbox.egress.policy import Policy, Reach

_log = structlog.get_logger(__name__)

_PROXY: Final = "http://127.0.0.1:3128"
_DIRECT: Final = "localhost,127.0.0.1,::1"
CA_BUNDLE: Final = "/etc/ssl/certs/ca-certificates.crt"
"""Where a sandbox has the certificates that it trusts, ours among them."""

STANDARD: Final[Mapping[str, str]] = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), _PROXY),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), _DIRECT),
    **dict.fromkeys(
        (
            "SSL_CERT_FILE",
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
            "GIT_SSL_CAINFO",
            "NODE_EXTRA_CA_CERTS",
            "PIP_CERT",
            "AWS_CA_BUNDLE",
        ),
        CA_BUNDLE,
    ),
}
"""Variables that every sandbox has, so that its tools use the only way out that there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One environment's configuration, ready to be used."""

    revision: int
    variables: Mapping[str, str] = field(repr=False)
    """With placeholders where credentials stand."""
    credential_ids: tuple[str, ...]
    """Of the variables."""
    policy: Policy


class Rules:
    """Reads configurations, below what the operator has set."""

    def __init__(
        self, database: Database, sealer: Sealer, *, default: Reach, ceiling: Reach
    ) -> None:
        self._database = database
        self._sealer = sealer
        self._default = default
        self._ceiling = ceiling

    async def load(self, row: Row) -> Setup:
        """The configuration of an environment as it is now.

        Raises:
            SetupError: It was sealed with another master key.
        """
        revision, sealed = await store.sealed(self._database, row.id)
        if sealed is not None:
            sealed = self._sealer.open(sealed, purpose=environment_purpose(row.project_id, row.id))
        found = Configuration.read(None, sealed)
        variables = dict(STANDARD)
        credential_ids: list[str] = []
        for name, value in found.env.items():
            if "credential" in value:
                # The same spelling as the vault's: with or without `credentials/`.
                credential_id = str(value["credential"]).removeprefix("credentials/")
                credential_ids.append(credential_id)
                variables[name] = placeholder(credential_id)
            else:
                variables[name] = str(value["value"])
        return Setup(
            revision=revision,
            variables=variables,
            credential_ids=tuple(credential_ids),
            policy=self._policy(found.network, row.id),
        )

    def _policy(self, network: object, environment_id: UUID) -> Policy:
        try:
            return Policy(network, default=self._default, ceiling=self._ceiling)
        except (ValueError, KeyError, TypeError):
            # Checked before it was stored; what cannot be understood now allows nothing.
            _log.exception("environment.bad_network", environment_id=environment_id.hex)
            return Policy("disabled", default=self._default, ceiling=self._ceiling)
