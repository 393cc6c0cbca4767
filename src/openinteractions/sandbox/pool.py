"""Sandboxes that are ready before anyone needs them, and the way to one for an environment.

A warm sandbox is a started container with an open pipe and three empty folders. Claiming it mounts
the environment's folders over them, which appears inside; that takes milliseconds, where a start
takes a good part of a second. Without late mounts (they need root, on the engine's own machine)
every sandbox is started with its folders; and so is always that of an environment which has further
ones (`tops`), since a container's mount points are made at its start.

Why two environments never share a container: a warm one is known to one process only, is taken out
of its list before anything is mounted, and is given to no one else, whatever happens after. The
list is not kept over a restart. What is kept is `warm/<place>/env`, written before the first mount:
a broker that comes back takes a container with that file and all three mounts for the
environment's, and removes every other that is not labelled with one.
"""

import asyncio
import contextlib
import dataclasses
import os
import re
import secrets
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import structlog

from openinteractions.errors import AppError
from openinteractions.sandbox import mounts, tops
from openinteractions.sandbox.port import (
    FOLDERS,
    MOUNTS,
    Backend,
    Duplex,
    Mount,
    SandboxError,
    SandboxSpec,
)

_log = structlog.get_logger(__name__)

BROKER_LABEL = "openinteractions.broker"
HOME_LABEL = "openinteractions.home"
"""The broker's folder: two brokers of one name on one engine leave each other's alone."""
ENVIRONMENT_LABEL = "openinteractions.environment"
SESSION_LABEL = "openinteractions.session"
PLACE_LABEL = "openinteractions.place"

_PLACE = re.compile(r"[0-9a-f]{16}")
_CLAIM = "env"
_PING_S = 5.0
_PIPE_S = 30.0
_FIRST_PAUSE_S = 1.0
_MAX_PAUSE_S = 60.0
_SEEN = "seen"


class Pipe(Protocol):
    """What the pool needs of the pipe into a sandbox."""

    async def ping(self) -> object:
        """Come back when the other side has answered."""
        ...

    async def close(self) -> None:
        """Let it go; the sandbox runs on."""
        ...


P = TypeVar("P", bound=Pipe)
P_co = TypeVar("P_co", bound=Pipe, covariant=True)


class PipeOpener(Protocol[P_co]):
    """Makes a pipe of a container's stream."""

    def __call__(self, channel: Duplex, *, is_fresh: bool) -> Awaitable[P_co]:
        """Open it.

        Args:
            channel: The main process's streams.
            is_fresh: The container has just started, so its supervisor has to be sent first.
        """
        ...


class SpecMaker(Protocol):
    """Says what to start; everything that the pool does not decide is the broker's."""

    def __call__(
        self, *, name: str, mounts: Sequence[Mount], labels: Mapping[str, str]
    ) -> SandboxSpec:
        """A specification with these in it."""
        ...


@dataclass(frozen=True, slots=True)
class Started(Generic[P]):
    """A sandbox that has an environment's files and an open pipe."""

    ref: str
    pipe: P
    is_warm: bool
    """It was waiting."""


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[P]):
    ref: str
    pipe: P
    place: Path


class Pool(Generic[P]):
    """The sandboxes of one broker. `recover` first; inside `async with` it keeps itself filled."""

    def __init__(
        self,
        backend: Backend,
        folder: Path,
        *,
        broker: str,
        make_spec: SpecMaker,
        open_pipe: PipeOpener[P],
        size: int,
    ) -> None:
        """Nothing is started yet.

        Args:
            backend: Where containers are started.
            folder: The broker's data folder, on the engine's machine.
            broker: Its name.
            make_spec: What to start.
            open_pipe: Makes a pipe of a container's stream.
            size: How many sandboxes to keep ready.
        """
        self._backend = backend
        self._warm_folder = folder.resolve() / "warm"
        self._name = "oi-" + re.sub(r"[^A-Za-z0-9_.-]", "-", broker)
        self._owner = {BROKER_LABEL: broker, HOME_LABEL: str(folder.resolve())}
        self._labels = {**self._owner, SESSION_LABEL: secrets.token_hex(8)}
        self._make_spec = make_spec
        self._open_pipe = open_pipe
        self._size = size
        self._waiting: deque[_Waiting[P]] = deque()
        self._is_short = asyncio.Event()
        self._running: dict[str, str] = {}
        self._places: dict[str, Path] = {}
        self._why_cold: str | None = None
        self._trouble: str | None = None
        self._can_mount = False
        self._filler: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._size > 0:
            loop = asyncio.get_running_loop()
            self._filler = loop.create_task(self._fill_for_ever(), name="warm-pool")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the warm ones; those of environments run on."""
        if self._filler is not None:
            self._filler.cancel()
            await asyncio.wait({self._filler})
        while self._waiting:
            with contextlib.suppress(AppError, OSError):
                await self._discard(self._waiting.popleft())

    @property
    def warm(self) -> int:
        """How many sandboxes are ready."""
        return len(self._waiting)

    @property
    def problems(self) -> Sequence[str]:
        """Why sandboxes start slowly, each with its fix."""
        found: list[str] = []
        if self._why_cold is not None:
            found.append(
                f"No sandbox can be kept ready ({self._why_cold}): run the broker as root on the "
                "engine's own machine, or set sandbox.warm = 0."
            )
        if self._trouble is not None:
            found.append(f"No sandbox could be started ahead: {self._trouble}")
        return found

    async def recover(self) -> Mapping[str, str]:
        """Remove what brokers before have left; the containers of environments that still run.

        Each has to be attached to (`attach`), or removed where that fails.

        Raises:
            BackendDown: The engine does not answer.
        """
        for each in await self._backend.list(self._owner):
            place = each.labels.get(PLACE_LABEL, "")
            env = each.labels.get(ENVIRONMENT_LABEL)
            if _PLACE.fullmatch(place):
                self._places[each.ref] = self._warm_folder / place
                env = await asyncio.to_thread(_claimant, self._warm_folder / place)
            if each.is_running and env and env not in self._running:
                self._running[env] = each.ref
            else:
                _log.info("sandbox.leftover_removed", container=each.ref[:12], environment_id=env)
                await self.remove(each.ref)
        await asyncio.to_thread(_tidy, self._warm_folder, set(self._places.values()))
        return dict(self._running)

    async def start(self, env: str, root: Path) -> Started[P]:
        """A running sandbox for an environment that has none: a warm one, else a new one.

        Args:
            env: Its id.
            root: Its open disk (`Disks.open`).

        Raises:
            BackendDown: The engine does not answer, or has no such image or runtime.
            SandboxError: It would not start, or the environment has one already.
        """
        if env in self._running:
            raise SandboxError(f"The environment {env} has a sandbox already.")
        self._running[env] = ""
        try:
            started = await self._started(env, root)
        except BaseException:
            del self._running[env]
            raise
        finally:
            # Not before: the next warm one would take the processors from this one.
            self._is_short.set()
        self._running[env] = started.ref
        return started

    async def attach(self, ref: str) -> P:
        """A new pipe into a sandbox that runs already.

        Raises:
            BackendDown: The engine does not answer.
            Gone: It has ended.
            SandboxError: Its supervisor does not answer.
        """
        return await self._pipe(ref, is_fresh=False)

    async def remove(self, ref: str) -> None:
        """Kill a sandbox and take its mounts away; the environment's files stay.

        Raises:
            BackendDown: The engine does not answer; the sandbox may still run.
            SandboxError: It cannot be removed.
        """
        await self._backend.remove(ref)
        for env in [env for env, running in self._running.items() if running == ref]:
            del self._running[env]
        place = self._places.pop(ref, None)
        if place is not None:
            await asyncio.to_thread(_clear, place)

    async def _claim(self, env: str, root: Path) -> Started[P] | None:
        while self._waiting:
            taken = self._waiting.popleft()
            try:
                await asyncio.to_thread(_lay, taken.place, env, root)
                async with asyncio.timeout(_PING_S):
                    await taken.pipe.ping()
            except (AppError, OSError, TimeoutError) as error:
                _log.warning("sandbox.warm_was_dead", container=taken.ref[:12], reason=str(error))
                # It may have seen the files: if it cannot be removed, no other may have them.
                await self._discard(taken)
                continue
            except BaseException:
                await self._discard(taken)
                raise
            return Started(taken.ref, taken.pipe, is_warm=True)
        return None

    async def _started(self, env: str, root: Path) -> Started[P]:
        further = await asyncio.to_thread(tops.further, root)
        claimed = None if further else await self._claim(env, root)
        return claimed or await self._create(env, root, further)

    async def _create(self, env: str, root: Path, further: Sequence[str]) -> Started[P]:
        spec = self._make_spec(
            name=f"{self._name}-{env}",
            mounts=[
                Mount(source=root / name, target=tops.place(name)) for name in (*FOLDERS, *further)
            ],
            labels={**self._labels, ENVIRONMENT_LABEL: env},
        )
        # A start that was given up in the middle may have left one.
        for stray in await self._backend.list({**self._owner, ENVIRONMENT_LABEL: env}):
            await self.remove(stray.ref)
        ref = await self._backend.create(spec)
        try:
            pipe = await self._pipe(ref, is_fresh=True)
        except BaseException:
            await self.remove(ref)
            raise
        return Started(ref, pipe, is_warm=False)

    async def _pipe(self, ref: str, *, is_fresh: bool) -> P:
        channel = await self._backend.attach(ref)
        try:
            async with asyncio.timeout(_PIPE_S):
                return await self._open_pipe(channel, is_fresh=is_fresh)
        except TimeoutError as error:
            await channel.close()
            raise SandboxError("The sandbox's supervisor does not answer.") from error
        except BaseException:
            await channel.close()
            raise

    async def _fill_for_ever(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            self._is_short.clear()
            try:
                if not await self._checked():
                    return
                while len(self._waiting) < self._size:
                    self._waiting.append(await self._prepare())
            except (AppError, OSError) as error:
                self._trouble = str(error) or type(error).__name__
                _log.warning("sandbox.pool_not_filled", reason=self._trouble, retry_in_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _MAX_PAUSE_S)
                continue
            self._trouble = None
            pause_s = _FIRST_PAUSE_S
            await self._is_short.wait()

    async def _checked(self) -> bool:
        """Whether late mounts work, tried once with a container of its own."""
        if self._can_mount:
            return True
        if os.geteuid() != 0:
            self._why_cold = "mounting needs root"
            return False
        try:
            await asyncio.to_thread(_share, self._warm_folder)
        except OSError as error:
            self._why_cold = f"the folder {self._warm_folder} cannot be shared: {error}"
            return False
        self._can_mount = await self._try_mount()
        if not self._can_mount:
            self._why_cold = "mounts of this process do not appear in containers"
        return self._can_mount

    async def _try_mount(self) -> bool:
        """Mount something into a running container, and ask it whether that is there."""
        tests = " && ".join(f"test -e {target}/{_SEEN}" for target in MOUNTS.values())
        ref, place = await self._new_place(argv=("sh", "-c", f"read line; {tests} && echo yes"))
        try:
            channel = await self._backend.attach(ref)
            await asyncio.to_thread(_lay_sample, place)
            async with asyncio.timeout(_PIPE_S):
                await channel.write(b"now\n")
                return (await channel.read()).startswith(b"yes")
        finally:
            await self.remove(ref)

    async def _prepare(self) -> _Waiting[P]:
        ref, place = await self._new_place()
        try:
            return _Waiting(ref, await self._pipe(ref, is_fresh=True), place)
        except BaseException:
            await self.remove(ref)
            raise

    async def _new_place(self, *, argv: Sequence[str] | None = None) -> tuple[str, Path]:
        """Start a container whose folders are empty so far."""
        place = self._warm_folder / secrets.token_hex(8)
        spec = self._make_spec(
            name=f"{self._name}-warm-{place.name}",
            mounts=[
                Mount(source=place / name, target=MOUNTS[name], is_late=True) for name in FOLDERS
            ],
            labels={**self._labels, PLACE_LABEL: place.name},
        )
        if argv is not None:
            spec = dataclasses.replace(spec, argv=argv)
        await asyncio.to_thread(_make, place)
        try:
            ref = await self._backend.create(spec)
        except BaseException:
            await asyncio.to_thread(_clear, place)
            raise
        self._places[ref] = place
        return ref, place

    async def _discard(self, waiting: _Waiting[P]) -> None:
        await waiting.pipe.close()
        await self.remove(waiting.ref)


def _share(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mounts.share(folder)


def _make(place: Path) -> None:
    place.mkdir(mode=0o700)
    for name in FOLDERS:
        # Root's: what a sandbox without its files would write here must fail, not vanish.
        (place / name).mkdir(mode=0o755)


def _lay(place: Path, env: str, root: Path) -> None:
    """Note the claimant, then mount its folders."""
    (place / _CLAIM).write_text(env, encoding="ascii")
    for name in FOLDERS:
        mounts.bind(root / name, place / name)


def _lay_sample(place: Path) -> None:
    sample = place / _SEEN
    sample.mkdir()
    (sample / _SEEN).touch()
    for name in FOLDERS:
        mounts.bind(sample, place / name)


def _claimant(place: Path) -> str | None:
    """The environment whose files a place has, all of them."""
    try:
        env = (place / _CLAIM).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    mounted = {point.path for point in mounts.points(place)}
    return env if all(place / name in mounted for name in FOLDERS) else None


def _clear(place: Path) -> None:
    """Take a place away. Only empty folders: what is mounted by mistake is never deleted."""
    try:
        mounts.unmount_all(place)
        for name in (_CLAIM, f"{_SEEN}/{_SEEN}"):
            (place / name).unlink(missing_ok=True)
        for folder in (*(place / name for name in FOLDERS), place / _SEEN, place):
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()
    except OSError as error:
        # It is in nobody's way, and the next start tries again.
        _log.warning("sandbox.place_not_cleared", place=place.name, reason=str(error))


def _tidy(folder: Path, kept: set[Path]) -> None:
    """Clear the places that no container has."""
    if not folder.is_dir():
        return
    for place in folder.iterdir():
        if place not in kept and _PLACE.fullmatch(place.name):
            _clear(place)
