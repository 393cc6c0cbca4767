"""The broker's routes for the files and uploads of environments.

Nothing is held in memory but the piece that is on its way.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar
from uuid import UUID

import orjson
from aiohttp import web

from openinteractions.broker.errors import begin
from openinteractions.errors import Invalid
from openinteractions.sandbox.files.tree import Landing, Tree
from openinteractions.sandbox.port import Entry, Owner

_T = TypeVar("_T")

OpenTree: TypeAlias = Callable[[str], AbstractAsyncContextManager[Tree]]
"""An environment's files, while the context is open; raises `NotFound` if there are none."""
Fence: TypeAlias = Callable[[str, Owner], Landing]
"""Within it an owner changes an environment's files; raises `Displaced` if it is none any more."""
Note: TypeAlias = Callable[[str], Awaitable[None]]
"""Told that an environment's files have been changed; raises nothing."""

MAX_UPLOAD_BYTES: Final = 64 * 2**30
"""Of one file; the environment's disk is the real limit."""
MAX_EXTRACTED_BYTES: Final = 16 * 2**30
"""Of all files of one archive."""

_SEND_BYTES: Final = 256 * 1024
_STALL_S: Final = 30.0
"""A reader may take nothing for twice as long at most."""
_LOOK_S: Final = 0.5
_DEFAULT_PAGE: Final = 1000
_MAX_PAGE: Final = 10_000
_OFFSET: Final = re.compile(r"[0-9]{1,18}")
_FLAGS: Final = {"true": True, "1": True, "": False, "false": False, "0": False}


def add_file_routes(
    router: web.UrlDispatcher,
    open_tree: OpenTree,
    fence: Fence,
    changed: Note,
    *,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
    max_extracted_bytes: int = MAX_EXTRACTED_BYTES,
) -> None:
    """Serve `/v1/environments/{env}/files…` and `/uploads…`; `broker.errors` renders errors."""
    files = _Files(open_tree, fence, changed, max_upload_bytes, max_extracted_bytes)
    base = "/v1/environments/{env}"
    for path in (f"{base}/files", f"{base}/files/{{path:(?s:.*)}}"):
        router.add_get(path, files.get, allow_head=False)
        router.add_put(path, files.put)
        router.add_post(path, files.post)
        router.add_delete(path, files.delete)
    router.add_put(f"{base}/uploads/{{upload}}", files.append)
    router.add_get(f"{base}/uploads/{{upload}}", files.upload_state, allow_head=False)
    router.add_delete(f"{base}/uploads/{{upload}}", files.delete_upload)
    router.add_post(f"{base}/uploads/{{upload}}/commit", files.commit)


@dataclass(frozen=True, slots=True)
class _Files:
    """The handlers."""

    open_tree: OpenTree
    fence: Fence
    changed: Note
    max_upload_bytes: int
    max_extracted_bytes: int

    def _tree(self, request: web.Request) -> AbstractAsyncContextManager[Tree]:
        return self.open_tree(request.match_info["env"])

    def _landing(self, request: web.Request) -> Landing:
        """In which a change takes place: whoever makes it for a run says as which owner."""
        owner = _owner(request)
        return nullcontext() if owner is None else self.fence(request.match_info["env"], owner)

    async def get(self, request: web.Request) -> web.StreamResponse:
        """`op`: `stat` (or none), `list`, `read`, `tar`."""
        operations = {
            "stat": self._stat,
            "list": self._list,
            "read": self._read,
            "tar": self._tar,
        }
        operation = operations.get(request.query.get("op", "stat"))
        if operation is None:
            raise Invalid(f"'op' is one of {', '.join(operations)}.")
        return await operation(request)

    async def _stat(self, request: web.Request) -> web.StreamResponse:
        async with self._tree(request) as tree:
            return _json(await tree.stat(_path(request)))

    async def _list(self, request: web.Request) -> web.StreamResponse:
        limit = _number(request, "limit", _DEFAULT_PAGE) or 0
        if not 1 <= limit <= _MAX_PAGE:
            raise Invalid(f"'limit' is from 1 to {_MAX_PAGE}.")
        async with self._tree(request) as tree:
            page = await tree.list(
                _path(request),
                recursive=_flag(request, "recursive"),
                after=request.query.get("after", ""),
                limit=limit,
            )
        return _json({"files": page.entries, "next": page.next_after})

    async def _read(self, request: web.Request) -> web.StreamResponse:
        """`X-Size` is the whole file's, `Content-Length` what is sent of it."""
        offset = _number(request, "offset", 0) or 0
        length = _number(request, "length", None)
        async with (
            self._tree(request) as tree,
            tree.read(_path(request), offset=offset, length=length) as reading,
        ):
            answer = web.StreamResponse(headers={"X-Size": str(reading.whole)})
            answer.content_type = "application/octet-stream"
            answer.headers["X-Mime-Type"] = reading.entry.mime_type or answer.content_type
            answer.content_length = reading.size
            await begin(request, answer)
            async for chunk in reading.chunks(_SEND_BYTES):
                await send(request, answer, chunk)
            await answer.write_eof()
            return answer

    async def _tar(self, request: web.Request) -> web.StreamResponse:
        recursive = _flag(request, "recursive")
        async with (
            self._tree(request) as tree,
            tree.tar(_path(request), recursive=recursive) as pieces,
        ):
            answer = web.StreamResponse()
            answer.content_type = "application/x-tar"
            answer.enable_chunked_encoding()
            await begin(request, answer)
            async for piece in pieces:
                await send(request, answer, piece)
            await answer.write_eof()
            return answer

    async def put(self, request: web.Request) -> web.StreamResponse:
        """Write a file, or with `extract` unpack an archive."""
        overwrite = _flag(request, "overwrite")
        body, landing = _body(request), self._landing(request)
        async with self._tree(request) as tree:
            if _flag(request, "extract"):
                extracting = tree.extract(
                    _path(request),
                    body,
                    overwrite=overwrite,
                    max_bytes=self.max_extracted_bytes,
                    landing=landing,
                )
                written = await while_there(request, extracting)
            else:
                entry = await tree.write(
                    _path(request),
                    body,
                    overwrite=overwrite,
                    max_bytes=self.max_upload_bytes,
                    landing=landing,
                )
                written = [entry]
        return await self._written(request, written)

    async def post(self, request: web.Request) -> web.StreamResponse:
        """`op=mkdir`."""
        if request.query.get("op") != "mkdir":
            raise Invalid("'op' is mkdir.")
        async with self._tree(request) as tree:
            return _json({"files": [await tree.mkdir(_path(request))]})

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """Remove a file or folder."""
        async with self._tree(request) as tree, self._landing(request):
            await tree.delete(_path(request), recursive=_flag(request, "recursive"))
        await self.changed(request.match_info["env"])
        return _json({})

    async def append(self, request: web.Request) -> web.StreamResponse:
        """Add to an upload at `offset`."""
        offset = _number(request, "offset", 0) or 0
        async with self._tree(request) as tree:
            size = await tree.append(
                _upload(request), offset, _body(request), max_bytes=self.max_upload_bytes
            )
        return _json({"size": size})

    async def upload_state(self, request: web.Request) -> web.StreamResponse:
        """How much of an upload is there, or what it became."""
        async with self._tree(request) as tree:
            state = await tree.upload_state(_upload(request))
        return _json({"size": state.size_bytes, "is_over": state.is_over, "files": state.written})

    async def delete_upload(self, request: web.Request) -> web.StreamResponse:
        """Throw an upload away."""
        async with self._tree(request) as tree:
            await tree.delete_upload(_upload(request))
        return _json({})

    async def commit(self, request: web.Request) -> web.StreamResponse:
        """Make an upload the file at `path`, or with `extract` unpack it there."""
        path = request.query.get("path", "")
        overwrite = _flag(request, "overwrite")
        async with self._tree(request) as tree:
            if _flag(request, "extract"):
                written = await tree.commit_archive(
                    _upload(request),
                    path,
                    overwrite=overwrite,
                    max_bytes=self.max_extracted_bytes,
                )
            else:
                written = [await tree.commit(_upload(request), path, overwrite=overwrite)]
        return await self._written(request, written)

    async def _written(self, request: web.Request, entries: Sequence[Entry]) -> web.Response:
        await self.changed(request.match_info["env"])
        return _json({"files": entries})


async def while_there(request: web.Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What long work gives; it is stopped when nobody waits for the answer any more.

    Raises:
        ConnectionError: It was.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_S))[0]:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionAbortedError("nobody waits for the answer")
        return await task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def send(request: web.Request, answer: web.StreamResponse, piece: bytes) -> None:
    """Send a piece, however slowly it is read.

    Raises:
        ConnectionError: Nobody reads it.
    """
    sending = asyncio.ensure_future(answer.write(piece))
    waiting = math.inf
    try:
        while not (await asyncio.wait({sending}, timeout=_STALL_S))[0]:
            before, waiting = waiting, _unsent(request)
            if waiting >= before:
                raise ConnectionAbortedError("nobody reads the answer")
        await sending
    finally:
        sending.cancel()


def _unsent(request: web.Request) -> int:
    """Bytes that the system has not taken yet."""
    return 0 if request.transport is None else request.transport.get_write_buffer_size()


def _path(request: web.Request) -> str:
    return request.match_info.get("path", "")


def _upload(request: web.Request) -> str:
    return request.match_info["upload"]


def _owner(request: web.Request) -> Owner | None:
    interaction, epoch = request.query.get("interaction"), _number(request, "epoch", None)
    if interaction is None and epoch is None:
        return None
    try:
        key = UUID(interaction)
    except (TypeError, ValueError):
        key = None
    if key is None or epoch is None:
        raise Invalid("An owner is an 'interaction' with an 'epoch'.")
    return Owner(key, epoch)


def _flag(request: web.Request, name: str) -> bool:
    value = _FLAGS.get(request.query.get(name, "").lower())
    if value is None:
        raise Invalid(f"'{name}' is true or false.")
    return value


def _number(request: web.Request, name: str, default: int | None) -> int | None:
    text = request.query.get(name)
    if text is None:
        return default
    if not _OFFSET.fullmatch(text):
        raise Invalid(f"'{name}' is a whole number.")
    return int(text)


async def _body(request: web.Request) -> AsyncIterator[bytes]:
    """The request's bytes as they arrive.

    Raises:
        ConnectionError: The client went away in the middle.
    """
    async for chunk in request.content.iter_any():
        yield chunk


def _json(content: object) -> web.Response:
    return web.Response(body=orjson.dumps(content), content_type="application/json")
