"""One server and one set of fake upstreams a session; a test begins with empty scripts."""

from collections.abc import Generator

import pytest
from google.genai import Client

from tests.e2e.server import Fakes, Server, sdk, serving, serving_fakes


@pytest.fixture(scope="session")
def upstreams() -> Generator[Fakes]:
    with serving_fakes() as fakes:
        yield fakes


@pytest.fixture(scope="session")
def server(upstreams: Fakes) -> Generator[Server]:
    with serving(upstreams) as running:
        yield running
        log = running.log.read_text().splitlines()
    # Whatever a test sent, and whether or not it looked: nothing of it may have been a bug.
    assert [line for line in log if "crashed" in line or "Traceback" in line] == []


@pytest.fixture
def fakes(upstreams: Fakes) -> Fakes:
    upstreams.clear()
    return upstreams


@pytest.fixture(scope="session")
def client(server: Server) -> Generator[Client]:
    """The official client as an application makes it, but for its retries of errors."""
    with sdk(server) as made:
        yield made
