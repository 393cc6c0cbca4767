"""A model without latency that fails three steps in a hundred, and keeps a record of every call.

It runs in the benchmark's own process, as a bare protocol. What befalls the first try of a step
follows from the step alone, so the naive chain and ours meet the very same faults.
"""

import asyncio
import random
import re
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Protocol, cast

import orjson

STEPS = 6
FAULTS = 0.03
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_ERROR = b'{"error":{"message":"not now","type":"server_error"}}'


def prompt(run: int, step: int) -> str:
    """What a step asks."""
    return f"run {run} step {step}"


def answer(asked: str) -> str:
    """The one right answer to it."""
    return f"The answer to {asked} is fine."


def history(run: int, step: int) -> list[tuple[str, str]]:
    """What the model must be shown for a step."""
    turns: list[tuple[str, str]] = []
    for number in range(step):
        asked = prompt(run, number)
        turns += [("user", asked), ("assistant", answer(asked))]
    return [*turns, ("user", prompt(run, step))]


class Record:
    """What one side has asked."""

    def __init__(self) -> None:
        self.tries: Counter[tuple[int, int]] = Counter()
        self.whole: Counter[tuple[int, int]] = Counter()
        """Answers that were sent to their end."""
        self.furthest: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.late: list[tuple[int, int]] = []
        """Steps that were asked for again although a later one had been."""
        self.wrong: list[str] = []
        """Requests whose history is not the right one."""

    def plan(self, messages: list[Any]) -> tuple[list[bytes], str]:
        """Note a request; what to answer, and how to fail (empty: not)."""
        asked = text_of(messages[-1])
        words = asked.split()
        run, step = int(words[1]), int(words[3])
        self.tries[run, step] += 1
        if [(m["role"], text_of(m)) for m in messages] != history(run, step):
            self.wrong.append(asked)
        if step < self.furthest[run]:
            self.late.append((run, step))
        self.furthest[run] = max(step, self.furthest[run])
        fault = fault_of(f"{asked} {self.tries[run, step]}")
        if fault:
            self.faults[fault] += 1
        else:
            self.whole[run, step] += 1
        return said(answer(asked)), fault


class Model(Protocol):
    """What answers."""

    def plan(self, messages: list[Any]) -> tuple[list[bytes], str]:
        """The events of an answer, and how to fail (empty: not)."""
        ...


def fault_of(call: str) -> str:
    """How a call fails (empty: not), by its name alone."""
    rng = random.Random(call)
    return rng.choice(["error", "cut", "stall"]) if rng.random() < FAULTS else ""


def text_of(message: Any) -> str:
    """The text of a message."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


class _Connection(asyncio.Protocol):
    def __init__(self, model: Model) -> None:
        self._model = model
        self._transport: asyncio.Transport | None = None
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if end else None
        if length is None or len(body) < int(length[1]):
            return
        self._data = body[int(length[1]) :]
        self._reply(*self._model.plan(orjson.loads(body[: int(length[1])])["messages"]))

    def _reply(self, events: list[bytes], fault: str) -> None:
        assert self._transport is not None
        if fault == "error":
            head = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
            self._transport.write(head + b"Content-Length: %d\r\n\r\n" % len(_ERROR) + _ERROR)
            return
        shown = events if not fault else events[: len(events) // 2]
        self._transport.write(_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in shown))
        if not fault:
            self._transport.write(b"0\r\n\r\n")
        elif fault == "cut":
            self._transport.close()
        # Who stalls says nothing more; the caller hangs up.


def said(text: str) -> list[bytes]:
    """The events of an answer in words."""
    words = [{"content": word} for word in re.findall(r"\S+\s*", text)]
    return _events([{"role": "assistant", "content": ""}, *words], "stop")


def called(call_id: str, name: str, arguments: dict[str, str]) -> list[bytes]:
    """The events of a call of a tool."""
    function = {"name": name, "arguments": orjson.dumps(arguments).decode()}
    call = {"index": 0, "id": call_id, "type": "function", "function": function}
    return _events([{"role": "assistant", "content": None}, {"tool_calls": [call]}], "tool_calls")


def _events(deltas: list[Any], finish: str) -> list[bytes]:
    head = {"id": "chatcmpl-gap", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def chunk(delta: object, finish: str | None = None) -> dict[str, object]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    usage = {"prompt_tokens": 12, "completion_tokens": 13, "total_tokens": 25}
    chunks = [
        *(chunk(delta) for delta in deltas),
        chunk({}, finish),
        {**head, "choices": [], "usage": usage},
    ]
    return [b"data: %b\n\n" % orjson.dumps(item) for item in chunks] + [b"data: [DONE]\n\n"]


@asynccontextmanager
async def serving(model: Model) -> AsyncGenerator[str]:
    """Serve on a free loopback port; gives the base URL of its API."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(model), "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
