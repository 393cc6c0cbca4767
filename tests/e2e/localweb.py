"""A small web on this machine, served from threads: sites with their troubles, and a SearXNG."""

import json
import re
import socket
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Served:
    """What a path gives."""

    body: str = ""
    kind: str = "text/html; charset=utf-8"
    status: int = 200
    delay_s: float = 0.0


@dataclass(eq=False)
class Site:
    """A site as it runs."""

    pages: Mapping[str, Served]
    url: str = ""
    address: str = ""
    port: int = 0
    asked: list[str] = field(default_factory=list[str])
    """Paths of all requests, with their queries."""
    at_once: int = 0
    most_at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str) -> Served:
        with self._lock:
            self.asked.append(path)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self._wait(self.find(path))
        finally:
            with self._lock:
                self.at_once -= 1

    def find(self, path: str) -> Served:
        """What a path, with its query, gives; 404 where it is none."""
        return self.pages.get(urlsplit(path).path, Served(status=404))

    def forget(self) -> None:
        """Forget what was asked so far."""
        with self._lock:
            self.asked.clear()
            self.most_at_once = self.at_once

    def _wait(self, served: Served) -> Served:
        time.sleep(served.delay_s)
        return served


@dataclass(frozen=True, slots=True)
class Found:
    """Something that a search can find."""

    title: str
    url: str
    content: str


@dataclass(eq=False)
class Searxng(Site):
    """Finds what has a word of the query in its title or text."""

    index: list[Found] = field(default_factory=list[Found])
    delay_s: float = 0.0

    @property
    def queries(self) -> list[str]:
        return [parse_qs(urlsplit(path).query)["q"][0] for path in self.asked]

    def find(self, path: str) -> Served:
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        if parts.path != "/search" or query.get("format") != ["json"]:
            return Served(status=403)
        words = set(re.findall(r"\w+", query["q"][0].lower()))
        hits = [
            {"title": each.title, "url": each.url, "content": each.content}
            for each in self.index
            if words & set(re.findall(r"\w+", f"{each.title} {each.content}".lower()))
        ]
        answer = json.dumps({"query": query["q"][0], "results": hits})
        return Served(answer, "application/json", delay_s=self.delay_s)


@contextmanager
def serving_site(site: Site, *, host: str = LOOPBACK) -> Generator[Site]:
    """Serve a site under a name or address of this machine until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served = site.answer(self.path)
            body = served.body.encode()
            try:
                self.send_response(served.status)
                self.send_header("Content-Type", served.kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:
                pass  # Whoever asked has gone.

        def log_message(self, *_: object) -> None:
            pass

    site.address = socket.gethostbyname(host)
    with ThreadingHTTPServer((site.address, 0), Handler) as server:
        server.daemon_threads = True
        site.port = server.server_address[1]
        site.url = f"http://{host}:{site.port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield site
        server.shutdown()


@contextmanager
def serving_search(index: Sequence[Found] = (), *, delay_s: float = 0.0) -> Generator[Searxng]:
    """A search backend that knows these pages."""
    backend = Searxng(pages={}, index=list(index), delay_s=delay_s)
    with serving_site(backend):
        yield backend


def search_settings(backend: Searxng) -> str:
    """The settings of a server that searches with it."""
    return f'[search]\nkind = "searxng"\nurl = "{backend.url}"\n'


def allowing(*networks: str) -> str:
    """The settings of a server whose guard lets users' URLs reach these private ranges."""
    return f"[network]\nallow = {json.dumps(networks)}\n"
