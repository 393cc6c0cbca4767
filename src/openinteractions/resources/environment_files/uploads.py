"""Uploads: in one request, or resumable in several.

A resumable upload has no row: its URL carries all there is to know of it, sealed, and its broker
has the bytes that came so far. So any api process takes the next piece, and whoever has the URL
may send it.
"""

import base64
import binascii
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Final
from uuid import UUID, uuid4

import orjson

from openinteractions.api.body import Pieces
from openinteractions.crypto import Sealer
from openinteractions.errors import Conflict, Invalid, NotFound, SetupError
from openinteractions.resources.environment_files.service import files
from openinteractions.resources.environments.service import Environments
from openinteractions.resources.environments.sources import faults_shown
from openinteractions.sandbox.client import BrokerClient
from openinteractions.sandbox.files import paths
from openinteractions.sandbox.port import Entry
from openinteractions.wire.environments import environment_id

MAX_BYTES: Final = 2 * 2**30
"""Of one upload."""
_VALID_S: Final = 24 * 3600
_PURPOSE: Final = "environment-upload"
_MOST_KEPT: Final = 1000
_MAX_KEPT_BYTES: Final = 16 * 2**20
"""Of all answers that are kept."""
_MAX_ANSWER_BYTES: Final = 64 * 1024
"""Of one that is kept: a longer one is that of an archive of many files."""
_MAX_TOKEN: Final = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to become of the bytes."""

    path: str
    overwrite: bool = False
    extract: bool = False
    """They are a tar archive, to be unpacked at the path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A resumable upload that has begun."""

    id: str
    project_id: str
    environment: str
    path: str
    overwrite: bool
    extract: bool
    total: int | None
    """How many bytes there will be, where the client said so."""
    ends: float
    """Unix seconds."""


class Uploads:
    """Takes bytes for the files of environments."""

    def __init__(self, environments: Environments, sealer: Sealer) -> None:
        """Nothing is opened.

        Args:
            environments: Knows where they are.
            sealer: Seals what an upload's URL carries.
        """
        self._environments = environments
        self._sealer = sealer
        self._ended: OrderedDict[str, bytes] = OrderedDict()
        """What the last uploads of this process gave, for clients that lost the answer."""
        self._ended_bytes = 0

    @property
    def _client(self) -> BrokerClient:
        return self._environments.client

    async def write(self, project_id: UUID, environment: str, wish: Wish, body: Pieces) -> bytes:
        """Take all bytes at once; what was written, as JSON.

        Raises:
            Conflict: Something is there already, and is not to be overwritten.
            Invalid: The path is not possible, or the bytes are no archive.
            NotFound: There is no such environment.
            TooLarge: They do not fit.
        """
        path = _path(wish)
        key, address = await self._environments.open(project_id, environment)
        with faults_shown():
            written = await body.sent(
                self._client.write(
                    address, key, path, body, overwrite=wish.overwrite, extract=wish.extract
                )
            )
        return self._written(key, written)

    async def start(
        self, project_id: UUID, environment: str, wish: Wish, *, total: int | None
    ) -> str:
        """Begin a resumable upload; the token for its URL.

        Raises:
            Invalid: The path is not possible, or there are too many bytes.
            NotFound: There is no such environment.
        """
        if total is not None and total > MAX_BYTES:
            raise Invalid(f"An upload may have {MAX_BYTES} bytes at most.")
        path = _path(wish)
        key, _ = await self._environments.open(project_id, environment)
        upload = Upload(
            id=uuid4().hex,
            project_id=project_id.hex,
            environment=environment_id(key),
            path=path,
            overwrite=wish.overwrite,
            extract=wish.extract,
            total=total,
            ends=time.time() + _VALID_S,
        )
        sealed = self._sealer.seal(orjson.dumps(asdict(upload)), purpose=_PURPOSE)
        return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()

    def find(self, token: str) -> Upload:
        """The upload of a token.

        Raises:
            NotFound: It is none of ours, or too old.
        """
        try:
            raw = token[:_MAX_TOKEN].encode()
            sealed = base64.b64decode(raw + b"=" * (-len(raw) % 4), b"-_", validate=True)
            upload = Upload(**orjson.loads(self._sealer.open(sealed, purpose=_PURPOSE)))
        except (binascii.Error, ValueError, SetupError):
            raise NotFound("The upload is unknown: its URL is not one of this server's.") from None
        if upload.ends < time.time():
            raise NotFound("The upload has expired: begin it again.")
        return upload

    def ended(self, upload: Upload) -> bytes | None:
        """What it gave when it ended, if that was lately, here, and not too long to be kept."""
        return self._ended.get(upload.id)

    async def append(self, upload: Upload, offset: int, body: Pieces) -> int:
        """Take the bytes from an offset on; how many there are then.

        Raises:
            Invalid: The bytes before them are missing.
            NotFound: The environment is gone.
            TooLarge: They do not fit.
        """
        key, address = await self._open(upload)
        with faults_shown():
            try:
                return await body.sent(
                    self._client.append_upload(address, key, upload.id, offset, body)
                )
            except NotFound as error:
                # It has not begun yet, or has ended: the bytes before these are not there.
                raise Invalid(error.message) from error

    async def size(self, upload: Upload) -> int:
        """How many bytes have come so far."""
        key, address = await self._open(upload)
        with faults_shown():
            try:
                return await self._client.upload_size(address, key, upload.id)
            except NotFound:
                return 0

    async def check_free(self, upload: Upload) -> None:
        """Refuse early what would be refused after all bytes have come.

        Raises:
            Conflict: Something is there already, and is not to be overwritten.
        """
        if upload.overwrite or upload.extract:
            return
        key, address = await self._open(upload)
        with faults_shown():
            try:
                await self._client.stat(address, key, upload.path)
            except NotFound:
                return
        raise Conflict(
            f"Path '{upload.path}' already exists in environment '{upload.environment}'. "
            "Set overwrite=true to replace it."
        )

    async def finish(self, upload: Upload, size: int) -> bytes:
        """Make the bytes a file, or unpack them; what was written, as JSON.

        Raises:
            Conflict: Something is there already, and is not to be overwritten.
            Invalid: Bytes are missing, or they are no archive.
        """
        if upload.total is not None and size != upload.total:
            raise Invalid(
                f"The upload has {size} bytes, and {upload.total} were announced: it is not whole."
            )
        key, address = await self._open(upload)
        with faults_shown():
            written = await self._client.commit_upload(
                address,
                key,
                upload.id,
                upload.path,
                overwrite=upload.overwrite,
                extract=upload.extract,
            )
        answer = self._written(key, written)
        self._keep(upload, answer)
        return answer

    def _keep(self, upload: Upload, answer: bytes) -> None:
        """Remember an answer, and forget the oldest ones."""
        if len(answer) > _MAX_ANSWER_BYTES:
            return
        self._ended_bytes += len(answer) - len(self._ended.get(upload.id, b""))
        self._ended[upload.id] = answer
        while len(self._ended) > _MOST_KEPT or self._ended_bytes > _MAX_KEPT_BYTES:
            _, oldest = self._ended.popitem(last=False)
            self._ended_bytes -= len(oldest)

    async def drop(self, upload: Upload) -> None:
        """Forget an upload."""
        key, address = await self._open(upload)
        with faults_shown():
            await self._client.drop_upload(address, key, upload.id)

    async def _open(self, upload: Upload) -> tuple[UUID, str]:
        return await self._environments.open(UUID(upload.project_id), upload.environment)

    def _written(self, key: UUID, entries: list[Entry]) -> bytes:
        self._environments.files_changed(key)
        return files(entries)


def _path(wish: Wish) -> str:
    return paths.shown(paths.for_writing(wish.path, is_folder=wish.extract))
