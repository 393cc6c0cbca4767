"""A web site with everything that makes a browser necessary, or miserable."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

HEAD = "<!doctype html><meta charset=utf-8><title>{}</title>"

PAGES = {
    "/": HEAD.format("Shop") + """
<style>.off { display: none } .card { cursor: pointer }</style>
<h1>Our <em>shop</em></h1>
<p>Look at the <a href="/prices">prices</a>, or <a href="/search">search</a>.
<p class=off>never shown</p>
<ul><li>one<li>two <b>bold</b></ul>
<a href="/prices" target="_blank">Prices in a tab</a>
<button onclick="alert('Hello ' + 6 * 7)">Greet</button>
<button onclick="document.getElementById('said').textContent = confirm('Sure?') ? 'yes' : 'no'">
Ask</button>
<p id=said>nothing</p>
<div class=card onclick="this.textContent = 'opened card'">A card</div>
<a href="/file.csv" download>Download</a>
<button id=more>More</button>
<script>
  let count = 0;
  document.getElementById('more').addEventListener('click', (event) => {
    if (!event.isTrusted) return;
    const item = document.createElement('a');
    item.href = '/item' + ++count;
    item.textContent = 'Item ' + count;
    document.body.append(item);
  });
</script>""",
    "/prices": HEAD.format("Prices") + """
<table id=t><tr><th>Shop<th>Price</table>
<script>
  fetch('/prices.json').then((answer) => answer.json()).then((all) => {
    for (const [shop, price] of all)
      document.getElementById('t').insertRow().innerHTML = `<td>${shop}<td>${price} €`;
  });
</script>""",
    "/search": HEAD.format("Search") + """
<form action="/found">
<label>What <input name=q value="old"></label>
<label>Since <input type=date name=since></label>
<label>Where <select name=where><option value=a>Here<option value=b>Far away</select></label>
<label><input type=checkbox name=only> Only new</label>
<input type=password name=secret value=hush aria-label="Secret">
<textarea name=remark placeholder=Remark></textarea>
<input type=file aria-label="Picture"
  onchange="document.title = this.files[0].name + ' ' + this.files[0].size">
<button type=button disabled>Later</button>
<button>Search</button>
</form>""",
    "/framed": HEAD.format("Frames") + """
<p>before<iframe src="/inner" title="Inner"></iframe><p>after
<div id=host></div>
<script>
  const root = document.getElementById('host').attachShadow({mode: 'open'});
  root.innerHTML = '<button>In the shadow</button><slot></slot>';
  root.querySelector('button').onclick = () => { document.title = 'shadow clicked'; };
</script>""",
    "/inner": "<p>inside <button onclick='this.textContent = `pressed`'>Press</button>",
    "/covered": HEAD.format("Covered") + """
<button onclick="document.title='reached'">Under</button>
<div style="position:fixed;inset:0;background:#fff8">We use cookies</div>""",
    "/later": HEAD.format("Later") + """
<p id=p>not yet<script>setTimeout(() => { p.textContent = 'There it is' }, 6000)</script>""",
    "/tall": HEAD.format("Tall") + "<p>".join(f"paragraph {n} " + "word " * 30 for n in range(300))
    + "<a href='/'>last link</a>",
    "/chatty": HEAD.format("Chatty") + "<p>talks<script>"
    "setInterval(() => fetch('/prices.json'), 50)</script>",
    # Hostile.
    "/loop": HEAD.format("Loop") + "<p>caught<script>for (;;) {}</script>",
    "/clickloop": HEAD.format("Clickloop") + "<button onclick='for (;;) {}'>Loop</button>",
    "/huge": HEAD.format("Huge") + "<p>many<script>for (let i = 0; i < 1e5; i++) {"
    "const e = document.createElement(i % 10 ? 'span' : 'a'); e.href = '/' + i;"
    "e.textContent = 'n' + i; document.body.append(e, ' ') }</script>",
    "/restless": HEAD.format("Restless") + "<p>here<script>location = '/restless?' + Math.random()"
    "</script>",
    "/stay": HEAD.format("Stay") + "<input aria-label=Note><script>onbeforeunload = (event) => "
    "{ event.preventDefault(); return 'stay' }</script>",
    "/alerts": HEAD.format("Alerts") + "<p>shut up<script>for (;;) alert('no')</script>",
    "/popups": HEAD.format("Popups") + '<button onclick="for (let i = 0; i < 20; i++) '
    "open('/prices?' + i)\">Pop</button><script>setInterval(() => open('/'), 300)</script>",
    "/deep": HEAD.format("Deep") + "<div>" * 5000 + "the bottom",
    "/fat": HEAD.format("Fat") + "<p>fat<script>const all = []; for (;;) "
    "all.push(new Uint8Array(1 << 24).fill(1))</script>",
}  # fmt: skip


@dataclass
class Shop:
    """The site as it runs."""

    url: str
    address: str
    port: int
    asked: list[str] = field(default_factory=list)
    """Paths and queries of all requests."""


def html(text: str, *, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, content_type="text/html")


@asynccontextmanager
async def shop() -> AsyncGenerator[Shop]:
    """The site, by this machine's name: a browser goes to `localhost` without its proxy."""

    async def page(request: web.Request) -> web.Response:
        made.asked.append(request.path_qs)
        text = PAGES.get(request.path)
        if text is None:
            return html(HEAD.format("Oops") + "No such page", status=404)
        return html(text)

    async def prices(_: web.Request) -> web.Response:
        await asyncio.sleep(0.2)
        return web.json_response([["Alpha", 12.5], ["Beta", 14]])

    async def file(_: web.Request) -> web.Response:
        disposition = {"Content-Disposition": 'attachment; filename="../../ev il.csv"'}
        return web.Response(text="a,b\n1,2\n", headers=disposition)

    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(3)
        return html(HEAD.format("Slow") + "at last")

    async def found(request: web.Request) -> web.Response:
        shown = "<br>".join(f"{name}={value}" for name, value in request.query.items())
        return html(HEAD.format("Found") + shown)

    app = web.Application()
    app.router.add_get("/prices.json", prices)
    app.router.add_get("/file.csv", file)
    app.router.add_get("/slow", slow)
    app.router.add_get("/found", found)
    app.router.add_get("/{path:.*}", page)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    name = socket.gethostname()
    address = socket.gethostbyname(name)
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        made = Shop(f"http://{name}:{port}", address, port)
        await web.SockSite(runner, listener).start()
        yield made
        await runner.cleanup()
