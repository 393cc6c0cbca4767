"""The Anthropic adapter: the common contract, and what only Anthropic has."""

import base64
from typing import Any

import aiohttp
import anthropic
import orjson
import pytest
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from pydantic import TypeAdapter

from openinteractions.errors import ContextOverflow, Invalid, ModelRejected, ModelUnavailable
from openinteractions.models import anthropic as adapter_module
from openinteractions.models.anthropic import AnthropicModel
from openinteractions.models.anthropic_models import traits
from openinteractions.models.port import (
    THOUGHTS_AS_GIVEN,
    Annotations,
    Finished,
    Json,
    ModelCall,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
    VendorStep,
)
from openinteractions.models.transport import Upstream
from tests.contracts.models.history import HISTORY, PNG, said, text, user
from tests.contracts.models.suite import (
    USAGE,
    WEATHER,
    Call,
    ModelContract,
    Result,
    ask,
    reply,
    said_text,
)
from tests.fakes.anthropic import FakeAnthropic, frame, stream_events
from tests.fakes.upstream import Reply

NEW = "claude-opus-4-8"
ADAPTIVE = "claude-sonnet-4-6"
BUDGET = "claude-sonnet-4-5-20250929"
PARAMS = TypeAdapter(MessageCreateParamsStreaming)


def ask_as(model: AnthropicModel, name: str, *steps: list[Json], **fields: Any) -> ModelCall:
    """A call of a model of that name."""
    turns = steps or ([user("Hi")],)
    messages = [message for turn in turns for message in model.compile(turn, name)]
    return ModelCall(model=name, messages=messages, **fields)


def blocks(request: Json) -> list[tuple[str, Json]]:
    """All blocks of a request with their role."""
    return [(one["role"], block) for one in request["messages"] for block in one["content"]]


def compiled(model: AnthropicModel, *steps: Json) -> list[Json]:
    """The messages of these steps."""
    return [orjson.loads(message) for message in model.compile(steps, NEW)]


def used_search(*more: Any) -> Reply:
    """A turn in which Anthropic searched the web."""
    return reply(
        VendorStep({"type": "google_search_call", "id": "s1", "arguments": {"queries": ["q"]}}),
        VendorStep(
            {
                "type": "google_search_result",
                "call_id": "s1",
                "result": [{"title": "Ex", "url": "https://ex.org"}],
            }
        ),
        *more,
    )


class TestAnthropic(ModelContract):
    overflow_message = "prompt is too long: 210000 tokens > 200000 maximum"

    def new_fake(self) -> FakeAnthropic:
        return FakeAnthropic()

    def new_model(self, upstream: Upstream) -> AnthropicModel:
        return AnthropicModel(upstream, provider="anthropic")

    def headers(self) -> dict[str, str]:
        return adapter_module.headers("sk-test")

    def system(self, request: Json) -> str:
        return request["system"][0]["text"]

    def texts(self, request: Json) -> list[tuple[str, str]]:
        roles = {"user": "user", "assistant": "model"}
        return [(roles[role], block["text"]) for role, block in blocks(request) if "text" in block]

    def images(self, request: Json) -> list[tuple[str, str]]:
        found = [block for _, block in blocks(request)]
        found += [
            inner
            for block in found
            if isinstance(block.get("content"), list)
            for inner in block["content"]
        ]
        sources = [block["source"] for block in found if block["type"] == "image"]
        return [(source["media_type"], source["data"]) for source in sources]

    def calls(self, request: Json) -> list[Call]:
        found = [block for _, block in blocks(request) if block["type"] == "tool_use"]
        return [Call(call["id"], call["name"], call["input"]) for call in found]

    def results(self, request: Json) -> list[Result]:
        found = [block for _, block in blocks(request) if block["type"] == "tool_result"]
        return [Result(one["tool_use_id"], self._told(one["content"])) for one in found]

    def _told(self, content: str | list[Json]) -> str:
        return content if isinstance(content, str) else orjson.dumps(content).decode()

    def functions(self, request: Json) -> list[tuple[str, Json]]:
        return [
            (tool["name"], tool["input_schema"])
            for tool in request.get("tools", ())
            if "type" not in tool
        ]

    def schema(self, request: Json) -> Json | None:
        return request["output_config"]["format"]["schema"]

    def max_tokens(self, request: Json) -> int | None:
        return request["max_tokens"]

    # The wire ---------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("base", "path"), [("", "/v1/messages"), ("/v1/", "/v1/messages"), ("/x", "/x/v1/messages")]
    )
    async def test_path(
        self, fake: FakeAnthropic, session: aiohttp.ClientSession, base: str, path: str
    ) -> None:
        fake.default = reply(TextDelta("x"))
        model = self.connect(session, fake.url + base)
        await self.run(model, ask(model))
        assert fake.requests[-1].path == path
        assert fake.requests[-1].headers["anthropic-version"] == "2023-06-01"

    async def test_requests_are_valid_for_the_sdk(
        self, fake: FakeAnthropic, model: AnthropicModel
    ) -> None:
        fake.default = reply(TextDelta("x"))
        call = ask_as(
            model,
            NEW,
            HISTORY,
            [user("question-two")],
            system="s",
            tools=[WEATHER, {"type": "google_search"}, {"type": "url_context"}],
            generation={
                "max_output_tokens": 9,
                "stop_sequences": ["#"],
                "thinking_level": "xhigh",
                "thinking_summaries": "auto",
            },
            json_schema={"type": "object", "properties": {}},
            service_tier="standard",
        )
        assert model.check(call) == []
        await self.run(model, call)
        sent = fake.requests[-1].json
        PARAMS.validate_python(sent)
        assert sent["stop_sequences"] == ["#"]
        assert sent["service_tier"] == "standard_only"
        assert sent["thinking"] == {"type": "adaptive", "display": "summarized"}
        assert sent["output_config"]["effort"] == "xhigh"
        assert [tool.get("type") for tool in sent["tools"]] == [
            None,
            "web_search_20250305",
            "web_fetch_20250910",
        ]
        # Every use is answered in the message behind it.
        for message, following in zip(sent["messages"], sent["messages"][1:], strict=False):
            uses = [one["id"] for one in message["content"] if one["type"] == "tool_use"]
            told = [one.get("tool_use_id") for one in following["content"][: len(uses)]]
            assert told == uses

    async def test_the_real_sdk_understands_the_fake(self, fake: FakeAnthropic) -> None:
        fake.default = reply(
            ThoughtDelta("hm"),
            ThoughtSignature("QUJD"),
            TextDelta("Hi "),
            TextDelta("there"),
            ToolCall("c1", "now", {"a": 1}),
            Finished("tool_calls", USAGE),
        )
        async with anthropic.AsyncAnthropic(api_key="k", base_url=fake.url) as client:
            asked: Any = {
                "model": NEW,
                "max_tokens": 9,
                "messages": [{"role": "user", "content": "x"}],
            }
            async with client.messages.stream(**asked) as stream:
                streamed = await stream.get_final_message()
            whole = await client.messages.create(**asked)
        for message in (streamed, whole):
            kinds = [block.type for block in message.content]
            assert kinds == ["thinking", "text", "tool_use"]
            assert message.content[0].signature == "QUJD"
            assert message.content[1].text == "Hi there"
            assert message.content[2].input == {"a": 1}
            assert message.usage.output_tokens == 30
            assert message.stop_reason == "tool_use"

    async def test_a_plain_json_answer(self, fake: FakeAnthropic, model: AnthropicModel) -> None:
        fake.wants_stream = lambda _received: False  # type: ignore[method-assign]
        fake.replies = [
            reply(
                ThoughtDelta("hm"),
                ThoughtSignature("QUJD"),
                TextDelta("Hi"),
                ToolCall("c1", "now", {"a": 1}),
                Finished("tool_calls", USAGE),
            )
        ]
        call = ask(model, generation={"thinking_summaries": "auto"})
        events = await self.run(model, call)
        assert events[:-1] == [
            ThoughtDelta("hm"),
            ThoughtSignature("QUJD"),
            TextDelta("Hi"),
            ToolCall("c1", "now", {"a": 1}),
        ]
        assert events[-1].reason == "tool_calls"
        assert events[-1].usage == USAGE

    # Thinking ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("summaries", ["auto", THOUGHTS_AS_GIVEN, "none"])
    async def test_thoughts_go_back_as_they_came(
        self, fake: FakeAnthropic, model: AnthropicModel, summaries: str
    ) -> None:
        fake.replies = [
            reply(
                ThoughtDelta("hm, "), ThoughtDelta("well"), ThoughtSignature("QUJD"), TextDelta("x")
            )
        ]
        events = await self.run(model, ask(model, generation={"thinking_summaries": summaries}))
        shown = "".join(event.text for event in events if isinstance(event, ThoughtDelta))
        assert shown == ("" if summaries == "none" else "hm, well")
        (signature,) = [one.signature for one in events if isinstance(one, ThoughtSignature)]
        thought: Json = {"type": "thought", "signature": signature}
        if shown:
            thought["summary"] = [text(shown)]
        assert compiled(model, user("a"), thought, said("x"))[1]["content"] == [
            {"type": "thinking", "thinking": "hm, well", "signature": "QUJD"},
            {"type": "text", "text": "x"},
        ]

    def test_a_broken_answers_thoughts_are_left_out(self, model: AnthropicModel) -> None:
        thought = {"type": "thought", "signature": "QUJD"}
        broken = {**said("bro"), "error": {"code": 13}}
        again = {"type": "thought", "signature": "REVG"}
        found = compiled(model, user("a"), thought, broken, again, said("x"), again)
        assert [block["type"] for block in found[1]["content"]] == ["thinking", "text"]
        assert found[1]["content"][0]["signature"] == "REVG"
        assert len(compiled(model, user("a"), thought, broken)) == 1

    async def test_redacted_thoughts_go_back(
        self, fake: FakeAnthropic, model: AnthropicModel
    ) -> None:
        block = {"type": "redacted_thinking", "data": "c2VjcmV0"}
        start, *_, delta, stop = stream_events(reply().events)
        fake.replies = [
            Reply(
                raw=frame(start)
                + frame({"type": "content_block_start", "index": 0, "content_block": block})
                + frame({"type": "content_block_stop", "index": 0})
                + frame(delta)
                + frame(stop)
            )
        ]
        thought, _ = await self.run(model, ask(model))
        step = {"type": "thought", "signature": thought.signature}
        assert compiled(model, user("a"), step, said("x"))[1]["content"][0] == block

    @pytest.mark.parametrize(
        ("name", "generation", "expected"),
        [
            (NEW, {}, (None, None, [])),
            (NEW, {"thinking_summaries": "auto"}, ("summarized", None, [])),
            (NEW, {"thinking_summaries": THOUGHTS_AS_GIVEN}, (None, None, [])),
            ("claude-opus-5", {"thinking_summaries": "none"}, (None, None, [])),
            (
                "claude-opus-5",
                {"thinking_summaries": THOUGHTS_AS_GIVEN},
                ("summarized", None, []),
            ),
            (BUDGET, {"thinking_summaries": THOUGHTS_AS_GIVEN}, (None, None, [])),
            ("other-model", {"thinking_summaries": THOUGHTS_AS_GIVEN}, (None, None, [])),
            (NEW, {"thinking_level": "minimal"}, ("omitted", "low", ["thinking_level"])),
            (NEW, {"thinking_level": "xhigh"}, ("omitted", "xhigh", [])),
            (ADAPTIVE, {"thinking_level": "xhigh"}, ("omitted", "high", ["thinking_level"])),
            (BUDGET, {"thinking_level": "low"}, (4096, None, [])),
            (BUDGET, {"thinking_level": "xhigh"}, (23552, None, [])),
            (
                BUDGET,
                {"thinking_level": "high", "max_output_tokens": 4000},
                (2000, None, ["thinking_level"]),
            ),
            (
                BUDGET,
                {"thinking_level": "high", "max_output_tokens": 400},
                (None, None, ["thinking_level"]),
            ),
            (
                "claude-3-5-sonnet-20241022",
                {"thinking_level": "low"},
                (None, None, ["thinking_level"]),
            ),
            ("other-model", {"thinking_level": "minimal"}, (1024, None, [])),
        ],
    )
    async def test_thinking(
        self,
        fake: FakeAnthropic,
        model: AnthropicModel,
        name: str,
        generation: Json,
        expected: tuple[str | int | None, str | None, list[str]],
    ) -> None:
        thinking, effort, warnings = expected
        fake.default = reply(TextDelta("x"))
        call = ask_as(model, name, generation=generation)
        assert [one.field for one in model.check(call)] == [
            f"generation_config.{field}" for field in warnings
        ]
        await self.run(model, call)
        sent = fake.requests[-1].json
        config = sent.get("thinking", {})
        assert config.get("display", config.get("budget_tokens")) == thinking
        assert sent.get("output_config", {}).get("effort") == effort
        if isinstance(thinking, int):
            assert sent["max_tokens"] > thinking

    def test_no_budget_in_a_turn_that_was_begun_without_thought(
        self, model: AnthropicModel
    ) -> None:
        steps = [
            user("x"),
            {"type": "function_call", "id": "a", "name": "f", "arguments": {}},
            {"type": "function_result", "call_id": "a", "result": "1"},
        ]
        thinking = {"thinking_level": "low"}
        (warning,) = model.check(ask_as(model, BUDGET, steps, generation=thinking))
        assert warning.field == "generation_config.thinking_level"
        thought = {"type": "thought", "signature": "QUJD"}
        steps.insert(1, thought)
        assert model.check(ask_as(model, BUDGET, steps, generation=thinking)) == []

    @pytest.mark.parametrize(
        ("name", "version"),
        [
            ("claude-opus-4-20250514", "budget"),
            ("claude-haiku-4-5", "budget"),
            ("anthropic.claude-opus-4-6-v1:0", "adaptive"),
            ("claude-3-7-sonnet-20250219", "budget"),
            ("claude-3-opus-20240229", "none"),
            ("claude-sonnet-5", "adaptive"),
            ("claude-mythos-preview", "adaptive"),
        ],
    )
    def test_generations(self, name: str, version: str) -> None:
        assert traits(name).thinking == version

    # Options ----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("name", "fields", "fields_warned"),
        [
            (NEW, {"generation": {"temperature": 0.2}}, ["generation_config.temperature"]),
            (BUDGET, {"generation": {"temperature": 0.2}}, []),
            (BUDGET, {"generation": {"temperature": 1.5}}, ["generation_config.temperature"]),
            (
                BUDGET,
                {"generation": {"temperature": 0.2, "top_p": 0.5}},
                ["generation_config.top_p"],
            ),
            (
                BUDGET,
                {"generation": {"temperature": 0.2, "thinking_level": "low"}},
                ["generation_config.temperature"],
            ),
            (NEW, {"generation": {"seed": 1}}, ["generation_config.seed"]),
            (NEW, {"generation": {"speech_config": []}}, ["generation_config.speech_config"]),
            (NEW, {"tool_choice": "any"}, ["generation_config.tool_choice"]),
            (
                NEW,
                {"tool_choice": "validated", "tools": [WEATHER]},
                ["generation_config.tool_choice"],
            ),
            (
                BUDGET,
                {
                    "tool_choice": "any",
                    "tools": [WEATHER],
                    "generation": {"thinking_level": "low"},
                },
                ["generation_config.thinking_level"],
            ),
            (NEW, {"service_tier": "flex"}, ["service_tier"]),
            (
                NEW,
                {"safety_settings": [{"type": "harassment", "threshold": "off"}]},
                ["safety_settings"],
            ),
            (NEW, {"json_schema": {}}, ["response_format"]),
            (NEW, {"json_schema": {"type": "string", "minLength": 2}}, ["response_format.schema"]),
            (
                NEW,
                {"tools": [{"type": "google_search", "search_types": ["image_search"]}]},
                ["tools[0].search_types"],
            ),
        ],
    )
    def test_downgrades_are_told(
        self, model: AnthropicModel, name: str, fields: dict[str, Any], fields_warned: list[str]
    ) -> None:
        warnings = model.check(ModelCall(model=name, messages=[], **fields))
        assert [warning.field for warning in warnings] == fields_warned

    @pytest.mark.parametrize(
        "fields",
        [
            {"tools": [{"type": "mcp_server"}]},
            {"tools": [{"type": "code_execution"}]},
            {"modalities": ["text", "image"]},
            {"response_formats": [{"type": "audio"}]},
        ],
    )
    def test_what_cannot_be_done_is_invalid(
        self, model: AnthropicModel, fields: dict[str, Any]
    ) -> None:
        with pytest.raises(Invalid, match="is not supported for"):
            model.check(ModelCall(model=NEW, messages=[], **fields))

    async def test_allowed_tools_are_the_only_ones(
        self, fake: FakeAnthropic, model: AnthropicModel
    ) -> None:
        fake.default = reply(TextDelta("x"))
        now = {"type": "function", "name": "now"}
        choice = {"allowed_tools": {"mode": "any", "tools": ["now"]}}
        await self.run(model, ask(model, tools=[WEATHER, now], tool_choice=choice))
        sent = fake.requests[-1].json
        assert [tool["name"] for tool in sent["tools"]] == ["now"]
        assert sent["tool_choice"] == {"type": "any"}

    async def test_schemas_are_closed(self, fake: FakeAnthropic, model: AnthropicModel) -> None:
        fake.default = reply(TextDelta("{}"))
        inner = {"type": "object", "properties": {"minimum": {"type": "integer", "minimum": 1}}}
        schema = {"type": "object", "properties": {"a": {"type": "array", "items": inner}}}
        await self.run(model, ask(model, json_schema=schema))
        sent = self.schema(fake.requests[-1].json)
        assert sent == {
            "type": "object",
            "properties": {
                "a": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"minimum": {"type": "integer"}},
                        "additionalProperties": False,
                    },
                }
            },
            "additionalProperties": False,
        }

    async def test_the_prompt_is_cached_when_it_will_come_again(
        self, fake: FakeAnthropic, model: AnthropicModel
    ) -> None:
        fake.default = reply(TextDelta("x"))
        await self.run(model, ask(model, system="s"))
        assert "cache_control" not in orjson.dumps(fake.requests[-1].json).decode()
        await self.run(model, ask(model, [user("a"), said("b")], [user("c", "d")], system="s"))
        sent = fake.requests[-1].json
        mark = {"type": "ephemeral"}
        assert sent["system"][0]["cache_control"] == mark
        assert [block.get("cache_control") for _, block in blocks(sent)] == [None, None, None, mark]

    # Content ----------------------------------------------------------------------------------

    def test_documents(self, model: AnthropicModel) -> None:
        words = base64.urlsafe_b64encode("grüß".encode()).decode()
        (message,) = compiled(
            model,
            user(
                {"type": "document", "mime_type": "text/csv", "data": words},
                {"type": "document", "mime_type": "application/pdf", "data": "a-_a"},
                {"type": "document", "uri": "https://x/a.pdf"},
                {"type": "image", "uri": "https://x/a.png", "mime_type": "image/png"},
            ),
        )
        assert [block["source"] for block in message["content"]] == [
            {"type": "text", "media_type": "text/plain", "data": "grüß"},
            {"type": "base64", "media_type": "application/pdf", "data": "a+/a"},
            {"type": "url", "url": "https://x/a.pdf"},
            {"type": "url", "url": "https://x/a.png"},
        ]

    @pytest.mark.parametrize(
        "block",
        [
            {"type": "audio", "mime_type": "audio/wav", "data": ""},
            {"type": "video", "mime_type": "video/mp4", "data": ""},
            {"type": "image", "mime_type": "image/heic", "data": ""},
            {"type": "document", "mime_type": "application/msword", "data": ""},
            {"type": "document", "mime_type": "text/plain", "data": "/w=="},
        ],
    )
    def test_content_that_it_cannot_take(self, model: AnthropicModel, block: Json) -> None:
        with pytest.raises(Invalid):
            model.compile([user(block)], NEW)

    @pytest.mark.parametrize(
        ("kind", "uri", "taken"),
        [
            ("image", "https://x/a", True),
            ("image", "http://x/a", False),
            ("document", "https://x/a.PDF?b", True),
            ("document", "https://x/a", False),
            ("video", "https://x/a", False),
        ],
    )
    def test_uris(self, model: AnthropicModel, kind: str, uri: str, *, taken: bool) -> None:
        assert model.takes_uri(kind, uri) is taken

    def test_results_come_first_and_blank_texts_go(self, model: AnthropicModel) -> None:
        messages = compiled(
            model,
            user("x"),
            said(" \n"),
            {"type": "function_call", "id": "a.b", "name": "f", "arguments": {}},
            user("also"),
            {"type": "function_result", "call_id": "a.b", "result": ""},
        )
        assert [one["content"][0]["type"] for one in messages] == [
            "text",
            "tool_use",
            "tool_result",
        ]
        assert messages[2]["content"] == [
            {"type": "tool_result", "tool_use_id": "a_b_e56a617bbe0d"},
            {"type": "text", "text": "also"},
        ]

    async def test_a_failed_calls_picture_stands_behind_the_results(
        self, fake: FakeAnthropic, model: AnthropicModel
    ) -> None:
        picture = {"type": "image", "mime_type": "image/png", "data": PNG}
        failed = {"type": "code_execution_result", "is_error": True}
        begun = [
            user("x"),
            *({"type": "code_execution_call", "id": name, "arguments": {}} for name in "ab"),
            {"type": "function_call", "id": "c", "name": "now", "arguments": {}},
            {**failed, "call_id": "a", "result": [text("oops"), picture]},
            {**failed, "call_id": "b", "result": [picture]},
        ]
        answered = [{"type": "function_result", "call_id": "c", "result": "1"}, user("well?")]
        fake.default = reply(TextDelta("x"))
        await self.run(model, ask(model, begun, answered))
        _, _, message = fake.requests[-1].json["messages"]
        results, shown = message["content"][:3], message["content"][3:]
        assert [one.get("content") for one in results] == [
            [text("oops")],
            "Failed, without a message.",
            "1",
        ]
        kinds = [block["type"] for block in shown]
        assert kinds == ["text", "image", "text", "image", "text"]
        assert "a" in shown[0]["text"]

    async def test_a_picture_before_an_open_call(
        self, fake: FakeAnthropic, model: AnthropicModel
    ) -> None:
        picture = {"type": "image", "uri": "https://x/a.png"}
        made = {"type": "model_output", "content": [text("Here:"), picture]}
        call = {"type": "function_call", "id": "c", "name": "now", "arguments": {}}
        result = {"type": "function_result", "call_id": "c", "result": "1"}
        fake.default = reply(TextDelta("x"))
        await self.run(model, ask(model, [user("x"), made, call], [result]))
        kinds = [block["type"] for _, block in blocks(fake.requests[-1].json)]
        assert kinds == ["text", "text", "tool_use", "tool_result", "text", "image"]

    def test_ids_that_it_does_not_take_stay_apart(self, model: AnthropicModel) -> None:
        names = ["a.b", "a:b", "a_b", "x" * 65, "x" * 64]
        call = {"type": "function_call", "name": "f", "arguments": {}}
        (message,) = compiled(model, *({**call, "id": name} for name in names))
        ids = [block["id"] for block in message["content"]]
        assert len(set(ids)) == len(names)
        assert ids[2:] == ["a_b", ids[3], "x" * 64]

    async def test_calls_in_the_history_without_tools(
        self, fake: FakeAnthropic, model: AnthropicModel
    ) -> None:
        fake.default = reply(TextDelta("x"))
        await self.run(model, ask(model, HISTORY, [user("and now?")]))
        sent = fake.requests[-1].json
        assert sent["tool_choice"] == {"type": "none"}
        assert {"code_execution", "docs__lookup"} <= {tool["name"] for tool in sent["tools"]}
        PARAMS.validate_python(sent)
        await self.run(model, ask(model, [user("x")]))
        assert "tools" not in fake.requests[-1].json

    def test_pictures_of_the_models_own(self, model: AnthropicModel) -> None:
        picture = {"type": "image", "mime_type": "image/png", "data": PNG}
        answer = {"type": "model_output", "content": [text("Look:"), picture]}
        messages = compiled(model, user("draw"), answer, user("bigger"))
        assert [one["role"] for one in messages] == ["user", "assistant", "user"]
        assert [one["type"] for one in messages[2]["content"]] == ["text", "image", "text"]

    # Tools ------------------------------------------------------------------------------------

    async def test_malformed_arguments(self, fake: FakeAnthropic, model: AnthropicModel) -> None:
        for bad in ('{"a": ', "[1]"):
            fake.replies = [
                reply(ToolCall("c", "now", {}, malformed=bad), Finished("tool_calls", USAGE))
            ]
            call, _ = await self.run(model, ask(model))
            assert call == ToolCall("c", "now", {}, malformed=bad)

    async def test_native_search(self, fake: FakeAnthropic, model: AnthropicModel) -> None:
        note = {
            "type": "url_citation",
            "url": "https://ex.org",
            "title": "Ex",
            "start_index": 4,
            "end_index": 9,
        }
        fake.replies = [used_search(TextDelta("so: "), TextDelta("Röme"), Annotations([note]))]
        # The cited part is a block of its own.
        whole = fake.render

        def split(scripted: Reply, received: Any) -> list[bytes]:
            frames = whole(scripted, received)
            at = next(n for n, one in enumerate(frames) if "Röme".encode() in one)
            stop = frame({"type": "content_block_stop", "index": 2})
            block = {"type": "text", "text": ""}
            start = frame({"type": "content_block_start", "index": 3, "content_block": block})
            return [*frames[:at], stop, start, *frames[at:]]

        fake.render = split  # type: ignore[method-assign]
        events = await self.run(model, ask(model, tools=[{"type": "google_search"}]))
        assert fake.requests[-1].json["tools"] == [
            {"type": "web_search_20250305", "name": "web_search"}
        ]
        call, result = events[0].step, events[1].step
        assert call["arguments"] == {"queries": ["q"]}
        assert result["result"] == [{"title": "Ex", "url": "https://ex.org"}]
        assert said_text(events) == "so: Röme"
        assert events[4] == Annotations([note])
        sent = compiled(model, user("x"), call, result, said("so: Röme"))[1]["content"]
        assert sent[0] == {
            "type": "server_tool_use",
            "id": "s1",
            "name": "web_search",
            "input": {"query": "q"},
        }
        assert sent[1]["content"][0]["encrypted_content"] == "RW5j"

    async def test_native_fetch(self, fake: FakeAnthropic, model: AnthropicModel) -> None:
        fake.replies = [
            reply(
                VendorStep(
                    {"type": "url_context_call", "id": "u", "arguments": {"urls": ["https://u"]}}
                ),
                VendorStep(
                    {
                        "type": "url_context_result",
                        "call_id": "u",
                        "result": [{"url": "https://u", "status": "success"}],
                    }
                ),
                TextDelta("x"),
            )
        ]
        events = await self.run(model, ask(model, tools=[{"type": "url_context"}]))
        assert events[0].step["arguments"] == {"urls": ["https://u"]}
        assert events[1].step["result"] == [{"url": "https://u", "status": "success"}]
        sent = compiled(model, user("x"), events[0].step, events[1].step)[1]["content"]
        assert [one["type"] for one in sent] == ["server_tool_use", "web_fetch_tool_result"]

    async def test_a_paused_turn_goes_on(self, fake: FakeAnthropic, model: AnthropicModel) -> None:
        paused = [*stream_events(used_search(TextDelta("so ")).events)]
        paused[-2]["delta"]["stop_reason"] = "pause_turn"
        fake.replies = [
            Reply(raw=b"".join(frame(event) for event in paused)),
            reply(TextDelta("far")),
        ]
        events = await self.run(model, ask(model, tools=[{"type": "google_search"}]))
        assert said_text(events) == "so far"
        assert events[-1].reason == "stop"
        assert events[-1].usage["total_tokens"] == 300
        sent = fake.requests[1].json["messages"]
        assert sent[0] == fake.requests[0].json["messages"][0]
        assert [block["type"] for block in sent[1]["content"]] == [
            "server_tool_use",
            "web_search_tool_result",
            "text",
        ]
        PARAMS.validate_python(fake.requests[1].json)

    async def test_a_paused_turn_that_breaks_off(
        self, fake: FakeAnthropic, model: AnthropicModel
    ) -> None:
        paused = [*stream_events(used_search().events)]
        paused[-2]["delta"]["stop_reason"] = "pause_turn"
        fake.replies = [
            Reply(raw=b"".join(frame(event) for event in paused)),
            reply(TextDelta("far"), cut_after=2),
        ]
        with pytest.raises(ModelUnavailable):
            await self.run(model, ask(model, tools=[{"type": "google_search"}]))

    # Ends -------------------------------------------------------------------------------------

    async def test_a_refusal_says_why(self, fake: FakeAnthropic, model: AnthropicModel) -> None:
        fake.replies = [
            reply(Finished("content_filter", USAGE, "Not that.")),
            reply(Finished("content_filter", USAGE)),
        ]
        assert (await self.run(model, ask(model)))[-1].message == "Not that."
        assert (await self.run(model, ask(model)))[-1].message == "The model refused to answer."

    @pytest.mark.parametrize(
        ("stop", "reason"),
        [("stop_sequence", "stop"), ("model_context_window_exceeded", "max_tokens")],
    )
    async def test_other_ends(
        self, fake: FakeAnthropic, model: AnthropicModel, stop: str, reason: str
    ) -> None:
        events = stream_events(reply(TextDelta("x")).events)
        events[-2]["delta"]["stop_reason"] = stop
        fake.replies = [Reply(raw=b"".join(frame(event) for event in events))]
        assert (await self.run(model, ask(model)))[-1].reason == reason

    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            ("overloaded_error", ModelUnavailable),
            ("rate_limit_error", ModelUnavailable),
            ("new_error", ModelUnavailable),
            ("invalid_request_error", ModelRejected),
            ("authentication_error", ModelRejected),
        ],
    )
    async def test_errors_in_the_stream_by_type(
        self, fake: FakeAnthropic, model: AnthropicModel, kind: str, error: Any
    ) -> None:
        event = {"type": "error", "error": {"type": kind, "message": "oops"}}
        fake.replies = [Reply(raw=frame(event))]
        assert "oops" in (await self.fails(model, error)).message

    async def test_overflow_in_the_stream(self, fake: FakeAnthropic, model: AnthropicModel) -> None:
        error = {"type": "invalid_request_error", "message": self.overflow_message}
        fake.replies = [Reply(raw=frame({"type": "error", "error": error}))]
        await self.fails(model, ContextOverflow)

    async def test_cache_writes_count_as_input(
        self, fake: FakeAnthropic, model: AnthropicModel
    ) -> None:
        events = stream_events(reply(TextDelta("x")).events)
        events[0]["message"]["usage"]["cache_creation_input_tokens"] = 5
        fake.replies = [Reply(raw=b"".join(frame(event) for event in events))]
        usage = (await self.run(model, ask(model)))[-1].usage
        assert usage["total_input_tokens"] == 125
        assert usage["total_cached_tokens"] == 20

    async def test_not_anthropics_format(self, fake: FakeAnthropic, model: AnthropicModel) -> None:
        for strange in (
            {"type": "content_block_delta", "delta": 3},
            {"type": "message_start"},
            {"type": "content_block_start", "content_block": {"type": "text", "text": 7}},
        ):
            fake.replies = [Reply(raw=frame(strange))]
            await self.fails(model, ModelUnavailable)
