"""A model upstream without latency: answers every chat completion with the same stream.

A bare protocol, so that it takes next to nothing of the cores that are measured. `GET` tells how
long the last request's body was.
"""

import asyncio
import re
from typing import cast

import orjson
import uvloop

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_WORDS = (
    "The",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "near",
    "a",
    "river",
)


def _events() -> list[bytes]:
    head = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, object]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    usage = {"prompt_tokens": 12, "completion_tokens": 13, "total_tokens": 25}
    chunks = [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": f"{word} "}) for word in _WORDS),
        chunk({}, "stop"),
        {**head, "choices": [], "usage": usage},
    ]
    return [b"data: %b\n\n" % orjson.dumps(item) for item in chunks] + [b"data: [DONE]\n\n"]


def _answer() -> bytes:
    """Every event as its own HTTP chunk, all in one write."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in _events()) + b"0\r\n\r\n"


_ANSWER = _answer()


class _Connection(asyncio.Protocol):
    last_length = 0

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transport is not derived from asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        if not self._left:
            self._head += data
            head, end, rest = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._head = b""
            length = _LENGTH.search(head)
            if length is None:
                text = b"%d" % _Connection.last_length
                head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text)
                self._transport.write(head + text)
                return
            self._left = _Connection.last_length = int(length[1])
            data = rest
        self._left -= len(data)
        if self._left <= 0:
            self._left = 0
            self._transport.write(_ANSWER)


async def _main() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main())
