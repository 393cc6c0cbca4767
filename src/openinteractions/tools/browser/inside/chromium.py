"""The one browser of a sandbox: found running, or started; it outlives the command that did so."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from openinteractions.tools.browser.inside.cdp import Connection, Late, Lost, Refused

FOLDER = Path(os.path.expanduser("~/.browser"))  # noqa: PTH111 - Path.home() raises without HOME
"""Its profile (cookies stay with the environment's files), and what is known of its tabs."""

_PROFILE = FOLDER / "profile"
_PORT = _PROFILE / "DevToolsActivePort"
_PROCESS = FOLDER / "process"
_START_S = 30.0
_FLAGS = (
    "--headless",
    # A free one, told in a file: a page cannot know it.
    "--remote-debugging-port=0",
    f"--user-data-dir={_PROFILE}",
    "--window-size=1280,900",
    "--hide-scrollbars",
    "--mute-audio",
    "--disk-cache-size=33554432",
    "--no-first-run",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-breakpad",
    # The container is the sandbox, so that processes of their own protect no site from another;
    # without them a page and its frames are one process, and fit into half a gigabyte.
    "--no-zygote",
    "--in-process-gpu",
    "--disable-site-isolation-trials",
    "--disable-features=IsolateOrigins,site-per-process,Translate,MediaRouter",
)


class Absent(Exception):
    """The sandbox's image has no browser."""


class Broken(Exception):
    """The browser does not start; the message says what is known."""


def connect() -> Connection:
    """A connection to the browser, started if none runs that answers.

    Raises:
        Absent: There is none.
        Broken: It does not start.
    """
    program = shutil.which("chromium")
    if program is None:
        raise Absent
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = _connected()
    if found is not None:
        return found
    stop()
    return _start(program)


def stop() -> None:
    """Kill what runs, or hangs."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(_PROCESS.read_text())
        pid = int(known["pid"])
        if _started(pid) == known["started"]:
            os.killpg(pid, signal.SIGKILL)
    for left in (_PROCESS, _PORT, *_PROFILE.glob("Singleton*")):
        with contextlib.suppress(OSError):
            left.unlink()


def identity() -> str:
    """What tells one start of the browser from the next."""
    with contextlib.suppress(OSError):
        return _PORT.read_text()
    return ""


def proxy() -> tuple[str, int] | None:
    """The sandbox's way out."""
    name, _, port = os.environ.get("http_proxy", "").rpartition("//")[2].strip("/").partition(":")  # noqa: TID251
    return (name, int(port)) if name and port.isdigit() else None


def _connected() -> Connection | None:
    try:
        port, path = _PORT.read_text().split()
        connection = Connection(int(port), path)
    except (OSError, ValueError, Lost):
        return None
    with contextlib.suppress(Late, Lost, Refused):
        connection.call("Browser.getVersion", timeout_s=5.0)
        return connection
    connection.close()
    return None


def _start(program: str) -> Connection:
    way = proxy()
    process = subprocess.Popen(  # noqa: S603 - found in the image's PATH
        [program, *_FLAGS, *([f"--proxy-server=http://{way[0]}:{way[1]}"] if way else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/tmp",  # noqa: S108 - the sandbox's own
        start_new_session=True,
    )
    _PROCESS.write_text(json.dumps({"pid": process.pid, "started": _started(process.pid)}))
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Broken(f"It ended with status {process.returncode} as it started.")
        connection = _connected()
        if connection is not None:
            # It is not waited for: it goes on after this process.
            process.returncode = 0
            return connection
        time.sleep(0.03)
    stop()
    raise Broken(f"It did not answer within {_START_S:g} seconds.")


def _started(pid: int) -> str:
    """When a process began, in the system's own units: a number that comes again is another's."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[19]
