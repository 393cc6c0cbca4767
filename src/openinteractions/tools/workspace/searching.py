"""`search_files`: ripgrep in the sandbox."""

from typing import Final

from openinteractions.errors import Invalid
from openinteractions.models.port import Json
from openinteractions.tools.port import Call, Done, Workplace
from openinteractions.tools.workspace import paths, text
from openinteractions.tools.workspace.listing import NOISE
from openinteractions.tools.workspace.paths import Path

_TIMEOUT_S: Final = 30.0
_MAX_LINE: Final = 300
_MAX_CHARACTERS: Final = 20_000
_MAX_OUTPUT_BYTES: Final = 256 * 1024
_LIMIT: Final = 200
_MAX_LIMIT: Final = 1000
_PER_FILE: Final = 100
_MAX_CONTEXT: Final = 10
_MAX_PATTERN: Final = 2000
_FOUND: Final = 0
_NONE: Final = 1
_NO_COMMAND: Final = 127

# The words after it are arguments, never parts of a script.
_IN_FOLDER: Final = 'cd -- "$1" && shift && exec rg "$@"'

SEARCH_FILES: Final = f"""\
Searches the text of files (ripgrep) and gives the lines that match, as `number:line` under the \
path of each file.

- `pattern` is a regular expression; set `literal` to search for it as it is.
- Searches all folders below `path`, hidden and git-ignored files too, but not in \
{", ".join(NOISE)} (search in one of those by giving its path), and no binary files.
- Gives {_LIMIT} lines unless `limit` says otherwise, {_PER_FILE} for one file, and stops after \
{_TIMEOUT_S:g} seconds."""

SEARCH_FILES_PARAMETERS: Final[Json] = {
    "type": "object",
    "properties": {
        "pattern": {"type": "string", "description": "Regular expression (Rust's syntax)."},
        "path": {
            "type": "string",
            "description": f"Folder or file to search. {paths.PATH_HELP} Default: /workspace.",
        },
        "glob": {
            "type": "string",
            "description": "Only files whose path matches, such as `*.py` or `src/**/*.{ts,tsx}`.",
        },
        "literal": {
            "type": "boolean",
            "description": "The pattern is plain text. Default: false.",
        },
        "ignore_case": {"type": "boolean", "description": "Default: false."},
        "context": {
            "type": "integer",
            "description": f"Lines to show around each match; {_MAX_CONTEXT} at most. Default: 0.",
        },
        "limit": {
            "type": "integer",
            "description": f"How many lines; {_MAX_LIMIT} at most. Default: {_LIMIT}.",
        },
    },
    "required": ["pattern"],
}


def executions(key: str) -> list[str]:
    """The keys of what a search of this key starts: a second one where the first was lost."""
    return [key, f"{key}.again"]


async def search_files(place: Workplace, call: Call) -> str:
    """Lines that match."""
    arguments: Json = call.step["arguments"]
    path = paths.parse(arguments.get("path") or ".")
    entry = await paths.found(place, path)
    argv = _argv(arguments, path, is_folder=entry.type == "directory")
    done: Done | None = None
    for key in executions(call.key):
        done = await place.execute(
            key, argv, timeout_s=_TIMEOUT_S, max_output_bytes=_MAX_OUTPUT_BYTES
        )
        # It changes nothing: where the sandbox was lost, it may run again.
        if done.exit.outcome != "unknown":
            break
    assert done is not None
    limit = min(max(1, int(arguments.get("limit") or _LIMIT)), _MAX_LIMIT)
    return _shown(done, path, limit)


def _argv(arguments: Json, path: Path, *, is_folder: bool) -> list[str]:
    pattern: str = arguments["pattern"]
    if not pattern or len(pattern) > _MAX_PATTERN or "\0" in pattern:
        raise Invalid(f"'pattern' must have 1 to {_MAX_PATTERN} characters, and no NUL.")
    glob: str = arguments.get("glob") or ""
    if len(glob) > _MAX_PATTERN or "\0" in glob:
        raise Invalid(f"'glob' must have {_MAX_PATTERN} characters at most, and no NUL.")
    context = min(max(0, int(arguments.get("context") or 0)), _MAX_CONTEXT)
    within = path.stored.split("/")
    folder = path if is_folder else path.folder
    return [
        *("/bin/sh", "-c", _IN_FOLDER, "sh", folder.shown),
        *("--no-config", "--no-ignore", "--hidden", "--no-messages", "--sort=path"),
        *("--line-number", "--heading", "--with-filename", "--color=never"),
        *(f"--max-columns={_MAX_LINE}", "--max-columns-preview", f"--max-count={_PER_FILE}"),
        *(["--fixed-strings"] if arguments.get("literal") else []),
        *(["--ignore-case"] if arguments.get("ignore_case") else []),
        *([f"--context={context}"] if context else []),
        # The last one that fits counts.
        *([f"--glob={glob}"] if glob else []),
        *(f"--glob=!{name}/" for name in NOISE if name not in within),
        *("-e", pattern, "--", path.shown),
    ]


def _shown(done: Done, path: Path, limit: int) -> str:
    end = done.exit
    if end.timed_out:
        raise Invalid(
            f"Stopped after {_TIMEOUT_S:g} seconds: search a smaller folder, or give a 'glob'."
        )
    if end.outcome != "exited":
        raise Invalid("The search was ended before it was done. Try it again.")
    if end.code == _NO_COMMAND:
        raise Invalid("This sandbox has no ripgrep: use grep with code_execution.")
    found = done.text.rstrip("\n")
    if end.code == _NONE:
        return f"Nothing in {path.shown} matches."
    if end.code != _FOUND:
        raise Invalid(
            f"{text.cut(found, _MAX_CHARACTERS)}\n[The pattern is a regular expression in Rust's "
            "syntax: escape special characters, or set literal=true.]"
        )
    return _bounded(found, limit, is_cut=end.truncated)


def _bounded(found: str, limit: int, *, is_cut: bool) -> str:
    """The first lines of what was found."""
    lines = found.split("\n")
    shown: list[str] = []
    room, left = _MAX_CHARACTERS, limit
    for line in lines:
        room -= len(line) + 1
        left -= line[:1].isdigit()
        if room < 0 or left < 0:
            break
        # A preview of what is no UTF-8 may be longer than it was asked to be.
        shown.append(text.cut(line, 2 * _MAX_LINE))
    if len(shown) == len(lines) and not is_cut:
        return found
    return "\n".join((*shown, "[… and more: search for something rarer, or in a smaller folder]"))
