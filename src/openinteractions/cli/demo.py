"""`demo`: the server at work, step by step, from nothing and back to nothing.

A server of its own is started as a child process and talked to with the official SDK, as any
application would. Everything that is shown is checked, and nothing runs or stays afterwards.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from google import genai
from google.genai.types import HttpOptions

from openinteractions import ids
from openinteractions.cli import demo_agent, demo_model, models
from openinteractions.cli.demo_model import Choice
from openinteractions.cli.demo_sandbox import DemoSandboxes
from openinteractions.cli.server_process import ServerProcess
from openinteractions.db import embedded_home
from openinteractions.errors import AppError
from openinteractions.settings import Settings

_KEY: Final = ids.api_key()
_STILL_WORKING_EVERY_S: Final = 10.0
_LOG_LINES: Final = 15
_BRIEF: Final[dict[str, Any]] = {"max_output_tokens": 400}
_FIRST: Final = "My name is Ada and I grow tomatoes. Greet me by name, in one short sentence."
_SECOND: Final = "What is my name, and what do I grow? Answer in one short sentence."
_THIRD: Final = "Write four short lines about a tomato plant."


class DemoFailed(AppError):
    """Something that was shown did not hold."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An interaction that was shown, to be found again."""

    id: str
    text: str


def demo(settings: Settings, *, model: str | None, config: Path | None, keep: bool) -> None:
    """Run the demo; it ends with exit code 0, or with a message and another one.

    Raises:
        SetupError: The settings name no model that could be asked.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    began = time.monotonic()
    choice = demo_model.choose(settings, model)
    try:
        with _folder(keep=keep) as folder:
            _introduce(choice)
            if choice.weights is not None:
                asyncio.run(models.download(settings, choice.weights))
            home = settings.home() if settings.data_dir else folder / "data"
            sandboxes = DemoSandboxes(settings)
            server = _server(home, folder / "serve.log", config, sandboxes.environment(home))
            _run(server, choice, sandboxes)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    print(f"\nAll of it holds. {time.monotonic() - began:.0f} s, and nothing is left running.")
    _explain_how_to_go_on(choice)


@contextmanager
def _folder(*, keep: bool) -> Generator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="openinteractions-demo-"))
    if os.geteuid() == 0:
        # The database's account, `nobody`, has to get in.
        folder.chmod(0o711)
    try:
        yield folder
    finally:
        if keep:
            print(f"\nKept: {folder}")
        else:
            place = embedded_home.where(folder / "data")
            for path in (place, folder):
                shutil.rmtree(path, ignore_errors=True)


def _introduce(choice: Choice) -> None:
    print(f"OpenInteractions: a demo\n\nModel: {choice.model}")
    if choice.weights is None:
        print(f"       {choice.why}")
        sys.stdout.flush()
        return
    print(
        f"       {choice.weights.label}.\n"
        "       It runs on this machine, and it is often wrong. For a larger one, set\n"
        "       GEMINI_API_KEY, OPENAI_API_KEY or ANTHROPIC_API_KEY, or configure a provider\n"
        "       (docs/settings.md).",
        flush=True,
    )


def _server(
    home: Path, log: Path, config: Path | None, sandboxes: Mapping[str, str]
) -> ServerProcess:
    # An own database, whatever the settings say: a demo leaves no traces in yours.
    own = {"OI_BOOTSTRAP_API_KEY": _KEY, "OI_DATABASE_URL": ""}
    return ServerProcess(home, log=log, config=config, environment={**own, **sandboxes})


def _run(server: ServerProcess, choice: Choice, sandboxes: DemoSandboxes) -> None:
    try:
        with _failures_explained(server):
            _show(server, choice, sandboxes)
    finally:
        with _undisturbed():
            status = server.stop()
            sandboxes.clear()
    if status:
        raise DemoFailed(f"the server did not stop cleanly: exit status {status}")


def _show(server: ServerProcess, choice: Choice, sandboxes: DemoSandboxes) -> None:
    model = choice.model
    with _connected(_start(server)) as client:
        first = _create(client.interactions, model)
        second = _continue(client.interactions, model, first)
        third = _stream(client.interactions, model)
    _title("4. Kill the server (kill -9), start it again on the same data, and look")
    server.kill()
    with _connected(_start(server)) as client:
        for shown in (first, second, third):
            stored = client.interactions.get(shown.id)
            _require(_text(stored) == shown.text, f"{shown.id} came back with another text")
            print(f"   {shown.id}: {stored.status}, {len(stored.steps or [])} steps, the same text")
        _have_an_agent_work(client, choice, sandboxes.problem)


def _have_an_agent_work(client: Any, choice: Choice, problem: str | None) -> None:  # noqa: ANN401 - the SDK's type
    _title("5. An agent, in the background: it writes a program and runs it in its sandbox")
    if problem is not None:
        print(f"   Left out: it needs Docker and an image. {problem}")
        print("   `make sandbox` sets both up.", flush=True)
        return
    began = time.monotonic()
    with _waiting("the agent is working"):
        worked = demo_agent.work(client, choice)
    ended = worked.interaction
    _report(ended, time.monotonic() - began)
    if worked.is_right:
        print(f"   Fetched workspace/primes.txt: {' '.join((worked.file or '').split())}")
        return
    if choice.weights is None and ended.status == "failed":
        _require_completed(ended)
    left = "no primes.txt" if worked.file is None else "a primes.txt that is wrong"
    print(f"   It ended as {ended.status} and left {left}: the steps above are what it did.")
    if choice.weights is not None:
        print("   So small a model seldom manages this. Larger ones do.")


@contextmanager
def _connected(url: str) -> Generator[Any]:
    """The SDK's client; untyped, since its types are not complete."""
    options = HttpOptions(
        base_url=url,
        # A proxy that the environment names is not for this machine's own address.
        client_args={"trust_env": False},
    )
    with genai.Client(api_key=_KEY, vertexai=False, http_options=options) as client:
        yield cast("Any", client)


def _start(server: ServerProcess) -> str:
    began = time.monotonic()
    with _waiting("starting the server"):
        url = server.start()
    print(f"\nServer: {url}, ready after {time.monotonic() - began:.1f} s", flush=True)
    return url


def _create(interactions: Any, model: str) -> Shown:  # noqa: ANN401 - the SDK's type
    _title("1. Create an interaction")
    return _ask(interactions, model=model, input=_FIRST)


def _continue(interactions: Any, model: str, first: Shown) -> Shown:  # noqa: ANN401 - the SDK's type
    _title("2. Continue it: only its id and the new question are sent, the server keeps the rest")
    second = _ask(interactions, model=model, input=_SECOND, previous_interaction_id=first.id)
    stored: Any = interactions.get(second.id)
    _require(
        stored.previous_interaction_id == first.id, f"{second.id} does not continue {first.id}"
    )
    if "ada" in second.text.lower():
        print("   It remembered the name.")
    else:
        print("   The model was shown the name, but did not repeat it. Larger ones do.")
    return second


def _ask(interactions: Any, **request: Any) -> Shown:  # noqa: ANN401 - the SDK's own fields
    print(f"   > {request['input']}", flush=True)
    began = time.monotonic()
    with _waiting("the model is working"):
        answer: Any = interactions.create(generation_config=_BRIEF, **request)
    _require_completed(answer)
    text = _text(answer)
    print(_indented(text))
    _report(answer, time.monotonic() - began)
    _require(_text(interactions.get(answer.id)) == text, f"{answer.id} is not stored as sent")
    return Shown(answer.id, text)


def _stream(interactions: Any, model: str) -> Shown:  # noqa: ANN401 - the SDK's type
    _title("3. Stream one: the text as it comes")
    print(f"   > {_THIRD}\n   ", end="", flush=True)
    began = time.monotonic()
    pieces: list[str] = []
    first_s = 0.0
    last: Any = None
    events = interactions.create(model=model, input=_THIRD, stream=True, generation_config=_BRIEF)
    for event in events:
        if event.event_type == "step.delta" and event.delta.type == "text":
            if not pieces:
                first_s = time.monotonic() - began
            pieces.append(event.delta.text)
            print(event.delta.text.replace("\n", "\n   "), end="", flush=True)
        elif event.event_type == "interaction.completed":
            last = event.interaction
        elif event.event_type == "error":
            raise DemoFailed(f"the stream ended in an error: {event.error.message}")
    print()
    _require(last is not None, "the stream ended without its last event")
    text = "".join(pieces)
    stored: Any = interactions.get(last.id)
    _require_completed(stored)
    _require(text != "" and _text(stored) == text, f"{last.id} is not stored as it was streamed")
    _report(stored, time.monotonic() - began)
    print(f"   {len(pieces)} pieces, the first after {first_s:.1f} s")
    return Shown(last.id, text)


def _require_completed(interaction: Any) -> None:  # noqa: ANN401 - the SDK's type
    if interaction.status != "completed":
        errors: list[Any] = interaction.errors or []
        reasons = "; ".join(str(error.message) for error in errors)
        raise DemoFailed(f"{interaction.id} is {interaction.status}. {reasons}")
    _require(_text(interaction) != "", f"{interaction.id} is completed, but has no text")
    _require(bool(interaction.steps), f"{interaction.id} is completed, but has no steps")


def _require(holds: object, otherwise: str) -> None:
    if not holds:
        raise DemoFailed(otherwise)


def _text(interaction: Any) -> str:  # noqa: ANN401 - the SDK's type
    return interaction.output_text or ""


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)


def _indented(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.strip().splitlines())


def _report(interaction: Any, seconds: float) -> None:  # noqa: ANN401 - the SDK's type
    usage = interaction.usage
    print(
        f"   {interaction.id}: {interaction.status}, {usage.total_input_tokens} tokens in,"
        f" {usage.total_output_tokens} out, {seconds:.1f} s",
        flush=True,
    )


@contextmanager
def _waiting(what: str) -> Generator[None]:
    """Say on standard error, every few seconds, that it still goes on."""
    over = threading.Event()

    def say() -> None:
        began = time.monotonic()
        while not over.wait(_STILL_WORKING_EVERY_S):
            seconds = time.monotonic() - began
            print(f"   … {what}, {seconds:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _failures_explained(server: ServerProcess) -> Generator[None]:
    """A failure ends the demo with what went wrong and what the server said last."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nStopping …", file=sys.stderr, flush=True)
        raise
    except Exception as error:  # noqa: BLE001 - the boundary: whatever the SDK raises, too
        words = error.message if isinstance(error, AppError) else f"{type(error).__name__}: {error}"
        print("\nThe server's log ends so:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in server.tail(_LOG_LINES)), file=sys.stderr)
        print(f"\nThe demo failed: {words}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _undisturbed() -> Generator[None]:
    """Clean up to the end, also after a second Ctrl-C."""
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in stopping}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(TypeError):
                signal.signal(number, handler)


def _explain_how_to_go_on(choice: Choice) -> None:
    print(
        f"""
Go on:
  make serve                the server, on http://127.0.0.1:8080; its first start prints an API key

  curl http://127.0.0.1:8080/v1beta/interactions \\
    -H "x-goog-api-key: $KEY" -H "content-type: application/json" \\
    -d '{{"model": "{choice.model}", "input": "Hello"}}'

  from google import genai
  client = genai.Client(api_key=KEY, http_options={{"base_url": "http://127.0.0.1:8080"}})
  answer = client.interactions.create(model="{choice.model}", input="Hello")
  print(answer.output_text)"""
    )
