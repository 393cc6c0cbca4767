"""From a request to the run spec: who runs which tool."""

from collections.abc import AsyncGenerator, Sequence

import aiohttp
import orjson
import pytest

from openinteractions.errors import Invalid
from openinteractions.loop import approval
from openinteractions.loop.spec import Limits, RunSpec
from openinteractions.models.catalog import Catalog
from openinteractions.models.port import Json
from openinteractions.resources.interactions.runner import Prepared
from openinteractions.runs import prepare
from openinteractions.runs.assign import Powers
from openinteractions.runs.brief import of_model
from openinteractions.settings import ModelSettings, ProviderSettings
from openinteractions.tools.port import Means
from openinteractions.tools.toolbox import toolbox
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


async def prepared(
    catalog: Catalog,
    *,
    vendor: bool = False,
    search: bool = False,
    pending: Sequence[Json] = (),
    **body: object,
) -> Prepared:
    request = parse_create(orjson.dumps({"input": "x", **body}), max_depth=50)
    around = prepare.Surroundings(
        catalog=catalog,
        inliner=never,  # pyright: ignore[reportArgumentType]
        defaults=Limits(),
        base_url="",
        powers=Powers(
            vendor_runs_code=vendor,
            search_types=frozenset({"web_search"}) if search else frozenset(),
        ),
        pending=pending,
    )
    return await prepare.prepare(request, of_model(request), around)


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
    assert made.warnings == []


@pytest.mark.parametrize("vendor", [True, False])
async def test_an_environment_that_the_vendor_does_not_see_is_told(
    catalog: Catalog, *, vendor: bool
):
    made = await prepared(
        catalog, model="goog/other", tools=[CODE], vendor=vendor, environment="remote"
    )
    told = [(one["code"], one["field"]) for one in made.warnings]
    assert told == ([("environment_unused", "environment")] if vendor else [])


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


async def test_an_environment_that_is_there_needs_store(catalog: Catalog):
    for environment in ("0" * 32, {"type": "remote", "environment_id": "0" * 32}):
        with pytest.raises(Invalid, match="'environment' needs 'store'"):
            await prepared(catalog, model="acme/m", environment=environment, store=False)
    for environment in ("remote", "REMOTE", {"type": "remote", "network": "disabled"}):
        made = await prepared(catalog, model="acme/m", environment=environment, store=False)
        assert made.needs_environment
    made = await prepared(catalog, model="acme/m", tools=[CODE], store=False)
    assert made.needs_sandbox


SEARCH = {"type": "google_search"}
PAGES = {"type": "url_context"}


@pytest.mark.parametrize(
    ("model", "has_backend", "who"),
    [
        ("goog/other", False, "vendor"),
        ("goog/other", True, "vendor"),
        ("acme/m", True, "us"),
        ("goog/m", True, "us"),
        ("anth/m", True, "us"),
        ("anth/m", False, "vendor"),
    ],
)
async def test_who_searches(catalog: Catalog, model: str, has_backend: bool, who: str):
    made = await prepared(catalog, model=model, tools=[SEARCH], search=has_backend)
    spec = RunSpec.load(made.spec)
    assert (spec.tools, spec.own_tools) == (([SEARCH], []) if who == "vendor" else ([], [SEARCH]))
    assert not made.needs_environment


@pytest.mark.parametrize("model", ["acme/m", "goog/m"])
async def test_without_a_backend_a_search_is_refused(catalog: Catalog, model: str):
    with pytest.raises(Invalid, match=r"google_search.*no search backend"):
        await prepared(catalog, model=model, tools=[SEARCH])


async def test_a_backend_that_cannot_search_for_pictures_says_so(catalog: Catalog):
    pictures = {**SEARCH, "search_types": ["image_search"]}
    with pytest.raises(Invalid, match="image_search"):
        await prepared(catalog, model="acme/m", tools=[pictures], search=True)


@pytest.mark.parametrize(("model", "is_ours"), [("acme/m", True), ("goog/other", False)])
async def test_who_reads_pages(catalog: Catalog, model: str, is_ours: bool):
    spec = RunSpec.load((await prepared(catalog, model=model, tools=[PAGES])).spec)
    assert (spec.own_tools == [PAGES]) is is_ours


WEATHER = {"type": "function", "name": "weather"}


@pytest.mark.parametrize(
    ("model", "beside", "is_vendors"),
    [
        ("goog/gemini-2.5-flash", WEATHER, False),
        ("goog/gemini-2.5-flash", CODE, False),
        ("goog/gemini-2.0-flash", {"type": "tool_search"}, False),
        ("goog/gemini-2.5-flash", PAGES, True),
        ("goog/gemini-3-pro", WEATHER, True),
    ],
)
async def test_an_old_gemini_searches_only_without_functions(
    catalog: Catalog, model: str, beside: Json, is_vendors: bool
):
    tools = [SEARCH, PAGES, beside]
    if beside["type"] == "tool_search":
        tools.append({"type": "function", "name": "convert", "defer_loading": True})
    here = await prepared(catalog, model=model, tools=tools, search=True)
    spec = RunSpec.load(here.spec)
    assert (SEARCH in spec.tools, SEARCH in spec.own_tools) == (is_vendors, not is_vendors)
    assert (PAGES in spec.own_tools) is not is_vendors
    assert here.warnings == []
    nowhere = await prepared(catalog, model=model, tools=tools)
    spec = RunSpec.load(nowhere.spec)
    assert (SEARCH in spec.tools, SEARCH in spec.own_tools) == (is_vendors, False)
    warned = [(warning["code"], warning["field"]) for warning in nowhere.warnings]
    assert warned == ([] if is_vendors else [("tool_left_out", "tools.google_search")])


async def test_an_old_gemini_runs_code_here_beside_functions(catalog: Catalog):
    asked = {"model": "goog/gemini-2.5-flash", "vendor": True}
    assert (await prepared(catalog, **asked, tools=[CODE, WEATHER])).needs_sandbox
    assert not (await prepared(catalog, **asked, tools=[CODE, SEARCH])).needs_sandbox


LATER = {"type": "function", "name": "convert", "defer_loading": True}


async def test_deferred_functions_need_a_search_for_them(catalog: Catalog):
    with pytest.raises(Invalid, match=r"tools\[0\]\.defer_loading"):
        await prepared(catalog, model="acme/m", tools=[LATER])
    made = await prepared(catalog, model="acme/m", tools=[LATER, {"type": "tool_search"}])
    spec = RunSpec.load(made.spec)
    assert spec.own_tools == [{"type": "tool_search", "functions": [LATER]}]
    assert not made.needs_environment
    with pytest.raises(Invalid, match="tool_search"):
        await prepared(catalog, model="acme/m", tools=[{"type": "tool_search"}])


async def test_a_search_for_functions_that_the_client_runs(catalog: Catalog):
    search = {"type": "tool_search", "execution": "client", "name": "find", "description": "d"}
    spec = RunSpec.load((await prepared(catalog, model="acme/m", tools=[LATER, search])).spec)
    assert spec.own_tools == []
    assert spec.tools[1] == {"type": "function", "name": "find", "description": "d", "loads": True}
    with pytest.raises(Invalid, match=r"tools\[0\]\.name"):
        await prepared(
            catalog, model="acme/m", tools=[{"type": "tool_search", "execution": "client"}]
        )


async def test_consent_is_asked_for_tools_that_there_are(catalog: Catalog):
    asked = {"model": "acme/m", "tools": [CODE, PAGES]}
    made = await prepared(catalog, **asked, limits={"approve": ["Code_execution", "url*"]})
    assert RunSpec.load(made.spec).approve == ["Code_execution", "url*"]
    with pytest.raises(Invalid, match=r"'approve' names 'delete'.*code_execution, url_context"):
        await prepared(catalog, **asked, limits={"approve": ["delete"]})


async def test_a_function_cannot_pass_itself_off_as_the_question(catalog: Catalog):
    asked = {"model": "acme/m", "tools": [{"type": "function", "name": "approval"}, CODE]}
    with pytest.raises(Invalid, match=r"tools\[0\]\.name"):
        await prepared(catalog, **asked, limits={"approve": ["*"]})
    # Where nothing needs consent, the name is free.
    await prepared(catalog, **asked)


async def test_what_was_consented_to_is_part_of_the_spec(catalog: Catalog):
    arguments = {"language": "python", "code": "1"}
    call = {
        "type": "function_call",
        "id": "c1",
        "name": "approval",
        "arguments": {"tool": "code_execution", "arguments": arguments},
        "asks_for_consent": True,
    }
    answer = {"type": "function_result", "call_id": "c1", "name": "approval", "result": "approve"}
    asked = {"model": "acme/m", "input": [answer], "previous_interaction_id": "v1_x"}
    made = await prepared(catalog, pending=[call], tools=[CODE], **asked)
    approved = RunSpec.load(made.spec).approved
    assert approved == [{"call_id": "c1", "tool": "code_execution", "arguments": arguments}]
    assert made.consents == ["c1"]
    with pytest.raises(Invalid, match="'code_execution' was approved"):
        await prepared(catalog, pending=[call], **asked)


async def test_a_pattern_that_means_nothing_is_a_slip(catalog: Catalog):
    with pytest.raises(Invalid, match=r"'approve' names 'github/\*'"):
        await prepared(
            catalog, model="acme/m", tools=[CODE], limits={"approve": ["github/*", "code*"]}
        )


async def test_what_needs_consent_is_run_here(catalog: Catalog):
    asked = {"model": "goog/other", "tools": [CODE, PAGES], "limits": {"approve": ["*"]}}
    spec = RunSpec.load((await prepared(catalog, **asked, vendor=True)).spec)
    assert (spec.own_tools, spec.tools) == ([CODE, PAGES], [])
    asked["tools"] = [SEARCH]
    with pytest.raises(Invalid, match="cannot wait for consent"):
        await prepared(catalog, **asked)
    assert RunSpec.load((await prepared(catalog, **asked, search=True)).spec).own_tools == [SEARCH]


async def test_what_a_vendor_alone_can_run_cannot_be_asked_for(catalog: Catalog):
    maps = {"type": "google_maps"}
    with pytest.raises(Invalid, match="'google_maps'"):
        await prepared(
            catalog,
            model="goog/other",
            tools=[CODE, maps],
            limits={"approve": ["code*", "google*"]},
        )


async def test_consent_needs_store(catalog: Catalog):
    with pytest.raises(Invalid, match="'approve' needs 'store'"):
        await prepared(
            catalog, model="acme/m", tools=[CODE], store=False, limits={"approve": ["*"]}
        )


async def test_an_mcp_servers_tool_is_supervised_by_its_own_name(catalog: Catalog):
    known = {"name": "delete.repo", "description": "", "parameters": {"type": "object"}}
    entry = {"type": "mcp_server", "name": "github", "url": "https://h/mcp", "tools": [known]}
    box = toolbox([entry], Means())
    (name,) = box.all()
    assert name != "github__delete.repo"
    for pattern in ("github__delete.repo", "*DELETE.repo", "github__*", name):
        assert approval.means(pattern, name, box)
    assert not approval.means("github__create*", name, box)
