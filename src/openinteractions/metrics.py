"""What this process counts, in the Prometheus text format.

Labels are few and bounded: routes, kinds, providers, outcomes; never ids, keys, or model text.
"""

from functools import lru_cache
from typing import TypeVar

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)

# A series beside every other that says only when the process counted first.
disable_created_metrics()

CONTENT_TYPE = CONTENT_TYPE_LATEST
REGISTRY = CollectorRegistry(auto_describe=True)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)

requests = Counter(
    "oi_requests", "HTTP requests answered.", ["method", "route", "status"], registry=REGISTRY
)
request_seconds = Histogram(
    "oi_request_seconds",
    "Time to the last byte of an answer.",
    ["route"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
runs_active = Gauge("oi_runs_active", "Jobs that run in this process.", registry=REGISTRY)
runs = Counter("oi_runs", "Interactions that ended.", ["status"], registry=REGISTRY)
run_seconds = Histogram(
    "oi_run_seconds", "Time from start to end of a run.", buckets=_SECONDS, registry=REGISTRY
)
takeovers = Counter(
    "oi_takeovers", "Runs that this process took over from a lost owner.", registry=REGISTRY
)
leases_lost = Counter(
    "oi_leases_lost", "Runs that another worker took from this process.", registry=REGISTRY
)
jobs_claimed = Counter("oi_jobs_claimed", "Jobs claimed.", ["kind"], registry=REGISTRY)
jobs_failed = Counter("oi_jobs_failed", "Jobs given up for good.", ["kind"], registry=REGISTRY)
jobs_swept = Counter(
    "oi_jobs_swept", "Jobs taken from dead workers and queued again.", registry=REGISTRY
)
model_calls = Counter(
    "oi_model_calls", "Calls of upstream models.", ["provider", "outcome"], registry=REGISTRY
)
model_seconds = Histogram(
    "oi_model_seconds",
    "Duration of upstream calls.",
    ["provider"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
model_first_seconds = Histogram(
    "oi_model_first_seconds",
    "Time to the first event of upstream calls.",
    ["provider"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
model_tokens = Counter(
    "oi_model_tokens", "Tokens of upstream calls.", ["provider", "kind"], registry=REGISTRY
)
tool_calls = Counter(
    "oi_tool_calls",
    "Calls of this server's tools that are over.",
    ["tool", "outcome"],
    registry=REGISTRY,
)
tool_seconds = Histogram(
    "oi_tool_seconds",
    "Duration of calls of this server's tools.",
    ["tool"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
tool_calls_active = Gauge(
    "oi_tool_calls_active",
    "Calls of this server's tools that run in this process.",
    ["tool"],
    registry=REGISTRY,
)
events_written = Counter("oi_events_written", "Stream events committed.", registry=REGISTRY)
event_flush_seconds = Histogram(
    "oi_event_flush_seconds",
    "Duration of a write of the event log.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
deliveries = Counter(
    "oi_webhook_deliveries", "Tries to deliver a callback.", ["outcome"], registry=REGISTRY
)
database_errors = Counter(
    "oi_database_errors", "Times that the database was away.", ["where"], registry=REGISTRY
)
queue_jobs = Gauge(
    "oi_queue_jobs",
    "Jobs in the queue, as the database has them.",
    ["kind", "state"],
    registry=REGISTRY,
)
queue_oldest_seconds = Gauge(
    "oi_queue_oldest_seconds", "Age of the oldest job that is due.", ["kind"], registry=REGISTRY
)
runs_oldest_seconds = Gauge(
    "oi_runs_oldest_seconds", "Age of the oldest run that somebody runs.", registry=REGISTRY
)
workers_alive = Gauge("oi_workers_alive", "Processes that beat.", ["role"], registry=REGISTRY)
sandboxes = Gauge(
    "oi_sandboxes",
    "Sandboxes of this broker: running for an environment, or warm.",
    ["state"],
    registry=REGISTRY,
)
sandbox_start_seconds = Histogram(
    "oi_sandbox_start_seconds",
    "Time until an environment has its sandbox: a warm one claimed, or a cold start.",
    ["kind"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
sandboxes_lost = Counter(
    "oi_sandboxes_lost", "Sandboxes that ended without being stopped.", registry=REGISTRY
)
executions = Counter(
    "oi_executions", "Commands that ended in sandboxes.", ["outcome"], registry=REGISTRY
)
egress = Counter(
    "oi_egress", "Connections and requests out of sandboxes.", ["decision"], registry=REGISTRY
)


_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


@lru_cache(maxsize=4096)
def child(metric: _Metric, *labels: str) -> _Metric:
    """A metric with its labels; looked up once, since the hot path asks for the same few."""
    return metric.labels(*labels)


def serve(port: int) -> None:
    """Serve them on a port of their own, from a thread, for a process without an API."""
    start_http_server(port, registry=REGISTRY)


def render() -> bytes:
    """The current values."""
    return generate_latest(REGISTRY)
