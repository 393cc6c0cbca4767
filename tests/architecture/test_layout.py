"""The shape of the code base: size, direction, and documents that keep up with it."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from openinteractions import errors
from openinteractions.sandbox import pipe, shipped
from openinteractions.settings import Settings
from openinteractions.tools.browser import tool

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/openinteractions"
MAX_LINES = 600
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def test_no_module_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_imports_go_one_way():
    lint = Path(sys.executable).with_name("lint-imports")
    answer = subprocess.run(
        [lint, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("name", ["sandbox", "tools", "broker"])
def test_late_packages_join_their_contracts(name):
    """import-linter refuses names that do not exist, so these two had to wait."""
    if not (PACKAGE / name).exists() and not (PACKAGE / f"{name}.py").exists():
        pytest.skip(f"{name} does not exist yet")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    field = {"sandbox": "source_modules", "tools": "source_modules", "broker": "allowed_importers"}[
        name
    ]
    contracts = config["tool"]["importlinter"]["contracts"]
    assert any(f"openinteractions.{name}" in contract.get(field, []) for contract in contracts)


@pytest.mark.parametrize(
    "names",
    [
        [f"openinteractions.sandbox.{name}" for name in (*pipe._MODULES, "supervisor.notebook")],
        [f"openinteractions.tools.browser.inside.{name}" for name in tool._MODULES],
    ],
    ids=["supervisor", "browser"],
)
def test_what_runs_in_a_sandbox_needs_only_python(names: list[str]):
    for place, name in enumerate(names):
        for imported in imports(shipped.text(name)):
            is_sent = any(earlier.startswith(imported) for earlier in names[:place])
            is_pythons = imported.partition(".")[0] in sys.stdlib_module_names
            assert is_sent or is_pythons, f"{name} imports {imported}"


def imports(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def documented() -> dict[str, tuple[str, str, str]]:
    """Setting → variable, default and meaning, as docs/settings.md has them."""
    rows: dict[str, tuple[str, str, str]] = {}
    for line in (ROOT / "docs/settings.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 4:
            name = cells[0].removeprefix("|").strip().strip("`")
            assert name not in rows, f"{name} is documented twice"
            rows[name] = (cells[1].strip("`"), cells[2].strip("`"), cells[3])
    return rows


def actual(group: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Setting and default of every field, `<name>` standing for the key of a table of groups."""
    for name, field in group.model_fields.items():
        inner, is_table = group_in(field.annotation)
        if inner is None or is_table:
            yield prefix + name, shown(field.get_default(call_default_factory=True))
        if inner is not None:
            yield from actual(inner, prefix + name + (".<name>." if is_table else "."))


def group_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The group that a field holds, and whether it holds a table of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if get_origin(annotation) is dict:
        return group_in(get_args(annotation)[1])[0], True
    return None, False


def shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "\N{EN DASH}"
    if isinstance(default, timedelta):
        seconds = default.total_seconds()
        if seconds < 1:
            return f'"{seconds * 1000:g}ms"'
        unit, size = next((u, s) for u, s in UNITS.items() if seconds >= s and seconds % s == 0)
        return f'"{seconds / size:g}{unit}"'
    return json.dumps(default, default=str)


def variable(setting: str) -> str:
    return "OI_" + setting.replace(".", "__").upper()


def test_every_setting_is_documented_with_its_variable_and_default():
    # The table of providers itself is described in words; its fields are rows.
    settings = {name: default for name, default in actual(Settings) if name != "providers"}
    rows = documented()
    assert sorted(rows) == sorted(settings)
    assert {name: row[0] for name, row in rows.items()} == {name: variable(name) for name in rows}
    assert {name: row[1] for name, row in rows.items()} == settings
    assert [name for name, row in rows.items() if len(row[2]) < 5] == []


def test_the_example_in_the_documentation_is_valid():
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    example = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    settings = Settings.model_validate(example)
    assert settings.providers["acme"].kind == "openai"
    assert settings.models.aliases == {"gemini-3-pro": "acme/large"}


def test_the_environment_example_names_real_settings():
    known = {variable(name) for name, _ in actual(Settings)}
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    names = {line.removeprefix("# ").split("=")[0] for line in lines if "=" in line}
    assert {name for name in names if name.startswith("OI_")} <= known


def all_errors(base: type[errors.AppError]) -> Iterator[type[errors.AppError]]:
    yield base
    for child in base.__subclasses__():
        yield from all_errors(child)


def test_every_error_has_a_code_of_its_own():
    """Bases that are never raised share the fallback `internal`."""
    ours = [kind for kind in all_errors(errors.AppError) if kind.__module__ == errors.__name__]
    coded = [kind for kind in ours if "code" in vars(kind)]
    codes = [kind.code for kind in coded]
    assert sorted(codes) == sorted(set(codes))
    uncoded = {kind.__name__ for kind in ours} - {kind.__name__ for kind in coded}
    assert uncoded == {"RequestError", "EngineError"}


def test_request_errors_are_the_callers_or_ask_to_retry():
    for kind in all_errors(errors.RequestError):
        assert 400 <= kind.status < 500 or issubclass(kind, errors.Unready)


def test_a_process_loads_large_libraries_only_where_they_are_needed():
    """They would be in the memory of every api and worker: pages are read in children."""
    program = "import sys, openinteractions.app; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    ).stdout.split()
    large = {"google.genai", "lxml", "mcp", "httpx2", "pypdf", "trafilatura", "xllamacpp"}
    assert "openinteractions.app" in loaded
    assert not large & set(loaded)
