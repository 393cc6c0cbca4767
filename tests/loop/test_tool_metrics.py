"""What metrics say about the calls of this server's tools: how many run, how they end, how long."""

import pytest
from tests.loop.stage import ScriptedModel, answer, play
from tests.loop.test_calls import FINISHED, Double, boxed, calls

from openinteractions import metrics
from openinteractions.errors import LeaseLost, Unready
from openinteractions.models.port import ToolCall
from openinteractions.tools.mcp import tools as mcp_tools
from openinteractions.tools.port import Call, Means


def counted(tool: str) -> dict[str, float]:
    """The calls of a tool so far, by outcome."""
    return {
        sample.labels["outcome"]: sample.value
        for metric in metrics.tool_calls.collect()
        for sample in metric.samples
        if sample.labels["tool"] == tool
    }


def observed(tool: str) -> float:
    """How many durations of a tool were taken down."""
    count = metrics.REGISTRY.get_sample_value("oi_tool_seconds_count", {"tool": tool})
    return count or 0.0


def active(tool: str) -> float | None:
    return metrics.REGISTRY.get_sample_value("oi_tool_calls_active", {"tool": tool})


async def test_a_call_is_counted_while_it_runs_and_by_how_it_ended():
    seen: list[float | None] = []

    async def act(call: Call) -> str:
        seen.append(active("meant"))
        if call.step["arguments"]["n"] == 2:
            raise Unready("The broker is away.")
        return "done"

    wanted = calls(("meant", 1), ("meant", 2))
    wrong = [ToolCall("c9", "meant", {"n": "three"}), FINISHED]
    model = ScriptedModel(wanted, wrong, answer("ok"))
    await play(model, box=boxed(Double("meant", act)))
    assert counted("meant") == {"finished": 1, "failed": 1, "refused": 1}
    assert observed("meant") == 2
    assert (seen, active("meant")) == ([1, 1], 0)


async def test_a_call_whose_run_was_lost_is_broken():
    async def lost(call: Call) -> str:
        raise LeaseLost("Another worker owns it.")

    with pytest.raises(LeaseLost):
        await play(ScriptedModel(calls(("lost", 1))), box=boxed(Double("lost", lost)))
    assert counted("lost") == {"broken": 1}
    assert (observed("lost"), active("lost")) == (1, 0)


class Shop:
    """A server that a caller has named."""

    async def call(self, tool: str, arguments: object, *, timeout_s: float) -> tuple[object, bool]:
        return "sold", False


async def test_what_others_have_named_is_no_label():
    entry = {
        "type": "mcp_server",
        "name": "shop-of-a-caller",
        "tools": [{"name": "buy", "parameters": {"type": "object"}}],
    }
    box = mcp_tools(entry, Means(servers={"shop-of-a-caller": Shop()}))
    (name,) = box
    script = ScriptedModel([ToolCall("c1", name, {}), FINISHED], answer("ok"))
    await play(script, box=box)
    assert counted("mcp_server_tool") == {"finished": 1}
    assert b"shop-of-a-caller" not in metrics.render()
