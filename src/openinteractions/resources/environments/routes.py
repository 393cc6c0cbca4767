"""The HTTP face of `/environments`."""

from typing import cast

import orjson
from fastapi import APIRouter, Request, Response

from openinteractions.api import body, names
from openinteractions.api.docs import ERRORS, json_body, json_response
from openinteractions.api.pages import PageDep
from openinteractions.api.scope import CallerDep
from openinteractions.resources.environments.service import Environments, shown_environment
from openinteractions.wire.body import read
from openinteractions.wire.environments import CREATE, Environment, EnvironmentList, NetworkLog
from openinteractions.wire.explain import validated
from openinteractions.wire.fields import Json

assert names, "it makes the `environment` of the paths below"

router = APIRouter(tags=["environments"])


def _service(request: Request) -> Environments:
    here: Environments = request.app.state.environments
    return here


@router.post(
    "/environments",
    response_model=None,
    responses={200: json_response(Environment), **ERRORS},
    openapi_extra=json_body("CreateEnvironment"),
)
async def create_environment(request: Request, caller: CallerDep) -> Response:
    """Make an environment: a new one with files from `sources`, or a copy of another one."""
    limits = request.app.state.limits
    raw = await body.read(
        request,
        max_bytes=limits.max_body_bytes,
        silence_s=limits.body_timeout.total_seconds(),
    )
    given = validated(CREATE, read(CREATE, raw or b"{}", max_depth=limits.max_json_depth))
    row = await _service(request).create(caller.project_id, cast("Json", given))
    return _json(orjson.dumps(shown_environment(row)))


@router.get(
    "/environments",
    response_model=None,
    responses={200: json_response(EnvironmentList), **ERRORS},
)
async def list_environments(
    request: Request,
    caller: CallerDep,
    page: PageDep,
) -> Response:
    """List environments, newest first."""
    rows, token = await _service(request).page(
        caller.project_id,
        page,
    )
    answer: Json = {"environments": [shown_environment(row) for row in rows]}
    if token is not None:
        answer["next_page_token"] = token
    return _json(orjson.dumps(answer))


@router.get(
    "/environments/{environment_id:environment}/network_log",
    response_model=None,
    responses={200: json_response(NetworkLog), **ERRORS},
)
async def list_network_events(
    request: Request,
    caller: CallerDep,
    environment_id: str,
    page: PageDep,
) -> Response:
    """List what an environment's sandbox connected to or was kept from, newest first.

    An addition to the contract.
    """
    return _json(
        await _service(request).network_log(
            caller.project_id,
            environment_id,
            page,
        )
    )


@router.get(
    "/environments/{environment_id:environment}",
    response_model=None,
    responses={200: json_response(Environment), **ERRORS},
)
async def get_environment(request: Request, caller: CallerDep, environment_id: str) -> Response:
    """Read an environment. One that expired lately still says so."""
    row = await _service(request).get(caller.project_id, environment_id)
    return _json(orjson.dumps(shown_environment(row)))


@router.delete(
    "/environments/{environment_id:environment}",
    response_model=None,
    responses={200: {"description": "Deleted."}, **ERRORS},
)
async def delete_environment(request: Request, caller: CallerDep, environment_id: str) -> Response:
    """Delete an environment and its files. What runs in it is killed."""
    await _service(request).delete(caller.project_id, environment_id)
    return _json(b"{}")


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
