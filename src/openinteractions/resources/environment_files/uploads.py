"""Uploads: in one request, or resumable in several.

A resumable upload has no row: its URL carries all there is to know of it, sealed, and its broker
has the bytes that came so far, and in the end what became of them. So any api process takes the
next piece, or the last one again, and whoever has the URL may send it.
"""

import base64
import binascii
import time
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
from openinteractions.wire.environments import environment_id

MAX_BYTES: Final = 2 * 2**30
"""Of one upload."""
_VALID_S: Final = 24 * 3600
_PURPOSE: Final = "environment-upload"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a resumable upload has come."""

    size: int = 0
    """How many bytes have come so far."""
    answer: bytes | None = None
    """What it gave when it ended."""
    is_cancelled: bool = False


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
        return files(written)

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

    async def progress(self, upload: Upload) -> Progress:
        """How far it has come; over, it says the same again to a client that lost the answer.

        Raises:
            NotFound: The environment is gone.
        """
        key, address = await self._open(upload)
        with faults_shown():
            try:
                state = await self._client.upload_state(address, key, upload.id)
            except NotFound:
                return Progress()
        answer = None if state.written is None else files(list(state.written))
        return Progress(
            size=state.size_bytes, answer=answer, is_cancelled=state.is_over and answer is None
        )

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
            if size == 0:
                # What has no bytes has no piece with which it would have begun.
                await self._client.append_upload(address, key, upload.id, 0, b"")
            written = await self._client.commit_upload(
                address,
                key,
                upload.id,
                upload.path,
                overwrite=upload.overwrite,
                extract=upload.extract,
            )
        return files(written)

    async def drop(self, upload: Upload) -> None:
        """Throw an upload away, for good."""
        key, address = await self._open(upload)
        with faults_shown():
            await self._client.drop_upload(address, key, upload.id)

    async def _open(self, upload: Upload) -> tuple[UUID, str]:
        return await self._environments.open(UUID(upload.project_id), upload.environment)


def _path(wish: Wish) -> str:
    return paths.shown(paths.for_writing(wish.path, is_folder=wish.extract))
