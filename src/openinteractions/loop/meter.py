"""Measures one upstream call: how long, how soon, how many tokens, how it ended."""

import time
from types import TracebackType
from typing import Self

from opentelemetry.trace import SpanKind

from openinteractions import metrics, tracing
from openinteractions.models.catalog import Target
from openinteractions.models.port import Finished

_KINDS = {
    "input": "total_input_tokens",
    "cached": "total_cached_tokens",
    "output": "total_output_tokens",
    "thought": "total_thought_tokens",
}


class Meter:
    """Around one call: metrics, and a client span with the GenAI conventions' names."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._began = time.perf_counter()
        self.has_begun = False
        """Whether the upstream has said anything."""
        self._outcome = "broken"
        self._scope = tracing.span(
            f"chat {target.model}",
            kind=SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": target.provider,
                "gen_ai.request.model": target.model,
            },
        )

    async def __aenter__(self) -> Self:
        self._span = self._scope.__enter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        provider = self._target.provider
        metrics.child(metrics.model_calls, provider, self._outcome).inc()
        metrics.child(metrics.model_seconds, provider).observe(self._elapsed())
        self._scope.__exit__(kind, error, traceback)

    def event(self, event: object) -> None:
        """Something came: the first tells how long the upstream thought, the last how much."""
        provider = self._target.provider
        if not self.has_begun:
            self.has_begun = True
            metrics.child(metrics.model_first_seconds, provider).observe(self._elapsed())
        if type(event) is not Finished:
            return
        self._outcome = "finished"
        for kind, key in _KINDS.items():
            if tokens := event.usage.get(key):
                metrics.child(metrics.model_tokens, provider, kind).inc(tokens)
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": (event.reason,),
                "gen_ai.usage.input_tokens": event.usage.get("total_input_tokens", 0),
                "gen_ai.usage.output_tokens": event.usage.get("total_output_tokens", 0),
            }
        )

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began
