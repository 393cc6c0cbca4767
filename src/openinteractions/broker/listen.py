"""Where the broker listens: a private unix socket, or https."""

import contextlib
import hashlib
import os
import socket
import ssl
import stat
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from openinteractions.errors import SetupError
from openinteractions.settings import SandboxSettings

_UNIX: Final = "unix"
_MAX_SOCKET_PATH: Final = 103
"""Bytes in a socket's path that every system takes (Linux 107, macOS 103)."""
_BACKLOG: Final = 512
_FILE: Final = "broker.sock"
_ANY: Final = {"", "0.0.0.0", "::"}  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that listens."""

    socket: socket.socket
    address: str
    """How clients reach it."""
    tls: ssl.SSLContext | None
    path: Path | None = None
    """Of a unix socket."""

    def close(self) -> None:
        """Stop listening; a unix socket's file goes too."""
        self.socket.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def listen(settings: SandboxSettings, home: Path) -> Listener:
    """Listen where the settings say.

    Args:
        settings: The broker's.
        home: Its data folder; the socket is there if the settings say nothing.

    Raises:
        SetupError: It cannot listen there; the message names the setting.
    """
    if settings.listen is None:
        path = _default(home)
        # Anyone could have made a folder whose name can be guessed.
        return _unix(path, settings, is_guessable=path.parent != home)
    parts = urlsplit(settings.listen)
    if parts.scheme == _UNIX and parts.path:
        return _unix(Path(parts.path), settings)
    if parts.scheme == "https" and parts.hostname is not None:
        return _https(parts.hostname, parts.port or 443, settings)
    raise SetupError(
        f"sandbox.listen = {settings.listen!r}: write unix:///path or https://address:port"
    )


def _default(home: Path) -> Path:
    """In the data folder, unless its path is too long for a socket's address."""
    path = home / _FILE
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        return path
    name = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16]
    return Path(f"/tmp/oi-broker-{os.geteuid()}-{name}") / _FILE  # noqa: S108 - owner is checked


def _unix(path: Path, settings: SandboxSettings, *, is_guessable: bool = False) -> Listener:
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise SetupError(f"sandbox.listen: the path {path} is too long for a socket")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(path.parent)
        if is_guessable:
            _check_private(path.parent)
        # Who holds the data folder's lock is the only one: a socket that is there is a dead one's.
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        # Where it was asked for, its group too: an api or a worker may run as another user. The
        # token is asked for anyway.
        path.chmod(0o600 if settings.listen is None else 0o660)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise SetupError(f"the broker cannot listen at {path}: {error.strerror}") from error
    except SetupError:
        listener.close()
        raise
    listener.setblocking(False)
    return Listener(listener, settings.address or f"unix://{path}", None, path)


def _https(host: str, port: int, settings: SandboxSettings) -> Listener:
    if settings.tls_cert is None or settings.tls_key is None:
        raise SetupError("a broker on https needs sandbox.tls_cert and sandbox.tls_key")
    if settings.address is None and host in _ANY:
        raise SetupError(
            "sandbox.address must say how other machines reach this broker, such as "
            "https://sandboxes-1.example.com:8090"
        )
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        tls.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise SetupError(f"cannot use sandbox.tls_cert and sandbox.tls_key: {error}") from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise SetupError(f"the broker cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    shown = f"[{host}]" if ":" in host else host
    bound: int = listener.getsockname()[1]
    return Listener(listener, settings.address or f"https://{shown}:{bound}", tls)


def _check_owner(folder: Path) -> None:
    if folder.stat().st_uid != os.geteuid():
        raise SetupError(f"the folder {folder} of the broker's socket is another user's")


def _check_private(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise SetupError(
            f"{folder}, where the broker's socket would be, is a link or open to other users: "
            "remove it, or set sandbox.listen"
        )


@contextlib.contextmanager
def listening(settings: SandboxSettings, home: Path) -> Generator[Listener]:
    """As `listen`, until the context ends."""
    listener = listen(settings, home)
    try:
        yield listener
    finally:
        listener.close()
