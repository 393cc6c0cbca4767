"""Containers of a Docker engine (API 1.41 or newer; Podman's answers alike).

Plain HTTP over the engine's socket: nine calls, and one connection for each container that turns
into a byte stream. Containers get no network, no privileges, and a root that cannot be written.
"""

import asyncio
import contextlib
import errno
import itertools
import math
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from weakref import WeakSet

import aiohttp
import orjson
import structlog

from openinteractions.sandbox.port import (
    BackendDown,
    Duplex,
    Gone,
    Health,
    Json,
    Limits,
    Mount,
    Sandbox,
    SandboxError,
    SandboxSpec,
)

_log = structlog.get_logger(__name__)

DEFAULT_URL = "unix:///var/run/docker.sock"

_API = (1, 41)
_TIMEOUT = aiohttp.ClientTimeout(total=120, sock_connect=10)
_ATTACH_S = 20.0
_REMOVE_S = 30.0
_REMOVE_PAUSE_S = 0.05
_BUFFER = 256 * 1024
_MAX_STDERR = 16 * 1024
_MAX_LINE = 1000
_BAD, _NOT_FOUND, _CONFLICT, _OURS = 400, 404, 409, 500
_RETRY_S = 1.0
_STREAMING = frozenset({101, 200})
_STDERR = 2
_FRAME_HEADER = 8

# tmpfs counts as memory, so together they must stay well below it.
_TMP_SHARES = {"/tmp": 10, "/dev/shm": 2, "/run": 1, "/run/oi": 3}  # noqa: S108 - in the sandbox
_SYSCTLS = {
    # The supervisor, without any privilege, listens on 53, 80 and 443.
    "net.ipv4.ip_unprivileged_port_start": "0",
    # What would hold memory after its makers have died, until every command dies for want of it.
    "kernel.shm_rmid_forced": "1",
    "kernel.msgmni": "64",
    "kernel.sem": "250 32000 100 128",
}
_BYTES_PER_FILE, _MIN_FILES = 4096, 1024
_OPEN_FILES = 16384
_OOM_SCORE = 500
"""The kernel takes a sandbox's processes before anything else of the machine."""


class DockerBackend:
    """Sandboxes as hardened containers of one engine."""

    name = "docker"

    def __init__(self, url: str = DEFAULT_URL, *, tls: ssl.SSLContext | None = None) -> None:
        """Nothing is opened yet.

        Args:
            url: `unix:///path`, `tcp://host:port` or `http(s)://host:port`.
            tls: For an engine that is reached over TCP with certificates.

        Raises:
            BackendDown: The address is none of these.
        """
        self._url = url
        self._tls = tls
        self._engine = _Address(url, has_tls=tls is not None)
        self._session: aiohttp.ClientSession | None = None
        self._version: str | None = None
        self._streams: WeakSet[_Attached] = WeakSet()

    async def health(self) -> Health:
        """Whether the engine can be used, and what it lacks.

        Raises:
            BackendDown: It does not answer.
        """
        version: Json = await self._json("GET", "/version", is_versioned=False)
        info: Json = await self._json("GET", "/info")
        return Health(
            version=f"{version.get('Version', '?')} (API {version.get('ApiVersion', '?')})",
            runtimes=sorted(info.get("Runtimes") or {}),
            problems=_problems(version, info),
        )

    async def image_id(self, image: str) -> str | None:
        """What identifies an image's content, or None where the engine does not have it.

        Raises:
            BackendDown: The engine does not answer.
        """
        status, body = await self._call("GET", f"/images/{quote(image, safe='/:@')}/json")
        if status == _NOT_FOUND:
            return None
        return str(_checked(status, body)["Id"])

    async def create(self, spec: SandboxSpec) -> str:
        """Create and start a container; return its id.

        Raises:
            BackendDown: The engine does not answer, has trouble of its own, or has no such image or
                runtime; nothing is left of it.
            SandboxError: It would not start; nothing is left of it.
        """
        status, body = await self._call(
            "POST", "/containers/create", query={"name": spec.name}, body=_creation(spec)
        )
        _accept(status, body, spec)
        ref = str(orjson.loads(body)["Id"])
        try:
            status, body = await self._call("POST", f"/containers/{ref}/start")
            _accept(status, body, spec)
        except BaseException:
            await self.remove(ref)
            raise
        return ref

    async def attach(self, ref: str) -> Duplex:
        """The main process's standard input and output.

        Raises:
            BackendDown: The engine does not answer.
            Gone: No such container, or it has ended.
        """
        status, body = await self._call("GET", f"/containers/{ref}/json")
        if status == _NOT_FOUND or not _checked(status, body)["State"]["Running"]:
            raise Gone(f"The sandbox {ref[:12]} is not running.")
        version = await self._api()
        query = urlencode({"stream": 1, "stdin": 1, "stdout": 1, "stderr": 1})
        try:
            async with asyncio.timeout(_ATTACH_S):
                reader, writer = await self._engine.connect(self._tls)
                try:
                    await _upgrade(reader, writer, f"/v{version}/containers/{ref}/attach?{query}")
                except BaseException:
                    writer.transport.abort()
                    raise
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise BackendDown(_why(error, self._url)) from error
        stream = _Attached(reader, writer, ref)
        self._streams.add(stream)
        return stream

    async def remove(self, ref: str) -> None:
        """Close its streams, kill and remove it; nothing happens where it is gone already.

        Raises:
            BackendDown: The engine does not answer.
            SandboxError: It cannot be removed.
        """
        # The engine first delivers all output: a stream that nobody reads would hold it for ever.
        for stream in [each for each in self._streams if each.ref == ref]:
            await stream.close()
        try:
            async with asyncio.timeout(_REMOVE_S):
                # Where someone else is removing it, it is gone when the engine knows it no more.
                for pause_s in itertools.repeat(_REMOVE_PAUSE_S):
                    if not await self._is_being_removed(ref):
                        return
                    await asyncio.sleep(pause_s)
        except TimeoutError as error:
            raise SandboxError(f"The sandbox {ref[:12]} cannot be removed.") from error

    async def list(self, labels: Mapping[str, str]) -> Sequence[Sandbox]:
        """All containers with these labels, stopped ones too.

        Raises:
            BackendDown: The engine does not answer.
        """
        wanted = orjson.dumps({"label": [f"{key}={value}" for key, value in labels.items()]})
        query = {"all": "1", "filters": wanted.decode()}
        found: list[Json] = await self._json("GET", "/containers/json", query=query)
        return [
            Sandbox(
                ref=each["Id"],
                labels=each.get("Labels") or {},
                is_running=each.get("State") == "running",
            )
            for each in found
        ]

    async def close(self) -> None:
        """Let the engine's connections go; containers and open streams live on."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _is_being_removed(self, ref: str) -> bool:
        """Remove it; whether someone else is about to."""
        status, body = await self._call(
            "DELETE", f"/containers/{ref}", query={"force": "1", "v": "1"}
        )
        if status not in {_NOT_FOUND, _CONFLICT}:
            _checked(status, body)
        return status == _CONFLICT

    async def _json(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        is_versioned: bool = True,
    ) -> Any:  # noqa: ANN401 - the engine's JSON
        status, body = await self._call(method, path, query=query, is_versioned=is_versioned)
        return _checked(status, body)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        is_versioned: bool = True,
    ) -> tuple[int, bytes]:
        prefix = f"/v{await self._api()}" if is_versioned else ""
        try:
            async with self._opened().request(
                method,
                f"{self._engine.base}{prefix}{path}",
                params=query,
                data=None if body is None else orjson.dumps(body),
                headers={} if body is None else {"Content-Type": "application/json"},
                timeout=_TIMEOUT,
            ) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise BackendDown(_why(error, self._url)) from error

    async def _api(self) -> str:
        """The oldest version that we know and the engine still speaks."""
        if self._version is None:
            known: Json = await self._json("GET", "/version", is_versioned=False)
            if _numbers(known.get("ApiVersion")) < _API:
                raise BackendDown(
                    f"The container engine at {self._url} is too old: API "
                    f"{known.get('ApiVersion')}, and 1.41 (Docker 20.10) is needed."
                )
            self._version = ".".join(map(str, max(_API, _numbers(known.get("MinAPIVersion")))))
        return self._version

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=self._engine.connector(self._tls), trust_env=False
            )
        return self._session


def tls_context(folder: Path) -> ssl.SSLContext:
    """TLS with the `ca.pem`, `cert.pem` and `key.pem` of a folder, as Docker's own client has it.

    Raises:
        BackendDown: They are not there, or no certificates.
    """
    try:
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    except (OSError, ssl.SSLError) as error:
        raise BackendDown(
            f"sandbox.docker_certs: cannot use ca.pem, cert.pem and key.pem in {folder}: {error}."
        ) from error
    return context


class _Address:
    """Where an engine listens."""

    def __init__(self, url: str, *, has_tls: bool) -> None:
        parts = urlsplit(url)
        self._path = parts.path if parts.scheme == "unix" else None
        self._host = parts.hostname or ""
        is_tcp = parts.scheme in {"tcp", "http", "https"} and bool(self._host)
        if not self._path and not is_tcp:
            raise BackendDown(
                f"sandbox.docker_url: {url!r} is no address of a container engine; "
                "write unix:///var/run/docker.sock or tcp://host:2376."
            )
        self._is_tls = is_tcp and (has_tls or parts.scheme == "https")
        self._port = parts.port or (2376 if self._is_tls else 2375)
        where = "engine" if self._path else f"{self._quoted()}:{self._port}"
        self.base = f"{'https' if self._is_tls else 'http'}://{where}"

    def connector(self, tls: ssl.SSLContext | None) -> aiohttp.BaseConnector:
        if self._path:
            return aiohttp.UnixConnector(self._path)
        return aiohttp.TCPConnector(ssl=tls or True)

    async def connect(
        self, tls: ssl.SSLContext | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._path:
            return await asyncio.open_unix_connection(self._path, limit=_BUFFER)
        context = (tls or ssl.create_default_context()) if self._is_tls else None
        return await asyncio.open_connection(self._host, self._port, ssl=context, limit=_BUFFER)

    def _quoted(self) -> str:
        return f"[{self._host}]" if ":" in self._host else self._host


class _Attached:
    """A container's standard streams: raw in, and out cut into frames by the engine.

    A frame is 1 byte stream, 3 bytes nothing, 4 bytes length, and the bytes:
    <https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach>.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ref: str
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.ref = ref
        self._left = 0
        self._stream = 0
        self._logged = 0
        self._is_closed = False

    async def read(self, limit: int = 65536) -> bytes:
        """Up to `limit` bytes of standard output; `b""` at the end."""
        try:
            while True:
                while self._left == 0:
                    header = await self._reader.readexactly(_FRAME_HEADER)
                    self._stream, self._left = header[0], int.from_bytes(header[4:], "big")
                data = await self._reader.read(min(limit, self._left))
                self._left -= len(data)
                if self._stream != _STDERR or not data:
                    return data
                self._log(data)
        except (OSError, asyncio.IncompleteReadError):
            return b""

    async def write(self, data: bytes) -> None:
        """Send to standard input; waits while the process does not read.

        Raises:
            ConnectionError: The stream is closed.
        """
        if self._is_closed or self._writer.is_closing():
            raise ConnectionResetError("The stream to the sandbox is closed.")
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise ConnectionResetError("The stream to the sandbox is lost.") from error

    async def end(self) -> None:
        """Write nothing more. The engine is not told: it would end the other direction too."""
        self._is_closed = True

    async def close(self) -> None:
        """Let the stream go; the process runs on, its standard input stays open."""
        self._is_closed = True
        self._writer.transport.abort()

    def _log(self, data: bytes) -> None:
        """What the main process complains of, as far as anyone would read."""
        if self._logged < _MAX_STDERR:
            text = data[:_MAX_LINE].decode(errors="replace")
            _log.warning("sandbox.stderr", container=self.ref[:12], text=text)
        self._logged += len(data)


async def _upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
    """Turn an HTTP connection into the container's streams."""
    request = (
        f"POST {path} HTTP/1.1\r\nHost: engine\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
        "Content-Length: 0\r\n\r\n"
    )
    writer.write(request.encode())
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(maxsplit=2)[1])
    if status in {_NOT_FOUND, _CONFLICT}:
        raise Gone("The sandbox is not running.")
    if status not in _STREAMING:
        text = (await reader.read(_MAX_LINE)).decode(errors="replace").strip()
        raise SandboxError(f"The container engine gives no stream ({status}): {text}")


def _creation(spec: SandboxSpec) -> Json:
    return {
        "Image": spec.image,
        # Instead of the image's own: the main process is the first one, which no signal from inside
        # can end or stop.
        "Entrypoint": [spec.argv[0]],
        "Cmd": list(spec.argv[1:]),
        "Env": [f"{name}={value}" for name, value in spec.env.items()],
        "User": f"{spec.uid}:{spec.uid}",
        "Labels": dict(spec.labels),
        "Hostname": "sandbox",
        "OpenStdin": True,
        "StdinOnce": False,
        "AttachStdin": False,
        "Tty": False,
        "HostConfig": _host_config(spec),
    }


def _host_config(spec: SandboxSpec) -> Json:
    limits = spec.limits
    sizes = _tmp_sizes(limits)
    return {
        **({"Runtime": spec.runtime} if spec.runtime else {}),
        "NetworkMode": "none",
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "ReadonlyRootfs": True,
        "Memory": limits.memory_bytes,
        "MemorySwap": limits.memory_bytes,
        "PidsLimit": limits.pids,
        "NanoCpus": math.ceil(limits.cpus * 1e9),
        "OomScoreAdj": _OOM_SCORE,
        "Tmpfs": {
            # An empty file takes no room of the size, and half a kilobyte of memory or more.
            path: f"rw,nosuid,nodev,{_tmp_mode(path, spec.uid)},size={size},"
            f"nr_inodes={max(size // _BYTES_PER_FILE, _MIN_FILES)}"
            for path, size in sizes.items()
        },
        "Mounts": [_mount(mount) for mount in spec.mounts],
        "Ulimits": [
            {"Name": "core", "Soft": 0, "Hard": 0},
            # Counted for all sandboxes of a host together: one could take the others' share.
            {"Name": "msgqueue", "Soft": 0, "Hard": 0},
            {"Name": "nofile", "Soft": _OPEN_FILES, "Hard": _OPEN_FILES},
        ],
        "IpcMode": "private",
        "LogConfig": {"Type": "none"},
        "RestartPolicy": {"Name": "no"},
        "Dns": ["127.0.0.1"],
        "ExtraHosts": ["sandbox:127.0.0.1"],
        "Sysctls": _SYSCTLS,
    }


def _tmp_sizes(limits: Limits) -> dict[str, int]:
    whole = sum(_TMP_SHARES.values())
    return {path: limits.tmp_bytes * share // whole for path, share in _TMP_SHARES.items()}


def _tmp_mode(path: str, uid: int) -> str:
    if path == "/tmp":  # noqa: S108 - in the sandbox
        return "exec,mode=1777"
    if path == "/dev/shm":  # noqa: S108 - in the sandbox
        return "noexec,mode=1777"
    mode = "0700" if path == "/run/oi" else "0755"
    return f"noexec,mode={mode},uid={uid},gid={uid}"


def _mount(mount: Mount) -> Json:
    return {
        "Type": "bind",
        "Source": str(mount.source),
        "Target": mount.target,
        "ReadOnly": mount.is_read_only,
        "BindOptions": {"Propagation": "rslave" if mount.is_late else "rprivate"},
    }


def _problems(version: Json, info: Json) -> list[str]:
    found: list[str] = []
    if _numbers(version.get("ApiVersion")) < _API:
        found.append("The engine's API is older than 1.41: update to Docker 20.10 or newer.")
    for key, what in (
        ("MemoryLimit", "memory"),
        ("PidsLimit", "number of processes"),
        ("CpuCfsQuota", "processor time"),
    ):
        if not info.get(key, True):
            found.append(
                f"The engine cannot limit a sandbox's {what}: enable that cgroup controller."
            )
    if not info.get("SwapLimit", True):
        found.append(
            "The engine cannot limit swap: boot with swapaccount=1, or without swap on this host."
        )
    if "seccomp" not in str(info.get("SecurityOptions")):
        found.append("The engine filters no system calls: enable seccomp.")
    return found


def _accept(status: int, body: bytes, spec: SandboxSpec) -> None:
    """Say what an engine's refusal to create or start means for the operator."""
    if status < _BAD:
        return
    said = _message(body)
    low = said.lower()
    if status == _NOT_FOUND and "no such image" in low:
        raise BackendDown(f"The engine has no image '{spec.image}': run scripts/sandbox-image.")
    if spec.runtime and "runtime" in low and spec.runtime in said:
        raise BackendDown(
            f"The engine has no runtime '{spec.runtime}': install it, or change sandbox.runtime."
        )
    if status >= _OURS:
        # Such as while it starts anew: a little later it may do so.
        raise BackendDown(f"The sandbox did not start: {said}", retry_after_s=_RETRY_S)
    raise SandboxError(f"The sandbox did not start: {said}")


def _checked(status: int, body: bytes) -> Any:  # noqa: ANN401 - the engine's JSON
    if status >= _BAD:
        raise SandboxError(f"The container engine refuses ({status}): {_message(body)}")
    return orjson.loads(body) if body else None


def _message(body: bytes) -> str:
    with contextlib.suppress(orjson.JSONDecodeError, AttributeError):
        return str(orjson.loads(body).get("message", ""))[:_MAX_LINE]
    return body[:_MAX_LINE].decode(errors="replace")


def _why(error: BaseException, url: str) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
    if number in {errno.EACCES, errno.EPERM}:
        return (
            f"This user may not use the container engine at {url}: "
            "add it to the group that owns the socket (often 'docker')."
        )
    if number in {errno.ENOENT, errno.ECONNREFUSED}:
        return f"No container engine listens at {url}: start Docker, or set sandbox.docker_url."
    if isinstance(error, TimeoutError):
        return f"The container engine at {url} does not answer."
    return f"The container engine at {url} cannot be used: {type(error).__name__}: {error}."


def _numbers(version: object) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in str(version).split("."))
    except ValueError:
        return ()
