"""What must be true once the dust has settled. Nothing here is the product's own code."""

import base64
from collections import Counter
from collections.abc import Sequence
from typing import Any

import asyncpg

from tests.chaos.clients import Reading, World
from tests.chaos.script import Upstream, answer, words
from tests.chaos.stage import Stage
from tests.house import Frame

_NOTE = "The answer was interrupted; it starts again below."


async def everything(
    stage: Stage, world: World, upstream: Upstream, shown: dict[str, Any]
) -> list[str]:
    """All that is wrong, in words.

    Args:
        stage: With its database.
        world: What the callers know.
        upstream: What it was asked.
        shown: Every interaction as GET shows it.
    """
    wrong = [*stage.deaths]
    wrong += [f"history of {p}: the model saw {seen}" for p, seen in upstream.wrong_histories]
    wrong += await _rows(stage)
    wrong += _callers(world, shown)
    for interaction in shown.values():
        wrong += _steps(interaction)
    prompts = Counter(prompt_of(interaction) for interaction in shown.values())
    wrong += [f"{prompt} was made {n} times" for prompt, n in prompts.items() if n != 1]
    for reading in world.readings:
        wrong += stream(reading, shown.get(reading.interaction_id))
    return wrong


async def rows(stage: Stage, query: str) -> list[Any]:
    connection = await asyncpg.connect(stage.url)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


async def _rows(stage: Stage) -> list[str]:
    wrong = [f"job left: {dict(row)}" for row in await rows(stage, "select * from jobs")]
    open_ = await rows(stage, "select id, status from interactions where status <> 'completed'")
    wrong += [f"interaction {row[0].hex} is {row[1]}" for row in open_]
    paid = await rows(
        stage,
        "select i.id, count(s.id) from interactions i left join spend s on s.interaction_id = i.id "
        "group by i.id having count(s.id) <> 1",
    )
    wrong += [f"interaction {row[0].hex} has {row[1]} rows of spend" for row in paid]
    return wrong


def _callers(world: World, shown: dict[str, Any]) -> list[str]:
    wrong: list[str] = []
    for asked in world.asked:
        if not asked.interaction_id:
            if asked.background:
                wrong.append(f"{asked.prompt} was never made")
            continue
        interaction = shown.get(asked.interaction_id)
        if interaction is None or prompt_of(interaction) != asked.prompt:
            wrong.append(f"{asked.prompt} is not {asked.interaction_id}")
        if asked.status not in {"", "completed"}:
            wrong.append(f"the caller of {asked.prompt} saw {asked.status}")
    return wrong


def prompt_of(interaction: Any) -> str:
    return text_of(interaction["steps"][0])


def text_of(step: Any) -> str:
    blocks = step.get("content") or step.get("summary") or []
    return "".join(block.get("text", "") for block in blocks)


def output_text(interaction: Any) -> str:
    """As the SDKs read it: back over thoughts, up to a block that is no text."""
    found: list[str] = []
    for step in reversed(interaction["steps"]):
        if step["type"] == "model_output":
            for block in reversed(step["content"]):
                if block["type"] != "text":
                    return "".join(reversed(found))
                found.append(block["text"])
        elif step["type"] != "thought":
            break
    return "".join(reversed(found))


def is_note(step: Any) -> bool:
    return step["type"] == "thought" and text_of(step) == _NOTE


def _steps(interaction: Any) -> list[str]:
    """The input; any broken tries, each closed by a note; the answer."""
    prompt = prompt_of(interaction)
    where = f"{prompt} ({interaction['id']})"
    if interaction["status"] != "completed":
        return [f"{where} is {interaction['status']}: {interaction.get('errors')}"]
    given, *tries, last = interaction["steps"]
    wrong: list[str] = []
    if given["type"] != "user_input":
        wrong.append(f"{where}: the first step is {given['type']}")
    if last["type"] != "model_output" or text_of(last) != answer(prompt) or last.get("error"):
        wrong.append(f"{where}: the last step is {last}")
    if output_text(interaction) != answer(prompt):
        wrong.append(f"{where}: its output_text is {output_text(interaction)!r}")
    wrong += [f"{where}: {what}" for what in _tries(prompt, tries)]
    return wrong


def _tries(prompt: str, steps: Sequence[Any]) -> list[str]:
    """Broken tries: what was said, marked as an error, and a note that takes it all back."""
    wrong: list[str] = []
    discarded = 0
    for step in steps:
        if is_note(step):
            note = step.get("note") or {}
            if note.get("discards") != discarded or not discarded:
                wrong.append(f"a note discards {note.get('discards')}, not {discarded}")
            discarded = 0
            continue
        discarded += 1
        is_broken = step["type"] == "model_output" and bool(step.get("error"))
        if not is_broken or not answer(prompt).startswith(text_of(step)):
            wrong.append(f"an odd step before the answer: {step}")
    if discarded:
        wrong.append(f"{discarded} steps before the answer have no note")
    return wrong


def number_of(frame: Frame) -> tuple[int, ...]:
    """The number and position in an event id, which is opaque to everybody but us."""
    assert frame.id is not None
    raw = base64.urlsafe_b64decode(frame.id + "=" * (-len(frame.id) % 4))
    return tuple(int(part) for part in raw.split(b".")[:3])


def stream(reading: Reading, interaction: Any) -> list[str]:
    """Each event once, in order, and together the very steps that GET shows."""
    frames = reading.frames
    where = f"stream of {reading.interaction_id} ({reading.connections} connections)"
    if interaction is None:
        return [f"{where}: no such interaction"]
    where += f" of {prompt_of(interaction)}"
    wrong: list[str] = []
    names = [frame.id for frame in frames]
    if len(set(names)) != len(names) or None in names:
        wrong.append(f"{where}: an event came twice")
    numbers = [number_of(frame) for frame in frames]
    if numbers != sorted(numbers):
        wrong.append(f"{where}: events came out of order")
    if any(frame.data.get("event_id") != frame.id for frame in frames):
        wrong.append(f"{where}: an event's two ids differ")
    kinds = [frame.kind for frame in frames]
    expected = ["interaction.created", "interaction.status_update"]
    if kinds[:2] != expected or kinds[-1] != "interaction.completed" or len(frames) < 6:
        wrong.append(f"{where}: it begins with {kinds[:2]} and ends with {kinds[-1:]}")
        return wrong
    wrong += [f"{where}: {what}" for what in _whole(frames[2:-1], interaction["steps"][1:])]
    return wrong


def _whole(frames: Sequence[Frame], steps: Sequence[Any]) -> list[str]:
    wrong: list[str] = []
    texts: list[str] = []
    kinds: list[str] = []
    is_open = False
    for frame in frames:
        index = frame.data.get("index")
        if frame.kind == "step.start" and not is_open:
            step = frame.data["step"]
            kinds.append(step["type"])
            texts.append(text_of(step))
            is_open = True
        elif frame.kind == "step.delta" and is_open:
            delta = frame.data["delta"]
            texts[-1] += delta.get("text") or delta.get("content", {}).get("text", "")
        elif frame.kind == "step.stop" and is_open:
            is_open = False
        else:
            wrong.append(f"{frame.kind} {index} has no place there")
        if index != len(texts) - 1:
            wrong.append(f"{frame.kind} has the index {index}, not {len(texts) - 1}")
    if is_open:
        wrong.append("the last step stays open")
    if (kinds, texts) != ([s["type"] for s in steps], [text_of(s) for s in steps]):
        wrong.append(f"it shows {list(zip(kinds, texts, strict=True))}, GET {list(steps)}")
    return wrong


def summary(upstream: Upstream, shown: dict[str, Any]) -> str:
    tries = [step for i in shown.values() for step in i["steps"]]
    notes = sum(is_note(step) for step in tries)
    calls = sum(upstream.tries.values())
    most = max(len(words(prompt_of(i))) for i in shown.values())
    return (
        f"{len(shown)} interactions, {calls} upstream calls, {notes} answers began anew after "
        f"they were shown in part, failures {dict(upstream.failures)}, longest {most} words"
    )
