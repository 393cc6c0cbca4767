"""What the Compose file promises about Docker's socket and the broker's folder."""

from pathlib import Path

import pytest
import yaml

SOCKET = "/var/run/docker.sock"


@pytest.fixture(scope="module")
def services():
    compose = Path(__file__).parents[2] / "docker-compose.yml"
    return yaml.safe_load(compose.read_text())["services"]


def test_only_the_broker_has_the_engines_socket(services) -> None:
    having = [name for name, service in services.items() if SOCKET in str(service)]
    assert having == ["broker"]
    assert not any(service.get("privileged") for service in services.values())


def test_the_engine_finds_the_brokers_folder_where_the_broker_does(services) -> None:
    folder = services["broker"]["environment"]["OI_SANDBOX__DATA_DIR"]
    (bind,) = [each for each in services["broker"]["volumes"] if isinstance(each, dict)]
    assert bind["source"] == bind["target"] == folder


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_others_reach_the_broker_by_a_shared_volume(services, name: str) -> None:
    listen = services["broker"]["environment"]["OI_SANDBOX__LISTEN"]
    volume, folder = services["broker"]["volumes"][1].split(":")
    assert listen.startswith(f"unix://{folder}/")
    assert f"{volume}:{folder}:ro" in services[name]["volumes"]
    assert services[name]["environment"]["OI_SANDBOX__ENABLED"] == "off"
