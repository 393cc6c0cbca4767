"""A run's sandbox, through its broker. Implements `tools.port.Workplace`."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import structlog

from openinteractions.errors import LeaseLost, NotFound, RequestError, Unready
from openinteractions.resources.environments.service import Environments
from openinteractions.sandbox.port import Command, Displaced, Entry, Exit, Output, Owner
from openinteractions.tools.port import Done

_T = TypeVar("_T")

_log = structlog.get_logger(__name__)

_PATIENCE_S = 60.0
_KILL_S = 5.0
_LOOK_S = 0.5
_MARK_BYTES = 200
_PIECE_BYTES = 256 * 1024


class Bounded:
    """The beginning and the end of a text: what comes from a sandbox is never believed to be short.

    A broker bounds it too, so the middle is left out here only where that fails.
    """

    def __init__(self, max_bytes: int) -> None:
        # The broker's own mark is beyond its bound.
        self._half = (max_bytes + _MARK_BYTES) // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._left_out = 0

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        excess = len(self._tail) - self._half
        if excess > 0:
            self._left_out += excess
            del self._tail[:excess]

    def read(self) -> str:
        """What there is of it."""
        mark = f"\n[… {self._left_out} bytes left out …]\n".encode() if self._left_out else b""
        return (bytes(self._head) + mark + bytes(self._tail)).decode(errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteWorkplace:
    """One environment, as one owner of one run may use it.

    Whatever changes something raises `LeaseLost` once the run has another owner; nothing was done.
    """

    sandboxes: Environments
    environment_id: UUID
    interaction_id: UUID
    epoch: int
    """An owner that was replaced has a lower one, and is refused (ruling R4)."""
    is_stored: bool = True
    """An unstored run has one owner for ever, and no job that says so."""

    async def execute(
        self,
        key: str,
        argv: Sequence[str],
        *,
        session: str | None = None,
        timeout_s: float,
        max_output_bytes: int,
    ) -> Done:
        """Run a command and wait for its end; one of the same key is not started twice."""
        command = Command(
            id=self._id(key),
            epoch=self.epoch,
            argv=argv,
            timeout_s=timeout_s,
            max_output_bytes=max_output_bytes,
            session=session,
        )

        async def ask(address: str) -> Done:
            text = Bounded(max_output_bytes)
            async with self.sandboxes.client.execute(
                address, self.environment_id, command
            ) as events:
                async for event in events:
                    match event:
                        case Output(_, data):
                            text.add(data)
                        case Exit():
                            return Done(event, text.read())
            raise Unready("The sandbox's answer ended early.")

        return await self._patiently(ask)

    async def kill(self, key: str) -> None:
        """Kill a command and everything it has started; nothing happens if it has ended."""
        try:
            async with asyncio.timeout(_KILL_S):
                address = await self.sandboxes.locate(self.environment_id)
                await self.sandboxes.client.kill(
                    address, self.environment_id, self._id(key), epoch=self.epoch
                )
        except NotFound:
            return
        except (RequestError, TimeoutError) as error:
            # The broker ends what belongs to an interaction that has ended.
            why = error.message if isinstance(error, RequestError) else "its broker does not answer"
            _log.warning("execution.not_killed", execution_id=self._id(key), error=why)

    async def has_files(self) -> bool:
        """Whether the environment has any files yet; looking makes none."""
        return await self.sandboxes.has_files(self.environment_id)

    async def stat(self, path: str) -> Entry:
        """One file or folder."""

        async def ask(address: str) -> Entry:
            return await self.sandboxes.client.stat(address, self.environment_id, path)

        return await self._patiently(ask)

    async def list(
        self, path: str, *, recursive: bool = False, limit: int = 1000, after: str | None = None
    ) -> tuple[Sequence[Entry], str | None]:
        """What a folder holds, by path, and where the next page starts."""

        async def ask(address: str) -> tuple[Sequence[Entry], str | None]:
            return await self.sandboxes.client.list(
                address, self.environment_id, path, recursive=recursive, limit=limit, after=after
            )

        return await self._patiently(ask)

    async def read(self, path: str, *, offset: int = 0, max_bytes: int) -> tuple[bytes, int]:
        """At most `max_bytes` of a file from `offset` on, and the whole file's size in bytes."""

        async def ask(address: str) -> tuple[bytes, int]:
            data = bytearray()
            async with self.sandboxes.client.read(
                address, self.environment_id, path, offset=offset, length=max_bytes
            ) as file:
                async for chunk in file:
                    data += chunk
                    if len(data) >= max_bytes:
                        break
                return bytes(data[:max_bytes]), file.size

        return await self._patiently(ask)

    async def write(self, path: str, data: bytes) -> None:
        """Write a file, whole or not at all, over what is there; folders above it are made."""

        async def ask(address: str) -> None:
            await self.sandboxes.client.write(
                address,
                self.environment_id,
                path,
                _pieces(data),
                overwrite=True,
                owner=self._owner,
            )

        await self._patiently(ask)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or folder."""
        tries = 0

        async def ask(address: str) -> None:
            nonlocal tries
            tries += 1
            try:
                await self.sandboxes.client.remove(
                    address, self.environment_id, path, recursive=recursive, owner=self._owner
                )
            except NotFound:
                # The answer to an earlier try may be all that was lost.
                if tries == 1:
                    raise

        await self._patiently(ask)

    async def _patiently(self, ask: Callable[[str], Awaitable[_T]]) -> _T:
        """Ask the broker what may be asked again; one that is being started again is waited for.

        Raises:
            LeaseLost: It was asked for a change, and another worker owns the run.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            address = await self._address()
            try:
                return await ask(address)
            except Displaced as error:
                raise LeaseLost(f"the lease of {self.interaction_id} is lost") from error
            except Unready:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_LOOK_S)

    @property
    def _owner(self) -> Owner | None:
        return Owner(self.interaction_id, self.epoch) if self.is_stored else None

    def _id(self, key: str) -> str:
        return f"{self.interaction_id.hex}.{key}"

    async def _address(self) -> str:
        """Where the broker is; one that is being started again is waited for."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return await self.sandboxes.locate(self.environment_id)
            except Unready:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_LOOK_S)


async def _pieces(data: bytes) -> AsyncGenerator[bytes]:
    # One long piece would hold up everything else in this process.
    for start in range(0, len(data), _PIECE_BYTES):
        yield data[start : start + _PIECE_BYTES]
