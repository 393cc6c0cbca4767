"""The HTTP face of media that interactions refer to by `uri`."""

from fastapi import APIRouter, Request, Response

from openinteractions.api.docs import ERRORS
from openinteractions.api.scope import CallerDep
from openinteractions.errors import NotFound
from openinteractions.resources.files import store

router = APIRouter(tags=["files"])

_HASH_DIGITS = 64


@router.get(
    "/media/{sha256}",
    response_model=None,
    responses={200: {"description": "The bytes.", "content": {"*/*": {}}}, **ERRORS},
)
async def get_media(request: Request, caller: CallerDep, sha256: str) -> Response:
    """The bytes of a generated image, audio or video. An addition to the contract."""
    try:
        key = bytes.fromhex(sha256) if len(sha256) == _HASH_DIGITS else b""
    except ValueError:
        key = b""
    found = await store.get(request.app.state.database, caller.project_id, [key])
    if key not in found:
        raise NotFound(f"Media '{sha256[:80]}' not found.")
    blob = found[key]
    headers = {
        # Generated and user-sent bytes are never run as a page of this origin.
        "Content-Security-Policy": "sandbox",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": "attachment",
    }
    return Response(blob.data, media_type=blob.mime_type, headers=headers)
