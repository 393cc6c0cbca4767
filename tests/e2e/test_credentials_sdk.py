"""Credentials with the official clients, and a new master key under a running server."""

import asyncio
import base64
import itertools
import json
import os
import re
import subprocess
import threading
from collections.abc import Generator
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime

import pytest
from google.genai import Client
from google.genai._gaos.lib import compat_errors as raised

from tests.e2e import wire
from tests.e2e.own import Own, own_server
from tests.e2e.server import Fakes, sdk
from tests.e2e.test_sdk_js import JS, node
from tests.fakes.oauth import CLIENT, REFRESH, FakeOAuth

__all__ = ["node"]

pytestmark = pytest.mark.filterwarnings("ignore:Credentials usage is experimental:UserWarning")

TOKEN = "ghp_SECRET_token"
SECRETS = re.compile(f"SECRET|{TOKEN}|{CLIENT[1]}|{REFRESH}")
OLD_KEY, NEW_KEY = (base64.b64encode(key).decode() for key in (bytes(32), bytes(range(32))))


@pytest.fixture(scope="module")
def provider() -> Generator[FakeOAuth]:
    """A token endpoint, served from a thread."""
    fake = FakeOAuth()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="oauth", daemon=True)
    thread.start()
    stack = AsyncExitStack()

    def run(work) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(timeout=30)

    run(stack.enter_async_context(fake.serve()))
    yield fake
    run(stack.aclose())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=10)
    loop.close()


@pytest.fixture(scope="module")
def own(upstreams: Fakes) -> Generator[Own]:
    """A server that may reach the token endpoint on this machine."""
    with own_server(upstreams, OI_NETWORK__ALLOW='["127.0.0.0/8"]') as running:
        yield running
        # Whatever a test of this module sent: none of it is in the log.
        log = (running.home / "server.log").read_text()
    assert "credential.created" in log
    assert SECRETS.findall(log) == []


@pytest.fixture
def its_client(own: Own) -> Generator[Client]:
    with sdk(own) as made:
        yield made


def fault(error: raised.APIStatusError) -> tuple[int, str, str]:
    assert isinstance(error.body, dict)
    found = error.body["error"]
    return error.status_code, found["code"], found["message"]


def test_the_python_sdk(its_client: Client, provider: FakeOAuth) -> None:
    here = its_client.credentials
    bearer = here.create(
        id="cred_bearer", type="bearer_token", token=TOKEN, header_name="X-Auth", prefix="Token"
    )
    assert (bearer.id, bearer.type, bearer.status) == ("cred_bearer", "bearer_token", "active")
    assert isinstance(bearer.create_time, datetime)
    assert abs((datetime.now(UTC) - bearer.create_time).total_seconds()) < 60
    here.create(
        id="cred_env",
        type="environment_variable",
        value="SECRET",
        injection_location=["header", "query"],
        trusted_domains=["api.example.com", "*.example.org"],
    )
    grant = {key: value for key, value in provider.body(scopes=["a"]).items() if key != "type"}
    here.create(id="cred_oauth", type="oauth2", **grant)
    listed = here.list()
    assert [one.id for one in listed.credentials or []] == ["cred_oauth", "cred_env", "cred_bearer"]
    first = here.list(page_size=2)
    rest = here.list(page_size=2, page_token=first.next_page_token)
    assert [one.id for one in rest.credentials or []] == ["cred_bearer"]
    assert rest.next_page_token is None
    assert here.get(id="cred_bearer") == bearer
    changed = here.update(id="cred_bearer", type="bearer_token", token="SECRET2")
    assert changed.update_time > bearer.update_time
    here.update(
        id="cred_env",
        type="environment_variable",
        value="SECRET",
        injection_location="header",
        trusted_domains=["api.example.com"],
    )
    here.update(id="cred_oauth", type="oauth2", scopes=["a", "b"], update_mask="scopes")
    assert provider.forms[-1]["scope"] == "a b"
    raw = here.with_raw_response.list().parse()
    assert SECRETS.findall(repr(raw)) == []
    for name in ("cred_bearer", "cred_env", "cred_oauth"):
        here.delete(id=name)
    assert here.list().credentials == []


def test_what_the_sdk_raises(its_client: Client, provider: FakeOAuth) -> None:
    here = its_client.credentials
    here.create(id="twice", type="bearer_token", token=TOKEN)
    with pytest.raises(raised.ConflictError) as conflict:
        here.create(id="twice", type="bearer_token", token=TOKEN)
    assert fault(conflict.value) == (409, "aborted", "Credential 'twice' already exists.")
    with pytest.raises(raised.BadRequestError) as bad:
        here.update(id="twice", type="oauth2", client_id="x")
    assert "is of type 'bearer_token'" in fault(bad.value)[2]
    with pytest.raises(raised.BadRequestError) as bad:
        here.update(id="twice", type="bearer_token", token="x", update_mask="tokn")
    assert "Did you mean 'token'?" in fault(bad.value)[2]
    here.delete(id="twice")
    for call in (here.get, here.delete):
        with pytest.raises(raised.NotFoundError) as missing:
            call(id="twice")
        assert fault(missing.value) == (404, "not_found", "Credential 'twice' not found.")
    grant = {key: value for key, value in provider.body().items() if key != "type"}
    with pytest.raises(raised.BadRequestError) as bad:
        here.create(id="no", type="oauth2", **{**grant, "refresh_token": "SECRET"})
    code, name, message = fault(bad.value)
    assert (code, name) == (400, "invalid_request")
    assert message.endswith("The token URL answered 400: invalid_grant.")
    with pytest.raises(raised.NotFoundError):
        here.get(id="no")


async def test_the_python_sdk_async(own: Own, provider: FakeOAuth) -> None:
    async with sdk(own).aio as client:
        here = client.credentials
        made = await here.create(id="async", type="bearer_token", token=TOKEN)
        assert await here.get(id="async") == made
        assert [one.id for one in (await here.list()).credentials or []] == ["async"]
        await here.update(id="async", type="bearer_token", prefix="")
        await here.delete(id="async")
        with pytest.raises(raised.NotFoundError):
            await here.get(id="async")


def test_the_javascript_sdk(own: Own, node: str) -> None:
    done = subprocess.run(
        [node, "--test", "--test-reporter=tap", "credentials.test.mjs"],
        cwd=JS,
        env={"PATH": os.environ["PATH"], "OI_URL": own.url, "OI_KEY": own.key},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^# pass 1$", done.stdout, re.MULTILINE), done.stdout


def test_a_documented_curl(own: Own) -> None:
    """The documentation's spelling: no id, `v1beta`, raw JSON."""
    made = wire.call(
        own, "POST", "/v1beta/credentials", {"type": "bearer_token", "token": TOKEN}
    ).json()
    assert set(made) == {"id", "type", "status", "create_time", "update_time"}
    gone = wire.call(
        own, "DELETE", f"/v1/credentials/{made['id']}", content_type="application/json"
    )
    assert (gone.status, gone.json()) == (200, {})


# ---- the master key


def opens(client: Client) -> None:
    """A change of what is no secret has to open what is."""
    client.credentials.update(id="kept", type="bearer_token", prefix="P")
    client.credentials.update(id="grant", type="oauth2", scopes=["x"])


def fill(client: Client, provider: FakeOAuth) -> None:
    client.credentials.create(id="kept", type="bearer_token", token=TOKEN)
    grant = {key: value for key, value in provider.body().items() if key != "type"}
    client.credentials.create(id="grant", type="oauth2", **grant)


@contextmanager
def busy(client: Client) -> Generator[None]:
    """Meanwhile, secrets are sealed and opened all the time; nothing of it may fail."""
    stop = threading.Event()
    troubles: list[Exception] = []

    def go_on() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            try:
                client.credentials.create(id=f"c{number}", type="bearer_token", token=TOKEN)
                client.credentials.update(id=f"c{number}", type="bearer_token", prefix="")
                opens(client)
            except Exception as error:  # noqa: BLE001 - shown below
                troubles.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)
    assert troubles == []


def test_a_new_key_file_under_a_running_server(upstreams: Fakes, provider: FakeOAuth) -> None:
    with own_server(upstreams, OI_NETWORK__ALLOW='["127.0.0.0/8"]') as own, sdk(own) as client:
        keys = own.home / "data" / "master.key"
        fill(client, provider)
        assert wire.call(own, "GET", "/.well-known/jwks.json", key=None).status == 200
        before = keys.read_text()
        with busy(client):
            done = own.run("secrets", "rotate")
        assert done.returncode == 0, done.stderr
        assert "credentials.sealed: " in done.stdout
        assert "signing_keys.sealed: 1 of 1 sealed anew" in done.stdout
        assert len(keys.read_text().split()) == 1
        assert keys.read_text() != before
        # The old key is forgotten with the process.
        own.stop()
        own.start()
        opens(client)
        assert wire.call(own, "GET", "/.well-known/jwks.json", key=None).status == 200
        made = [row["id"] for row in own.fetch("select id from credentials where id like 'c%'")]
        assert len(made) > 5
        for name in made:
            client.credentials.update(id=name, type="bearer_token", prefix="Q")


def test_a_key_of_ones_own(upstreams: Fakes, provider: FakeOAuth) -> None:
    with own_server(upstreams, OI_NETWORK__ALLOW='["127.0.0.0/8"]') as own, sdk(own) as client:
        fill(client, provider)
        (own.home / "new.key").write_text(NEW_KEY)
        done = own.run("secrets", "rotate", "--new-key-file", str(own.home / "new.key"))
        assert done.returncode == 0, done.stderr
        assert (own.home / "data" / "master.key").read_text().strip() == NEW_KEY
        opens(client)
        assert NEW_KEY not in done.stdout + done.stderr


def test_a_new_configured_key(upstreams: Fakes, provider: FakeOAuth) -> None:
    with own_server(upstreams, OI_NETWORK__ALLOW='["127.0.0.0/8"]', OI_MASTER_KEY=OLD_KEY) as own:
        with sdk(own) as client:
            fill(client, provider)
            own.stop()
            own.environment |= {
                "OI_MASTER_KEY": NEW_KEY,
                "OI_OLD_MASTER_KEYS": json.dumps([OLD_KEY]),
            }
            own.start()
            opens(client)
            done = own.run("secrets", "rotate")
            assert done.returncode == 0, done.stderr
            own.stop()
            del own.environment["OI_OLD_MASTER_KEYS"]
            own.start()
            opens(client)
        assert not (own.home / "data" / "master.key").exists()
