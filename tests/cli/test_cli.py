"""The command line as an operator meets it: processes, exit codes, messages."""

import signal
import socket
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.cli.command import (
    COMMAND,
    KEY,
    database_processes,
    environment,
    ran,
    refused,
    run,
    serving,
    still_running,
)
from tests.db.postgres import end, scratch


@pytest.fixture
def home() -> Generator[Path]:
    with scratch() as path:
        yield path
        end(path / "data/postgres/data")


@pytest.fixture(scope="module")
def migrated() -> Generator[Path]:
    """A home with a database that is up to date; nothing runs on it between tests."""
    with scratch() as path:
        ran(path, "migrate")
        yield path
        end(path / "data/postgres/data")


def test_help_names_every_command(tmp_path):
    text = ran(tmp_path, "--help")
    for name in ("serve", "worker", "migrate", "demo", "keys", "models"):
        assert f"  {name} " in text


def test_no_command_shows_the_help(tmp_path):
    answer = run(tmp_path)
    assert "Usage:" in answer.stdout + answer.stderr


def test_version(tmp_path):
    assert ran(tmp_path, "--version").count(".") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the configuration oi.toml: No such file or directory"),
        ("port = ", "the configuration oi.toml is not valid TOML"),
        ("prot = 1", "  prot: Extra inputs are not permitted"),
        ("port = 70000", "  port: Input should be less than or equal to 65535"),
        ('[providers."a/b"]\nkind = "openai"', "  providers: Value error, provider name 'a/b'"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "oi.toml").write_text(text)
    for command in (["serve"], ["migrate"], ["keys", "list"], ["demo"], ["models", "list"]):
        assert message in refused(tmp_path, *command, "--config", "oi.toml")


def test_a_missing_variable_of_a_provider_is_named(home):
    text = '[providers.acme]\nkind = "openai"\nbase_url = "http://x"\napi_key = "env:ACME_KEY"'
    (home / "oi.toml").write_text(text)
    assert "the environment variable ACME_KEY is not set" in refused(
        home, "serve", "--config", "oi.toml", "--port", "0"
    )
    assert database_processes(home) == []


def test_no_auth_is_refused_off_loopback(tmp_path):
    message = refused(tmp_path, "serve", "--no-auth", "--host", "0.0.0.0")
    assert message == (
        "openinteractions: --no-auth is only possible on a loopback address, not on '0.0.0.0'"
    )
    assert not (tmp_path / "data").exists()


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(tmp_path, "serve", "--port", str(port))
    assert message == f"openinteractions: cannot listen on 127.0.0.1:{port}: Address already in use"


def test_a_metrics_port_in_use_is_named(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        variables = {"OI_WORKER__METRICS_PORT": str(port), "DATABASE_URL": "postgresql://x@y/z"}
        message = refused(tmp_path, "worker", **variables)
    assert message == (
        f"openinteractions: cannot serve metrics on port {port} (worker.metrics_port): "
        "Address already in use"
    )


def test_a_worker_needs_a_shared_database(tmp_path):
    assert "a worker of its own needs DATABASE_URL" in refused(tmp_path, "worker")


def test_models_are_listed(tmp_path):
    text = ran(tmp_path, "models", "list")
    rows = [line.split() for line in text.splitlines() if line.startswith("local/")]
    assert [(row[0], row[3]) for row in rows] == [
        ("local/smollm2-135m", "no"),
        ("local/qwen2.5-coder-0.5b", "no"),
        ("local/qwen2.5-coder-1.5b", "no"),
    ]
    assert f"Folder: {tmp_path}/.cache/openinteractions/models" in text


def test_the_models_folder_can_be_chosen(tmp_path):
    answer = run(tmp_path, "models", "list", OI_LOCAL__MODELS_DIR=str(tmp_path / "elsewhere"))
    assert f"Folder: {tmp_path}/elsewhere" in answer.stdout


def test_an_unknown_model_is_not_pulled(tmp_path):
    message = refused(tmp_path, "models", "pull", "gpt-9")
    assert "there is no packaged model 'gpt-9'; choose one of: smollm2-135m" in message


def test_the_schema_goes_up_down_and_up(home):
    assert ran(home, "migrate") == "The schema is at head.\n"
    assert ran(home, "migrate", "--revision", "base") == "The schema is at base.\n"
    assert "run `openinteractions migrate`" in refused(home, "keys", "list")
    assert ran(home, "migrate") == "The schema is at head.\n"
    assert "KEY" in ran(home, "keys", "list")
    assert database_processes(home) == []


def test_keys_without_a_server(migrated):
    key = ran(migrated, "keys", "create", "--name", "first", "--project", "acme").strip()
    assert key.startswith("oi_")
    row = row_of(key, migrated)
    assert "acme" in row
    assert key not in row
    assert row.endswith("valid")
    assert database_processes(migrated) == []


def test_keys_while_a_server_runs(migrated):
    with serving(migrated, OI_BOOTSTRAP_API_KEY=KEY) as server:
        key = ran(migrated, "keys", "create", "--name", "late").strip()
        assert server.status(key) == 404
        assert server.status("oi_" + "0" * 43) == 401
        assert ran(migrated, "keys", "revoke", key) == f"revoked {key[:10]}…\n"
        deadline = time.monotonic() + 60
        while server.status(key) != 401 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.status(key) == 401
        assert server.status(KEY) == 404
        assert "revoked" in row_of(key, migrated)
        assert "no valid key begins with" in refused(migrated, "keys", "revoke", key)
        assert server.end(signal.SIGTERM) == 0


def test_a_short_beginning_does_not_revoke_every_key(migrated):
    with serving(migrated, OI_BOOTSTRAP_API_KEY=KEY) as server:
        ran(migrated, "keys", "create", "--project", "many")
        message = refused(migrated, "keys", "revoke", "oi_")
        assert "keys begin with 'oi_': give more of the one" in message
        assert "no valid key begins with ''" in refused(migrated, "keys", "revoke", "")
        assert server.status(KEY) == 404
        assert server.end(signal.SIGTERM) == 0


def test_a_project_gets_and_loses_a_budget(migrated):
    with serving(migrated, OI_BOOTSTRAP_API_KEY=KEY) as server:
        text = ran(migrated, "keys", "limit", "acme", "--max-tokens-per-day", "5")
        assert text == "The budget of project 'acme' is set.\n"
        assert "lifted" in ran(migrated, "keys", "limit", "acme")
        assert server.end(signal.SIGTERM) == 0


def row_of(key: str, home: Path) -> str:
    return next(line for line in ran(home, "keys", "list").splitlines() if key[:10] in line)


def test_a_second_server_on_the_same_data_is_refused(migrated):
    with serving(migrated, OI_BOOTSTRAP_API_KEY=KEY) as server:
        assert "data" in refused(migrated, "serve", "--port", "0")
        assert server.status(KEY) == 404
        assert server.end(signal.SIGTERM) == 0


def test_the_first_start_prints_a_key_and_a_warm_one_is_quick(home):
    with serving(home) as server:
        key = server.output().split(": ")[1].strip()
        assert server.status(key) == 404
        assert server.status(key, "/readyz") == 200
        assert key not in server.log.read_text()
        assert server.end(signal.SIGTERM) == 0
        assert server.events()[-1] == "server.stopped"
        assert server.family
        assert still_running(server.family) == []
    with serving(home) as server:
        assert server.output() == ""
        assert server.status(key) == 404
        assert server.seconds < 15
        assert server.end(signal.SIGINT) == 0
    assert database_processes(home) == []


def test_a_killed_server_comes_back_with_its_data(home):
    with serving(home) as server:
        key = server.output().split(": ")[1].strip()
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    # The database goes on running, and the next server attaches to it.
    assert database_processes(home) != []
    assert key[:10] in ran(home, "keys", "list")
    with serving(home) as server:
        started = next(line for line in server.lines() if line["event"] == "database.started")
        assert started["attached"] is True
        assert server.status(key) == 404
        assert server.seconds < 15
        assert server.end(signal.SIGTERM) == 0
    assert database_processes(home) == []


@pytest.mark.parametrize("delay_s", [0.3, 0.8, 1.3, 1.8])
def test_a_server_that_is_stopped_while_it_starts_leaves_nothing(home, delay_s):
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", "0"],
        cwd=home,
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(delay_s)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    assert database_processes(home) == []


def test_no_auth_lets_everybody_in_on_loopback(migrated):
    with serving(migrated, "--no-auth") as server:
        assert server.status("") == 404
        assert server.end(signal.SIGHUP) == 0
    assert database_processes(migrated) == []
