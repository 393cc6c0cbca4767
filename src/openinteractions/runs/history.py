"""Earlier turns as a model's messages, compiled once and kept.

A turn that has ended never changes, so what it compiles to is kept by (segment, model), and turn
1,000 compiles only itself. The messages of a line are one list; a turn's history is its beginning,
or what stands there since the last turn that holds a handover (`loop.context.compacts`).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from uuid import UUID

import orjson

from openinteractions.db.engine import Database
from openinteractions.errors import Invalid
from openinteractions.loop import pictures
from openinteractions.loop.compaction import text_only
from openinteractions.loop.context import compacts, for_model, visible
from openinteractions.loop.earlier import Found, found_in, found_in_rows, joined
from openinteractions.models.catalog import Target
from openinteractions.models.port import Json
from openinteractions.netguard import Fetched, Fetcher
from openinteractions.resources.files import media
from openinteractions.resources.files import store as files
from openinteractions.runs import store
from openinteractions.runs.store import Line

_MOST_FETCHES = 32
"""Different URIs that one interaction may make the server fetch."""


@dataclass(slots=True)
class _Compiled:
    """One line as one model's messages, up to a depth."""

    messages: list[bytes] = field(default_factory=list[bytes])
    ends: dict[int, int] = field(default_factory=dict[int, int])
    """Depth → how many messages the line has up to and including that turn."""
    starts: dict[int, int] = field(default_factory=dict[int, int])
    """Depth → how many messages at the beginning are not shown after that turn."""
    depth: int = -1
    """The last turn that is in it."""
    size: int = 0
    charged: int = 0
    """How much of its size the cache has counted."""
    waiting: tuple[int, bytes] | None = None
    """The turn after it, which has ended but is not compiled before it is needed."""
    finds: list[tuple[int, Found]] = field(default_factory=list[tuple[int, Found]])
    """Depth → what was found there, also before a handover; in order."""

    def extend(
        self,
        depth: int,
        messages: Sequence[bytes],
        found: Found | None = None,
        *,
        is_compacted: bool = False,
    ) -> None:
        before = self.starts.get(self.depth, 0)
        self.starts[depth] = len(self.messages) if is_compacted else before
        self.messages += messages
        self.ends[depth] = len(self.messages)
        self.depth = depth
        self.size += sum(map(len, messages)) + 64
        self.add_found(depth, found)

    def add_found(self, depth: int, found: Found | None) -> None:
        if found:
            self.finds.append((depth, found))
            self.size += found.size()

    def found(self, depth: int) -> Found:
        """What was found up to and including this turn."""
        return joined(found for at, found in self.finds if at <= depth)

    def up_to(self, depth: int) -> list[bytes]:
        """What a turn after this one is shown."""
        return self.messages[self.starts[depth] : self.ends[depth]]


@dataclass(frozen=True, slots=True)
class Ready:
    """An interaction's input, compiled already."""

    target: str
    """Whose messages they are, `provider/model`."""
    steps: int
    """How many steps they stand for."""
    messages: list[bytes]


class Cache:
    """Compiled lines of this process, the least recently used dropped first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lines: OrderedDict[tuple[UUID, str], _Compiled] = OrderedDict()
        self._size = 0

    def find(self, segment_id: UUID, target: str) -> _Compiled | None:
        """A line's compiled turns so far."""
        line = self._lines.get((segment_id, target))
        if line is not None:
            self._lines.move_to_end((segment_id, target))
        return line

    def keep(self, segment_id: UUID, target: str, line: _Compiled) -> None:
        """Keep a line that was just compiled."""
        old = self._lines.pop((segment_id, target), None)
        if old is not None:
            self._size -= old.charged
        line.charged = 0
        self._lines[segment_id, target] = line
        self.grew(segment_id, target, line)

    def remember(self, segment_id: UUID, depth: int, steps: Sequence[Json], target: str) -> None:
        """Keep an interaction that has just ended, so that the next turn need not read it."""
        known = self.find(segment_id, target)
        if known is None:
            if depth != 0:
                return
            known = _Compiled()
            self.keep(segment_id, target, known)
        if known.depth == depth - 1 and known.waiting is None:
            data = orjson.dumps(steps)
            known.waiting = (depth, data)
            known.size += len(data)
            self.grew(segment_id, target, known)

    def grew(self, segment_id: UUID, target: str, line: _Compiled) -> None:
        """A line was extended in place; one that was dropped meanwhile is not counted."""
        if self._lines.get((segment_id, target)) is not line:
            return
        self._size += line.size - line.charged
        line.charged = line.size
        while self._size > self._max_bytes and self._lines:
            _, dropped = self._lines.popitem(last=False)
            self._size -= dropped.charged


class Inliner:
    """Puts a step's media where a model can see them: from blobs, or fetched from their `uri`."""

    def __init__(self, database: Database, fetcher: Fetcher, project_id: UUID) -> None:
        self._database = database
        self._fetcher = fetcher
        self._project_id = project_id
        self._fetched: dict[str, Fetched] = {}

    async def __call__(self, steps: Sequence[Json], target: Target) -> list[Json]:
        """The steps with all media that the target does not fetch itself as `data`.

        Raises:
            Invalid: A `uri` cannot be fetched; the message names it.
        """
        if not any("blob" in b or "uri" in b for step in steps for b in media.blocks(step)):
            return list(steps)
        copies: list[Json] = [orjson.loads(orjson.dumps(step)) for step in steps]
        blobs = await files.get(self._database, self._project_id, media.hashes(copies))
        for step in copies:
            media.put_back(step, blobs, for_model=True)
            for block in media.blocks(step):
                await self._fetch(block, target)
        return copies

    async def _fetch(self, block: Json, target: Target) -> None:
        uri = block.get("uri")
        if not isinstance(uri, str) or "data" in block:
            return
        if target.adapter.takes_uri(str(block.get("type")), uri):
            return
        fetched = self._fetched.get(uri)
        if fetched is None:
            if len(self._fetched) >= _MOST_FETCHES:
                raise Invalid(f"More than {_MOST_FETCHES} different URIs would have to be fetched.")
            fetched = await self._fetcher.fetch(uri, owner=self._project_id.hex)
            self._fetched[uri] = fetched
            if sum(len(item.data) for item in self._fetched.values()) > self._fetcher.max_bytes:
                most = self._fetcher.max_bytes
                raise Invalid(f"The files at the URIs are larger than {most} bytes together.")
        block.pop("uri")
        block["data"] = fetched.base64()
        block.setdefault("mime_type", fetched.mime_type)


class LineHistory:
    """The turns before one interaction, as `loop.ports.History`."""

    def __init__(
        self,
        database: Database,
        cache: Cache,
        inliner: Inliner,
        line: Line | None,
        ready: Ready | None = None,
    ) -> None:
        self._database = database
        self._cache = cache
        self._inline = inliner
        self._line = line
        self._ready = ready
        self._bare: dict[str, list[bytes]] = {}
        """Target → the turns without their results' pictures; of this run only."""

    async def messages(self, target: Target, *, is_bare: bool = False) -> Sequence[bytes]:
        """Every earlier turn as the target's messages; bare: without the pictures in results."""
        line = self._line
        if is_bare:
            # The input was compiled with them.
            self._ready = None
        if line is None:
            return ()
        return await (self._bare_messages if is_bare else self._messages)(line, target)

    async def _messages(self, line: Line, target: Target) -> Sequence[bytes]:
        if line.idx is not None:
            return (await self._compile_line(line, target)).up_to(line.depth)
        known = self._cache.find(line.segment_id, target.id)
        if known is not None and known.waiting is not None:
            await self._take_in(line.segment_id, known, target)
        if known is not None and line.depth in known.ends:
            return known.up_to(line.depth)
        if known is not None and known.depth < line.depth:
            turns = await self._turns(line, start=known.depth + 1)
            await self._extend(known, turns, line, target)
            self._cache.grew(line.segment_id, target.id, known)
            # Another reader of the line may have taken it further meanwhile.
            return known.up_to(line.depth)
        compiled = await self._compile_line(line, target)
        self._cache.keep(line.segment_id, target.id, compiled)
        return compiled.up_to(line.depth)

    async def _bare_messages(self, line: Line, target: Target) -> Sequence[bytes]:
        if target.id not in self._bare:
            compiled = await self._compile_line(line, target, is_bare=True)
            self._bare[target.id] = compiled.up_to(line.depth)
        return self._bare[target.id]

    async def own(self, steps: Sequence[Json], target: Target) -> list[bytes]:
        """The running interaction's steps as the target's messages."""
        ready = self._ready
        if ready is not None and ready.target == target.id and ready.steps == len(steps):
            return ready.messages
        return await self._compile(steps, target)

    async def called(self, call_ids: Sequence[str]) -> set[str]:
        """Which of these ids occur in the calls of the turns before."""
        if self._line is None:
            return set()
        return await store.called(self._database, self._line, call_ids)

    async def found(self, target: Target) -> Found:
        """What the turns before have found; cheap once the target's messages were asked for."""
        line = self._line
        if line is None:
            return Found()
        known = self._cache.find(line.segment_id, target.id)
        if line.idx is None and known is not None and line.depth in known.ends:
            return known.found(line.depth)
        return joined(found_in_rows(turn) for _, turn in await self._turns(line, start=0))

    async def steps(self, max_chars: int) -> list[Json]:
        """What a model sees of the turns before, as steps without media; the newest if too many."""
        if self._line is None:
            return []
        found: list[Json] = []
        for _, turn in reversed(await self._turns(self._line, start=0)):
            if max_chars < 0 and not _may_compact(turn):
                continue
            steps = [orjson.loads(data) for data in turn]
            is_first = compacts(steps)
            shown = visible(steps)
            for at in range(len(shown) - 1, -1, -1):
                bare = text_only(shown[at])
                max_chars -= len(orjson.dumps(bare))
                # A handover stands for everything before it: that is never too much.
                if max_chars >= 0 or (is_first and at == 0):
                    found.append(bare)
            if is_first:
                break
        return found[::-1]

    async def _take_in(self, segment_id: UUID, known: _Compiled, target: Target) -> None:
        """Compile the turn that ended last, now that one follows it."""
        waiting = known.waiting
        assert waiting is not None
        depth, steps = waiting
        parsed: list[Json] = orjson.loads(steps)
        messages = await self._compile(parsed, target)
        if known.waiting is not waiting:
            # Another reader has taken it in meanwhile.
            return
        known.waiting = None
        known.size -= len(steps)
        if known.depth == depth - 1:
            known.extend(depth, messages, found_in(parsed), is_compacted=compacts(parsed))
        self._cache.grew(segment_id, target.id, known)

    async def _turns(self, line: Line, *, start: int) -> list[tuple[int, list[bytes]]]:
        """The turns of a line from a depth on, oldest first: depth, steps as JSON."""
        rows = await store.history(self._database, line, start=start)
        return [
            (depth, [data for _, _, data in turn])
            for depth, turn in groupby(rows, key=itemgetter(0))
        ]

    async def _compile_line(
        self, line: Line, target: Target, *, is_bare: bool = False
    ) -> _Compiled:
        """A line from its beginning, or from its last handover: nothing before it is shown."""
        turns = await self._turns(line, start=0)
        start = 0
        for at in range(len(turns) - 1, 0, -1):
            if _may_compact(turns[at][1]) and compacts([orjson.loads(d) for d in turns[at][1]]):
                start = at
                break
        compiled = _Compiled()
        for depth, turn in turns[:start]:
            compiled.add_found(depth, found_in_rows(turn))
        await self._extend(compiled, turns[start:], line, target, is_bare=is_bare)
        return compiled

    async def _extend(
        self,
        into: _Compiled,
        turns: Sequence[tuple[int, Sequence[bytes]]],
        line: Line,
        target: Target,
        *,
        is_bare: bool = False,
    ) -> None:
        for depth, turn in turns:
            steps: list[Json] = [orjson.loads(data) for data in turn]
            if is_bare:
                steps = pictures.without(steps)
            messages = await self._compile(steps, target)
            # Two forks may be extending the same line; whoever compiles a turn first adds it.
            if depth > into.depth:
                into.extend(depth, messages, found_in(steps), is_compacted=compacts(steps))
        if into.depth < line.depth:
            into.extend(line.depth, ())

    async def _compile(self, steps: Sequence[Json], target: Target) -> list[bytes]:
        shown = for_model(steps, provider=target.provider, model=target.model)
        return target.adapter.compile(await self._inline(shown, target), target.model)


def _may_compact(turn: Sequence[bytes]) -> bool:
    """False where no step can be a handover; told without parsing, for lines may be long."""
    return any(b'"compacted"' in data for data in turn)
