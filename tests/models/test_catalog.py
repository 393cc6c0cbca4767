"""Which model an ID means."""

from typing import Any

import aiohttp
import pytest

from openinteractions.errors import NotFound
from openinteractions.models.catalog import Catalog
from openinteractions.settings import ModelSettings, ProviderSettings

PROVIDERS = {
    "acme": ProviderSettings(kind="openai", base_url="http://127.0.0.1:9/v1"),
    "goog": ProviderSettings(kind="gemini", base_url="http://127.0.0.1:9"),
    "anth": ProviderSettings(kind="anthropic", base_url="http://127.0.0.1:9"),
}


async def catalog(**models: object) -> Catalog:
    async with aiohttp.ClientSession() as session:
        return Catalog(PROVIDERS, ModelSettings.model_validate(models), session, local=None)


async def test_a_provider_and_any_model_of_it():
    assert (await catalog()).resolve("acme/some/model") == ["acme/some/model"]


async def test_a_bare_id_goes_to_a_provider_of_its_kind():
    assert (await catalog()).resolve("gemini-9-pro") == ["goog/gemini-9-pro"]


async def test_an_alias_goes_before_a_pattern():
    found = await catalog(aliases={"gemini-9-pro": "acme/m"})
    assert found.resolve("gemini-9-pro") == ["acme/m"]


async def test_fallbacks_follow_in_their_order_and_once():
    found = await catalog(fallbacks={"acme/m": ["goog/a", "acme/m", "acme/b"]})
    assert found.resolve("acme/m") == ["acme/m", "goog/a", "acme/b"]


async def test_a_fallback_that_leads_nowhere_is_left_out():
    found = await catalog(fallbacks={"acme/m": ["other/model", "goog/a"]})
    assert found.resolve("acme/m") == ["acme/m", "goog/a"]


async def test_an_unknown_model_names_what_there_is():
    with pytest.raises(NotFound, match="acme/…, goog/…"):
        (await catalog()).resolve("nobody-knows")


async def test_prices_are_found_by_the_longest_name():
    found = await catalog(
        prices={"m": {"input": 1, "output": 2}, "m-big": {"input": 3, "output": 4}}
    )
    price = found.open("acme/m-big-2026-11").price
    assert price is not None
    assert (price.input, price.cached_input, price.output) == (3_000, 3_000, 4_000)
    assert found.open("acme/nobody").price is None


@pytest.mark.parametrize(
    ("target", "window"),
    [
        ("acme/gpt-4o-mini", 128_000),
        ("acme/gpt-4-0613", 8_192),
        ("acme/gpt-4.1-nano", 1_000_000),
        ("goog/gemini-2.5-pro", 1_000_000),
        ("anth/claude-sonnet-4", 200_000),
        ("acme/meta-llama/Llama-3.1-8B-Instruct", 128_000),
        ("acme/nobody-knows", 128_000),
    ],
)
async def test_windows_are_found_by_the_longest_beginning(target: str, window: int):
    assert (await catalog()).open(target).context_tokens == window


@pytest.mark.parametrize("name", ["acme/owner/gpt-4o", "owner/gpt-4o", "gpt-4o"])
async def test_a_configured_window_goes_first(name: str):
    found = await catalog(context_tokens={name: 9_000})
    assert found.open("acme/owner/gpt-4o").context_tokens == 9_000


async def test_a_local_model_has_its_slots_part_of_the_window():
    async with aiohttp.ClientSession() as session:
        settings = ModelSettings()
        local: Any = object()
        found = Catalog(PROVIDERS, settings, session, local=local, local_context_tokens=4_096)
    assert found.open("local/gpt-4o").context_tokens == 4_096
    assert found.open("acme/gpt-4o").context_tokens == 128_000
