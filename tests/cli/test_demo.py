"""`openinteractions demo` against a fake upstream: what it promises, and what it leaves behind."""

import signal
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from openinteractions.cli import demo_model, models
from openinteractions.errors import SetupError
from openinteractions.models.port import TextDelta
from openinteractions.settings import Settings
from tests.cli.command import COMMAND, environment, run
from tests.db.postgres import scratch
from tests.e2e.server import Fakes, answer, serving_fakes
from tests.fakes.upstream import Reply

CONFIG = """
[providers.acme]
kind = "openai"
base_url = "{url}"

[models]
default = "acme/large"
attempts = 1
"""


@pytest.fixture(scope="module")
def fakes() -> Generator[Fakes]:
    with serving_fakes() as running:
        yield running


@pytest.fixture
def home(fakes: Fakes) -> Generator[Path]:
    fakes.clear()
    fakes.acme.default = answer("Hello, ", "Ada.")
    with scratch() as path:
        (path / "tmp").mkdir(mode=0o755)
        (path / "openinteractions.toml").write_text(CONFIG.format(url=fakes.acme.url))
        yield path


def family(home: Path) -> list[psutil.Process]:
    """Every process that has to do with this home, by the variables that it was given."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(home) in " ".join(process.cmdline()) + " ".join(process.environ().values()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_nothing_is_left(home: Path) -> None:
    assert family(home) == []
    assert list((home / "tmp").iterdir()) == []


def test_it_shows_and_proves_what_it_says(home, fakes):
    began = time.monotonic()
    answer = run(home, "demo", TMPDIR=str(home / "tmp"), DATABASE_URL="postgresql://nowhere/x")
    assert answer.returncode == 0, answer.stderr
    assert "Model: acme/large" in answer.stdout
    assert answer.stdout.count("Hello, Ada.") == 3
    assert "It remembered the name." in answer.stdout
    assert answer.stdout.count("completed, 2 steps, the same text") == 3
    assert "All of it holds." in answer.stdout
    assert len(fakes.acme.requests) == 3
    assert time.monotonic() - began < 60
    assert_nothing_is_left(home)


def test_a_failing_model_is_a_failing_demo(home, fakes):
    fakes.acme.default = Reply(status=400)
    answer = run(home, "demo", TMPDIR=str(home / "tmp"))
    assert answer.returncode == 1
    assert "The demo failed: v1_" in answer.stderr
    assert " is failed. " in answer.stderr
    assert "All of it holds" not in answer.stdout
    assert_nothing_is_left(home)


def test_an_answer_without_text_is_a_failing_demo(home, fakes):
    fakes.acme.default = answer("")
    shown = run(home, "demo", TMPDIR=str(home / "tmp"))
    assert shown.returncode == 1
    assert "The demo failed: v1_" in shown.stderr
    assert_nothing_is_left(home)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_in_the_middle_it_leaves_no_process(home, fakes, number):
    pieces = tuple(TextDelta("word ") for _ in range(40))
    fakes.acme.default = Reply(events=pieces, gap_s=0.1)
    process = subprocess.Popen(
        [COMMAND, "demo"],
        cwd=home,
        env=environment(home, TMPDIR=str(home / "tmp")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not fakes.acme.requests and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    expected = -number if number == signal.SIGKILL else 128 + number
    assert process.wait(timeout=60) == expected
    deadline = time.monotonic() + 40
    while family(home) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert family(home) == []


def test_a_data_folder_of_ones_own_stays(home, fakes):
    answer = run(home, "demo", "--data-dir", str(home / "data"), TMPDIR=str(home / "tmp"))
    assert answer.returncode == 0, answer.stderr
    assert any((home / "data").iterdir())
    assert_nothing_is_left(home)


def settings(**values: object) -> Settings:
    return Settings.model_validate(values)


ACME = {"acme": {"kind": "openai", "base_url": "https://llm.acme.example/v1"}}


@pytest.mark.parametrize(
    ("values", "wanted", "model"),
    [
        ({"providers": {"gemini": {"kind": "gemini"}}}, None, "gemini/gemini-flash-latest"),
        ({"providers": {"o": {"kind": "openai"}}}, None, "o/gpt-5-mini"),
        ({"providers": {"a": {"kind": "anthropic"}}}, None, "a/claude-haiku-4-5"),
        ({"providers": ACME, "models": {"default": "acme/large"}}, None, "acme/large"),
        ({"providers": ACME, "models": {"aliases": {"x": "acme/small"}}}, None, "acme/small"),
        ({"providers": ACME, "models": {"default": "acme/large"}}, "acme/tiny", "acme/tiny"),
    ],
)
def test_a_configured_model_comes_before_the_local_one(values, wanted, model):
    choice = demo_model.choose(settings(**values), wanted)
    assert (choice.model, choice.weights) == (model, None)


def test_a_provider_whose_models_are_unknown_is_named():
    with pytest.raises(SetupError, match=r"set models\.default = 'acme/<model>'"):
        demo_model.choose(settings(providers=ACME), None)


@pytest.mark.parametrize("wanted", ["smollm2-135m", "local/smollm2-135m"])
def test_a_local_model_comes_with_its_weights(wanted):
    choice = demo_model.choose(settings(), wanted)
    assert choice.model == "local/smollm2-135m"
    assert choice.weights is not None
    assert choice.weights.name == "smollm2-135m"


def test_without_anything_configured_a_local_model_is_chosen():
    choice = demo_model.choose(settings(), None)
    assert choice.weights is not None
    assert choice.model == f"local/{choice.weights.name}"


def test_an_own_file_is_not_downloaded(tmp_path):
    choice = demo_model.choose(settings(local={"gguf": tmp_path / "mine.gguf"}), None)
    assert (choice.model, choice.weights) == ("local/mine", None)


def test_the_progress_bar_without_a_terminal_is_a_few_lines(capsys):
    progress = models.bar()
    for done in range(0, 10_000_001, 1000):
        progress(done, 10_000_000)
    progress(10_000_000, 10_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 3
    assert lines[-1] == "100%  10 of 10 MB"
