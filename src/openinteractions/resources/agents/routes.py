"""The HTTP face of `/agents`."""

from fastapi import APIRouter, Request, Response

from openinteractions.api import body, names
from openinteractions.api.docs import ERRORS, json_body, json_response
from openinteractions.api.pages import PageDep
from openinteractions.api.scope import CallerDep
from openinteractions.resources.agents.schemas import Agent, AgentList, AgentVersions
from openinteractions.resources.agents.service import Agents
from openinteractions.wire.agents import parse_create, parse_update

assert names, "it makes the `agent` of the paths below"

router = APIRouter(tags=["agents"])

_MAX_BODY_BYTES = 8 * 2**20
_CONFLICT = {409: {"model": ERRORS[400]["model"], "description": "There is one of this id."}}


def _agents(request: Request) -> Agents:
    agents: Agents = request.app.state.agents
    return agents


async def _body(request: Request) -> bytes:
    limits = request.app.state.limits
    return await body.read(
        request,
        max_bytes=min(_MAX_BODY_BYTES, limits.max_body_bytes),
        silence_s=limits.body_timeout.total_seconds(),
    )


@router.post(
    "/agents",
    response_model=None,
    responses={200: json_response(Agent), **ERRORS, **_CONFLICT},
    openapi_extra=json_body("CreateAgent"),
)
async def create_agent(request: Request, caller: CallerDep) -> Response:
    """Define an agent under an id of your own; interactions call it by that id."""
    depth = request.app.state.limits.max_json_depth
    name, definition = parse_create(await _body(request), max_depth=depth)
    return _json(await _agents(request).create(caller.project_id, name, definition))


@router.get(
    "/agents",
    response_model=None,
    responses={200: json_response(AgentList), **ERRORS},
)
async def list_agents(
    request: Request,
    caller: CallerDep,
    page: PageDep,
) -> Response:
    """List agents of your own, newest first."""
    listing = _agents(request).listing(
        caller.project_id,
        page,
    )
    return _json(await listing)


@router.get(
    "/agents/{agent_id:agent}/versions",
    response_model=None,
    responses={200: json_response(AgentVersions), **ERRORS},
)
async def list_agent_versions(
    request: Request,
    caller: CallerDep,
    agent_id: str,
    page: PageDep,
) -> Response:
    """List the versions of an agent, newest first. An addition to the contract."""
    listing = _agents(request).versions(
        caller.project_id,
        agent_id,
        page,
    )
    return _json(await listing)


@router.get(
    "/agents/{agent_id:agent}/versions/{version}",
    response_model=None,
    responses={200: json_response(Agent), **ERRORS},
)
async def get_agent_version(
    request: Request, caller: CallerDep, agent_id: str, version: str
) -> Response:
    """Read a version of an agent. An addition to the contract."""
    return _json(await _agents(request).get(caller.project_id, f"{agent_id}@{version}"))


@router.get(
    "/agents/{agent_id:agent}",
    response_model=None,
    responses={200: json_response(Agent), **ERRORS},
)
async def get_agent(request: Request, caller: CallerDep, agent_id: str) -> Response:
    """Read an agent of your own in its current version; `<id>@<version>` is another one."""
    return _json(await _agents(request).get(caller.project_id, agent_id))


@router.patch(
    "/agents/{agent_id:agent}",
    response_model=None,
    responses={200: json_response(Agent), **ERRORS},
    openapi_extra=json_body("UpdateAgent"),
)
async def update_agent(
    request: Request, caller: CallerDep, agent_id: str, *, update_mask: str | None = None
) -> Response:
    """Make a new version of an agent: what the body names changes, what is null goes.

    `update_mask` names the only fields of the body to change, with commas between them. What
    answers do not show stays where the body does not name it; an answer with changes in it is a
    good body. Calls that pin an earlier version, as `<id>@<version>`, go on with that one. An
    addition to the contract.
    """
    name = agent_id.removeprefix("agents/")
    depth = request.app.state.limits.max_json_depth
    change = parse_update(
        await _body(request),
        name,
        update_mask=update_mask or request.query_params.get("updateMask"),
        max_depth=depth,
    )
    return _json(await _agents(request).update(caller.project_id, name, change))


@router.delete(
    "/agents/{agent_id:agent}",
    response_model=None,
    responses={200: {"description": "Deleted."}, **ERRORS},
)
async def delete_agent(request: Request, caller: CallerDep, agent_id: str) -> Response:
    """Delete an agent with all its versions. Interactions and environments of its calls stay."""
    await _agents(request).delete(caller.project_id, agent_id)
    return _json(b"{}")


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
