"""A real server for end-to-end tests: the command line in a process, on an embedded database.

The upstreams are the fakes of `tests/fakes`, served from a thread of the test process, so that a
test may block on a synchronous client.
"""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
from google.genai import Client
from google.genai.types import HttpOptions, HttpRetryOptions

from openinteractions.db.embedded import running_url
from openinteractions.models.port import Finished, ModelEvent, TextDelta
from tests.db.postgres import scratch
from tests.fakes.anthropic import FakeAnthropic
from tests.fakes.gemini import FakeGemini
from tests.fakes.openai import FakeOpenAI
from tests.fakes.upstream import FakeUpstream, Reply

KEY = "oi_end-to-end-key-0123456789-abcdefghijklmnop"
UPSTREAM_KEYS = {"acme": "sk-acme-upstream-secret", "goog": "goog-secret", "anth": "anth-secret"}
USAGE = {"total_input_tokens": 7, "total_output_tokens": 5, "total_tokens": 12}
MAX_BODY = 2 * 2**20
BODY_SILENCE_S = 1.0
START_S = 90
SOURCES = Path(__file__).parents[2] / "src"
"""Of the tree that the tests stand in."""

CONFIG = """
bootstrap_api_key = "{key}"

[providers.acme]
kind = "openai"
base_url = "{acme}"
api_key = "{acme_key}"
idle_timeout = "3s"
connect_timeout = "5s"

[providers.goog]
kind = "gemini"
base_url = "{goog}"
api_key = "{goog_key}"
idle_timeout = "3s"

[providers.anth]
kind = "anthropic"
base_url = "{anth}"
api_key = "{anth_key}"
idle_timeout = "3s"

[models]
attempts = 2
max_retry_wait = "50ms"

[models.aliases]
"gemini-3.5-flash" = "acme/fast"
"with-fallback" = "acme/primary"

[models.fallbacks]
"acme/primary" = ["anth/second"]

[models.prices."acme/priced"]
input = 1000000
output = 1000000

[limits]
max_body_bytes = {max_body}
body_timeout = "{silence}s"

[log]
format = "json"
"""

NO_SANDBOXES = """
[sandbox]
enabled = "off"
"""


class Fakes:
    """The three upstreams, each with its script. Cleared before every test."""

    def __init__(self) -> None:
        self.acme = FakeOpenAI()
        self.goog = FakeGemini()
        self.anth = FakeAnthropic()

    @property
    def all(self) -> dict[str, FakeUpstream]:
        return {"acme": self.acme, "goog": self.goog, "anth": self.anth}

    def clear(self) -> None:
        """Forget scripts and requests; without a script every answer is `ok`."""
        for fake in self.all.values():
            fake.replies.clear()
            fake.requests.clear()
            fake.default = answer("ok")


def answer(*pieces: str, usage: dict[str, Any] | None = None, **reply: Any) -> Reply:
    """A whole turn of text."""
    texts = tuple(TextDelta(piece) for piece in pieces)
    return Reply(events=(*texts, Finished("stop", usage or USAGE)), **reply)


def turn(*events: ModelEvent, **reply: Any) -> Reply:
    """A turn of these events."""
    return Reply(events=events, **reply)


@contextmanager
def serving_fakes() -> Generator[Fakes]:
    """Serve the fakes from a thread with an event loop of its own."""
    fakes = Fakes()
    fakes.clear()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fakes", daemon=True)
    thread.start()
    stack = AsyncExitStack()

    async def up() -> None:
        for fake in fakes.all.values():
            await stack.enter_async_context(fake.serve())

    async def down() -> None:
        await stack.aclose()
        # A fake that stalls is still asleep.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(timeout=30)

    run(up())
    try:
        yield fakes
    finally:
        run(down())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    url: str
    home: Path
    log: Path
    pid: int

    @property
    def key(self) -> str:
        return KEY

    def fetch(self, statement: str, *arguments: object) -> list[Any]:
        """Rows of the server's own database, in a thread so that any test can call it."""
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
def serving(fakes: Fakes, more: str = NO_SANDBOXES) -> Generator[Server]:
    """Run `openinteractions serve` until the context ends; it must stop by itself on SIGTERM.

    `more` is added to its configuration.
    """
    with scratch() as home:
        config = home / "config.toml"
        config.write_text(
            CONFIG.format(
                key=KEY,
                max_body=MAX_BODY,
                silence=BODY_SILENCE_S,
                **{name: fake.url for name, fake in fakes.all.items()},
                **{f"{name}_key": key for name, key in UPSTREAM_KEYS.items()},
            )
            + more
        )
        log = home / "server.log"
        with log.open("wb") as err:
            process = subprocess.Popen(
                [
                    Path(sys.executable).with_name("openinteractions"),
                    *("serve", "--port", "0", "--config", config, "--data-dir", home / "data"),
                ],
                stdout=err,
                stderr=err,
                cwd=home,
                # Nothing of the developer's own environment: no vendor keys, no proxies.
                env={"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": str(SOURCES)},
            )
        try:
            yield Server(_wait_ready(process, log), home, log, process.pid)
            assert process.poll() is None, f"the server died:\n{log.read_text()[-5000:]}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if "server.ready" in line:
                return json.loads(line)["url"]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def sdk(server: Server, *, key: str = KEY, attempts: int = 1, **options: Any) -> Client:
    """An official client of the server."""
    return Client(
        api_key=key,
        http_options=HttpOptions(
            base_url=server.url, retry_options=HttpRetryOptions(attempts=attempts), **options
        ),
    )
