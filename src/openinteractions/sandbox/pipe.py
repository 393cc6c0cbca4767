"""The broker's side of a sandbox: commands, ports and egress over one byte stream.

The supervisor's source is the first thing that goes over the stream, so an image needs nothing but
`/usr/bin/python3`. What comes back is never trusted: sandboxed code runs as the same user as the
supervisor.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, TypeAlias, cast

from openinteractions.errors import TooMany
from openinteractions.sandbox import shipped
from openinteractions.sandbox.mux import Mux, MuxStream
from openinteractions.sandbox.port import Command, Duplex, Exit, Gone, Json, Output, SandboxError

OnConnect: TypeAlias = Callable[[str, Duplex], Awaitable[None]]

CONNECTIONS = frozenset({"proxy", "https", "http"})
"""What the sandbox may connect to: its loopback ports for a proxy, for TLS and for plain HTTP."""

_PACKAGE = "openinteractions.sandbox"
_MODULES = (
    "frames",
    "mux",
    "supervisor.seccomp",
    "supervisor.spool",
    "supervisor.processes",
    "supervisor.execution",
    "supervisor.sessions",
    "supervisor.table",
    "supervisor.loopback",
    "supervisor.service",
)
_BOOT = """\
import os
def get(n):
    b = b''
    while len(b) < n:
        c = os.read(0, n - len(b))
        if not c:
            raise SystemExit(1)
        b += c
    return b
exec(compile(get(int.from_bytes(get(4), 'big')), 'supervisor', 'exec'))
"""

_ANSWER_S = 30.0
_KILL_S = 60.0
_DIAL_S = 15.0
_MAX_ANSWER = 4 << 20
_MAX_RECORD = 1 << 16
_RECORD_HEAD = 5
_MAX_TEXT = 300
_ATTEMPTS = 4
_MAX_COUNT = 1 << 62
_MAX_CODE, _MAX_SIGNAL = 255, 64

_Record: TypeAlias = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Omitted(Output):
    """A mark in place of output that was not kept: `data` is text that says so.

    For offsets, count `byte_count` instead of the length of `data`.
    """

    byte_count: int


def boot_argv() -> list[str]:
    """The command line of a sandbox's main process; it waits for the supervisor's source."""
    # By its path: the image's PATH may begin with folders that the sandbox itself can write to.
    return ["/usr/bin/python3", "-I", "-S", "-c", _BOOT]


@cache
def source() -> bytes:
    """The supervisor as one program, its length before it, as the main process expects it."""
    names = [f"{_PACKAGE}.{name}" for name in _MODULES]
    notebook = shipped.text(f"{_PACKAGE}.supervisor.notebook")
    program = shipped.program(names, notebook).encode()
    return len(program).to_bytes(4, "big") + program


class Pipe:
    """An open pipe to one sandbox's supervisor.

    Every method raises ConnectionError once the pipe is lost. The sandbox and its commands go on
    then; a new pipe on a new channel finds them again.
    """

    def __init__(self, channel: Duplex, on_connect: OnConnect) -> None:
        self._channel = channel
        self._on_connect = on_connect
        self._mux = Mux(channel.read, channel.write, True, self._connected, CONNECTIONS)
        self.lost = self._mux.lost
        """Set when the channel has ended, or the other side has gone mad."""

    @classmethod
    async def open(cls, channel: Duplex, *, is_fresh: bool, on_connect: OnConnect) -> "Pipe":
        """Start the supervisor (`is_fresh`), or find it again as another pipe left it.

        `on_connect` gets each connection that the sandbox makes, with one of `CONNECTIONS`;
        it is closed when that returns.

        Raises:
            SandboxError: Nothing answers.
        """
        pipe = cls(channel, on_connect)
        try:
            if is_fresh:
                await channel.write(await asyncio.to_thread(source))
            await pipe._mux.start(is_resync=not is_fresh)
        except ConnectionError as error:
            await pipe.close()
            raise SandboxError(f"The sandbox does not answer: {error}.") from error
        except BaseException:
            await pipe.close()
            raise
        return pipe

    async def wait_lost(self) -> str:
        """Return when the pipe is lost, with the reason."""
        await self.lost.wait()
        return self._mux.why

    async def close(self) -> None:
        """Let go of the channel. The sandbox and its commands go on."""
        await self._mux.close()
        await self._channel.close()

    async def ping(self) -> Json:
        """What the supervisor says of itself; nothing in it is to be relied upon."""
        return await self._ask("ping")

    async def configure(
        self,
        *,
        proxy: int | None = 3128,
        https: int | None = 443,
        http: int | None = 80,
        dns: int | None = 53,
    ) -> list[str]:
        """Listen on these loopback ports (those that do already stay); return what failed."""
        ports = {"proxy": proxy, "https": https, "http": http, "dns": dns}
        answer = await self._ask("configure", header=ports)
        return [_words(one) for one in _list(answer, "problems")[: len(ports)]]

    async def start(self, command: Command) -> bool:
        """Start a command; False if its id was started before (then nothing happens).

        Raises:
            TooMany: Too many commands run in this sandbox.
            SandboxError: The command is not one that could ever be started.
        """
        fields = asdict(command)
        fields["argv"], fields["env"] = list(command.argv), dict(command.env)
        answer = await self._ask("start", body=json.dumps(fields).encode())
        return answer.get("started") is True

    async def follow(self, execution_id: str, offset: int = 0) -> AsyncIterator[Output | Exit]:
        """A command's output from `offset` on (bytes of both streams), then how it ended.

        While it runs everything is shown, later than its bound in a limited speed; what the reader
        is too slow for is told by an `Omitted`. After the end, the same call with offset 0 gives
        what is kept: head, mark, tail. Breaking off does nothing to the command.

        Raises:
            Gone: There is no such command, or its result was forgotten.
            SandboxError: The offset is beyond what was written, or the answer makes no sense.
        """
        for attempt in range(_ATTEMPTS):
            try:
                async with aclosing(self._follow_once(execution_id, offset)) as items:
                    async for item in items:
                        offset += _length(item)
                        yield item
            except ConnectionError:
                if self.lost.is_set() or attempt == _ATTEMPTS - 1:
                    raise
            else:
                return

    async def write_stdin(self, execution_id: str, data: bytes) -> None:
        """Hand input to a command; returns when its pipe or terminal has taken all of it.

        Raises:
            Gone: There is no such command, or it takes no input any more.
        """
        await self._tell_stdin(execution_id, data, is_end=False)

    async def end_stdin(self, execution_id: str) -> None:
        """Tell a command that no more input comes.

        Raises:
            Gone: There is no such command.
        """
        await self._tell_stdin(execution_id, b"", is_end=True)

    async def signal(self, execution_id: str, number: int) -> None:
        """Send a signal to a command's process group; nothing happens once it has ended.

        Raises:
            Gone: There is no such command.
            SandboxError: There is no such signal.
        """
        await self._ask(
            "signal", is_repeatable=False, header={"id": execution_id, "number": number}
        )

    async def kill(self, execution_id: str) -> None:
        """Kill a command and all that it started, also what it left running in the background.

        Raises:
            Gone: There is no such command.
        """
        await self._ask("kill", timeout_s=_KILL_S, header={"id": execution_id})

    async def resize(self, execution_id: str, rows: int, cols: int) -> None:
        """Give a command's terminal another size.

        Raises:
            Gone: There is no such command.
        """
        await self._ask("resize", header={"id": execution_id, "rows": rows, "cols": cols})

    async def list(self) -> Sequence[Json]:
        """Commands that are known: id, epoch, is_running, age_s, output_bytes."""
        found = _list(await self._ask("list"), "executions")
        return [_listed(cast("Json", one)) for one in found if isinstance(one, dict)]

    async def forget(self, execution_id: str) -> None:
        """Drop the output and result of a command that has ended; its id stays used.

        Raises:
            TooMany: It is still running.
        """
        await self._ask("forget", header={"id": execution_id})

    async def dial(self, port: int) -> Duplex:
        """Connect to a port of the sandbox's loopback network. The caller closes it.

        Raises:
            Gone: Nothing listens there.
        """
        stream = await self._mux.open("dial", {"port": port})
        try:
            async with asyncio.timeout(_DIAL_S):
                greeting = await stream.read(1)
        except (TimeoutError, ConnectionError) as error:
            await stream.close()
            if self.lost.is_set():
                raise ConnectionAbortedError(self._mux.why) from error
            raise Gone(f"Nothing listens on port {port} of the environment.") from error
        except BaseException:
            await stream.close()
            raise
        if greeting != b"\0":
            await stream.close()
            raise SandboxError("The sandbox gave an answer that makes no sense.")
        return stream

    async def shutdown(self) -> None:
        """Kill all commands and end the supervisor, and with it the container."""
        await self._ask("shutdown", is_repeatable=False)

    async def _connected(self, stream: MuxStream) -> None:
        await self._on_connect(stream.kind, stream)

    async def _follow_once(self, execution_id: str, offset: int) -> AsyncGenerator[Output | Exit]:
        stream = await self._mux.open("follow", {"id": execution_id, "offset": offset})
        try:
            async for kind, content in _records(stream):
                item = _item(kind, content)
                yield item
                if isinstance(item, Exit):
                    return
        finally:
            await stream.close()
        raise SandboxError("The sandbox broke off without a result.")

    async def _tell_stdin(self, execution_id: str, data: bytes, *, is_end: bool) -> None:
        header = {"id": execution_id, "is_end": is_end}
        await self._ask("stdin", body=data, timeout_s=None, is_repeatable=False, header=header)

    async def _ask(
        self,
        kind: str,
        *,
        body: bytes = b"",
        timeout_s: float | None = _ANSWER_S,
        is_repeatable: bool = True,
        header: Mapping[str, object] | None = None,
    ) -> Json:
        """One request and its answer; asked again if the pipe had to start anew meanwhile."""
        for attempt in range(_ATTEMPTS):
            try:
                async with asyncio.timeout(timeout_s):
                    return _checked(await self._ask_once(kind, dict(header or {}), body))
            except ConnectionError:
                if self.lost.is_set() or not is_repeatable or attempt == _ATTEMPTS - 1:
                    raise
            except TimeoutError as error:
                raise SandboxError("The sandbox does not answer.") from error
        raise AssertionError("the last attempt returns or raises")

    async def _ask_once(self, kind: str, header: Json, body: bytes) -> bytes:
        stream = await self._mux.open(kind, header)
        try:
            sending = asyncio.ensure_future(_send(stream, body))
            try:
                return await stream.read_all(_MAX_ANSWER)
            finally:
                # The answer may come before all was taken, when it is a refusal.
                sending.cancel()
                await asyncio.wait([sending])
        finally:
            await stream.close()


async def _send(stream: MuxStream, body: bytes) -> None:
    try:
        await stream.write(body)
        await stream.end()
    except ConnectionError:
        # The reader of the answer meets the same.
        return


async def _records(stream: MuxStream) -> AsyncGenerator[_Record]:
    buffer = bytearray()
    while received := await stream.read():
        buffer += received
        at = 0
        while len(buffer) - at >= _RECORD_HEAD:
            size = int.from_bytes(buffer[at + 1 : at + _RECORD_HEAD], "big")
            if size > _MAX_RECORD:
                raise SandboxError("The sandbox sent a record that is too long.")
            if len(buffer) - at < _RECORD_HEAD + size:
                break
            start = at + _RECORD_HEAD
            yield buffer[at], bytes(buffer[start : start + size])
            at = start + size
        del buffer[:at]


def _item(kind: int, content: bytes) -> Output | Exit:
    match kind:
        case 1 | 2:
            return Output(kind, content)
        case 3:
            return _exit(_json(content))
        case 4:
            count = min(int.from_bytes(content, "big"), _MAX_COUNT)
            mark = f"\n[... {count} bytes of output omitted ...]\n".encode()
            return Omitted(1, mark, count)
        case _:
            _checked(content)
            raise SandboxError("The sandbox sent a record of an unknown kind.")


def _length(item: Output | Exit) -> int:
    if isinstance(item, Omitted):
        return item.byte_count
    return len(item.data) if isinstance(item, Output) else 0


def _exit(fields: Json) -> Exit:
    return Exit(
        outcome="killed" if fields.get("outcome") == "killed" else "exited",
        code=_whole(fields.get("code"), _MAX_CODE),
        signal=_whole(fields.get("signal"), _MAX_SIGNAL),
        timed_out=fields.get("timed_out") is True,
        truncated=fields.get("truncated") is True,
        is_fresh_session=fields.get("is_fresh_session") is True,
        has_ended_session=fields.get("has_ended_session") is True,
        out_of_memory=fields.get("out_of_memory") is True,
        cpu_s=_amount(fields.get("cpu_s")),
        wall_s=_amount(fields.get("wall_s")),
        max_rss_bytes=_whole(fields.get("max_rss_bytes"), _MAX_COUNT) or 0,
        output_bytes=_whole(fields.get("output_bytes"), _MAX_COUNT) or 0,
    )


def _listed(fields: Json) -> Json:
    return {
        "id": _words(fields.get("id")),
        "epoch": _whole(fields.get("epoch"), _MAX_COUNT) or 0,
        "is_running": fields.get("is_running") is True,
        "age_s": _amount(fields.get("age_s")),
        "output_bytes": _whole(fields.get("output_bytes"), _MAX_COUNT) or 0,
    }


def _checked(answer: bytes) -> Json:
    """The answer, unless it is a refusal."""
    fields = _json(answer)
    code = fields.get("error")
    if code is None:
        return fields
    if not isinstance(code, str):
        raise SandboxError("The sandbox gave an answer that makes no sense.")
    message = _words(fields.get("message"))
    if code in {"unknown", "ended"}:
        raise Gone(f"The execution is not there: {message}.")
    if code == "busy":
        raise TooMany(f"The environment is busy: {message}.")
    raise SandboxError(f"The sandbox refused: {message}.")


def _json(content: bytes) -> Json:
    try:
        fields: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SandboxError("The sandbox gave an answer that makes no sense.") from error
    if not isinstance(fields, dict):
        raise SandboxError("The sandbox gave an answer that makes no sense.")
    return cast("Json", fields)


def _list(fields: Json, name: str) -> "list[Any]":
    found = fields.get(name)
    return cast("list[Any]", found) if isinstance(found, list) else []


def _whole(value: object, most: int) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= most else None


def _amount(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    # Compared as it came: a whole number may be too large for a float, and NaN is in no range.
    return float(value) if 0 <= value < _MAX_COUNT else 0.0


def _words(value: object) -> str:
    return value[:_MAX_TEXT] if isinstance(value, str) else ""
