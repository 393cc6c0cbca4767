"""Which model an ID means, who serves it, what it costs, and who takes over while it is down."""

import contextlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import aiohttp
import structlog

from openinteractions.errors import NotFound, SetupError
from openinteractions.models.port import Model
from openinteractions.models.transport import Upstream, proxy_for
from openinteractions.settings import ModelSettings, PriceSettings, ProviderSettings

_log = structlog.get_logger(__name__)

_PUBLIC = {
    "openai": "https://api.openai.com/v1",
    "gemini": "https://generativelanguage.googleapis.com",
    "anthropic": "https://api.anthropic.com",
}
_PATTERNS = (
    (("gemini-", "gemma-", "imagen-", "veo-", "lyria-", "learnlm-"), "gemini"),
    (("gpt-", "chatgpt-", "o1", "o3", "o4", "o5"), "openai"),
    (("claude-",), "anthropic"),
)
_NANO_PER_MILLION = 1_000
"""A dollar per million tokens is this many billionths of a dollar per token."""
DEFAULT_CONTEXT_TOKENS = 128_000
"""The window of a model that is in no table."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one token costs, in billionths of a US dollar."""

    input: float
    cached_input: float
    output: float


@dataclass(frozen=True, slots=True)
class Target:
    """A model that can be asked."""

    id: str
    """`provider/model`."""
    provider: str
    model: str
    """The upstream's own name of it."""
    adapter: Model
    price: Price | None
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    """Its context window: what one call's input and output may have together."""


class Catalog:
    """The configured providers and the rules from IDs to them."""

    def __init__(
        self,
        providers: Mapping[str, ProviderSettings],
        models: ModelSettings,
        session: aiohttp.ClientSession,
        *,
        local: Model | None,
        local_context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    ) -> None:
        """Bind the configured providers.

        Args:
            providers: By name.
            models: Aliases, fallbacks, prices and windows.
            session: For requests to them.
            local: The built-in local model; None where its runtime is not installed.
            local_context_tokens: What one call of a local model has.
        """
        self._kinds: dict[str, str] = {}
        self._adapters: dict[str, Model] = {}
        for name, provider in providers.items():
            self._kinds[name] = provider.kind
            self._adapters[name] = _adapter(name, provider, session, local)
        if local is not None and "local" not in self._adapters:
            self._kinds["local"] = "local"
            self._adapters["local"] = local
        self._aliases = models.aliases
        self._fallbacks = models.fallbacks
        # A name without a price of its own is looked for among all of them.
        self._price_of = lru_cache(maxsize=1024)(self._find_price)
        self._prices = _packaged_prices() | {k: _price(v) for k, v in models.prices.items()}
        self._windows = _packaged_windows()
        self._own_windows = models.context_tokens
        self._local_window = local_context_tokens
        self._warn_of_dead_ends()

    @property
    def providers(self) -> Mapping[str, str]:
        """Each provider's kind."""
        return self._kinds

    def resolve(self, model_id: str) -> list[str]:
        """The `provider/model` that an ID means, followed by its fallbacks.

        Raises:
            NotFound: No configured provider serves it; the message says what would.
        """
        first = self._resolve_one(model_id)
        rest = self._fallbacks.get(first) or self._fallbacks.get(model_id) or []
        return list(dict.fromkeys([first, *self._resolvable(rest)]))

    def open(self, target: str) -> Target:
        """Find a model by its `provider/model`.

        Raises:
            NotFound: No such provider is configured any more.
        """
        provider, _, model = target.partition("/")
        adapter = self._adapters.get(provider)
        if adapter is None:
            raise NotFound(f"The provider '{provider}' is not configured.")
        price = self._price_of(target, model)
        return Target(target, provider, model, adapter, price, self._window(target))

    def _resolvable(self, names: Sequence[str]) -> list[str]:
        """Fallbacks whose provider is configured; one that is not must not cost its chain."""
        found: list[str] = []
        for name in names:
            with contextlib.suppress(NotFound):
                found.append(self._resolve_one(name))
        return found

    def _warn_of_dead_ends(self) -> None:
        """Say at the start which aliases and fallbacks lead nowhere."""
        for alias in self._aliases:
            if not self._resolvable([alias]):
                _log.warning("models.alias_unknown", alias=alias, target=self._aliases[alias])
        for chain in self._fallbacks.values():
            for name in chain:
                if not self._resolvable([name]):
                    _log.warning("models.fallback_unknown", model=name)

    def _resolve_one(self, model_id: str) -> str:
        name = self._aliases.get(model_id, model_id)
        provider, slash, model = name.partition("/")
        if slash and model and provider in self._adapters:
            return name
        for prefixes, kind in _PATTERNS:
            if name.startswith(prefixes):
                owner = next((p for p, k in self._kinds.items() if k == kind), None)
                if owner is not None:
                    return f"{owner}/{name}"
        known = ", ".join(f"{p}/…" for p in self._adapters) or "none"
        raise NotFound(
            f"Model '{model_id}' is not found. Configured providers: {known}. Use provider/model, "
            "or map the ID in [models.aliases]."
        )

    def _window(self, target: str) -> int:
        provider, _, model = target.partition("/")
        # Gateways put more before a model's name: an owner, a region.
        bare = model.rpartition("/")[2].lower()
        for name in (target, model, bare):
            if name in self._own_windows:
                return self._own_windows[name]
        if self._kinds[provider] == "local":
            return self._local_window
        known = [prefix for prefix in self._windows if bare.startswith(prefix)]
        return self._windows[max(known, key=len)] if known else DEFAULT_CONTEXT_TOKENS

    def _find_price(self, target: str, model: str) -> Price | None:
        for name in (target, model, model.rpartition("/")[2]):
            if name in self._prices:
                return self._prices[name]
        known = [name for name in self._prices if model.startswith(f"{name}-")]
        return self._prices[max(known, key=len)] if known else None


def _adapter(
    name: str, provider: ProviderSettings, session: aiohttp.ClientSession, local: Model | None
) -> Model:
    """Bind a wire format to a provider. Its module is loaded only where it is used."""
    if provider.kind == "local":
        if local is None:
            raise SetupError(f"providers.{name}: the local model needs the `local` extra")
        return local
    module = importlib.import_module(f"openinteractions.models.{provider.kind}")
    base_url = provider.base_url or _PUBLIC[provider.kind]
    headers = module.headers(provider.key()) | {
        header: value.get_secret_value() for header, value in provider.headers.items()
    }
    upstream = Upstream(
        session,
        base_url=base_url,
        headers=headers,
        connect_timeout=provider.connect_timeout,
        idle_timeout=provider.idle_timeout,
        proxy=proxy_for(base_url),
    )
    if provider.kind == "openai":
        official = base_url.startswith(_PUBLIC["openai"])
        return module.OpenAIModel(upstream, provider=name, official=official)
    if provider.kind == "gemini":
        return module.GeminiModel(upstream, provider=name)
    return module.AnthropicModel(upstream, provider=name)


def _packaged(file: str, key: str) -> dict[str, Any]:
    text = resources.files("openinteractions.models").joinpath(file).read_text("utf-8")
    table: dict[str, Any] = json.loads(text)[key]
    return table


def _packaged_windows() -> dict[str, int]:
    return _packaged("windows.json", "context_tokens")


def _packaged_prices() -> dict[str, Price]:
    table = _packaged("prices.json", "usd_per_million_tokens")
    return {name: _price(PriceSettings.model_validate(row)) for name, row in table.items()}


def _price(row: PriceSettings) -> Price:
    cached = row.input if row.cached_input is None else row.cached_input
    return Price(
        row.input * _NANO_PER_MILLION, cached * _NANO_PER_MILLION, row.output * _NANO_PER_MILLION
    )
