"""Credentials over HTTP: the contract's shapes, strict bodies, projects kept apart, no leaks."""

import re
import uuid
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any

import pytest
import structlog
from tests import house
from tests.fakes.oauth import CLIENT, REFRESH, FakeOAuth
from tests.house import KEY, Server

from openinteractions.api import pages
from openinteractions.resources.credentials.service import Injection, Unusable, placeholder
from openinteractions.resources.keys import service as keys

OTHER = "oi_key_of_another_project_x"
TOKEN = "ghp_SECRET_of_a_bearer"
VALUE = "sk-SECRET-of-a-variable"
BEARER = {"type": "bearer_token", "token": TOKEN}
VARIABLE = {"type": "environment_variable", "value": VALUE, "injection_location": "header"}
ODD_PLACES = ["", "x", "2026-01-01 a", "2026-01-01T00:00:00+00:00 a\x00", "9999-99-99T00:00:00Z a"]


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    allow = {"network": {"allow": ["127.0.0.0/8"]}}
    async with house.opened(database_url, None, role="api", **allow) as opened:
        await keys.ensure(opened.database, OTHER, name="other", project="other")
        yield opened


@pytest.fixture
async def provider() -> AsyncGenerator[FakeOAuth]:
    fake = FakeOAuth()
    async with fake.serve():
        yield fake


async def made(server: Server, body: dict[str, Any], *, key: str = KEY) -> dict[str, Any]:
    status, answer = await server.call("POST", "credentials", body, key=key)
    assert status == 200, answer
    return answer


async def refused(
    server: Server, method: str, path: str, body: Any = None, *, status: int = 400, key: str = KEY
) -> str:
    got, answer = await server.call(method, path, body, key=key)
    assert got == status, answer
    codes = {400: "invalid_request", 404: "not_found", 409: "aborted"}
    assert answer["error"]["code"] == codes[status]
    return answer["error"]["message"]


async def injected(server: Server, name: str, *, key: str = KEY) -> Injection:
    return await server.process.vault.injection(await project(server, key), name)


async def project(server: Server, key: str = KEY) -> uuid.UUID:
    caller = await keys.Keyring(server.database)(key)
    assert caller is not None
    return caller.project_id


# ---- shapes


@pytest.mark.parametrize("body", [BEARER, VARIABLE])
async def test_only_what_is_no_secret_is_shown(server: Server, body: dict[str, Any]):
    answer = await made(server, {"id": "mine", **body})
    assert set(answer) == {"id", "type", "status", "create_time", "update_time"}
    assert (answer["id"], answer["type"], answer["status"]) == ("mine", body["type"], "active")
    assert answer["create_time"] == answer["update_time"]
    assert answer["create_time"].endswith("Z")
    datetime.fromisoformat(answer["create_time"])
    assert await server.call("GET", "credentials/mine") == (200, answer)
    assert await server.call("GET", "credentials/credentials%2Fmine") == (200, answer)
    assert await server.call("GET", "credentials") == (200, {"credentials": [answer]})


async def test_an_id_is_made_up_if_none_is_given(server: Server):
    first, second = await made(server, BEARER), await made(server, {**BEARER, "id": None})
    assert first["id"] != second["id"]
    assert str(uuid.UUID(first["id"])) == first["id"]


async def test_every_version_has_them(server: Server):
    await made(server, {"id": "mine", **BEARER})
    headers = {"x-goog-api-key": KEY}
    for version in ("v1", "v1alpha", "v1beta"):
        async with server.http.get(f"/{version}/credentials/mine", headers=headers) as answer:
            assert answer.status == 200


async def test_a_deleted_one_is_gone(server: Server):
    await made(server, {"id": "mine", **BEARER})
    assert await server.call("DELETE", "credentials/mine") == (200, {})
    missing = "Credential 'mine' not found."
    for method, body in [("GET", None), ("DELETE", None), ("PATCH", {"type": "bearer_token"})]:
        assert await refused(server, method, "credentials/mine", body, status=404) == missing
    await made(server, {"id": "mine", **VARIABLE})


async def test_an_id_is_taken_once(server: Server):
    await made(server, {"id": "mine", **BEARER})
    message = await refused(server, "POST", "credentials", {"id": "mine", **VARIABLE}, status=409)
    assert message == "Credential 'mine' already exists."
    found = await injected(server, "mine")
    assert found.token == TOKEN


async def test_odd_ids_are_not_found(server: Server):
    for odd in ("", "x" * 64, "x" * 5000, "a%00b", "%C3%A9", "a__b", "..", "a%2Fb", "'"):
        await refused(server, "GET", f"credentials/{odd}", status=404)
        await refused(server, "DELETE", f"credentials/{odd}", status=404)


# ---- strict bodies


async def test_what_is_wrong_is_named(server: Server):
    said = await refused(server, "POST", "credentials", {**BEARER, "headerName": "X"})
    assert said == "Unknown parameter 'headerName'. Did you mean 'header_name'?"
    said = await refused(server, "POST", "credentials", {"id": "a__b", **BEARER})
    assert said.startswith("Invalid value at 'id': expected 1 to 63 letters")
    assert await house.rows(server.database, "credentials") == 0


async def test_types_are_read_in_any_case(server: Server):
    body = {**VARIABLE, "type": "ENVIRONMENT_VARIABLE", "injection_location": ["Query", "BODY"]}
    assert (await made(server, {"id": "v", **body}))["type"] == "environment_variable"
    assert (await injected(server, "v")).locations == {"query", "body"}


async def test_a_large_body_is_refused(server: Server):
    body = {**BEARER, "token": "x" * 600_000}
    assert (await server.call("POST", "credentials", body))[0] == 413
    body = {**BEARER, "token": "x" * 40_000}
    assert "at most 32768" in await refused(server, "POST", "credentials", body)


# ---- changes


async def test_what_an_update_does_not_name_stays(server: Server):
    first = await made(server, {"id": "b", **BEARER, "header_name": "X-Key", "prefix": ""})
    change = {"type": "bearer_token", "token": "new"}
    status, second = await server.call("PATCH", "credentials/b", change)
    assert status == 200
    assert second["create_time"] == first["create_time"]
    assert second["update_time"] > first["update_time"]
    found = await injected(server, "b")
    assert (found.header_name, found.prefix, found.value) == ("X-Key", "", "new")
    assert await server.call("PATCH", "credentials/b", {"type": "bearer_token"}) == (200, second)


async def test_an_update_repeats_the_type(server: Server):
    await made(server, {"id": "b", **BEARER})
    said = await refused(server, "PATCH", "credentials/b", {"token": "x"})
    assert said == "Missing required parameter 'type'."
    said = await refused(server, "PATCH", "credentials/b", {**VARIABLE})
    assert "credential 'b' is of type 'bearer_token', and that cannot be changed" in said
    said = await refused(server, "PATCH", "credentials/b", {**BEARER, "id": "c"})
    assert said == "Unknown parameter 'id'."
    said = await refused(
        server, "PATCH", "credentials/b", {"type": "bearer_token", "headerName": "X"}
    )
    assert said.endswith("Did you mean 'header_name'?")
    assert (await injected(server, "b")).token == TOKEN


async def test_an_update_mask_chooses(server: Server):
    await made(server, {"id": "b", **BEARER})
    change = {"type": "bearer_token", "token": "new", "header_name": "X-Other", "prefix": "Tok"}
    path = "credentials/b?update_mask=token,%20prefix"
    assert (await server.call("PATCH", path, change))[0] == 200
    found = await injected(server, "b")
    assert (found.header_name, found.value) == ("Authorization", "Tok new")
    path = "credentials/b?updateMask=header_name,type"
    assert (await server.call("PATCH", path, change))[0] == 200
    assert (await injected(server, "b")).header_name == "X-Other"


async def test_a_wrong_mask_changes_nothing(server: Server):
    await made(server, {"id": "b", **BEARER})
    change = {"type": "bearer_token", "token": "new"}
    for mask in ("headerName", "value", "token,", "*", "id", "token,prefix"):
        path = f"credentials/b?update_mask={mask}"
        assert "'update_mask'" in await refused(server, "PATCH", path, change)
    assert (await injected(server, "b")).token == TOKEN


async def test_a_change_has_to_go_together_with_what_stays(server: Server):
    await made(server, {"id": "v", **VARIABLE, "injection_location": "body", "value": "a\nb"})
    change = {"type": "environment_variable", "injection_location": "header"}
    assert "names 'header'" in await refused(server, "PATCH", "credentials/v", change)
    assert (await injected(server, "v")).locations == {"body"}


# ---- pages


async def test_pages(server: Server):
    names = [f"c{number}" for number in range(7)]
    for name in names:
        await made(server, {"id": name, **BEARER})
    seen: list[str] = []
    token = ""
    for _ in range(4):
        path = f"credentials?page_size=2{token and '&page_token=' + token}"
        _, page = await server.call("GET", path)
        seen += [item["id"] for item in page["credentials"]]
        token = page.get("next_page_token", "")
    assert seen == names[::-1]
    assert token == ""
    _, first = await server.call("GET", "credentials?pageSize=3")
    _, rest = await server.call("GET", f"credentials?pageToken={first['next_page_token']}")
    assert [item["id"] for item in rest["credentials"]] == names[::-1][3:]
    assert "next_page_token" not in rest


async def test_one_moment_is_no_gap(server: Server):
    for number in range(5):
        await made(server, {"id": f"c{number}", **BEARER})
    async with server.database.hot() as connection:
        await connection.execute("update credentials set created_at = '2026-01-01T00:00:00Z'")
    _, first = await server.call("GET", "credentials?page_size=3")
    _, rest = await server.call("GET", f"credentials?page_token={first['next_page_token']}")
    shown = [item["id"] for page in (first, rest) for item in page["credentials"]]
    assert shown == ["c4", "c3", "c2", "c1", "c0"]


async def test_wrong_tokens(server: Server):
    forged = [pages.text_token(text, {"resource": "credentials"}) for text in ODD_PLACES]
    for token in ("x", "%00", "A" * 32, "A" * 8000, "%C3%A9", "AAAAAAAAAAAA", *forged):
        assert "page_token" in await refused(server, "GET", f"credentials?page_token={token}")
    assert "page_size" in await refused(server, "GET", "credentials?page_size=-1")


# ---- projects


async def test_projects_do_not_see_each_other(server: Server):
    await made(server, {"id": "mine", **BEARER})
    for method, body in [("GET", None), ("DELETE", None), ("PATCH", BEARER)]:
        said = await refused(server, method, "credentials/mine", body, status=404, key=OTHER)
        assert said == "Credential 'mine' not found."
    assert (await server.call("GET", "credentials", key=OTHER))[1] == {"credentials": []}
    with pytest.raises(Unusable) as caught:
        await injected(server, "mine", key=OTHER)
    assert caught.value.reason == "unknown"
    await made(server, {"id": "mine", **BEARER, "token": "theirs"}, key=OTHER)
    assert (await injected(server, "mine")).token == TOKEN
    assert (await injected(server, "mine", key=OTHER)).token == "theirs"
    assert (await server.call("DELETE", "credentials/mine", key=OTHER))[0] == 200
    assert (await server.call("GET", "credentials/mine"))[0] == 200


async def test_no_key_is_no_entry(server: Server):
    for method, path in [("GET", "credentials"), ("POST", "credentials"), ("GET", "credentials/x")]:
        assert (await server.call(method, path, key=""))[0] == 401


async def test_a_secret_opens_in_its_own_row_only(server: Server):
    await made(server, {"id": "a", **BEARER})
    await made(server, {"id": "b", **BEARER, "token": "other"})
    async with server.database.hot() as connection:
        await connection.execute(
            "update credentials set sealed = (select sealed from credentials where id = 'a') "
            "where id = 'b'"
        )
    with pytest.raises(Unusable) as caught:
        await injected(server, "b")
    assert caught.value.reason == "unreadable"
    assert TOKEN not in caught.value.message


# ---- what the egress proxy gets


async def test_a_bearer_token_goes_into_a_header(server: Server):
    await made(server, {"id": "b", **BEARER})
    found = await injected(server, "b")
    assert (found.header_name, found.value) == ("Authorization", f"Bearer {TOKEN}")
    assert TOKEN not in repr(found)
    assert await injected(server, "credentials/b") == found


async def test_a_variable_has_a_placeholder(server: Server):
    await made(server, {"id": "my_var", **VARIABLE})
    found = await injected(server, "my_var")
    assert found.placeholder == "__GEMINI_CRED_my_var__" == placeholder("credentials/my_var")
    assert (found.value, found.locations, found.trusted_domains) == (VALUE, {"header"}, None)
    assert VALUE not in repr(found)
    change = {
        "type": "environment_variable",
        "injection_location": ["body", "query", "body"],
        "trusted_domains": ["API.Example.com.", "*.x.org", "*"],
    }
    assert (await server.call("PATCH", "credentials/my_var", change))[0] == 200
    found = await injected(server, "my_var")
    assert (found.value, found.locations) == (VALUE, {"body", "query"})
    assert found.trusted_domains == ("api.example.com", "*.x.org", "*")


async def test_what_cannot_be_used_says_why(server: Server):
    await made(server, {"id": "b", **BEARER})
    async with server.database.hot() as connection:
        await connection.execute("update credentials set status = 'revoked'")
    assert (await server.call("GET", "credentials/b"))[1]["status"] == "revoked"
    with pytest.raises(Unusable, match="Credential 'b' is revoked") as caught:
        await injected(server, "b")
    assert caught.value.reason == "revoked"
    await server.call("DELETE", "credentials/b")
    for name in ("b", "never", "a__b", "x\x00", ""):
        with pytest.raises(Unusable) as caught:
            await injected(server, name)
        assert caught.value.reason == "unknown"


# ---- leaks


async def test_no_secret_leaves(server: Server, provider: FakeOAuth, capfd: pytest.CaptureFixture):
    """Neither answers, good and bad, nor logs, nor the database show one."""
    answers: list[Any] = []
    provider.rotates = True
    secrets = re.compile("SECRET|" + "|".join((TOKEN, VALUE, CLIENT[1], REFRESH)))
    with structlog.testing.capture_logs() as logs:
        for body in (BEARER, VARIABLE, provider.body()):
            name = body["type"]
            for way in ({"id": name}, {"id": name}, {"id": "x", "oops": 1}, {"id": "-"}):
                asked = {**body, **way}
                answers.append(await server.call("POST", "credentials", asked))
            answers.append(await server.call("PATCH", f"credentials/{name}", body))
            answers.append(await server.call("PATCH", f"credentials/{name}", {**body, "type": "x"}))
            answers.append(await server.call("GET", f"credentials/{name}"))
            answers.append(await server.call("GET", "credentials"))
            answers.append(repr(await injected(server, name)))
        provider.answers += [(400, {"error": CLIENT[1], "error_description": REFRESH})] * 4
        answers.append(await server.call("POST", "credentials", provider.body(id="y")))
        answers.append(await server.call("PATCH", "credentials/oauth2", provider.body()))
        async with server.database.hot() as connection:
            await connection.execute("update credentials set token_expires_at = now()")
        with pytest.raises(Unusable) as caught:
            await injected(server, "oauth2")
        answers += [str(caught.value), repr(caught.value)]
        async with server.database.hot() as connection:
            answers.append(
                await connection.fetchval("select string_agg(c::text, '') from credentials c")
            )
        answers.append(await server.call("DELETE", "credentials/oauth2"))
    assert len([log for log in logs if log["event"] == "credential.created"]) == 3
    assert [log["event"] for log in logs if log["event"] == "credential.refresh_failed"]
    assert secrets.findall(repr(answers)) == []
    assert secrets.findall(repr(logs)) == []
    assert secrets.findall("".join(capfd.readouterr())) == []
    async with server.database.hot() as connection:
        rows = await connection.fetch("select sealed, token_sealed from credentials")
    assert rows
    raw = b"".join(part for row in rows for part in row if part)
    assert b"SECRET" not in raw
