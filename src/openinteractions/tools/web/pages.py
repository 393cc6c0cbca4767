"""What a fetched file says, as text for a model: HTML, PDF, and text of all kinds.

It is somebody else's, and may be made to harm: this runs in a process that may die of it (see
`extractor`), and everything in here is bounded as well.
"""

import io
import re
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import orjson
import pypdf
import trafilatura
from pypdf.errors import PyPdfError
from trafilatura.utils import detect_encoding

from openinteractions.tools.web.extract import Extract
from openinteractions.tools.web.markdown import Element, flat, markdown, parsed

MAX_CHARS = 2_000_000
"""Longest text of one page that is kept, in characters."""
MAX_HTML_CHARS = 6_000_000
"""More of a page is not parsed."""

_ARTICLE_S = 4.0
_PDF_S = 10.0
_MAX_PDF_PAGES = 500
_SAMPLE_BYTES = 64 * 1024
_ASCII = 0x7F
_META_CHARSET = re.compile(
    rb"<meta[^<>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE
)
_XML_CHARSET = re.compile(
    rb"^\s{0,100}<\?xml[^<>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9_.:-]{1,40})"
)
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_HTML = re.compile(
    r"\s{0,1000}(?:<!--[^>]{0,1000}-->\s{0,100})?<(?:!doctype\s+html|html|head|body)\b",
    re.IGNORECASE,
)
_TEXTUAL = re.compile(
    r"text/.*|application/(?:.*\+)?(?:json|xml|yaml|x-yaml|toml|javascript|x-javascript|ndjson|"
    r"jsonl|x-ndjson|csv|sql|x-sh|rtf)"
)
_TAG = re.compile(r"<[^<>]*>")
_NUMBER = re.compile(r"\d[\d.,]*")
_PAID = re.compile(r"[\"']isAccessibleForFree[\"']\s{0,20}:\s{0,20}[\"']?false", re.IGNORECASE)

_THIN = 200
"""Characters below which a page with scripts has probably not said yet what it will."""
_TEASER = 2500
_PROSE_LINE = 100
_LONGEST_TITLE = 300
_MAX_STRUCTURED = 20_000

_NEEDS_SCRIPTS = (
    "The page seems to be built by JavaScript, which does not run here: there may be more on it. "
    "Open it with the browser tool if you have one."
)


class _TooSlow(BaseException):
    """Not an `Exception`, so that no library takes it for an error of its own."""


def extract(data: bytes, *, mime_type: str, charset: str | None, url: str) -> Extract:
    """Read a file.

    Args:
        data: What came.
        mime_type: What the server said that it is, in lower case; empty if it said nothing.
        charset: What the server said that it is encoded in.
        url: Where it came from; links are made absolute by it.
    """
    if data.startswith(b"%PDF-") or mime_type == "application/pdf":
        return _pdf(data)
    if mime_type.startswith(("image/", "audio/", "video/")) and mime_type != _SVG:
        return _medium(mime_type, len(data))
    if _is_binary(data, charset):
        return _binary(mime_type, len(data))
    text = _decoded(data, charset)
    if "html" in mime_type or (mime_type in _VAGUE and _HTML.match(text)):
        return _html(text, url)
    is_text = mime_type in _VAGUE or mime_type == _SVG or _TEXTUAL.fullmatch(mime_type)
    return _plain(text) if is_text else _binary(mime_type, len(data))


_SVG = "image/svg+xml"
_VAGUE = frozenset({"", "application/octet-stream", "binary/octet-stream", "text/plain"})


def _medium(mime_type: str, size: int) -> Extract:
    what = "an image" if mime_type.startswith("image/") else "a recording"
    return Extract(message=f"This is {what} ({mime_type}, {size} bytes): it has no text.")


def _is_binary(data: bytes, charset: str | None) -> bool:
    if b"\0" not in data[:_SAMPLE_BYTES] or _is_wide(charset):
        return False
    return not any(data.startswith(bom) for bom, _ in _BOMS)


def _binary(mime_type: str, size: int) -> Extract:
    shown = mime_type or "unknown type"
    return Extract(
        message=f"This is a file of bytes ({shown}, {size} bytes), which cannot be read as text. "
        "Download it by code if you can run any.",
        is_readable=False,
    )


def _plain(text: str) -> Extract:
    message = _cut_message() if len(text) > MAX_CHARS else None
    return Extract(_clean(text[:MAX_CHARS]), message=message)


def _cut_message() -> str:
    return f"Only the first {MAX_CHARS} characters were kept."


def _clean(text: str) -> str:
    """Text without what JSON, databases and models stumble over."""
    return text.replace("\0", "").replace("\r\n", "\n").encode("utf-8", "replace").decode()


# Character sets.


def _is_wide(charset: str | None) -> bool:
    return (charset or "").lower().startswith(("utf-16", "utf16", "utf-32", "ucs"))


def _decoded(data: bytes, charset: str | None) -> str:
    """Bytes as text, by what they say, the server says, or they look like."""
    found = next((name for bom, name in _BOMS if data.startswith(bom)), None)
    head = data[:4096]
    meta = _META_CHARSET.search(head) or _XML_CHARSET.search(head)
    declared = meta[1].decode("ascii") if meta else None
    if declared is not None and _is_wide(declared):
        declared = None  # It could not have been read.
    for name in (found, charset, declared, "utf-8"):
        if name is None:
            continue
        try:
            return data.decode(_known(name))
        except (LookupError, UnicodeError):
            continue
    return _guessed(data)


def _known(name: str) -> str:
    """A label as browsers understand it: Latin 1 is Windows 1252 to them."""
    name = name.strip().strip("\"'").lower()
    return "cp1252" if name in ("iso-8859-1", "latin1", "latin-1", "us-ascii", "ascii") else name


def _guessed(data: bytes) -> str:
    """Text that is not what it is said to be, and no clean UTF-8."""
    text = data.decode("utf-8", "replace")
    lost = text.count("\ufffd")
    foreign = sum(1 for byte in data[:_SAMPLE_BYTES] if byte > _ASCII)
    if lost * 3 < sum(1 for char in text[:_SAMPLE_BYTES] if ord(char) > _ASCII):
        return text
    # A few letters say nothing about a script, but that there are few says that it is Latin.
    is_latin = foreign * 5 < len(data[:_SAMPLE_BYTES])
    for name in () if is_latin else detect_encoding(data[:_SAMPLE_BYTES]):
        try:
            return data.decode(name, "replace")
        except LookupError:
            continue
    return data.decode("cp1252", "replace")


# HTML.


def _html(text: str, url: str) -> Extract:
    is_cut = len(text) > MAX_HTML_CHARS
    text = text[:MAX_HTML_CHARS]
    tree = parsed(text)
    if tree is None:
        return Extract(message="The page is empty.")
    base = tree.find(".//base")
    seen = markdown(tree, url if base is None else base.get("href", "") or url)
    has_scripts = next(tree.iter("script"), None) is not None
    body = _article(text, url, seen) or seen
    if not body and not has_scripts:
        # What is nested too deeply for a tree has words all the same.
        body = " ".join(_TAG.sub(" ", text).split())
    structured = _structured(tree) if len(body) < _TEASER else ""
    remarks = [_cut_message()] if is_cut or len(body) > MAX_CHARS else []
    if has_scripts and len(seen) < _THIN:
        remarks.append(_NEEDS_SCRIPTS)
    is_paid = len(body) < _TEASER and _PAID.search(text) is not None
    return Extract(
        _clean(f"{body}\n\n{structured}".strip()[:MAX_CHARS]),
        title=_title(tree),
        message=" ".join(remarks) or None,
        is_paid=is_paid,
    )


def _title(tree: Element) -> str | None:
    for each in tree.iter("title", "h1"):
        if text := _clean(flat(each))[:_LONGEST_TITLE]:
            return text
    return None


def _article(text: str, url: str, seen: str) -> str | None:
    """The article alone, where the page is one; None where that would lose what matters.

    Args:
        text: The page's source.
        url: Its address.
        seen: All that is visible on it.
    """
    lines = seen.splitlines()
    prose = sum(len(line) for line in lines if len(line) >= _PROSE_LINE and line[0] != "|")
    if prose * 2 < len(seen):
        return None
    try:
        with _at_most(_ARTICLE_S):
            found = trafilatura.extract(
                text,
                url=url,
                output_format="markdown",
                include_links=True,
                include_tables=True,
                include_comments=False,
                favor_recall=True,
            )
    except (_TooSlow, Exception):  # noqa: BLE001 - whatever it stumbles over, there is the other text
        return None
    if not found or len(found) * 2 < prose:
        return None
    wanted = set(_NUMBER.findall("\n".join(line for line in lines if line.startswith("|"))))
    kept = set(_NUMBER.findall(found))
    return None if len(wanted - kept) * 10 > len(wanted) else found


def _structured(tree: Element) -> str:
    """Data that a page has for machines, such as a product's price; often without scripts."""
    parts: list[str] = []
    size = 0
    for script in tree.iter("script"):
        if script.get("type", "").strip().lower() != "application/ld+json":
            continue
        try:
            part = orjson.dumps(orjson.loads("".join(script.itertext()))).decode()
        except orjson.JSONDecodeError:
            continue
        size += len(part)
        if size > _MAX_STRUCTURED:
            break
        parts.append(part)
    if not parts:
        return ""
    return "Data of the page (JSON-LD):\n```json\n" + "\n".join(parts) + "\n```"


@contextmanager
def _at_most(seconds: float) -> Generator[None]:
    """Break off what takes longer, where the process can: in its main thread, on Unix."""

    def ring(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# PDF.


def _pdf(data: bytes) -> Extract:
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            return Extract(message="The PDF can only be read with a password.", is_readable=False)
        count = len(reader.pages)
        title = reader.metadata.title if reader.metadata else None
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Extract(message=f"The PDF is broken ({type(error).__name__}).", is_readable=False)
    texts, broken = _pdf_pages(reader, count)
    remarks: list[str] = []
    if len(texts) < count:
        remarks.append(f"Only the first {len(texts)} of its {count} pages were read.")
    if broken:
        remarks.append(f"Pages that could not be read: {', '.join(map(str, broken[:20]))}.")
    if not any(text.strip() for text in texts):
        remarks.append("The PDF has no text: its pages may be scanned images.")
        texts = []
    body = "\n\n".join(
        f"[Page {number} of {count}]\n{text.strip()}" for number, text in enumerate(texts, 1)
    )
    named = _clean(str(title).strip())[:_LONGEST_TITLE] if title else None
    return Extract(_clean(body[:MAX_CHARS]), title=named, message=" ".join(remarks) or None)


def _pdf_pages(reader: pypdf.PdfReader, count: int) -> tuple[list[str], list[int]]:
    """The texts of the first pages, as many as time allows; and which could not be read."""
    texts: list[str] = []
    broken: list[int] = []
    end = time.monotonic() + _PDF_S
    size = 0
    for index in range(min(count, _MAX_PDF_PAGES)):
        left = end - time.monotonic()
        if left <= 0 or size > MAX_CHARS:
            break
        try:
            with _at_most(left):
                text = reader.pages[index].extract_text()
        except _TooSlow:
            break
        except Exception:  # noqa: BLE001 - one page's faults are many, and the others may be fine
            text = ""
            broken.append(index + 1)
        texts.append(text)
        size += len(text)
    return texts, broken
