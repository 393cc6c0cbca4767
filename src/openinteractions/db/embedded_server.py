"""One PostgreSQL server process: start it, find it again, tell whether it lives.

Everything here is quick but blocks: call it in a thread.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from openinteractions.db.embedded_home import ENVIRONMENT, SOCKET, Place

SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "synchronous_commit": "on",
    "min_wal_size": "64MB",
    "max_wal_size": "512MB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # SQL errors come back to us anyway, and their text may quote a user's.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_checkpoints": "off",
}
"""What fits one small server; the rest is PostgreSQL's own default."""
_MAX_LOG_BYTES = 10 * 2**20
_STATUS_LINE = 8


@dataclass(frozen=True, slots=True)
class Server:
    """A server process that was alive when it was looked for."""

    pid: int
    data: Path
    sockets: Path
    process: "subprocess.Popen[bytes] | None"
    """None if an earlier process of ours started it."""

    def is_alive(self) -> bool:
        """Whether it still runs; reaps it if it was our child."""
        if self.process is not None:
            return self.process.poll() is None
        return is_server(self.pid, self.data)

    def is_ready(self) -> bool:
        """Whether it takes connections."""
        written = read_pid_file(self.data)
        return written is not None and written[0] == self.pid and written[2] == "ready"

    def is_connectable(self) -> bool:
        """Whether its socket is where it was: temporary folders get swept."""
        return (self.sockets / SOCKET).exists()

    def send(self, number: signal.Signals) -> None:
        """Signal it, if it is still there."""
        if self.is_alive():
            _signal(self.pid, number)


def launch(place: Place, settings: Mapping[str, str]) -> Server:
    """Start a server. It is not ready yet, and may yet refuse to run."""
    options = [f"--{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
    descriptor = os.open(place.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [place.binaries / "postgres", "-D", place.data, "-k", place.sockets, *options],
            cwd="/",
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            # The terminal's Ctrl-C is for us: we stop it when its clients are gone.
            start_new_session=True,
            user=place.account.user,
            group=place.account.group,
            extra_groups=place.account.extra_groups,
        )
    finally:
        os.close(descriptor)
    return Server(process.pid, place.data, place.sockets, process)


def find(data: Path) -> Server | None:
    """The server that runs on this cluster already, if any."""
    written = read_pid_file(data)
    if written is None or not is_server(written[0], data):
        return None
    return Server(written[0], data, written[1], None)


def read_pid_file(data: Path) -> tuple[int, Path, str] | None:
    """The process, socket folder and status that a server wrote down; None if incomplete.

    https://github.com/postgres/postgres/blob/REL_18_STABLE/src/include/utils/pidfile.h
    """
    try:
        lines = (data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    if len(lines) < _STATUS_LINE or not lines[0].strip().isdigit():
        return None
    return int(lines[0]), Path(lines[4]), lines[_STATUS_LINE - 1].strip()


def is_server(pid: int, data: Path) -> bool:
    """Whether this process is a live PostgreSQL of this cluster, not a later owner of its number.

    All of them, and only they, are named `postgres` and work in the data folder.
    """
    if sys.platform != "linux":
        shown = subprocess.run(  # noqa: S603 - a fixed command
            ["/bin/ps", "-p", str(pid), "-o", "command="],
            capture_output=True,
            text=True,
            check=False,
        )
        return "postgres" in shown.stdout and str(data) in shown.stdout
    process = Path("/proc") / str(pid)
    try:
        name = (process / "comm").read_text(encoding="utf-8").strip()
        # A zombie has a name, but no folder any more.
        return name == "postgres" and (process / "cwd").readlink() == data.resolve()
    except OSError:
        return False


def stragglers(data: Path) -> list[int]:
    """Processes of this cluster that still run, with or without their parent."""
    if sys.platform != "linux":
        # PostgreSQL's own check of its shared memory has to do.
        return []
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in numbers if is_server(pid, data)]


def end(data: Path, number: signal.Signals) -> None:
    """Signal every process of this cluster."""
    for pid in stragglers(data):
        _signal(pid, number)


def forget(place: Place) -> None:
    """Remove the notes of a server that is gone with all its processes.

    PostgreSQL would refuse to start while its number is taken: by another program, after a
    reboot, or by its own zombie, where nobody reaps orphans.
    """
    if sys.platform == "linux":
        for note in (place.data / "postmaster.pid", place.sockets / f"{SOCKET}.lock"):
            note.unlink(missing_ok=True)


def rotate(path: Path) -> None:
    """Keep the log small: one old one is kept. The server goes on writing to the same file."""
    try:
        if path.stat().st_size < _MAX_LOG_BYTES:
            return
        path.with_suffix(".log.1").write_bytes(path.read_bytes())
        os.truncate(path, 0)
    except FileNotFoundError:
        return


def last_words(path: Path) -> str:
    """The end of the log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return " / ".join(lines[-3:])


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
