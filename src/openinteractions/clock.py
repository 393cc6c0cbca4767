"""The one source of wall-clock time inside the process.

Order between processes (leases, partitions, expiry) is always the database's clock; this one is
for identifiers, logs and durations.
"""

from datetime import UTC, datetime


def now() -> datetime:
    """The current time, aware, in UTC."""
    return datetime.now(UTC)  # noqa: TID251 - this is the one place


def rfc3339(moment: datetime) -> str:
    """Render a moment as the contract writes it: `2026-11-23T10:00:00.123456Z`, UTC."""
    text = moment.astimezone(UTC).isoformat(timespec="microseconds")
    return text.replace("+00:00", "Z")
