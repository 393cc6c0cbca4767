"""From a request to the run spec: who runs which tool."""

from collections.abc import AsyncGenerator

import aiohttp
import orjson
import pytest

from openinteractions.errors import Invalid
from openinteractions.loop.spec import Limits, RunSpec
from openinteractions.models.catalog import Catalog
from openinteractions.models.port import Json
from openinteractions.resources.interactions.runner import Prepared
from openinteractions.runs import prepare
from openinteractions.settings import ModelSettings, ProviderSettings
from openinteractions.wire.create import parse_create

CODE = {"type": "code_execution"}


@pytest.fixture
async def catalog() -> AsyncGenerator[Catalog]:
    kinds = {"goog": "gemini", "acme": "openai", "anth": "anthropic"}
    providers = {
        name: ProviderSettings.model_validate(
            {"kind": kind, "base_url": "http://127.0.0.1:9", "api_key": "none"}
        )
        for name, kind in kinds.items()
    }
    models = ModelSettings(fallbacks={"goog/m": ["acme/m"]})
    async with aiohttp.ClientSession() as session:
        yield Catalog(providers, models, session, local=None)


async def never(steps: object, target: object) -> list[Json]:
    del target
    return steps  # pyright: ignore[reportReturnType]


async def prepared(catalog: Catalog, *, vendor: bool = False, **body: object) -> Prepared:
    request = parse_create(orjson.dumps({"input": "x", **body}), max_depth=50)
    return await prepare.prepare(
        request,
        catalog,
        never,  # pyright: ignore[reportArgumentType]
        defaults=Limits(),
        base_url="",
        vendor_runs_code=vendor,
    )


@pytest.mark.parametrize("model", ["goog/other", "acme/m", "anth/m"])
async def test_code_runs_in_our_sandbox_for_every_vendors_model(catalog: Catalog, model: str):
    made = await prepared(catalog, model=model, tools=[CODE])
    spec = RunSpec.load(made.spec)
    assert (spec.own_tools, spec.tools) == ([CODE], [])
    assert made.needs_sandbox
    assert made.needs_environment


async def test_the_vendor_runs_it_where_it_can_and_the_operator_wants_it(catalog: Catalog):
    made = await prepared(catalog, model="goog/other", tools=[CODE], vendor=True)
    assert RunSpec.load(made.spec).tools == [CODE]
    assert not made.needs_environment


@pytest.mark.parametrize("model", ["acme/m", "goog/m"])
async def test_not_where_it_or_its_fallback_cannot(catalog: Catalog, model: str):
    made = await prepared(catalog, model=model, tools=[CODE], vendor=True)
    assert RunSpec.load(made.spec).own_tools == [CODE]


async def test_an_environment_alone_needs_no_sandbox(catalog: Catalog):
    made = await prepared(catalog, model="acme/m", environment="remote")
    assert made.needs_environment
    assert not made.needs_sandbox


async def test_a_function_cannot_take_the_name_of_a_tool_of_ours(catalog: Catalog):
    function = {"type": "function", "name": "code_execution"}
    with pytest.raises(Invalid, match=r"tools\[1\]\.name"):
        await prepared(catalog, model="acme/m", tools=[CODE, function])
    await prepared(catalog, model="acme/m", tools=[function])


async def test_an_environment_needs_store(catalog: Catalog):
    with pytest.raises(Invalid, match="'environment' needs 'store'"):
        await prepared(catalog, model="acme/m", environment="remote", store=False)
    made = await prepared(catalog, model="acme/m", tools=[CODE], store=False)
    assert made.needs_sandbox
