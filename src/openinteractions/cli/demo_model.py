"""Which model the demo asks: a configured one if there is any, else a small local one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from openinteractions.cli import models
from openinteractions.errors import SetupError
from openinteractions.models.local.catalog import Weights, catalog, find
from openinteractions.settings import ProviderSettings, Settings

_VENDORS: Final[Mapping[str, tuple[str, str]]] = {
    "gemini": ("generativelanguage.googleapis.com", "gemini-flash-latest"),
    "openai": ("api.openai.com", "gpt-5-mini"),
    "anthropic": ("api.anthropic.com", "claude-haiku-4-5"),
}
"""Kind → the vendor's own host, and a cheap model that it serves."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is asked."""

    model: str
    why: str
    """In words, for people."""
    weights: Weights | None = None
    """Of a packaged model; it has to be downloaded first."""


def choose(settings: Settings, wanted: str | None) -> Choice:
    """The model that was asked for, else the configured one, else a local one.

    Raises:
        SetupError: There is no such local model, or providers are configured but no model of theirs
            is known.
    """
    if wanted is not None:
        name = f"local/{wanted}" if wanted in catalog() else wanted
        return _named(settings, name, "as asked")
    if settings.models.default is not None:
        return _named(settings, settings.models.default, "models.default of the settings")
    for name, provider in settings.providers.items():
        model = _model_of(settings, name, provider)
        if model is not None:
            return _named(settings, model, f"from the provider '{name}' of the settings")
    if settings.providers:
        name = next(iter(settings.providers))
        raise SetupError(
            f"the provider '{name}' does not say which models it has: set models.default ="
            f" '{name}/<model>', or use --model {name}/<model>"
        )
    if settings.local.gguf is not None:
        return Choice(f"local/{settings.local.gguf.stem}", f"the file {settings.local.gguf}")
    weights = models.choose(settings)
    return Choice(f"local/{weights.name}", weights.label, weights)


def _named(settings: Settings, model: str, why: str) -> Choice:
    """A model by its ID or alias; a packaged one comes with what has to be downloaded."""
    provider, _, name = settings.models.aliases.get(model, model).partition("/")
    configured = settings.providers.get(provider)
    is_local = configured.kind == "local" if configured else provider == "local"
    own = settings.local.gguf
    if not is_local or (own is not None and name in {own.stem, "default"}):
        return Choice(model, why)
    return Choice(model, why, models.choose(settings) if name == "default" else find(name))


def _model_of(settings: Settings, name: str, provider: ProviderSettings) -> str | None:
    """A model of this provider that is known to exist."""
    if provider.kind == "local":
        return f"{name}/default"
    host, model = _VENDORS[provider.kind]
    if provider.base_url is None or urlsplit(provider.base_url).hostname == host:
        return f"{name}/{model}"
    targets = settings.models.aliases.values()
    return next((target for target in targets if target.startswith(f"{name}/")), None)
