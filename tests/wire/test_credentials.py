"""Bodies of credentials: strict, explained, and split into what is secret and what is not."""

from typing import Any

import orjson
import pytest

from openinteractions.errors import Invalid
from openinteractions.wire.credentials import (
    Content,
    parse_create,
    parse_update,
    request_schemas,
)

TOKEN = "ghp_SECRET"
BEARER = {"type": "bearer_token", "token": TOKEN}
VARIABLE = {"type": "environment_variable", "value": "SECRET", "injection_location": "header"}
GRANT = {
    "type": "oauth2",
    "client_id": "c",
    "client_secret": "SECRET",
    "refresh_token": "SECRET",
    "token_url": "https://id.example.com/token",
}


def parsed(body: Any) -> tuple[str | None, Content]:
    return parse_create(orjson.dumps(body), max_depth=100)


def changed(body: Any, mask: str | None = None) -> Content:
    return parse_update(orjson.dumps(body), update_mask=mask, max_depth=100)


def refusal(body: Any) -> str:
    with pytest.raises(Invalid) as caught:
        parsed(body)
    return caught.value.message


def test_secrets_are_kept_apart():
    for body in (BEARER, VARIABLE, GRANT):
        name, content = parsed(body)
        assert name is None
        assert content.type == body["type"]
        assert "SECRET" not in repr(content)
        assert all("SECRET" in value for value in content.secret.values())
    assert parsed(BEARER)[1].public == {"header_name": "Authorization", "prefix": "Bearer"}
    assert parsed(GRANT)[1].secret.keys() == {"client_secret", "refresh_token"}
    assert parsed(VARIABLE)[1].public == {"injection_location": ["header"]}


@pytest.mark.parametrize(
    "url",
    [
        "https://a.b/t?x=y",
        "http://127.0.0.1:8080/t",
        "http://keycloak:8080/t",
        "http://a.internal/",
    ],
)
def test_token_urls_that_are_good(url: str):
    assert parsed({**GRANT, "token_url": url})[1].public["token_url"] == url


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({**BEARER, "headerName": "X"}, "parameter 'headerName'. Did you mean 'header_name'?"),
        ({**BEARER, "tokn": "X"}, "Unknown parameter 'tokn'. Did you mean 'token'?"),
        ({**BEARER, "value": "X"}, "Unknown parameter 'value'."),
        ({**BEARER, "status": "revoked"}, "Unknown parameter 'status'."),
        ({"token": TOKEN}, "Missing required parameter 'type'."),
        ({"type": "bearer_token"}, "Missing required parameter 'token'."),
        ({**VARIABLE, "value": None}, "Missing required parameter 'value'."),
        ({**BEARER, "token": ""}, "Invalid value at 'token': expected a non-empty string."),
        ({**BEARER, "token": 7}, "Invalid value at 'token': expected a string."),
        ({**BEARER, "token": "SECRET\r\nX: y"}, "Invalid value at 'token': an HTTP header cannot"),
        ({**BEARER, "token": "SECRÉT"}, "Invalid value at 'token': an HTTP header cannot"),
        ({**BEARER, "prefix": "a\nb"}, "Invalid value at 'prefix': an HTTP header cannot"),
        ({**BEARER, "header_name": "X Y"}, "expected the name of an HTTP header"),
        ({**BEARER, "header_name": "HOST"}, "the header 'HOST' cannot carry a credential"),
        ({"type": "password"}, "Invalid enum value 'password' at 'type'. Expected one of: bearer"),
        ({**VARIABLE, "injection_location": []}, "at 'injection_location': expected at least one"),
        (
            {**VARIABLE, "injection_location": ["header", "cookie"]},
            "Invalid enum value 'cookie' at 'injection_location[1]'",
        ),
        ({**VARIABLE, "injection_location": 3}, "expected a string or a list"),
        ({**VARIABLE, "value": "two\nlines"}, "'injection_location' names 'header'"),
        ({**VARIABLE, "trusted_domains": ["https://x.y"]}, "'trusted_domains[0]': expected a host"),
        ({**VARIABLE, "trusted_domains": ["a.*.y"]}, "at 'trusted_domains[0]': expected a host"),
        ({**VARIABLE, "trusted_domains": ["a\x00"]}, "at 'trusted_domains[0]': expected a host"),
        ({**GRANT, "token_url": "ftp://x/y"}, "Invalid value at 'token_url': expected https"),
        ({**GRANT, "token_url": "http://x.com/y"}, "Invalid value at 'token_url': expected https"),
        ({**GRANT, "token_url": "https://u:SECRET@x/"}, "without user, password and fragment"),
        ({**GRANT, "token_url": "https://[x"}, "at 'token_url': expected an https URL"),
        ({**GRANT, "token_url": "https://x/\x00"}, "at 'token_url': expected an https URL"),
        ({**GRANT, "scopes": ["a b"]}, "Invalid value at 'scopes[0]': expected one OAuth scope"),
        ({**GRANT, "client_id": "é"}, "Invalid value at 'client_id': expected printable ASCII"),
        ([], "The request body must be a JSON object."),
        (7, "The request body must be a JSON object."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(body: Any, message: str):
    assert message in (said := refusal(body))
    assert "SECR" not in said


@pytest.mark.parametrize(
    "odd", ["", "a b", "a/b", "é", "-a", "a_", "_a", "a__b", ".", "..", "a\x00", "x" * 64, "a\n"]
)
def test_ids_that_are_refused(odd: str):
    assert refusal({"id": odd, **BEARER}).startswith(
        "Invalid value at 'id': expected 1 to 63 letters"
    )


@pytest.mark.parametrize("good", ["a", "7", "cred_bearer_123", "a-b.c", "A" * 63])
def test_ids_that_are_good(good: str):
    assert parsed({"id": good, **BEARER})[0] == good


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("headerName", "Unknown path 'headerName' in 'update_mask'. Did you mean 'header_name'?"),
        ("value", "Unknown path 'value' in 'update_mask'."),
        ("token,", "Unknown path '' in 'update_mask'."),
        ("*", "Unknown path '*' in 'update_mask'."),
        ("id", "Unknown path 'id' in 'update_mask'."),
        ("token,prefix", "'update_mask' names 'prefix', which the body does not have."),
    ],
)
def test_wrong_masks(mask: str, message: str):
    with pytest.raises(Invalid) as caught:
        changed({"type": "bearer_token", "token": "new"}, mask)
    assert caught.value.message == message


def test_a_change_is_laid_over_what_is_there():
    change = changed({**BEARER, "prefix": ""}, "prefix")
    assert (change.public, change.secret) == ({"prefix": ""}, {})
    merged = change.over({"header_name": "X", "prefix": "y"}, {"token": "t"})
    assert (merged.public, merged.secret) == ({"header_name": "X", "prefix": ""}, {"token": "t"})


def test_the_bodies_are_described():
    schemas = request_schemas()
    assert {"CreateCredential", "UpdateCredential", "OAuth2"} <= schemas.keys()
    assert schemas["OAuth2"]["additionalProperties"] is False
