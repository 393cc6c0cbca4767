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
from typing import Any, cast

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

    def plan(self, messages: list[Any]) -> tuple[str, str]:
        """Note a request; what to answer, and how to fail (empty: not)."""
        asked = _text(messages[-1])
        words = asked.split()
        run, step = int(words[1]), int(words[3])
        self.tries[run, step] += 1
        if [(m["role"], _text(m)) for m in messages] != history(run, step):
            self.wrong.append(asked)
        if step < self.furthest[run]:
            self.late.append((run, step))
        self.furthest[run] = max(step, self.furthest[run])
        rng = random.Random(f"{asked} {self.tries[run, step]}")
        fault = rng.choice(["error", "cut", "stall"]) if rng.random() < FAULTS else ""
        if fault:
            self.faults[fault] += 1
        else:
            self.whole[run, step] += 1
        return answer(asked), fault


def _text(message: Any) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


class _Connection(asyncio.Protocol):
    def __init__(self, record: Record) -> None:
        self._record = record
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
        self._reply(*self._record.plan(orjson.loads(body[: int(length[1])])["messages"]))

    def _reply(self, text: str, fault: str) -> None:
        assert self._transport is not None
        if fault == "error":
            head = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
            self._transport.write(head + b"Content-Length: %d\r\n\r\n" % len(_ERROR) + _ERROR)
            return
        events = _events(text)
        shown = events if not fault else events[: len(events) // 2]
        self._transport.write(_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in shown))
        if not fault:
            self._transport.write(b"0\r\n\r\n")
        elif fault == "cut":
            self._transport.close()
        # Who stalls says nothing more; the caller hangs up.


def _events(text: str) -> list[bytes]:
    head = {"id": "chatcmpl-gap", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, object]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    usage = {"prompt_tokens": 12, "completion_tokens": 13, "total_tokens": 25}
    chunks = [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": word}) for word in re.findall(r"\S+\s*", text)),
        chunk({}, "stop"),
        {**head, "choices": [], "usage": usage},
    ]
    return [b"data: %b\n\n" % orjson.dumps(item) for item in chunks] + [b"data: [DONE]\n\n"]


@asynccontextmanager
async def serving(record: Record) -> AsyncGenerator[str]:
    """Serve on a free loopback port; gives the base URL of its API."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(record), "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
