"""Callbacks of background runs: signed, thin, tried again, and never to a private address."""

import base64
import hashlib
import json
import time
from collections.abc import Generator
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from google.genai import Client

from tests.e2e import wire
from tests.e2e.own import Own, Receiver, own_server, receiver
from tests.e2e.reading import FAST, until
from tests.e2e.server import Fakes, Server, sdk
from tests.fakes.upstream import Reply


@pytest.fixture(scope="module")
def own(upstreams: Fakes) -> Generator[Own]:
    """A server that may call back to this machine."""
    with own_server(upstreams, OI_NETWORK__ALLOW='["127.0.0.0/8"]') as running:
        yield running


@pytest.fixture
def its_client(own: Own, fakes: Fakes) -> Generator[Client]:
    with sdk(own) as made:
        yield made


def called_back(client: Client, *uris: str, **config: Any) -> str:
    made = client.interactions.create(
        model=FAST, input="Hi", background=True, webhook_config={"uris": list(uris), **config}
    )
    return made.id


def decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def verified(own: Own, token: str) -> dict[str, Any]:
    """The claims of a token, once the published key set has confirmed it."""
    header, claims, signature = token.split(".")
    head = json.loads(decoded(header))
    assert (head["alg"], head["typ"]) == ("RS256", "JWT")
    found = wire.call(own, "GET", "/.well-known/jwks.json", key=None)
    assert found.status == 200
    (key,) = (one for one in found.json()["keys"] if one["kid"] == head["kid"])
    assert set(key) == {"kty", "alg", "use", "kid", "n", "e"}
    numbers = (int.from_bytes(decoded(key[name]), "big") for name in ("e", "n"))
    public = rsa.RSAPublicNumbers(*numbers).public_key()
    message = f"{header}.{claims}".encode()
    public.verify(decoded(signature), message, padding.PKCS1v15(), hashes.SHA256())
    with pytest.raises(InvalidSignature):
        public.verify(decoded(signature), message + b"x", padding.PKCS1v15(), hashes.SHA256())
    return json.loads(decoded(claims))


def check(own: Own, hook: Receiver, call: tuple[dict[str, str], bytes]) -> dict[str, Any]:
    """A callback's payload, its signature checked."""
    headers, body = call
    claims = verified(own, headers["webhook-signature"])
    assert claims["aud"] == hook.url
    assert claims["sha256"] == hashlib.sha256(body).hexdigest()
    assert claims["jti"] == headers["webhook-id"]
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert claims["iat"] <= time.time() + 1 < claims["exp"]
    assert headers["content-type"] == "application/json"
    return json.loads(body)


def test_the_end_of_a_run_calls_back(own: Own, its_client: Client) -> None:
    with receiver() as hook:
        key = called_back(its_client, hook.url, user_metadata={"order": "7"})
        until(lambda: bool(hook.calls))
        payload = check(own, hook, hook.calls[0])
        assert payload["type"] == "interaction.completed"
        assert payload["version"] == "v1"
        assert payload["data"] == {"id": key, "user_metadata": {"order": "7"}}
        assert its_client.interactions.get(key).status == "completed"
        time.sleep(0.5)
        assert len(hook.calls) == 1
    assert own.fetch("select * from jobs") == []


def test_a_failed_run_says_why(own: Own, its_client: Client, fakes: Fakes) -> None:
    fakes.acme.default = Reply(status=400, message="no such thing")
    with receiver() as hook:
        key = called_back(its_client, hook.url)
        until(lambda: bool(hook.calls))
        payload = check(own, hook, hook.calls[0])
    assert payload["type"] == "interaction.failed"
    assert payload["data"]["id"] == key
    assert "no such thing" in payload["data"]["error_message"]


def test_a_refused_callback_is_tried_again_with_the_same_id(own: Own, its_client: Client) -> None:
    with receiver(500) as hook, receiver() as other:
        called_back(its_client, hook.url, other.url)
        until(lambda: len(hook.calls) == 2, within_s=25)
        first, second = hook.calls
        assert check(own, hook, first) == check(own, hook, second)
        assert first[0]["webhook-id"] == second[0]["webhook-id"]
        assert len(other.calls) == 1
        assert other.calls[0][0]["webhook-id"] != first[0]["webhook-id"]
    until(lambda: own.fetch("select * from jobs") == [])


def test_private_addresses_are_refused_by_default(
    server: Server, client: Client, fakes: Fakes
) -> None:
    with receiver() as hook:
        called_back(client, hook.url)
        why = "select last_error from jobs where kind = 'deliver' and last_error is not null"
        until(lambda: bool(server.fetch(why)))
        assert "address" in server.fetch(why)[0][0]
        assert hook.calls == []
    server.fetch("delete from jobs where kind = 'deliver'")
