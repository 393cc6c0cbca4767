"""One server and one set of fake upstreams for the session; scripts are cleared before each test."""

from collections.abc import Generator

import pytest

from tests.e2e.server import Fakes, Server, serving, serving_fakes


@pytest.fixture(scope="session")
def upstreams() -> Generator[Fakes]:
    with serving_fakes() as fakes:
        yield fakes


@pytest.fixture(scope="session")
def server(upstreams: Fakes) -> Generator[Server]:
    with serving(upstreams) as running:
        yield running


@pytest.fixture
def fakes(upstreams: Fakes) -> Fakes:
    upstreams.clear()
    return upstreams
