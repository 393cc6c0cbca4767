"""One trace from the request over the queue to the upstream call."""

from collections.abc import Generator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from openinteractions import tracing
from tests import house


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Generator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", tracing._tracer)
    monkeypatch.setattr(tracing, "_enabled", False)
    tracing.use(provider)
    yield exporter
    provider.shutdown()


def named(exporter: InMemorySpanExporter, start: str) -> ReadableSpan:
    return next(span for span in exporter.get_finished_spans() if span.name.startswith(start))


@pytest.mark.parametrize("background", [False, True])
async def test_a_trace_goes_from_the_request_to_the_model(
    database_url: str, spans: InMemorySpanExporter, *, background: bool
) -> None:
    async with house.upstream() as fake, house.opened(database_url, fake, role="all") as server:
        made = await server.create("Hello", background=background)

        async def is_over() -> bool:
            return (await server.get(made["id"]))["status"] == "completed"

        await house.eventually(is_over)
    request, run, call = named(spans, "POST"), named(spans, "interaction"), named(spans, "chat")
    assert request.context is not None
    assert run.context is not None
    assert run.parent is not None
    assert run.parent.span_id == request.context.span_id
    assert call.parent is not None
    assert call.parent.span_id == run.context.span_id
    assert call.context is not None
    assert call.context.trace_id == request.context.trace_id
    attributes = dict(call.attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.usage.output_tokens"] > 0
    assert "Hello" not in str([dict(s.attributes or {}) for s in spans.get_finished_spans()])
