"""The broker that `serve` runs beside itself, and what `doctor` says about sandboxes."""

import secrets
import signal
import time

import psutil
import pytest

from tests.cli import command
from tests.db.postgres import end, scratch
from tests.sandbox.engine import SLIM, docker

QUIET_S = 60


@pytest.fixture
def home():
    with scratch() as path:
        (path / "data").mkdir()
        yield path
        end(path / "data/postgres/data")


@pytest.fixture
def settings(docker_engine):
    name = docker_engine.broker_name(secrets.token_hex(4))
    yield {
        "OI_SANDBOX__ENABLED": "auto",
        "OI_SANDBOX__BROKER": name,
        "OI_SANDBOX__IMAGE": SLIM,
        "OI_SANDBOX__WARM": "0",
    }
    for container in docker_engine.containers(f"openinteractions.broker={name}"):
        docker("rm", "--force", container, check=False)


def eventually(check):
    deadline = time.monotonic() + QUIET_S
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come")


def broker_of(server):
    for child in psutil.Process(server.process.pid).children():
        if "broker" in child.cmdline():
            return child
    return None


def ready(server):
    return server.events().count("broker.ready")


def test_serve_has_a_broker_which_comes_back_and_ends_with_it(home, settings):
    with command.serving(home, **settings) as server:
        eventually(lambda: ready(server) == 1)
        broker_of(server).kill()
        eventually(lambda: ready(server) == 2)
        assert "broker.ended" in server.events()
        last = broker_of(server)
        assert server.end(signal.SIGTERM) == 0
        assert not last.is_running()
        assert "broker.stopped" in server.events()


def test_a_broker_does_not_outlive_a_killed_server(home, settings):
    with command.serving(home, **settings) as server:
        eventually(lambda: ready(server))
        broker = broker_of(server)
        server.process.kill()
        server.process.wait()
        eventually(lambda: not broker.is_running())


def test_without_an_engine_serve_runs_and_says_why(home, settings):
    nowhere = {"OI_SANDBOX__DOCKER_URL": f"unix://{home}/none.sock"}
    with command.serving(home, **{**settings, **nowhere}) as server:
        eventually(lambda: "sandbox.off" in server.events())
        (line,) = [each for each in server.lines() if each["event"] == "sandbox.off"]
        assert "No container engine listens" in str(line["reason"])
        assert broker_of(server) is None
        assert server.end(signal.SIGTERM) == 0


def test_where_sandboxes_are_wanted_a_missing_engine_ends_serve(home, settings):
    wanted = {"OI_SANDBOX__ENABLED": "on", "OI_SANDBOX__DOCKER_URL": f"unix://{home}/none.sock"}
    said = command.refused(home, "serve", "--port", "0", **{**settings, **wanted})
    assert "sandbox.enabled is on" in said
    assert "No container engine listens" in said


def test_an_api_alone_has_no_broker(home, settings):
    with command.serving(home, "--no-worker", **settings) as server:
        time.sleep(1)
        assert broker_of(server) is None
        assert server.end(signal.SIGTERM) == 0


def test_a_broker_alone_needs_a_shared_database(home, settings):
    assert "DATABASE_URL" in command.refused(home, "broker", **settings)


def test_the_doctor_looks_at_sandboxes(home, settings):
    with command.serving(home, **settings) as server:
        eventually(lambda: ready(server))
        time.sleep(0.5)
        well = command.run(home, "doctor", **settings)
        assert f"the sandbox image {SLIM} is there" in well.stdout
        assert f"broker {settings['OI_SANDBOX__BROKER']} beats" in well.stdout
        missing = command.run(home, "doctor", **{**settings, "OI_SANDBOX__IMAGE": "none:such"})
        assert missing.returncode == 1, missing.stdout
        assert "scripts/sandbox-image" in missing.stdout
        nowhere = {"OI_SANDBOX__DOCKER_URL": f"unix://{home}/none.sock"}
        away = command.run(home, "doctor", **{**settings, **nowhere})
        assert away.returncode == 1, away.stdout
        assert "install Docker" in away.stdout
        off = command.run(home, "doctor", **{**settings, "OI_SANDBOX__ENABLED": "off"})
        assert "sandboxes are off" in off.stdout
        server.end(signal.SIGTERM)
