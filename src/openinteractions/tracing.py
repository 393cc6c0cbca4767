"""OpenTelemetry traces, with the GenAI conventions' names; off unless an exporter is configured.

A trace goes from the request over the queue to each upstream call: the job carries the request's
`traceparent`, so that a worker, also one that takes a run over, continues the same trace. Standard
variables (`OTEL_EXPORTER_OTLP_ENDPOINT` and its like) configure where spans go. No user text is
recorded.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from openinteractions.errors import SetupError

_PROPAGATOR = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("openinteractions")
_enabled = False
_OFF = nullcontext(trace.INVALID_SPAN)


def configure(*, version: str, role: str) -> None:
    """Send spans to the configured exporter from now on.

    Raises:
        SetupError: The `otel` extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - optional
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - optional
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - optional
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - optional
    except ImportError as error:
        raise SetupError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but the exporter is not installed: "
            "pip install 'openinteractions[otel]'"
        ) from error
    resource = Resource.create(
        {"service.name": "openinteractions", "service.version": version, "oi.role": role}
    )
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    use(provider)


def use(provider: trace.TracerProvider) -> None:
    """Record spans with a provider."""
    global _tracer, _enabled  # noqa: PLW0603 - one tracer a process, set once at its start
    _tracer = provider.get_tracer("openinteractions")
    _enabled = True


def span(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: Mapping[str, str] | None = None,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> AbstractContextManager[Span]:
    """A span around a block; it costs next to nothing while tracing is off.

    Args:
        name: Low in variety; ids are attributes.
        kind: Server, client or internal.
        parent: A carrier with a `traceparent`, where the span continues a trace from elsewhere.
        attributes: What is known at its start.
    """
    if not _enabled:
        return _OFF
    context = _PROPAGATOR.extract(dict(parent)) if parent is not None else None
    return _tracer.start_as_current_span(name, context=context, kind=kind, attributes=attributes)


def carrier() -> dict[str, str]:
    """The current span's `traceparent`, for whoever continues the trace; empty while off."""
    result: dict[str, str] = {}
    if _enabled:
        _PROPAGATOR.inject(result)
    return result
