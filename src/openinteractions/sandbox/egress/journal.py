"""The record of what left a sandbox and what was stopped."""

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol, TypeAlias

from openinteractions import clock

Kind: TypeAlias = Literal["tunnel", "https", "http"]
"""`tunnel`: TLS that was not opened; `https`: opened; `http`: plain."""

_MAX_PATH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One request, or one tunnel, after its end. Holds no secrets."""

    environment_id: str
    at: datetime
    """Its begin."""
    host: str
    """Empty where none was named."""
    port: int
    kind: Kind
    method: str | None = None
    path: str | None = None
    """Without its query."""
    decision: Literal["allowed", "refused"]
    reason: str | None = None
    """Why it was refused, or why it failed."""
    rule: str | None = None
    """Domain of the allowlist's entry."""
    credential: str | None = None
    """The id of the one that was added; of several, all with commas between."""
    status: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    duration_ms: int = 0


class Journal(Protocol):
    """Where decisions go."""

    def record(self, decision: Decision) -> None:
        """Keep it. Must neither block nor raise; a sandbox can cause thousands a second."""
        ...


@dataclass(slots=True, kw_only=True)
class Attempt:
    """A decision in the making."""

    environment_id: str
    host: str = ""
    port: int = 0
    kind: Kind = "http"
    method: str | None = None
    path: str | None = None
    rule: str | None = None
    credential: str | None = None
    status: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    reason: str | None = None
    is_refused: bool = False
    at: datetime = field(default_factory=clock.now)
    began: float = field(default_factory=time.monotonic)

    def decided(self) -> Decision:
        """It, as it stands now."""
        return Decision(
            environment_id=self.environment_id,
            at=self.at,
            host=self.host,
            port=self.port,
            kind=self.kind,
            method=self.method,
            path=None if self.path is None else self.path[:_MAX_PATH],
            decision="refused" if self.is_refused else "allowed",
            reason=self.reason,
            rule=self.rule,
            credential=self.credential,
            status=self.status,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            duration_ms=round((time.monotonic() - self.began) * 1000),
        )
