"""The Gemini adapter: the common contract, and what only Gemini has."""

import base64
from typing import Any

import aiohttp
import orjson
import pytest
from google import genai
from google.genai import types

from openinteractions.errors import Invalid, ModelRejected, ModelUnavailable
from openinteractions.models import gemini
from openinteractions.models.gemini import GeminiModel
from openinteractions.models.port import (
    THOUGHTS_AS_GIVEN,
    Annotations,
    Finished,
    Json,
    Media,
    ModelCall,
    TextDelta,
    ThoughtDelta,
    ThoughtSignature,
    ToolCall,
    VendorStep,
)
from openinteractions.models.transport import Upstream
from tests.contracts.models.history import PNG, said, text, user
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
from tests.fakes.gemini import FakeGemini, chunks, frame
from tests.fakes.upstream import Reply

G3 = "gemini-3.5-flash"


def parts(request: Json) -> list[tuple[str, Json]]:
    """All parts of a request with their role."""
    return [(one["role"], part) for one in request["contents"] for part in one["parts"]]


def ask_as(model: GeminiModel, name: str, *steps: list[Json], **fields: Any) -> ModelCall:
    """A call of a model of that name."""
    turns = steps or ([user("Hi")],)
    messages = [message for turn in turns for message in model.compile(turn, name)]
    return ModelCall(model=name, messages=messages, **fields)


def raw(*found: Json, **more: Any) -> Reply:
    """A reply of these chunks: parts of one candidate each, then STOP with `more` beside it."""
    body = b"".join(frame({"candidates": [{"content": {"parts": [part]}}]}) for part in found)
    end = {"candidates": [{"finishReason": "STOP", **more}], "usageMetadata": {}}
    return Reply(raw=body + frame(end))


class TestGemini(ModelContract):
    overflow_message = (
        "The input token count (2000000) exceeds the maximum number of tokens allowed (1048576)."
    )

    def new_fake(self) -> FakeGemini:
        return FakeGemini()

    def new_model(self, upstream: Upstream) -> GeminiModel:
        return GeminiModel(upstream, provider="gemini")

    def headers(self) -> dict[str, str]:
        return gemini.headers("sk-test")

    def system(self, request: Json) -> str:
        return request["systemInstruction"]["parts"][0]["text"]

    def texts(self, request: Json) -> list[tuple[str, str]]:
        return [(role, part["text"]) for role, part in parts(request) if "text" in part]

    def images(self, request: Json) -> list[tuple[str, str]]:
        found = [part for _, part in parts(request)]
        found += [
            inner for part in found for inner in part.get("functionResponse", {}).get("parts", ())
        ]
        blobs = [part["inlineData"] for part in found if "inlineData" in part]
        return [(blob["mimeType"], blob["data"]) for blob in blobs]

    def calls(self, request: Json) -> list[Call]:
        found = [part["functionCall"] for _, part in parts(request) if "functionCall" in part]
        return [Call(call["id"], call["name"], call["args"]) for call in found]

    def results(self, request: Json) -> list[Result]:
        return [
            Result(part["functionResponse"]["id"], orjson.dumps(part["functionResponse"]).decode())
            for _, part in parts(request)
            if "functionResponse" in part
        ]

    def functions(self, request: Json) -> list[tuple[str, Json]]:
        return [
            (one["name"], one.get("parametersJsonSchema", {}))
            for tool in request.get("tools", ())
            for one in tool.get("functionDeclarations", ())
        ]

    def schema(self, request: Json) -> Json | None:
        return request["generationConfig"].get("responseJsonSchema")

    def max_tokens(self, request: Json) -> int | None:
        return request["generationConfig"].get("maxOutputTokens")

    # Where requests go ------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("base", "model", "path"),
        [
            ("", "gemini-x", "/v1beta/models/gemini-x"),
            ("/v1", "gemini-x", "/v1/models/gemini-x"),
            ("/v1beta/", "tunedModels/a", "/v1beta/tunedModels/a"),
            ("/proxy", "a b", "/proxy/v1beta/models/a%20b"),
        ],
    )
    async def test_path(
        self, fake: FakeGemini, session: aiohttp.ClientSession, base: str, model: str, path: str
    ) -> None:
        fake.default = reply(TextDelta("x"))
        adapter = self.connect(session, fake.url + base)
        await self.run(adapter, ask_as(adapter, model))
        assert fake.requests[-1].path == f"{path}:streamGenerateContent?alt=sse"

    async def test_a_plain_json_answer(self, fake: FakeGemini, model: GeminiModel) -> None:
        script = reply(TextDelta("one "), TextDelta("two"), ToolCall("c", "now", {}))
        for plain in (False, True):
            fake.wants_stream = lambda _received, plain=plain: plain  # type: ignore[method-assign]
            fake.replies = [script]
            events = await self.run(model, ask(model))
            assert said_text(events) == "one two"
            assert events[-2] == ToolCall("c", "now", {})
        received = fake.requests[-1]
        whole = fake.render_whole(script, type(received)("x:generateContent", {}, None))
        fake.replies = [Reply(raw=b"data: " + whole + b"\n\n")]
        assert said_text(await self.run(model, ask(model))) == "one two"

    @pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
    async def test_the_real_sdk_understands_the_fake(self, fake: FakeGemini) -> None:
        fake.default = reply(
            ThoughtDelta("hm"),
            ThoughtSignature("QUJD"),
            TextDelta("Hi "),
            TextDelta("there"),
            ToolCall("c1", "now", {"a": 1}, signature="QUJD"),
            Finished("tool_calls", USAGE),
        )
        client = genai.Client(api_key="k", http_options=types.HttpOptions(base_url=fake.url))
        stream = await client.aio.models.generate_content_stream(model=G3, contents="x")
        got = [one async for one in stream]
        await client.aio.aclose()
        contents = [one.candidates[0].content for one in got]
        found = [part for content in contents if content for part in content.parts]
        assert "".join(p.text for p in found if p.text and not p.thought) == "Hi there"
        assert found[1].thought_signature == b"ABC"
        assert found[-1].function_call.args == {"a": 1}
        assert got[-1].usage_metadata.total_token_count == 150
        whole = await client.aio.models.generate_content(model=G3, contents="x")
        assert whole.function_calls[0].name == "now"

    # Thoughts and signatures ------------------------------------------------------------------

    async def test_signatures_go_back_where_they_came_from(
        self, fake: FakeGemini, model: GeminiModel
    ) -> None:
        fake.replies = [
            reply(
                ThoughtSignature("U0lHMQ=="),
                TextDelta("Let me "),
                TextDelta("see."),
                ToolCall("c1", "now", {}, signature="U0lHMg=="),
                ToolCall("c2", "now", {"tz": "x"}),
            ),
            reply(TextDelta("ok")),
        ]
        first = await self.run(model, ask(model))
        assert first[0] == ThoughtSignature("U0lHMQ==")
        calls = [event for event in first if isinstance(event, ToolCall)]
        assert [call.signature for call in calls] == ["U0lHMg==", None]
        steps = [
            user("Hi"),
            {"type": "thought", "signature": "U0lHMQ=="},
            said("Let me see."),
            *self._as_steps(first),
            {"type": "function_result", "call_id": "c1", "result": "1"},
            {"type": "function_result", "call_id": "c2", "result": "2"},
        ]
        await self.run(model, ask_as(model, G3, steps))
        sent = fake.requests[-1].json["contents"]
        for content in sent:
            types.Content.model_validate(content)
        assert sent[1]["parts"] == [
            {"text": "Let me see.", "thoughtSignature": "U0lHMQ=="},
            {
                "functionCall": {"id": "c1", "name": "now", "args": {}},
                "thoughtSignature": "U0lHMg==",
            },
            {"functionCall": {"id": "c2", "name": "now", "args": {"tz": "x"}}},
        ]
        assert [part["functionResponse"]["name"] for part in sent[2]["parts"]] == ["now", "now"]

    async def test_a_signature_at_the_end_of_a_text(
        self, fake: FakeGemini, model: GeminiModel
    ) -> None:
        fake.replies = [
            raw({"text": "a"}, {"text": "b", "thoughtSignature": "Uw=="}, {"text": "c"})
        ]
        events = await self.run(model, ask(model))
        assert events[:-1] == [
            TextDelta("a"),
            TextDelta("b"),
            TextDelta("c"),
            ThoughtSignature("Uw=="),
        ]
        (_, sent) = model.compile(
            [user("x"), said("abc"), {"type": "thought", "signature": "Uw=="}], G3
        )
        assert orjson.loads(sent)["parts"] == [
            {"text": "abc"},
            {"text": "", "thoughtSignature": "Uw=="},
        ]

    def test_a_broken_answers_signature_is_left_out(self, model: GeminiModel) -> None:
        thought = {"type": "thought", "signature": "Uw=="}
        broken = {**said("bro"), "error": {"code": 13}}
        (_, sent) = model.compile([user("x"), thought, broken, said("ok")], G3)
        assert orjson.loads(sent)["parts"] == [{"text": "ok"}]

    @pytest.mark.parametrize(("name", "wanted"), [(G3, True), ("gemini-2.5-pro", False)])
    def test_calls_of_other_origin_pass_the_signature_check(
        self, model: GeminiModel, name: str, *, wanted: bool
    ) -> None:
        steps = [
            user("x"),
            {"type": "function_call", "id": "a", "name": "f", "arguments": {}},
            {"type": "function_call", "id": "b", "name": "f", "arguments": {}},
        ]
        found = orjson.loads(model.compile(steps, name)[-1])["parts"]
        signatures = [part.get("thoughtSignature") for part in found]
        assert signatures == ["skip_thought_signature_validator" if wanted else None, None]

    async def test_results_of_several_interactions_are_one_content(
        self, fake: FakeGemini, model: GeminiModel
    ) -> None:
        fake.default = reply(TextDelta("x"))
        steps = [
            user("x"),
            {"type": "code_execution_call", "id": "a", "arguments": {"code": "1"}},
            {"type": "function_call", "id": "b", "name": "f", "arguments": {}},
            {"type": "code_execution_result", "call_id": "a", "result": "1"},
        ]
        late = [{"type": "function_result", "call_id": "b", "name": "f", "result": "2"}, user("y")]
        await self.run(model, ask(model, steps, late))
        contents = fake.requests[-1].json["contents"]
        assert [one["role"] for one in contents] == ["user", "model", "user", "user"]
        keys = [part["functionResponse"]["id"] for part in contents[2]["parts"]]
        assert keys == ["a", "b"]

    # Built-in tools ---------------------------------------------------------------------------

    async def test_code_execution_round_trip(self, fake: FakeGemini, model: GeminiModel) -> None:
        code = {"executableCode": {"language": "PYTHON", "code": "1"}, "thoughtSignature": "Uw=="}
        result = {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1\n"}}
        fake.replies = [raw(code, result, {"text": "One."})]
        call, done, *_ = await self.run(model, ask(model, tools=[{"type": "code_execution"}]))
        assert fake.requests[-1].json["tools"] == [{"codeExecution": {}}]
        assert isinstance(call, VendorStep)
        assert isinstance(done, VendorStep)
        assert call.step["arguments"] == {"language": "python", "code": "1"}
        assert (done.step["result"], done.step["is_error"]) == ("1\n", False)
        assert done.step["call_id"] == call.step["id"]
        sent = orjson.loads(model.compile([user("x"), call.step, done.step], G3)[1])
        assert sent == {"role": "model", "parts": [code, result]}

    async def test_grounding(self, fake: FakeGemini, model: GeminiModel) -> None:
        annotation = {
            "type": "url_citation",
            "url": "https://ex.org",
            "title": "Ex",
            "start_index": 0,
            "end_index": 13,
        }
        search = {"type": "google_search_call", "arguments": {"queries": ["q"]}}
        found = {"type": "google_search_result", "result": [{"search_suggestions": "<div>"}]}
        fake.replies = [
            reply(
                VendorStep(search),
                VendorStep(found),
                TextDelta("Röme is"),
                TextDelta(" old."),
                Annotations([annotation]),
            )
        ]
        events = await self.run(model, ask(model, tools=[{"type": "google_search"}]))
        assert [type(event) for event in events] == [
            *[TextDelta] * 2,
            Annotations,
            *[VendorStep] * 2,
            Finished,
        ]
        assert events[2].annotations == [annotation]
        call, result = events[3].step, events[4].step
        assert call["arguments"] == {"queries": ["q"]}
        assert result["result"] == [{"search_suggestions": "<div>"}]
        assert result["call_id"] == call["id"]
        assert events[-1].usage["grounding_tool_count"] == [{"type": "google_search", "count": 1}]
        # Gemini wants nothing of it back.
        assert len(model.compile([user("x"), said("y"), call, result], G3)) == 2

    async def test_grounding_offsets_are_relative_to_the_open_block(
        self, fake: FakeGemini, model: GeminiModel
    ) -> None:
        def support(start: int, end: int) -> Json:
            segment = {"startIndex": start, "endIndex": end}
            return {"segment": segment, "groundingChunkIndices": [0]}

        grounding = {
            "groundingChunks": [{"web": {"uri": "u", "title": "t"}}],
            "groundingSupports": [support(0, 2), support(5, 8)],
        }
        fake.replies = [
            raw(
                {"text": "häh"},
                {"inlineData": {"mimeType": "image/png", "data": PNG}},
                {"text": "xyz!"},
                groundingMetadata=grounding,
            )
        ]
        events = await self.run(model, ask(model))
        (found,) = [event for event in events if isinstance(event, Annotations)]
        (one,) = found.annotations
        assert (one["start_index"], one["end_index"]) == (1, 4)

    async def test_maps_files_and_urls(self, fake: FakeGemini, model: GeminiModel) -> None:
        place = {"placeId": "places/1", "title": "P", "uri": "https://m"}
        file = {"title": "a.pdf", "text": "said", "uri": "f", "pageNumber": 3}
        supports = [
            {"segment": {"endIndex": 2}, "groundingChunkIndices": [0, 1]},
        ]
        fake.replies = [
            raw(
                {"text": "ok"},
                groundingMetadata={
                    "groundingChunks": [{"maps": place}, {"retrievedContext": file}],
                    "groundingSupports": supports,
                    "googleMapsWidgetContextToken": "w",
                },
                urlContextMetadata={
                    "urlMetadata": [
                        {
                            "retrievedUrl": "https://u",
                            "urlRetrievalStatus": "URL_RETRIEVAL_STATUS_PAYWALL",
                        }
                    ]
                },
            )
        ]
        events = await self.run(model, ask(model))
        (notes,) = [event.annotations for event in events if isinstance(event, Annotations)]
        assert notes[0] == {
            "type": "place_citation",
            "place_id": "places/1",
            "name": "P",
            "url": "https://m",
            "start_index": 0,
            "end_index": 2,
        }
        assert (notes[1]["type"], notes[1]["page_number"]) == ("file_citation", 3)
        steps = {e.step["type"]: e.step for e in events if isinstance(e, VendorStep)}
        assert steps["url_context_result"]["result"] == [{"url": "https://u", "status": "paywall"}]
        assert steps["google_maps_result"]["result"][0]["widget_context_token"] == "w"
        assert {"file_search_call", "file_search_result"} <= steps.keys()

    async def test_server_side_invocations(self, fake: FakeGemini, model: GeminiModel) -> None:
        call = {
            "toolCall": {"id": "t", "toolType": "GOOGLE_SEARCH_WEB", "args": {"queries": ["q"]}},
            "thoughtSignature": "Uw==",
        }
        answer = {
            "toolResponse": {
                "id": "t",
                "toolType": "GOOGLE_SEARCH_WEB",
                "response": {"search_suggestions": "<div>"},
            }
        }
        grounding = {"webSearchQueries": ["q"], "searchEntryPoint": {"renderedContent": "<div>"}}
        fake.replies = [raw(call, answer, {"text": "x"}, groundingMetadata=grounding)]
        tools = [WEATHER, {"type": "google_search", "search_types": ["web_search"]}]
        events = await self.run(model, ask(model, tools=tools))
        request = fake.requests[-1].json
        assert request["toolConfig"] == {"includeServerSideToolInvocations": True}
        assert request["tools"][1] == {"googleSearch": {"searchTypes": {"webSearch": {}}}}
        steps = [event.step for event in events if isinstance(event, VendorStep)]
        assert [step["type"] for step in steps] == ["google_search_call", "google_search_result"]
        assert steps[1]["result"] == [{"search_suggestions": "<div>"}]
        sent = orjson.loads(model.compile([user("x"), *steps], G3)[1])
        assert sent["parts"] == [call, answer]

    async def test_old_models_go_without_their_own_tools_beside_functions(
        self, fake: FakeGemini, model: GeminiModel
    ) -> None:
        """As fallbacks of models that take both: they would refuse the request."""
        fake.default = reply(TextDelta("x"))
        search = {"type": "google_search"}
        for name in ("gemini-2.5-flash", "gemini-2.0-flash"):
            call = ask_as(model, name, tools=[WEATHER, search])
            assert [warning.field for warning in model.check(call)] == ["tools[1]"]
            await self.run(model, call)
            request = fake.requests[-1].json
            assert [list(tool) for tool in request["tools"]] == [["functionDeclarations"]]
            assert "toolConfig" not in request
            call = ask_as(model, name, tools=[search, {"type": "url_context"}])
            assert model.check(call) == []
            await self.run(model, call)
            assert len(fake.requests[-1].json["tools"]) == 2

    # Media ------------------------------------------------------------------------------------

    async def test_media_out(self, fake: FakeGemini, model: GeminiModel) -> None:
        pcm = base64.b64encode(bytes(range(200))).decode()
        image = {"type": "image", "mime_type": "image/png", "data": PNG}
        audio = {
            "type": "audio",
            "mime_type": "audio/l16",
            "sample_rate": 16000,
            "channels": 1,
            "data": pcm,
        }
        fake.replies = [
            reply(TextDelta("A cat:"), ThoughtSignature("Uw=="), Media(image), Media(audio))
        ]
        call = ask(model, modalities=["text", "image", "audio"])
        events = await self.run(model, call)
        assert events[:-1] == [
            TextDelta("A cat:"),
            ThoughtSignature("Uw=="),
            Media(image),
            Media(audio),
        ]
        config = fake.requests[-1].json["generationConfig"]
        assert config == {"responseModalities": ["TEXT", "IMAGE", "AUDIO"]}

    async def test_media_in(self, fake: FakeGemini, model: GeminiModel) -> None:
        fake.default = reply(TextDelta("x"))
        video = {
            "type": "video",
            "uri": "https://youtu.be/x",
            "resolution": "low",
            "processing": {"type": "static", "fps": 2, "start_offset": "1s"},
        }
        audio = {"type": "audio", "mime_type": "audio/l16", "data": "AAAA", "sample_rate": 8000}
        await self.run(model, ask(model, [user("see", video, audio)]))
        content = fake.requests[-1].json["contents"][0]
        types.Content.model_validate(content)
        assert content["parts"][1:] == [
            {
                "fileData": {"fileUri": "https://youtu.be/x"},
                "mediaResolution": {"level": "MEDIA_RESOLUTION_LOW"},
                "videoMetadata": {"fps": 2, "startOffset": "1s"},
            },
            {"inlineData": {"mimeType": "audio/l16;rate=8000;channels=1", "data": "AAAA"}},
        ]

    def test_what_is_asked_of_media_is_passed_on(self, model: GeminiModel) -> None:
        sheet = {"sheet_index": 2, "content_layers": ["data"]}
        content = user(
            {
                "type": "document",
                "mime_type": "application/pdf",
                "data": "AA==",
                "processing": {"type": "static", "page_options": {"start_page": 1, "end_page": 2}},
            },
            {
                "type": "document",
                "mime_type": "text/csv",
                "data": "AA==",
                "processing": {"type": "static", "spreadsheet_options": sheet},
            },
            {"type": "video", "mime_type": "video/mp4", "data": "AA==", "processing": "agentic"},
            {
                "type": "audio",
                "mime_type": "audio/wav",
                "data": "AA==",
                "processing": {"type": "static", "end_offset": "2s"},
            },
            {**text("Hi"), "annotations": [{"type": "speech_metadata", "speaker": "A"}]},
        )
        (sent,) = model.compile([content], G3)
        types.Content.model_validate(orjson.loads(sent))
        hints = [
            {key: value for key, value in part.items() if key not in ("inlineData", "text")}
            for part in orjson.loads(sent)["parts"]
        ]
        assert hints == [
            {"documentMetadata": {"startPage": 1, "endPage": 2}},
            {"spreadsheetMetadata": {"sheetIndex": 2, "contentLayers": ["DATA"]}},
            {"mediaProcessing": "AGENTIC"},
            {"audioMetadata": {"endOffset": "2s"}},
            {"speechMetadata": {"speaker": "A"}},
        ]

    async def test_a_text_of_its_own_for_each_citation(
        self, fake: FakeGemini, model: GeminiModel
    ) -> None:
        cited = {"citations": [{"startIndex": 1, "endIndex": 3, "uri": "https://c"}]}
        images = {
            "imageSearchQueries": ["i"],
            "groundingChunks": [{"image": {"sourceUri": "https://i", "title": "I"}}],
            "groundingSupports": [{"segment": {"endIndex": 2}, "groundingChunkIndices": [0, 9]}],
        }
        fake.replies = [raw({"text": "abcd"}, citationMetadata=cited, groundingMetadata=images)]
        _, notes, call, _, _ = await self.run(model, ask(model))
        assert [
            (one["url"], one["start_index"], one["end_index"]) for one in notes.annotations
        ] == [
            ("https://i", 0, 2),
            ("https://c", 1, 3),
        ]
        assert call.step["search_type"] == "image_search"

    def test_media_of_a_result_stand_beside_it_for_old_models(self, model: GeminiModel) -> None:
        picture = {"type": "image", "mime_type": "image/png", "data": PNG}
        steps = [
            {"type": "function_call", "id": "a", "name": "f", "arguments": {}},
            {"type": "function_result", "call_id": "a", "result": [text("see"), picture]},
        ]
        (_, old), (_, new) = (model.compile(steps, name) for name in ("gemini-2.5-pro", G3))
        assert "inlineData" in orjson.loads(old)["parts"][1]
        assert "inlineData" in orjson.loads(new)["parts"][0]["functionResponse"]["parts"][0]

    @pytest.mark.parametrize(
        ("kind", "uri", "taken"),
        [
            ("image", "gs://bucket/x", True),
            ("video", "https://generativelanguage.googleapis.com/v1beta/files/x", True),
            ("video", "https://www.youtube.com/watch?v=x", True),
            ("image", "https://www.youtube.com/watch?v=x", False),
            ("image", "https://example.org/generativelanguage.googleapis.com", False),
            ("image", "https://[", False),
        ],
    )
    def test_uris(self, model: GeminiModel, kind: str, uri: str, *, taken: bool) -> None:
        assert model.takes_uri(kind, uri) is taken

    # Options ----------------------------------------------------------------------------------

    async def test_every_option_is_a_field_of_the_wire(
        self, fake: FakeGemini, model: GeminiModel
    ) -> None:
        fake.default = reply(TextDelta("x"))
        call = ask_as(
            model,
            G3,
            system="s",
            generation={
                "max_output_tokens": 9,
                "seed": 4,
                "stop_sequences": ["#"],
                "temperature": 0.5,
                "top_p": 0.9,
                "thinking_level": "medium",
                "thinking_summaries": "auto",
                "speech_config": [{"voice": "Kore", "language": "en-US"}],
                "transcription_config": {"mode": "smart", "language_codes": ["de"]},
                "image_config": {"image_size": "2K"},
            },
            json_schema={"type": "object"},
            response_formats=[{"type": "image", "aspect_ratio": "1:1"}],
            safety_settings=[{"type": "hate_speech", "threshold": "block_only_high"}],
            service_tier="flex",
            tools=[
                WEATHER,
                {"type": "url_context"},
                {"type": "google_maps", "latitude": 1.0, "longitude": 2.0},
                {"type": "file_search", "file_search_store_names": ["a"], "top_k": 3},
                {"type": "computer_use", "environment": "browser"},
            ],
            tool_choice={"allowed_tools": {"mode": "any", "tools": ["get_weather"]}},
        )
        assert model.check(call) == []
        await self.run(model, call)
        sent = fake.requests[-1].json
        types.GenerationConfig.model_validate(_without(sent["generationConfig"], "imageConfig"))
        types.ImageConfig.model_validate(sent["generationConfig"]["imageConfig"])
        types.ToolConfig.model_validate(sent["toolConfig"])
        for tool in sent["tools"]:
            types.Tool.model_validate(tool)
        for setting in sent["safetySettings"]:
            types.SafetySetting.model_validate(setting)
        assert sent["generationConfig"] == {
            "maxOutputTokens": 9,
            "seed": 4,
            "stopSequences": ["#"],
            "temperature": 0.5,
            "topP": 0.9,
            "thinkingConfig": {"thinkingLevel": "MEDIUM", "includeThoughts": True},
            "speechConfig": {
                "languageCode": "en-US",
                "voiceConfig": {"prebuiltVoiceConfig": {"voiceName": "Kore"}},
            },
            "audioTranscriptionConfig": {"mode": "SMART", "languageCodes": ["de"]},
            "responseMimeType": "application/json",
            "responseJsonSchema": {"type": "object"},
            "responseModalities": ["TEXT", "IMAGE"],
            "imageConfig": {"aspectRatio": "1:1", "imageSize": "2K"},
        }
        assert sent["toolConfig"]["functionCallingConfig"] == {
            "mode": "ANY",
            "allowedFunctionNames": ["get_weather"],
        }
        assert sent["toolConfig"]["retrievalConfig"]["latLng"] == {"latitude": 1, "longitude": 2}
        assert sent["safetySettings"] == [
            {"category": "HARM_CATEGORY_HATE_SPEECH", "threshold": "BLOCK_ONLY_HIGH"}
        ]
        assert sent["serviceTier"] == "flex"

    async def test_speakers(self, fake: FakeGemini, model: GeminiModel) -> None:
        fake.default = reply(TextDelta("x"))
        speakers = [{"speaker": "A", "voice": "Kore"}, {"speaker": "B", "voice": "voice_1"}]
        call = ask(
            model,
            generation={"speech_config": {"speakers": speakers}},
            response_formats=[{"type": "audio"}],
        )
        await self.run(model, call)
        config = fake.requests[-1].json["generationConfig"]
        types.GenerationConfig.model_validate(config)
        assert config["responseModalities"] == ["AUDIO"]
        assert config["speechConfig"]["multiSpeakerVoiceConfig"]["speakerVoiceConfigs"] == [
            {"speaker": "A", "voiceConfig": {"prebuiltVoiceConfig": {"voiceName": "Kore"}}},
            {"speaker": "B", "voiceConfig": {"voice": "voice_1"}},
        ]

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"generation": {"thinking_level": "xhigh"}}, "generation_config.thinking_level"),
            ({"generation": {"video_config": {}}}, "generation_config.video_config"),
            ({"tool_choice": "any"}, "generation_config.tool_choice"),
            ({"service_tier": "deferred"}, "service_tier"),
            (
                {"response_formats": [{"type": "audio", "mime_type": "audio/mp3"}]},
                "response_format[0].mime_type",
            ),
            (
                {
                    "safety_settings": [
                        {"type": "harassment", "threshold": "off", "method": "severity"}
                    ]
                },
                "safety_settings.method",
            ),
        ],
    )
    def test_downgrades_are_told(
        self, model: GeminiModel, fields: dict[str, Any], field: str
    ) -> None:
        (warning,) = model.check(ModelCall(model=G3, messages=[], **fields))
        assert warning.field == field

    @pytest.mark.parametrize(
        "fields",
        [
            {"tools": [{"type": "mcp_server"}]},
            {"tools": [{"type": "google_search", "search_types": ["enterprise_web_search"]}]},
            {"modalities": ["document"]},
            {"response_formats": [{"type": "video"}]},
        ],
    )
    def test_what_cannot_be_done_is_invalid(
        self, model: GeminiModel, fields: dict[str, Any]
    ) -> None:
        with pytest.raises(Invalid, match="is not supported for"):
            model.check(ModelCall(model=G3, messages=[], **fields))

    async def test_levels_are_budgets_for_gemini_2(
        self, fake: FakeGemini, model: GeminiModel
    ) -> None:
        fake.default = reply(TextDelta("x"))
        generation = {"thinking_level": "medium"}
        await self.run(model, ask_as(model, "gemini-2.5-flash", generation=generation))
        thinking = fake.requests[-1].json["generationConfig"]["thinkingConfig"]
        assert thinking == {"thinkingBudget": 8192}

    @pytest.mark.parametrize(
        ("name", "is_asked"),
        [
            ("gemini-3.5-flash", True),
            ("gemini-2.5-pro", True),
            ("gemini-flash-latest", True),
            ("gemini-2.5-flash-lite", False),
            ("gemini-2.5-flash-preview-tts", False),
            ("gemini-2.0-flash", False),
            ("gemma-4-27b-it", False),
        ],
    )
    async def test_thoughts_are_asked_for_where_there_are_some_anyway(
        self, fake: FakeGemini, model: GeminiModel, name: str, *, is_asked: bool
    ) -> None:
        fake.default = reply(ThoughtDelta("hm"), TextDelta("x"))
        generation = {"thinking_summaries": THOUGHTS_AS_GIVEN}
        call = ask_as(model, name, generation=generation)
        assert model.check(call) == []
        events = await self.run(model, call)
        assert events[0] == ThoughtDelta("hm")
        sent = fake.requests[-1].json.get("generationConfig", {})
        assert sent == ({"thinkingConfig": {"includeThoughts": True}} if is_asked else {})

    # Ends -------------------------------------------------------------------------------------

    async def test_usage_by_modality(self, fake: FakeGemini, model: GeminiModel) -> None:
        usage = {
            **USAGE,
            "total_thought_tokens": 7,
            "total_tool_use_tokens": 3,
            "total_tokens": 160,
            "input_tokens_by_modality": [
                {"modality": "text", "tokens": 100},
                {"modality": "image", "tokens": 20},
            ],
            "cached_tokens_by_modality": [{"modality": "text", "tokens": 20}],
            "output_tokens_by_modality": [{"modality": "audio", "tokens": 30}],
            "tool_use_tokens_by_modality": [{"modality": "text", "tokens": 3}],
        }
        fake.replies = [reply(TextDelta("x"), Finished("stop", usage))]
        assert (await self.run(model, ask(model)))[-1].usage == usage

    async def test_a_blocked_prompt(self, fake: FakeGemini, model: GeminiModel) -> None:
        body = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {}}
        fake.replies = [Reply(raw=frame(body))]
        (event,) = await self.run(model, ask(model))
        assert event.reason == "content_filter"
        assert "SAFETY" in event.message

    @pytest.mark.parametrize(
        ("reason", "error"),
        [
            ("MALFORMED_FUNCTION_CALL", ModelUnavailable),
            ("UNEXPECTED_TOOL_CALL", ModelUnavailable),
            ("MISSING_THOUGHT_SIGNATURE", ModelRejected),
        ],
    )
    async def test_bungled_turns(
        self, fake: FakeGemini, model: GeminiModel, reason: str, error: type[Exception]
    ) -> None:
        fake.replies = [raw({"text": "x"}, finishReason=reason, finishMessage="oops")]
        assert "oops" in (await self.fails(model, error)).message  # type: ignore[arg-type]

    @pytest.mark.parametrize("reason", ["RECITATION", "PROHIBITED_CONTENT", "OTHER", "NEW_ONE"])
    async def test_other_ends_are_filters(
        self, fake: FakeGemini, model: GeminiModel, reason: str
    ) -> None:
        fake.replies = [raw({"text": "x"}, finishReason=reason)]
        last = (await self.run(model, ask(model)))[-1]
        assert last.reason == "content_filter"
        assert reason in last.message

    async def test_the_body_says_how_long_to_wait(
        self, fake: FakeGemini, model: GeminiModel
    ) -> None:
        info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}
        body = {"error": {"code": 429, "message": "quota", "details": [info]}}
        for strange in ([], {"error": "no"}, 7):
            fake.render_error = lambda _, strange=strange: orjson.dumps(strange)  # type: ignore[method-assign]
            fake.replies = [Reply(status=429)]
            assert (await self.fails(model, ModelUnavailable)).retry_after_s is None
        fake.render_error = lambda _reply: orjson.dumps([body])  # type: ignore[method-assign]
        fake.replies = [Reply(status=429)]
        error = await self.fails(model, ModelUnavailable)
        assert (error.retry_after_s, error.upstream_status) == (34.5, 429)
        assert "quota" in error.message

    async def test_not_geminis_format(self, fake: FakeGemini, model: GeminiModel) -> None:
        for strange in ({"candidates": 3}, {"candidates": [{"content": {"parts": [7]}}]}):
            fake.replies = [Reply(raw=frame(strange))]
            await self.fails(model, ModelUnavailable)


def _without(config: Json, name: str) -> Json:
    return {key: value for key, value in config.items() if key != name}


def test_the_fake_sends_audio_in_pieces() -> None:
    data = base64.b64encode(bytes(8)).decode()
    sent = chunks([Media({"type": "audio", "mime_type": "audio/l16", "data": data})])
    assert len(sent) == 2
