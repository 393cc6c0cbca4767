"""Files of all kinds as text, and files that are made to harm."""

import asyncio
import signal
import time
from pathlib import Path

import pytest
from tests.tools.website import ARTICLE, PRICES, SCRIPTED, TEASER, pdf

from openinteractions.tools.port import Page
from openinteractions.tools.web.extractor import Extractor
from openinteractions.tools.web.pages import MAX_CHARS, extract

URL = "https://shop.example/a/"


def read(data: str | bytes, mime_type: str = "text/html", charset: str | None = None):
    data = data.encode() if isinstance(data, str) else data
    return extract(data, mime_type=mime_type, charset=charset, url=URL)


def test_an_article_is_freed_from_what_surrounds_it():
    found = read(ARTICLE)
    assert found.title == "The news"
    assert "Section 3" not in found.text
    assert "track()" not in found.text
    assert "In paragraph 7 we learn that [the bridge](https://shop.example/x7)" in found.text
    assert found.message is None


def test_a_shop_page_loses_no_row_price_or_link():
    found = read(PRICES)
    assert "| Name | Price | Stock |\n|---|---|---|" in found.text
    for n in range(1, 30):
        row = f"| [Lamp {n}](https://shop.example/lamp/{n}) | {n}9.50 € | {n} left |"
        assert row in found.text
    for n in range(1, 20):
        assert f"Bulb {n} {n}.25 €" in found.text
    assert "Our lamps" in found.text
    assert "Imprint" not in found.text
    assert "Home" not in found.text


def test_an_article_keeps_the_prices_that_stand_beside_it():
    text = "".join(
        f"<p>In its {n}th year this lamp has been sold in {n + 7} countries, as everybody who "
        "follows what happens in the world of lamps will surely know.</p>"
        for n in range(12)
    )
    table = "".join(f"<tr><td>Shop {n}</td><td>{n}7.20 €</td></tr>" for n in range(12))
    found = read(
        f"<article><h1>A lamp</h1>{text}</article>"
        f"<div class='sidebar related'><table>{table}</table></div>"
    )
    assert "| Shop 11 | 117.20 € |" in found.text


def test_structure_becomes_markdown():
    found = read(
        "<h1>A</h1><ul><li>one<ul><li>two</ul><li>three</ul><dl><dt>RAM<dd>16 GB</dl>"
        "<pre>x = 1\n  y</pre><p hidden>no</p><p style='display: none'>no</p>"
        "<a href='/b c'>go</a><a href='javascript:x()'>bad</a><h3>B</h3>"
        "<table role=presentation><tr><td>lay</td><td>out</td></tr></table>"
    )
    lines = [line for line in found.text.splitlines() if line]
    assert lines == [
        "# A", "- one", "  - two", "- three", "RAM", ": 16 GB", "```", "x = 1", "  y", "```",
        "[go](https://shop.example/b%20c) bad", "### B", "lay", "out",
    ]  # fmt: skip


def test_cells_that_span_rows_stand_in_each_of_them():
    found = read(
        "<table><tr><th>Kind</th><th>Size</th><th>Price</th></tr>"
        "<tr><td rowspan=2>Lamp</td><td>S</td><td>5|6</td></tr><tr><td>L</td><td>9</td></tr>"
        "<tr><td colspan=2>Bulb</td><td>1</td></tr></table>"
    )
    assert found.text.splitlines() == [
        "| Kind | Size | Price |",
        "|---|---|---|",
        "| Lamp | S | 5\\|6 |",
        "| Lamp | L | 9 |",
        "| Bulb |  | 1 |",
    ]


def test_a_page_that_is_only_a_navigation_is_not_empty():
    assert "[Jobs](https://shop.example/j)" in read("<nav><a href=/j>Jobs</a></nav>").text


def test_a_page_that_needs_scripts_says_so_and_shows_its_data():
    found = read(SCRIPTED)
    assert "JavaScript" in found.message
    assert '"price":"79.90"' in found.text
    assert read("<p>Short, but whole.</p>").message is None


def test_a_teaser_before_a_paywall_is_known():
    assert read(TEASER).is_paid
    assert not read(TEASER.replace("false", "true")).is_paid
    # Who shows the whole text anyhow asks for nothing.
    whole = TEASER.replace("</p>", " and more of it" * 300 + "</p>")
    assert not read(whole).is_paid


ENCODED = {
    "header": ("Grüße €", "cp1252", "cp1252", ""),
    "meta": ("Привет", "koi8-r", None, "<meta charset=koi8-r>"),
    "meta-wins-nothing-over-header": ("Grüße", "utf-8", "utf-8", "<meta charset=koi8-r>"),
    "latin-is-windows": ("“quoted” €5", "cp1252", "iso-8859-1", ""),
    "bom": ("Grüße", "utf-16", None, ""),
    "nothing": ("Grüße aus Köln", "utf-8", None, ""),
    "wrong-header": ("Grüße aus Köln", "cp1252", "utf-8", ""),
    "cyrillic-unsaid": (
        "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 9,
        "cp1251",
        None,
        "",
    ),
    "damaged": ("Grüße aus Köln und Zürich über Füssen", "utf-8", None, ""),
    "unknown": ("Grüße", "utf-8", "x-nonsense", ""),
}


@pytest.mark.parametrize("case", ENCODED)
def test_text_is_decoded_as_it_was_meant(case):
    text, codec, charset, meta = ENCODED[case]
    page = f"<html><head>{meta}</head><body><p>{text}</p></body></html>".encode(codec)
    if case == "damaged":
        page = page.replace(b"aus", b"a\xffs")
        text = text.replace("aus", "a\ufffds")
    assert read(page, charset=charset).text == text.strip()


PLAIN = {
    "json": ('{"a": [1, 2]}', "application/json"),
    "problem": ('{"a": 1}', "application/problem+json"),
    "csv": ("name;price\nlamp;5", "text/csv"),
    "feed": ("<rss><item>x</item></rss>", "application/rss+xml"),
    "markdown": ("# A", "text/markdown"),
    "untyped": ("just words", ""),
}


@pytest.mark.parametrize("case", PLAIN)
def test_other_text_stays_as_it_is(case):
    text, kind = PLAIN[case]
    assert read(text, kind).text == text


def test_html_is_known_by_its_looks_where_nobody_says_so():
    assert read("<!doctype html><p>Hi", "application/octet-stream").text == "Hi"
    assert read("<p>Hi", "text/plain").text == "<p>Hi"


def test_what_is_no_text_is_said_to_be_none():
    image = read(b"\x89PNG\r\n\x1a\n\0\0", "image/png")
    assert (image.text, image.is_readable) == ("", True)
    assert image.message == "This is an image (image/png, 10 bytes): it has no text."
    for data, kind in ((b"PK\x03\x04\0\0", "application/zip"), (b"\0\1\2", "text/plain")):
        found = read(data, kind)
        assert (found.text, found.is_readable) == ("", False)
        assert f"{len(data)} bytes" in found.message


def test_a_pdf_is_read_page_by_page():
    found = read(pdf("Total 1234 EUR", "The end"), "application/octet-stream")
    assert found.text == "[Page 1 of 2]\nTotal 1234 EUR\n\n[Page 2 of 2]\nThe end"
    assert found.title == "Report"
    assert found.message is None


def test_a_pdf_without_text_or_sense_says_so():
    assert "scanned" in read(pdf(""), "application/pdf").message
    broken = read(b"%PDF-1.7\nnonsense", "application/pdf")
    assert (broken.text, broken.is_readable) == ("", False)
    assert "broken" in broken.message


HOSTILE = {
    "tags": "<" * 5_000_000,
    "deep": "<div>" * 200_000 + "treasure" + "</div>" * 200_000,
    "tables": "<table><tr><td>" * 50_000 + "x",
    "spans": "<table>" + "<tr><td rowspan=9999 colspan=9999>x</td><td>1</td></tr>" * 40_000,
    "consent": "<div class=cookie>" * 100 + "<div class=cookie>x</div>" * 100_000,
    "attributes": "<p " + "a=1 " * 500_000 + ">x</p>",
    "long": "<p>" + "word 5 and many more words for a paragraph. " * 400_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_pages_made_to_be_slow_are_not(case):
    start = time.monotonic()
    found = read(HOSTILE[case])
    assert len(found.text) <= MAX_CHARS
    # Some two seconds, on a machine that has other things to do.
    assert time.monotonic() - start < 90
    if case == "deep":
        assert found.text == "treasure"
    if case == "long":
        assert "first 2000000 characters" in found.message


@pytest.fixture
def reader():
    extractor = Extractor(processes=1, deadline_s=120)
    yield extractor
    extractor.close()


def page(data: bytes, mime_type: str = "text/html") -> Page:
    return Page(url=URL, mime_type=mime_type, data=data)


async def test_pages_are_read_in_a_process_that_is_kept(reader):
    assert (await reader.extract(page(b"<p>One"))).text == "One"
    (first,) = reader._all
    assert (await reader.extract(page(b"<p>Two"))).text == "Two"
    assert (await reader.extract(page(pdf("Three"), "application/pdf"))).text.endswith("Three")
    assert set(reader._all) == {first}


async def test_the_process_has_no_environment_of_ours(reader):
    await reader.extract(page(b"<p>One"))
    (child,) = reader._all
    environment = Path(f"/proc/{child._process.pid}/environ")
    assert b"PATH" not in await asyncio.to_thread(environment.read_bytes)


async def test_a_process_that_dies_is_replaced(reader):
    await reader.extract(page(b"<p>One"))
    (child,) = reader._all
    child._process.kill()
    child._process.wait()
    assert (await reader.extract(page(b"<p>Two"))).text == "Two"


async def test_a_page_that_takes_too_long_is_given_up():
    extractor = Extractor(processes=1, deadline_s=0.05)
    try:
        # Starting alone takes longer.
        found = await extractor.extract(page(b"<p>One"))
        assert (found.text, found.is_readable) == ("", False)
        assert "longer than" in found.message
        assert extractor._all == set()
    finally:
        extractor.close()


async def test_who_is_cancelled_keeps_no_process_from_others(reader):
    await reader.extract(page(b"<p>One"))
    (child,) = reader._all
    child._process.send_signal(signal.SIGSTOP)
    stuck, queued = (asyncio.ensure_future(reader.extract(page(b"<p>Two"))) for _ in range(2))
    await asyncio.sleep(0.2)
    stuck.cancel()
    queued.cancel()
    began = time.monotonic()
    assert (await reader.extract(page(b"<p>Three"))).text == "Three"
    assert time.monotonic() - began < 60
    assert stuck.cancelled()
    assert queued.cancelled()
    assert child not in reader._all
