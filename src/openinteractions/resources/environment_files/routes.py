"""The HTTP face of environments' files: `/environments/{id}/files` and `/upload/…`.

Uploads speak three protocols: the body at once; `X-Goog-Upload-…` headers, as SDKs do; and
`uploadType=resumable` with `Content-Range`.
"""

import re
from typing import Annotated, Any, Final
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from openinteractions.api import body, errors, names, presence, scope
from openinteractions.api.body import Pieces
from openinteractions.api.docs import ERRORS, ErrorBody, json_response
from openinteractions.api.pages import PageDep
from openinteractions.api.scope import CallerDep
from openinteractions.errors import Invalid, RequestError
from openinteractions.resources.environment_files import service
from openinteractions.resources.environment_files.service import Content, OutOfRange
from openinteractions.resources.environment_files.uploads import (
    MAX_BYTES,
    Progress,
    Upload,
    Uploads,
    Wish,
)
from openinteractions.resources.environments.service import Environments
from openinteractions.wire.environments import EnvironmentFiles

assert names, "it makes the `environment` of the paths below"

router = APIRouter(tags=["environment files"])
upload_router = APIRouter(tags=["environment files"])
"""To be mounted below `/upload/{version}`."""

_FILES: Final = "/environments/{environment_id:environment}/files"
_FILE: Final = _FILES + "/{path:path}"
_SAFE: Final = {
    # Files of a sandbox are never run as a page of this origin.
    "Content-Security-Policy": "sandbox",
    "X-Content-Type-Options": "nosniff",
}
_TRUE, _FALSE = frozenset({"true", "1", ""}), frozenset({"false", "0"})
_STATUS: Final = "X-Goog-Upload-Status"
_COMMAND: Final = "x-goog-upload-command"
_RANGE: Final = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(?:(\d{1,18})|\*)")
_WORDS: Final = frozenset({"start", "upload", "finalize", "query", "cancel"})
_LISTED: Final[dict[int | str, dict[str, Any]]] = {
    200: json_response(EnvironmentFiles)
    | {
        "description": "Entries; with `alt=media` the file's bytes, or the folder as tar archive.",
        "content": {"*/*": {}},
    },
    206: {"description": "The part of the file that was asked for.", "content": {"*/*": {}}},
    416: {"description": "The file has no such part.", "model": ErrorBody},
    **ERRORS,
}
_TAKEN: Final[dict[int | str, dict[str, Any]]] = {
    200: json_response(EnvironmentFiles) | {"description": "What was written; or: it has begun."},
    308: {"description": "More is to come; `Range` says how much is there."},
    409: {"description": "Something is there already.", "model": ErrorBody},
    **ERRORS,
}
_BYTES: Final[dict[str, Any]] = {
    "requestBody": {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    }
}


def _environments(request: Request) -> Environments:
    here: Environments = request.app.state.environments
    return here


def _uploads(request: Request) -> Uploads:
    here: Uploads = request.app.state.uploads
    return here


class _Sent(StreamingResponse):
    """Content on its way; what it comes from is closed whatever happens."""

    def __init__(self, content: Content, name: str) -> None:
        headers = {**_SAFE, "Content-Disposition": f'attachment; filename="{_ascii(name)}"'}
        status = 200
        if content.size is not None:
            headers["Accept-Ranges"] = "bytes"
            headers["Content-Length"] = str(content.size)
        if content.part is not None:
            status, start, length = 206, content.part.start, content.part.length
            headers["Content-Length"] = str(length)
            headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{content.size}"
        super().__init__(content.pieces, status, headers)
        # As it is: Starlette would add a charset to every text.
        self.headers["Content-Type"] = content.mime_type
        self._stack = content.stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


@router.get(_FILE, response_model=None, responses=_LISTED)
async def get_environment_file(  # noqa: PLR0913 - one for each query field
    request: Request,
    caller: CallerDep,
    environment_id: str,
    page: PageDep,
    path: str = "",
    *,
    recursive: bool = False,
    alt: str | None = None,
) -> Response:
    """List a file or folder, or with `alt=media` download it: a folder as a tar archive.

    Paths are from the environment's root: `workspace/src/main.py`. A file may be asked for in
    parts (`Range`).
    """
    _require_text(request)
    here = _environments(request)
    place = await service.spot(here, caller.project_id, environment_id, path)
    if alt == "media":
        return await _download(request, here, place, recursive=recursive)
    if alt not in {None, "", "json"}:
        raise Invalid("Invalid enum value for 'alt'. Expected one of: json, media.")
    found = await service.listing(here, place, page, recursive=recursive)
    return Response(found, media_type="application/json")


router.add_api_route(
    _FILES,
    get_environment_file,
    methods=["GET"],
    response_model=None,
    include_in_schema=False,
)


@router.put(_FILE, include_in_schema=False, response_model=None)
async def put_environment_file(caller: CallerDep, environment_id: str, path: str) -> Response:
    """Say where uploads go."""
    del caller, environment_id, path
    raise Invalid("Files are uploaded to the same path with '/upload' before the version.")


@router.get("/files/environment-{environment_id}:download", response_model=None, responses=_LISTED)
async def download_environment(
    request: Request, caller: CallerDep, environment_id: str, *, alt: str | None = None
) -> Response:
    """Download all files of an environment as a tar archive (with `alt=media`)."""
    if alt != "media":
        raise Invalid("Set 'alt' to 'media': an environment is downloaded as a tar archive.")
    here = _environments(request)
    place = await service.spot(here, caller.project_id, environment_id, "")
    return await _download(request, here, place, recursive=True)


async def _download(
    request: Request, here: Environments, place: service.Spot, *, recursive: bool
) -> Response:
    wanted = request.headers.get("range")
    try:
        content = await service.content(here, place, recursive=recursive, wanted=wanted)
    except OutOfRange as error:
        answer = errors.response(error)
        answer.headers["Content-Range"] = f"bytes */{error.size}"
        return answer
    name = place.path.rpartition("/")[2] or place.environment.hex
    return _Sent(content, name if content.size is not None else f"{name}.tar")


def _ascii(name: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in name)


@upload_router.put(_FILE, response_model=None, responses=_TAKEN, openapi_extra=_BYTES)
async def upload_environment_file(  # noqa: PLR0913 - one for each query field
    request: Request,
    environment_id: str,
    path: str,
    *,
    overwrite: Annotated[str | None, Query()] = None,
    extract: Annotated[str | None, Query()] = None,
    upload_type: Annotated[str | None, Query(alias="uploadType")] = None,
    upload_id: str | None = None,
) -> Response:
    """Upload a file, or with `extract` a tar archive to unpack; folders are made as needed.

    The body at once; or resumable: `uploadType=resumable`, answered with the `Location` for the
    pieces (`Content-Range`); or in the `X-Goog-Upload-…` protocol of SDKs.
    """
    if upload_id is not None:
        return await _piece(request, upload_id)
    caller = await scope.caller(request)
    _require_text(request)
    here = _uploads(request)
    wish = Wish(
        path=path, overwrite=_flag("overwrite", overwrite), extract=_flag("extract", extract)
    )
    command = request.headers.get(_COMMAND)
    if command is None and not upload_type:
        incoming = _incoming(request, MAX_BYTES)
        writing = here.write(caller.project_id, environment_id, wish, incoming)
        if wish.extract:
            writing = presence.unless_gone(request, incoming, writing)
        return _json(await writing)
    goog = command is not None
    if goog and _words(command) != {"start"}:
        raise Invalid("The first 'X-Goog-Upload-Command' of an upload must be 'start'.")
    if not goog and upload_type != "resumable":
        raise Invalid("Invalid enum value for 'uploadType'. Expected one of: resumable.")
    header = "x-goog-upload-header-content-length" if goog else "x-upload-content-length"
    total = _number(request, header)
    token = await here.start(caller.project_id, environment_id, wish, total=total)
    url = f"{_base_url(request)}{_raw_path(request)}?upload_id={token}"
    if not goog:
        return _json(b"{}", {"Location": url})
    return _json(b"{}", {"X-Goog-Upload-URL": url, _STATUS: "active"})


@upload_router.post(_FILE, response_model=None, responses=_TAKEN, openapi_extra=_BYTES)
async def upload_piece(
    request: Request, environment_id: str, path: str, *, upload_id: str | None = None
) -> Response:
    """Send a piece of an upload that has begun, in the `X-Goog-Upload-…` protocol."""
    del environment_id, path
    if upload_id is None:
        raise Invalid("An upload begins with PUT; its pieces go to the URL of the answer.")
    return await _piece(request, upload_id)


async def _piece(request: Request, token: str) -> Response:
    if _COMMAND not in request.headers and request.method == "PUT":
        return await _ranged_piece(request, token)
    try:
        return await _goog_piece(request, token)
    except RequestError as error:
        # Without this header SDKs send the same again, three times.
        answer = errors.response(error)
        answer.headers[_STATUS] = "final"
        return answer


async def _goog_piece(request: Request, token: str) -> Response:
    here = _uploads(request)
    upload = here.find(token)
    words = _words(request.headers.get(_COMMAND, ""))
    if not words or not words <= _WORDS - {"start"}:
        raise Invalid("Expected an 'X-Goog-Upload-Command': upload, finalize, query or cancel.")
    progress = await here.progress(upload)
    if progress.answer is not None:
        return _json(progress.answer, {_STATUS: "final"})
    if "cancel" in words or (progress.is_cancelled and "query" in words):
        await here.drop(upload)
        return _json(b"{}", {_STATUS: "cancelled"})
    _check_wanted(progress)
    is_last = "finalize" in words
    size = progress.size
    if "upload" in words:
        size = await _take_goog(request, here, upload, is_last=is_last)
    if is_last:
        return _json(await here.finish(upload, size), {_STATUS: "final"})
    # SDKs do not read this body: with one, each piece would cost them a connection.
    return Response(headers={_STATUS: "active", "X-Goog-Upload-Size-Received": str(size)})


async def _take_goog(request: Request, here: Uploads, upload: Upload, *, is_last: bool) -> int:
    offset = _number(request, "x-goog-upload-offset")
    if offset is None:
        raise Invalid("Missing required header 'X-Goog-Upload-Offset'.")
    if offset == 0 and not is_last:
        await here.check_free(upload)
    return await here.append(upload, offset, _incoming(request, _left(upload, offset)))


async def _ranged_piece(request: Request, token: str) -> Response:
    """A piece with `Content-Range`; without, it is all of the upload."""
    here = _uploads(request)
    upload = here.find(token)
    progress = await here.progress(upload)
    if progress.answer is not None:
        return _json(progress.answer)
    _check_wanted(progress)
    header = request.headers.get("content-range")
    if header is None:
        size = await here.append(upload, 0, _incoming(request, _left(upload, 0)))
        return _json(await here.finish(upload, size))
    match = _RANGE.fullmatch(header.strip())
    if match is None:
        raise Invalid("Invalid header 'Content-Range': expected 'bytes first-last/total'.")
    first, last, total = (None if text is None else int(text) for text in match.groups())
    if None not in {total, upload.total} and total != upload.total:
        raise Invalid("The total in 'Content-Range' is not what was announced.")
    if first is None or last is None:
        size = progress.size
    else:
        if first == 0 and total is not None and last + 1 < total:
            await here.check_free(upload)
        size = await here.append(upload, first, _exactly(request, upload, first, last))
    whole = upload.total if total is None else total
    if whole is None or size < whole:
        return _incomplete(size)
    return _json(await here.finish(upload, size))


def _check_wanted(progress: Progress) -> None:
    if progress.is_cancelled:
        raise Invalid("The upload was cancelled: begin it again.")


def _exactly(request: Request, upload: Upload, first: int, last: int) -> Pieces:
    length = last - first + 1
    if length <= 0 or length > _left(upload, first):
        raise Invalid("Invalid header 'Content-Range': it is empty, or goes beyond the total.")
    if _number(request, "content-length") not in {None, length}:
        raise Invalid("The body is not as long as 'Content-Range' says.")
    return _incoming(request, length)


def _incomplete(size: int) -> Response:
    headers = {"Range": f"bytes=0-{size - 1}"} if size else {}
    return Response(status_code=308, headers=headers)


def _left(upload: Upload, offset: int) -> int:
    """How many bytes may follow."""
    left = (MAX_BYTES if upload.total is None else upload.total) - offset
    if left < 0:
        raise Invalid(f"The upload ends before the offset {offset}.")
    return left


def _incoming(request: Request, max_bytes: int) -> Pieces:
    silence = request.app.state.limits.body_timeout.total_seconds()
    return body.pieces(request, max_bytes=max_bytes, silence_s=silence)


def _words(command: str | None) -> set[str]:
    return {word.strip().lower() for word in (command or "").split(",")} - {""}


def _flag(name: str, text: str | None) -> bool:
    if text is None or text.lower() in _FALSE:
        return False
    if text.lower() in _TRUE:
        return True
    raise Invalid(f"Invalid value for '{name}': expected true or false.")


def _number(request: Request, name: str) -> int | None:
    text = request.headers.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > len("9" * 18):
        raise Invalid(f"Invalid header '{name}': it is not a number.")
    return int(text)


def _base_url(request: Request) -> str:
    return request.app.state.public_url or str(request.base_url).rstrip("/")


def _raw_path(request: Request) -> str:
    raw: bytes = request.scope["raw_path"]
    return raw.partition(b"?")[0].decode("ascii")


def _require_text(request: Request) -> None:
    """Refuse a path whose bytes are no text: it has arrived here as the name of another file."""
    try:
        unquote_to_bytes(_raw_path(request)).decode()
    except UnicodeDecodeError:
        raise Invalid("The path is not UTF-8: give the name's UTF-8 bytes.") from None


def _json(content: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(content, headers=headers, media_type="application/json")
