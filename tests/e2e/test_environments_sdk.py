"""Environments and their files with the official client, in a real server with real sandboxes."""

import asyncio
import gc
import io
import json
import socket
import ssl
import subprocess
import tarfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Generator
from datetime import datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from google.genai import Client
from google.genai import errors as sdk_errors
from google.genai._gaos.lib import compat_errors as raised

from openinteractions.models.port import Finished, ToolCall
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import KEY, USAGE, Fakes, Server, answer, sdk, turn
from tests.sandbox.engine import DockerEngine

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")

CHUNK = 8 * 2**20
HOST = socket.gethostname()
CODE = [{"type": "code_execution"}]


@pytest.fixture(scope="module")
def git_port(tmp_path_factory: pytest.TempPathFactory) -> Generator[int]:
    """A git repository behind TLS, under this machine's name."""
    home = tmp_path_factory.mktemp("git")
    work, bare = home / "work", home / "served" / "repo.git"
    run = partial(subprocess.run, check=True, capture_output=True)
    run(["git", "init", "-q", work])
    (work / "README.md").write_text("from git\n")
    run(["git", "-C", work, "add", "."])
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    run(["git", "-C", work, *who, "commit", "-q", "-m", "first"])
    run(["git", "clone", "-q", "--bare", work, bare])
    run(["git", "-C", bare, "update-server-info"])
    subject = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    files = ["-keyout", home / "key.pem", "-out", home / "cert.pem"]
    run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    )

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("", 0), partial(Quiet, directory=str(bare.parent))) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(home / "cert.pem", home / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def server(
    upstreams: Fakes,
    docker_engine: DockerEngine,
    git_port: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[Server]:
    skills = tmp_path_factory.mktemp("skills")
    (skills / "pdf").mkdir()
    (skills / "pdf" / "SKILL.md").write_text("# PDF\n")
    more = (
        f'ports = [443, {git_port}]\nskills_dir = "{skills}"\n'
        f'[network]\nallow = ["{socket.gethostbyname(HOST)}/32"]\n'
    )
    with serving_sandboxes(upstreams, docker_engine, name="environments", more=more) as running:
        deadline = time.monotonic() + 60
        while not running.fetch("select from brokers where seen > now() - interval '10 s'"):
            assert time.monotonic() < deadline, running.log.read_text()[-3000:]
            time.sleep(0.2)
        yield running
    log = running.log.read_text().splitlines() if running.log.exists() else []
    assert [line for line in log if "crashed" in line or "Traceback" in line] == []


@pytest.fixture(scope="module")
def client(server: Server) -> Generator[Client]:
    with sdk(server) as made:
        yield made


def call(
    server: Server, method: str, path: str, data: bytes | None = None, **headers: str
) -> tuple[int, bytes, Any]:
    """One request as curl makes it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(
        f"{server.url}{path}", data, {"x-goog-api-key": KEY, **named}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def ran(client: Client, fakes: Fakes, environment: Any, command: str) -> Any:
    """What a command says when a model runs it in an environment."""
    arguments = {"language": "bash", "code": command}
    fakes.acme.replies += [
        turn(ToolCall("c1", "code_execution", arguments), Finished("tool_calls", USAGE)),
        answer("Done."),
    ]
    done = client.interactions.create(
        model="acme/m", input="go", tools=CODE, environment=environment
    )
    assert done.status == "completed", done
    (result,) = (step for step in done.steps if step.type == "code_execution_result")
    return done, result.result


# ---- the resource


def test_an_environment_is_made_read_listed_and_deleted(client: Client) -> None:
    made = client.environments.create(
        sources=[{"type": "inline", "content": "hello\n", "target": "workspace/a.txt"}],
        network={"allowlist": [{"domain": "example.com", "transform": {"X-Key": "hush"}}]},
    )
    assert (made.status, made.file_count, made.size_bytes) == ("active", 1, 6)
    assert "hush" not in str(made)
    got = client.environments.get(id=made.id)
    assert (got.id, got.created) == (made.id, made.created)
    assert got.network.allowlist[0].domain == "example.com"
    assert got.sources[0].target == "workspace/a.txt"
    assert made.id in [one.id for one in client.environments.list(page_size=1000).environments]
    first = client.environments.list(page_size=1)
    assert len(first.environments) == 1
    client.environments.delete(id=made.id)
    with pytest.raises(raised.NotFoundError, match=made.id):
        client.environments.get(id=made.id)


def test_a_bad_environment_is_a_bad_request(client: Client) -> None:
    source = {"type": "inline", "content": "x", "target": "/etc/passwd"}
    with pytest.raises(raised.BadRequestError, match=r"sources\[0\]"):
        client.environments.create(sources=[source])
    with pytest.raises(raised.NotFoundError):
        client.environments.create(from_environment="environments/none")


def test_a_fork_goes_its_own_way(client: Client, fakes: Fakes) -> None:
    source = {"type": "inline", "content": "old", "target": "workspace/a"}
    parent = client.environments.create(sources=[source])
    fork = client.environments.create(from_environment=f"environments/{parent.id}")
    assert ran(client, fakes, fork.id, "cat a; echo new > a; ls")[1] == "olda\n"
    files = client.environments.files
    assert files.download(environment=fork.id, path="workspace/a") == b"new\n"
    assert files.download(environment=parent.id, path="workspace/a") == b"old"


def test_skills_are_there(client: Client, fakes: Fakes) -> None:
    source = {"type": "skill_registry", "source": "pdf", "target": "/.agents/skills/pdf"}
    made = client.environments.create(sources=[source])
    assert ran(client, fakes, made.id, "cat /.agents/skills/pdf/SKILL.md")[1] == "# PDF\n"


def test_a_repository_is_cloned_under_the_environments_own_rules(
    server: Server, client: Client, fakes: Fakes, git_port: int
) -> None:
    """The client's class has no `env`, which the server takes all the same."""
    source = {
        "type": "repository",
        "source": f"https://{HOST}:{git_port}/repo.git",
        "target": "/workspace/repo",
    }
    body = {
        "sources": [source],
        "network": {"allowlist": [{"domain": HOST}]},
        "env": {"GIT_SSL_NO_VERIFY": "true"},
    }
    status, raw, _ = call(server, "POST", "/v1/environments", json.dumps(body).encode())
    assert status == 200, raw
    name = json.loads(raw)["id"]
    logged = f"/v1/environments/{name}/network_log"
    read = client.environments.files.download
    assert read(environment=name, path="workspace/repo/README.md") == b"from git\n"
    said = ran(client, fakes, name, "git -C repo log --format=%s")[1]
    assert said == "first\n"
    # Written in batches, soon after.
    deadline = time.monotonic() + 60
    while not (events := json.loads(call(server, "GET", logged)[1])["events"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (events[0]["host"], events[0]["port"]) == (HOST, git_port)
    # Into a folder that has something it does not go, and nothing else of that change is laid.
    change: dict[str, Any] = {
        "type": "remote",
        "environment_id": name,
        "sources": [{"type": "inline", "content": "new", "target": "workspace/repo/README.md"}],
    }
    change["sources"].append({**source, "target": "workspace/repo/README.md"})
    with pytest.raises(raised.BadRequestError, match=r"sources\[1\].*already exists and is not an"):
        client.interactions.create(model="acme/m", input="x", environment=change)
    assert read(environment=name, path="workspace/repo/README.md") == b"from git\n"
    # One whose place is taken by another of the same change: what was laid is named.
    change["sources"][0]["target"] = change["sources"][1]["target"] = "workspace/new"
    with pytest.raises(raised.BadRequestError, match=r"sources\[1\].*left: .*workspace/new"):
        client.interactions.create(model="acme/m", input="x", environment=change)
    assert read(environment=name, path="workspace/new") == b"new"
    assert ran(client, fakes, name, "ls -A")[1] == "new\nrepo\n"
    # The same without leave to go there, and for a repository that is not there.
    before = len(client.environments.list(page_size=1000).environments)
    absent = {**source, "source": f"https://{HOST}:{git_port}/none.git"}
    for change, why in (
        ({"network": "disabled"}, "egress blocked"),
        ({"sources": [absent]}, "fatal:"),
    ):
        raw = json.dumps({**body, **change}).encode()
        status, raw, _ = call(server, "POST", "/v1/environments", raw)
        assert status == 400, raw
        message = json.loads(raw)["error"]["message"]
        assert message.startswith(f"Cannot set up 'sources[0]': git clone failed: {why}"), message
    assert len(client.environments.list(page_size=1000).environments) == before


def test_an_interaction_makes_and_reuses_an_environment(client: Client, fakes: Fakes) -> None:
    config = {
        "type": "remote",
        "sources": [{"type": "inline", "content": "6", "target": "workspace/n"}],
        "env": {"TIMES": {"value": "7"}},
    }
    first, said = ran(client, fakes, config, "echo $(($(cat n) * TIMES)) | tee result")
    assert said == "42\n"
    name = first.environment_id
    files = client.environments.files
    assert files.download(environment=name, path="workspace/result") == b"42\n"
    second, said = ran(client, fakes, name, "cat result; echo $TIMES")
    assert (second.environment_id, said) == (name, "42\n7\n")
    change = {"type": "remote", "environment_id": name, "env": {"TIMES": "8"}}
    assert ran(client, fakes, change, "echo $TIMES; cat result")[1] == "8\n42\n"
    with pytest.raises(raised.NotFoundError):
        client.interactions.create(model="acme/m", input="go", tools=CODE, environment="0" * 32)


def test_sources_lie_where_googles_examples_put_them(
    client: Client, fakes: Fakes, git_port: int, docker_engine: DockerEngine
) -> None:
    """`/backend-app` is from its page on agent environments ("private sources")."""
    config: dict[str, Any] = {
        "type": "remote",
        "sources": [
            {
                "type": "repository",
                "source": f"https://{HOST}:{git_port}/repo.git",
                "target": "/backend-app",
            },
            {"type": "inline", "content": "a,b\n", "target": "data/x.csv"},
            {"type": "inline", "content": "# Rules\n", "target": "AGENTS.md"},
        ],
        "network": {"allowlist": [{"domain": HOST}]},
        "env": {"GIT_SSL_NO_VERIFY": "true"},
    }
    script = "ls /backend-app; cat /data/x.csv /.agents/AGENTS.md; git -C /backend-app status -s; "
    write = "echo new > /backend-app/new.txt; echo c >> /data/x.csv; pwd"
    first, said = ran(client, fakes, config, script + write)
    assert said == "README.md\na,b\n# Rules\n/workspace\n"
    name = first.environment_id
    files = client.environments.files
    assert [one.path for one in files.list(environment=name, path="").files] == [
        ".agents", "backend-app", "data", "home", "workspace",
    ]  # fmt: skip
    assert files.download(environment=name, path="backend-app/new.txt") == b"new\n"
    assert files.download(environment=name, path="/data/x.csv") == b"a,b\nc\n"
    files.upload(environment=name, path="data/up.txt", file=b"up\n")
    with tarfile.open(fileobj=io.BytesIO(files.download(environment=name, path="data"))) as tar:
        assert sorted(Path(one).name for one in tar.getnames()) == ["up.txt", "x.csv"]
    # It ends, and another one is started.
    (container,) = docker_engine.containers(f"openinteractions.environment={name.replace('-', '')}")
    docker_engine.remove(container)
    look = "cat /backend-app/new.txt /data/x.csv /data/up.txt"
    assert ran(client, fakes, name, look)[1] == "new\na,b\nc\nup\n"
    fork = client.environments.create(from_environment=f"environments/{name}")
    assert ran(client, fakes, fork.id, f"{look}; rm /data/up.txt")[1] == "new\na,b\nc\nup\n"
    assert files.download(environment=name, path="data/up.txt") == b"up\n"
    # One that exists gets one more.
    more = {"type": "inline", "content": "more", "target": "/more/m"}
    config = {"type": "remote", "environment_id": name, "sources": [more]}
    assert ran(client, fakes, config, "cat /more/m /data/up.txt")[1] == "moreup\n"


@pytest.mark.parametrize(
    ("target", "instead"),
    [("/x.csv", "/workspace/x.csv"), ("/tmp/x", "/workspace/x"), ("etc/a/x", "/workspace/a/x")],
)
def test_a_refused_target_names_another(client: Client, target: str, instead: str) -> None:
    source = {"type": "inline", "content": "x", "target": target}
    with pytest.raises(raised.BadRequestError, match=f"'{instead}'"):
        client.environments.create(sources=[source])
    made = client.environments.create(sources=[{**source, "target": instead}])
    assert made.file_count == 1


# ---- files


@pytest.fixture
def name(client: Client) -> str:
    return client.environments.create().id


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_files_go_there_and_back(client: Client, name: str, size: int) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    files = client.environments.files
    written = files.upload(environment=name, path="workspace/d/f.bin", file=data)
    assert (written.files[0].path, written.files[0].size_bytes) == ("workspace/d/f.bin", size)
    assert files.download(environment=f"environments/{name}", path="/workspace/d/f.bin") == data


def test_files_in_every_form_the_client_takes(client: Client, name: str, tmp_path: Path) -> None:
    files = client.environments.files
    local = tmp_path / "local.py"
    local.write_text("print(1)\n")
    files.upload(environment=name, path="workspace/1.py", file=str(local))
    files.upload(environment=name, path="workspace/2.py", file=local)
    files.upload(environment=name, path="workspace/3.py", file=io.BytesIO(b"print(1)\n"))
    with local.open("rb") as handle:
        files.upload(environment=name, path="home/4.py", file=handle, mime_type="text/x-python")
    listed = files.list(environment=name, path="", recursive=True)
    found = [one for one in listed.files if one.type == "FILE"]
    assert [one.path for one in found] == [
        "home/4.py", "workspace/1.py", "workspace/2.py", "workspace/3.py",
    ]  # fmt: skip
    assert {one.size_bytes for one in found} == {9}
    assert {one.mime_type.partition(";")[0] for one in found} == {"text/x-python"}
    assert all(isinstance(one.modified, datetime) for one in found)


@pytest.mark.parametrize("path", ["", "/", ".", "workspace"])
def test_folders_are_listed(client: Client, name: str, path: str) -> None:
    files = client.environments.files
    files.upload(environment=name, path="workspace/a b/ü.txt", file=b"x")
    listed = files.list(environment=name, path=path)
    folders = [(one.path, one.type) for one in listed.files]
    if path == "workspace":
        assert folders == [("workspace/a b", "DIRECTORY")]
    else:
        assert [one[0] for one in folders] == [".agents", "home", "workspace"]
    assert files.list(environment=name, path="workspace/a b").files[0].name == "ü.txt"
    assert files.download(environment=name, path="workspace/a b/ü.txt") == b"x"


def test_listings_have_pages(client: Client, name: str) -> None:
    files = client.environments.files
    for letter in "abc":
        files.upload(environment=name, path=f"workspace/{letter}", file=b"")
    first = files.list(environment=name, path="workspace", page_size=2)
    token = first.next_page_token
    rest = files.list(environment=name, path="workspace", page_size=2, page_token=token)
    assert [one.name for one in [*first.files, *rest.files]] == ["a", "b", "c"]
    assert rest.next_page_token is None


def test_a_conflict_reaches_the_client_quickly(client: Client, name: str) -> None:
    files = client.environments.files
    files.upload(environment=name, path="workspace/a", file=b"old")
    for data in (b"new", bytes(CHUNK + 1)):
        began = time.monotonic()
        with pytest.raises(sdk_errors.ClientError) as caught:
            files.upload(environment=name, path="workspace/a", file=data)
        assert (caught.value.code, caught.value.status) == (409, "ABORTED")
        # The SDK waits and asks again where it takes an error for a passing one.
        assert time.monotonic() - began < 5
    assert files.download(environment=name, path="workspace/a") == b"old"
    files.upload(environment=name, path="workspace/a", file=b"new", overwrite=True)
    assert files.download(environment=name, path="workspace/a") == b"new"


def test_archives_are_unpacked(client: Client, name: str, fakes: Fakes) -> None:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        info = tarfile.TarInfo("bin/run.sh")
        info.size, info.mode = 8, 0o755
        archive.addfile(info, io.BytesIO(b"echo hi\n"))
    files = client.environments.files
    written = files.upload(
        environment=name, path="workspace/pkg", file=held.getvalue(), extract=True
    )
    assert "workspace/pkg/bin/run.sh" in [one.path for one in written.files]
    assert ran(client, fakes, name, "sh pkg/bin/run.sh && test -x pkg/bin/run.sh")[1] == "hi\n"
    bad = held.getvalue()[:20] + b"?" * 50
    with pytest.raises(sdk_errors.ClientError) as caught:
        files.upload(environment=name, path="workspace/bad", file=bad, extract=True)
    assert caught.value.code == 400


def test_what_is_missing_is_a_client_error(client: Client, name: str) -> None:
    files = client.environments.files
    with pytest.raises(sdk_errors.ClientError, match="Path 'workspace/x' not found") as caught:
        files.download(environment=name, path="workspace/x")
    assert (caught.value.code, caught.value.status) == (404, "NOT_FOUND")
    with pytest.raises(raised.NotFoundError, match="Path 'workspace/x' not found"):
        files.list(environment=name, path="workspace/x")
    with pytest.raises(raised.BadRequestError):
        files.upload(environment=name, path="etc/passwd", file=b"x")
    with pytest.raises(raised.NotFoundError):
        files.upload(environment="0" * 32, path="workspace/x", file=b"x")


@pytest.mark.filterwarnings("ignore:Inheritance class Aiohttp:DeprecationWarning")
def test_the_asynchronous_client_as_well(server: Server, name: str) -> None:
    data = bytes(CHUNK + 1)

    async def go() -> None:
        with sdk(server) as client:
            environments = client.aio.environments
            await environments.files.upload(environment=name, path="workspace/a", file=data)
            got = await environments.files.download(environment=name, path="workspace/a")
            assert got == data
            listed = await environments.files.list(environment=name, path="workspace")
            assert [one.size_bytes for one in listed.files] == [len(data)]
            made = await environments.create(from_environment=name)
            assert (await environments.get(id=made.id)).size_bytes == len(data)
            await environments.delete(id=made.id)
            await client.aio.aclose()

    # The client leaves connections of its own to the collector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.run(go())
        gc.collect()


def test_what_a_sandbox_wrote_can_be_had_as_an_archive(
    server: Server, client: Client, name: str, fakes: Fakes
) -> None:
    ran(client, fakes, name, "mkdir -p out/sub; echo 1 > out/a; echo 2 > out/sub/b; ln -s a out/l")
    base = f"/v1beta/environments/{name}/files/workspace/out?alt=media"
    found = {}
    for query in ("", "&recursive=true"):
        status, raw, headers = call(server, "GET", base + query)
        assert (status, headers["Content-Type"]) == (200, "application/x-tar")
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            found[query] = [one.name for one in archive.getmembers() if one.isfile()]
    assert [one.rpartition("/")[2] for one in found[""]] == ["a"]
    assert [one.rpartition("/")[2] for one in found["&recursive=true"]] == ["a", "b"]
    status, raw, _ = call(server, "GET", f"/v1beta/files/environment-{name}:download?alt=media")
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
        assert "workspace/out/sub/b" in archive.getnames()


def test_plain_uploads_as_curl_makes_them(server: Server, client: Client, name: str) -> None:
    base = f"/upload/v1beta/environments/{name}/files/workspace"
    status, raw, _ = call(server, "PUT", f"{base}/a", b"at once")
    assert (status, json.loads(raw)["files"][0]["size_bytes"]) == (200, "7")
    assert call(server, "PUT", f"/v1beta/environments/{name}/files/workspace/a", b"x")[0] == 400
    status, _, headers = call(server, "PUT", f"{base}/b?uploadType=resumable", b"")
    where = headers["Location"].removeprefix(server.url)
    status, _, headers = call(server, "PUT", where, b"abc", Content_Range="bytes 0-2/6")
    assert (status, headers["Range"]) == (308, "bytes=0-2")
    assert call(server, "PUT", where, b"def", Content_Range="bytes 3-5/6")[0] == 200
    assert client.environments.files.download(environment=name, path="workspace/b") == b"abcdef"
