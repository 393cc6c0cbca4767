"""What a change of an environment's configuration brings with it."""

from dataclasses import dataclass, field
from typing import Any

import orjson

from openinteractions.wire.environment import public_network
from openinteractions.wire.fields import Json


@dataclass(frozen=True, slots=True)
class Configuration:
    """An environment's configuration, in the two forms in which it is kept."""

    sources: list[Json] = field(default_factory=list[Json])
    """As they are shown: without contents."""
    network: str | Json | None = None
    """With its secrets; None: as the server's setting says."""
    env: dict[str, Json] = field(default_factory=dict[str, Any], repr=False)
    """Name → `{"value"}` or `{"credential"}`."""

    @classmethod
    def read(cls, public: bytes | None, sealed: bytes | None) -> "Configuration":
        """What `public` and `sealed` (opened) gave."""
        shown: Json = orjson.loads(public or b"{}")
        secret: Json = orjson.loads(sealed or b"{}")
        return cls(shown.get("sources", []), secret.get("network"), secret.get("env", {}))

    def public(self) -> bytes:
        """What its caller may see again."""
        shown: Json = {}
        if self.sources:
            shown["sources"] = self.sources
        if self.network is not None:
            shown["network"] = public_network(self.network)
        return orjson.dumps(shown)

    def secret(self) -> bytes:
        """What a broker needs; to be sealed."""
        return orjson.dumps({"network": self.network, "env": self.env})

    def changed(self, other: "Configuration") -> "Configuration":
        """This with another one on top: its network if it has one, its variables, its sources."""
        targets = {source["target"] for source in other.sources}
        kept = [source for source in self.sources if source["target"] not in targets]
        return Configuration(
            kept + other.sources,
            self.network if other.network is None else other.network,
            {**self.env, **other.env},
        )

    @property
    def credentials(self) -> list[tuple[str, str, bool]]:
        """Ids of the credentials that it names, where, and whether as a variable."""
        named = [
            (value["credential"], f"env.{name}.credential", True)
            for name, value in self.env.items()
            if "credential" in value
        ]
        allowed = self.network.get("allowlist") if isinstance(self.network, dict) else None
        if isinstance(allowed, list):
            entries: list[Json] = allowed  # pyright: ignore[reportUnknownVariableType]
            named += [
                (entry["credential"], f"network.allowlist[{index}].credential", False)
                for index, entry in enumerate(entries)
                if "credential" in entry
            ]
        return named
