"""Cloud Storage's JSON API, as far as public buckets need it."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web


@dataclass(eq=False)
class FakeStorage:
    """Buckets of objects that everybody may read."""

    url: str = ""
    objects: dict[tuple[str, str], bytes] = field(default_factory=dict[tuple[str, str], bytes])
    page: int = 2
    """Objects in one page of a list."""

    async def _read(self, request: web.Request) -> web.StreamResponse:
        assert request.query == {"alt": "media"}
        found = self.objects.get((request.match_info["bucket"], request.match_info["name"]))
        if found is None:
            return web.json_response({"error": {"code": 404}}, status=404)
        return web.Response(body=found)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        bucket, prefix = request.match_info["bucket"], request.query["prefix"]
        names = sorted(n for b, n in self.objects if b == bucket and n.startswith(prefix))
        start = int(request.query.get("pageToken") or 0)
        items = [
            {"name": name, "size": str(len(self.objects[bucket, name]))}
            for name in names[start : start + self.page]
        ]
        answer: dict[str, object] = {"items": items} if items else {}
        if start + self.page < len(names):
            answer["nextPageToken"] = str(start + self.page)
        return web.json_response(answer)

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[None]:
        app = web.Application()
        app.router.add_get("/storage/v1/b/{bucket}/o", self._list)
        app.router.add_get("/storage/v1/b/{bucket}/o/{name}", self._read)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            await runner.cleanup()
