"""Runs tasks on a server, through the official client."""

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from google.genai import Client
from google.genai.errors import APIError

from benchmarks.agent_tasks.task import Files, Task

AGENT = "antigravity-preview-09-2026"
_FIRST_LOOK_S = 0.2
_LONGEST_LOOK_S = 3.0
_NOT_FOUND = 404


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a task went."""

    id: str
    problem: str | None
    """None: passed."""
    status: str
    seconds: float
    steps: int = 0
    tool_calls: dict[str, int] = field(default_factory=dict[str, int])
    tokens: int = 0
    answer: str = ""
    interaction: str | None = None

    def json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def perform(
    client: Client,
    task: Task,
    *,
    model: str,
    agent: str = AGENT,
    within_s: float = 600,
    keeps: bool = False,
) -> Result:
    """Run one task to its end and look at the outcome.

    Args:
        client: Of the server.
        task: What to do.
        model: Which model the agent thinks with.
        agent: Which agent.
        within_s: How long to wait; then it is cancelled, and has failed.
        keeps: Leave its environment, for somebody to look at.
    """
    began = time.monotonic()
    started = client.interactions.create(
        agent=agent,
        input=task.prompt,
        environment=task.environment(),
        agent_config={"type": "antigravity", "model": model},
        background=True,
    )
    done = _ended(client, started.id, began + within_s)
    seconds = time.monotonic() - began
    answer = done.output_text or ""
    try:
        problem = task.problem(_files(client, done.environment_id), answer)
        if done.status != "completed":
            problem = f"{done.status}: {_errors(done)}"
    finally:
        if done.environment_id and not keeps:
            client.environments.delete(id=done.environment_id)
    steps = done.steps or []
    return Result(
        id=task.id,
        problem=problem,
        status=done.status,
        seconds=round(seconds, 1),
        steps=len(steps),
        tool_calls=dict(Counter(_tool(step) for step in steps if step.type.endswith("_call"))),
        tokens=int(done.usage.total_tokens or 0) if done.usage else 0,
        answer=answer,
        interaction=done.id,
    )


def _ended(client: Client, interaction: str, deadline: float) -> Any:
    pause = _FIRST_LOOK_S
    while True:
        found = client.interactions.get(interaction)
        if found.status != "in_progress":
            return found
        if time.monotonic() > deadline:
            client.interactions.cancel(interaction)
            return client.interactions.get(interaction)
        time.sleep(pause)
        pause = min(_LONGEST_LOOK_S, pause * 1.3)


def _files(client: Client, environment: str | None) -> Files:
    def read(path: str) -> bytes | None:
        if environment is None:
            return None
        try:
            return client.environments.files.download(environment=environment, path=path)
        except APIError as error:
            if error.code != _NOT_FOUND:
                raise
            return None

    return Files(read)


def _tool(step: Any) -> str:
    return step.name if step.type == "function_call" else step.type.removesuffix("_call")


def _errors(interaction: Any) -> str:
    extra = interaction.model_extra or {}
    return str(getattr(interaction, "errors", None) or extra.get("errors") or "")[:300]
