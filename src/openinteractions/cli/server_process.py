"""A server in a process of its own: started, killed, stopped, and nothing left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from openinteractions.db import embedded_home, embedded_server
from openinteractions.errors import SetupError

_READY_WITHIN_S: Final = 300.0
_STOPPED_WITHIN_S: Final = 60.0
_POLL_S: Final = 0.02


class ServerProcess:
    """`openinteractions serve` on a free port, over the embedded database of one data folder."""

    def __init__(
        self, home: Path, *, log: Path, config: Path | None, environment: Mapping[str, str]
    ) -> None:
        """Nothing is started yet.

        Args:
            home: The data folder.
            log: Where the server's log goes; lines are added.
            config: The server's TOML file.
            environment: Variables beside those that this process has.
        """
        self.home = home
        self.log = log
        self._config = config
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start it and wait until it is ready; its base URL.

        Raises:
            SetupError: It did not start; the message is its own.
        """
        with self.log.open("ab") as log:
            before = log.tell()
            self._process = self._spawn(log)
        deadline = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None
            lines = self._lines(before)
            url = _ready_url(lines)
            if url is not None:
                return url
            if ended:
                raise SetupError(_complaint(lines))
            time.sleep(_POLL_S)
        raise SetupError(f"the server was not ready within {_READY_WITHIN_S:.0f} s")

    def kill(self) -> None:
        """End it the hard way (`kill -9`); the embedded database goes on running."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int | None:
        """Stop it, and the database if that is left over; its exit status, None if never started.

        A server that does not end in time is killed, so that nothing runs afterwards.
        """
        status = None
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOPPED_WITHIN_S)
            if self._process.poll() is None:
                self.kill()
            status = self._process.returncode
        self._end_database()
        return status

    def tail(self, lines: int) -> list[str]:
        """The last lines of its log."""
        return self._lines(0)[-lines:]

    def _spawn(self, log: BinaryIO) -> "subprocess.Popen[bytes]":
        options = ["--host", "127.0.0.1", "--port", "0", "--data-dir", str(self.home)]
        if self._config is not None:
            options += ["--config", str(self._config.absolute())]
        parent = os.environ  # noqa: TID251 - handed on, not read
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "openinteractions.cli.tethered", "serve", *options],
            env={**parent, "OI_LOG__FORMAT": "json", "OI_LOG__LEVEL": "info", **self._environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # A Ctrl-C is for us: we stop it.
            start_new_session=True,
        )

    def _lines(self, start: int) -> list[str]:
        try:
            return self.log.read_bytes()[start:].decode(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def _end_database(self) -> None:
        """A killed server leaves its database running, for the next one to attach to."""
        if not self.home.exists():
            return
        try:
            lock = embedded_home.lock(self.home)
        except SetupError:
            # It is another server's.
            return
        data = embedded_home.where(self.home) / "data"
        self._end(data)
        os.close(lock)

    def _end(self, data: Path) -> None:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            embedded_server.end(data, number)
            deadline = time.monotonic() + _STOPPED_WITHIN_S / 3
            while time.monotonic() < deadline:
                if not embedded_server.stragglers(data):
                    return
                time.sleep(_POLL_S)


def _ready_url(lines: list[str]) -> str | None:
    for line in lines:
        if '"server.ready"' in line:
            with contextlib.suppress(orjson.JSONDecodeError):
                return orjson.loads(line)["url"]
    return None


def _complaint(lines: list[str]) -> str:
    """What the server said last that is not a log event."""
    words = [line for line in lines if line.strip() and not line.startswith("{")]
    start = next((i for i, line in enumerate(words) if line.startswith("openinteractions: ")), -3)
    text = "\n".join(words[start:]).removeprefix("openinteractions: ")
    return text or "the server ended before it was ready"
