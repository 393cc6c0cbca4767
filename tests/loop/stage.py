"""A run on a scripted model: real loop, ports that keep what they are given."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import orjson
from tests.tools import files

from openinteractions.errors import ModelUnavailable, NotFound
from openinteractions.events.types import Event
from openinteractions.loop import pictures
from openinteractions.loop.earlier import Found, found_in_rows
from openinteractions.loop.limits import BudgetSpent
from openinteractions.loop.ports import Patience, Ports
from openinteractions.loop.run import Outcome, Run
from openinteractions.loop.spec import RunSpec, RunState
from openinteractions.models.catalog import Price, Target
from openinteractions.models.port import Finished, Json, ModelCall, ModelEvent, TextDelta
from openinteractions.models.port import Warning as Downgrade
from openinteractions.tools.port import Done, Means, Tool
from openinteractions.tools.toolbox import Toolbox, toolbox

USAGE = {"total_input_tokens": 100, "total_output_tokens": 20, "total_tokens": 120}


@dataclass(frozen=True, slots=True)
class Break:
    """In a script: the upstream fails here."""

    error: Exception


class ScriptedModel:
    """Obeys the model port; plays one script for each call."""

    def __init__(self, *scripts: Sequence[ModelEvent | Break]) -> None:
        self.scripts = list(scripts)
        self.calls: list[ModelCall] = []

    def compile(self, steps: Sequence[Json], model: str) -> list[bytes]:
        return [orjson.dumps(step) for step in steps]

    def takes_uri(self, content_type: str, uri: str) -> bool:
        return False

    def check(self, call: ModelCall) -> list[Downgrade]:
        return []

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncGenerator[AsyncIterator[ModelEvent]]:
        self.calls.append(call)
        script = self.scripts.pop(0)
        if script and isinstance(script[0], Break):
            raise script[0].error
        yield self._play(script)

    async def _play(self, script: Sequence[ModelEvent | Break]) -> AsyncIterator[ModelEvent]:
        for event in script:
            if isinstance(event, Break):
                raise event.error
            yield event

    def shown(self, call: int = -1) -> list[Json]:
        """The steps that a call was given."""
        return [orjson.loads(message) for message in self.calls[call].messages]


@dataclass
class Models:
    """The models by their names."""

    known: dict[str, ScriptedModel]
    price: Price | None = None

    def open(self, target: str) -> Target:
        if target not in self.known:
            raise NotFound(f"The provider of '{target}' is not configured.")
        provider, _, model = target.partition("/")
        return Target(target, provider, model, self.known[target], self.price)


@dataclass
class Past:
    """History: earlier messages, and a run's own steps as the scripted model wants them."""

    earlier: list[bytes] = field(default_factory=list)

    async def messages(self, target: Target, *, is_bare: bool = False) -> Sequence[bytes]:
        if not is_bare:
            return self.earlier
        return [orjson.dumps(s) for s in pictures.without([orjson.loads(e) for e in self.earlier])]

    async def own(self, steps: Sequence[Json], target: Target) -> list[bytes]:
        from openinteractions.loop.context import for_model  # noqa: PLC0415 - only here

        shown = for_model(steps, provider=target.provider, model=target.model)
        return target.adapter.compile(shown, target.model)

    async def called(self, call_ids: Sequence[str]) -> set[str]:
        ids = {orjson.loads(message).get("id") for message in self.earlier}
        return {call_id for call_id in call_ids if call_id in ids}

    async def found(self, target: Target) -> Found:
        return found_in_rows(self.earlier)

    async def steps(self, max_chars: int) -> list[Json]:
        return []


@dataclass
class Notebook:
    """A journal that keeps events and commits in the order in which they came."""

    watched: bool = True
    events: list[Event] = field(default_factory=list)
    commits: list[tuple[list[Json], bytes]] = field(default_factory=list)
    held: list[Event] = field(default_factory=list)

    @property
    def show(self):
        return self._take if self.watched else None

    def _take(self, *events: Event) -> None:
        self.events += events

    def hold(self, *events: Event) -> None:
        if self.watched:
            self.held += events

    async def commit(self, steps: Sequence[Json], state: RunState) -> None:
        self.events += self.held
        self.held = []
        self.commits.append((list(steps), state.dump()))


@dataclass
class Bench(files.Bench):
    """A workplace that also looks into the run's journal."""

    journal: Notebook | None = None
    commits_seen: list[int] = field(default_factory=list)
    """How many commits there were when each command began."""

    async def execute(self, *args: Any, **kwargs: Any) -> Done:
        if self.journal is not None:
            self.commits_seen.append(len(self.journal.commits))
        return await super().execute(*args, **kwargs)


@dataclass
class Coins:
    """A purse with so many tokens; keeps what was asked of it."""

    tokens: int
    held: int = 0
    log: list[tuple[str, int, int]] = field(default_factory=list)

    async def room(self, *, input_tokens: int, price: Price | None) -> int:
        return 10**6 if self.tokens > 3 else self.tokens

    async def reserve(self, *, tokens: int, nanousd: int) -> None:
        self.log.append(("reserve", tokens, nanousd))
        if tokens > self.tokens:
            raise BudgetSpent("The purse is empty.")
        self.held = tokens
        self.tokens -= tokens

    async def settle(self, *, tokens: int, nanousd: int) -> None:
        self.log.append(("settle", tokens, nanousd))
        self.tokens += self.held - tokens
        self.held = 0


@dataclass
class Scene:
    """A run, what it was given, and what came of it."""

    run: Run
    outcome: Outcome
    journal: Notebook

    @property
    def steps(self) -> list[Json]:
        return self.run.generated

    def texts(self) -> list[str]:
        return [
            "".join(b.get("text", "") for b in step.get("content", step.get("summary", [])))
            for step in self.steps
        ]


async def play(
    *models: ScriptedModel,
    state: RunState | None = None,
    price: Price | None = None,
    purse: Coins | None = None,
    watched: bool = True,
    generated: Sequence[Json] = (),
    earlier: Sequence[bytes] = (),
    attempts: int = 3,
    bench: Bench | None = None,
    box: Mapping[str, Tool] | None = None,
    inputs: Sequence[Json] | None = None,
    **spec: Any,
) -> Scene:
    """Drive a run over these models, each the fallback of the one before."""
    names = [f"p{number}/m" for number in range(len(models))]
    journal = Notebook(watched)
    if bench is not None:
        bench.journal = journal
    run = Run(
        RunSpec(chain=spec.pop("chain", names), **spec),
        state or RunState(),
        inputs=[said("hi", kind="user_input")] if inputs is None else inputs,
        generated=generated,
        ports=Ports(
            models=Models(dict(zip(names, models, strict=True)), price),
            history=Past(list(earlier)),
            journal=journal,
            tools=toolbox(spec.get("own_tools", ()), Means(workplace=bench))
            if box is None
            else Toolbox(box),
            purse=purse,
            patience=Patience(attempts, timedelta(milliseconds=20)),
        ),
    )
    return Scene(run, await run.drive(), journal)


def said(text: str, *, kind: str = "model_output", **more: object) -> Json:
    return {"type": kind, "content": [{"type": "text", "text": text}], **more}


def answer(*texts: str, reason: str = "stop", **usage: int) -> list[ModelEvent | Break]:
    return [*map(TextDelta, texts), Finished(reason, {**USAGE, **usage})]  # pyright: ignore[reportArgumentType]


def down(retry_after_s: float | None = None, status: int | None = 503) -> Break:
    return Break(
        ModelUnavailable("It is down.", upstream_status=status, retry_after_s=retry_after_s)
    )
