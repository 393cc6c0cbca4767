"""The image: every promised tool works as an ordinary user, read-only and without a network."""

import base64
import io
import tarfile
import textwrap
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sandbox.engine import FULL, SLIM, DockerEngine, docker

BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
URL = "https://localhost:8443"


@dataclass(frozen=True)
class Box:
    """A running container."""

    id: str

    def sh(self, script: str, *, timeout_s: float = 60) -> str:
        """What the script says on both streams; the test fails if it fails."""
        argv = ("exec", "--interactive", self.id, "bash", "-euo", "pipefail")
        done = docker(*argv, stdin=f"exec 2>&1\n{script}", check=False, timeout_s=timeout_s)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, script: str) -> str:
        return self.sh(f"python3 -W error - <<'END'\n{textwrap.dedent(script)}\nEND\n")


@pytest.fixture(scope="module")
def box(docker_engine: DockerEngine) -> Generator[Box]:
    container = docker_engine.start(SLIM)
    yield Box(container)
    docker_engine.remove(container)


@pytest.fixture(scope="module")
def browser_box(docker_engine: DockerEngine) -> Generator[Box]:
    docker_engine.require(FULL)
    container = docker_engine.start(FULL)
    yield Box(container)
    docker_engine.remove(container)


TOOLS = """
python python3 pip node npm git curl wget jq rg fd tree zip xz file patch gawk bc less ps sqlite3
rsync ss tini bash openssl fc-list; ip -V; unzip -v; lsof -v; pdftotext -v; pdftoppm -v
"""


def test_every_promised_tool_starts(box: Box) -> None:
    plain, *others = TOOLS.split(";")
    commands = [f"{tool} --version" for tool in plain.split()] + [other.strip() for other in others]
    tried = "\n".join(
        f"{command} >/dev/null 2>&1 || echo '{command}' ends with $?" for command in commands
    )
    assert box.sh(tried) == ""


def test_it_runs_as_an_ordinary_user_without_rights(box: Box) -> None:
    said = box.sh("id; grep CapEff /proc/self/status; pwd; echo $HOME; ls -A /sys/class/net")

    assert said.splitlines() == [
        "uid=1000(agent) gid=1000(agent) groups=1000(agent)",
        "CapEff:\t0000000000000000",
        "/workspace",
        "/home/agent",
        "lo",
    ]
    assert box.sh("find / -xdev -type f -perm /6000 2>/dev/null || true") == ""
    assert "Read-only file system" in box.sh("touch /usr/x || true")


@pytest.mark.parametrize("folder", ["/workspace", "/.agents", "/home/agent"])
def test_the_mounted_folders_belong_to_the_user_without_a_mount_too(
    docker_engine: DockerEngine, folder: str
) -> None:
    asked = ("run", "--rm", "--network", "none", "--label", docker_engine.label, SLIM)
    assert docker(*asked, "stat", "-c", "%u:%g", folder).stdout == "1000:1000\n"


def test_python_has_the_promised_packages(box: Box) -> None:
    said = box.python(
        """
        import bs4, numpy, pandas, pathlib, requests, yaml
        print(pandas.DataFrame({"a": numpy.arange(4)}).a.sum(), yaml.safe_load("b: [1]"))
        print(bs4.BeautifulSoup("<p>hi", "html.parser").p.text)
        print(numpy.linalg.solve([[2, 0], [0, 4]], [1, 1]))
        print("openblas" in pathlib.Path("/proc/self/maps").read_text())
        """
    )
    assert said == "6 {'b': [1]}\nhi\n[0.5  0.25]\nTrue\n"


def test_python_packages_still_import_without_the_tests_we_leave_out(box: Box) -> None:
    modules = "numpy.testing, pandas.testing, scipy.stats, scipy.signal, sympy, mpmath, lxml.html"
    assert box.python(f"import {modules}; print('ok')") == "ok\n"


def test_matplotlib_draws_and_poppler_reads_its_pdf(box: Box) -> None:
    said = box.sh(
        """
        cd "$(mktemp -d -p /workspace)"
        python3 -W error - <<'END'
import matplotlib.pyplot as plt
plt.plot([1, 3, 2]); plt.title("Über 100 %"); plt.savefig("a.png"); plt.savefig("a.pdf")
END
        file -b a.png
        pdftotext a.pdf - | grep Über
        pdftoppm -r 50 -png a.pdf page && file -b page-1.png
        """
    )
    assert said.count("PNG image data") == 2
    assert "Über 100 %" in said
    assert "font cache" not in said


def test_text_tools_work_together(box: Box) -> None:
    said = box.sh(
        """
        cd "$(mktemp -d -p /workspace)"
        echo '{"a": {"b": 42}}' >one.json
        jq .a.b one.json; rg --no-filename -o '"b"' .; fd -e json
        zip -q a.zip one.json && unzip -p a.zip | xz | xz -d | wc -c
        sqlite3 :memory: 'select 6 * 7'; gawk 'BEGIN { print 7 * 8 }'; echo '2 ^ 10' | bc
        """
    )
    assert said.split() == ["42", '"b"', "one.json", "17", "42", "56", "1024"]


def test_git_commits_without_being_configured(box: Box) -> None:
    said = box.sh(
        """
        cd "$(mktemp -d -p /workspace)" && git init -q . && echo hi >a && git add a
        git commit -q -m first && git log --format='%an %s' && git branch --show-current
        """
    )
    assert said == "agent first\nmain\n"


def test_node_runs(box: Box) -> None:
    said = box.sh("""node -e 'console.log([3, 1].sort(), typeof fetch)'""")
    assert said == "[ 1, 3 ] function\n"


WHEEL = r"""
import zipfile
info = "greet-1.0.dist-info/"
with zipfile.ZipFile("greet-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("greet.py", "def main(): print('hello from', __file__)\n")
    wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: greet\nVersion: 1.0\n")
    wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    wheel.writestr(info + "entry_points.txt", "[console_scripts]\ngreet = greet:main\n")
    wheel.writestr(info + "RECORD", "")
"""


def test_pip_installs_into_the_home_folder_and_into_a_venv(box: Box) -> None:
    said = box.sh(
        f"""
        cd "$(mktemp -d -p /workspace)" && python3 - <<'END'
{WHEEL}
END
        pip install -q --no-index ./greet*.whl
        greet
        python3 -m venv venv && venv/bin/pip install -q --no-index ./greet*.whl
        venv/bin/greet
        """
    )
    home, venv = said.splitlines()[-2:]
    assert home.startswith("hello from /home/agent/.local/lib/python3")
    assert venv.startswith("hello from /workspace/")
    assert "error" not in said


def test_npm_installs_commands_into_the_home_folder(box: Box) -> None:
    said = box.sh(
        """
        cd "$(mktemp -d -p /workspace)"
        echo '{"name": "nod", "version": "1.0.0", "bin": {"nod": "nod.js"}}' >package.json
        printf '#!/usr/bin/env node\\nconsole.log("nodded")\\n' >nod.js && chmod +x nod.js
        npm pack --silent && npm install --global --offline --silent ./nod-1.0.0.tgz && nod
        command -v nod
        """
    )
    assert said.splitlines()[-2:] == ["nodded", "/home/agent/.npm-global/bin/nod"]


def test_its_first_process_buries_orphans(box: Box) -> None:
    assert box.sh("cat /proc/1/cmdline | tr '\\0' ' '").startswith("/usr/bin/tini -g -- sleep")
    box.sh("for i in 1 2 3 4 5; do (sleep 0.05 &) ; done; sleep 0.4")
    assert "Z" not in box.sh("ps -A -o stat= -o comm= | awk '{ print $1 }'")


def test_a_signal_to_its_first_process_reaches_the_whole_group(docker_engine: DockerEngine) -> None:
    container = docker_engine.start(SLIM, argv=("bash", "-c", "sleep 600 & wait"))
    try:
        docker("kill", "--signal", "TERM", container)
        ended = docker("wait", container, timeout_s=10)
    finally:
        docker_engine.remove(container)
    assert ended.stdout.strip() == str(128 + 15)


HTTPS_SERVER = """
import http.server, ssl
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"<p id=x>trusted</p>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8443), Handler)
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain("/tls/leaf.pem", "/tls/leaf.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""

MINT = """
cd "$(mktemp -d)"
new="openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
$new -keyout ca.key -out ca.pem -subj '/CN=Test authority' \\
  -addext keyUsage=critical,keyCertSign 2>/dev/null
$new -CA ca.pem -CAkey ca.key -keyout leaf.key -out leaf.pem -subj /CN=localhost \\
  -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE 2>/dev/null
tar -c ca.pem leaf.pem leaf.key | base64
"""


@pytest.fixture(scope="module")
def tls(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a certificate for localhost, and the image's bundle with that authority."""
    folder = tmp_path_factory.mktemp("tls")
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(box.sh(MINT)))) as made:
        made.extractall(folder, filter="data")
    bundle = box.sh(f"cat {BUNDLE}") + (folder / "ca.pem").read_text()
    (folder / "bundle.pem").write_text(bundle)
    for file in folder.iterdir():
        file.chmod(0o644)
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["trusted", "untrusted"])
def https(
    request: pytest.FixtureRequest, docker_engine: DockerEngine, tls: Path
) -> Generator[tuple[Box, bool]]:
    """A box with a server of that authority, with and without the bundle mounted."""
    docker_engine.require(FULL)
    mounts = ["--volume", f"{tls}:/tls:ro"]
    if request.param:
        mounts += ["--volume", f"{tls}/bundle.pem:{BUNDLE}:ro"]
    container = docker_engine.start(FULL, *mounts, argv=("python3", "-c", HTTPS_SERVER))
    box = Box(container)
    try:
        box.sh(f"curl -ksS --retry 20 --retry-connrefused --retry-delay 1 {URL}")
        yield box, request.param
    finally:
        docker_engine.remove(container)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(f"curl -fsS {URL}", id="curl"),
        pytest.param(f"wget -nv -O- {URL}", id="wget"),
        pytest.param(f"git ls-remote {URL}/a.git", id="git"),
        pytest.param(f"pip download --retries 0 --no-deps -i {URL} nothing", id="pip"),
        pytest.param(f"npm view nothing --fetch-retries=0 --registry {URL}", id="npm"),
        pytest.param(f"""node -e 'fetch("{URL}").then(x => x.text())'""", id="node"),
        pytest.param(
            f"""node -e 'require("https").get("{URL}", x => x.pipe(process.stdout))'""",
            id="node https",
        ),
        pytest.param(f"""python3 -c 'import requests; requests.get("{URL}")'""", id="requests"),
        pytest.param(
            f"""python3 -c 'import urllib.request as u; print(u.urlopen("{URL}").read())'""",
            id="urllib",
        ),
    ],
)
def test_one_bundle_says_whom_a_tool_trusts(https: tuple[Box, bool], command: str) -> None:
    box, is_trusted = https
    said = box.sh(f"{command} || true")
    assert ("certificate" in said.lower()) == (not is_trusted), said


def test_the_browser_trusts_the_mounted_bundle_too(https: tuple[Box, bool]) -> None:
    box, is_trusted = https
    said = box.sh(f"chromium --disable-gpu --dump-dom {URL} 2>/dev/null || true")
    assert ('<p id="x">trusted</p>' in said) == is_trusted, said


def test_the_browser_shows_a_page_as_text_and_as_a_picture(browser_box: Box) -> None:
    said = browser_box.sh(
        """
        page='data:text/html,<p id=x></p><script>x.textContent = 6 * 7</script>'
        chromium --disable-gpu --dump-dom "$page" 2>/dev/null
        chromium --disable-gpu --screenshot=a.png --window-size=300,200 "$page" 2>/dev/null
        file -b a.png
        """
    )
    assert '<p id="x">42</p>' in said
    assert "PNG image data, 300 x 200" in said


@pytest.mark.parametrize("language", ["en", "zh-cn", "zh-tw", "ja", "ko", "und-zsye"])
def test_there_are_fonts_for(browser_box: Box, language: str) -> None:
    assert browser_box.sh(f"fc-list :lang={language} | head -1")
