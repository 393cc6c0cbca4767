"""A server that a test may kill and start again, on the same data and at the same address."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import asyncpg

from openinteractions.db.embedded import running_url
from tests.db.postgres import scratch
from tests.e2e.server import (
    BODY_SILENCE_S,
    CONFIG,
    KEY,
    MAX_BODY,
    NO_SANDBOXES,
    SOURCES,
    UPSTREAM_KEYS,
    Fakes,
)

_START_S = 90
_COMMAND = Path(sys.executable).with_name("openinteractions")


@dataclass(eq=False)
class Own:
    """One server, running or not."""

    home: Path
    port: int
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return KEY

    def start(self, *options: str) -> None:
        """Start it and wait until it is ready."""
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [_COMMAND, "serve", "--port", str(self.port), *self._place(), *options],
                stdout=log,
                stderr=log,
                cwd=self.home,
                env=self.environment,
            )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError((self.home / "server.log").read_text()[-5000:])

    def kill(self) -> None:
        """As `kill -9`: its PostgreSQL goes on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        try:
            assert self.process.wait(timeout=40) == 0
        finally:
            self.process.kill()

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Another command beside it."""
        return subprocess.run(
            [_COMMAND, *arguments, *self._place()],
            cwd=self.home,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def _place(self) -> list[str]:
        return ["--config", str(self.home / "config.toml"), "--data-dir", str(self.home / "data")]

    def fetch(self, statement: str, *arguments: object) -> list[Any]:
        """Rows of its database, in a thread so that any test can call it."""
        found: list[Any] = []

        async def ask() -> None:
            connection = await asyncpg.connect(running_url(self.home / "data"))
            try:
                found.extend(await connection.fetch(statement, *arguments))
            finally:
                await connection.close()

        thread = threading.Thread(target=lambda: asyncio.run(ask()))
        thread.start()
        thread.join(timeout=30)
        return found


@contextmanager
def own_server(fakes: Fakes, *options: str, **variables: str) -> Generator[Own]:
    """A fresh one, started; it must stop by itself in the end."""
    with scratch() as home:
        (home / "config.toml").write_text(
            CONFIG.format(
                key=KEY,
                max_body=MAX_BODY,
                silence=BODY_SILENCE_S,
                **{name: fake.url for name, fake in fakes.all.items()},
                **{f"{name}_key": key for name, key in UPSTREAM_KEYS.items()},
            )
            + NO_SANDBOXES
        )
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        base = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": str(SOURCES)}
        server = Own(home, port, {**base, **variables})
        server.start(*options)
        try:
            yield server
        finally:
            server.stop()
        log = (home / "server.log").read_text().splitlines()
        assert [line for line in log if "crashed" in line or "Traceback" in line] == []


@dataclass(eq=False)
class Receiver:
    """Takes callbacks and remembers them; answers with these statuses first, then 200."""

    url: str = ""
    statuses: list[int] = field(default_factory=list[int])
    calls: list[tuple[dict[str, str], bytes]] = field(
        default_factory=list[tuple[dict[str, str], bytes]]
    )


@contextmanager
def receiver(*statuses: int) -> Generator[Receiver]:
    """An HTTP server for callbacks, in a thread."""
    taken = Receiver(statuses=list(statuses))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.calls.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(taken.statuses.pop(0) if taken.statuses else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        taken.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield taken
        server.shutdown()
