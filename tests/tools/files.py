"""A workplace in memory, and calls of tools."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from openinteractions.errors import Invalid, NotFound
from openinteractions.models.port import Json
from openinteractions.sandbox.port import FOLDERS, Entry
from openinteractions.tools.port import Call, Done, Means
from openinteractions.tools.workspace.tools import tools

IMAGES = {"png": "image/png", "pdf": "application/pdf"}


def _parts(path: str) -> tuple[bytes, ...]:
    return tuple(part.encode() for part in path.split("/") if part)


@dataclass(kw_only=True)
class Files:
    """The methods on files of the port; `files` has those of the environment by path."""

    files: dict[str, bytes] = field(default_factory=dict)
    folders: set[str] = field(default_factory=lambda: set(FOLDERS))
    changes: list[str] = field(default_factory=list)
    """What was written and removed, in order."""
    links: dict[str, str] = field(default_factory=dict)
    """Paths of links, and the paths that they lead to."""
    bytes_read: int = 0
    pages: int = 0
    """Of lists."""
    disturb: Callable[[str], None] = lambda _: None
    """Called with `before` and `after` each change; what it raises comes out."""

    def __post_init__(self) -> None:
        for path in self.files:
            self._make_folders(path)

    async def has_files(self) -> bool:
        return bool(self.files)

    async def stat(self, path: str) -> Entry:
        path = "/".join(part.decode() for part in _parts(path))
        if path in self.links:
            target = self.links[path]
            return replace(await self.stat(target), path=path, link=f"/{target}")
        if path in self.files:
            kind = IMAGES.get(path.rpartition(".")[2], "text/plain; charset=utf-8")
            return _entry(path, "file", len(self.files[path]), kind)
        if path in self.folders:
            return _entry(path, "directory")
        raise NotFound(f"Path '{path}' not found.")

    async def list(
        self, path: str, *, recursive: bool = False, limit: int = 1000, after: str | None = None
    ) -> tuple[Sequence[Entry], str | None]:
        self.pages += 1
        entry = await self.stat(path)
        if entry.type == "file":
            return [entry], None
        within = _parts(path)
        found = sorted(
            parts
            for parts in map(_parts, (*self.files, *self.folders, *self.links))
            if parts[: len(within)] == within
            and (len(parts) == len(within) + 1 or (recursive and len(parts) > len(within)))
            and (after is None or parts > _parts(after))
        )
        names = [b"/".join(parts).decode() for parts in found]
        entries = [await self.stat(name) for name in names[:limit]]
        return entries, names[limit - 1] if len(names) > limit else None

    async def read(self, path: str, *, offset: int = 0, max_bytes: int) -> tuple[bytes, int]:
        entry = await self.stat(path)
        if entry.type != "file":
            raise Invalid(f"Path '{path}' is a directory.")
        data = self.files[self.links.get(entry.path, entry.path)]
        if offset > len(data):
            raise Invalid(f"The file has {len(data)} bytes: there is nothing at offset {offset}.")
        piece = data[offset : offset + max_bytes]
        self.bytes_read += len(piece)
        return piece, len(data)

    async def write(self, path: str, data: bytes) -> None:
        if path in self.folders:
            raise Invalid(f"Path '{path}' is a directory.")
        if path.partition("/")[0] not in self.folders:
            raise Invalid(f"The environment has no such folder. Write to '/workspace/{path}'.")
        self.disturb("before")
        self._make_folders(path)
        self.files[path] = data
        self.changes.append(f"write {path}")
        self.disturb("after")

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        entry = await self.stat(path)
        below = f"{entry.path}/"
        inside = [name for name in (*self.files, *self.folders) if name.startswith(below)]
        if inside and not recursive:
            raise Invalid(f"The directory '{path}' is not empty.")
        self.disturb("before")
        for name in (*inside, entry.path):
            self.links.pop(name, None)
            self.files.pop(name, None)
            self.folders.discard(name)
        self.changes.append(f"remove {path}")
        self.disturb("after")

    def _make_folders(self, path: str) -> None:
        above = path.split("/")[:-1]
        for depth in range(len(above)):
            folder = "/".join(above[: depth + 1])
            if folder in self.files:
                raise Invalid(f"A part of the path '{path}' is not a directory.")
            self.folders.add(folder)


def _entry(path: str, kind: Any, size: int = 0, mime_type: str | None = None) -> Entry:
    return Entry(
        path=path, type=kind, size_bytes=size, mime_type=mime_type, created=1.0, modified=1.0
    )


@dataclass
class Bench(Files):
    """Obeys the port: files in memory, and commands that end as the test says."""

    ends: list[Done | Exception] = field(default_factory=list)
    executed: list[tuple[str, list[str], str | None]] = field(default_factory=list)
    """Key, command and session of each."""
    killed: list[str] = field(default_factory=list)
    is_stuck: bool = False
    """Commands never end."""

    async def execute(
        self,
        key: str,
        argv: Sequence[str],
        *,
        session: str | None = None,
        timeout_s: float,
        max_output_bytes: int,
    ) -> Done:
        self.executed.append((key, list(argv), session))
        if self.is_stuck:
            await asyncio.Event().wait()
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    async def kill(self, key: str) -> None:
        self.killed.append(key)


async def _nothing(note: Json) -> None:
    pass


def a_call(
    name: str,
    *,
    key: str = "3",
    begun: Json | None = None,
    begin: Callable[[Json], Awaitable[None]] = _nothing,
    **arguments: Any,
) -> Call:
    step = {"type": "function_call", "id": "c1", "name": name, "arguments": arguments}
    return Call(step=step, key=key, begun=begun, begin=begin)


async def use(place: Any, name: str, **arguments: Any) -> Any:
    """What a call that goes well gives."""
    result = await tools({}, Means(workplace=place))[name].run(a_call(name, **arguments))
    assert (result["type"], result["name"]) == ("function_result", name)
    assert not result["is_error"], result["result"]
    return result["result"]


async def refused(place: Any, name: str, **arguments: Any) -> str:
    """What a call says that does not go well."""
    result = await tools({}, Means(workplace=place))[name].run(a_call(name, **arguments))
    assert result["is_error"], result["result"]
    return result["result"]
