"""A real server with sandboxes: `openinteractions serve` and the broker that it starts."""

import time
from collections.abc import Generator
from contextlib import contextmanager

from tests.e2e.server import Fakes, Server, serving
from tests.sandbox.engine import SLIM, DockerEngine

_START_S = 60
_SANDBOXES = """
[sandbox]
enabled = "on"
broker = "{broker}"
image = "{image}"
warm = 1
memory_bytes = {memory}
tmp_bytes = 134217728
disk_bytes = 536870912
{more}
"""


@contextmanager
def serving_sandboxes(
    fakes: Fakes,
    engine: DockerEngine,
    *,
    name: str = "e2e",
    image: str = SLIM,
    more: str = "",
    memory: int = 2**29,
) -> Generator[Server]:
    """A server whose sandboxes are gone when the context ends."""
    broker = engine.broker_name(name)
    settings = _SANDBOXES.format(broker=broker, image=image, more=more, memory=memory)
    try:
        with serving(fakes, settings) as server:
            _wait_for_broker(server)
            yield server
    finally:
        remove_sandboxes(engine, broker)


def remove_sandboxes(engine: DockerEngine, broker: str) -> None:
    """Remove what a broker that was killed has left."""
    for container in engine.containers(f"openinteractions.broker={broker}"):
        engine.remove(container)


def _wait_for_broker(server: Server) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if server.fetch("select from brokers where problem is null"):
            return
        time.sleep(0.1)
    raise AssertionError(f"the broker did not start:\n{server.log.read_text()[-5000:]}")
