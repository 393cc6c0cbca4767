"""The client of the sandbox brokers: what api and workers reach sandboxes through.

Every method takes the broker's address first: `unix:///…/broker.sock` or `https://host:port`. A
broker that does not answer is waited for, within bounds; an execution is followed on across the
broker's restart, at the byte where its output broke off, and never started twice.
"""

import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast
from urllib.parse import quote, urlencode
from uuid import UUID

import aiohttp
import orjson

from openinteractions.errors import NotFound, Unready
from openinteractions.sandbox import messages
from openinteractions.sandbox.link import BROKEN, Away, Body, Link, Patience
from openinteractions.sandbox.pipe import Omitted
from openinteractions.sandbox.port import (
    Command,
    Duplex,
    Entry,
    Exit,
    Json,
    Output,
    Owner,
    UploadState,
)

Entries: TypeAlias = list[Entry]
Jsons: TypeAlias = list[Json]

_CHUNK: Final = 64 * 1024


class FileStream(AsyncIterator[bytes]):
    """A file being read."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._chunks = _chunks(response)
        self.size = int(response.headers.get("X-Size") or response.content_length or 0)
        """Of the whole file, in bytes."""
        self.mime_type = response.headers.get("X-Mime-Type") or response.content_type
        """By its name."""

    def __aiter__(self) -> AsyncIterator[bytes]:  # noqa: PYI034 - `async for` is then a hop shorter
        return self._chunks

    async def __anext__(self) -> bytes:
        return await anext(self._chunks)


@dataclass(slots=True)
class _Following:
    """An execution, and how much of it has been seen."""

    path: str
    body: bytes | None
    """Of the request that starts it; None once it is known to have been started."""
    offset: int
    seen: bool = False
    """Whether the broker has answered for it."""
    answers: int = 0
    """How many times it did, since somebody last asked."""

    def progressed(self) -> bool:
        """Whether the broker has answered since the last call."""
        answers, self.answers = self.answers, 0
        return answers > 0


class BrokerClient:
    """One for all brokers."""

    def __init__(
        self,
        token: str | Callable[[], str],
        *,
        tls: ssl.SSLContext | None = None,
        patience_s: float = 10.0,
        restart_s: float = 60.0,
    ) -> None:
        """Nothing is connected yet.

        Args:
            token: See `crypto.broker_token`; a call for it where the master key can change
                (`Sealer.broker_token`).
            tls: What checks the certificates of brokers on https; the system's roots if left out.
            patience_s: How long a broker that refuses connections is waited for.
            restart_s: The same for one that went away in the middle of an execution.
        """
        self._link = Link(token, tls=tls, patience_s=patience_s)
        self._patience_s = patience_s
        self._restart_s = restart_s

    async def close(self) -> None:
        """Close the connections."""
        await self._link.close()

    # Environments.

    async def health(self, address: str) -> Json:
        """What the broker says of itself: name, backend, version, running, warm, limits."""
        return await self._link.json(address, "GET", "/v1/health")

    async def ensure(self, address: str, env: UUID, *, source: UUID | None = None) -> None:
        """Make the environment's disk, unless it has one.

        Args:
            address: The broker's.
            env: Which.
            source: Fork this one, of the same broker.

        Raises:
            NotFound: No such environment, or no such source.
            Unready: The broker does not answer, or another broker has it.
        """
        body = {} if source is None else {"from": source.hex}
        await self._link.json(address, "PUT", _path(env), body=orjson.dumps(body), is_slow=True)

    async def delete(self, address: str, env: UUID) -> None:
        """Stop it and remove its files; nothing happens where it is gone already."""
        await self._link.json(address, "DELETE", _path(env))

    async def stop(self, address: str, env: UUID) -> None:
        """Stop its sandbox; the files stay, and its next use starts another one."""
        await self._link.json(address, "POST", _path(env, "stop"))

    async def refresh(self, address: str, env: UUID) -> None:
        """Say that its row has changed: rules and variables hold from now on."""
        await self._link.json(address, "POST", _path(env, "refresh"))

    async def usage(self, address: str, env: UUID) -> tuple[int, int]:
        """How many files it has, and their bytes."""
        answer = await self._link.json(address, "GET", _path(env, "usage"))
        return answer["file_count"], answer["size_bytes"]

    async def add_folders(self, address: str, env: UUID, names: Sequence[str]) -> None:
        """Have folders at its top, beside the three. For a new one its sandbox is stopped.

        Raises:
            Invalid: There would be too many.
            Unready: Its sandbox is in use.
        """
        body = orjson.dumps({"names": list(names)})
        await self._link.json(address, "PUT", _path(env, "folders"), body=body)

    async def environments(self, address: str) -> Jsons:
        """What the broker has: `{id, state, idle_s, executions}` each."""
        return (await self._link.json(address, "GET", "/v1/environments"))["environments"]

    # Executions.

    def execute(
        self, address: str, env: UUID, command: Command, *, offset: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Output | Exit]]:
        """Start a command, or join it where it was started before: the same id never runs twice.

        What the context gives yields its output as it comes (an `Omitted` where a part of it was
        not kept) and then, last, its `Exit`. Leaving the
        context early leaves the command running. Errors come with the first item.

        Args:
            address: The broker's.
            env: Where to run it.
            command: What to run.
            offset: Bytes of output that the caller already has.

        Raises:
            Displaced: A higher epoch has been seen.
            NotFound: No such environment.
            NotBegun: No sandbox is to be had now; it was not started.
            Unready: The broker does not answer; it was not started, or it runs on.
            SandboxError: The broker failed.
        """
        body = orjson.dumps(messages.command_body(command))
        return self._following(address, _Following(_execution(env, command.id), body, offset))

    def follow(
        self, address: str, env: UUID, execution_id: str, *, offset: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Output | Exit]]:
        """As `execute`, for a command that was started before.

        Raises:
            NotFound: It never was.
        """
        return self._following(address, _Following(_execution(env, execution_id), None, offset))

    async def kill(
        self, address: str, env: UUID, execution_id: str, *, epoch: int | None = None
    ) -> None:
        """Kill a command and all its children; nothing happens where it has ended or never was."""
        with contextlib.suppress(NotFound):
            await self.signal(address, env, execution_id, 9, epoch=epoch)

    async def signal(
        self,
        address: str,
        env: UUID,
        execution_id: str,
        number: int,
        *,
        epoch: int | None = None,
    ) -> None:
        """Send a signal to a command and all its children.

        Raises:
            NotFound: It does not run.
            Displaced: `epoch` is lower than one that was seen.
        """
        body = {"signal": number} if epoch is None else {"signal": number, "epoch": epoch}
        path = _execution(env, execution_id) + "/signal"
        await self._link.json(address, "POST", path, body=orjson.dumps(body))

    async def write_stdin(
        self, address: str, env: UUID, execution_id: str, data: bytes, *, is_last: bool = False
    ) -> None:
        """Write to a command's standard input, and close it with the last piece."""
        path = _execution(env, execution_id) + "/stdin" + _query(eof=is_last)
        await self._link.json(address, "POST", path, body=data, is_repeatable=False)

    async def resize(
        self, address: str, env: UUID, execution_id: str, *, rows: int, cols: int
    ) -> None:
        """Change the size of a command's terminal."""
        body = orjson.dumps({"rows": rows, "cols": cols})
        await self._link.json(address, "POST", _execution(env, execution_id) + "/resize", body=body)

    # Files; paths are from the environment's root: `workspace/a.txt`.

    async def stat(self, address: str, env: UUID, path: str) -> Entry:
        """One file or folder.

        Raises:
            NotFound: There is none.
        """
        answer = await self._link.json(address, "GET", _file(env, path) + _query(op="stat"))
        return messages.read_entry(answer)

    async def list(
        self,
        address: str,
        env: UUID,
        path: str,
        *,
        recursive: bool = False,
        limit: int = 1000,
        after: str | None = None,
    ) -> tuple[Entries, str | None]:
        """What a folder holds, and where the next page starts (as `after`)."""
        query = _query(op="list", recursive=recursive, limit=limit, after=after)
        answer = await self._link.json(address, "GET", _file(env, path) + query)
        return _entries(answer), answer.get("next")

    @asynccontextmanager
    async def read(
        self, address: str, env: UUID, path: str, *, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator[FileStream]:
        """A file's bytes, or a part of them."""
        query = _query(op="read", offset=offset, length=length)
        async with self._link.answer(address, "GET", _file(env, path) + query) as response:
            yield FileStream(response)

    @asynccontextmanager
    async def tar(
        self, address: str, env: UUID, path: str, *, recursive: bool = True
    ) -> AsyncGenerator[AsyncIterator[bytes]]:
        """A folder as a tar archive."""
        query = _query(op="tar", recursive=recursive)
        async with self._link.answer(address, "GET", _file(env, path) + query) as response:
            yield _chunks(response)

    async def write(  # noqa: PLR0913 - each is named, and none goes with another
        self,
        address: str,
        env: UUID,
        path: str,
        body: Body,
        *,
        overwrite: bool,
        extract: bool = False,
        owner: Owner | None = None,
    ) -> Entries:
        """Write a file, whole or not at all, or unpack an archive; what was written.

        Args:
            address: The broker's.
            env: Whose file.
            path: Where, or under which folder.
            body: Its bytes.
            overwrite: Replace what is there.
            extract: It is an archive.
            owner: Only while this one owns its run, when all bytes have arrived.

        Raises:
            Conflict: There is one already.
            Displaced: `owner` owns its run no more.
            TooLarge: It does not fit.
        """
        query = _query(overwrite=overwrite, extract=extract, **_owned(owner))
        answer = await self._link.json(
            address,
            "PUT",
            _file(env, path) + query,
            body=body,
            is_repeatable=False,
            is_slow=extract,
        )
        return _entries(answer)

    async def remove(
        self,
        address: str,
        env: UUID,
        path: str,
        *,
        recursive: bool = False,
        owner: Owner | None = None,
    ) -> None:
        """Remove a file or folder.

        Raises:
            Displaced: `owner` owns its run no more.
        """
        query = _query(recursive=recursive, **_owned(owner))
        await self._link.json(address, "DELETE", _file(env, path) + query, is_repeatable=False)

    async def mkdir(self, address: str, env: UUID, path: str) -> None:
        """Make a folder, and those above it."""
        await self._link.json(address, "POST", _file(env, path) + _query(op="mkdir"))

    # Uploads in pieces.

    async def append_upload(
        self, address: str, env: UUID, upload_id: str, offset: int, body: Body
    ) -> int:
        """Add bytes to an upload; its size then.

        Raises:
            Conflict: `offset` is beyond what it has.
        """
        path = _upload(env, upload_id) + _query(offset=offset)
        answer = await self._link.json(address, "PUT", path, body=body, is_repeatable=False)
        return answer["size"]

    async def upload_state(self, address: str, env: UUID, upload_id: str) -> UploadState:
        """How many bytes an upload has, or what it became.

        Raises:
            NotFound: It never began, or ended long ago.
        """
        answer = await self._link.json(address, "GET", _upload(env, upload_id))
        return UploadState(
            size_bytes=answer["size"],
            is_over=answer["is_over"],
            written=None if answer["files"] is None else _entries(answer),
        )

    async def commit_upload(
        self,
        address: str,
        env: UUID,
        upload_id: str,
        path: str,
        *,
        overwrite: bool,
        extract: bool = False,
    ) -> Entries:
        """Make an upload a file, or unpack it; what was written, also where it was before."""
        query = _query(path=path, overwrite=overwrite, extract=extract)
        answer = await self._link.json(
            address,
            "POST",
            _upload(env, upload_id) + "/commit" + query,
            is_repeatable=False,
            is_slow=True,
        )
        return _entries(answer)

    async def drop_upload(self, address: str, env: UUID, upload_id: str) -> None:
        """Throw an upload away, for good."""
        with contextlib.suppress(NotFound):
            await self._link.json(address, "DELETE", _upload(env, upload_id))

    # Ports.

    @asynccontextmanager
    async def dial(self, address: str, env: UUID, port: int) -> AsyncGenerator[Duplex]:
        """A connection to a port inside the sandbox; started if it is not running.

        Raises:
            NotFound: Nobody listens there.
        """
        socket = await self._link.websocket(address, _path(env, f"ports/{port}"))
        duplex = _SocketDuplex(socket)
        try:
            yield duplex
        finally:
            await duplex.close()

    # An execution over several connections.

    @asynccontextmanager
    async def _following(
        self, address: str, following: _Following
    ) -> AsyncGenerator[AsyncIterator[Output | Exit]]:
        async with aclosing(self._pieces(address, following)) as pieces:
            yield pieces

    async def _pieces(self, address: str, following: _Following) -> AsyncGenerator[Output | Exit]:
        """Output and exit of an execution, over as many connections as it takes."""
        patience = Patience(self._patience_s)
        while True:
            try:
                async with aclosing(self._once(address, following)) as pieces:
                    async for piece in pieces:
                        yield piece
                        if isinstance(piece, Exit):
                            return
                broken: Exception = ConnectionResetError("the answer broke off")
            except Away as error:
                broken = error.cause
            except Unready as error:
                # A broker that is about to stop, or has just started; at first it means no.
                if not following.seen:
                    raise
                broken = error
            if following.progressed():
                patience = Patience(self._restart_s)
            if not await patience.wait():
                raise Away(broken) from broken

    async def _once(self, address: str, following: _Following) -> AsyncGenerator[Output | Exit]:
        """What one connection gives; it may end without an `Exit`."""
        path = following.path + _query(offset=following.offset)
        method = "GET" if following.body is None else "PUT"
        async with self._link.answer(address, method, path, body=following.body) as response:
            frames = messages.Frames()
            async for data in _chunks(response):
                for kind, payload in frames.feed(data):
                    # Known to be started: from now on it is only asked after.
                    following.seen, following.body = True, None
                    following.answers += 1
                    if kind == messages.EVENT:
                        item = _event(orjson.loads(payload))
                        if isinstance(item, Omitted):
                            following.offset += item.byte_count
                        if item is not None:
                            yield item
                    else:
                        following.offset += len(payload)
                        yield Output(cast("Literal[1, 2]", kind), payload)


class _SocketDuplex:
    """A port's WebSocket as a stream of bytes."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._held = b""
        self._is_over = False

    async def read(self, limit: int = 65536) -> bytes:
        while not self._held and not self._is_over:
            message = await self._socket.receive()
            if message.type is aiohttp.WSMsgType.BINARY:
                self._held = message.data
            else:
                # The text `end`, a close, or a broken connection.
                self._is_over = True
        data, self._held = self._held[:limit], self._held[limit:]
        return data

    async def write(self, data: bytes) -> None:
        for start in range(0, len(data), _CHUNK):
            try:
                await self._socket.send_bytes(data[start : start + _CHUNK])
            except (aiohttp.ClientError, RuntimeError) as error:
                raise ConnectionResetError("the port's connection is closed") from error

    async def end(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, RuntimeError, OSError):
            await self._socket.send_str(messages.END_OF_STREAM)

    async def close(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, RuntimeError, OSError, TimeoutError):
            await self._socket.close()


def _event(fields: Json) -> Exit | Omitted | None:
    if fields.get("event") == "exit":
        return messages.read_exit(fields)
    if fields.get("event") == "omitted":
        return messages.omitted(int(fields["bytes"]))
    return None


async def _chunks(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes]:
    try:
        async for data in response.content.iter_any():
            yield data
    except BROKEN as error:
        raise Away(error) from error


def _path(env: UUID, *rest: str) -> str:
    return "/".join(("/v1/environments", env.hex, *rest))


def _execution(env: UUID, execution_id: str) -> str:
    return _path(env, "executions", quote(execution_id, safe=""))


def _file(env: UUID, path: str) -> str:
    return _path(env, "files", quote(path.lstrip("/")))


def _upload(env: UUID, upload_id: str) -> str:
    return _path(env, "uploads", quote(upload_id, safe=""))


def _query(**fields: str | float | None) -> str:
    """A query string; what is None is left out."""
    words = {
        name: str(value).lower() if isinstance(value, bool) else value
        for name, value in fields.items()
        if value is not None
    }
    return "?" + urlencode(words, quote_via=quote) if words else ""


def _owned(owner: Owner | None) -> dict[str, str | int]:
    """How a query names an owner."""
    return {} if owner is None else {"interaction": owner.interaction_id.hex, "epoch": owner.epoch}


def _entries(answer: Json) -> Entries:
    return [messages.read_entry(item) for item in answer["files"]]
