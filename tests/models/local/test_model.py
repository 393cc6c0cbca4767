"""The adapter against a real small model: shapes are asserted, never wording."""

import asyncio
import base64
import json

import aiohttp
import jsonschema
import pytest

from openinteractions.errors import (
    ContextOverflow,
    Invalid,
    ModelRejected,
    ModelUnavailable,
    SetupError,
)
from openinteractions.models.local.runtime import LocalRuntime
from openinteractions.models.port import (
    THOUGHTS_AS_GIVEN,
    Finished,
    Model,
    ModelCall,
    TextDelta,
    ToolCall,
)
from openinteractions.settings import LocalSettings

NAME = "smollm2-135m"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Current weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
    },
}


@pytest.fixture
async def model(runtime: LocalRuntime) -> Model:
    return runtime.model()


def user(text: str) -> dict:
    return {"type": "user_input", "content": [{"type": "text", "text": text}]}


def make_call(adapter: Model, *steps: dict, **overrides) -> ModelCall:
    steps = steps or (user("Say hello."),)
    values = {"model": NAME, "messages": adapter.compile(list(steps), NAME)}
    return ModelCall(**(values | overrides))


async def run(model: Model, call: ModelCall) -> list:
    async with model.stream(call) as events:
        return [event async for event in events]


def text_of(events: list) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def test_a_chat_streams_text_and_ends_with_its_usage(model):
    call = make_call(model, system="Be brief.", generation={"max_output_tokens": 12, "seed": 1})

    events = await run(model, call)

    assert len(events) > 3
    assert text_of(events)
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason in {"max_tokens", "stop"}
    assert last.usage["total_input_tokens"] > 5
    assert 0 < last.usage["total_output_tokens"] <= 12


async def test_output_is_bounded_where_nothing_is_said(model):
    call = make_call(model, user("Count to a million."), generation={"temperature": 0})

    events = await run(model, call)

    assert events[-1].usage["total_output_tokens"] <= 1024


async def test_structured_output_obeys_its_schema(model):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    call = make_call(model, json_schema=schema, generation={"max_output_tokens": 60})

    events = await run(model, call)

    jsonschema.validate(json.loads(text_of(events)), schema)


async def test_a_function_that_must_be_called_is_called_with_arguments_of_its_schema(model):
    call = make_call(model, user("Weather in Oslo?"), tools=[WEATHER], tool_choice="any")

    *rest, last = await run(model, call)

    (event,) = rest
    assert isinstance(event, ToolCall)
    assert event.name == "get_weather"
    jsonschema.validate(event.arguments, WEATHER["parameters"])
    assert last.reason == "tool_calls"


async def test_with_functions_on_offer_the_turn_is_a_call_or_text(model):
    call = make_call(model, user("Hello!"), tools=[WEATHER], tool_choice="auto")

    *rest, last = await run(model, call)

    calls = [event for event in rest if isinstance(event, ToolCall)]
    assert bool(calls) != bool(text_of(rest))
    assert last.reason == ("tool_calls" if calls else "stop")


async def test_after_a_result_the_answer_can_be_forced_to_be_text(model):
    steps = (
        user("Weather in Oslo?"),
        {
            "type": "function_call",
            "id": "c1",
            "name": "get_weather",
            "arguments": {"city": "Oslo", "unit": "C"},
        },
        {"type": "function_result", "call_id": "c1", "name": "get_weather", "result": {"t": 3}},
    )
    call = make_call(
        model,
        *steps,
        tools=[WEATHER],
        tool_choice="none",
        generation={"max_output_tokens": 20, "temperature": 0},
    )

    events = await run(model, call)

    assert text_of(events)
    assert not any(isinstance(event, ToolCall) for event in events)


async def test_a_call_that_the_token_limit_cuts_off_is_no_call(model):
    call = make_call(model, tools=[WEATHER], tool_choice="any", generation={"max_output_tokens": 8})

    events = await run(model, call)

    assert [type(event) for event in events] == [Finished]
    assert events[0].reason == "max_tokens"


async def test_the_same_call_again_is_read_from_the_cache(model):
    call = make_call(model, system="x " * 100, generation={"max_output_tokens": 1})

    await run(model, call)
    events = await run(model, call)

    assert events[-1].usage["total_cached_tokens"] > 100


async def test_leaving_the_context_frees_the_slot(model, runtime):
    call = make_call(model, user("Count to a million."), generation={"ignore": 1})
    for _ in range(2):
        async with model.stream(call) as events:
            await anext(events)

    server = runtime.server(NAME)
    async with asyncio.timeout(5):
        while await busy_slots(server):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    assert server.users == 0


async def busy_slots(server) -> int:
    child = server._child
    headers = {"Authorization": f"Bearer {child.api_key}"}
    async with server._session.get(f"{child.base_url}/slots", headers=headers) as response:
        return sum(slot["is_processing"] for slot in await response.json())


async def test_a_conversation_that_is_too_long_overflows(model):
    with pytest.raises(ContextOverflow):
        await run(model, make_call(model, user("word " * 3000)))


async def test_two_answers_at_once(model):
    calls = [
        make_call(model, user(f"Tell me about {topic}."), generation={"max_output_tokens": 8})
        for topic in ("cats", "dogs", "birds")
    ]

    answers = await asyncio.gather(*(run(model, call) for call in calls))

    assert all(text_of(events) for events in answers)


async def test_a_model_that_is_not_pulled_says_how_to_pull_it(model):
    call = make_call(model, model="qwen2.5-coder-1.5b")
    with pytest.raises(ModelRejected, match=r"openinteractions models pull qwen2\.5-coder-1\.5b"):
        await run(model, call)


async def test_a_damaged_file_is_not_served(model, folder):
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf.ok").unlink()
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.unlink()
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelRejected, match="damaged"):
        await run(model, make_call(model))


async def test_the_default_is_what_is_there(model, runtime):
    assert await asyncio.to_thread(runtime.default_name) == NAME

    events = await run(
        model, make_call(model, model="default", generation={"max_output_tokens": 2})
    )

    assert isinstance(events[-1], Finished)


async def test_an_own_gguf_is_served_under_its_name(folder, session, tmp_path):
    own = tmp_path / "mine.gguf"
    own.symlink_to((folder / "SmolLM2-135M-Instruct.Q4_1.gguf").resolve())
    settings = LocalSettings(gguf=own, threads=1, context_tokens=1024, parallel=1)
    async with LocalRuntime(settings, tmp_path, session) as runtime:
        assert await asyncio.to_thread(runtime.default_name) == "mine"
        model = runtime.model()
        for name in ("mine", "default"):
            call = make_call(model, model=name, generation={"max_output_tokens": 2})
            assert isinstance((await run(model, call))[-1], Finished)


async def test_the_model_that_idles_longest_makes_room_and_a_busy_one_does_not(
    folder, session, tmp_path
):
    own = tmp_path / "mine.gguf"
    own.symlink_to((folder / "SmolLM2-135M-Instruct.Q4_1.gguf").resolve())
    settings = LocalSettings(gguf=own, threads=1, context_tokens=512, parallel=1)
    async with LocalRuntime(settings, tmp_path, session, max_servers=1) as runtime:
        model = runtime.model()
        short = {"max_output_tokens": 2}
        await run(model, make_call(model, model="mine", generation=short))
        async with model.stream(make_call(model)) as events:
            await anext(events)
            assert runtime.server("mine").pid is None
            with pytest.raises(ModelUnavailable, match="busy") as caught:
                await run(model, make_call(model, model="mine"))

        assert caught.value.retry_after_s > 0
        await run(model, make_call(model, model="mine", generation=short))
        assert runtime.server(NAME).pid is None


async def test_an_own_file_that_is_no_gguf_is_refused(tmp_path, session):
    own = tmp_path / "mine.gguf"
    own.write_text("not a model")
    async with LocalRuntime(LocalSettings(gguf=own), tmp_path, session) as runtime:
        model = runtime.model()
        with pytest.raises(ModelRejected, match="not a GGUF"):
            await run(model, make_call(model, model="mine"))


async def test_a_wrong_setting_is_told_at_the_start(tmp_path, session):
    with pytest.raises(SetupError, match="no packaged model"):
        async with LocalRuntime(LocalSettings(model="gpt-9"), tmp_path, session):
            pass


@pytest.fixture
async def idle_model(tmp_path) -> Model:
    """For what needs no server and no weights."""
    async with aiohttp.ClientSession() as session:
        return LocalRuntime(LocalSettings(), tmp_path, session).model()


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "mime_type": "image/png", "data": "AA=="},
        {"type": "audio", "mime_type": "audio/wav", "data": "AA=="},
        {"type": "video", "mime_type": "video/mp4", "data": "AA=="},
        {"type": "document", "mime_type": "application/pdf", "data": "AA=="},
    ],
)
async def test_media_are_refused_by_name(idle_model, block):
    named = "application/pdf" if block["type"] == "document" else block["type"]
    for step in (
        {"type": "user_input", "content": [block]},
        {"type": "function_result", "call_id": "1", "name": "f", "result": [block]},
    ):
        with pytest.raises(Invalid, match=f"'{named}' is not supported"):
            idle_model.compile([step], NAME)


async def test_text_documents_are_read(idle_model):
    data = base64.b64encode(b"the secret is 42").decode()
    block = {"type": "document", "mime_type": "text/plain", "data": data}

    (message,) = idle_model.compile([{"type": "user_input", "content": [block]}], NAME)

    assert b"the secret is 42" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tools": [{"type": "google_search"}]}, r"'google_search'.*'tools\[0\]\.type'"),
        ({"modalities": ["image"]}, "'image'.*'response_modalities'"),
        ({"response_formats": [{"type": "audio"}]}, r"'audio'.*'response_format\.type'"),
        ({"model": "gpt-9"}, "'gpt-9'.*'model'"),
        ({"generation": {"image_config": {"image_size": "1K"}}}, "image_config"),
    ],
)
async def test_what_cannot_be_done_is_refused(idle_model, overrides, message):
    with pytest.raises(Invalid, match=message):
        idle_model.check(make_call(idle_model, **overrides))


async def test_what_changes_nothing_is_warned_about(idle_model):
    call = make_call(
        idle_model,
        tools=[WEATHER],
        generation={"thinking_level": "low", "thinking_summaries": "none", "stop_sequences": ["x"]},
        safety_settings=[{}],
        service_tier="flex",
    )

    assert [warning.field for warning in idle_model.check(call)] == [
        "generation_config.thinking_level",
        "safety_settings",
        "service_tier",
        "generation_config.stop_sequences",
    ]
    anyway = {"thinking_summaries": THOUGHTS_AS_GIVEN}
    call = make_call(idle_model, service_tier="standard", generation=anyway)
    assert idle_model.check(call) == []
