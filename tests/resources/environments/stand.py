"""A server with a broker that has real disks and files, and no engine for sandboxes."""

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from aiohttp import web
from tests import house
from tests.house import KEY, Server
from yarl import URL

from openinteractions.broker.errors import rendered
from openinteractions.broker.files import add_file_routes
from openinteractions.errors import NotFound
from openinteractions.resources.environments.store import set_changed, set_disk
from openinteractions.sandbox.disk import Disks
from openinteractions.sandbox.files.tree import Tree
from openinteractions.sandbox.port import Owner

SOCKET = "broker.sock"


@dataclass(eq=False)
class Stand:
    """A server, and what its broker was asked for."""

    server: Server
    disks: Disks
    folder: Path
    asked: list[str] = field(default_factory=list[str])

    async def call(
        self,
        method: str,
        path: str,
        data: Any = None,
        *,
        headers: dict[str, str] | None = None,
        key: str | None = KEY,
    ) -> tuple[int, bytes, Any]:
        """One request with a raw body: status, body, headers."""
        known = {} if key is None else {"x-goog-api-key": key}
        # As it is: `%2e%2e` would be resolved.
        url = URL(f"{str(self.server.http._base_url).rstrip('/')}{path}", encoded=True)
        async with self.server.http.request(
            method, url, data=data, headers={**known, **(headers or {})}, allow_redirects=False
        ) as response:
            return response.status, await response.read(), response.headers

    async def made(self, body: Any = None) -> str:
        status, answer = await self.server.call("POST", "environments", body or {})
        assert status == 200, answer
        return answer["id"]

    async def put(self, name: str, path: str, data: Any, query: str = "", **how: Any) -> bytes:
        """An upload at once."""
        url = f"/upload/v1beta/environments/{name}/files/{path}{query}"
        status, body, _ = await self.call("PUT", url, data, **how)
        assert status == 200, body
        return body

    async def read(self, name: str, path: str) -> bytes:
        status, body, _ = await self.call(
            "GET", f"/v1beta/environments/{name}/files/{path}?alt=media"
        )
        assert status == 200, body
        return body

    async def paths(self, name: str) -> list[str]:
        """All files."""
        status, answer = await self.server.call(
            "GET", f"environments/{name}/files?recursive=true&page_size=1000"
        )
        assert status == 200, answer
        return [one["path"] for one in answer["files"] if one["type"] == "FILE"]


@asynccontextmanager
async def standing(database_url: str, folder: Path, **tree: Any) -> AsyncGenerator[Stand]:
    """A server and its broker, over a database."""
    disks = Disks(folder, kind="folder", size_bytes=2**30)
    await disks.recover()
    async with house.opened(database_url, None, role="api", **tree) as server:
        stand = Stand(server, disks, folder)
        runner = web.AppRunner(_app(stand), shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(folder / SOCKET)).start()
        async with server.database.hot() as connection:
            await connection.execute(
                "insert into brokers (name, address, host, pid, backend, capacity, seen) "
                "values ('stand', $1, 'h', 1, 'none', 1, now() + interval '1 hour')",
                f"unix://{folder / SOCKET}",
            )
        yield stand
        await runner.cleanup()
    await disks.close()


def _app(stand: Stand) -> web.Application:
    disks = stand.disks

    @web.middleware
    async def noted(request: web.Request, handler: Any) -> web.StreamResponse:
        stand.asked.append(f"{request.method} {request.path}")
        return await handler(request)

    app = web.Application(middlewares=[noted, rendered])
    env = "/v1/environments/{env}"

    @asynccontextmanager
    async def open_tree(name: str | UUID) -> AsyncGenerator[Tree]:
        name = name if isinstance(name, str) else name.hex
        if name not in await disks.list():
            raise NotFound("No such environment.")
        yield Tree(await disks.open(name), uid=disks.uid, gid=disks.uid, environment=name)

    async def ensure(request: web.Request) -> web.Response:
        name, source = request.match_info["env"], (await request.json()).get("from")
        await (disks.ensure(name) if source is None else disks.fork(source, name))
        await set_disk(stand.server.database, UUID(name), has_disk=True)
        return web.json_response({})

    async def add_folders(request: web.Request) -> web.Response:
        async with open_tree(request.match_info["env"]) as tree:
            await tree.add_tops((await request.json())["names"])
        return web.json_response({})

    async def delete(request: web.Request) -> web.Response:
        await disks.delete(request.match_info["env"])
        return web.json_response({})

    async def usage(request: web.Request) -> web.Response:
        found = await disks.usage(request.match_info["env"])
        return web.json_response({"file_count": found.file_count, "size_bytes": found.size_bytes})

    async def refresh(request: web.Request) -> web.Response:
        return web.json_response({})

    def nobody(_env: str, owner: Owner) -> AbstractAsyncContextManager[None]:
        raise AssertionError(f"no run writes here, but {owner} did")

    app.router.add_put(env, ensure)
    app.router.add_put(env + "/folders", add_folders)
    app.router.add_delete(env, delete)
    app.router.add_get(env + "/usage", usage)
    app.router.add_post(env + "/refresh", refresh)
    add_file_routes(
        app.router,
        open_tree,
        nobody,
        lambda name: set_changed(stand.server.database, UUID(name)),
    )
    return app
