"""Hooks around tools: what they are for, what they are told, and that a broken one lets go on."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from structlog.testing import capture_logs
from tests.tools.files import Files

from openinteractions.errors import LeaseLost, Unready
from openinteractions.models.port import Json, ToolCall
from openinteractions.sandbox.port import Exit
from openinteractions.tools import function
from openinteractions.tools.hooks import MAX_HOOKS, MAX_RULES, Hook, hooked, parse
from openinteractions.tools.port import Call, Done, Means
from openinteractions.tools.workspace import tools as workspace
from openinteractions.tools.workspace.tool import FileTool

SOURCE = ".agents/hooks.json"


@dataclass
class Shell:
    """Runs commands on this machine as a sandbox would; the same key only once."""

    ended: dict[str, Done] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    raises: Exception | None = None
    seconds: float | None = None

    async def execute(
        self,
        key: str,
        argv: Sequence[str],
        *,
        session: str | None = None,
        timeout_s: float,
        max_output_bytes: int,
    ) -> Done:
        if self.raises is not None:
            raise self.raises
        self.seconds = timeout_s
        if key not in self.ended:
            self.started.append(key)
            self.ended[key] = await self._run(argv, timeout_s)
        return self.ended[key]

    async def _run(self, argv: Sequence[str], timeout_s: float) -> Done:
        out = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            text, _ = await asyncio.wait_for(process.communicate(), timeout_s)
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            return Done(Exit(outcome="killed", timed_out=True), "")
        return Done(Exit(outcome="exited", code=process.returncode), text.decode())

    async def kill(self, key: str) -> None:
        self.killed.append(key)


@dataclass
class Tool:
    """A tool that keeps its calls."""

    name: str = "write_file"
    result: Any = "written"
    is_error: bool = False
    is_pure: bool = False
    calls: list[Call] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def declaration(self) -> Json:
        return {"type": "function", "name": self.name, "parameters": {}}

    def call_step(self, call: ToolCall) -> Json:
        return function.call_step(call)

    async def run(self, call: Call) -> Json:
        self.calls.append(call)
        return function.result_step(self.name, self.result, is_error=self.is_error)

    def failure(self, message: str) -> Json:
        return function.result_step(self.name, message, is_error=True)

    async def stop(self, key: str) -> None:
        self.stopped.append(key)


class McpTool(Tool):
    def call_step(self, call: ToolCall) -> Json:
        return {"type": "mcp_server_tool_call", "server_name": "s", "name": "t", "arguments": {}}


def call(arguments: Json | None = None, key: str = "7") -> Call:
    async def begin(note: Json) -> None:
        raise AssertionError("hooks need no notes")

    arguments = {"path": "a"} if arguments is None else arguments
    step = {"type": "function_call", "name": "write_file", "arguments": arguments, "id": "c"}
    return Call(step=step, key=key, begun=None, begin=begin)


def command(line: str, *, event: str = "pre", matcher: str = "*", **more: Any) -> Hook:
    return Hook(event=event, group="g", matcher=matcher, type="command", target=line, **more)


async def played(
    *hooks: Hook,
    tool: Tool | FileTool | None = None,
    shell: Shell | None = None,
    arguments: Json | None = None,
) -> tuple[Json, Tool, Shell]:
    """One call of a tool with these hooks around it."""
    tool, shell = tool or Tool(), shell or Shell()
    tools = hooked({tool.name: tool}, hooks, workplace=shell, environment_id="e1")
    return await tools[tool.name].run(call(arguments)), tool, shell


DENY = """echo '{"decision": "deny", "reason": "not on Mondays"}'"""


# ---- what they do


async def test_a_hook_may_deny_and_the_tool_does_not_run(tmp_path: Path):
    after = command(f"touch {tmp_path}/after", event="post")
    result, tool, shell = await played(command(DENY), command("echo {}"), after)
    assert result == {
        "type": "function_result",
        "name": "write_file",
        "result": "Denied by a hook: not on Mondays",
        "is_error": True,
    }
    assert tool.calls == []
    assert shell.started == ["7.pre.0"]


async def test_hooks_are_told_what_is_called_and_run_in_their_order(tmp_path: Path):
    lines = [
        f"cat > {tmp_path}/{n}; date +%s%N >> {tmp_path}/when" for n in ("one", "two", "three")
    ]
    hooks = [command(lines[0]), command(lines[1], event="post"), command(lines[2])]
    arguments = {"path": "ä'\"$(x)`\n", "content": "\U0001f600" * 40_000}
    result, tool, shell = await played(*hooks, arguments=arguments)
    assert result["result"] == "written"
    assert len(tool.calls) == 1
    assert shell.started == ["7.pre.0", "7.pre.2", "7.post.1"]
    expected = {"tool_call": {"name": "write_file", "args": arguments}, "environment_id": "e1"}
    for name in ("one", "two", "three"):
        assert json.loads((tmp_path / name).read_text()) == expected


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("private/x.json", "/workspace/private/x.json"),
        (" ./private//x.json", "/workspace/private/x.json"),
        ("/workspace/private/x.json", "/workspace/private/x.json"),
        ("~/private/x.json", "/home/agent/private/x.json"),
        ("a/../private/x.json", "a/../private/x.json"),
        ("/etc/private/x.json", "/etc/private/x.json"),
    ],
)
@pytest.mark.parametrize("name", ["read_file", "list_files", "view_image"])
async def test_a_hook_is_told_the_path_as_the_sandbox_has_it(
    tmp_path: Path, name: str, written: str, told: str
):
    tool = workspace.tools({}, Means(workplace=Files()))[name]
    arguments = {"path": written}
    hook = command(f"cat > {tmp_path}/told")
    await played(hook, tool=tool, arguments=arguments)
    args = json.loads((tmp_path / "told").read_text())["tool_call"]["args"]
    assert args == {"path": told}
    assert arguments["path"] == written


async def test_a_hook_is_told_the_folder_that_is_meant_where_none_is_given(tmp_path: Path):
    tool = workspace.tools({}, Means(workplace=Files()))["list_files"]
    await played(command(f"cat > {tmp_path}/told"), tool=tool, arguments={})
    assert json.loads((tmp_path / "told").read_text())["tool_call"]["args"] == {
        "path": "/workspace"
    }


async def test_hooks_after_it_are_told_of_an_error(tmp_path: Path):
    hook = command(f"cat > {tmp_path}/seen", event="post")
    result, _, _ = await played(hook, tool=Tool(result="no such file", is_error=True))
    assert result["result"] == "no such file"
    assert json.loads((tmp_path / "seen").read_text())["error"] == "no such file"


async def test_hooks_after_it_change_nothing():
    hooks = [command(DENY, event="post"), command("echo formatted 3 files", event="post")]
    with capture_logs() as log:
        result, tool, _ = await played(*hooks)
    assert (result["result"], result["is_error"], len(tool.calls)) == ("written", False, 1)
    assert log == []


async def test_who_takes_over_starts_no_hook_again(tmp_path: Path):
    shell = Shell()
    hooks = [
        command(f"echo x >> {tmp_path}/log"),
        command(f"echo y >> {tmp_path}/log", event="post"),
    ]
    await played(*hooks, shell=shell)
    await played(*hooks, shell=shell)
    assert (tmp_path / "log").read_text() == "x\ny\n"


async def test_notes_of_the_tool_are_its_own():
    tool = Tool()
    noted: list[Json] = []

    async def begin(note: Json) -> None:
        noted.append(note)

    wrapped = hooked({"t": tool}, [command("true")], workplace=Shell(), environment_id="e")["t"]
    step = {"type": "function_call", "name": "t", "arguments": {}, "id": "c"}
    given = Call(step=step, key="1", begun={"mine": 1}, begin=begin)
    await wrapped.run(given)
    assert tool.calls == [given]
    assert noted == []


async def test_stopping_stops_the_hooks_too():
    tool, shell = Tool(), Shell()
    hooks = [command("true"), command("true", event="post"), command("true", matcher="other")]
    tools = hooked({"write_file": tool}, hooks, workplace=shell, environment_id="e")
    await tools["write_file"].stop("3")
    assert tool.stopped == ["3"]
    assert shell.killed == ["3.pre.0", "3.post.1"]


def test_a_wrapped_tool_looks_like_itself():
    tool = Tool(is_pure=True)
    wrapped = hooked({"t": tool}, [command("true")], workplace=Shell(), environment_id="e")["t"]
    assert wrapped is not tool
    assert wrapped.is_pure
    assert wrapped.declaration() == tool.declaration()
    assert wrapped.failure("x") == tool.failure("x")
    sample = ToolCall("c", "t", {"a": 1})
    assert wrapped.call_step(sample) == tool.call_step(sample)


def test_tools_that_hooks_are_not_for_stay_as_they_are():
    tools = {"a": Tool(), "s__t": McpTool()}
    hooks = [command("true", matcher="b")]
    assert hooked(tools, hooks, workplace=Shell(), environment_id="e") == tools
    hooks = [command("true")]
    wrapped = hooked(tools, hooks, workplace=Shell(), environment_id="e")
    assert wrapped["s__t"] is tools["s__t"]
    assert wrapped["a"] is not tools["a"]
    assert hooked(tools, hooks, workplace=None, environment_id="e") is tools
    assert hooked(tools, [], workplace=Shell(), environment_id="e") is tools


# ---- what is broken allows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{DENY}; exit 3", "exit code 3"),
        ("echo no JSON", "not a JSON object"),
        ("echo '[1]'", "not a JSON object"),
        ("kill -9 $$", "exit code"),
    ],
    ids=["exit", "text", "list", "killed"],
)
async def test_a_broken_hook_allows_and_is_logged(line: str, reason: str):
    with capture_logs() as log:
        result, tool, _ = await played(command(line))
    assert result["result"] == "written"
    assert len(tool.calls) == 1
    assert [(e["event"], e["log_level"]) for e in log] == [("hook.failed", "warning")]
    assert reason in log[0]["reason"]


@pytest.mark.parametrize(
    "line",
    ["true", "echo '{}'", """echo '{"decision": "allow"}'""", """echo '{"decision": "ask"}'"""],
    ids=["silent", "empty", "allow", "unknown"],
)
async def test_what_is_no_denial_allows_silently(line: str):
    with capture_logs() as log:
        result, _, _ = await played(command(line))
    assert result["result"] == "written"
    assert log == []


async def test_what_a_hook_writes_beside_its_answer_does_not_disturb():
    result, _, _ = await played(command(f"echo warning >&2; {DENY}"))
    assert "not on Mondays" in result["result"]


async def test_a_reason_that_is_no_text_is_none():
    deep = "[" * 900 + "]" * 900
    line = f"""echo '{{"decision": "deny", "reason": {deep}}}'"""
    result, tool, _ = await played(command(line))
    assert result["result"] == "Denied by a hook: no reason was given."
    assert tool.calls == []


async def test_what_a_sandbox_says_of_a_failure_writes_nothing_into_a_log():
    said = Done(Exit(outcome="exited", code=0), "{}\n\x1b[2")
    with capture_logs() as log:
        await played(http("http://x.example/"), shell=Shell(ended={"7.pre.0": said}))
    assert log[0]["reason"] == "it was answered with status \\x1b[2"


async def test_a_slow_hook_is_ended():
    began = time.monotonic()
    with capture_logs() as log:
        result, _, _ = await played(command("exec sleep 300", timeout_s=0.2))
    assert result["result"] == "written"
    assert time.monotonic() - began < 100
    assert "longer than 0.2 s" in log[0]["reason"]


async def test_without_a_sandbox_the_tool_still_runs():
    with capture_logs() as log:
        result, _, _ = await played(command(DENY), shell=Shell(raises=Unready("away")))
    assert result["result"] == "written"
    assert log[0]["reason"] == "away"


async def test_a_lost_outcome_allows():
    shell = Shell(ended={"7.pre.0": Done(Exit(outcome="unknown"), '{"decision": "deny"}')})
    result, _, _ = await played(command(DENY), shell=shell)
    assert result["result"] == "written"


async def test_a_lost_lease_is_not_swallowed():
    with pytest.raises(LeaseLost):
        await played(command(DENY), shell=Shell(raises=LeaseLost("gone")))


async def test_a_call_that_is_too_large_is_not_shown():
    with capture_logs() as log:
        result, _, shell = await played(command(DENY), arguments={"content": "x" * 2**20})
    assert result["result"] == "written"
    assert shell.started == []
    assert "too large" in log[0]["reason"]


# ---- HTTP


@asynccontextmanager
async def site(
    status: int, body: str
) -> AsyncGenerator[tuple[str, list[web.Request], list[bytes]]]:
    requests: list[web.Request] = []
    bodies: list[bytes] = []

    async def answer(request: web.Request) -> web.Response:
        requests.append(request)
        bodies.append(await request.read())
        return web.Response(status=status, text=body, headers={"Location": "/elsewhere"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    listener = web.TCPSite(runner, "127.0.0.1", 0)
    await listener.start()
    try:
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}/hook?a=[1]", requests, bodies
    finally:
        await runner.cleanup()


def http(url: str, **more: Any) -> Hook:
    return Hook(event="pre", group="g", matcher="", type="http", target=url, **more)


async def test_an_http_hook_is_posted_and_may_deny():
    async with site(200, '{"decision": "deny",\n"reason": "no"}') as (url, requests, bodies):
        result, tool, _ = await played(http(url, headers={"X-From": "agent: 1"}))
    assert result["result"] == "Denied by a hook: no"
    assert tool.calls == []
    assert (requests[0].method, requests[0].path_qs) == ("POST", "/hook?a=[1]")
    assert requests[0].headers["Content-Type"] == "application/json"
    assert requests[0].headers["X-From"] == "agent: 1"
    assert orjson.loads(bodies[0])["tool_call"] == {"name": "write_file", "args": {"path": "a"}}


@pytest.mark.parametrize("status", [302, 403, 500])
async def test_another_status_allows(status: int):
    with capture_logs() as log:
        async with site(status, '{"decision": "deny"}') as (url, requests, _):
            result, _, _ = await played(http(url))
    assert result["result"] == "written"
    assert len(requests) == 1
    assert str(status) in log[0]["reason"]


async def test_a_host_that_is_not_there_allows():
    with capture_logs() as log:
        result, _, _ = await played(http("http://127.0.0.1:1/"))
    assert result["result"] == "written"
    assert len(log) == 1


# ---- hooks.json

BAD_HEADER = """{"a": {"pre_tool_execution": [{"hooks": [
    {"type": "http", "url": "http://x", "headers": {"A": "b\\nC: d"}}]}]}}"""


def test_the_whole_form_is_read():
    text = json.dumps(
        {
            "gate": {
                "enabled": True,
                "pre_tool_execution": [
                    {
                        "matcher": "code_execution",
                        "hooks": [
                            {"type": "command", "command": "python3 gate.py", "timeout": 10},
                            {"type": "http", "url": "https://h.example/x", "headers": {"A": "b"}},
                        ],
                    }
                ],
            },
            "off": {"enabled": False, "pre_tool_execution": [{"matcher": "", "hooks": [{}]}]},
            "format": {
                "post_tool_execution": [
                    {"hooks": [{"type": "command", "command": "fmt", "timeout": 1e9}]}
                ]
            },
        }
    )
    found, notes = parse(text, source=SOURCE)
    assert notes == []
    assert found == [
        Hook(
            event="pre",
            group="gate",
            matcher="code_execution",
            type="command",
            target="python3 gate.py",
            timeout_s=10,
        ),
        Hook(
            event="pre",
            group="gate",
            matcher="code_execution",
            type="http",
            target="https://h.example/x",
            headers={"A": "b"},
            timeout_s=30,
        ),
        Hook(event="post", group="format", matcher="", type="command", target="fmt", timeout_s=300),
    ]
    assert [Hook(**orjson.loads(orjson.dumps(hook))) for hook in found] == found


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("{", 1),
        ("[]", 1),
        ("[" * 100_000, 1),
        ('{"a": 1}', 1),
        ('{"a": {"pre_tool_execution": 3}}', 1),
        ('{"a": {"pre_tool_execution": [3, {"matcher": "x"}]}}', 2),
        ('{"a": {"pre_tool_execution": [{"matcher": "*_file", "hooks": [1]}]}}', 1),
        ('{"a": {"pre_tool_execution": [{"hooks": [{"type": "magic"}, 1, {}]}]}}', 3),
        ('{"a": {"pre_tool_execution": [{"hooks": [{"type": "command", "command": ""}]}]}}', 1),
        ('{"a": {"pre_tool_execution": [{"hooks": [{"type": "http", "url": "file:///x"}]}]}}', 1),
        (BAD_HEADER, 1),
        ('{"a": {"unknown": [1]}}', 0),
    ],
    ids=[
        *("cut", "list", "deep", "group", "event", "rule", "matcher", "handler", "command", "url"),
        *("header", "unknown"),
    ],
)
def test_what_is_wrong_is_left_out_and_noted(text: str, notes: int):
    good = {"hooks": [{"type": "command", "command": "ok"}]}
    found, noted = parse(text, source=SOURCE)
    assert (found, len(noted)) == ([], notes)
    assert all(note.startswith(SOURCE) for note in noted)
    try:
        groups = {**json.loads(text), "good": {"pre_tool_execution": [good]}}
    except (ValueError, RecursionError, TypeError):
        return
    assert [hook.target for hook in parse(json.dumps(groups), source=SOURCE)[0]] == ["ok"]


def test_there_are_only_so_many():
    many = {"hooks": [{"type": "command", "command": "x"}] * (MAX_HOOKS + 1)}
    found, notes = parse(json.dumps({"a": {"pre_tool_execution": [many]}}), source=SOURCE)
    assert len(found) == MAX_HOOKS
    assert len(notes) == 1
    rules = [{"hooks": [{"type": "command", "command": "x"}]}] * (MAX_HOOKS + 1)
    found, notes = parse(json.dumps({"a": {"pre_tool_execution": rules}}), source=SOURCE)
    assert (len(found), len(notes)) == (MAX_HOOKS, 1)
    late = {"hooks": [{"type": "command", "command": "x"}]}
    rules = [*[{"hooks": []}] * MAX_RULES, late]
    text = json.dumps({"a": {"pre_tool_execution": rules[1:]}})
    assert len(parse(text, source=SOURCE)[0]) == 1
    text = json.dumps({"a": {"pre_tool_execution": rules[:60], "post_tool_execution": rules[60:]}})
    found, notes = parse(text, source=SOURCE)
    assert (len(found), len(notes)) == (0, 1)
    assert f"more than {MAX_RULES} rules" in notes[0]


def test_there_are_only_so_many_notes():
    text = json.dumps({f"g{n}": 1 for n in range(500)})
    assert len(parse(text, source=SOURCE)[1]) == 50


def test_a_name_in_a_note_writes_nothing_into_a_log():
    name = "a\x1b[2J\n\u202e" + "x" * 100
    rule = {"matcher": "(\x1b", "hooks": [1]}
    groups = {name: {"pre_tool_execution": [rule]}, f"b{name}": 1}
    _, notes = parse(json.dumps(groups), source=SOURCE)
    assert len(notes) == 2
    assert all(note.isprintable() and len(note) < 200 for note in notes)
    assert "a\\x1b[2J\\n\\u202ex" in notes[0]
    rule = {"hooks": [{"type": "command", "command": "x"}]}
    (hook,), _ = parse(json.dumps({name: {"pre_tool_execution": [rule]}}), source=SOURCE)
    assert hook.group.isprintable()


@pytest.mark.parametrize(
    ("matcher", "matching"),
    [
        ("", ["read_file", "write_file", "code_execution"]),
        ("*", ["read_file", "write_file", "code_execution"]),
        (".*", ["read_file", "write_file", "code_execution"]),
        ("code_execution", ["code_execution"]),
        ("read_file|write_file", ["read_file", "write_file"]),
        (".*_file", ["read_file", "write_file"]),
        ("file", []),
        ("(?i)CODE_.*", ["code_execution"]),
        ("^read_file$", ["read_file"]),
        (r"\w+_(?:file|[x\W])", ["read_file", "write_file"]),
        (r"[^\d_]+_\bfile", []),
        (r"[^\d_]+_\Bfile", ["read_file", "write_file"]),
        (r"(?i:READ)_fil.?|code\_[a-z\S]*", ["read_file", "code_execution"]),
    ],
)
def test_a_matcher_is_for_the_whole_name(matcher: str, matching: list[str]):
    names = ["read_file", "write_file", "code_execution"]
    assert [name for name in names if command("x", matcher=matcher).matches(name)] == matching


@pytest.mark.parametrize(
    "matcher",
    [
        *("*_file", "(", "a)|(b", r"(?=x)x", r"(a)\1", "x" * 201, r"\w{999}{999}", "a{2}"),
        *(r"\pL", r"[\pL]", "[[:word:]]", "(?x)x#", "(?P<a>x)", "[x", "x\\", "é", "x\n"),
    ],
)
def test_what_is_no_expression_that_counts_matches_nothing(matcher: str):
    assert not command("x", matcher=matcher).matches("x")
    rule = {"matcher": matcher, "hooks": [{"type": "command", "command": "x"}]}
    found, notes = parse(json.dumps({"a": {"pre_tool_execution": [rule]}}), source=SOURCE)
    assert (found, len(notes)) == ([], 1)


def test_an_expression_cannot_take_long():
    began = time.monotonic()
    assert not command("x", matcher="(a|a?)+(a*)*b").matches("a" * 128)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "piece", ["\\w", "[\\W\\D]", "(?i)[!-~]", "((.*)+)?", "(?:\\pL{60}){6}"], ids=str
)
def test_reading_many_expressions_takes_no_time(piece: str):
    handler = {"type": "command", "command": "x"}
    rules = [
        {"matcher": f"{piece * (150 // len(piece))}|a{n}", "hooks": [handler] * (n % 2)}
        for n in range(400)
    ]
    text = json.dumps({"a": {"pre_tool_execution": rules}})
    began = time.process_time()
    parse(text, source=SOURCE)
    assert time.process_time() - began < 10
