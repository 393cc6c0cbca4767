"""One contract for every model adapter, over the wire: real HTTP on loopback, no mocks.

How a vendor joins, in `test_<vendor>.py`:

    class TestAcme(ModelContract):
        def new_fake(self) -> FakeUpstream: return FakeAcme()
        def new_model(self, upstream: Upstream) -> Model: return AcmeModel(upstream, ...)
        ... and the readers below, which say where this vendor's request JSON keeps things.

The scenarios script the fake with the port's own events, run the adapter against it, and compare
what comes out. The readers (`calls`, `results`, `images`, ...) get `fake.requests[-1]`. Class
attributes hold the few facts in which vendors differ. Helpers for a vendor's own tests:
`self.run(model, call)` gives the events, `ask(model, steps, **fields)` builds a ModelCall.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import aiohttp
import orjson
import pytest

from openinteractions.errors import (
    ContextOverflow,
    Invalid,
    ModelError,
    ModelRejected,
    ModelUnavailable,
)
from openinteractions.models.port import (
    Finished,
    Json,
    Model,
    ModelCall,
    ModelEvent,
    TextDelta,
    ThoughtDelta,
    ToolCall,
)
from openinteractions.models.transport import Upstream
from tests.contracts.models.history import ABSENT, HISTORY, PNG, PRESENT, said, text, user
from tests.fakes.upstream import FakeUpstream, Received, Reply

USAGE: Json = {
    "total_input_tokens": 120,
    "total_cached_tokens": 20,
    "total_output_tokens": 30,
    "total_thought_tokens": 0,
    "total_tool_use_tokens": 0,
    "total_tokens": 150,
}
THOUGHT_USAGE: Json = {**USAGE, "total_thought_tokens": 50, "total_tokens": 200}
WEATHER: Json = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather now.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
PERSON_SCHEMA: Json = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call inside a vendor's request. `key` is whatever a result refers to it by."""

    key: str
    name: str
    arguments: Json


@dataclass(frozen=True, slots=True)
class Result:
    """A tool result inside a vendor's request, with what text the model sees."""

    key: str
    text: str


def reply(*events: ModelEvent, **fields: Any) -> Reply:
    """A reply of these events; `Finished("stop", USAGE)` is added where none is given."""
    if not any(isinstance(event, Finished) for event in events):
        events = (*events, Finished("stop", USAGE))
    return Reply(events=events, **fields)


def ask(model: Model, *interactions: Sequence[Json], **fields: Any) -> ModelCall:
    """A ModelCall over whole interactions, each compiled by itself, as the loop does."""
    name = fields.pop("model", "m-1")
    turns = interactions or ([user("Hi")],)
    messages = [message for steps in turns for message in model.compile(steps, name)]
    return ModelCall(model=name, messages=messages, **fields)


def said_text(events: Sequence[ModelEvent]) -> str:
    """All text of a turn."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def closed(fake: FakeUpstream) -> None:
    """Wait until the fake answers nobody any more; fail after three seconds."""
    async with asyncio.timeout(3):
        while fake.open:  # noqa: ASYNC110 - the fake has no event for it
            await asyncio.sleep(0.01)


def drip(fake: FakeUpstream, size: int) -> None:
    """Make a fake send its event streams in pieces of `size` bytes, whatever they cut through."""
    whole: Callable[[Reply, Received], list[bytes]] = fake.render

    def render(scripted: Reply, received: Received) -> list[bytes]:
        stream = b"".join(whole(scripted, received))
        return [stream[at : at + size] for at in range(0, len(stream), size)]

    fake.render = render


class ModelContract:
    """Subclass it as `Test<Vendor>`; override what raises NotImplementedError."""

    model_name = "m-1"
    overflow_message = "This prompt is too long: prompt is too long."
    """What this vendor says (in a 400) when the context is too long."""
    unsupported_content: ClassVar[Json] = {
        "type": "hologram",
        "data": "AAAA",
        "mime_type": "x/hologram",
    }
    """A content block that this vendor cannot take."""
    unsupported_tool: ClassVar[Json] = {"type": "retrieval"}
    """A native tool that this vendor does not have."""
    reports_thought_tokens = True
    """Whether the vendor counts thinking apart from the answer."""

    # What a vendor provides -------------------------------------------------------------------

    def new_fake(self) -> FakeUpstream:
        """The vendor's fake server."""
        raise NotImplementedError

    def new_model(self, upstream: Upstream) -> Model:
        """The adapter under test."""
        raise NotImplementedError

    def headers(self) -> dict[str, str]:
        """What the adapter's module sends as credentials of the key `sk-test`."""
        raise NotImplementedError

    def system(self, request: Json) -> str:
        """The system instruction in a request."""
        raise NotImplementedError

    def texts(self, request: Json) -> list[tuple[str, str]]:
        """The plain texts of a request in order, as (`"user"` or `"model"`, text)."""
        raise NotImplementedError

    def images(self, request: Json) -> list[tuple[str, str]]:
        """The inline images of a request, as (MIME type, base64)."""
        raise NotImplementedError

    def calls(self, request: Json) -> list[Call]:
        """The tool calls of a request, in order."""
        raise NotImplementedError

    def results(self, request: Json) -> list[Result]:
        """The tool results of a request, in order."""
        raise NotImplementedError

    def functions(self, request: Json) -> list[tuple[str, Json]]:
        """The declared functions of a request, as (name, parameter schema)."""
        raise NotImplementedError

    def schema(self, request: Json) -> Json | None:
        """The JSON schema that the answer of a request must follow."""
        raise NotImplementedError

    def max_tokens(self, request: Json) -> int | None:
        """The output limit of a request."""
        raise NotImplementedError

    # Plumbing ---------------------------------------------------------------------------------

    @pytest.fixture
    async def fake(self) -> AsyncGenerator[FakeUpstream]:
        """A running fake of this vendor; `fake.url` is its base URL."""
        async with self.new_fake().serve() as running:
            yield running

    @pytest.fixture
    async def session(self) -> AsyncGenerator[aiohttp.ClientSession]:
        """The shared connection pool."""
        async with aiohttp.ClientSession() as session:
            yield session

    @pytest.fixture
    def model(self, fake: FakeUpstream, session: aiohttp.ClientSession) -> Model:
        """The adapter, pointed at the fake, with an idle time-out of ten seconds."""
        return self.connect(session, fake.url)

    def connect(
        self, session: aiohttp.ClientSession, url: str, *, idle_timeout_s: float = 10
    ) -> Model:
        """The adapter, pointed at a URL."""
        upstream = Upstream(
            session,
            base_url=url,
            headers=self.headers(),
            connect_timeout=timedelta(seconds=5),
            idle_timeout=timedelta(seconds=idle_timeout_s),
        )
        return self.new_model(upstream)

    async def run(self, model: Model, call: ModelCall) -> list[ModelEvent]:
        """Run one turn to its end and check what holds for every turn."""
        async with model.stream(call) as stream:
            events = [event async for event in stream]
        assert isinstance(events[-1], Finished), "the last event of a whole turn is Finished"
        assert sum(isinstance(event, Finished) for event in events) == 1
        return events

    async def fails(self, model: Model, kind: type[ModelError]) -> Any:
        """Run a plain turn that must fail with exactly this error; return the error."""
        with pytest.raises(kind) as caught:
            await self.run(model, ask(model))
        assert caught.type is kind
        return caught.value

    # What comes back --------------------------------------------------------------------------

    async def test_plain_text(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("Hel"), TextDelta("lo, "), TextDelta("wörld 🌍"))]
        events = await self.run(model, ask(model, [user("Hi there")], system="Be kind."))
        assert said_text(events) == "Hello, wörld 🌍"
        assert events[-1].reason == "stop"
        request = fake.requests[-1].json
        assert self.texts(request) == [("user", "Hi there")]
        assert self.system(request) == "Be kind."

    async def test_text_arrives_in_pieces(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("one "), TextDelta("two "), TextDelta("three"))]
        events = await self.run(model, ask(model))
        assert sum(isinstance(event, TextDelta) for event in events) == 3

    async def test_credentials_are_sent(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("x"))]
        await self.run(model, ask(model))
        for name, value in self.headers().items():
            assert fake.requests[-1].headers[name.lower()] == value
        assert any("sk-test" in value for value in self.headers().values())

    async def test_usage(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("x"), Finished("stop", USAGE))]
        events = await self.run(model, ask(model))
        assert {name: events[-1].usage[name] for name in USAGE} == USAGE

    async def test_usage_of_a_thinking_turn(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("x"), Finished("stop", THOUGHT_USAGE))]
        usage = (await self.run(model, ask(model)))[-1].usage
        assert usage["total_tokens"] == 200
        assert usage["total_output_tokens"] + usage["total_thought_tokens"] == 80
        if self.reports_thought_tokens:
            assert usage["total_thought_tokens"] == 50

    async def test_thoughts_are_shown_only_when_asked_for(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        fake.default = reply(ThoughtDelta("hm, "), ThoughtDelta("well"), TextDelta("x"))
        silent = await self.run(model, ask(model))
        assert not any(isinstance(event, ThoughtDelta) for event in silent)
        call = ask(model, generation={"thinking_summaries": "auto", "thinking_level": "low"})
        shown = await self.run(model, call)
        thoughts = [event.text for event in shown if isinstance(event, ThoughtDelta)]
        assert "".join(thoughts) == "hm, well"
        assert said_text(shown) == "x"

    async def test_max_tokens(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("cut"), Finished("max_tokens", USAGE))]
        events = await self.run(model, ask(model, generation={"max_output_tokens": 7}))
        assert events[-1].reason == "max_tokens"
        assert self.max_tokens(fake.requests[-1].json) == 7

    async def test_filtered(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(Finished("content_filter", USAGE))]
        assert (await self.run(model, ask(model)))[-1].reason == "content_filter"

    async def test_byte_by_byte(self, fake: FakeUpstream, model: Model) -> None:
        drip(fake, 1)
        arguments = {"city": "Zürich", "note": 'a "quoted" \\ back\nslash'}
        fake.replies = [
            reply(
                TextDelta("grüß dich 👋🏽"),
                ToolCall("c1", "get_weather", arguments),
                Finished("tool_calls", USAGE),
            )
        ]
        events = await self.run(model, ask(model, tools=[WEATHER]))
        assert said_text(events) == "grüß dich 👋🏽"
        assert events[-2].arguments == arguments

    @pytest.mark.parametrize("size", [2, 3, 5, 7])
    async def test_unicode_split_over_chunks(
        self, fake: FakeUpstream, model: Model, size: int
    ) -> None:
        drip(fake, size)
        fake.replies = [reply(TextDelta("日本語 и русский 🧑‍🚀"), TextDelta("é"))]
        assert said_text(await self.run(model, ask(model))) == "日本語 и русский 🧑‍🚀é"

    async def test_connections_are_reused(self, fake: FakeUpstream) -> None:
        opened: list[object] = []

        async def count(_session: object, _context: object, params: object) -> None:
            opened.append(params)

        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(count)
        fake.default = reply(TextDelta("x"))
        async with aiohttp.ClientSession(trace_configs=[trace]) as session:
            model = self.connect(session, fake.url)
            for _ in range(4):
                await self.run(model, ask(model))
        assert len(fake.requests) == 4
        assert len(opened) == 1

    # Tools ------------------------------------------------------------------------------------

    async def test_parallel_tool_calls(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [
            reply(
                TextDelta("Let me see."),
                ToolCall("c1", "get_weather", {"city": "Rome"}),
                ToolCall("c2", "get_weather", {"city": "Oslo", "deep": {"a": [1, 2.5, None]}}),
                ToolCall("c3", "now", {}),
                Finished("tool_calls", USAGE),
            )
        ]
        now = {"type": "function", "name": "now"}
        events = await self.run(model, ask(model, tools=[WEATHER, now]))
        called = [event for event in events if isinstance(event, ToolCall)]
        assert [(call.name, call.arguments) for call in called] == [
            ("get_weather", {"city": "Rome"}),
            ("get_weather", {"city": "Oslo", "deep": {"a": [1, 2.5, None]}}),
            ("now", {}),
        ]
        assert all(call.malformed is None for call in called)
        ids = [call.id for call in called]
        assert ids in (["c1", "c2", "c3"], [None, None, None])
        assert events[-1].reason == "tool_calls"
        declared = dict(self.functions(fake.requests[-1].json))
        assert declared["get_weather"] == WEATHER["parameters"]
        assert set(declared) == {"get_weather", "now"}

    @pytest.mark.parametrize("split", [False, True], ids=["stateless", "across-interactions"])
    async def test_tool_round_trip(self, fake: FakeUpstream, model: Model, *, split: bool) -> None:
        first = ask(model, [user("Weather?")], tools=[WEATHER])
        fake.replies = [
            reply(
                TextDelta("Looking."),
                ToolCall("c1", "get_weather", {"city": "Rome"}),
                ToolCall("c2", "get_weather", {"city": "Oslo"}),
                Finished("tool_calls", USAGE),
            ),
            reply(TextDelta("22 and 3.")),
        ]
        events = await self.run(model, first)
        steps = [user("Weather?"), said(said_text(events)), *self._as_steps(events)]
        answers = [
            {"type": "function_result", "call_id": step["id"], "name": step["name"], "result": told}
            for step, told in zip(steps[2:], ["22C", {"temp": 3}], strict=True)
        ]
        turns = [steps, answers] if split else [[*steps, *answers]]
        await self.run(model, ask(model, *turns, tools=[WEATHER]))
        request = fake.requests[-1].json
        assert self.texts(request)[:2] == [("user", "Weather?"), ("model", "Looking.")]
        calls, results = self.calls(request), self.results(request)
        assert [(call.name, call.arguments) for call in calls] == [
            ("get_weather", {"city": "Rome"}),
            ("get_weather", {"city": "Oslo"}),
        ]
        assert [result.key for result in results] == [call.key for call in calls]
        assert "22C" in results[0].text
        assert '"temp":3' in results[1].text.replace(" ", "")

    def _as_steps(self, events: Sequence[ModelEvent]) -> list[Json]:
        return [
            {
                "type": "function_call",
                "id": call.id or f"minted{number}",
                "name": call.name,
                "arguments": call.arguments,
                **({"signature": call.signature} if call.signature else {}),
            }
            for number, call in enumerate(events)
            if isinstance(call, ToolCall)
        ]

    async def test_a_failed_tool_is_told_to_the_model(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        fake.default = reply(TextDelta("Oh."))
        steps = [
            user("Go"),
            {"type": "function_call", "id": "c1", "name": "get_weather", "arguments": {}},
            {
                "type": "function_result",
                "call_id": "c1",
                "name": "get_weather",
                "result": "it went boom",
                "is_error": True,
            },
        ]
        await self.run(model, ask(model, steps, tools=[WEATHER]))
        failed = self.results(fake.requests[-1].json)
        steps[-1]["is_error"] = False
        await self.run(model, ask(model, steps, tools=[WEATHER]))
        assert "it went boom" in failed[0].text
        assert fake.requests[0].json != fake.requests[1].json

    @pytest.mark.parametrize(
        "choice",
        ["auto", "any", "none", "validated", {"allowed_tools": {"mode": "any", "tools": ["now"]}}],
        ids=lambda value: value if isinstance(value, str) else "allowed",
    )
    async def test_every_tool_choice_is_sent_or_downgraded(
        self, fake: FakeUpstream, model: Model, choice: Any
    ) -> None:
        fake.default = reply(TextDelta("x"))
        now = {"type": "function", "name": "now"}
        call = ask(model, tools=[WEATHER, now], tool_choice=choice)
        assert isinstance(model.check(call), list)
        await self.run(model, call)
        plain = ask(model, tools=[WEATHER, now])
        await self.run(model, plain)
        if choice not in ("auto", "validated"):
            assert fake.requests[0].json != fake.requests[1].json

    # What goes in -----------------------------------------------------------------------------

    async def test_images_in(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("a cat"))]
        picture = {"type": "image", "mime_type": "image/png", "data": PNG}
        await self.run(model, ask(model, [user("What is this?", picture)]))
        request = fake.requests[-1].json
        assert self.images(request) == [("image/png", PNG)]
        assert ("user", "What is this?") in self.texts(request)

    async def test_images_in_a_result(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("a cat"))]
        picture = {"type": "image", "mime_type": "image/png", "data": PNG}
        steps = [
            user("Look"),
            {"type": "function_call", "id": "c1", "name": "look", "arguments": {}},
            {
                "type": "function_result",
                "call_id": "c1",
                "name": "look",
                "result": [text("seen"), picture],
            },
        ]
        await self.run(model, ask(model, steps, tools=[{"type": "function", "name": "look"}]))
        request = fake.requests[-1].json
        assert self.images(request) == [("image/png", PNG)]
        assert "seen" in self.results(request)[0].text

    async def test_json_schema(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta('{"name":"Ada","age":36}'))]
        events = await self.run(model, ask(model, json_schema=PERSON_SCHEMA))
        assert orjson.loads(said_text(events)) == {"name": "Ada", "age": 36}
        assert self.schema(fake.requests[-1].json) == PERSON_SCHEMA

    async def test_history_with_every_step_type(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("ok"))]
        call = ask(model, HISTORY, [user("question-two")], tools=[WEATHER])
        assert all(isinstance(orjson.loads(message), dict) for message in call.messages)
        await self.run(model, call)
        sent = orjson.dumps(fake.requests[-1].json).decode()
        assert [word for word in PRESENT if word not in sent] == []
        assert [word for word in ABSENT if word in sent] == []

    async def test_a_whole_conversation_keeps_its_order(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        fake.replies = [reply(TextDelta("ok"))]
        await self.run(
            model, ask(model, [user("a"), said("b")], [user("c"), said("d")], [user("e")])
        )
        assert self.texts(fake.requests[-1].json) == [
            ("user", "a"),
            ("model", "b"),
            ("user", "c"),
            ("model", "d"),
            ("user", "e"),
        ]

    async def test_foreign_thoughts_are_left_out(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("ok"))]
        thought = {"type": "thought", "summary": [text("somebody-elses-plan")]}
        await self.run(model, ask(model, [user("a"), thought, said("b")], [user("c")]))
        assert "somebody-elses-plan" not in orjson.dumps(fake.requests[-1].json).decode()

    def test_unsupported_content_is_invalid(self, model: Model) -> None:
        with pytest.raises(Invalid) as caught:
            model.compile([user("look", self.unsupported_content)], self.model_name)
        assert self.unsupported_content["type"] in str(caught.value)

    def test_unsupported_tools_are_invalid(self, model: Model) -> None:
        call = ModelCall(model=self.model_name, messages=[], tools=[WEATHER, self.unsupported_tool])
        with pytest.raises(Invalid) as caught:
            model.check(call)
        assert f"'{self.unsupported_tool['type']}'" in str(caught.value)
        assert "tools[1].type" in str(caught.value)

    def test_a_plain_call_has_no_warnings(self, model: Model) -> None:
        call = ask(model, system="x", tools=[WEATHER], generation={"max_output_tokens": 5})
        assert model.check(call) == []

    # What goes wrong --------------------------------------------------------------------------

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
    async def test_refusals_are_final(self, fake: FakeUpstream, model: Model, status: int) -> None:
        fake.replies = [Reply(status=status, message="the vendor's own words")]
        error = await self.fails(model, ModelRejected)
        assert error.upstream_status == status
        assert "the vendor's own words" in error.message

    async def test_rate_limits_say_how_long(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [Reply(status=429, headers={"Retry-After": "7"}, message="slow down")]
        error = await self.fails(model, ModelUnavailable)
        assert error.retry_after_s == 7
        assert error.upstream_status == 429
        assert "slow down" in error.message

    @pytest.mark.parametrize("status", [500, 502, 503, 529])
    async def test_server_errors_are_transient(
        self, fake: FakeUpstream, model: Model, status: int
    ) -> None:
        fake.replies = [Reply(status=status)]
        assert (await self.fails(model, ModelUnavailable)).upstream_status == status

    async def test_context_overflow(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [Reply(status=400, message=self.overflow_message)]
        await self.fails(model, ContextOverflow)

    async def test_an_error_in_the_stream(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("Hel"), TextDelta("lo"), error_after=2, message="oh dear")]
        assert "oh dear" in (await self.fails(model, ModelUnavailable)).message

    async def test_a_final_error_in_the_stream(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("Hel"), error_after=1, error_status=400, message="bad x")]
        assert "bad x" in (await self.fails(model, ModelRejected)).message

    @pytest.mark.parametrize("after", [0, 1, 2])
    async def test_cut_in_mid_stream(self, fake: FakeUpstream, model: Model, after: int) -> None:
        fake.replies = [reply(TextDelta("a"), TextDelta("b"), TextDelta("c"), cut_after=after)]
        await self.fails(model, ModelUnavailable)

    async def test_a_stream_that_ends_early(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [
            reply(TextDelta("Hel"), TextDelta("lo")),
            lambda received: Reply(
                raw=b"".join(fake.render(reply(TextDelta("a"), TextDelta("b")), received)[:2])
            ),
        ]
        await self.run(model, ask(model))
        await self.fails(model, ModelUnavailable)

    @pytest.mark.parametrize("after", [0, 2])
    async def test_silence(
        self, fake: FakeUpstream, session: aiohttp.ClientSession, after: int
    ) -> None:
        model = self.connect(session, fake.url, idle_timeout_s=0.15)
        fake.replies = [reply(TextDelta("a"), TextDelta("b"), TextDelta("c"), stall_after=after)]
        async with asyncio.timeout(5):
            await self.fails(model, ModelUnavailable)

    async def test_no_answer_at_all(
        self, fake: FakeUpstream, session: aiohttp.ClientSession
    ) -> None:
        model = self.connect(session, fake.url, idle_timeout_s=0.1)
        fake.replies = [reply(TextDelta("late"), delay_s=0.6)]
        await self.fails(model, ModelUnavailable)

    async def test_connection_refused(
        self, session: aiohttp.ClientSession, unused_tcp_port: int
    ) -> None:
        model = self.connect(session, f"http://127.0.0.1:{unused_tcp_port}")
        await self.fails(model, ModelUnavailable)

    async def test_garbage(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [Reply(raw=b"data: {not json\n\n")]
        await self.fails(model, ModelUnavailable)

    @pytest.mark.parametrize("payload", [b"[]", b"17", b'"x"', b"null", b"{}"])
    async def test_json_of_another_shape(
        self, fake: FakeUpstream, model: Model, payload: bytes
    ) -> None:
        fake.replies = [Reply(raw=b"data: " + payload + b"\n\n")]
        await self.fails(model, ModelUnavailable)

    async def test_leaving_early_closes_the_connection(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        fake.replies = [reply(*[TextDelta("word ")] * 1000, gap_s=0.01)]
        async with model.stream(ask(model)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    break
        await closed(fake)

    async def test_cancelling_closes_the_connection(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(*[TextDelta("word ")] * 1000, gap_s=0.01)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await self.run(model, ask(model))
        await closed(fake)
        assert len(fake.requests) == 1

    async def test_the_callers_own_errors_pass_through(
        self, fake: FakeUpstream, model: Model
    ) -> None:
        fake.default = reply(TextDelta("a"), TextDelta("b"))
        for mine in (OSError("my disk"), TimeoutError("my clock"), ConnectionError("my database")):
            with pytest.raises(type(mine)) as caught:
                await self._raise_inside(model, mine)
            assert caught.value is mine

    async def _raise_inside(self, model: Model, error: Exception) -> None:
        async with model.stream(ask(model)) as events:
            async for _ in events:
                raise error

    # What vendors are strict about: the fakes refuse it as they do --------------------------------

    async def test_function_names_of_every_kind(self, fake: FakeUpstream, model: Model) -> None:
        names = ["plain", "a.b", "a:b", "a_b", "n" * 100]
        tools = [{**WEATHER, "name": name} for name in names]

        def call_all(received: Received) -> Reply:
            wire = [name for name, _ in self.functions(received.json)]
            assert len(set(wire)) == len(names)
            calls = [ToolCall(f"c{at}", name, {}) for at, name in enumerate(wire)]
            return reply(*calls, Finished("tool_calls", USAGE))

        fake.replies = [call_all, reply(TextDelta("x")), reply(TextDelta("x"))]
        events = await self.run(model, ask(model, tools=tools))
        called = [event.name for event in events if isinstance(event, ToolCall)]
        assert called == names
        steps = [
            user("x"),
            *(
                {"type": "function_call", "id": f"c{at}", "name": name, "arguments": {}}
                for at, name in enumerate(names)
            ),
            *({"type": "function_result", "call_id": f"c{at}", "result": "r"} for at in range(5)),
        ]
        await self.run(model, ask(model, steps, tools=tools))
        wire = [name for name, _ in self.functions(fake.requests[-1].json)]
        assert [call.name for call in self.calls(fake.requests[-1].json)] == wire
        choice = {"allowed_tools": {"mode": "auto", "tools": ["a.b"]}}
        await self.run(model, ask(model, tools=tools, tool_choice=choice))
        assert orjson.dumps(wire[1]) in orjson.dumps(fake.requests[-1].json)

    @pytest.mark.parametrize(
        "schema",
        [
            {},
            {"type": "object"},
            {"type": "string"},
            {"properties": {"a": {}}},
            {"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
            {"type": ["object", "null"], "oneOf": [{"required": ["a"]}], "not": {"type": "null"}},
            {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "allOf": [{}]}}},
        ],
    )
    async def test_parameters_of_every_kind(
        self, fake: FakeUpstream, model: Model, schema: Json
    ) -> None:
        fake.replies = [reply(TextDelta("x"))]
        tools = [{"type": "function", "name": "f", "parameters": schema}]
        await self.run(model, ask(model, tools=tools))

    async def test_calls_with_one_id(self, fake: FakeUpstream, model: Model) -> None:
        """Rows of earlier versions have them, and so may steps that a client sends."""

        def turn(*answers: str) -> list[Json]:
            call = {"type": "function_call", "id": "call_0", "name": "f", "arguments": {}}
            result = {"type": "function_result", "call_id": "call_0"}
            return [call for _ in answers] + [{**result, "result": told} for told in answers]

        fake.replies = [reply(TextDelta("x"))]
        first, second = [user("x"), *turn("r1", "r2")], [user("x"), *turn("r3"), *turn("r4")]
        await self.run(model, ask(model, first, [*second, *turn("r5")[:1]], turn("r5")[1:]))
        results = self.results(fake.requests[-1].json)
        found = [re.findall(r"r\d", result.text) for result in results]
        assert found == [["r1"], ["r2"], ["r3"], ["r4"], ["r5"]]
        keys = [call.key for call in self.calls(fake.requests[-1].json)]
        assert [result.key for result in results] == keys

    @pytest.mark.parametrize("told", [None, "", "  ", [], [text(" ")]])
    async def test_errors_that_say_nothing(
        self, fake: FakeUpstream, model: Model, told: object
    ) -> None:
        fake.replies = [reply(TextDelta("x"))]
        steps = [
            user("x"),
            {"type": "mcp_server_tool_call", "id": "m", "name": "f", "server_name": "s"},
            {"type": "mcp_server_tool_result", "call_id": "m", "result": told, "is_error": True},
        ]
        await self.run(model, ask(model, steps))
        assert len(self.calls(fake.requests[-1].json)) == 1

    async def test_no_text_has_nuls(self, fake: FakeUpstream, model: Model) -> None:
        fake.replies = [reply(TextDelta("x"))]
        steps = [
            user("a\0b"),
            {"type": "code_execution_call", "id": "c", "arguments": {"code": "c\0d"}},
            {"type": "code_execution_result", "call_id": "c", "result": [text("e\0f")]},
            said("g\0h"),
            user(r"but \u0000 in words"),
        ]
        await self.run(model, ask(model, steps, system="i\0j", tools=[WEATHER]))
        sent = orjson.dumps(fake.requests[-1].json).decode()
        assert r"but \\u0000 in words" in sent
        assert r"\u0000" not in sent.replace(r"\\u0000", "")
        assert all(f"{a}\ufffd{b}" in sent for a, b in ("ab", "cd", "ef", "gh", "ij"))
