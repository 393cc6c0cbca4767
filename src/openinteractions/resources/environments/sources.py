"""What lies in an environment at its start, from where it comes to where it goes.

`checked` refuses what can be known to be wrong before anything is made; `Sources.put` brings the
rest in: all is fetched, next to the environment's files, before the first is laid. Repositories are
cloned by the sandbox itself, through the egress proxy and under the environment's own rules, so
that its credentials apply. A target beside the three folders gets a folder of its own at the top
(`sandbox.tops`).
"""

import asyncio
import base64
import binascii
import contextlib
import re
import tarfile
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, TypeAlias
from urllib.parse import quote, urlencode, urlsplit
from uuid import UUID, uuid4

import orjson

from openinteractions.api.body import Pieces
from openinteractions.errors import Invalid, NotFound, RequestError, TooLarge, Unready
from openinteractions.netguard import Fetcher, Unwelcome
from openinteractions.sandbox import tops
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.files import paths
from openinteractions.sandbox.port import Command, Exit, Output, SandboxError
from openinteractions.wire.environment import public_source
from openinteractions.wire.explain import shown
from openinteractions.wire.fields import Json

MAX_SOURCES: Final = 500
MAX_INLINE_BYTES: Final = 10**6
MAX_INLINE_TOTAL_BYTES: Final = 2 * 10**6
MAX_REPOSITORY_MB: Final = 500
MAX_BUCKET_BYTES: Final = 2 * 10**9
MAX_BUCKET_OBJECTS: Final = 10_000
MAX_SKILL_BYTES: Final = 100 * 10**6
_CLONE_S: Final = 300.0
_CHUNK: Final = 256 * 1024
_MAX_SAID: Final = 64 * 1024
_SAID_CHARS: Final = 300
_IN_MEMORY: Final = 4 * 2**20

_SKILL: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_ABSENT: Final = frozenset({401, 403, 404})
_INSTRUCTIONS: Final = "AGENTS.md"
_AGENTS_INSTRUCTIONS: Final = f".agents/{_INSTRUCTIONS}"

_STAGED: Final = ".oi-clone-"
# As git does it: into a folder that is empty, or not there.
_FREE: Final = f"""
if [ -e "$1" ] && {{ [ ! -d "$1" ] ||
    [ -n "$(find "$1/" -mindepth 1 -maxdepth 1 ! -name '{_STAGED}*' -print -quit)" ]; }}; then
  echo "destination path '$1' already exists and is not an empty directory" >&2
  exit 1
fi
"""
# `ulimit -f` counts blocks of 512 bytes (POSIX) and stops a pack that grows too large; what is
# checked out of it is measured afterwards.
_CLONE: Final = f"""{_FREE}
ulimit -f {MAX_REPOSITORY_MB * 2048}
git clone --quiet -- "$3" "$2" || exit 1
size=$(du -sm -- "$2" | cut -f1)
[ "$size" -le {MAX_REPOSITORY_MB} ] && exit 0
echo "it is larger than {MAX_REPOSITORY_MB} MB" >&2
exit 1
"""
# Its contents, since the top of a mount cannot be replaced.
_MOVE: Final = f"""{_FREE}
mkdir -p -- "$1" || exit 1
find "$2" -mindepth 1 -maxdepth 1 -exec mv -t "$1" -- {{}} + && rmdir -- "$2"
"""
_MOST_NAMED: Final = 10
_TIDY_S: Final = 10.0
_CLONE_ENV: Final = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "true",
    "GIT_ALLOW_PROTOCOL": "https",
    "LC_ALL": "C.UTF-8",
}


@dataclass(frozen=True, slots=True)
class Inline:
    """A file whose content came with the request."""

    target: str
    data: bytes = field(repr=False)
    where: str = field(default="", compare=False)
    """Its place in the request, for messages."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A git repository."""

    target: str
    url: str = field(repr=False)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Bucket:
    """An object of Cloud Storage, or all whose names begin with a folder's."""

    target: str
    bucket: str
    name: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Skill:
    """A folder of the operator's."""

    target: str
    folder: Path
    where: str = field(default="", compare=False)


Source: TypeAlias = Inline | Repository | Bucket | Skill


@dataclass(frozen=True, slots=True)
class _Upload:
    """Bytes beside the environment's files."""

    id: str
    target: str
    is_archive: bool = False


@dataclass(frozen=True, slots=True)
class _Clone:
    """A repository in a folder of its own, at the top of the one that it is to go into."""

    target: str
    folder: str


_Fetched: TypeAlias = Inline | _Upload | _Clone


def checked(
    sources: Sequence[Json], *, skills_dir: Path | None, where: str = "sources"
) -> list[Source]:
    """Sources that can be brought in, as far as can be told from here. Looks at the skills' folder.

    Args:
        sources: As the request has them.
        skills_dir: The operator's skills.
        where: Their place in the request, for messages.

    Raises:
        Invalid: One is wrong; the message names it.
    """
    if len(sources) > MAX_SOURCES:
        raise Invalid(f"Invalid value at '{where}': expected at most {MAX_SOURCES} sources.")
    found = [
        _checked(source, f"{where}[{index}]", skills_dir) for index, source in enumerate(sources)
    ]
    _check_tops(found, where)
    _check_instructions(sources, found, where)
    total = sum(len(source.data) for source in found if isinstance(source, Inline))
    if total > MAX_INLINE_TOTAL_BYTES:
        raise Invalid(
            f"Invalid value at '{where}': inline contents have more than {MAX_INLINE_TOTAL_BYTES} "
            "bytes in all; upload larger files after the environment was made."
        )
    return found


def _checked(source: Json, where: str, skills_dir: Path | None) -> Source:
    kind: str = source["type"]
    needed, useless = ("content", "source") if kind == "inline" else ("source", "content")
    if needed not in source:
        raise Invalid(f"Missing required parameter '{needed}' at '{where}'.")
    for name in (useless, "encoding"):
        if name in source and not (kind == "inline" and name == "encoding"):
            raise Invalid(f"'{name}' does not go with the type '{kind}' at '{where}'.")
    target = _target(source, where)
    match kind:
        case "inline":
            return Inline(target, _content(source, where), where)
        case "repository":
            return Repository(target, _git_url(source["source"], f"{where}.source"), where)
        case "gcs":
            return Bucket(target, *_gs_url(source["source"], f"{where}.source"), where)
        case _:
            return Skill(target, _skill(source["source"], f"{where}.source", skills_dir), where)


def _target(source: Json, where: str) -> str:
    """Where it goes, from the environment's root."""
    is_file = source["type"] == "inline"
    given: str = source["target"]
    try:
        parts = paths.parse(given)
        if paths.shown(parts) == _INSTRUCTIONS and source["type"] in {"inline", "gcs"}:
            # Google's runtime looks for it at the root too; ours has no files there.
            return _AGENTS_INSTRUCTIONS
        return paths.shown(paths.for_writing(given, is_folder=not is_file))
    except Invalid as error:
        raise Invalid(f"Invalid value at '{where}.target': {error.message}") from None


def _tops(sources: Sequence[Source]) -> list[str]:
    """The folders at the top that they need beside the three."""
    names = (source.target.partition("/")[0] for source in sources)
    return [name for name in dict.fromkeys(names) if tops.is_further(name)]


def _check_tops(sources: Sequence[Source], where: str) -> None:
    if len(_tops(sources)) > tops.MAX_FURTHER:
        raise Invalid(
            f"Invalid value at '{where}': expected at most {tops.MAX_FURTHER} folders beside "
            "'workspace', '.agents' and 'home'; put some of them into 'workspace'."
        )


def _check_instructions(sources: Sequence[Json], found: Sequence[Source], where: str) -> None:
    """None of two is lost because both go to one place."""
    given = {
        paths.parse(source["target"])
        for source, kept in zip(sources, found, strict=True)
        if kept.target == _AGENTS_INSTRUCTIONS
    }
    if len(given) > 1:
        raise Invalid(
            f"Invalid value at '{where}': '{_INSTRUCTIONS}' at the root is kept as "
            f"'{_AGENTS_INSTRUCTIONS}', which another source brings as well: give one of the two."
        )


def _content(source: Json, where: str) -> bytes:
    text: str = source["content"]
    encoding: str = source.get("encoding") or "utf-8"
    match encoding.lower():
        case "base64":
            try:
                data = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise Invalid(f"Invalid value at '{where}.content': it is not base64.") from None
        case "utf-8" | "utf8" | "text" | "plain":
            data = text.encode("utf-8", "replace")
        case _:
            raise Invalid(
                f"Invalid enum value '{shown(encoding)}' at '{where}.encoding'. "
                "Expected one of: base64, utf-8."
            )
    if len(data) > MAX_INLINE_BYTES:
        raise Invalid(
            f"Invalid value at '{where}.content': expected at most {MAX_INLINE_BYTES} bytes; "
            "upload larger files after the environment was made."
        )
    return data


def _git_url(text: str, where: str) -> str:
    parts = urlsplit("")
    try:
        parts = urlsplit(text)
        is_good = parts.scheme == "https" and bool(parts.hostname) and parts.path.strip("/") != ""
    except ValueError:
        is_good = False
    if not is_good or not text.isprintable() or " " in text:
        raise Invalid(
            f"Invalid value at '{where}': expected the https URL of a git repository, "
            "such as 'https://github.com/owner/name'."
        )
    if "@" in parts.netloc:
        raise Invalid(
            f"Invalid value at '{where}': a user or token in the URL would end up in the sandbox. "
            "Store it as a credential, and name that in the network's allowlist."
        )
    return text


def _gs_url(text: str, where: str) -> tuple[str, str]:
    bucket, _, name = text.removeprefix("gs://").partition("/")
    if not text.startswith("gs://") or not _BUCKET.fullmatch(bucket) or not text.isprintable():
        raise Invalid(f"Invalid value at '{where}': expected 'gs://bucket/object'.")
    return bucket, name


def _skill(name: str, where: str, skills_dir: Path | None) -> Path:
    if not _SKILL.fullmatch(name):
        raise Invalid(f"Invalid value at '{where}': '{shown(name)}' is not the name of a skill.")
    if skills_dir is None:
        raise Invalid(
            f"Invalid value at '{where}': this server has no skills; its operator can give it a "
            "folder of them (setting sandbox.skills_dir)."
        )
    folder = skills_dir / name
    if folder.is_symlink() or not folder.is_dir():
        raise Invalid(f"Invalid value at '{where}': there is no skill '{name}'.")
    return folder


def public(sources: Sequence[Json]) -> list[Json]:
    """Sources as their caller may see them again."""
    return [public_source(source) for source in sources]


@contextmanager
def faults_shown() -> Generator[None]:
    """What a broker could not do is told to the caller, who may try again."""
    try:
        yield
    except SandboxError as error:
        raise Unready(error.message, retry_after_s=1) from error


class Sources:
    """Brings sources into environments."""

    def __init__(self, client: BrokerClient, fetcher: Fetcher, *, gcs_url: str) -> None:
        """Nothing is connected yet.

        Args:
            client: Reaches the brokers.
            fetcher: Reaches Cloud Storage.
            gcs_url: Where Cloud Storage is.
        """
        self._client = client
        self._fetcher = fetcher
        self._gcs_url = gcs_url.rstrip("/")

    async def put(
        self, address: str, env: UUID, sources: Sequence[Source], *, is_new: bool = True
    ) -> None:
        """Bring them in, in their order; files that are there already are replaced.

        Nothing is replaced before all of them were fetched.

        Args:
            address: The broker's.
            env: Whose files.
            sources: What to bring.
            is_new: The environment goes if this fails; else the message says what was laid, and
                what was only fetched is taken away.

        Raises:
            Invalid: One cannot be had, or not be put there; the message names it.
            Unready: The broker does not answer, has no sandbox to spare, or one that is in use and
                would have to be stopped for a folder beside the three.
        """
        # Before any is cloned: the sandbox that does it has them then.
        if further := _tops(sources):
            with faults_shown():
                await self._client.add_folders(address, env, further)
        fetched: list[list[_Fetched]] = [[] for _ in sources]
        laid: list[str] = []
        try:
            for index, source in enumerate(sources):
                with _named(source, index):
                    await self._fetch(address, env, source, fetched[index])
            for index, source in enumerate(sources):
                with _named(source, index, () if is_new else laid):
                    for each in fetched[index]:
                        await self._lay(address, env, each)
                        laid.append(each.target)
        except BaseException:
            if not is_new:
                await asyncio.shield(
                    self._drop(address, env, [e for some in fetched for e in some])
                )
            raise

    async def _fetch(
        self, address: str, env: UUID, source: Source, fetched: list[_Fetched]
    ) -> None:
        """Bring a source next to the environment's files; what was begun of it is in `fetched`."""
        match source:
            case Inline():
                fetched.append(source)
            case Repository():
                top = source.target.partition("/")[0]
                clone = _Clone(source.target, f"{top}/{_STAGED}{uuid4().hex}")
                fetched.append(clone)
                await self._clone(address, env, clone, source.url)
            case Bucket():
                await self._download(address, env, source, fetched)
            case Skill():
                async with _packed(source.folder) as archive:
                    upload = _Upload(uuid4().hex, source.target, is_archive=True)
                    fetched.append(upload)
                    await self._take(address, env, upload, archive)

    async def _lay(self, address: str, env: UUID, fetched: _Fetched) -> None:
        match fetched:
            case Inline(target, data):
                await self._client.write(address, env, target, data, overwrite=True)
            case _Upload(key, target, is_archive):
                await self._client.commit_upload(
                    address, env, key, target, overwrite=True, extract=is_archive
                )
            case _Clone(target, folder):
                argv = ["sh", "-c", _MOVE, "move", _inside(target), _inside(folder)]
                await self._run(address, env, argv, "The clone cannot be put there")

    async def _drop(self, address: str, env: UUID, fetched: Sequence[_Fetched]) -> None:
        """Take away what was fetched and not laid; what the broker cannot now, it does later."""
        with contextlib.suppress(RequestError, SandboxError, TimeoutError):
            async with asyncio.timeout(_TIDY_S):
                for each in fetched:
                    if isinstance(each, _Upload):
                        await self._client.drop_upload(address, env, each.id)
                    elif isinstance(each, _Clone):
                        with contextlib.suppress(NotFound):
                            await self._client.remove(address, env, each.folder, recursive=True)

    async def _clone(self, address: str, env: UUID, clone: _Clone, url: str) -> None:
        argv = ["sh", "-c", _CLONE, "clone", _inside(clone.target), _inside(clone.folder), url]
        await self._run(address, env, argv, "git clone failed")

    async def _run(self, address: str, env: UUID, argv: Sequence[str], failed: str) -> None:
        """Run a command of a clone in the sandbox; `failed` is what a bad end means."""
        command = Command(
            # Of no interaction: an id of its own, in the form of theirs.
            id=f"{uuid4().hex}.0",
            epoch=1,
            argv=argv,
            cwd="/",
            env=_CLONE_ENV,
            timeout_s=_CLONE_S,
            max_output_bytes=_CHUNK,
        )
        said = bytearray()
        ended = Exit(outcome="unknown")
        async with self._client.execute(address, env, command) as pieces:
            async for piece in pieces:
                if isinstance(piece, Output):
                    said += piece.data
                    # Its last line is wanted, and a sandbox may say as much as it likes.
                    del said[:-_MAX_SAID]
                else:
                    ended = piece
        if ended.timed_out:
            raise Invalid(f"The clone took longer than {_CLONE_S:g} s.")
        if ended.outcome == "unknown":
            raise Unready("The sandbox was lost while it cloned a repository.", retry_after_s=1)
        if ended.code != 0:
            raise Invalid(f"{failed}: {_last_line(said) or 'it said nothing'}.")

    async def _download(
        self, address: str, env: UUID, source: Bucket, fetched: list[_Fetched]
    ) -> None:
        url = f"{self._gcs_url}/storage/v1/b/{quote(source.bucket, safe='')}/o"
        may_be_object = bool(source.name) and not source.name.endswith("/")
        # A target at the top is a folder, so what goes there is what lies below the name.
        if may_be_object and "/" in source.target:
            try:
                upload = _Upload(uuid4().hex, source.target)
                fetched.append(upload)
                await self._object(address, env, f"{url}/{_object(source.name)}", upload)
            except Unwelcome as error:
                if error.answer not in _ABSENT:
                    raise
                fetched.clear()
            else:
                paths.for_writing(source.target)
                return
        folder = f"{source.name.rstrip('/')}/" if source.name else ""
        left = MAX_BUCKET_BYTES
        found = False
        for name, size in await self._listing(url, folder):
            found = True
            left -= size
            if left < 0:
                raise TooLarge(f"There are more than {MAX_BUCKET_BYTES} bytes.")
            target = f"{source.target}/{name.removeprefix(folder)}"
            paths.for_writing(target)
            upload = _Upload(uuid4().hex, target)
            fetched.append(upload)
            await self._object(address, env, f"{url}/{_object(name)}", upload)
        if not found:
            if may_be_object:
                paths.for_writing(source.target)
            place = f"gs://{source.bucket}/{shown(source.name)}"
            raise Invalid(f"There is nothing at '{place}', or it is not public.")

    async def _object(self, address: str, env: UUID, url: str, upload: _Upload) -> None:
        async with self._fetcher.stream(f"{url}?alt=media", max_bytes=MAX_BUCKET_BYTES) as stream:
            await self._take(address, env, upload, stream)

    async def _take(
        self, address: str, env: UUID, upload: _Upload, pieces: AsyncIterator[bytes]
    ) -> None:
        body = Pieces(pieces)
        await body.sent(self._client.append_upload(address, env, upload.id, 0, body))

    async def _listing(self, url: str, folder: str) -> list[tuple[str, int]]:
        """Names and sizes of the objects below a folder."""
        found: list[tuple[str, int]] = []
        token = ""
        while True:
            query = urlencode(
                {"prefix": folder, "fields": "items(name,size),nextPageToken", "pageToken": token}
            )
            try:
                page: Any = orjson.loads((await self._fetcher.fetch(f"{url}?{query}")).data)
                items = [(str(item["name"]), int(item["size"])) for item in page.get("items", ())]
            except Unwelcome as error:
                if error.answer not in _ABSENT:
                    raise
                return found
            except (ValueError, KeyError, TypeError, AttributeError):
                raise Invalid("Cloud Storage did not answer with a list of objects.") from None
            # Folders are shown as empty objects of their name.
            found += [item for item in items if not item[0].endswith("/")]
            token = str(page.get("nextPageToken") or "")
            if len(found) > MAX_BUCKET_OBJECTS:
                raise Invalid(f"There are more than {MAX_BUCKET_OBJECTS} objects.")
            if not token:
                return found


@contextmanager
def _named(source: Source, index: int, laid: Sequence[str] = ()) -> Generator[None]:
    """An error within says which source it was, and which files lie there all the same."""
    try:
        with faults_shown():
            yield
    except Unready as error:
        raise Unready(error.message + _laid(laid), retry_after_s=error.retry_after_s) from error
    except RequestError as error:
        where = source.where or f"sources[{index}]"
        raise Invalid(f"Cannot set up '{where}': {error.message}{_laid(laid)}") from error


def _laid(targets: Sequence[str]) -> str:
    if not targets:
        return ""
    names = ", ".join(f"'{shown(target)}'" for target in targets[:_MOST_NAMED])
    more = len(targets) - _MOST_NAMED
    return f" Already laid, and left: {names}" + (f" and {more} more." if more > 0 else ".")


def _inside(path: str) -> str:
    """Where a path of the environment is in the sandbox."""
    top, _, rest = path.partition("/")
    return f"{tops.place(top)}/{rest}".rstrip("/")


def _object(name: str) -> str:
    return quote(name, safe="")


def _last_line(said: bytes | bytearray) -> str:
    lines = said.decode(errors="replace").replace("\r", "\n").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    # git shows so what the egress proxy says; its own last line has the status alone.
    told = (line.strip().removeprefix("remote: ") for line in lines)
    last = next((line for line in told if line.startswith("egress ")), last)
    # What a caller put before the `@` of a URL stays with him.
    text: str = public_source({"source": last})["source"].rstrip(".")
    # The reason stands at its end, behind the URL.
    text = text if len(text) <= _SAID_CHARS else f"…{text[-_SAID_CHARS:]}"
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


@asynccontextmanager
async def _packed(folder: Path) -> AsyncGenerator[AsyncIterator[bytes]]:
    """A folder's files as a tar archive; links and special files are left out."""
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as file:
        await asyncio.to_thread(_pack, folder, file)
        yield _pieces(file)


async def _pieces(file: IO[bytes]) -> AsyncGenerator[bytes]:
    while piece := await asyncio.to_thread(file.read, _CHUNK):
        yield piece


def _pack(folder: Path, file: IO[bytes]) -> None:
    left = MAX_SKILL_BYTES

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        nonlocal left
        left -= member.size
        if left < 0:
            raise TooLarge(f"The skill has more than {MAX_SKILL_BYTES} bytes.")
        return member if member.isfile() or member.isdir() else None

    with tarfile.open(fileobj=file, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, arcname=path.name, filter=kept)
    file.seek(0)
