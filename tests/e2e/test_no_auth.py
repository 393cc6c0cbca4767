"""`serve --no-auth`: this machine is let in, web pages from elsewhere are not."""

from collections.abc import Generator
from typing import Any

import pytest

from tests.e2e.own import Own, own_server
from tests.e2e.server import Fakes
from tests.e2e.wire import MODEL, V, call

BODY = {"model": MODEL, "input": "Hi"}
ELSEWHERE = [
    "evil.example",
    "evil.example:80",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost@evil.example",
    "evil.example#localhost",
    "10.0.0.1",
    "[::2]",
    "0.0.0.0",
    "",
]
HERE = ["localhost", "localhost:3000", "127.0.0.1:8080", "127.9.8.7", "[::1]", "[::1]:8080"]


@pytest.fixture(scope="module")
def door(upstreams: Fakes) -> Generator[Own]:
    with own_server(upstreams, "--no-auth") as running:
        yield running


def create(door: Any, **headers: str) -> Any:
    return call(door, "POST", f"{V}/interactions", BODY, key=None, **headers)


def refused(door: Any, fakes: Fakes, **headers: str) -> None:
    answer = create(door, **headers)
    answer.error(403)
    assert answer.json()["error"]["status"] == "PERMISSION_DENIED"
    assert "access-control-allow-origin" not in answer.headers
    assert fakes.acme.requests == []


@pytest.mark.parametrize("host", ELSEWHERE)
def test_another_host_is_refused(door: Own, fakes: Fakes, host: str) -> None:
    refused(door, fakes, Host=host)


@pytest.mark.parametrize("origin", [*(f"http://{host}" for host in ELSEWHERE), "null", "file://"])
def test_another_origin_is_refused(door: Own, fakes: Fakes, origin: str) -> None:
    refused(door, fakes, Origin=origin, Content_Type="text/plain")


def test_another_origin_gets_no_preflight(door: Own) -> None:
    asked = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
    answer = call(door, "OPTIONS", f"{V}/interactions", key=None, **asked)
    answer.error(403)
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("host", HERE)
def test_this_machine_is_let_in(door: Own, fakes: Fakes, host: str) -> None:
    assert create(door, Host=host).status == 200
    answer = create(door, Host=host, Origin=f"http://{host}")
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == f"http://{host}"


def test_no_origin_is_needed(door: Own, fakes: Fakes) -> None:
    assert create(door).status == 200
