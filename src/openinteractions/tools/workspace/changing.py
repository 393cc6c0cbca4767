"""`write_file`, `edit_file` and `delete_file`.

They are keyed (ruling R5). Before anything is changed, what the file is and what it is to become is
noted; who takes the run over looks which of both it is. If it is neither, nothing is done.
"""

import asyncio
import hashlib
from collections.abc import Awaitable
from typing import Final

from openinteractions.errors import Invalid, NotFound, Unready
from openinteractions.models.port import Json
from openinteractions.sandbox.port import SandboxError
from openinteractions.tools.port import Call, Workplace
from openinteractions.tools.workspace import edits, paths, text
from openinteractions.tools.workspace.paths import Path

MAX_EDIT_BYTES: Final = 4 * 2**20
MAX_WRITE_BYTES: Final = 16 * 2**20

_CHUNK_BYTES: Final = 2**20
_MAX_HASHED_BYTES: Final = 16 * 2**20
_FOLDER: Final = "folder"
_LINK: Final = "link to "
_UNKNOWN: Final = "Outcome unknown: "

WRITE_FILE: Final = """\
Writes a file: makes it, with the folders above it, or replaces all that is in it. To change a \
part of a file, use edit_file. The text is kept as it is: no line numbers, no Markdown fences."""

WRITE_FILE_PARAMETERS: Final[Json] = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": paths.PATH_HELP},
        "content": {"type": "string", "description": "The whole text of the file."},
    },
    "required": ["path", "content"],
}

EDIT_FILE: Final = """\
Replaces text in a file. Read the file first.

- `old_text` must be in the file exactly as it is there, with its indentation, and only once: add \
lines before or after it until it is unique. Leave out the line numbers of read_file.
- `replace_all` replaces every place where it is.
- `new_text` may be empty: that deletes `old_text`.
- Returns the changed lines. Several small edits are better than one long one. For a new file, or \
when most of it changes, use write_file."""

EDIT_FILE_PARAMETERS: Final[Json] = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": paths.PATH_HELP},
        "old_text": {"type": "string", "description": "The text to replace."},
        "new_text": {"type": "string", "description": "The text to put in its place."},
        "replace_all": {
            "type": "boolean",
            "description": "Replace all places instead of exactly one. Default: false.",
        },
    },
    "required": ["path", "old_text", "new_text"],
}

DELETE_FILE: Final = """\
Deletes a file, or a folder: one that is not empty only with `recursive`. It cannot be undone. To \
move or rename files, use code_execution (`mv`)."""

DELETE_FILE_PARAMETERS: Final[Json] = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": paths.PATH_HELP},
        "recursive": {
            "type": "boolean",
            "description": "Delete a folder with all that is in it. Default: false.",
        },
    },
    "required": ["path"],
}


async def write_file(place: Workplace, call: Call) -> str:
    """Write a file whole."""
    arguments: Json = call.step["arguments"]
    path = paths.parse(arguments["path"])
    content: str = arguments["content"]
    data = content.encode()
    if len(data) > MAX_WRITE_BYTES:
        raise Invalid("The text is longer than 16 MiB: write it with code_execution.")
    if (said := await _earlier(place, call, path)) is not None:
        return said
    before = await fingerprint(place, path)
    if before == _FOLDER:
        raise Invalid(f"{path.shown} is a folder: give the path of a file in it.")
    if before is not None and before.startswith(_LINK):
        _refuse_link(path, before.removeprefix(_LINK))
    did = "Wrote" if before is None else "Replaced"
    lines = text.counted(text.line_count(content), "line")
    said = f"{did} {path.shown} ({lines}, {text.size(len(data))})."
    await _begin(call, before=before, after=_hash(data), said=said)
    await _tried(place.write(path.stored, data), path)
    return said


async def edit_file(place: Workplace, call: Call) -> str:
    """Replace text in a file."""
    arguments: Json = call.step["arguments"]
    path = paths.parse(arguments["path"])
    old, new = str(arguments["old_text"]), str(arguments["new_text"])
    if (said := await _earlier(place, call, path)) is not None:
        return said
    data = await _editable(place, path, is_new=not old)
    replace_all = bool(arguments.get("replace_all"))
    after, report = await asyncio.to_thread(_edited, data, old, new, replace_all=replace_all)
    said = f"Edited {path.shown}: {report}"
    await _begin(call, before=_hash(data), after=_hash(after), said=said)
    await _tried(place.write(path.stored, after), path)
    return said


def _edited(data: bytes, old: str, new: str, *, replace_all: bool) -> tuple[bytes, str]:
    """A file after an edit, and what was done."""
    text = data.decode(errors="surrogateescape")
    edited = edits.replace(text, old, new, replace_all=replace_all)
    return edited.text.encode(errors="surrogateescape"), edited.report()


async def _editable(place: Workplace, path: Path, *, is_new: bool) -> bytes:
    """The whole of a file that can be edited."""
    try:
        entry = await paths.found_file(place, path)
    except NotFound as error:
        advice = " To make it, use write_file." if is_new else ""
        raise NotFound(error.message + advice) from None
    _refuse_link(path, entry.link)
    if entry.size_bytes > MAX_EDIT_BYTES:
        raise Invalid(
            f"{path.shown} has {text.size(entry.size_bytes)}, and this edits "
            f"{text.size(MAX_EDIT_BYTES)} at most: use code_execution (Python or sed)."
        )
    data = bytearray()
    size = 1
    while len(data) < size:
        piece, size = await place.read(path.stored, offset=len(data), max_bytes=_CHUNK_BYTES)
        data += piece
        if not piece or len(data) > MAX_EDIT_BYTES:
            break
    if b"\0" in data:
        raise Invalid(f"{path.shown} is no text: change it with code_execution.")
    return bytes(data)


def _refuse_link(path: Path, target: str | None) -> None:
    """Refuse to put a file in a link's place, with what it leads to left as it was.

    Raises:
        Invalid: It is a link; the message says where it leads.
    """
    if target is not None:
        raise Invalid(
            f"{path.shown} is a link to '{target}', and would be replaced by a file: give the path "
            "that it leads to, or delete the link first."
        )


async def delete_file(place: Workplace, call: Call) -> str:
    """Delete a file or folder."""
    arguments: Json = call.step["arguments"]
    path = paths.parse(arguments["path"])
    if "/" not in path.stored:
        raise Invalid(f"{path.shown} itself cannot be deleted: delete what is in it.")
    recursive = bool(arguments.get("recursive"))
    if (said := await _earlier(place, call, path)) is not None:
        return said
    before = await fingerprint(place, path)
    if before is None:
        await paths.found(place, path)
    if before == _FOLDER and not recursive and (await place.list(path.stored, limit=1))[0]:
        raise Invalid(f"The folder {path.shown} is not empty: set recursive=true to delete it all.")
    said = f"Deleted {path.shown}{_with(before)}."
    await _begin(call, before=before, after=None, said=said)
    await _tried(place.remove(path.stored, recursive=recursive), path)
    return said


def _with(before: str | None) -> str:
    """What went with it, or did not."""
    if before == _FOLDER:
        return " and all that was in it"
    if before is not None and before.startswith(_LINK):
        return f", a {before}; what it led to is as it was"
    return ""


async def fingerprint(place: Workplace, path: Path) -> str | None:
    """What tells whether something has changed; None: there is nothing."""
    try:
        entry = await place.stat(path.stored)
    except NotFound:
        return None
    if entry.link is not None:
        return f"{_LINK}{entry.link}"
    if entry.type == "directory":
        return _FOLDER
    if entry.size_bytes > _MAX_HASHED_BYTES:
        return f"{entry.size_bytes} bytes of {entry.modified!r}"
    digest = hashlib.sha256()
    offset, size = 0, entry.size_bytes
    while offset < size:
        data, size = await place.read(path.stored, offset=offset, max_bytes=_CHUNK_BYTES)
        if not data:
            break
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def _begin(call: Call, *, before: str | None, after: str | None, said: str) -> None:
    """Note what is about to be done, unless an earlier owner of the run has done so."""
    if call.begun is None:
        await call.begin({"before": before, "after": after, "said": said})


async def _earlier(place: Workplace, call: Call, path: Path) -> str | None:
    """The result, if an earlier owner of the run has done this call; None: it is to be done.

    Raises:
        Invalid: It cannot be known.
    """
    note = call.begun
    if note is None:
        return None
    now = await fingerprint(place, path)
    if now == note["after"]:
        return note["said"]
    if now == note["before"]:
        return None
    raise Invalid(
        f"{_UNKNOWN}this was interrupted, and {path.shown} is now neither what it was before nor "
        "what it was to become. Look at it before you repeat this."
    )


async def _tried(change: Awaitable[None], path: Path) -> None:
    """Make a change that may or may not have been made if the answer is lost."""
    try:
        await change
    except (Unready, SandboxError) as error:
        raise Invalid(
            f"{_UNKNOWN}{error.message} Look at {path.shown} before you repeat this."
        ) from error
