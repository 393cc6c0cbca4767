"""The floor: what a stored turn cannot avoid, and nothing else (ruling R14).

A bare ASGI app that commits twice and asks the same upstream once. `POST /send/<bytes>` only sends
so many bytes to the upstream, to learn what the transport of a long history costs.
"""

import socket
import sys
import uuid
from typing import Any

import aiohttp
import asyncpg
import uvicorn
import uvloop

_TABLE = """
create table if not exists floor (
  id uuid primary key, project_id uuid not null, status text not null, spec bytea not null,
  answer bytea, created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()) with (fillfactor = 80)
"""
_CREATE = "insert into floor (id, project_id, status, spec) values ($1, $2, 'in_progress', $3)"
_FINISH = "update floor set status = 'completed', answer = $2, updated_at = now() where id = $1"
_PROJECT = uuid.uuid4()
_REQUEST = (
    b'{"messages":[{"role":"user","content":"How quick is the brown fox?"}],"model":"m",'
    b'"stream":true,"stream_options":{"include_usage":true}}'
)
_REPLY = (
    b'{"id":"v1_00000000000000000000000000000000","object":"interaction","status":"completed",'
    b'"steps":[{"type":"model_output","content":[{"type":"text","text":"The quick brown fox"}]}]}'
)
_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_REPLY)).encode()),
    ],
}
_BODY = {"type": "http.response.body", "body": _REPLY}


class Floor:
    """The ASGI app."""

    def __init__(self, pool: Any, session: aiohttp.ClientSession, upstream: str) -> None:
        self._pool = pool
        self._session = session
        self._upstream = upstream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        path: str = scope["path"]
        if path.startswith("/send/"):
            await self._ask(b"x" * int(path.removeprefix("/send/")))
        else:
            turn = uuid.uuid4()
            await self._pool.execute(_CREATE, turn, _PROJECT, body)
            answer = await self._ask(_REQUEST)
            await self._pool.execute(_FINISH, turn, answer)
        await send(_START)
        await send(_BODY)

    async def _ask(self, request: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
        async with self._session.post(self._upstream, data=request, headers=headers) as response:
            return b"".join([chunk async for chunk in response.content.iter_any()])


async def _main(database_url: str, upstream: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    asyncpg_: Any = asyncpg
    async with (
        asyncpg_.create_pool(database_url, min_size=20, max_size=20) as pool,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await pool.execute(_TABLE)
        config = uvicorn.Config(
            Floor(pool, session, upstream),
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        print(listener.getsockname()[1], flush=True)
        await uvicorn.Server(config).serve([listener])


if __name__ == "__main__":
    uvloop.run(_main(*sys.argv[1:3]))
