"""`list_files`."""

from collections.abc import AsyncIterator
from typing import Final

from openinteractions.models.port import Json
from openinteractions.sandbox.port import Entry
from openinteractions.tools.port import Call, Workplace
from openinteractions.tools.workspace import paths, text
from openinteractions.tools.workspace.paths import Path

NOISE: Final = (".git", "node_modules", "__pycache__", ".venv", "venv", ".cache", ".npm")
"""Folders with very many files that are rarely meant."""

_LIMIT: Final = 200
_MAX_LIMIT: Final = 1000
_PAGE: Final = 500
_MAX_PAGES: Final = 100
_BEHIND_ALL: Final = "/\U0010ffff"
"""Sorts behind everything that is in a folder."""

LIST_FILES: Final = f"""\
Lists a folder: folders end with `/`, files have their size, links ` -> ` and where they lead. \
Folders that you can list: {paths.FOLDERS_SHOWN}, others that were put beside them (`/data`), and \
those in them.

- `recursive` lists what is below, too, and leaves out what is in {", ".join(NOISE)}.
- Gives {_LIMIT} entries unless `limit` says otherwise, and says how to read on (`after`).
- To find files by what is in them, use search_files."""

LIST_FILES_PARAMETERS: Final[Json] = {
    "type": "object",
    "properties": {
        "path": {
            "type": "string",
            "description": f"The folder. {paths.PATH_HELP} Default: /workspace.",
        },
        "recursive": {
            "type": "boolean",
            "description": "Also what is in the folders below. Default: false.",
        },
        "limit": {
            "type": "integer",
            "description": f"How many entries; {_MAX_LIMIT} at most. Default: {_LIMIT}.",
        },
        "after": {
            "type": "string",
            "description": "Begin after this entry: the last one of the list before.",
        },
    },
}


async def list_files(place: Workplace, call: Call) -> str:
    """The entries of a folder, one a line."""
    arguments: Json = call.step["arguments"]
    folder = paths.parse(arguments.get("path") or ".")
    limit = min(max(1, int(arguments.get("limit") or _LIMIT)), _MAX_LIMIT)
    after = _stored(folder, arguments.get("after"))
    entry = await paths.found(place, folder)
    if entry.type != "directory":
        return f"{folder.shown} is a file ({text.size(entry.size_bytes)})."
    walk = _Walk(place, folder, is_deep=bool(arguments.get("recursive")))
    lines: list[str] = []
    last = ""
    async for found in walk.entries(after):
        if len(lines) == limit:
            return "\n".join((f"{folder.shown}:", *lines, _more(lines, last)))
        last = _relative(folder, found)
        lines.append(_line(found, last, is_left_out=walk.leaves_out(found)))
    if walk.is_cut:
        return "\n".join((f"{folder.shown}:", *lines, "[there is more: list folders below it]"))
    if not lines:
        return f"{folder.shown} has nothing {'more ' if after else ''}in it."
    return "\n".join((f"{folder.shown}:", *lines))


class _Walk:
    """Goes through a folder, page by page."""

    def __init__(self, place: Workplace, folder: Path, *, is_deep: bool) -> None:
        self.is_cut = False
        """It was too large to be looked through."""
        self._place = place
        self._folder = folder
        self._is_deep = is_deep

    async def entries(self, after: str | None) -> AsyncIterator[Entry]:
        """Those that are shown, by path."""
        for _ in range(_MAX_PAGES):
            page, after = await self._place.list(
                self._folder.stored, recursive=self._is_deep, limit=_PAGE, after=after
            )
            for entry in page:
                if self._hidden_in(entry) is None:
                    yield entry
            if after is None:
                return
            hidden = self._hidden_in(page[-1]) if page else None
            if hidden is not None:
                after = hidden + _BEHIND_ALL
        self.is_cut = True

    def leaves_out(self, entry: Entry) -> bool:
        """Whether what is in this folder is not shown."""
        return self._is_deep and entry.type == "directory" and Path(entry.path).name in NOISE

    def _hidden_in(self, entry: Entry) -> str | None:
        """The folder because of which an entry is not shown."""
        if not self._is_deep:
            return None
        top = len(self._folder.stored.split("/"))
        parts = entry.path.split("/")
        for index in range(top, len(parts) - 1):
            if parts[index] in NOISE:
                return "/".join(parts[: index + 1])
        return None


def _stored(folder: Path, after: str | None) -> str | None:
    """Where a page begins, from the environment's root."""
    if not after:
        return None
    if after.startswith("/"):
        return paths.parse(after).stored
    return f"{folder.stored}/{after.strip('/')}"


def _relative(folder: Path, entry: Entry) -> str:
    return entry.path.removeprefix(folder.stored).lstrip("/")


def _line(entry: Entry, name: str, *, is_left_out: bool) -> str:
    name = text.in_line(name)
    if entry.type == "symlink":
        return f"{name}{_target(entry)} (a broken link)"
    if entry.type == "directory":
        left_out = " (its files are left out)" if is_left_out else ""
        return f"{name}/{_target(entry)}{left_out}"
    return f"{name}{_target(entry)}  {text.size(entry.size_bytes)}"


def _target(entry: Entry) -> str:
    """Where a link leads."""
    return "" if entry.link is None else f" -> {text.in_line(entry.link)}"


def _more(lines: list[str], last: str) -> str:
    shown = text.counted(len(lines), "entry").replace("entrys", "entries")
    return f"[{shown} shown, there are more; read on with after={last!r}]"
