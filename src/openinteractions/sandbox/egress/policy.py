"""Which hosts an environment may reach, and what is added on the way. Pure: no I/O."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from openinteractions.errors import Invalid
from openinteractions.sandbox.egress import hosts

Mode: TypeAlias = Literal["open", "disabled", "allowlist"]

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*")
_PORT = re.compile(r":[0-9]*$")
_MAX_NAMED = 12
_FRAMING = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "proxy-connection", "te",
        "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip


class Blocked(Exception):
    """This may not leave the sandbox; the reason says why, and who can change it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Rule:
    """An entry of an allowlist."""

    domain: str
    credential: str | None = None
    transform: tuple[tuple[str, str], ...] = ()
    """Names and values of headers, each name once."""

    @property
    def adds(self) -> bool:
        """Whether requests are changed, so that their TLS has to be opened."""
        return self.credential is not None or bool(self.transform)


class _Table:
    """Entries by host; the most specific one is found first."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules: dict[str, Rule] = {}
        for rule in rules:
            self.rules[rule.domain] = _merged(self.rules.get(rule.domain), rule)

    def find(self, host: str) -> Rule | None:
        """The rule for a host in its one spelling."""
        found = self.rules.get(host)
        if found is None and hosts.address(host) is None:
            labels = host.split(".")
            suffixes = ("*." + ".".join(labels[at:]) for at in range(1, len(labels)))
            found = next((self.rules[each] for each in suffixes if each in self.rules), None)
        return found or self.rules.get("*")


def _merged(old: Rule | None, new: Rule) -> Rule:
    """Two entries for one domain act as one; what comes later wins."""
    if old is None:
        return new
    return Rule(
        new.domain,
        new.credential or old.credential,
        _headers((dict(old.transform), dict(new.transform))),
    )


class Reach:
    """Hosts that the operator lets sandboxes reach: the default, and the ceiling."""

    def __init__(self, mode: Mode = "open", domains: Sequence[str] = ()) -> None:
        """Reach of a mode; `domains` count where it is `allowlist`.

        Raises:
            ValueError: One of them is no domain.
        """
        self.mode: Mode = mode
        chosen = {"open": ("*",), "disabled": ()}.get(mode, domains)
        self.table = _Table(Rule(_domain(each)) for each in chosen)

    def permits(self, host: str) -> bool:
        """Whether a host, in its one spelling, is in it."""
        return self.table.find(host) is not None

    def meets(self, domain: str) -> bool:
        """Whether a rule's domain and this have any host in common."""
        if domain == "*":
            return bool(self.table.rules)
        if not domain.startswith("*."):
            return self.permits(domain)
        suffix = domain[1:]
        return self.permits("any" + suffix) or any(
            each.removeprefix("*").endswith(suffix) for each in self.table.rules
        )


class Policy:
    """The network rules of one environment, below the operator's ceiling."""

    def __init__(self, network: object, *, default: Reach, ceiling: Reach) -> None:
        """Rules of a `network` value that `check_network` has accepted.

        Args:
            network: As in the environment's configuration; None takes the default.
            default: What holds where the value says nothing.
            ceiling: What no value can go beyond.
        """
        listed = _listed(network)
        self._table = default.table if listed is None else _Table(_rule(entry) for entry in listed)
        self._ceiling = ceiling

    def decide(self, host: str) -> Rule:
        """The rule under which a host, in its one spelling, may be reached.

        Raises:
            Blocked: It may not.
        """
        rule = self._table.find(host)
        if rule is None:
            raise Blocked(self._refusal(host))
        if not self._ceiling.permits(host):
            raise Blocked(
                f"{host} is not among the hosts that this server lets sandboxes reach; only its "
                "operator can change that (setting sandbox.ceiling)."
            )
        return rule

    def is_any_host_fine(self, rule: Rule) -> bool:
        """Whether it makes no difference which host is reached under a rule."""
        return rule.domain == "*" and not rule.adds and self._ceiling.mode == "open"

    def _refusal(self, host: str) -> str:
        domains = list(self._table.rules)
        if not domains:
            return (
                f"this environment has no network access, so {host} cannot be reached; who makes "
                "the environment can allow hosts (network.allowlist)."
            )
        named = ", ".join(domains[:_MAX_NAMED]) + (", …" if len(domains) > _MAX_NAMED else "")
        return (
            f"{host} is not on this environment's allowlist ({named}); who makes the environment "
            "can add it (network.allowlist)."
        )


def _listed(network: object) -> Sequence[Mapping[str, Any]] | None:
    """The entries of a `network` value; None where it says nothing."""
    if network is None:
        return None
    if not isinstance(network, Mapping):
        return ()
    allowlist = cast("Mapping[str, Any]", network).get("allowlist")
    if allowlist is None:
        return None
    return () if isinstance(allowlist, str) else cast("Sequence[Mapping[str, Any]]", allowlist)


def _rule(entry: Mapping[str, Any]) -> Rule:
    transform: Any = entry.get("transform") or ()
    is_one = isinstance(transform, Mapping)
    headers = _headers(cast("Iterable[Mapping[str, str]]", (transform,) if is_one else transform))
    return Rule(_domain(entry["domain"]), entry.get("credential"), headers)


def _headers(maps: Iterable[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    """All maps as one; of a header that is named twice, in whatever case, the last counts."""
    found: dict[str, tuple[str, str]] = {}
    for each in maps:
        for name, value in each.items():
            found[name.lower()] = (name, value)
    return tuple(found.values())


def _domain(text: str) -> str:
    """A rule's domain in its one spelling.

    Raises:
        ValueError: It is none; the message says why, to follow the name of the field.
    """
    if text == "*":
        return text
    is_wild = text.startswith("*.")
    bare = text[2:] if is_wild else text
    host = hosts.normal(bare)
    if host is None or (is_wild and hosts.address(host) is not None):
        raise ValueError(_why_not(text, bare))
    return f"*.{host}" if is_wild else host


def _why_not(text: str, bare: str) -> str:
    hint = "give a host such as 'example.com', '*.example.com' for the hosts below it, or '*'"
    if "/" in text:
        return f"is a URL; {hint}."
    if _PORT.search(bare):
        return f"must not name a port; {hint}."
    if "*" in bare:
        return f"has its wildcard in the wrong place; {hint}."
    return f"is not a host; {hint}."


def matches(domains: Iterable[str], host: str) -> bool:
    """Whether one of these domains (as in rules; malformed ones match nothing) covers a host."""
    rules: list[Rule] = []
    for each in domains:
        try:
            rules.append(Rule(_domain(each)))
        except ValueError:
            continue
    return _Table(rules).find(host) is not None


def check_domain(text: str, where: str) -> str:
    """A domain in its one spelling.

    Args:
        text: Exact host, `*.example.com`, or `*`.
        where: What the message calls it, such as `network.allowlist[0].domain`.

    Raises:
        Invalid: It is none.
    """
    try:
        return _domain(text)
    except ValueError as error:
        raise Invalid(f"{where}: '{text[:100]}' {error}") from error


def check_network(network: object, ceiling: Reach) -> None:
    """Refuse a `network` value (of the right shape) that could not be enforced.

    Raises:
        Invalid: A domain is malformed or above the ceiling, or a header cannot be set; the
            message names the entry.
    """
    credentials: dict[str, str] = {}
    for index, entry in enumerate(_listed(network) or ()):
        where = f"network.allowlist[{index}]"
        domain = check_domain(entry["domain"], f"{where}.domain")
        if not ceiling.meets(domain):
            raise Invalid(
                f"{where}.domain: '{domain}' is beyond what this server lets sandboxes reach; "
                "its operator can change that (setting sandbox.ceiling)."
            )
        credential = entry.get("credential")
        if credential and credentials.setdefault(domain, credential) != credential:
            raise Invalid(f"{where}.credential: '{domain}' is listed with another one already.")
        _check_headers(_rule(entry).transform, f"{where}.transform")


def _check_headers(headers: Iterable[tuple[str, str]], where: str) -> None:
    for name, value in headers:
        if not is_header_name(name):
            raise Invalid(
                f"{where}: '{name[:100]}' cannot be set: it is not a header's name, or the "
                "connection needs that header for itself."
            )
        if not is_header_value(value):
            raise Invalid(
                f"{where}: the value of '{name}' has characters that a header cannot have."
            )


def is_header_name(name: str) -> bool:
    """Whether a header has such a name, and may be set by rules and credentials."""
    is_framing = name.lower() in _FRAMING or name.lower().startswith("proxy-")
    return _TOKEN.fullmatch(name) is not None and not is_framing


def is_header_value(value: str) -> bool:
    """Whether a header can have this value."""
    return _VALUE.fullmatch(value) is not None
