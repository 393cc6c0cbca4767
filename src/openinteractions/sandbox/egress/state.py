"""What one environment may do now, what it has open, and the bounds on it."""

import asyncio
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

from openinteractions.sandbox.egress.ca import Authority
from openinteractions.sandbox.egress.dial import Asker, Dialler
from openinteractions.sandbox.egress.inject import Room, Variables, Vault
from openinteractions.sandbox.egress.journal import Attempt, Journal
from openinteractions.sandbox.egress.policy import Blocked, Policy, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on one environment's connections."""

    connections: int = 256
    """Open at once."""
    connect_s: float = 15.0
    """Look-up, connection and handshake with another host, together."""
    handshake_s: float = 15.0
    """A TLS handshake with the sandbox."""
    head_s: float = 30.0
    """A request's head, from its first byte to its last."""
    keepalive_s: float = 120.0
    """Between two requests on one connection."""
    idle_s: float = 900.0
    """Within a request or a tunnel, without a byte either way. Models can think for minutes."""


class Idle:
    """Ends what happens within it when nothing has moved for so long."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._touched = self._loop.time()
        self.timeout = asyncio.timeout(limit_s)
        """To be entered; raises TimeoutError."""

    def touch(self) -> None:
        """Something moved."""
        now = self._loop.time()
        # Moving the alarm costs more than a small packet does.
        if now - self._touched > self._limit_s / 64 and not self.timeout.expired():
            self._touched = now
            self.timeout.reschedule(now + self._limit_s)

    def cut(self) -> None:
        """End it now."""
        if not self.timeout.expired():
            self._limit_s = 0.0
            self.timeout.reschedule(self._loop.time())


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    """A connection that no further request will be judged on."""

    host: str
    rule: Rule
    is_opaque: bool
    idle: Idle


class Egress:
    """One environment's way out. Shared by all its connections; rules can be swapped any time."""

    def __init__(
        self,
        environment_id: str,
        policy: Policy,
        variables: Iterable[str] = (),
        *,
        project: str | None = None,
    ) -> None:
        """An environment with these rules.

        Args:
            environment_id: As the vault and the journal know it.
            policy: Its network rules.
            variables: Ids of the credentials that it has as environment variables. Where there
                are any, all TLS is opened: in a tunnel, a placeholder could not be seen.
            project: Whose it is; nobody else's, if left out.
        """
        self.environment_id = environment_id
        self.policy = policy
        self.variables = Variables(variables)
        self.connections = 0
        """Open now."""
        self.bytes_up = 0
        self.bytes_down = 0
        self.asker = Asker(project or environment_id)
        self.room = Room()
        self._open: set[_Open] = set()

    def swap(self, policy: Policy, variables: Iterable[str] = ()) -> None:
        """Replace the rules: requests from now on obey the new ones.

        Tunnels and WebSockets that the new rules would not have let through as they are, end.
        """
        self.policy = policy
        self.variables = Variables(variables)
        for each in self._open:
            if not self._still_fine(each):
                each.idle.cut()

    def opens(self, rule: Rule) -> bool:
        """Whether TLS to a rule's hosts is opened."""
        return rule.adds or bool(self.variables)

    @contextmanager
    def keeping(self, host: str, rule: Rule, idle: Idle, *, is_opaque: bool) -> Generator[None]:
        """Within this, the connection ends if the rules change against it."""
        entry = _Open(host, rule, is_opaque, idle)
        self._open.add(entry)
        try:
            if not self._still_fine(entry):
                idle.cut()
            yield
        finally:
            self._open.discard(entry)

    def _still_fine(self, entry: _Open) -> bool:
        try:
            rule = self.policy.decide(entry.host)
        except Blocked:
            return False
        if entry.is_opaque:
            return not self.opens(rule)
        return rule == entry.rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """What all connections of all environments share."""

    authority: Authority
    dialler: Dialler
    vault: Vault
    journal: Journal
    limits: Limits

    def record(self, egress: Egress, attempt: Attempt) -> None:
        """Count and record what came to its end."""
        egress.bytes_up += attempt.bytes_up
        egress.bytes_down += attempt.bytes_down
        self.journal.record(attempt.decided())
