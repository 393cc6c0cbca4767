"""Names of hosts: one spelling for each, so that two of them can be compared."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

import idna

_MAX_NAME = 253
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
# A last label like this makes resolvers read the whole as an address (`0x7f.1`, `2130706433`);
# the WHATWG's URL standard calls it "ends in a number".
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]@/?#\\\s]+)(?::([0-9]{1,5}))?")
_MAX_PORT = 65535


def normal(host: str) -> str | None:
    """The one spelling of a host: lower case, ASCII, no trailing dot; addresses canonical.

    IPv6 addresses have no brackets in it.

    Returns:
        None for what is neither a name nor a plainly written address.
    """
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            return None
    host = host.lower()
    if host.startswith("["):
        inner = address(host[1:-1]) if host.endswith("]") else None
        return str(inner) if isinstance(inner, IPv6Address) else None
    literal = address(host)
    if literal is not None:
        return str(literal)
    host = host.removesuffix(".")
    labels = host.split(".")
    if len(host) > _MAX_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        return None
    return None if _NUMBER.fullmatch(labels[-1]) else host


def address(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a host is, if it is one; scopes (`%eth0`) are not taken."""
    if "%" in host:
        return None
    try:
        return ip_address(host)
    except ValueError:
        return None


def authority(text: bytes, default_port: int) -> tuple[str, int] | None:
    """Host and port of `host[:port]`, as a request names them; None where it is malformed.

    Only ASCII: on the wire, names are encoded already.
    """
    try:
        found = _AUTHORITY.fullmatch(text.decode("ascii"))
    except UnicodeDecodeError:
        return None
    if found is None or (host := normal(found[1])) is None:
        return None
    port = default_port if found[2] is None else int(found[2])
    return (host, port) if 0 < port <= _MAX_PORT else None


def shown(host: str, port: int, default_port: int) -> str:
    """A host as a `Host` header names it."""
    name = f"[{host}]" if ":" in host else host
    return name if port == default_port else f"{name}:{port}"
