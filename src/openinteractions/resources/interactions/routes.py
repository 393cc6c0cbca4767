"""The HTTP face of `/interactions`."""

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
import structlog
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from openinteractions.api import body, presence, scope
from openinteractions.api.direct import DirectRoute
from openinteractions.api.docs import ERRORS, json_body, json_response, stream_response
from openinteractions.api.pages import PageDep
from openinteractions.api.scope import Caller, CallerDep
from openinteractions.errors import Invalid
from openinteractions.events.types import decode_cursor
from openinteractions.resources.interactions import render, service, store, stream
from openinteractions.resources.interactions.schemas import InteractionList
from openinteractions.resources.interactions.service import Asked, Service
from openinteractions.resources.interactions.store import Interaction as StoredInteraction
from openinteractions.wire.create import CreateInteraction, parse_create
from openinteractions.wire.interaction import Interaction

router = APIRouter(tags=["interactions"])

_MAX_KEY_CHARS = 255
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_STATUSES = frozenset(
    {
        "queued",
        "in_progress",
        "requires_action",
        "completed",
        "failed",
        "cancelled",
        "incomplete",
        "budget_exceeded",
        "requires_continuation",
    }
)


def _service(request: Request) -> Service:
    here: Service = request.app.state.interactions
    return here


async def create_interaction(request: Request) -> Response:
    """Create an interaction: a model's answer, with the conversation kept by the server.

    With `stream: true` the answer is a stream of server-sent events.
    """
    caller = await scope.caller(request)
    limits = request.app.state.limits
    raw = await body.read(
        request,
        max_bytes=limits.max_body_bytes,
        silence_s=limits.body_timeout.total_seconds(),
    )
    parsed = parse_create(raw, max_depth=limits.max_json_depth)
    here = _service(request)
    # Only media that are delivered by `uri` need to know where this server is reached.
    base_url = ""
    if parsed.media_formats:
        base_url = request.app.state.public_url or str(request.base_url).rstrip("/")
    asked = Asked(
        request=parsed,
        digest=hashlib.sha256(raw).digest(),
        idempotency_key=_idempotency_key(request, parsed),
        base_url=base_url,
    )
    if not parsed.store:
        return await _create_unstored(request, here, caller, asked)
    try:
        earlier = await service.find_earlier(here, caller, asked)
        if earlier is None:
            return await _create_stored(request, here, caller, asked)
    except store.KeyTaken:
        # Another create with the same Idempotency-Key came in between.
        earlier = await service.find_earlier(here, caller, asked)
        if earlier is None:
            raise
    structlog.contextvars.bind_contextvars(interaction_id=earlier.id.hex, joined=True)
    async with presence.noticing(request, lambda: service.lost(here, earlier, asked)):
        return await _join(here, caller, parsed, earlier)


async def _create_stored(request: Request, here: Service, caller: Caller, asked: Asked) -> Response:
    started = await service.create_stored(here, caller, asked)
    structlog.contextvars.bind_contextvars(interaction_id=started.row.id.hex)
    if asked.request.stream:
        return _events(stream.fresh(here, started))
    if asked.request.background:
        return _json(render.interaction(started.row, ()))
    async with presence.noticing(request, lambda: service.lost(here, started.row, asked)):
        return _json(await service.result(here, caller, started))


async def _join(
    here: Service, caller: Caller, parsed: CreateInteraction, row: StoredInteraction
) -> Response:
    """Answer a repeated create with the interaction that it made the first time."""
    if parsed.stream:
        return _events(stream.resumed(here, row, None))
    if parsed.background:
        return _json(
            render.interaction(row, await service.steps_of(here, row, start=row.input_count))
        )
    return _json(await service.later_result(here, caller, row))


router.add_api_route(
    "/interactions",
    create_interaction,
    methods=["POST"],
    response_model=None,
    responses={200: json_response(Interaction) | stream_response(), **ERRORS},
    openapi_extra=json_body("CreateInteraction"),
    route_class_override=DirectRoute,
)


async def _create_unstored(
    request: Request, here: Service, caller: Caller, asked: Asked
) -> Response:
    parsed = asked.request
    run = await service.create_unstored(here, caller, parsed, asked.base_url)
    if parsed.stream:
        return _events(stream.unstored(run))
    try:
        # It ends with its caller (ruling R16).
        async with presence.noticing(request, run.stop):
            return _json(render.unstored(parsed, await run.ended()))
    finally:
        await run.stop()


@router.get(
    "/interactions",
    response_model=None,
    responses={200: json_response(InteractionList), **ERRORS},
)
async def list_interactions(  # noqa: PLR0913 - one for each query field
    request: Request,
    caller: CallerDep,
    page: PageDep,
    *,
    status: Annotated[list[str] | None, Query()] = None,
    model: str | None = None,
    agent: str | None = None,
    label: Annotated[list[str] | None, Query()] = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
) -> Response:
    """List interactions, newest first, without their steps. An addition to the contract.

    `status` and `label` (as `key:value`) may be repeated: any of the statuses, all of the labels.
    """
    narrow = store.Filter(
        status=_statuses(status or []),
        model=_text("model", model),
        agent=_text("agent", agent),
        labels=_labels(label or []),
        created_after=_aware("created_after", created_after),
        created_before=_aware("created_before", created_before),
    )
    return _json(await service.listing(_service(request), caller, narrow, page))


@router.get(
    "/interactions/{interaction_id:path}",
    response_model=None,
    responses={200: json_response(Interaction) | stream_response(), **ERRORS},
)
async def get_interaction(
    request: Request,
    caller: CallerDep,
    interaction_id: str,
    *,
    stream_: Annotated[bool, Query(alias="stream")] = False,
    last_event_id: str | None = None,
    include_input: bool = False,
) -> Response:
    """Read an interaction, or follow it as a stream, also from the middle (`last_event_id`)."""
    here = _service(request)
    wants_stream = stream_ or interaction_id.endswith(":stream")
    row = await service.get(here, caller, interaction_id.removesuffix(":stream"))
    if wants_stream:
        text = last_event_id or request.query_params.get("lastEventId")
        cursor = decode_cursor(row.id, text) if text else None
        return _events(stream.resumed(here, row, cursor))
    steps = await service.steps_of(here, row)
    return _json(render.interaction(row, steps, include_input=include_input))


@router.post(
    "/interactions/{interaction_id:path}/cancel",
    response_model=None,
    responses={200: json_response(Interaction), **ERRORS},
)
async def cancel_interaction(request: Request, caller: CallerDep, interaction_id: str) -> Response:
    """Stop an interaction. What it has done stays; one that has ended is returned as it is."""
    here = _service(request)
    row = await service.cancel(here, caller, interaction_id)
    return _json(render.interaction(row, await service.steps_of(here, row)))


@router.post("/interactions/{interaction_id}:cancel", include_in_schema=False, response_model=None)
async def cancel_interaction_verb(
    request: Request, caller: CallerDep, interaction_id: str
) -> Response:
    """The spelling of the documentation's curl examples."""
    return await cancel_interaction(request, caller, interaction_id)


@router.delete(
    "/interactions/{interaction_id:path}",
    response_model=None,
    responses={200: {"description": "Deleted."}, **ERRORS},
)
async def delete_interaction(request: Request, caller: CallerDep, interaction_id: str) -> Response:
    """Delete an interaction for good. Those that continue it go on working."""
    await service.delete(_service(request), caller, interaction_id)
    return _json(b"{}")


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _events(frames: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(frames, media_type="text/event-stream", headers=_SSE_HEADERS)


def _idempotency_key(request: Request, parsed: CreateInteraction) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not parsed.store:
        raise Invalid(
            "An Idempotency-Key needs 'store': an unstored interaction is not found again."
        )
    if not 0 < len(key) <= _MAX_KEY_CHARS or not key.isprintable():
        raise Invalid(f"The Idempotency-Key must be 1 to {_MAX_KEY_CHARS} printable characters.")
    return key


def _statuses(values: list[str]) -> list[str]:
    for value in values:
        if value not in _STATUSES:
            raise Invalid(f"Invalid enum value '{value[:40]}' at 'status'.")
    return values


def _labels(values: list[str]) -> str | None:
    pairs: dict[str, Any] = {}
    for value in values:
        key, colon, text = value.partition(":")
        if not key or not colon or "\x00" in value:
            raise Invalid("Invalid value for 'label': expected 'key:value'.")
        pairs[key] = text
    return orjson.dumps(pairs).decode() if pairs else None


def _text(name: str, value: str | None) -> str | None:
    if value is not None and "\x00" in value:
        raise Invalid(f"Invalid value for '{name}': it holds a NUL character.")
    return value


def _aware(name: str, moment: datetime | None) -> datetime | None:
    if moment is not None and moment.tzinfo is None:
        raise Invalid(f"Invalid value for '{name}': it needs a time zone, for example a final Z.")
    try:
        return moment and moment.astimezone(UTC)
    except OverflowError:
        raise Invalid(f"Invalid value for '{name}': there is no such time in UTC.") from None
