"""A real MCP server: the SDK's own, served on loopback, with a door of ours before it."""

import asyncio
import base64
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from starlette.types import Receive, Scope, Send

from tests import house

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@dataclass
class Door:
    """What stands before the server: it looks at requests, and may answer itself."""

    needs: dict[str, str] = field(default_factory=dict[str, str])
    """Headers that a request must have."""
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    """Given first, instead of the server's."""
    is_old: bool = False
    """The server knows sessions, and nothing newer."""
    forgets: bool = False
    """No session is known any more."""
    seen: list[dict[str, Any]] = field(default_factory=list)
    """Method, path and headers of each request."""


@dataclass
class FakeMcp:
    """One server, with tools of every kind."""

    door: Door = field(default_factory=Door)
    calls: list[Any] = field(default_factory=list)
    """What its tools did."""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    more: int = 0
    """Further tools."""

    @asynccontextmanager
    async def serve(self, port: int = 0, **how: Any) -> AsyncGenerator[None]:
        server = self._server()
        app = server.streamable_http_app(**how)
        async with server.session_manager.run(), house.serving(self._guarded(app), port) as base:
            self.url = f"{base}/mcp"
            yield

    def _guarded(self, app: Any) -> Any:
        async def door(scope: Scope, receive: Receive, send: Send) -> None:
            headers = {k.decode(): v.decode() for k, v in scope["headers"]}
            self.door.seen.append(
                {
                    "method": scope["method"],
                    "path": scope["path"],
                    "query": scope["query_string"].decode(),
                    **headers,
                }
            )
            refused = any(headers.get(k) != v for k, v in self.door.needs.items())
            if self.door.is_old and headers.get("mcp-method") == "server/discover":
                status, given, body = 400, {}, b""
            elif self.door.forgets and "mcp-session-id" in headers:
                status, given, body = 404, {}, b""
            elif self.door.answers:
                status, given, body = self.door.answers.pop(0)
            elif refused:
                status, given, body = 401, {}, b"who are you?"
            else:
                await app(scope, receive, send)
                return
            fields = [(k.encode(), v.encode()) for k, v in given.items()]
            await send({"type": "http.response.start", "status": status, "headers": fields})
            await send({"type": "http.response.body", "body": body})

        return door

    def _server(self) -> MCPServer:  # noqa: C901 - one function for each tool
        server = MCPServer("fake")

        @server.tool()
        async def add(a: int, b: int) -> str:
            """Add two numbers."""
            self.calls.append(("add", a, b))
            return str(a + b)

        @server.tool(annotations=ToolAnnotations(read_only_hint=True))
        async def look() -> str:
            """Look, and touch nothing."""
            self.calls.append("look")
            return "seen"

        @server.tool(name="set.it", annotations=ToolAnnotations(idempotent_hint=True))
        async def set_it() -> str:
            self.calls.append("set.it")
            return "set"

        @server.tool(structured_output=False)
        async def picture() -> list[Any]:
            return ["a dot", Image(data=PNG, format="png")]

        @server.tool()
        async def table() -> dict[str, int]:
            return {"rows": 2}

        @server.tool()
        async def fail() -> str:
            raise ToolError("no such luck")

        @server.tool()
        async def big(size: int) -> str:
            return "x" * size

        @server.tool()
        async def slow(seconds: float) -> str:
            self.calls.append("slow")
            self.started.set()
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            return "late"

        @server.tool(annotations=ToolAnnotations(read_only_hint=True))
        async def look_slowly() -> str:
            self.calls.append("look_slowly")
            self.started.set()
            # Who looks for the first time waits for good.
            await asyncio.sleep(60 if self.calls.count("look_slowly") == 1 else 0)
            return "seen"

        @server.tool()
        async def headers(context: Context) -> str:
            assert context.headers is not None
            return " ".join(f"{k}={v}" for k, v in context.headers.items())

        for number in range(self.more):
            server.add_tool(look, name=f"more_{number}", description="x" * 100)
        return server
