"""The container engine of the tests, by its command line: what they start, and what they leave."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import pytest

SLIM = "openinteractions/sandbox:slim"
"""Without a browser: for every test that needs none."""
FULL = "openinteractions/sandbox:latest"

# What the product starts containers with, for tests that start their own.
HARDENED = (
    *("--network", "none", "--read-only", "--user", "1000:1000"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--pids-limit", "256", "--memory", "1g", "--memory-swap", "1g", "--cpus", "2"),
    *("--log-driver", "none", "--shm-size", "64m"),
    *("--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=128m,mode=1777"),
    *("--tmpfs", "/run:rw,noexec,nosuid,nodev,size=8m"),
)
# In place of the three folders of an environment.
FOLDERS = tuple(
    part
    for folder in ("/workspace", "/.agents", "/home/agent")
    for part in ("--tmpfs", f"{folder}:rw,exec,nosuid,nodev,size=128m,uid=1000,gid=1000,mode=755")
)


def _run_id() -> str:
    """One for each test process: a process that is done must not clean up after a busy one."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)[:8]
    return f"t{run}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"


@dataclass(frozen=True, slots=True)
class DockerEngine:
    """An engine that answers, and has the image."""

    run_id: str = field(default_factory=_run_id)

    @property
    def label(self) -> str:
        """What every container of a test has to be labelled with, one way or the other."""
        return f"openinteractions.test={self.run_id}"

    def broker_name(self, suffix: str) -> str:
        """A broker's name that marks its containers as ours."""
        return f"{self.run_id}-{suffix}"

    def require(self, image: str) -> None:
        """Fail the test if the image is missing."""
        if docker("image", "inspect", "--format", "{{.Id}}", image, check=False).returncode:
            pytest.fail(_missing(f"the image {image} is missing"), pytrace=False)

    def start(self, image: str, *options: str, argv: Sequence[str] = ("sleep", "600")) -> str:
        """Start a hardened container; return its id."""
        command = ["run", "--detach", "--label", self.label, *HARDENED, *FOLDERS, *options]
        return docker(*command, image, *argv).stdout.strip()

    def remove(self, container: str) -> None:
        docker("rm", "--force", "--volumes", container, check=False)

    def containers(self, label: str) -> list[str]:
        """The ids of all containers with this label (`key` or `key=value`), stopped ones too."""
        listed = docker("ps", "--all", "--no-trunc", "--quiet", "--filter", f"label={label}")
        return listed.stdout.split()

    def leftovers(self) -> dict[str, str]:
        """The containers that tests of this process started and have not removed: id and name."""
        columns = '{{.ID}}\t{{.Names}}\t{{.Label "openinteractions.broker"}}'
        ours = f"label={self.label}"
        rows = docker("ps", "--all", "--filter", ours, "--format", columns).stdout.splitlines()
        brokers = "label=openinteractions.broker"
        of_brokers = docker("ps", "--all", "--filter", brokers, "--format", columns).stdout
        rows += [row for row in of_brokers.splitlines() if f"\t{self.run_id}-" in row]
        return dict(row.split("\t")[:2] for row in rows)


def docker(
    *argv: str, stdin: str | None = None, check: bool = True, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run the docker command; with `check`, fail the test with what it said if it fails."""
    done = subprocess.run(
        ["docker", *argv],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    if check and done.returncode:
        said = (done.stderr or done.stdout)[-2000:]
        pytest.fail(f"docker {' '.join(argv)[:200]} ended with {done.returncode}:\n{said}")
    return done


def _missing(what: str) -> str:
    said = os.environ.get("TEST_DOCKER_PROBLEM")
    return f"{what}: run `scripts/docker && scripts/sandbox-image slim full`" + (
        f" (`make test` did: {said})" if said else ""
    )


@pytest.fixture(scope="session")
def docker_engine() -> Generator[DockerEngine]:
    """An engine with the slim image; at the end, whatever tests left there is an error."""
    if shutil.which("docker") is None:
        pytest.fail(_missing("no docker command"), pytrace=False)
    answer = docker("version", "--format", "{{.Server.Version}}", check=False)
    if answer.returncode:
        pytest.fail(_missing(f"no engine ({answer.stderr.strip()[-200:]})"), pytrace=False)
    engine = DockerEngine()
    engine.require(SLIM)
    yield engine
    left = engine.leftovers()
    for container in left:
        engine.remove(container)
    assert not left, f"tests left containers behind: {', '.join(left.values())}"
