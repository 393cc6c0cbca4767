"""What can be done with the files of an environment. They lie with its broker; all is streamed."""

from collections.abc import AsyncIterator, Generator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import orjson

from openinteractions import clock
from openinteractions.api import pages
from openinteractions.api.pages import Page
from openinteractions.errors import Invalid, NotFound
from openinteractions.resources.environments.service import Environments
from openinteractions.resources.environments.sources import faults_shown
from openinteractions.sandbox.files import paths
from openinteractions.sandbox.port import Entry
from openinteractions.wire.environments import environment_id
from openinteractions.wire.fields import Json


@dataclass(frozen=True, slots=True)
class Spot:
    """A path of an environment, and where to ask for it."""

    address: str
    environment: UUID
    path: str
    """In its one spelling; empty for the root."""

    @contextmanager
    def told(self) -> Generator[None]:
        """What brokers say, in the contract's words."""
        try:
            with faults_shown():
                yield
        except NotFound:
            raise NotFound(
                f"Path '{self.path}' not found in environment '{environment_id(self.environment)}'."
            ) from None


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file: the first byte, and how many."""

    start: int
    length: int


class OutOfRange(Invalid):
    """The file has no such part."""

    status = 416
    rpc = "OUT_OF_RANGE"

    def __init__(self, size: int) -> None:
        super().__init__(f"The file has {size} bytes: there is nothing in the range asked for.")
        self.size = size


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Bytes to be sent; `stack` is to be closed when they were, or nobody wants them any more."""

    stack: AsyncExitStack
    pieces: AsyncIterator[bytes]
    mime_type: str
    size: int | None = None
    """Of the whole file; None for an archive."""
    part: Part | None = None
    """None: all of it."""


async def spot(environments: Environments, project_id: UUID, environment: str, path: str) -> Spot:
    """A path to be read.

    Raises:
        Invalid: It cannot be a path.
        NotFound: There is no such environment.
        Unready: Its broker is away.
    """
    parts = paths.parse(path)
    key, address = await environments.open(project_id, environment)
    return Spot(address, key, paths.shown(parts))


async def listing(
    environments: Environments,
    place: Spot,
    page: Page,
    *,
    recursive: bool,
) -> bytes:
    """A file, or a page of what a folder holds, as JSON.

    Raises:
        NotFound: There is no such path.
        Invalid: The token is none of this listing.
    """
    filters = [place.environment.hex, place.path, recursive]
    after = page.after_text(filters)
    client = environments.client
    with place.told():
        if place.path:
            entry = await client.stat(place.address, place.environment, place.path)
            if entry.type != "directory":
                return files([entry])
        entries, last = await client.list(
            place.address,
            place.environment,
            place.path,
            recursive=recursive,
            limit=page.size,
            after=after,
        )
    return files(entries, None if last is None else pages.text_token(last, filters))


async def content(
    environments: Environments, place: Spot, *, recursive: bool, wanted: str | None
) -> Content:
    """A file's bytes, or a folder as a tar archive.

    Args:
        environments: The resource.
        place: Which.
        recursive: A folder with everything below it; else only its own files.
        wanted: The Range header; only files have parts.

    Raises:
        NotFound: There is no such path.
        OutOfRange: The file has no such part.
    """
    client = environments.client
    where = (place.address, place.environment, place.path)
    async with AsyncExitStack() as stack:
        with place.told():
            entry = await client.stat(*where) if place.path else None
            if entry is None or entry.type == "directory":
                archive = await stack.enter_async_context(client.tar(*where, recursive=recursive))
                kind = "application/x-tar"
                return Content(stack=stack.pop_all(), pieces=archive, mime_type=kind)
            part = None if wanted is None else part_of(wanted, entry.size_bytes)
            start, length = (0, None) if part is None else (part.start, part.length)
            stream = await stack.enter_async_context(
                client.read(*where, offset=start, length=length)
            )
            return Content(
                stack=stack.pop_all(),
                pieces=stream,
                mime_type=entry.mime_type or stream.mime_type,
                size=stream.size,
                part=part,
            )
    raise AssertionError  # pragma: no cover - nothing above is suppressed


def part_of(header: str, size: int) -> Part | None:
    """The part that a Range header asks for; None where it asks for none, or for several.

    Raises:
        OutOfRange: The file has no such part.
    """
    unit, _, spec = header.partition("=")
    first, dash, last = (text.strip() for text in spec.partition("-"))
    if unit.strip().lower() != "bytes" or not dash or not (first or last):
        return None
    if any(text and not (text.isascii() and text.isdigit()) for text in (first, last)):
        return None
    if not first:
        length = min(int(last[:19]), size)
        part = Part(size - length, length)
    else:
        end = min(int(last[:19]), size - 1) if last else size - 1
        if last and int(last[:19]) < int(first[:19]):
            return None
        part = Part(int(first[:19]), end - int(first[:19]) + 1)
    if part.length <= 0:
        raise OutOfRange(size)
    return part


def files(entries: list[Entry], token: str | None = None) -> bytes:
    """Entries as the contract's `files`."""
    answer: Json = {"files": [shown_entry(entry) for entry in entries]}
    if token is not None:
        answer["next_page_token"] = token
    return orjson.dumps(answer)


def shown_entry(entry: Entry) -> Json:
    """A file or folder as the contract shows it."""
    answer: Json = {
        "name": entry.path.rpartition("/")[2],
        "path": entry.path,
        "type": entry.type.upper(),
        "created": _moment(entry.created),
        "modified": _moment(entry.modified),
    }
    if entry.type == "file":
        answer["size_bytes"] = str(entry.size_bytes)
        answer["mime_type"] = entry.mime_type or "application/octet-stream"
    return answer


def _moment(seconds: float) -> str:
    # A file's times are whatever its owner set them to.
    try:
        return clock.rfc3339(datetime.fromtimestamp(seconds, UTC))
    except (OverflowError, ValueError, OSError):
        return "1970-01-01T00:00:00.000000Z"
