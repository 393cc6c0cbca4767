"""Tools of MCP servers as the loop sees them: names, steps, and what a takeover may repeat."""

import re
from typing import Any

import pytest

from openinteractions.errors import Invalid
from openinteractions.models import anthropic_messages, gemini_messages, openai_messages
from openinteractions.models.calls import mcp_function
from openinteractions.models.port import ToolCall
from openinteractions.tools.port import Call, Means
from openinteractions.tools.toolbox import toolbox

VENDORS = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]{0,63}")
SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}


class Scripted:
    """A server that gives one answer, and keeps what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    async def call(self, tool: str, arguments: Any, *, timeout_s: float) -> Any:
        self.asked.append((tool, arguments))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def box(name: str = "find", answer: Any = ("found", False), server: str = "docs", **more: Any):
    entry = {
        "type": "mcp_server",
        "name": server,
        "url": "https://docs.example/mcp",
        "tools": [{"name": name, "description": "", "parameters": SCHEMA, **more}],
    }
    scripted = Scripted(answer)
    return toolbox([entry], Means(servers={server: scripted})), scripted


async def run(tools: Any, name: str, begun: Any = None) -> tuple[Any, list[Any]]:
    function = mcp_function("docs", name)
    tool = tools.find(function)
    step = {**tool.call_step(ToolCall("c1", function, {"q": "x"})), "id": "c1"}
    notes: list[Any] = []

    async def begin(note: Any) -> None:
        notes.append(note)

    return await tool.run(Call(step=step, key="1", begun=begun, begin=begin)), notes


async def test_a_call_is_shown_with_the_servers_own_names():
    tools, server = box("find.it!")
    [declared] = tools.declarations()
    assert declared["type"] == "function"
    assert declared["parameters"] == SCHEMA
    assert declared["description"]
    tool = tools.find(declared["name"])
    step = tool.call_step(ToolCall("c1", declared["name"], {"q": "x"}))
    assert step == {
        "type": "mcp_server_tool_call",
        "server_name": "docs",
        "name": "find.it!",
        "arguments": {"q": "x"},
    }
    assert tools.of_step({**step, "id": "c1"}) is tool
    result, notes = await run(tools, "find.it!")
    assert result == {
        "type": "mcp_server_tool_result",
        "server_name": "docs",
        "name": "find.it!",
        "result": "found",
        "is_error": False,
    }
    assert server.asked == [("find.it!", {"q": "x"})]
    assert notes == [{}]


@pytest.mark.parametrize("answer", ["text", {"a": 1}, [{"type": "text", "text": "x"}]])
@pytest.mark.parametrize("is_error", [True, False])
async def test_results_pass_through(answer, is_error):
    tools, _ = box(answer=(answer, is_error))
    result, _ = await run(tools, "find")
    assert (result["result"], result["is_error"]) == (answer, is_error)


async def test_what_the_server_cannot_do_is_a_result():
    tools, _ = box(answer=Invalid("It cannot be reached."))
    result, _ = await run(tools, "find")
    assert result["is_error"]
    assert result["result"] == "It cannot be reached."


async def test_a_call_that_was_begun_is_not_made_again():
    tools, server = box()
    result, notes = await run(tools, "find", begun={})
    assert result["is_error"]
    assert result["result"].startswith("Outcome unknown")
    assert server.asked == []
    assert notes == []


@pytest.mark.parametrize("hint", ["is_pure", "is_repeatable"])
async def test_what_may_be_repeated_is_made_again_without_a_note(hint):
    tools, server = box(**{hint: True})
    result, notes = await run(tools, "find", begun={})
    assert result["result"] == "found"
    assert len(server.asked) == 1
    assert notes == []
    assert tools.find("docs__find").is_pure is (hint == "is_pure")


NAMES = [
    ("docs", "find"),
    ("docs", "find.it"),
    ("docs", "find_it"),
    ("docs", "find it"),
    ("docs", "f" * 80),
    ("docs", "f" * 79 + "g"),
    ("d" * 64, "find"),
    ("d" * 64, "look"),
    ("1docs", "find"),
    ("-docs", "find"),
    ("docs__find", "it"),
    ("docs", "find__it"),
    ("docs_", "_it"),
    ("docs", "__it"),
    ("docs", "ünïcödé"),
    ("docs", "ünïcöde"),
]


def test_every_tool_has_a_name_of_its_own_that_vendors_take():
    found = [mcp_function(*pair) for pair in NAMES]
    assert len(set(found)) == len(NAMES)
    assert [name for name in found if VENDORS.fullmatch(name) is None] == []
    assert mcp_function("docs", "find") == "docs__find"
    assert mcp_function("docs", "find__it") == "docs__find__it"


@pytest.mark.parametrize(("server", "name"), NAMES)
def test_a_conversation_shows_the_name_that_was_declared(server, name):
    step = {"type": "mcp_server_tool_call", "id": "c", "server_name": server, "name": name}
    result = {"type": "mcp_server_tool_result", "call_id": "c", "result": "r"}
    shown = f'"{mcp_function(server, name)}"'.encode()
    for compiled in (
        openai_messages.compile_steps([step, result]),
        anthropic_messages.compile_messages([step, result]),
        gemini_messages.compile_contents([step, result], "gemini-3"),
    ):
        assert shown in compiled[0]
