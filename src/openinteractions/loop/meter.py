"""Counts one upstream call: how long, how soon, how many tokens, how it ended."""

import time
from typing import Any

from openinteractions import metrics

_KINDS = {
    "input": "total_input_tokens",
    "cached": "total_cached_tokens",
    "output": "total_output_tokens",
    "thought": "total_thought_tokens",
}


class Meter:
    """Begin it before the call, close it after, whatever happens between."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._began = time.perf_counter()
        self._outcome = "broken"
        self._has_begun = False

    def event(self) -> None:
        """Something came; the first time tells how long the upstream thought."""
        if not self._has_begun:
            self._has_begun = True
            metrics.model_first_seconds.labels(self._provider).observe(self._elapsed())

    def finished(self, usage: dict[str, Any]) -> None:
        """The turn is whole."""
        self._outcome = "finished"
        for kind, key in _KINDS.items():
            tokens = usage.get(key)
            if tokens:
                metrics.model_tokens.labels(self._provider, kind).inc(tokens)

    def close(self) -> None:
        """The call is over."""
        metrics.model_calls.labels(self._provider, self._outcome).inc()
        metrics.model_seconds.labels(self._provider).observe(self._elapsed())

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began
