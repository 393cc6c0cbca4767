"""The demo's agent: it writes a program, runs it in its sandbox, and leaves a file."""

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from openinteractions.cli.demo_model import Choice
from openinteractions.wire import deltas
from openinteractions.wire.fields import Json

TASK: Final = (
    "Write a Python program, /workspace/primes.py, that writes the first ten prime numbers into "
    "/workspace/primes.txt, one a line. Run it, look at what it wrote, and tell me their sum."
)
_RIGHT: Final = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
_LIMITS: Final = {"max_steps": 40, "max_seconds": 180}
_UNTIL_UP_S: Final = 60.0
_PAUSE_S: Final = 0.5
_UNREADY: Final = 503
_NOT_FOUND: Final = 404
_WIDTH: Final = 92
_LINES: Final = 12


@dataclass(frozen=True, slots=True)
class Worked:
    """How an agent ended."""

    interaction: Any
    """As the SDK has it."""
    file: str | None
    """What it left in primes.txt, if anything."""

    @property
    def is_right(self) -> bool:
        """Whether the file is what was asked for."""
        try:
            return [int(line) for line in (self.file or "").split()] == _RIGHT
        except ValueError:
            return False


def work(client: Any, choice: Choice) -> Worked:  # noqa: ANN401 - the SDK's types are not complete
    """Start the agent in the background, show its steps as they stream, and fetch its file."""
    warnings.filterwarnings("ignore", ".* usage is experimental", UserWarning)
    print(f"   > {TASK}", flush=True)
    started = _started(client, choice)
    print(f"   {started.id}: {started.status}; the caller is free, and looks on", flush=True)
    _show(client.interactions.get(started.id, stream=True))
    ended = client.interactions.get(started.id)
    file = _fetched(client, ended.environment_id)
    client.environments.delete(ended.environment_id)
    return Worked(ended, file)


def _started(client: Any, choice: Choice) -> Any:  # noqa: ANN401 - as above
    deadline = time.monotonic() + _UNTIL_UP_S
    while True:
        try:
            return client.interactions.create(
                agent="antigravity",
                input=TASK,
                environment="remote",
                tools=[{"type": "code_execution"}],
                agent_config={"type": "dynamic", "model": choice.model, **_LIMITS},
                background=True,
            )
        except Exception as error:
            # The broker may still be starting.
            if _status(error) != _UNREADY or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


def _status(error: Exception) -> object:
    """Of an HTTP error; its classes name it in two ways, and not all of them are public."""
    return getattr(error, "status_code", None) or getattr(error, "code", None)


def _show(events: Any) -> None:  # noqa: ANN401 - as above
    """Print each step when it is whole."""
    steps: dict[int, Json] = {}
    for event in events:
        match event.event_type:
            case "step.start":
                steps[event.index] = _plain(event.step)
            case "step.delta":
                deltas.merge(steps[event.index], _plain(event.delta))
            case "step.stop":
                _print_step(steps.pop(event.index))
            case _:
                pass


def _plain(part: Any) -> Json:  # noqa: ANN401 - as above
    return cast("Json", part.model_dump(mode="json", exclude_none=True))


def _print_step(step: Json) -> None:
    kind: str = step["type"]
    if kind.endswith("_call"):
        name = step["name"] if kind == "function_call" else kind.removesuffix("_call")
        _print("→", f"{name} {_arguments(step['arguments'])}")
    elif kind.endswith("_result"):
        _print("✗" if step.get("is_error") else "←", _said(step.get("result")) or "(nothing)")
    elif kind == "model_output":
        blocks: list[Json] = step.get("content", [])
        _print(" ", "".join(block.get("text", "") for block in blocks))


def _arguments(arguments: Mapping[str, Any]) -> str:
    """Short ones beside each other, long ones below; the language before the code."""
    values = [str(arguments[key]) for key in sorted(arguments, key=lambda key: key == "code")]
    short = [value for value in values if "\n" not in value.strip()]
    return "\n".join([" ".join(short), *(value for value in values if value not in short)])


def _said(result: object) -> str:
    return result if isinstance(result, str) else json.dumps(result)


def _print(mark: str, text: str) -> None:
    lines = text.strip().splitlines()
    for number, line in enumerate(lines[:_LINES]):
        print(f"   {mark if number == 0 else ' '} {_cut(line)}", flush=True)
    if len(lines) > _LINES:
        print(f"     … {len(lines) - _LINES} more lines", flush=True)


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def _fetched(client: Any, environment: str) -> str | None:  # noqa: ANN401 - as above
    """The file, if it is there."""
    try:
        data: bytes = client.environments.files.download(
            environment=environment, path="workspace/primes.txt"
        )
    except Exception as error:
        if _status(error) == _NOT_FOUND:
            return None
        raise
    return data.decode(errors="replace")
