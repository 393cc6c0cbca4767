"""Docker against the contract of all backends."""

import pytest

from openinteractions.sandbox.docker import DockerBackend
from openinteractions.sandbox.port import Backend
from tests.contracts.sandbox.suite import BackendContract
from tests.sandbox.engine import DockerEngine


class TestDocker(BackendContract):
    def new_backend(self) -> Backend:
        return DockerBackend()

    @pytest.fixture
    def run_id(self, docker_engine: DockerEngine) -> str:
        return docker_engine.run_id
