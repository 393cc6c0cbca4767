"""A token endpoint (RFC 6749) whose clients, codes and answers a test sets."""

import asyncio
import base64
import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus

from aiohttp import web

CLIENT = ("client-1", "client-SECRET-aaa")
REFRESH = "refresh-SECRET-bbb"


@dataclass(eq=False)
class FakeOAuth:
    """Gives `access-SECRET-<n>` for the refresh token that is good now."""

    url: str = ""
    takes: str = "post"
    """How clients have to say who they are: `post` or `basic`."""
    refresh_token: str = REFRESH
    rotates: bool = False
    """A refresh token is good once; the answer has the next one."""
    delay_s: float = 0.0
    lasts: Any = 3600
    answers: list[tuple[int, Any]] = field(default_factory=list[tuple[int, Any]])
    """Given first, instead of what is right; bytes are sent as they are."""
    forms: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    """What was asked."""
    granted: int = 0
    reused: int = 0
    """A refresh token came that is not good any more."""
    at_once: int = 0
    most_at_once: int = 0
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def body(self, **fields: Any) -> dict[str, Any]:
        """A create's body for a grant that this endpoint knows."""
        return {
            "type": "oauth2",
            "client_id": CLIENT[0],
            "client_secret": CLIENT[1],
            "refresh_token": self.refresh_token,
            "token_url": self.url,
            **fields,
        }

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[None]:
        app = web.Application()
        app.router.add_post("/token", self._token)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/token"
        try:
            yield
        finally:
            await runner.cleanup()

    async def _token(self, request: web.Request) -> web.Response:
        form = {key: str(value) for key, value in (await request.post()).items()}
        self.forms.append(form)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.at_once -= 1
        status, answer = self.answers.pop(0) if self.answers else self._answer(request, form)
        if isinstance(answer, bytes):
            return web.Response(body=answer, status=status, headers={"Location": self.url})
        return web.json_response(answer, status=status)

    def _answer(self, request: web.Request, form: dict[str, str]) -> tuple[int, Any]:
        if self._client(request, form) != CLIENT:
            return 401, {"error": "invalid_client"}
        if form["grant_type"] != "refresh_token" or form["refresh_token"] != self.refresh_token:
            self.reused += 1
            return 400, {
                "error": "invalid_grant",
                "error_description": f"{form['refresh_token']} of {CLIENT[1]} is bad",
            }
        self.granted += 1
        answer: dict[str, Any] = {
            "access_token": f"access-SECRET-{next(self.numbers)}",
            "token_type": "Bearer",
        }
        if self.lasts is not None:
            answer["expires_in"] = self.lasts
        if self.rotates:
            self.refresh_token = f"refresh-SECRET-{next(self.numbers)}"
            answer["refresh_token"] = self.refresh_token
        return 200, answer

    def _client(self, request: web.Request, form: dict[str, str]) -> tuple[str, str] | None:
        if self.takes == "post":
            return (form.get("client_id", ""), form.get("client_secret", ""))
        kind, _, text = request.headers.get("Authorization", "").partition(" ")
        if kind != "Basic":
            return None
        name, _, secret = base64.b64decode(text).decode().partition(":")
        return (unquote_plus(name), unquote_plus(secret))
