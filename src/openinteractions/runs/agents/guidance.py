"""What an environment's files tell its agent: AGENTS.md, skills, hooks.

Everything here comes from whoever may write those files: it is bounded, and what cannot be read is
left out with a note. The conventions are the hosted API's
(https://ai.google.dev/gemini-api/docs/custom-agents) and those of https://agents.md.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, TypeAlias, TypeVar

from openinteractions.errors import NotFound, RequestError, Unready
from openinteractions.sandbox import tops
from openinteractions.sandbox.port import SandboxError
from openinteractions.tools import code_execution, hooks
from openinteractions.tools.hooks import Hook, harmless
from openinteractions.tools.port import Workplace

T = TypeVar("T")

About: TypeAlias = Literal["instructions", "skills", "hooks"]

MAX_INSTRUCTIONS_BYTES: Final = 32 * 1024
MAX_SKILLS: Final = 50
MAX_HOOKS_BYTES: Final = 64 * 1024

_INSTRUCTIONS: Final = (
    ".agents/AGENTS.md",
    "workspace/.agents/AGENTS.md",
    "workspace/AGENTS.md",
)
_AGENTS_FOLDERS: Final = (".agents", "workspace/.agents")
_SKILLS: Final = (*(f"{each}/skills" for each in _AGENTS_FOLDERS), ".agent/skills")
"""The last one is Agent Platform's: its examples mount skills there."""
_MAX_SKILL_FOLDERS: Final = 100
"""Looked into, in all: also one without a skill costs a request."""
_SKILL_BYTES: Final = 8 * 1024
"""Of a SKILL.md, its front matter and its first words."""
_FRONT_MATTER: Final = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MAX_NAME_CHARS: Final = 100
_MAX_DESCRIPTION_CHARS: Final = 1024
_MAX_NOTES: Final = 50
_MAX_NOTE_CHARS: Final = 500
_WAITS_S: Final = (0.5, 2.0)
_KEY: Final = re.compile(r"""(["']?)([\w-]+)\1[ \t]*:(?=[ \t]|$)""")
_BLOCK: Final = re.compile(r"[|>][-+1-9]{0,2}[ \t]*(?:#.*)?$")
_NESTED: Final = re.compile(r"""-(?:\s|$)|["']?[\w-]+["']?[ \t]*:(?:\s|$)""")
_COMMENT: Final = re.compile(r"(?:^|[ \t])#.*", re.MULTILINE)
_DOUBLE_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(?:#.*)?', re.DOTALL)
_SINGLE_QUOTED: Final = re.compile(r"'((?:[^']|'')*)'\s*(?:#.*)?", re.DOTALL)
_ESCAPE: Final = re.compile(
    r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL
)
_NO_TEXT: Final = tuple("[]{}&*!|>%@`,")
"""What a plain text cannot begin with: it is a list, an alias, a tag, …"""
_UNSEEN: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)


@dataclass(frozen=True, slots=True)
class Instructions:
    """One AGENTS.md."""

    path: str
    """In the sandbox: `/workspace/AGENTS.md`."""
    text: str


@dataclass(frozen=True, slots=True)
class Skill:
    """What the model is shown of a skill; it reads the rest when it needs it."""

    name: str
    description: str
    path: str
    """Of its SKILL.md, in the sandbox."""


@dataclass(frozen=True, slots=True)
class Note:
    """What was left out, and why."""

    about: About
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """What was found. It survives JSON, so that a run can keep what it began with."""

    instructions: tuple[Instructions, ...] = ()
    skills: tuple[Skill, ...] = ()
    hooks: tuple[Hook, ...] = ()
    notes: tuple[Note, ...] = ()
    """For whoever keeps those files."""

    @classmethod
    def load(cls, values: dict[str, Any]) -> "Guidance":
        """Read it back from what `orjson.dumps` made of it."""
        return cls(
            instructions=tuple(Instructions(**entry) for entry in values["instructions"]),
            skills=tuple(Skill(**entry) for entry in values["skills"]),
            hooks=tuple(Hook(**entry) for entry in values["hooks"]),
            notes=tuple(Note(**entry) for entry in values["notes"]),
        )


async def read(place: Workplace, *, waits_s: Sequence[float] = _WAITS_S) -> Guidance:
    """Look through an environment's files; without any, looking makes none.

    Args:
        place: The environment.
        waits_s: How long to wait, again and again, for files that cannot be read now.

    Raises:
        Unready: The files cannot be read now, also not a few seconds later.
    """
    if not await _patiently(place.has_files, waits_s):
        return Guidance()
    reader = _Reader(place, waits_s)
    instructions = await reader.instructions()
    skills = await reader.skills()
    found = await reader.hooks()
    return Guidance(
        instructions=instructions,
        skills=skills,
        hooks=found,
        notes=tuple(reader.notes[:_MAX_NOTES]),
    )


def supervised(found: Guidance, approve: Sequence[str]) -> Guidance:
    """What of it holds in a run whose tools need consent.

    A command hook is code, which whoever may write files could have put there: the model, or a
    repository. Where code needs consent it is left out; a hook over HTTP runs no code of theirs.
    """
    if not any(fnmatchcase(code_execution.NAME, pattern.lower()) for pattern in approve):
        return found
    kept = tuple(hook for hook in found.hooks if hook.type != "command")
    if len(kept) == len(found.hooks):
        return found
    note = Note(
        "hooks",
        f"{len(found.hooks) - len(kept)} command hooks are left out: this run asks before "
        f"{code_execution.NAME} (approve), and they would run without being asked for.",
    )
    return replace(found, hooks=kept, notes=(note, *found.notes))


class _Reader:
    """One look through the files; collects what is wrong with them."""

    def __init__(self, place: Workplace, waits_s: Sequence[float]) -> None:
        self._place = place
        self._waits_s = waits_s
        self._about: About = "instructions"
        self.notes: list[Note] = []

    def _note(self, *texts: str) -> None:
        self.notes += [Note(self._about, harmless(text, _MAX_NOTE_CHARS)) for text in texts]

    async def instructions(self) -> tuple[Instructions, ...]:
        self._about = "instructions"
        found: dict[str, Instructions] = {}
        for path in _INSTRUCTIONS:
            text = await self._text(path, MAX_INSTRUCTIONS_BYTES)
            if text is not None and text.strip():
                found.setdefault(text.strip(), Instructions(_inside(path), text.strip()))
        return tuple(found.values())

    async def hooks(self) -> tuple[Hook, ...]:
        self._about = "hooks"
        found: list[Hook] = []
        for folder in _AGENTS_FOLDERS:
            path = f"{folder}/hooks.json"
            text = await self._text(path, MAX_HOOKS_BYTES, is_whole=True)
            if text is not None:
                parsed, notes = await asyncio.to_thread(hooks.parse, text, source=path)
                found += parsed
                self._note(*notes)
        if len(found) > hooks.MAX_HOOKS:
            self._note(f"Only the first {hooks.MAX_HOOKS} hooks are used.")
        return tuple(found[: hooks.MAX_HOOKS])

    async def skills(self) -> tuple[Skill, ...]:
        self._about = "skills"
        found: dict[str, Skill] = {}
        paths = [path for each in _SKILLS for path in await self._folders(each)]
        if len(paths) > _MAX_SKILL_FOLDERS:
            self._note(f"Only {_MAX_SKILL_FOLDERS} folders of skills are looked into.")
        for path in paths[:_MAX_SKILL_FOLDERS]:
            if len(found) == MAX_SKILLS:
                self._note(f"Only the first {MAX_SKILLS} skills are listed.")
                break
            skill = await self._skill(path)
            if skill is not None and found.setdefault(skill.name, skill) is not skill:
                self._note(f"{path}: there is a skill {skill.name!r} already; left out.")
        return tuple(found.values())

    async def _folders(self, path: str) -> list[str]:
        listed = await self._had(path, lambda: self._place.list(path, limit=_MAX_SKILL_FOLDERS))
        if listed is None:
            return []
        entries, after = listed
        if after is not None:
            self._note(f"{path}: only its first {_MAX_SKILL_FOLDERS} entries are looked at.")
        return [entry.path for entry in entries if entry.type != "file"]

    async def _skill(self, folder: str) -> Skill | None:
        """A folder's skill; what its front matter does not say is taken from what is there."""
        path = f"{folder}/SKILL.md"
        text = await self._text(path, _SKILL_BYTES, cut_note=False)
        if text is None:
            return None
        fields, body = _front_matter(text)
        name = fields.get("name", "")
        name = _line(name, _MAX_NAME_CHARS) or _line(folder.rpartition("/")[2], _MAX_NAME_CHARS)
        description = _line(fields.get("description", ""), _MAX_DESCRIPTION_CHARS)
        description = description or _line(_first_words(body), _MAX_DESCRIPTION_CHARS)
        if not name or not description:
            self._note(f"{path}: neither a description nor a text to take one from; left out.")
            return None
        return Skill(name, description, _inside(path))

    async def _text(
        self, path: str, max_bytes: int, *, is_whole: bool = False, cut_note: bool = True
    ) -> str | None:
        """A file's beginning; None where there is none, or it is too long and wanted whole."""
        got = await self._had(path, lambda: self._place.read(path, max_bytes=max_bytes))
        if got is None:
            return None
        data, size = got
        text = data[:max_bytes].decode("utf-8-sig", errors="replace").replace("\0", "")
        if size <= max_bytes:
            return text
        if is_whole:
            self._note(f"{path}: longer than {max_bytes} bytes; left out.")
            return None
        if cut_note:
            self._note(f"{path}: only its first {max_bytes} bytes are used.")
            text += f"\n[… cut here; the whole is in {_inside(path)}]"
        return text

    async def _had(self, path: str, ask: Callable[[], Awaitable[T]]) -> T | None:
        """What the broker gives; None where there is nothing, or nothing that can be read."""
        try:
            return await _patiently(ask, self._waits_s)
        except Unready:
            raise
        except NotFound:
            return None
        except (RequestError, SandboxError) as error:
            self._note(f"{path} could not be read: {error.message}")
            return None


async def _patiently(ask: Callable[[], Awaitable[T]], waits_s: Sequence[float]) -> T:
    """Ask again where the broker is away for a moment."""
    for wait in waits_s:
        try:
            return await ask()
        except Unready:
            await asyncio.sleep(wait)
    return await ask()


def _front_matter(text: str) -> tuple[dict[str, str], str]:
    """The texts of the flat mapping at a file's beginning, and what follows it.

    One that does not end is neither.

    No parser of YAML: whoever may write the file could keep one busy for long, and all that is
    wanted are `key: text` lines with YAML's ways to write a text.
    """
    block = _FRONT_MATTER.match(text)
    if block is None:
        return {}, "" if text.startswith("---") else text
    fields: dict[str, list[str]] = {}
    # Lines before the first key belong to nothing.
    lines: list[str] = []
    for line in block[1].splitlines():
        key = _KEY.match(line)
        if key is not None:
            lines = fields[key[2]] = [line[key.end() :]]
        elif not line or line[0] in " \t":
            lines.append(line)
        elif not line.startswith("#"):
            lines = []
    return {key: _scalar(lines) for key, lines in fields.items()}, text[block.end() :]


def _first_words(body: str) -> str:
    """The first line of text; where there are only headings, the first of them."""
    lines = [line.strip() for line in body.splitlines()]
    said = [line for line in lines if any(map(str.isalnum, line))]
    plain = (line for line in said if not line.startswith(("#", "```", "<!--")))
    return next(plain, said[0] if said else "").lstrip("#")


def _scalar(lines: Sequence[str]) -> str:
    """A text, which may go on in the lines below its key; empty if it is something else.

    Line ends are not folded: they are only a space in the end.
    """
    first = lines[0].strip()
    if _BLOCK.fullmatch(first):
        return "\n".join(lines[1:])
    text = "\n".join(line.strip() for line in lines).strip()
    if text.startswith('"'):
        quoted = _DOUBLE_QUOTED.fullmatch(text)
        return "" if quoted is None else _unescaped(quoted[1])
    if text.startswith("'"):
        quoted = _SINGLE_QUOTED.fullmatch(text)
        return "" if quoted is None else quoted[1].replace("''", "'")
    if text.startswith(_NO_TEXT) or (not first and _NESTED.match(text)):
        return ""
    return _COMMENT.sub("", text)


def _unescaped(text: str) -> str:
    """What a text in double quotes says."""

    def one(escape: re.Match[str]) -> str:
        *codes, other = escape.groups()
        digits = next(filter(None, codes), None)
        if digits is None:
            return {"n": "\n", "t": "\t", "r": "\r"}.get(other, other)
        return chr(min(int(digits, 16), 0x10FFFF))

    # JSON writes some characters as two, which are none on their own.
    units = _ESCAPE.sub(one, text).encode("utf-16", errors="surrogatepass")
    return units.decode("utf-16", errors="replace")


def _line(value: str, most: int) -> str:
    """Text in one line, without what a reader would not see."""
    return " ".join(_UNSEEN.sub("", value).split())[:most].strip()


def _inside(path: str) -> str:
    """A path of the environment, as the sandbox has it."""
    top, slash, rest = path.partition("/")
    return f"{tops.place(top)}{slash}{rest}"
