"""What lies in an environment at its start, from where it comes to where it goes.

`checked` refuses what can be known to be wrong before anything is made; `Sources.put` brings the
rest in. Repositories are cloned by the sandbox itself, through the egress proxy and under the
environment's own rules, so that its credentials apply.
"""

import asyncio
import base64
import binascii
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
from openinteractions.errors import Invalid, RequestError, TooLarge, Unready
from openinteractions.netguard import Fetcher, Unwelcome
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.files import paths
from openinteractions.sandbox.port import MOUNTS, Command, Exit, Output, SandboxError
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
_IN_MEMORY: Final = 4 * 2**20

_SKILL: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_ABSENT: Final = frozenset({401, 403, 404})

# `ulimit -f` counts blocks of 512 bytes (POSIX) and stops a pack that grows too large; what is
# checked out of it is measured afterwards. git removes what it made where it fails.
_CLONE: Final = f"""
ulimit -f {MAX_REPOSITORY_MB * 2048}
git clone --quiet -- "$1" "$2" || exit 1
size=$(du -sm -- "$2" | cut -f1)
[ "$size" -le {MAX_REPOSITORY_MB} ] && exit 0
find "$2" -mindepth 1 -delete
echo "it is larger than {MAX_REPOSITORY_MB} MB" >&2
exit 1
"""
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


@dataclass(frozen=True, slots=True)
class Repository:
    """A git repository."""

    target: str
    url: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bucket:
    """An object of Cloud Storage, or all whose names begin with a folder's."""

    target: str
    bucket: str
    name: str


@dataclass(frozen=True, slots=True)
class Skill:
    """A folder of the operator's."""

    target: str
    folder: Path


Source: TypeAlias = Inline | Repository | Bucket | Skill


def checked(sources: Sequence[Json], *, skills_dir: Path | None) -> list[Source]:
    """Sources that can be brought in, as far as can be told from here. Looks at the skills' folder.

    Raises:
        Invalid: One is wrong; the message names it.
    """
    if len(sources) > MAX_SOURCES:
        raise Invalid(f"Invalid value at 'sources': expected at most {MAX_SOURCES} sources.")
    found = [
        _checked(source, f"sources[{index}]", skills_dir) for index, source in enumerate(sources)
    ]
    total = sum(len(source.data) for source in found if isinstance(source, Inline))
    if total > MAX_INLINE_TOTAL_BYTES:
        raise Invalid(
            f"Invalid value at 'sources': inline contents have more than {MAX_INLINE_TOTAL_BYTES} "
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
    try:
        parts = paths.for_writing(source["target"], is_folder=kind != "inline")
    except Invalid as error:
        raise Invalid(f"Invalid value at '{where}.target': {error.message}") from None
    target = paths.shown(parts)
    match kind:
        case "inline":
            return Inline(target, _content(source, where))
        case "repository":
            return Repository(target, _git_url(source["source"], f"{where}.source"))
        case "gcs":
            return Bucket(target, *_gs_url(source["source"], f"{where}.source"))
        case _:
            return Skill(target, _skill(source["source"], f"{where}.source", skills_dir))


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

    async def put(self, address: str, env: UUID, sources: Sequence[Source]) -> None:
        """Bring them in, in their order; files that are there already are replaced.

        Raises:
            Invalid: One cannot be had, or not be put there; the message names it.
            Unready: The broker does not answer, or has no sandbox to spare.
        """
        for index, source in enumerate(sources):
            try:
                with faults_shown():
                    await self._put(address, env, source)
            except Unready:
                raise
            except RequestError as error:
                raise Invalid(f"Cannot set up 'sources[{index}]': {error.message}") from error

    async def _put(self, address: str, env: UUID, source: Source) -> None:
        match source:
            case Inline():
                await self._client.write(address, env, source.target, source.data, overwrite=True)
            case Repository():
                await self._clone(address, env, source)
            case Bucket():
                await self._download(address, env, source)
            case Skill():
                await self._copy(address, env, source)

    async def _clone(self, address: str, env: UUID, source: Repository) -> None:
        folder, _, rest = source.target.partition("/")
        place = f"{MOUNTS[folder]}/{rest}".rstrip("/")
        command = Command(
            # Of no interaction: an id of its own, in the form of theirs.
            id=f"{uuid4().hex}.0",
            epoch=1,
            argv=["sh", "-c", _CLONE, "clone", source.url, place],
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
            raise Invalid(f"git clone failed: {_last_line(said) or 'it said nothing'}.")

    async def _download(self, address: str, env: UUID, source: Bucket) -> None:
        url = f"{self._gcs_url}/storage/v1/b/{quote(source.bucket, safe='')}/o"
        if source.name and not source.name.endswith("/"):
            try:
                await self._object(address, env, f"{url}/{_object(source.name)}", source.target)
            except Unwelcome as error:
                if error.answer not in _ABSENT:
                    raise
            else:
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
            await self._object(address, env, f"{url}/{_object(name)}", target)
        if not found:
            raise Invalid(f"There is nothing at 'gs://{source.bucket}/{shown(source.name)}'.")

    async def _object(self, address: str, env: UUID, url: str, target: str) -> None:
        async with self._fetcher.stream(f"{url}?alt=media", max_bytes=MAX_BUCKET_BYTES) as stream:
            body = Pieces(stream)
            await body.sent(self._client.write(address, env, target, body, overwrite=True))

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

    async def _copy(self, address: str, env: UUID, source: Skill) -> None:
        async with _packed(source.folder) as archive:
            body = Pieces(archive)
            await body.sent(
                self._client.write(address, env, source.target, body, overwrite=True, extract=True)
            )


def _object(name: str) -> str:
    return quote(name, safe="")


def _last_line(said: bytes | bytearray) -> str:
    lines = said.decode(errors="replace").replace("\r", "\n").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    # What a caller put before the `@` of a URL stays with him.
    return shown(public_source({"source": last})["source"].rstrip("."))


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
