"""Environments over HTTP, as far as no broker is needed: shapes, validation, scoping, life."""

import base64
import re
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from tests import house
from tests.house import KEY, Server

from openinteractions import ids
from openinteractions.db.sealed import environment_purpose
from openinteractions.errors import Invalid, NotFound, Unready
from openinteractions.resources.environments import sources, store
from openinteractions.resources.keys import service as keys
from openinteractions.wire.environments import parse_environment_id

OTHER = "oi_key_of_another_project_x"
INLINE = {"type": "inline", "content": "hi", "target": "workspace/a.txt"}
SECRET = "sk-SECRET-of-a-header"
TRANSFORM = {"allowlist": [{"domain": "api.example.com", "transform": {"X-Key": SECRET}}]}


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    async with house.opened(database_url, None, role="api", sandbox={"enabled": "off"}) as opened:
        await keys.ensure(opened.database, OTHER, name="other", project="other")
        yield opened


async def made(server: Server, body: dict[str, Any] | None = None, *, key: str = KEY) -> Any:
    status, answer = await server.call("POST", "environments", body or {}, key=key)
    assert status == 200, answer
    return answer


async def refused(
    server: Server, method: str, path: str, body: Any = None, *, status: int = 400, key: str = KEY
) -> str:
    got, answer = await server.call(method, path, body, key=key)
    assert got == status, answer
    return answer["error"]["message"]


async def project(server: Server, key: str = KEY) -> UUID:
    caller = await keys.Keyring(server.database)(key)
    assert caller is not None
    return caller.project_id


async def row_of(server: Server, environment_id: str) -> Any:
    async with server.database.hot() as connection:
        return await connection.fetchrow("select * from environments where id = $1", environment_id)


async def secret_of(server: Server, environment_id: str) -> Any:
    row = await row_of(server, environment_id)
    purpose = environment_purpose(row["project_id"], row["id"])
    return orjson.loads(server.process.sealer.open(row["sealed"], purpose=purpose))


async def set_row(server: Server, environment_id: str, what: str) -> None:
    async with server.database.hot() as connection:
        await connection.execute(f"update environments set {what} where id = $1", environment_id)


async def count(server: Server) -> int:
    return await house.rows(server.database, "environments", "deleted_at is null")


async def broker(
    server: Server, name: str, *, seen_s: float = 0, running: int = 0, problem: str | None = None
) -> None:
    async with server.database.hot() as connection:
        await connection.execute(
            "insert into brokers (name, address, host, pid, backend, capacity, running, problem, "
            "seen) values ($1, 'unix:///nowhere/' || $1, 'h', 1, 'docker', 10, $2, $3, "
            "now() - $4::interval)",
            name,
            running,
            problem,
            timedelta(seconds=seen_s),
        )


# ---- the resource


async def test_a_new_environment_has_the_contracts_shape_and_no_disk(server: Server):
    answer = await made(server)
    assert answer.keys() == {
        "id", "status", "created", "updated", "last_accessed", "expires", "file_count",
        "size_bytes",
    }  # fmt: skip
    assert (answer["status"], answer["file_count"], answer["size_bytes"]) == ("active", "0", "0")
    assert parse_environment_id(answer["id"]) == UUID(answer["id"])
    assert answer["created"].endswith("Z")
    row = await row_of(server, answer["id"])
    assert (row["broker"], row["has_disk"]) == (None, False)
    assert row["expires_at"] - row["created_at"] == timedelta(days=7)
    for name in (answer["id"], f"environments/{answer['id']}", f"environments%2F{answer['id']}"):
        assert await server.call("GET", f"environments/{name}") == (200, answer)


async def test_an_empty_body_makes_one_as_well(server: Server):
    headers = {"x-goog-api-key": KEY, "Content-Type": "application/json"}
    async with server.http.post("/v1/environments", headers=headers) as response:
        assert response.status == 200


async def test_secrets_are_sealed_and_never_shown(server: Server):
    answer = await made(
        server, {"network": TRANSFORM, "env": [{"TOKEN": "tok-SECRET"}, {"MODE": {"value": "x"}}]}
    )
    assert answer["network"] == {"allowlist": [{"domain": "api.example.com"}]}
    for text in (answer, (await server.call("GET", "environments"))[1]):
        assert SECRET not in str(text)
        assert "tok-SECRET" not in str(text)
    row = await row_of(server, answer["id"])
    assert SECRET.encode() not in row["sealed"] + row["public"]
    assert await secret_of(server, answer["id"]) == {
        "network": TRANSFORM,
        "env": {"TOKEN": {"value": "tok-SECRET"}, "MODE": {"value": "x"}},
    }


@pytest.mark.parametrize("network", ["disabled", "DISABLED", {"allowlist": "disabled"}])
async def test_networks_come_back_as_they_were_given(server: Server, network: Any):
    shown = network.lower() if isinstance(network, str) else network
    assert (await made(server, {"network": network}))["network"] == shown


async def test_lists_are_newest_first_in_pages_of_ones_own(server: Server):
    mine = [(await made(server))["id"] for _ in range(5)]
    foreign = (await made(server, key=OTHER))["id"]
    seen: list[str] = []
    query = "page_size=2"
    for _ in range(3):
        _, page = await server.call("GET", f"environments?{query}")
        seen += [one["id"] for one in page["environments"]]
        query = f"pageSize=2&pageToken={page.get('next_page_token', '')}"
    assert "next_page_token" not in page
    assert seen == mine[::-1]
    _, others = await server.call("GET", "environments", key=OTHER)
    assert [one["id"] for one in others["environments"]] == [foreign]
    assert "page_token" in await refused(server, "GET", "environments?page_token=AAAA")


async def test_another_projects_environment_looks_absent(server: Server):
    name = (await made(server, key=OTHER))["id"]
    for method, path in (
        ("GET", f"environments/{name}"),
        ("DELETE", f"environments/{name}"),
        ("GET", f"environments/{name}/files"),
        ("GET", f"environments/{name}/network_log"),
        ("PUT", f"../upload/v1beta/environments/{name}/files/workspace/x"),
    ):
        assert await refused(server, method, path, status=404) == f"Environment '{name}' not found."
    message = await refused(server, "POST", "environments", {"from_environment": name}, status=404)
    assert name in message
    with pytest.raises(NotFound):
        await server.process.environments.resolve(await project(server), name)
    assert (await server.call("GET", f"environments/{name}", key=OTHER))[0] == 200


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "v1_0",
        "%20",
        "4bc6398b16db40a4827b9787ac9a49c5",
        "0" * 31 + "g",
        "{" + "4bc6398b16db40a4827b9787ac9a49c5"[:34] + "}",
    ],
)
async def test_unknown_ids_are_not_found(server: Server, name: str):
    assert "not found" in await refused(server, "GET", f"environments/{name}", status=404)


async def test_what_is_deleted_is_gone(server: Server):
    name = (await made(server, {"network": TRANSFORM}))["id"]
    assert await server.call("DELETE", f"environments/{name}") == (200, {})
    await refused(server, "DELETE", f"environments/{name}", status=404)
    await refused(server, "GET", f"environments/{name}", status=404)
    assert (await server.call("GET", "environments"))[1] == {"environments": []}
    row = await row_of(server, name)
    assert (row["sealed"], row["public"]) == (None, None)


# ---- what is refused


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"fromEnvironment": "x"}, "Did you mean 'from_environment'?"),
        ({"sources": [{**INLINE, "tagret": "x"}]}, "at 'sources[0]'. Did you mean 'target'?"),
        ({"sources": [{"type": "inline", "content": "x"}]}, "'target' at 'sources[0]'"),
        ({"sources": [{**INLINE, "type": "zip"}]}, "'zip' at 'sources[0].type'"),
        ({"sources": [{"type": "inline", "target": "workspace/x"}]}, "'content' at 'sources[0]'"),
        ({"sources": [{**INLINE, "source": "x"}]}, "'source' does not go with the type 'inline'"),
        ({"sources": [{**INLINE, "encoding": "hex"}]}, "'hex' at 'sources[0].encoding'"),
        ({"sources": [{**INLINE, "encoding": "base64"}]}, "'sources[0].content': it is not base64"),
        ({"sources": [{**INLINE, "content": "x" * 1_000_001}]}, "1000000 bytes"),
        ({"env": {"1A": "x"}}, "'1A' at 'env'"),
        ({"env": {"A=B": "x"}}, "'A=B' at 'env'"),
        ({"env": {"A": "x\0y"}}, "'env.A'"),
        ({"env": {"A": {}}}, "'env.A': expected one of 'value' and 'credential'"),
        ({"env": {"A": {"value": "x", "credential": "y"}}}, "'env.A'"),
        ({"env": [{"A": "x"}, {"A": "y"}]}, "Duplicate name 'A' at 'env'"),
        ({"env": {"A": {"credential": "none"}}}, "'none' at 'env.A.credential' does not exist"),
        ({"network": "open"}, "'network'"),
        ({"network": {"allowlist": [{"domain": "https://x.com"}]}}, "network.allowlist[0].domain"),
        (
            {"network": {"allowlist": [{"domain": "x.com", "credential": "none"}]}},
            "'none' at 'network.allowlist[0].credential' does not exist",
        ),
        (
            {"network": {"allowlist": [{"domain": "x.com", "transform": {"a b": "c"}}]}},
            "network.allowlist[0].transform",
        ),
        (
            {"network": {"allowlist": [{"domain": "x.com", "transform": {"a": "b\r\nc: d"}}]}},
            "network.allowlist[0].transform",
        ),
    ],
)
async def test_bad_bodies_are_refused_and_leave_nothing(server: Server, body: Any, words: str):
    assert words in await refused(server, "POST", "environments", body)
    assert await count(server) == 0


def test_inline_contents_are_bounded_in_all():
    source = {**INLINE, "content": "x" * 700_000}
    assert len(sources.checked([source] * 2, skills_dir=None)) == 2
    with pytest.raises(Invalid, match="2000000 bytes in all"):
        sources.checked([source] * 3, skills_dir=None)


# The three folders themselves may be filled, but are no files.
ALL_BUT_OURS = ["/", "", "etc/x", "/etc/x", "workspace/../x", "."]


@pytest.mark.parametrize(
    ("kind", "target"),
    [("inline", "workspace"), *((kind, to) for kind in ("inline", "gcs") for to in ALL_BUT_OURS)],
)
async def test_targets_lie_in_one_of_the_three_folders(server: Server, kind: str, target: str):
    source = {**INLINE, "target": target}
    if kind == "gcs":
        source = {"type": "gcs", "source": "gs://bucket/x", "target": target}
    message = await refused(server, "POST", "environments", {"sources": [source]})
    assert "sources[0]" in message
    if target in {"/", "etc/x", "/etc/x", "."}:
        assert all(f"'{name}'" in message for name in ("workspace", ".agents", "home"))
    if target in {"etc/x", "/etc/x"}:
        assert "such as '/workspace/x': '/etc' is the sandbox's own" in message


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["/x.csv"], "use '/workspace/x.csv' instead of 'x.csv'"),
        (["/tmp/d/x"], "'/workspace/d/x'"),
        (["lost+found/x"], "'/lost+found' is the sandbox's own"),
        (["a b/x"], "at most 100 letters"),
        (["AGENTS.md", "/.agents/AGENTS.md"], "give one of the two"),
        ([f"d{number}/x" for number in range(17)], "at most 16 folders beside"),
    ],
)
def test_a_target_at_the_top_that_cannot_be_names_another(targets: list[str], words: str):
    given = [{**INLINE, "target": target} for target in targets]
    with pytest.raises(Invalid, match=re.escape(words)):
        sources.checked(given, skills_dir=None)
    # What Google's examples have.
    for good in ("/backend-app", "data/x.csv", "/AGENTS.md", "./.agent/skills/a/SKILL.md"):
        kind = {"type": "repository", "source": "https://x.com/r"} if "." not in good else INLINE
        kind = {key: value for key, value in kind.items() if key != "target"}
        sources.checked([{**kind, "target": good}], skills_dir=None)


@pytest.mark.parametrize(
    "url",
    [
        "http://github.com/a/b", "git@github.com:a/b", "file:///etc", "ext::sh -c id", "--upload",
        "https://", "https://github.com", "https://github.com/a b", "https://[x/y",
    ],
)  # fmt: skip
async def test_only_https_repositories(server: Server, url: str):
    body = {"sources": [{"type": "repository", "source": url, "target": "workspace/r"}]}
    assert "'sources[0].source'" in await refused(server, "POST", "environments", body)


@pytest.mark.parametrize("url", ["s3://a/b", "gs://", "gs://A_B/x", "gs:///x", "gs://a"])
async def test_only_buckets_of_cloud_storage(server: Server, url: str):
    body = {"sources": [{"type": "gcs", "source": url, "target": "workspace/r"}]}
    assert "'sources[0].source'" in await refused(server, "POST", "environments", body)


async def test_skills_are_folders_of_the_operators(database_url: str, tmp_path: Any):
    (tmp_path / "skills" / "pdf").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "skills" / "link").symlink_to(tmp_path / "secret")
    source = {"type": "skill_registry", "source": "pdf", "target": ".agents/skills/pdf"}
    async with house.opened(database_url, None, role="api") as plain:
        body = {"sources": [source]}
        assert "sandbox.skills_dir" in await refused(plain, "POST", "environments", body)
    sandbox = {"skills_dir": tmp_path / "skills"}
    async with house.opened(database_url, None, role="api", sandbox=sandbox) as server:
        for name in ("../secret", "nope", "link", "..", ".", "", "a/b"):
            body = {"sources": [{**source, "source": name}]}
            assert "'sources[0].source'" in await refused(server, "POST", "environments", body)
        # Known: it only fails for want of a broker.
        await refused(server, "POST", "environments", {"sources": [source]}, status=503)


async def test_credentials_have_to_be_of_the_project_and_of_the_right_type(server: Server):
    bearer = {"type": "bearer_token", "id": "b", "token": "t"}
    variable = {
        "type": "environment_variable",
        "id": "v",
        "value": "x",
        "injection_location": "header",
    }
    for body in (bearer, variable):
        assert (await server.call("POST", "credentials", body))[0] == 200
    network = {"allowlist": [{"domain": "x.com", "credential": "b"}]}
    good = await made(server, {"network": network, "env": {"A": {"credential": "v"}}})
    assert good["network"] == network
    assert (await secret_of(server, good["id"]))["env"] == {"A": {"credential": "v"}}
    for body, words in (
        ({"env": {"A": {"credential": "b"}}}, "bearer_token"),
        ({"network": {"allowlist": [{"domain": "x.com", "credential": "v"}]}}, "'v' at 'network"),
    ):
        assert words in await refused(server, "POST", "environments", body)
        assert "does not exist" in await refused(server, "POST", "environments", body, key=OTHER)


async def test_the_operators_ceiling_holds(database_url: str):
    sandbox = {"ceiling": {"mode": "allowlist", "domains": ["*.example.com"]}}
    async with house.opened(database_url, None, role="api", sandbox=sandbox) as server:
        await made(server, {"network": {"allowlist": [{"domain": "a.example.com"}]}})
        body = {"network": {"allowlist": [{"domain": "evil.com"}]}}
        assert "evil.com" in await refused(server, "POST", "environments", body)


# ---- forks


async def test_a_fork_takes_the_sources_network_unless_it_has_its_own(server: Server):
    parent = await made(server, {"network": TRANSFORM, "env": {"A": "x"}})
    for name in (parent["id"], f"environments/{parent['id']}"):
        fork = await made(server, {"from_environment": name, "sources": [], "env": {}})
        assert fork["id"] != parent["id"]
        assert fork["network"] == parent["network"]
        secret = {"network": TRANSFORM, "env": {"A": {"value": "x"}}}
        assert await secret_of(server, fork["id"]) == secret
    closed = await made(server, {"from_environment": parent["id"], "network": "disabled"})
    assert closed["network"] == "disabled"


@pytest.mark.parametrize(
    "extra", [{"sources": [INLINE]}, {"env": {"A": "x"}}, {"env": [{"A": ""}]}]
)
async def test_a_fork_has_no_sources_and_variables(server: Server, extra: Any):
    parent = (await made(server))["id"]
    body = {"from_environment": parent, **extra}
    assert "from_environment" in await refused(server, "POST", "environments", body)
    assert await count(server) == 1


# ---- what an interaction asks for


async def test_remote_is_a_fresh_environment_each_time(server: Server):
    environments, mine = server.process.environments, await project(server)
    first = await environments.resolve(mine, "remote")
    second = await environments.resolve(mine, {"type": "remote"})
    assert first != second
    assert (await row_of(server, first.hex))["broker"] is None
    assert await environments.resolve(mine, first.hex) == first
    assert await environments.resolve(mine, f"environments/{first}") == first


async def test_an_existing_one_gets_the_new_network_and_more_variables(server: Server):
    environments, mine = server.process.environments, await project(server)
    config = {"type": "remote", "network": TRANSFORM, "env": {"A": "1", "B": "2"}}
    found = await environments.resolve(mine, config)
    before = await row_of(server, found.hex)
    again = {"type": "remote", "environment_id": found.hex}
    assert await environments.resolve(mine, again) == found
    assert (await row_of(server, found.hex))["revision"] == before["revision"]
    assert (
        await environments.resolve(
            mine, {**again, "network": "disabled", "env": {"B": "3", "C": "4"}}
        )
        == found
    )
    assert await secret_of(server, found.hex) == {
        "network": "disabled",
        "env": {"A": {"value": "1"}, "B": {"value": "3"}, "C": {"value": "4"}},
    }
    after = await row_of(server, found.hex)
    assert after["revision"] == before["revision"] + 1
    assert after["updated_at"] > before["updated_at"]


async def test_a_change_that_fails_is_taken_back(server: Server):
    await broker(server, "dead", seen_s=20)
    environments, mine = server.process.environments, await project(server)
    found = await environments.resolve(mine, {"type": "remote", "network": TRANSFORM})
    before = await secret_of(server, found.hex)
    change = {
        "type": "remote",
        "environment_id": found.hex,
        "network": "disabled",
        "sources": [INLINE],
    }
    with pytest.raises(Unready):
        await environments.resolve(mine, change)
    assert await secret_of(server, found.hex) == before
    with pytest.raises(Invalid):
        await environments.resolve(mine, {**change, "sources": [{**INLINE, "target": "/"}]})
    assert (await server.call("GET", f"environments/{found.hex}"))[1]["network"] != "disabled"


async def test_ids_that_are_unknown_or_expired_are_not_found(server: Server):
    environments, mine = server.process.environments, await project(server)
    with pytest.raises(NotFound):
        await environments.resolve(mine, uuid4().hex)
    old = (await made(server))["id"]
    await set_row(server, old, "expires_at = now() - interval '1 second'")
    for value in (old, {"type": "remote", "environment_id": old}):
        with pytest.raises(NotFound, match="expired"):
            await environments.resolve(mine, value)


# ---- placing


async def test_without_a_broker_the_answer_says_what_to_do(server: Server):
    await broker(server, "dead", seen_s=20)
    message = await refused(server, "POST", "environments", {"sources": [INLINE]}, status=503)
    assert "Docker" in message
    assert "openinteractions doctor" in message
    assert await count(server) == 0
    name = (await made(server))["id"]
    await refused(server, "GET", f"environments/{name}/files", status=503)


async def test_a_new_one_goes_to_the_least_loaded_broker_that_lives(server: Server):
    await broker(server, "dead", seen_s=20)
    await broker(server, "broken", problem="no engine")
    await broker(server, "busy", running=5)
    await broker(server, "idle", running=1)
    environments = server.process.environments
    found = await environments.resolve(await project(server), "remote")
    place = await store.place(server.database, found, ttl=timedelta(days=1))
    assert place is not None
    assert (place.broker, place.address) == ("idle", "unix:///nowhere/idle")
    # It stays, however the load changes.
    await broker(server, "idler")
    again = await store.place(server.database, found, ttl=timedelta(days=1))
    assert again is not None
    assert again.broker == "idle"


async def test_ones_files_wait_for_their_own_broker(server: Server):
    await broker(server, "mine", seen_s=20)
    await broker(server, "other")
    name = (await made(server))["id"]
    await set_row(server, name, "broker = 'mine', has_disk = true")
    message = await refused(server, "GET", f"environments/{name}/files", status=503)
    assert "'mine'" in message
    # What is known of it is shown all the same, and it can be deleted.
    assert (await server.call("GET", f"environments/{name}"))[0] == 200
    assert await server.call("DELETE", f"environments/{name}") == (200, {})
    assert (await row_of(server, name))["has_disk"]


# ---- life


async def test_use_moves_the_end_on_at_most_once_a_minute(server: Server):
    name = (await made(server))["id"]
    environments = server.process.environments
    before = await row_of(server, name)
    await environments.touch(UUID(name))
    assert await row_of(server, name) == before
    await set_row(server, name, "accessed_at = now() - interval '2 minutes', expires_at = now()")
    await set_row(server, name, "expires_at = now() + interval '1 minute'")
    await environments.touch(UUID(name))
    after = await row_of(server, name)
    assert after["expires_at"] - after["accessed_at"] == timedelta(days=7)
    assert after["accessed_at"] > before["accessed_at"]


async def test_what_is_not_used_expires_and_says_so_for_a_while(server: Server):
    old, new = (await made(server, {"env": {"A": "x"}}))["id"], (await made(server))["id"]
    await set_row(server, old, "expires_at = now() - interval '1 second'")
    # Before the upkeep has come by as well.
    assert (await server.call("GET", f"environments/{old}"))[1]["status"] == "expired"
    environments = server.process.environments
    assert await environments.expire() == 1
    assert await environments.expire() == 0
    assert (await row_of(server, old))["sealed"] is None
    assert (await server.call("GET", f"environments/{old}"))[1]["status"] == "expired"
    assert (await server.call("GET", f"environments/{new}"))[1]["status"] == "active"
    assert "expired" in await refused(server, "GET", f"environments/{old}/files", status=404)
    body = {"from_environment": old}
    assert "expired" in await refused(server, "POST", "environments", body, status=404)
    await environments.touch(UUID(old))
    assert (await server.call("GET", f"environments/{old}"))[1]["status"] == "expired"
    await set_row(server, old, "expired_at = now() - interval '31 days'")
    await environments.expire()
    await refused(server, "GET", f"environments/{old}", status=404)
    assert await row_of(server, old) is None


async def test_rows_stay_while_a_broker_may_still_have_files(server: Server):
    name = (await made(server))["id"]
    await set_row(
        server, name, "broker = 'away', has_disk = true, expired_at = now() - interval '99 days'"
    )
    await server.process.environments.expire()
    assert await row_of(server, name) is not None


# ---- the network log


async def logged(server: Server, name: str, host: str, **fields: Any) -> UUID:
    key = ids.uuid7()
    async with server.database.hot() as connection:
        await connection.execute(
            "insert into egress_log (environment_id, id, project_id, host, port, kind, decision, "
            "reason, path, method, status, bytes_up) "
            "values ($1, $2, $3, $4, 443, 'https', $5, $6, '/p', 'GET', 200, 12)",
            name,
            key,
            await project(server),
            host,
            fields.get("decision", "allowed"),
            fields.get("reason"),
        )
    return key


async def test_the_network_log_is_newest_first_in_pages(server: Server):
    name, other = (await made(server))["id"], (await made(server))["id"]
    await logged(server, name, "a.com")
    await logged(server, name, "b.com", decision="blocked", reason="not listed")
    await logged(server, other, "elsewhere.com")
    last = await logged(server, name, "c.com")
    _, page = await server.call("GET", f"environments/{name}/network_log?page_size=2")
    assert [event["host"] for event in page["events"]] == ["c.com", "b.com"]
    assert page["events"][0]["id"] == last.hex
    assert page["events"][1]["reason"] == "not listed"
    assert page["events"][1]["bytes_up"] == "12"
    token = page["next_page_token"]
    _, rest = await server.call("GET", f"environments/{name}/network_log?page_token={token}")
    assert [event["host"] for event in rest["events"]] == ["a.com"]
    assert "next_page_token" not in rest
    await refused(server, "GET", f"environments/{other}/network_log?page_token={token}")


async def test_old_logs_are_dropped(server: Server):
    name = (await made(server))["id"]
    await logged(server, name, "old.com")
    async with server.database.hot() as connection:
        await connection.execute("update egress_log set at = now() - interval '8 days'")
    await logged(server, name, "new.com")
    await server.process.environments.expire()
    _, page = await server.call("GET", f"environments/{name}/network_log")
    assert [event["host"] for event in page["events"]] == ["new.com"]


# ---- files, as far as they are not the broker's


async def test_uploads_need_their_prefix(server: Server):
    name = (await made(server))["id"]
    message = await refused(server, "PUT", f"environments/{name}/files/workspace/x", {"a": 1})
    assert "/upload" in message


@pytest.mark.parametrize(
    "path", ["etc/x", "x", "workspace", "workspace/%2e%2e/x", "workspace/a%00"]
)
async def test_uploads_go_into_one_of_the_three_folders(server: Server, path: str):
    name = (await made(server))["id"]
    url = f"/upload/v1beta/environments/{name}/files/{path}"
    headers = {"x-goog-api-key": KEY}
    start = {"X-Goog-Upload-Command": "start", "X-Goog-Upload-Protocol": "resumable"}
    for extra in ({}, start):
        async with server.http.put(url, data=b"x", headers=headers | extra) as response:
            assert response.status == 400, await response.text()


async def test_pieces_of_no_upload_are_refused_at_once(server: Server):
    """With the header that keeps SDKs from sending them again, and without a key."""
    name = (await made(server))["id"]
    url = f"/upload/v1beta/environments/{name}/files/workspace/x"
    token = base64.urlsafe_b64encode(b"x" * 60).decode()
    for query, status in (("", 400), (f"?upload_id={token}", 404), ("?upload_id=%FF", 404)):
        headers = {"X-Goog-Upload-Command": "upload, finalize", "X-Goog-Upload-Offset": "0"}
        async with server.http.post(url + query, data=b"x", headers=headers) as response:
            assert response.status == status
            assert (await response.json())["error"]["message"]
            assert ("X-Goog-Upload-Status" in response.headers) == bool(query)


async def test_a_project_has_so_many_environments_at_most(database_url):
    sandbox = {"enabled": "off", "max_environments": 3}
    async with house.opened(database_url, None, role="api", sandbox=sandbox) as server:
        await keys.ensure(server.database, OTHER, name="other", project="other")
        first, second, _ = [await made(server) for _ in range(3)]
        for body in ({}, {"from_environment": first["id"]}):
            message = await refused(server, "POST", "environments", body)
            assert "has 3 environments" in message
            assert "sandbox.max_environments" in message
        await made(server, key=OTHER)
        # Neither a deleted nor an expired one counts.
        assert (await server.call("DELETE", f"environments/{first['id']}"))[0] == 200
        await made(server)
        await refused(server, "POST", "environments", body={})
        async with server.database.hot() as connection:
            await connection.execute(
                "update environments set expires_at = now() - interval '1 s' where id = $1",
                parse_environment_id(second["id"]),
            )
        await made(server)
        await refused(server, "POST", "environments", body={})
