"""Plain HTTP for the tests: nothing is normalised, and no answer may ever be a 5xx."""

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.e2e.server import KEY, Server

V = "/v1beta"
MODEL = "gemini-3.5-flash"


@dataclass(frozen=True, slots=True)
class Answer:
    """One response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self, status: int) -> str:
        """The message of an error of this status, checked for the contract's form."""
        assert self.status == status, self.body
        assert self.headers["content-type"] == "application/json"
        body = self.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"code", "message", "status"}
        assert all(isinstance(value, str) and value for value in body["error"].values())
        return body["error"]["message"]


def call(
    server: Server,
    method: str,
    path: str,
    body: Any = None,
    *,
    key: str | None = KEY,
    **headers: str,
) -> Answer:
    """One request; a body that is not bytes is sent as JSON. Underlines in header names are `-`."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        sent.setdefault("x-goog-api-key", key)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection = _connect(server)
    try:
        connection.request(method, path, body, sent)
        return _answer(connection.getresponse())
    finally:
        connection.close()


def create(server: Server, body: Any, **headers: str) -> Answer:
    """`POST /interactions`; a dictionary is added to a good request."""
    if isinstance(body, dict):
        body = {"model": MODEL, "input": "Hi"} | body
    return call(server, "POST", f"{V}/interactions", body, **headers)


def raw(server: Server, *pieces: bytes, wait_s: float = 10.0, count: int = 1000) -> list[Answer]:
    """Send bytes on one connection; read responses until it is closed or `count` are there."""
    at = urlsplit(server.url)
    with socket.create_connection((at.hostname, at.port), timeout=wait_s) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except ConnectionError:
                break
        return _responses(connection, count)


def request_bytes(
    method: str, path: str, body: bytes = b"", *headers: str, close: bool = False
) -> bytes:
    """A request as bytes, with a good key."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: x",
        f"x-goog-api-key: {KEY}",
        *(["Connection: close"] if close else []),
        *(headers or (f"Content-Length: {len(body)}",)),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _connect(server: Server) -> http.client.HTTPConnection:
    at = urlsplit(server.url)
    assert at.hostname is not None
    return http.client.HTTPConnection(at.hostname, at.port, timeout=30)


def _answer(response: http.client.HTTPResponse) -> Answer:
    body = response.read()
    assert response.status < 500, body
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, body)


def _responses(connection: socket.socket, count: int) -> list[Answer]:
    found: list[Answer] = []
    stream = connection.makefile("rb")
    try:
        while len(found) < count and stream.peek(1):
            response = http.client.HTTPResponse(_Socket(stream))  # pyright: ignore[reportArgumentType]
            response.begin()
            found.append(_answer(response))
    except (ConnectionError, TimeoutError):
        pass
    return found


class _Socket:
    """What `HTTPResponse` needs of a socket, so that several responses can share a stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def makefile(self, *_: Any) -> Any:
        return _Kept(self._stream)


class _Kept:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        """The stream stays open for the next response."""

    def flush(self) -> None:
        """Nothing is written here."""
