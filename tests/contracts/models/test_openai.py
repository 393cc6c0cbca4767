"""The OpenAI adapter keeps the models' contract, and copes with what its likenesses send."""

import base64
import re
from typing import Any

import aiohttp
import orjson
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from pydantic import TypeAdapter

from openinteractions.errors import ContextOverflow, Invalid, ModelUnavailable
from openinteractions.models import openai
from openinteractions.models.openai import OpenAIModel
from openinteractions.models.openai_messages import call_id
from openinteractions.models.port import (
    THOUGHTS_AS_GIVEN,
    Annotations,
    Finished,
    Json,
    Media,
    Model,
    ModelCall,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
)
from openinteractions.models.transport import Upstream
from tests.contracts.models.history import HISTORY, PNG, said, text, user
from tests.contracts.models.suite import (
    PERSON_SCHEMA,
    USAGE,
    WEATHER,
    Call,
    ModelContract,
    Result,
    ask,
    reply,
    said_text,
)
from tests.fakes.openai import FakeOpenAI, chunk, sse, whole
from tests.fakes.upstream import FakeUpstream, Received, Reply

DONE = b"data: [DONE]\n\n"
REQUEST = TypeAdapter(CompletionCreateParamsStreaming)


def b64(content: str | bytes) -> str:
    return base64.b64encode(content.encode() if isinstance(content, str) else content).decode()


def delta(fields: Json, reason: str | None = None) -> bytes:
    """A chunk with only what a sloppy server sends."""
    return sse({"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]})


def tool_delta(*parts: Json) -> bytes:
    return delta({"tool_calls": list(parts)})


def compiled(model: Model, *steps: Json) -> list[Json]:
    return [orjson.loads(message) for message in model.compile(steps, "m-1")]


class TestOpenAICompatible(ModelContract):
    """vLLM, Ollama, llama.cpp, LiteLLM and all the others."""

    official = False
    overflow_message = "This model's maximum context length is 8 tokens. You sent 9."

    def new_fake(self) -> FakeUpstream:
        return FakeOpenAI()

    def new_model(self, upstream: Upstream) -> Model:
        return OpenAIModel(upstream, provider="fake", official=self.official)

    def headers(self) -> dict[str, str]:
        return openai.headers("sk-test")

    def system(self, request: Json) -> str:
        first = request["messages"][0]
        assert first["role"] == "system"
        return first["content"]

    def texts(self, request: Json) -> list[tuple[str, str]]:
        roles = {"user": "user", "assistant": "model"}
        return [
            (roles[message["role"]], part["text"])
            for message in request["messages"]
            if message["role"] in roles
            for part in _parts(message)
            if part["type"] == "text"
        ]

    def images(self, request: Json) -> list[tuple[str, str]]:
        urls = [
            part["image_url"]["url"]
            for message in request["messages"]
            for part in _parts(message)
            if part["type"] == "image_url"
        ]
        found = [re.fullmatch(r"data:(.*);base64,(.*)", url) for url in urls]
        return [(match[1], match[2]) for match in found if match]

    def calls(self, request: Json) -> list[Call]:
        return [
            Call(call["id"], call["function"]["name"], orjson.loads(call["function"]["arguments"]))
            for message in request["messages"]
            for call in message.get("tool_calls", ())
        ]

    def results(self, request: Json) -> list[Result]:
        return [
            Result(message["tool_call_id"], message["content"])
            for message in request["messages"]
            if message["role"] == "tool"
        ]

    def functions(self, request: Json) -> list[tuple[str, Json]]:
        functions = [tool["function"] for tool in request["tools"]]
        return [(function["name"], function["parameters"]) for function in functions]

    def schema(self, request: Json) -> Json | None:
        return request["response_format"]["json_schema"]["schema"]

    def max_tokens(self, request: Json) -> int | None:
        return request["max_completion_tokens" if self.official else "max_tokens"]

    async def raw(self, fake: FakeUpstream, model: Model, *chunks: bytes, **fields: Any) -> list:
        """The events of a hand-written stream."""
        fake.replies = [Reply(raw=b"".join(chunks))]
        return await self.run(model, ask(model, **fields))

    # The request ------------------------------------------------------------------------------

    async def test_requests_are_what_the_sdk_calls_valid(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        fake.replies = [reply(TextDelta("{}"))]
        picture = {"type": "image", "mime_type": "image/png", "data": PNG, "resolution": "low"}
        call = ask(
            model,
            HISTORY,
            [user("look", picture)],
            system="s",
            tools=[WEATHER],
            tool_choice={"allowed_tools": {"mode": "any", "tools": ["get_weather"]}},
            json_schema=PERSON_SCHEMA,
            service_tier="flex",
            generation={
                "temperature": 0.5,
                "top_p": 0.9,
                "seed": 3,
                "stop_sequences": ["END"],
                "thinking_level": "high",
                "max_output_tokens": 9,
            },
        )
        await self.run(model, call)
        request = fake.requests[-1]
        REQUEST.validate_python(request.json, extra="forbid")
        assert request.path == "/v1/chat/completions"
        expected = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["END"]}
        assert {name: request.json[name] for name in expected} == expected
        assert request.json["reasoning_effort"] == "high"
        assert request.json["response_format"]["json_schema"]["strict"] is True
        assert request.json.get("service_tier") == ("flex" if self.official else None)

    async def test_every_call_is_answered_before_anything_else_is_said(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        fake.replies = [reply(TextDelta("ok"))]
        await self.run(model, ask(model, HISTORY, [user("on")]))
        open_calls: list[str] = []
        for message in fake.requests[-1].json["messages"]:
            if message["role"] == "tool":
                open_calls.remove(message["tool_call_id"])
            else:
                assert open_calls == []
            open_calls += [call["id"] for call in message.get("tool_calls", ())]
        assert open_calls == []

    def test_server_tools_have_sensible_names(self, model: Model) -> None:
        messages = compiled(model, *HISTORY)
        names = {
            call["function"]["name"]
            for message in messages
            for call in message.get("tool_calls", ())
        }
        assert {"code_execution", "google_search", "docs__lookup", "get_weather"} <= names

    def test_parallel_calls_join_the_text_before_them(self, model: Model) -> None:
        calls = [
            {"type": "function_call", "id": name, "name": "f", "arguments": {}} for name in "ab"
        ]
        (message,) = compiled(model, said("Looking."), *calls)
        assert message["content"] == "Looking."
        assert [call["id"] for call in message["tool_calls"]] == ["a", "b"]

    def test_long_call_ids_are_shortened_alike_everywhere(self, model: Model) -> None:
        long = "x" * 64
        call = {"type": "function_call", "id": long, "name": "f", "arguments": {}}
        result = {"type": "function_result", "call_id": long, "result": "r"}
        (assistant,), (tool,) = compiled(model, call), compiled(model, result)
        assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"] == call_id(long)
        assert len(call_id(long)) <= 40

    def test_images_that_the_model_made_come_back_as_input(self, model: Model) -> None:
        picture = {"type": "image", "mime_type": "image/png", "data": PNG}
        made = {"type": "model_output", "content": [text("Here:"), picture]}
        roles = [message["role"] for message in compiled(model, made, user("bigger"))]
        assert roles == ["assistant", "user", "user"]

    def test_a_call_waiting_for_its_result_stays_last(self, model: Model) -> None:
        picture = {"type": "image", "mime_type": "image/png", "data": PNG}
        made = {"type": "model_output", "content": [picture]}
        call = {"type": "function_call", "id": "c", "name": "f", "arguments": {}}
        assert compiled(model, user("x"), made, call)[-1]["tool_calls"]

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (
                {"type": "audio", "mime_type": "audio/mpeg", "data": "AAAA"},
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
            ),
            (
                {"type": "document", "mime_type": "application/pdf", "data": "AAAA"},
                {
                    "type": "file",
                    "file": {
                        "filename": "document.pdf",
                        "file_data": "data:application/pdf;base64,AAAA",
                    },
                },
            ),
            (
                {"type": "document", "mime_type": "text/csv", "data": b64("a,b\n1,ü")},
                {"type": "text", "text": '<document mime_type="text/csv">\na,b\n1,ü\n</document>'},
            ),
            (
                {"type": "image", "mime_type": "image/png", "uri": "https://x/y.png"},
                {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
            ),
        ],
    )
    def test_content_in(self, model: Model, content: Json, part: Json) -> None:
        assert compiled(model, user(content))[0]["content"] == [part]

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            ({"type": "video", "mime_type": "video/mp4", "data": "AAAA"}, "'video'"),
            ({"type": "audio", "mime_type": "audio/ogg", "data": "AAAA"}, "'audio/ogg'"),
            ({"type": "document", "mime_type": "application/msword", "data": "AAAA"}, "msword"),
            ({"type": "audio", "mime_type": "audio/wav", "uri": "https://x"}, "'content.uri'"),
        ],
    )
    def test_content_that_has_no_place_is_named(
        self, model: Model, content: Json, named: str
    ) -> None:
        with pytest.raises(Invalid, match=named):
            model.compile([user(content)], "m-1")

    async def test_any_json(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("{}"))]
        await self.run(model, ask(model, json_schema={}))
        assert fake.requests[-1].json["response_format"] == {"type": "json_object"}
        assert "JSON" in self.system(fake.requests[-1].json)

    async def test_loose_schemas_are_not_called_strict(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        fake.replies = [reply(TextDelta("{}"))]
        loose = {"type": "object", "properties": {"a": {"type": "string"}}}
        call = ask(model, json_schema=loose)
        await self.run(model, call)
        assert fake.requests[-1].json["response_format"]["json_schema"]["strict"] is False
        assert bool(model.check(call)) is self.official

    async def test_functions_without_parameters(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("x"))]
        await self.run(model, ask(model, tools=[{"type": "function", "name": "now"}]))
        sent = self.functions(fake.requests[-1].json)
        assert sent == [("now", {"type": "object", "properties": {}})]

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"tool_choice": "validated"}, "generation_config.tool_choice"),
            ({"safety_settings": [{"type": "jailbreak"}]}, "safety_settings"),
            ({"service_tier": "deferred"}, "service_tier"),
        ],
    )
    def test_downgrades(self, model: Model, fields: Json, named: str) -> None:
        (warning,) = model.check(ModelCall(model="m", messages=[], **fields))
        assert warning.field == named

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"modalities": ["video"]}, "response_modalities"),
            ({"response_formats": [{"type": "video"}]}, "response_format.type"),
            ({"generation": {"image_config": {"aspect_ratio": "1:1"}}}, "image_config"),
            ({"generation": {"video_config": {"task": "edit"}}}, "video_config"),
            ({"generation": {"transcription_config": {"mode": "smart"}}}, "transcription_config"),
            ({"generation": {"speech_config": [{"voice": "Kore"}]}}, "speech_config"),
            (
                {"response_formats": [{"type": "audio", "mime_type": "audio/wav"}]},
                "response_format.mime_type",
            ),
            ({"tools": [{"type": "google_search"}]}, "'google_search'.*'tools\\[0\\].type'"),
        ],
    )
    def test_what_cannot_be_honoured_is_named(self, model: Model, fields: Json, named: str) -> None:
        with pytest.raises(Invalid, match=named):
            model.check(ModelCall(model="m", messages=[], **fields))

    # The answer -------------------------------------------------------------------------------

    async def test_a_plain_json_answer(self, fake: FakeUpstream, model: Model) -> None:
        events = (
            TextDelta("Hello"),
            ToolCall("c1", "get_weather", {"city": "Rome"}),
            Finished("tool_calls", USAGE),
        )
        received = Received("/", {}, {"model": "m-1"})
        ChatCompletion.model_validate_json(whole(events, received), strict=True)
        fake.wants_stream = lambda _received: False
        fake.replies = [Reply(events=events)]
        got = await self.run(model, ask(model))
        assert got[:2] == list(events[:2])
        assert {name: got[-1].usage[name] for name in USAGE} == USAGE

    def test_the_fake_speaks_what_the_sdk_reads(self, fake: FakeUpstream) -> None:
        received = Received("/", {}, {"model": "m", "stream_options": {"include_usage": True}})
        events = TextDelta("x"), ToolCall("c", "f", {"a": 1}), Finished("tool_calls", USAGE)
        for event in fake.render(Reply(events=events), received):
            payload = event.removeprefix(b"data: ").strip()
            if payload != b"[DONE]":
                ChatCompletionChunk.model_validate_json(payload, strict=True)

    @pytest.mark.parametrize(
        "chunks",
        [
            [tool_delta({"function": {"name": "f", "arguments": '{"a":1}'}})] * 2,
            [
                tool_delta(
                    {"index": 0, "id": "x", "function": {"name": "f", "arguments": '{"a":1}'}},
                    {"index": 1, "id": "y", "function": {"name": "f", "arguments": '{"a":1}'}},
                )
            ],
            [
                tool_delta({"index": 0, "id": "x", "function": {"name": "f", "arguments": '{"a'}}),
                tool_delta({"index": 0, "id": "x", "function": {"arguments": '":1}'}}),
                tool_delta({"index": 1, "id": "y", "function": {"name": "f", "arguments": ""}}),
                tool_delta({"index": 1, "id": "y", "function": {"arguments": '{"a":1}'}}),
            ],
            [
                tool_delta({"index": 0, "id": "x", "function": {"name": "f", "arguments": "{"}}),
                tool_delta({"index": 1, "id": "y", "function": {"name": "f", "arguments": "{"}}),
                tool_delta({"index": 0, "function": {"arguments": '"a":1}'}}),
                tool_delta({"index": 1, "function": {"arguments": '"a":1}'}}),
            ],
            [
                tool_delta({"index": 0, "id": "x", "function": {"name": "f", "arguments": '{"a'}}),
                tool_delta({"index": 0, "function": {"arguments": '":1}'}}),
                tool_delta({"index": 0, "id": "y", "function": {"name": "f", "arguments": '{"a'}}),
                tool_delta({"index": 0, "function": {"arguments": '":1}'}}),
            ],
            [tool_delta({"id": i, "function": {"name": "f", "arguments": {"a": 1}}}) for i in "xy"],
            [
                tool_delta({"id": "x", "function": {"name": "f", "arguments": '{"a'}}),
                tool_delta({"function": {"arguments": '":1}'}}),
                tool_delta({"id": "y", "function": {"name": "f"}}),
                tool_delta({"id": "y", "function": {"arguments": '{"a":1}'}}),
            ],
        ],
        ids=[
            "no-index-no-id",
            "all-in-one-chunk",
            "id-repeated",
            "interleaved",
            "always-index-0",
            "object",
            "no-index",
        ],
    )
    async def test_sloppy_tool_calls(
        self, fake: FakeUpstream, model: Model, chunks: list[bytes]
    ) -> None:
        events = await self.raw(fake, model, *chunks, delta({}, "stop"), DONE)
        called = [(call.name, call.arguments) for call in events[:-1]]
        assert called == [("f", {"a": 1})] * 2
        assert events[-1].reason == "tool_calls"

    @pytest.mark.parametrize("raw", ['{"city": "Ro', "[1]", "Rome", '"x"'])
    async def test_malformed_arguments(self, fake: FakeUpstream, model: Model, raw: str) -> None:
        part = {"index": 0, "id": "c", "function": {"name": "f", "arguments": raw}}
        (call, _) = await self.raw(fake, model, tool_delta(part), delta({}, "tool_calls"), DONE)
        assert call == ToolCall("c", "f", {}, malformed=raw)

    @pytest.mark.parametrize("raw", ["", "null", " ", "{}"])
    async def test_no_arguments(self, fake: FakeUpstream, model: Model, raw: str) -> None:
        part = {"index": 0, "id": "c", "function": {"name": "f", "arguments": raw}}
        (call, _) = await self.raw(fake, model, tool_delta(part), delta({}, "tool_calls"), DONE)
        assert call == ToolCall("c", "f", {})

    async def test_a_call_that_the_limit_cut_is_dropped(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        part = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a": "b'}}
        (last,) = await self.raw(fake, model, tool_delta(part), delta({}, "length"), DONE)
        assert last.reason == "max_tokens"

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
    async def test_reasoning_fields(self, fake: FakeUpstream, model: Model, name: str) -> None:
        chunks = delta({name: "hm"}), delta({name: None, "content": "x"}), delta({}, "stop"), DONE
        asked = {"thinking_summaries": "auto"}
        events = await self.raw(fake, model, *chunks, generation=asked)
        assert events[:2] == [ThoughtDelta("hm"), TextDelta("x")]

    async def test_reasoning_that_comes_anyway(self, fake: FakeUpstream, model: Model) -> None:
        chunks = delta({"reasoning": "hm"}), delta({"content": "x"}), delta({}, "stop"), DONE
        generation = {"thinking_summaries": THOUGHTS_AS_GIVEN}
        events = await self.raw(fake, model, *chunks, generation=generation)
        assert events[:2] == [ThoughtDelta("hm"), TextDelta("x")]
        asked = fake.requests[-1].json
        await self.raw(fake, model, *chunks)
        assert asked == fake.requests[-1].json
        assert model.check(ask(model, generation=generation)) == []

    async def test_parts_of_mistral(self, fake: FakeUpstream, model: Model) -> None:
        thinking = {"type": "thinking", "thinking": [text("hm")]}
        chunks = delta({"content": [thinking, text("x")]}), delta({}, "stop"), DONE
        asked = {"thinking_summaries": "auto"}
        events = await self.raw(fake, model, *chunks, generation=asked)
        assert events[:2] == [ThoughtDelta("hm"), TextDelta("x")]

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
    @pytest.mark.parametrize("summaries", ["auto", "none"])
    async def test_what_led_to_calls_goes_back_in_its_own_field(
        self, fake: FakeUpstream, model: Model, name: str, summaries: str
    ) -> None:
        chunks = [
            delta({name: "hm, "}),
            delta({name: "well"}),
            delta({"content": "Let me see."}),
            tool_delta({"index": 0, "id": "c", "function": {"name": "now", "arguments": "{}"}}),
            delta({}, "tool_calls"),
        ]
        asked = {"thinking_summaries": summaries}
        events = await self.raw(fake, model, *chunks, DONE, generation=asked)
        signatures = [one.signature for one in events if isinstance(one, ThoughtSignature)]
        if self.official:
            assert signatures == []
            return
        assert isinstance(events[-2], ToolCall)
        steps = [
            user("x"),
            said("Let me see."),
            {"type": "thought", "signature": signatures[0]},
            {"type": "function_call", "id": "c", "name": "now", "arguments": {}},
        ]
        result = {"type": "function_result", "call_id": "c", "result": "12"}
        _, turn, _, last = compiled(model, *steps, result, said("Noon."))
        assert turn[name] == "hm, well"
        assert turn["content"] == "Let me see."
        assert set(last) == {"role", "content"}
        # The call is there before its result is.
        assert compiled(model, *steps)[-1][name] == "hm, well"

    async def test_reasoning_without_calls_is_not_kept(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        chunks = delta({"reasoning": "hm"}), delta({"content": "x"}), delta({}, "stop"), DONE
        events = await self.raw(fake, model, *chunks)
        assert [type(event) for event in events] == [TextDelta, Finished]

    async def test_reasoning_that_is_long_keeps_its_end(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        if self.official:
            return
        call = tool_delta({"index": 0, "id": "c", "function": {"name": "now"}})
        chunks = [delta({"reasoning": f"{at:>1000}"}) for at in range(300)]
        events = await self.raw(fake, model, *chunks, call, delta({}, "tool_calls"), DONE)
        sealed = next(one.signature for one in events if isinstance(one, ThoughtSignature))
        kept = orjson.loads(sealed)["reasoning"]
        assert len(kept) == 256 * 1024
        assert kept.endswith("299")

    async def test_details_of_reasoning_go_back_whole(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        if self.official:
            return
        piece = {"type": "reasoning.text", "index": 0, "format": "f"}
        secret = {"type": "reasoning.encrypted", "data": "c2VjcmV0", "index": 1}
        details = [
            {**piece, "text": "hm, "},
            {**piece, "text": "well", "signature": "QUJD"},
            secret,
        ]
        chunks = [delta({"reasoning": "hm", "reasoning_details": [one]}) for one in details]
        call = tool_delta({"index": 0, "id": "c", "function": {"name": "now"}})
        events = await self.raw(fake, model, *chunks, call, delta({}, "tool_calls"), DONE)
        sealed = next(one.signature for one in events if isinstance(one, ThoughtSignature))
        step = {"type": "function_call", "id": "c", "name": "now", "arguments": {}}
        (turn,) = compiled(model, {"type": "thought", "signature": sealed}, step)
        assert turn["reasoning_details"] == [
            {**piece, "text": "hm, well", "signature": "QUJD"},
            secret,
        ]
        assert "reasoning" not in turn

    def test_reasoning_stays_with_its_own_turn(self, model: Model) -> None:
        def turn(number: int) -> list[Json]:
            sealed = orjson.dumps({"reasoning_content": f"thought-{number}"}).decode()
            call = {"type": "code_execution_call", "id": f"c{number}", "arguments": {}}
            result = {"type": "code_execution_result", "call_id": f"c{number}", "result": "r"}
            return [{"type": "thought", "signature": sealed}, call, result]

        broken = {**said("bro"), "error": {"code": 13}}
        others = {"type": "thought", "signature": "not ours"}
        thoughtless = turn(3)[1:]
        after_broken = [turn(9)[0], broken, others, *turn(4)[1:]]
        steps = [*turn(1), *turn(2), *thoughtless, *after_broken, said("done")]
        found = [
            message.get("reasoning_content")
            for message in compiled(model, user("x"), *steps)
            if message["role"] == "assistant"
        ]
        thoughts = [None, None] if self.official else ["thought-1", "thought-2"]
        assert found == [*thoughts, None, None, None]

    @pytest.mark.parametrize("signature", ["[1]", "{", '{"role": "system"}', '{"reasoning": 1}'])
    def test_signatures_that_are_not_ours(self, model: Model, signature: str) -> None:
        call = {"type": "function_call", "id": "c", "name": "f", "arguments": {}}
        (turn,) = compiled(model, {"type": "thought", "signature": signature}, call)
        assert set(turn) == {"role", "content", "tool_calls"}
        assert turn["role"] == "assistant"

    @pytest.mark.parametrize(
        ("base_url", "blank"),
        [
            ("https://api.moonshot.ai/v1", " "),
            ("https://api.deepseek.com", ""),
            ("https://gateway.example/api.deepseek.com", None),
        ],
    )
    async def test_servers_that_want_reasoning_get_a_blank_for_what_was_lost(
        self, session: aiohttp.ClientSession, base_url: str, blank: str | None
    ) -> None:
        model = self.connect(session, base_url)
        call = {"type": "function_call", "id": "c", "name": "f", "arguments": {}}
        assert compiled(model, call)[0].get("reasoning_content") == blank

    async def test_inline_think_tags_stay_text(self, fake: FakeUpstream, model: Model) -> None:
        chunks = delta({"content": "<think>hm</think>x"}), delta({}, "stop"), DONE
        assert said_text(await self.raw(fake, model, *chunks)) == "<think>hm</think>x"

    async def test_citations_count_bytes(self, fake: FakeUpstream, model: Model) -> None:
        cited = {
            "type": "url_citation",
            "url": "https://r",
            "title": "R",
            "start_index": 3,
            "end_index": 8,
        }
        fake.replies = [reply(TextDelta("Ro🌍 ü is old."), Annotations([cited]))]
        events = await self.run(model, ask(model))
        (found,) = events[1].annotations
        told = "Ro🌍 ü is old.".encode()[found["start_index"] : found["end_index"]]
        assert told.decode() == "Ro🌍 ü is old."[3:8]
        assert found["url"] == "https://r"

    async def test_images_and_audio_out(self, fake: FakeUpstream, model: Model) -> None:
        picture = {"type": "image", "mime_type": "image/png", "data": PNG}
        pieces = [{"type": "audio", "data": b64(piece)} for piece in (b"abcd", b"ef")]
        fake.replies = [reply(*map(Media, [picture, *pieces]))]
        call = ask(model, modalities=["text", "audio"])
        assert model.check(call) == []
        events = await self.run(model, call)
        assert events[0].content == picture
        assert events[1].content["data"] == b64(b"abcdef")
        assert events[1].content["mime_type"] == "audio/l16"
        assert fake.requests[-1].json["audio"] == {"voice": "alloy", "format": "pcm16"}

    async def test_refusals_are_shown(self, fake: FakeUpstream, model: Model) -> None:
        chunks = delta({"refusal": "I can't "}), delta({"refusal": "do it."}), delta({}, "stop")
        events = await self.raw(fake, model, *chunks, DONE)
        assert said_text(events) == events[-1].message == "I can't do it."

    async def test_usage_beside_the_last_choice(self, fake: FakeUpstream, model: Model) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        last = sse(
            {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}], "usage": usage}
        )
        told = (await self.raw(fake, model, last))[-1].usage
        assert (told["total_input_tokens"], told["total_output_tokens"]) == (3, 4)
        assert told["output_tokens_by_modality"] == [{"modality": "text", "tokens": 4}]

    async def test_usage_that_is_missing_is_zero(self, fake: FakeUpstream, model: Model) -> None:
        events = await self.raw(fake, model, delta({"content": "x"}, "stop"), DONE)
        assert {events[-1].usage[name] for name in USAGE} == {0}

    async def test_thinking_counted_beside_the_completion(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        details = {"reasoning_tokens": 10}
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 17}
        last = sse({"choices": [], "usage": {**usage, "completion_tokens_details": details}})
        told = (await self.raw(fake, model, delta({"content": "x"}, "stop"), last, DONE))[-1].usage
        assert (told["total_output_tokens"], told["total_tokens"]) == (4, 17)

    async def test_a_mark_of_the_end_is_enough(self, fake: FakeUpstream, model: Model) -> None:
        events = await self.raw(fake, model, delta({"content": "x"}), DONE)
        assert events[-1].reason == "stop"

    async def test_only_a_mark_is_not(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [Reply(raw=DONE)]
        assert "ended early" in (await self.fails(model, ModelUnavailable)).message

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            ({"message": "m", "code": 502}, ModelUnavailable),
            ({"message": "m", "code": "429"}, ModelUnavailable),
            ({"message": "m", "type": "server_error"}, ModelUnavailable),
            ("m is broken", ModelUnavailable),
            (17, ModelUnavailable),
            ({"message": "m", "code": "context_length_exceeded"}, ContextOverflow),
        ],
    )
    async def test_errors_in_the_stream(
        self, fake: FakeUpstream, model: Model, error: Any, kind: Any
    ) -> None:
        fake.replies = [Reply(raw=delta({"content": "x"}) + sse({"error": error}))]
        await self.fails(model, kind)

    async def test_unknown_chunks_are_passed_over(self, fake: FakeUpstream, model: Model) -> None:
        first = sse({"choices": [], "prompt_filter_results": []})
        chunks = first, b": ping\n\n", delta({"content": "x"}), delta({"new": 1}, "stop"), DONE
        assert said_text(await self.raw(fake, model, *chunks)) == "x"

    def test_chunks_look_real(self) -> None:
        made = chunk(Received("/", {}, {"model": "m"}), [])
        assert orjson.loads(made[6:])["object"] == "chat.completion.chunk"


class TestOpenAI(TestOpenAICompatible):
    """api.openai.com itself."""

    official = True

    async def test_allowed_tools(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("x"))]
        choice = {"allowed_tools": {"mode": "any", "tools": ["get_weather"]}}
        await self.run(model, ask(model, tools=[WEATHER], tool_choice=choice))
        assert fake.requests[-1].json["tool_choice"] == {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "get_weather"}}],
            },
        }

    async def test_how_many_tools_it_takes(self, fake: FakeUpstream, model: Model) -> None:
        tools = [{"type": "function", "name": f"f{at}"} for at in range(129)]
        with pytest.raises(Invalid, match=r"129 functions.*128 at most"):
            model.check(ask(model, tools=tools))
        fake.replies = [reply(TextDelta("x"))]
        assert model.check(ask(model, tools=tools[1:])) == []
        await self.run(model, ask(model, tools=tools[1:]))

    def test_images_are_fetched_by_openai(self, model: Model) -> None:
        assert model.takes_uri("image", "https://x/y.png")
        assert not model.takes_uri("document", "https://x/y.pdf")
        assert not model.takes_uri("image", "gs://x/y.png")


def _parts(message: Json) -> list[Json]:
    content = message["content"] or []
    return [text(content)] if isinstance(content, str) else content
