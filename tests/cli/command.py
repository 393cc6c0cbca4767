"""The command as a process, in a home of its own and without anybody's settings."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from openinteractions.db import embedded_home, embedded_server

COMMAND = Path(sys.executable).with_name("openinteractions")
KEY = "oi_command-line-tests-0123456789-abcdefghij"
START_S = 60


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    mine = {"HOME": str(home), "OI_DATA_DIR": str(home / "data"), "OI_SANDBOX__ENABLED": "off"}
    return {**kept, **mine, **variables}


def run(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=home,
        env=environment(home, **variables),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def ran(home: Path, *arguments: str) -> str:
    """What a command that must succeed says on standard output."""
    answer = run(home, *arguments)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def refused(home: Path, *arguments: str, **variables: str) -> str:
    """The message of a command that the operator has to mend."""
    answer = run(home, *arguments, **variables)
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    messages = [line for line in answer.stderr.splitlines() if not line.startswith("{")]
    assert messages[0].startswith("openinteractions: ")
    return "\n".join(messages)


@dataclass
class Serving:
    """A running `serve`."""

    process: "subprocess.Popen[bytes]"
    home: Path
    log: Path
    url: str = ""
    seconds: float = 0
    """From start to ready."""
    family: list[psutil.Process] = field(default_factory=list)

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines()]

    def lines(self) -> list[dict[str, object]]:
        text = self.log.read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def output(self) -> str:
        return (self.home / "serve.out").read_text()

    def status(self, key: str, path: str = "/v1beta/interactions/v1_0") -> int:
        request = urllib.request.Request(self.url + path, headers={"x-goog-api-key": key})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def end(self, number: int) -> int:
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def serving(home: Path, *arguments: str, **variables: str) -> Generator[Serving]:
    """Run `serve` until it is ended, at the latest when the context ends."""
    log = home / "serve.log"
    began = time.monotonic()
    with log.open("wb") as err, (home / "serve.out").open("wb") as out:
        process = subprocess.Popen(
            [COMMAND, "serve", "--port", "0", *arguments],
            cwd=home,
            env=environment(home, **variables),
            stdout=out,
            stderr=err,
        )
    server = Serving(process, home, log)
    try:
        while not server.url:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - began < START_S, log.read_text()
            ready = [line for line in server.lines() if line["event"] == "server.ready"]
            if ready:
                server.url = str(ready[0]["url"])
            time.sleep(0.01)
        server.seconds = time.monotonic() - began
        yield server
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def still_running(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running()]


def database_processes(home: Path) -> list[int]:
    return embedded_server.stragglers(embedded_home.where(home / "data") / "data")
