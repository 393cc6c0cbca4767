"""The key set that verifies callbacks."""

import orjson
from fastapi import APIRouter, Request, Response

from openinteractions.resources.webhooks.service import Deliverer

router = APIRouter(tags=["webhooks"])


@router.get("/.well-known/jwks.json", response_model=None, include_in_schema=False)
async def get_key_set(request: Request) -> Response:
    """The public keys that callbacks are signed with. No API key is needed."""
    deliverer: Deliverer = request.app.state.deliverer
    headers = {"Cache-Control": "public, max-age=300"}
    body = orjson.dumps(await deliverer.key_set())
    return Response(body, headers=headers, media_type="application/json")
