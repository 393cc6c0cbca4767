"""The load generator: a process of its own that takes orders on stdin and reports on stdout.

One JSON object a line each way. A bare protocol on kept-alive connections, so that it takes little
of the cores that are measured. Every answer is checked; what is not a completed turn is an error.
"""

import asyncio
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
import uvloop

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_ID = re.compile(rb'"id":"(v1_[0-9a-f]{32})"')
_COMPLETED = b'"status":"completed"'


@dataclass(slots=True)
class Reply:
    """One answer."""

    began: float
    data: bytearray = field(default_factory=bytearray)
    first_event: float = 0.0
    first_delta: float = 0.0
    ended: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether it is a turn that completed."""
        return self.data.startswith(b"HTTP/1.1 200") and _COMPLETED in self.data


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reply = Reply(0.0)
        self._done: asyncio.Future[Reply] | None = None
        self._whole: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # uvloop's transport is not derived from asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the one who waits know."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionResetError("closed by the server"))

    async def send(self, request: bytes) -> Reply:
        """Send a request and wait for all of its answer."""
        assert self._transport is not None
        self._whole = None
        self._done = asyncio.get_running_loop().create_future()
        self._reply = Reply(time.perf_counter())
        self._transport.write(request)
        return await self._done

    def data_received(self, data: bytes) -> None:
        """Take what came, and see whether the answer is whole."""
        reply = self._reply
        reply.data += data
        if self._whole is None:
            end = reply.data.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(reply.data, 0, end)
            # 0: no length, so a stream, which ends with its last HTTP chunk.
            self._whole = end + 4 + int(length[1]) if length else 0
        if not self._whole:
            self._see_events(reply)
        is_whole = (
            len(reply.data) >= self._whole if self._whole else reply.data.endswith(b"\r\n0\r\n\r\n")
        )
        if is_whole and self._done is not None and not self._done.done():
            reply.ended = time.perf_counter()
            self._done.set_result(reply)

    def _see_events(self, reply: Reply) -> None:
        if not reply.first_event and b"interaction.created" in reply.data:
            reply.first_event = time.perf_counter()
        if not reply.first_delta and b"step.delta" in reply.data:
            reply.first_delta = time.perf_counter()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()


async def _connect(port: int) -> Client:
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(Client, "127.0.0.1", port)
    return client


def _request(order: dict[str, Any], body: dict[str, Any]) -> bytes:
    data = orjson.dumps(body)
    return (
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"x-goog-api-key: %b\r\nContent-Length: %d\r\n\r\n%b"
    ) % (order["path"].encode(), order["key"].encode(), len(data), data)


async def _press(order: dict[str, Any]) -> dict[str, Any]:
    """Send the same request over `concurrency` connections for `seconds`."""
    request = _request(order, order["body"])
    clients = [await _connect(order["port"]) for _ in range(order["concurrency"])]
    began = time.perf_counter()
    good = bad = 0

    async def one(client: Client) -> None:
        nonlocal good, bad
        while time.perf_counter() - began < order["seconds"]:
            reply = await client.send(request)
            good, bad = good + reply.is_good, bad + (not reply.is_good)

    await asyncio.gather(*map(one, clients))
    seconds = time.perf_counter() - began
    for client in clients:
        client.close()
    return {"requests": good + bad, "errors": bad, "seconds": seconds}


async def _stream(order: dict[str, Any]) -> dict[str, Any]:
    """Open `count` streams, one after another; say when each showed what."""
    request = _request(order, order["body"])
    client = await _connect(order["port"])
    replies = [await client.send(request) for _ in range(order["count"])]
    client.close()
    return {
        "errors": sum(not reply.is_good for reply in replies),
        "first_event_ms": [1000 * (r.first_event - r.began) for r in replies],
        "first_delta_ms": [1000 * (r.first_delta - r.began) for r in replies],
        "end_ms": [1000 * (r.ended - r.began) for r in replies],
    }


async def _talk(order: dict[str, Any]) -> dict[str, Any]:
    """Take `count` turns, one after another: of one conversation, or each of a new one."""
    client = await _connect(order["port"])
    errors = 0
    previous = order["previous"]
    for _ in range(order["count"]):
        body = order["body"]
        if previous is not None:
            body = {**body, "previous_interaction_id": previous}
        reply = await client.send(_request(order, body))
        errors += not reply.is_good
        found = _ID.search(reply.data)
        if order["goes_on"] and found:
            previous = found[1].decode()
    client.close()
    return {"errors": errors, "previous": previous}


async def _main() -> None:
    loop = asyncio.get_running_loop()
    kinds = {"press": _press, "stream": _stream, "talk": _talk}
    while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
        order = orjson.loads(line)
        try:
            report = await kinds[order["kind"]](order)
        except OSError as error:
            report = {"failed": f"{type(error).__name__}: {error}"}
        sys.stdout.buffer.write(orjson.dumps(report) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(_main())
