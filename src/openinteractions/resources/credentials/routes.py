"""The HTTP face of `/credentials`."""

from fastapi import APIRouter, Request, Response

from openinteractions.api import body
from openinteractions.api.docs import ERRORS, json_body, json_response
from openinteractions.api.pages import PageDep
from openinteractions.api.scope import CallerDep
from openinteractions.resources.credentials.schemas import Credential, CredentialList
from openinteractions.resources.credentials.service import Vault
from openinteractions.wire.credentials import parse_create, parse_update

router = APIRouter(tags=["credentials"])

_MAX_BODY_BYTES = 512 * 1024
_CONFLICT = {409: {"model": ERRORS[400]["model"], "description": "There is one of this id."}}


def _vault(request: Request) -> Vault:
    vault: Vault = request.app.state.vault
    return vault


async def _body(request: Request) -> bytes:
    limits = request.app.state.limits
    return await body.read(
        request,
        max_bytes=min(_MAX_BODY_BYTES, limits.max_body_bytes),
        silence_s=limits.body_timeout.total_seconds(),
    )


@router.post(
    "/credentials",
    response_model=None,
    responses={200: json_response(Credential), **ERRORS, **_CONFLICT},
    openapi_extra=json_body("CreateCredential"),
)
async def create_credential(request: Request, caller: CallerDep) -> Response:
    """Store a secret that is used for you, and never shown again."""
    name, content = parse_create(
        await _body(request), max_depth=request.app.state.limits.max_json_depth
    )
    return _json(await _vault(request).create(caller.project_id, name, content))


@router.get(
    "/credentials",
    response_model=None,
    responses={200: json_response(CredentialList), **ERRORS},
)
async def list_credentials(
    request: Request,
    caller: CallerDep,
    page: PageDep,
) -> Response:
    """List credentials, newest first."""
    listing = _vault(request).listing(
        caller.project_id,
        page,
    )
    return _json(await listing)


@router.get(
    "/credentials/{credential_id:path}",
    response_model=None,
    responses={200: json_response(Credential), **ERRORS},
)
async def get_credential(request: Request, caller: CallerDep, credential_id: str) -> Response:
    """Read what is shown of a credential."""
    return _json(await _vault(request).get(caller.project_id, credential_id))


@router.patch(
    "/credentials/{credential_id:path}",
    response_model=None,
    responses={200: json_response(Credential), **ERRORS},
    openapi_extra=json_body("UpdateCredential"),
)
async def update_credential(
    request: Request, caller: CallerDep, credential_id: str, *, update_mask: str | None = None
) -> Response:
    """Change a credential. What the body does not name stays as it is, `type` always does.

    `update_mask` names the only fields of the body to change, with commas between them.
    """
    change = parse_update(
        await _body(request),
        update_mask=update_mask or request.query_params.get("updateMask"),
        max_depth=request.app.state.limits.max_json_depth,
    )
    return _json(await _vault(request).update(caller.project_id, credential_id, change))


@router.delete(
    "/credentials/{credential_id:path}",
    response_model=None,
    responses={200: {"description": "Deleted."}, **ERRORS},
)
async def delete_credential(request: Request, caller: CallerDep, credential_id: str) -> Response:
    """Delete a credential; from then on it is not injected any more."""
    await _vault(request).delete(caller.project_id, credential_id)
    return _json(b"{}")


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
