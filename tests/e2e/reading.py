"""Reading what the SDK gives: streams checked against the contract's order, and put together.

The accumulator follows the contract's own words (sections 8.3 and 8.4), not our code: it is the
independent opinion that the tests compare the server with.
"""

import base64
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
FAST = "gemini-3.5-flash"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather now.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def plain(value: Any) -> Any:
    """An SDK object as JSON, without what it left unset."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.model_dump(mode="json", exclude_none=True)


def kinds(events: Iterable[Any]) -> list[str]:
    """The events' types."""
    return [event.event_type for event in events]


def ids(events: Iterable[Any]) -> list[str]:
    """The events' ids; every one must have its own."""
    found = [event.event_id for event in events]
    assert all(found)
    assert len(set(found)) == len(found)
    return found


def read(events: Sequence[Any], *, stored: bool = True) -> list[dict[str, Any]]:
    """Check a whole stream against the contract's order (8.3) and put its steps together (8.4)."""
    names = kinds(events)
    assert names[:2] == ["interaction.created", "interaction.status_update"]
    assert names[-1] == "interaction.completed"
    assert events[0].interaction.status == "in_progress"
    assert events[1].status == "in_progress"
    if stored:
        ids(events)
        assert events[0].interaction.id
        assert events[-1].interaction.id == events[0].interaction.id == events[1].interaction_id
    steps: list[dict[str, Any]] = []
    is_open = False
    for event in events[2:-1]:
        if event.event_type == "interaction.status_update":
            assert not is_open
            continue
        if event.event_type == "step.start":
            assert not is_open
            steps.append(plain(event.step))
        assert event.index == len(steps) - 1
        is_open = event.event_type != "step.stop"
        if event.event_type == "step.delta":
            _merge(steps[-1], plain(event.delta))
    assert not is_open
    return [_finished(step) for step in steps]


def _merge(step: dict[str, Any], delta: dict[str, Any]) -> None:
    kind = delta.pop("type")
    match kind:
        case "text":
            content = step.setdefault("content", [])
            if not content or content[-1]["type"] != "text":
                content.append({"type": "text", "text": ""})
            content[-1]["text"] += delta["text"]
        case "text_annotation_delta":
            step["content"][-1].setdefault("annotations", []).extend(delta["annotations"])
        case "image" | "audio" | "video" | "document":
            step.setdefault("content", []).append({"type": kind, **delta})
        case "thought_summary":
            summary = step.setdefault("summary", [])
            if not summary:
                summary.append({"type": "text", "text": ""})
            summary[-1]["text"] += delta["content"]["text"]
        case "thought_signature":
            step["signature"] = delta["signature"]
        case "arguments_delta":
            step["_arguments"] = step.get("_arguments", "") + delta["arguments"]
        case "code_execution_result":
            # Our addition: `content` has the blocks, where there is more than a text.
            assert step["result"] == ""
            text, blocks = delta.pop("result"), delta.pop("content", None)
            assert blocks is None or text == "".join(block.get("text", "") for block in blocks)
            step.update(delta, result=text if blocks is None else blocks)
        case _:
            step.update(delta)


def _finished(step: dict[str, Any]) -> dict[str, Any]:
    if "_arguments" in step:
        step["arguments"] = json.loads(step.pop("_arguments"))
    return step


def output_text(steps: Sequence[dict[str, Any]]) -> str:
    """The text that the SDK's `output_text` gives: back from the end to the first other step."""
    texts: list[str] = []
    for step in reversed(steps):
        if step["type"] != "model_output":
            if texts:
                break
            continue
        texts += [block["text"] for block in reversed(step["content"])]
    return "".join(reversed(texts))


def generated(interaction: Any) -> list[dict[str, Any]]:
    """The steps after the input, as GET shows them."""
    return [step for step in plain(interaction.steps) if step["type"] != "user_input"]


def until(claim: Callable[[], bool], *, within_s: float = 10.0) -> None:
    """Wait until something becomes true."""
    deadline = time.monotonic() + within_s
    while not claim():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
