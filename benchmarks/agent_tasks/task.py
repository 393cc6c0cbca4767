"""What a task is, and how its outcome is looked at."""

import base64
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

IMAGE = "openinteractions/sandbox:slim"
_RUN_S = 60

Content: TypeAlias = str | bytes
Call: TypeAlias = tuple[str, dict[str, Any]]
"""A tool and its arguments."""


class Failed(Exception):
    """The outcome is not what was asked for; the message says why."""


class Files:
    """The environment's files after the run, read as they are asked for."""

    def __init__(self, read: Callable[[str], bytes | None]) -> None:
        self._read = read

    def data(self, path: str) -> bytes:
        """A file's bytes."""
        found = self._read(path)
        if found is None:
            raise Failed(f"{path} is missing")
        return found

    def text(self, path: str) -> str:
        """A file's text, with line ends as Unix has them."""
        return self.data(path).decode("utf-8", errors="replace").replace("\r\n", "\n")

    def json(self, path: str) -> Any:
        """A file's JSON."""
        try:
            return json.loads(self.text(path))
        except ValueError:
            raise Failed(f"{path} is not JSON") from None

    def has(self, path: str) -> bool:
        """Whether there is such a file."""
        return self._read(path) is not None


Check: TypeAlias = Callable[[Files, str], None]
"""Looks at the files and the final answer.

Raises:
    Failed: The task was not done.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task."""

    id: str
    prompt: str
    files: Mapping[str, Content]
    """The environment's at the start, by their paths."""
    check: Check
    script: Sequence[Sequence[Call]]
    """What a good model might do: the calls of each of its turns."""
    answer: str
    """Its final answer."""
    network: str | None = "disabled"

    def environment(self) -> dict[str, Any]:
        """As an interaction's `environment`."""
        sources = [_source(path, content) for path, content in self.files.items()]
        return {
            "type": "remote",
            "sources": sources,
            **({} if self.network is None else {"network": self.network}),
        }

    def problem(self, files: Files, answer: str) -> str | None:
        """Why the outcome does not count; None if it does."""
        try:
            self.check(files, answer)
        except Failed as failure:
            return str(failure)
        return None

    def untouched(self) -> Files:
        """The files as they were at the start."""
        return Files(lambda path: _bytes(self.files[path]) if path in self.files else None)


def require(claim: object, otherwise: str) -> None:
    """Fail unless a claim is true."""
    if not claim:
        raise Failed(otherwise)


def number_in(text: str, expected: float, *, tolerance: float = 0.005) -> bool:
    """Whether a number of about this size stands in a text, however it is grouped."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return any(abs(float(n.replace(",", "")) - expected) <= tolerance for n in found)


def run(files: Mapping[str, Content], command: str) -> str:
    """Run what a model has written: in a container of its own, without network.

    Returns:
        What it wrote to its standard output.

    Raises:
        Failed: It ended badly.
    """
    limits = ["--network", "none", "--memory", "512m", "--pids-limit", "128", "--cap-drop", "ALL"]
    script = f"mkdir /tmp/t && cd /tmp/t && tar xf - && {command}"
    try:
        done = subprocess.run(
            ["docker", "run", "--rm", "-i", *limits, IMAGE, "bash", "-c", script],
            input=_tar(files),
            capture_output=True,
            timeout=_RUN_S,
            check=False,
        )
    except FileNotFoundError:
        raise Failed("cannot be checked without docker") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"`{command}` did not end") from None
    if done.returncode != 0:
        raise Failed(f"`{command}` failed: {done.stderr.decode(errors='replace')[-300:]}")
    return done.stdout.decode(errors="replace")


def bash(code: str) -> Call:
    """A call of `code_execution`."""
    return "code_execution", {"language": "bash", "code": code}


def python(code: str) -> Call:
    """A call of `code_execution`."""
    return "code_execution", {"language": "python", "code": code}


def _bytes(content: Content) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _source(path: str, content: Content) -> dict[str, str]:
    if isinstance(content, str):
        return {"type": "inline", "target": path, "content": content}
    encoded = base64.b64encode(content).decode()
    return {"type": "inline", "target": path, "content": encoded, "encoding": "base64"}


def _tar(files: Mapping[str, Content]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, content in files.items():
            data = _bytes(content)
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
