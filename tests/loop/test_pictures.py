"""A picture in a result that the vendor refuses is taken out, and the model is asked once more."""

from typing import Any

import orjson
import pytest
from tests import pictures as samples
from tests.loop.stage import Bench, Break, ScriptedModel, answer, play, said

from openinteractions.errors import ContextOverflow, ModelError, ModelRejected
from openinteractions.loop.pictures import LEFT_OUT, are_refused
from openinteractions.models.port import Finished, Json, ToolCall

PICTURE = {"type": "image", "mime_type": "image/png", "data": samples.PNG_BASE64}
FINISHED = Finished("tool_calls", {})
FILES = [{"type": "workspace"}]
REFUSED = ModelRejected(
    "The upstream answered 400: messages.2.content.0.image.source: Could not process image",
    upstream_status=400,
)


def views(call_id: str = "c1") -> list[Any]:
    return [ToolCall(call_id, "view_image", {"path": "a.png"}), FINISHED]


def bench() -> Bench:
    return Bench(files={"workspace/a.png": samples.PNG})


def result(call_id: str) -> Json:
    return {
        "type": "function_result",
        "call_id": call_id,
        "name": "look",
        "result": [{"type": "text", "text": "seen"}, PICTURE],
    }


def pictures(model: ScriptedModel, call: int = -1) -> tuple[int, int]:
    """How many pictures a call was shown, and how many texts in place of one."""
    seen = orjson.dumps(model.shown(call)).decode()
    return seen.count(samples.PNG_BASE64), seen.count(LEFT_OUT)


async def test_it_is_asked_again_without_the_picture():
    model = ScriptedModel(views(), [Break(REFUSED)], answer("I cannot see it."))
    scene = await play(model, bench=bench(), own_tools=FILES)
    assert scene.outcome.status == "completed"
    assert pictures(model, 1) == (1, 0)
    assert pictures(model, 2) == (0, 1)
    assert scene.steps[1]["result"][1] == PICTURE


async def test_pictures_that_come_later_are_shown():
    model = ScriptedModel(views(), [Break(REFUSED)], views("c2"), answer("Now I see it."))
    scene = await play(model, bench=bench(), own_tools=FILES)
    assert scene.outcome.status == "completed"
    assert pictures(model) == (1, 1)


async def test_it_is_asked_again_once():
    model = ScriptedModel(views(), [Break(REFUSED)], [Break(REFUSED)])
    scene = await play(model, bench=bench(), own_tools=FILES)
    assert scene.outcome.status == "failed"
    assert "Could not process image" in scene.outcome.errors[0]["message"]


async def test_each_refused_picture_is_taken_out_in_its_turn():
    model = ScriptedModel(
        views(), [Break(REFUSED)], views("c2"), [Break(REFUSED)], answer("I cannot see it.")
    )
    scene = await play(model, bench=bench(), own_tools=FILES)
    assert scene.outcome.status == "completed"
    assert pictures(model) == (0, 2)


async def test_those_of_earlier_turns_are_taken_out_too():
    earlier = [orjson.dumps(result("c0"))]
    model = ScriptedModel([Break(REFUSED)], answer("Hello."))
    scene = await play(model, earlier=earlier)
    assert scene.outcome.status == "completed"
    assert pictures(model, 0) == (1, 0)
    assert pictures(model, 1) == (0, 1)


async def test_the_callers_own_picture_stays_an_error():
    shown = {**said("look", kind="user_input"), "content": [PICTURE]}
    model = ScriptedModel([Break(REFUSED)])
    scene = await play(model, inputs=[shown])
    assert scene.outcome.status == "failed"
    assert len(model.calls) == 1


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (REFUSED, True),
        (ModelRejected("At least one of the image dimensions exceed", upstream_status=400), True),
        (ModelRejected("Invalid value: 'input_image'", upstream_status=422), True),
        (ModelRejected("Unable to process input image.", upstream_status=400), True),
        (ModelRejected("Unable to process inlineData", upstream_status=400), True),
        (ModelRejected("Unknown field 'top_k'.", upstream_status=400), False),
        (ModelRejected("Your plan has no images.", upstream_status=403), False),
        (ContextOverflow("Too long, with its images.", upstream_status=400), False),
        (ModelError("image", upstream_status=400), False),
    ],
)
def test_what_a_vendor_says_of_a_picture(error: ModelError, is_one: bool):
    assert are_refused(error) is is_one
