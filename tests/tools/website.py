"""A web site on loopback with all the trouble of the real one."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO

from aiohttp import web
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

ARTICLE = (
    "<html><head><title>The news</title></head><body><div class=menu>"
    + "".join(f"<a href='/n{n}'>Section {n}</a> " for n in range(30))
    + "</div><article><h1>Bridge opens</h1>"
    + "".join(
        f"<p>In paragraph {n} we learn that <a href='/x{n}'>the bridge</a> was opened by many "
        f"people who had waited for it for {n + 20} years, and who crossed it at once.</p>"
        for n in range(12)
    )
    + "</article><script>track()</script></body></html>"
)
PRICES = (
    "<html><head><title>Lamp shop</title></head><body><nav><a href='/'>Home</a></nav>"
    "<p>" + "We are a family business that has sold lamps of every kind for many years now. " * 8
    + "</p><table><caption>Our lamps</caption><tr><th>Name</th><th>Price</th><th>Stock</th></tr>"
    + "".join(
        f"<tr><td><a href='/lamp/{n}'>Lamp {n}</a></td><td>{n}9.50 €</td><td>{n} left</td></tr>"
        for n in range(1, 30)
    )
    + "</table><div class='grid'>"
    + "".join(
        f"<div class='card'><span>Bulb {n}</span><span>{n}.25 €</span></div>" for n in range(1, 20)
    )
    + "</div><footer>Imprint</footer></body></html>"
)  # fmt: skip
SCRIPTED = (
    "<html><head><title>App</title><script type='application/ld+json'>"
    '{"@type": "Product", "name": "Chair", "offers": {"price": "79.90"}}</script></head>'
    "<body><div id='root'></div><script src='/app.js'></script></body></html>"
)
TEASER = (
    "<html><head><title>Scoop</title><script type='application/ld+json'>"
    '{"@type": "NewsArticle", "isAccessibleForFree": false}</script></head>'
    "<body><p>The beginning of a story.</p></body></html>"
)


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page."""
    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(300, 200)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = stream
    writer.add_metadata({"/Title": "Report"})
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


@dataclass
class Website:
    """What runs, and what came."""

    port: int = 0
    hits: list[str] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    pages: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.Response:
        self.hits.append(request.path_qs)
        self.agents.append(request.headers.get("User-Agent", ""))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._answer(request)
        finally:
            self.at_once -= 1

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.path
        if path in self.pages:
            body, kind = self.pages[path]
            return web.Response(body=body, headers={"Content-Type": kind})
        if path == "/to":
            return web.Response(status=302, headers={"Location": request.query["u"]})
        if path.startswith("/status/"):
            return web.Response(status=int(path.rsplit("/", 1)[1]))
        if path.startswith("/slow/"):
            await asyncio.sleep(float(path.rsplit("/", 1)[1]))
            return web.Response(text="late")
        return web.Response(status=404)

    def put(self, path: str, body: str | bytes, kind: str = "text/html; charset=utf-8") -> str:
        self.pages[path] = (body.encode() if isinstance(body, str) else body, kind)
        return self.url(path)


@asynccontextmanager
async def website() -> AsyncGenerator[Website]:
    site = Website()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    site.port = listening._server.sockets[0].getsockname()[1]
    yield site
    await runner.cleanup()
