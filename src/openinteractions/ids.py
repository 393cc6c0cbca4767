"""Identifiers: sortable UUIDs inside, opaque URL-safe strings outside."""

import os
import re
import secrets
import time
from uuid import UUID

_INTERACTION = re.compile(r"v1_([0-9a-f]{32})")
_CALL_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
CALL_ID_LENGTH = 8


def uuid7() -> UUID:
    """A time-ordered UUID (RFC 9562, version 7): 48 bits of Unix milliseconds, the rest random."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


def interaction_id(value: UUID) -> str:
    """The public form of an interaction's UUID: `v1_` and 32 hexadecimal digits."""
    return f"v1_{value.hex}"


def parse_interaction_id(text: str) -> UUID | None:
    """Read an interaction's public id, or return None if it cannot be one of ours."""
    match = _INTERACTION.fullmatch(text.removeprefix("interactions/"))
    return UUID(match[1]) if match else None


def call_id() -> str:
    """A fresh tool-call id: eight lower-case letters and digits, like those of the hosted API."""
    return "".join(secrets.choice(_CALL_ALPHABET) for _ in range(CALL_ID_LENGTH))


def api_key() -> str:
    """A fresh API key: `oi_` and 43 URL-safe characters (256 random bits)."""
    return f"oi_{secrets.token_urlsafe(32)}"
