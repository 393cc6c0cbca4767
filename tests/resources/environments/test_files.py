"""Files of environments over HTTP: listings, downloads and the three ways to upload."""

import asyncio
import io
import tarfile
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from tests import house
from tests.broker.test_life import eventually
from tests.house import KEY
from tests.resources.environments.stand import Stand, standing

from openinteractions.errors import Invalid
from openinteractions.resources.environment_files import service, uploads
from openinteractions.resources.environment_files.service import OutOfRange, Part, part_of
from openinteractions.sandbox.port import Entry

CHUNK = 8 * 2**20
BIG = bytes(range(256)) * (CHUNK // 256) + b"!"


@pytest.fixture
async def stand(database_url: str, tmp_path: Path) -> AsyncGenerator[Stand]:
    limits = {"max_body_bytes": 65536, "body_timeout": 0.5}
    async with standing(database_url, tmp_path, limits=limits) as opened:
        yield opened


@pytest.fixture
async def name(stand: Stand) -> str:
    return await stand.made()


def archive(**files: bytes) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path.replace("__", "/"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return held.getvalue()


def members(raw: bytes) -> dict[str, bytes | None]:
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        found = [(one, tar.extractfile(one)) for one in tar.getmembers()]
        return {one.name: None if file is None else file.read() for one, file in found}


async def listed(stand: Stand, name: str, path: str = "", query: str = "") -> Any:
    status, answer = await stand.server.call("GET", f"environments/{name}/files{path}{query}")
    assert status == 200, answer
    return answer


async def error(stand: Stand, method: str, url: str, **how: Any) -> tuple[int, str]:
    status, body, _ = await stand.call(method, url, **how)
    return status, orjson.loads(body)["error"]["message"]


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


# ---- listings


@pytest.mark.parametrize("path", ["", "/", "//", "/.", "/./"])
async def test_every_spelling_of_the_root_lists_the_three_folders(
    stand: Stand, name: str, path: str
):
    url = f"/v1/environments/{name}/files{path}"
    status, body, _ = await stand.call("GET", url)
    assert status == 200, body
    entries = orjson.loads(body)["files"]
    assert [(one["path"], one["type"]) for one in entries] == [
        (".agents", "DIRECTORY"), ("home", "DIRECTORY"), ("workspace", "DIRECTORY"),
    ]  # fmt: skip


async def test_an_entry_has_the_contracts_shape(stand: Stand, name: str):
    await stand.put(name, "workspace/src/main.py", b"print()\n")
    (file,) = (await listed(stand, name, "/workspace/src"))["files"]
    assert file.keys() == {
        "name", "path", "type", "size_bytes", "mime_type", "created", "modified",
    }  # fmt: skip
    assert (file["name"], file["path"], file["type"]) == (
        "main.py", "workspace/src/main.py", "FILE",
    )  # fmt: skip
    assert file["size_bytes"] == "8"
    assert file["mime_type"].startswith("text/x-python")
    for moment in ("created", "modified"):
        assert file[moment].endswith("Z")
        assert datetime.fromisoformat(file[moment]).tzinfo is not None
    assert await listed(stand, name, "/workspace/src/main.py") == {"files": [file]}
    (folder,) = (await listed(stand, name, "/workspace"))["files"]
    assert "size_bytes" not in folder
    assert "mime_type" not in folder


@pytest.mark.parametrize("recursive", [False, True])
async def test_pages_go_through_a_folder_in_order(stand: Stand, name: str, *, recursive: bool):
    for path in ("a", "b/x", "b/y", "c", "d e", "é"):
        await stand.put(name, f"workspace/{quote(path)}", b"")
    seen: list[str] = []
    query, base = "", f"?page_size=2&recursive={str(recursive).lower()}"
    while True:
        page = await listed(stand, name, "/workspace", base + query)
        assert len(page["files"]) <= 2
        seen += [one["path"].removeprefix("workspace/") for one in page["files"]]
        if "next_page_token" not in page:
            break
        query = f"&page_token={page['next_page_token']}"
    deep = ["b/x", "b/y"] if recursive else []
    assert seen == ["a", "b", *deep, "c", "d e", "é"]


async def test_a_token_is_good_for_its_own_listing_only(stand: Stand, name: str):
    for path in ("a", "b", "c"):
        await stand.put(name, f"workspace/{path}", b"")
    token = (await listed(stand, name, "/workspace", "?page_size=1"))["next_page_token"]
    base = f"/v1/environments/{name}/files"
    for query in (
        f"/workspace?page_token={token}&recursive=true",
        f"?page_token={token}",
        "/workspace?page_token=AAAA",
        "/workspace?page_token=%C3%A9",
    ):
        status, message = await error(stand, "GET", base + query)
        assert (status, "page_token" in message) == (400, True)


@pytest.mark.parametrize("query", ["", "?alt=media"])
async def test_what_is_missing_is_named(stand: Stand, name: str, query: str):
    url = f"/v1beta/environments/{name}/files/workspace/no%20such.txt{query}"
    assert await error(stand, "GET", url) == (
        404,
        f"Path 'workspace/no such.txt' not found in environment '{name}'.",
    )


@pytest.mark.parametrize("query", ["", "?alt=media"])
@pytest.mark.parametrize(
    "path", ["%2e%2e/x", "workspace/%2e%2e/%2e%2e/etc/passwd", "..%2fx", "a%00b", "x" * 300]
)
async def test_paths_that_cannot_be_are_refused(stand: Stand, name: str, path: str, query: str):
    status, message = await error(stand, "GET", f"/v1/environments/{name}/files/{path}{query}")
    assert (status, bool(message)) == (400, True)


@pytest.mark.parametrize(
    "path", ["a b.txt", "ü/é.txt", "100%.txt", "files/files/x", "q?#&.txt", "a+b", "'\"", "a:b"]
)
async def test_any_name_goes_there_and_back(stand: Stand, name: str, path: str):
    await stand.put(name, f"workspace/{quote(path)}", path.encode())
    assert await stand.paths(name) == [f"workspace/{path}"]
    assert await stand.read(name, f"workspace/{quote(path)}") == path.encode()
    assert await stand.read(f"environments/{name}", f"workspace/{quote(path, safe='')}")


async def test_names_that_are_no_text_are_refused(stand: Stand, name: str):
    """They would be taken for another file's: all such bytes become the same character."""
    await stand.put(name, "workspace/%EF%BF%BD", b"mine")
    for start in ("/upload/v1beta", "/v1beta"):
        method = "PUT" if "upload" in start else "GET"
        url = f"{start}/environments/{name}/files/workspace/%ff"
        for query in ("?overwrite=true", "?uploadType=resumable", "?alt=media"):
            status, message = await error(stand, method, url + query)
            assert (status, "UTF-8" in message) == (400, True)
    assert await stand.read(name, "workspace/%EF%BF%BD") == b"mine"


# ---- downloads


async def test_a_file_is_downloaded_as_what_it_is(stand: Stand, name: str):
    await stand.put(name, "workspace/page.html", b"<script>")
    status, body, headers = await stand.call(
        "GET", f"/v1/environments/{name}/files/workspace/page.html?alt=media"
    )
    assert (status, body) == (200, b"<script>")
    assert headers["Content-Type"].startswith("text/html")
    assert headers["Content-Length"] == "8"
    # It is no page of this server.
    assert headers["Content-Security-Policy"] == "sandbox"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Disposition"] == 'attachment; filename="page.html"'


@pytest.mark.parametrize(
    ("wanted", "status", "body", "shown"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=5-99", 206, b"56789", "bytes 5-9/10"),
        ("bytes=0-1,4-5", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
        ("bytes=4-2", 200, b"0123456789", None),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
    ],
)
async def test_parts_of_a_file(
    stand: Stand, name: str, wanted: str, status: int, body: bytes | None, shown: str | None
):
    await stand.put(name, "workspace/x", b"0123456789")
    got, data, headers = await stand.call(
        "GET", f"/v1/environments/{name}/files/workspace/x?alt=media", headers={"Range": wanted}
    )
    assert got == status, data
    assert headers.get("Content-Range") == shown
    assert body is None or data == body


def test_an_empty_file_has_no_parts():
    assert part_of("bytes=0-", 1) == Part(0, 1)
    for wanted in ("bytes=0-", "bytes=-1", "bytes=0-0"):
        with pytest.raises(OutOfRange):
            part_of(wanted, 0)


async def test_a_folder_is_downloaded_as_an_archive(stand: Stand, name: str):
    await stand.put(name, "workspace/a.txt", b"A")
    await stand.put(name, "workspace/deep/b.txt", b"B")
    url = f"/v1/environments/{name}/files/workspace?alt=media"
    _, flat, headers = await stand.call("GET", url)
    assert headers["Content-Type"] == "application/x-tar"
    assert headers["Content-Disposition"] == 'attachment; filename="workspace.tar"'
    assert {k.split("/")[-1]: v for k, v in members(flat).items() if v is not None} == {
        "a.txt": b"A"
    }
    _, deep, _ = await stand.call("GET", url + "&recursive=true")
    assert sorted(v for v in members(deep).values() if v is not None) == [b"A", b"B"]
    _, root, _ = await stand.call("GET", f"/v1/files/environment-{name}:download?alt=media")
    names = members(root)
    assert names["workspace/deep/b.txt"] == b"B"
    assert (await stand.call("GET", f"/v1/files/environment-{name}:download"))[0] == 400


async def test_an_archive_comes_back_as_it_was(stand: Stand, name: str):
    await stand.put(name, "workspace/a.txt", b"A")
    await stand.put(name, "workspace/deep/b.txt", b"B")
    url = f"/v1/environments/{name}/files/workspace?alt=media&recursive=true"
    _, tar, _ = await stand.call("GET", url)
    other = await stand.made()
    await stand.put(other, "workspace", tar, "?extract=true")
    assert [path.rpartition("/")[2] for path in await stand.paths(other)] == ["a.txt", "b.txt"]


async def test_a_large_file_is_never_held_whole(stand: Stand, name: str):
    """Of 64 MiB neither way adds more than a few to what the process has."""
    block = b"x" * 65536
    count = 1024

    async def many() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield block

    tracemalloc.start()
    try:
        await stand.put(name, "workspace/big", many())
        size = 0
        url = f"/v1/environments/{name}/files/workspace/big?alt=media"
        async with stand.server.http.get(url, headers={"x-goog-api-key": KEY}) as response:
            assert response.headers["Content-Length"] == str(count * len(block))
            async for piece in response.content.iter_chunked(65536):
                size += len(piece)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == count * len(block)
    assert peak < 24 * 2**20, peak


# ---- uploads at once


async def test_an_upload_says_what_it_wrote(stand: Stand, name: str):
    answer = orjson.loads(await stand.put(name, "workspace/new/a.txt", b"hello"))
    assert [(one["path"], one["size_bytes"]) for one in answer["files"]] == [
        ("workspace/new/a.txt", "5")
    ]
    assert await stand.read(name, "workspace/new/a.txt") == b"hello"
    # The three folders are where the sandbox has them.
    assert await stand.put(name, "/home/agent/x", b"h")
    assert await stand.read(name, "home/x") == b"h"
    status, row = await stand.server.call("GET", f"environments/{name}")
    assert (status, row["file_count"], row["size_bytes"]) == (200, "2", "6")


async def test_what_is_there_is_not_replaced_unless_asked_for(stand: Stand, name: str):
    await stand.put(name, "workspace/a", b"old")
    url = f"/upload/v1/environments/{name}/files/workspace/a"
    status, body, _ = await stand.call("PUT", url, b"new")
    answer = orjson.loads(body)["error"]
    assert (status, answer["code"], answer["status"]) == (409, "aborted", "ABORTED")
    assert await stand.read(name, "workspace/a") == b"old"
    await stand.put(name, "workspace/a", b"new", "?overwrite=true")
    assert await stand.read(name, "workspace/a") == b"new"


@pytest.mark.parametrize("query", ["?overwrite=maybe", "?extract=2", "?uploadType=multipart"])
async def test_flags_are_checked(stand: Stand, name: str, query: str):
    url = f"/upload/v1/environments/{name}/files/workspace/a{query}"
    status, message = await error(stand, "PUT", url, data=b"x")
    assert (status, query[1:].partition("=")[0] in message) == (400, True)


async def test_archives_are_unpacked_whole_or_not_at_all(stand: Stand, name: str):
    data = archive(a=b"1", sub__b=b"2")
    answer = orjson.loads(await stand.put(name, "workspace/in", data, "?extract=true"))
    assert {"workspace/in/a", "workspace/in/sub/b"} <= {one["path"] for one in answer["files"]}
    url = f"/upload/v1/environments/{name}/files/workspace/in?extract=true"
    again = archive(new=b"3", a=b"4")
    assert (await error(stand, "PUT", url, data=again))[0] == 409
    assert await stand.paths(name) == ["workspace/in/a", "workspace/in/sub/b"]
    await stand.put(name, "workspace/in", again, "?extract=true&overwrite=true")
    assert await stand.read(name, "workspace/in/a") == b"4"
    for bad in (b"PK\x03\x04 a zip", b"nothing", archive(**{"..__up": b"x"})):
        assert (await error(stand, "PUT", url + "&overwrite=true", data=bad))[0] == 400


async def test_a_client_that_stops_sending_leaves_nothing(stand: Stand, name: str):
    async def stalled() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        await asyncio.sleep(5)

    url = f"/upload/v1/environments/{name}/files/workspace/a"
    status, message = await error(stand, "PUT", url, data=stalled())
    assert (status, "paused" in message) == (400, True)
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.server.http._base_url.port)
    writer.write(
        f"PUT {url} HTTP/1.1\r\nHost: x\r\nx-goog-api-key: {KEY}\r\n"
        "Content-Length: 1000\r\n\r\nhalf".encode()
    )
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await writer.wait_closed()
    del reader
    await asyncio.sleep(0.1)
    assert await stand.paths(name) == []


async def test_what_nobody_waits_for_is_not_unpacked(stand: Stand, name: str):
    """An archive may take minutes: its client's end is its end, and nothing of it is left."""
    many = archive(**{f"{number}": b"" for number in range(50_000)})
    url = f"/upload/v1/environments/{name}/files/workspace?extract=true"
    sending = asyncio.ensure_future(stand.call("PUT", url, many))
    staging = stand.folder / "environments" / name / "fs" / "staging"
    await eventually(
        lambda: any(path.is_dir() and any(path.iterdir()) for path in staging.glob("*"))
    )
    sending.cancel()
    await eventually(lambda: not any(staging.iterdir()))
    assert await stand.paths(name) == []


async def test_the_limit_of_json_bodies_is_not_that_of_files(stand: Stand, name: str):
    await stand.put(name, "workspace/a", pieces(*[b"x" * 50_000] * 4))
    assert len(await stand.read(name, "workspace/a")) == 200_000
    url = f"/upload/v1/environments/{name}/files/workspace/b"
    headers = {"Content-Length": str(2**31 + 1)}
    status, message = await error(stand, "PUT", url, data=b"", headers=headers)
    assert (status, "larger than" in message) == (413, True)


# ---- uploads in the protocol of SDKs


class Goog:
    """An upload as the SDK makes it, step by step."""

    def __init__(self, stand: Stand, url: str, total: int | None) -> None:
        self.stand, self.url, self.total = stand, url, total
        self.where = ""

    async def start(self) -> None:
        headers = {
            "X-Goog-Upload-Protocol": "resumable",
            "X-Goog-Upload-Command": "start",
            "X-Goog-Upload-Header-Content-Type": "application/octet-stream",
        }
        if self.total is not None:
            headers["X-Goog-Upload-Header-Content-Length"] = str(self.total)
        status, body, got = await self.stand.call("PUT", self.url, b"", headers=headers)
        assert status == 200, body
        where = got["X-Goog-Upload-URL"]
        assert where.startswith("http://127.0.0.1:")
        self.where = "/" + where.split("/", 3)[3]

    async def send(self, command: str, offset: int | None, data: bytes) -> tuple[int, str, Any]:
        """Status, upload status, answer; without a key, and with the SDK's content type."""
        headers = {"X-Goog-Upload-Command": command, "Content-Type": "application/json"}
        if offset is not None:
            headers["X-Goog-Upload-Offset"] = str(offset)
        held = io.BytesIO(data) if data else b""
        status, body, got = await self.stand.call(
            "POST", self.where, held, headers=headers, key=None
        )
        return status, got["X-Goog-Upload-Status"], orjson.loads(body or b"null")


async def begun(
    stand: Stand, name: str, total: int | None, path: str = "workspace/a", query: str = ""
) -> Goog:
    upload = Goog(stand, f"/upload/v1/environments/{name}/files/{path}{query}", total)
    await upload.start()
    return upload


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
async def test_sizes_around_a_chunk(stand: Stand, name: str, size: int):
    upload = await begun(stand, name, size)
    offset = 0
    while True:
        chunk = BIG[offset : min(size, offset + CHUNK)]
        is_last = offset + len(chunk) >= size
        status, state, answer = await upload.send(
            "upload, finalize" if is_last else "upload", offset, chunk
        )
        assert (status, state) == (200, "final" if is_last else "active"), answer
        offset += len(chunk)
        if is_last:
            break
    assert answer["files"][0]["size_bytes"] == str(size)
    assert await stand.read(name, "workspace/a") == BIG[:size]


async def test_a_chunk_that_comes_again_is_accepted(stand: Stand, name: str):
    upload = await begun(stand, name, 9)
    for _ in range(2):
        assert (await upload.send("upload", 0, b"abc"))[:2] == (200, "active")
    for _ in range(2):
        assert (await upload.send("upload", 3, b"def"))[:2] == (200, "active")
    assert (await upload.send("query", None, b""))[:2] == (200, "active")
    first = await upload.send("upload, finalize", 6, b"ghi")
    assert first[:2] == (200, "final")
    # The last one too: its answer may have been lost.
    assert await upload.send("upload, finalize", 6, b"ghi") == first
    assert await stand.read(name, "workspace/a") == b"abcdefghi"


@pytest.mark.parametrize(
    ("command", "offset", "data"),
    [
        ("upload", 5, b"x"),
        ("upload, finalize", 1, b"x"),
        ("upload, finalize", 0, b"short"),
        ("upload", 0, b"x" * 10),
        ("upload", 10, b""),
        ("upload", None, b"x"),
        ("start", 0, b""),
        ("explode", 0, b""),
        ("", 0, b""),
    ],
)
async def test_errors_have_the_header_that_ends_the_sdks_patience(
    stand: Stand, name: str, command: str, offset: int | None, data: bytes
):
    upload = await begun(stand, name, 9)
    status, state, answer = await upload.send(command, offset, data)
    assert status in {400, 413}, answer
    assert state == "final"
    assert answer["error"]["message"]
    assert await stand.paths(name) == []


async def test_a_wrong_offset_does_not_spoil_the_upload(stand: Stand, name: str):
    upload = await begun(stand, name, 6)
    assert (await upload.send("upload", 0, b"abc"))[0] == 200
    assert (await upload.send("upload", 4, b"x"))[0] == 400
    assert (await upload.send("upload, finalize", 3, b"def"))[0] == 200
    assert await stand.read(name, "workspace/a") == b"abcdef"


async def test_a_conflict_shows_before_all_is_sent(stand: Stand, name: str):
    await stand.put(name, "workspace/a", b"old")
    upload = await begun(stand, name, 6)
    for command, offset, data in (("upload", 0, b"abc"), ("upload, finalize", 0, b"abcdef")):
        status, state, answer = await upload.send(command, offset, data)
        assert (status, state, answer["error"]["code"]) == (409, "final", "aborted")
    assert await stand.read(name, "workspace/a") == b"old"
    upload = await begun(stand, name, 6, query="?overwrite=true")
    assert (await upload.send("upload, finalize", 0, b"abcdef"))[0] == 200
    assert await stand.read(name, "workspace/a") == b"abcdef"


async def test_flags_are_those_of_the_start(stand: Stand, name: str):
    data = archive(x=b"1")
    upload = await begun(stand, name, len(data), path="workspace/in", query="?extract=true")
    assert (await upload.send("upload, finalize", 0, data))[0] == 200
    assert await stand.paths(name) == ["workspace/in/x"]


async def test_an_upload_can_be_cancelled(stand: Stand, name: str):
    upload = await begun(stand, name, 6)
    await upload.send("upload", 0, b"abc")
    for command in ("cancel", "cancel", "query"):
        assert (await upload.send(command, None, b""))[:2] == (200, "cancelled")
    # Also with all of it again.
    for offset, data in ((3, b"def"), (0, b"abcdef")):
        assert (await upload.send("upload, finalize", offset, data))[:2] == (400, "final")
    assert await stand.paths(name) == []


async def test_any_process_says_again_what_an_upload_became(
    stand: Stand, name: str, database_url: str
):
    """Its URL goes to whatever replica: nothing of it is one process's memory."""
    upload = await begun(stand, name, 6)
    assert (await upload.send("upload", 0, b"abc"))[0] == 200
    first = await upload.send("upload, finalize", 3, b"def")
    assert first[:2] == (200, "final")
    assert await stand.read(name, "workspace/a") == b"abcdef"
    async with house.opened(database_url, None, role="api") as other:
        there = Goog(Stand(other, stand.disks, stand.folder), upload.url, 6)
        there.where = upload.where
        for command, offset, data in (
            ("upload, finalize", 3, b"def"),
            ("upload, finalize", 0, b"abcdef"),
            ("query", None, b""),
            ("cancel", None, b""),
        ):
            assert await there.send(command, offset, data) == first
    assert await stand.paths(name) == ["workspace/a"]


async def test_a_long_answer_is_given_again_too(stand: Stand, name: str):
    data = archive(**{f"{number:03}" + "x" * 90: b"" for number in range(300)})
    upload = await begun(stand, name, len(data), path="workspace/in", query="?extract=true")
    first = await upload.send("upload, finalize", 0, data)
    assert (first[:2], len(first[2]["files"])) == ((200, "final"), 300)
    assert await upload.send("upload, finalize", 0, data) == first


async def test_what_has_no_bytes_is_an_empty_file(stand: Stand, name: str):
    upload = await begun(stand, name, None, path="workspace/1")
    assert (await upload.send("finalize", None, b""))[:2] == (200, "final")
    where = await ranged(stand, name, {"X-Upload-Content-Length": "0"})
    headers = {"Content-Range": "bytes */0"}
    status, body, _ = await stand.call("PUT", where, b"", headers=headers, key=None)
    assert status == 200, body
    for path in ("1", "a"):
        assert await stand.read(name, f"workspace/{path}") == b""


async def test_a_line_feed_is_of_the_name(stand: Stand, name: str):
    await stand.put(name, "workspace/d.txt", b"old")
    url = f"/v1beta/environments/{name}/files/workspace/d.txt%0A?alt=media"
    assert (await stand.call("GET", url))[0] == 404
    for path in ("d.txt%0A", "new%0Aline"):
        await stand.put(name, f"workspace/{path}", b"new", "?overwrite=true")
        assert await stand.read(name, f"workspace/{path}") == b"new"
    assert await stand.read(name, "workspace/d.txt") == b"old"
    assert await stand.paths(name) == [
        "workspace/d.txt", "workspace/d.txt\n", "workspace/new\nline",
    ]  # fmt: skip


async def test_an_upload_ends_with_its_environment(stand: Stand, name: str):
    upload = await begun(stand, name, 6)
    assert (await stand.server.call("DELETE", f"environments/{name}"))[0] == 200
    status, state, _ = await upload.send("upload, finalize", 0, b"abcdef")
    assert (status, state) == (404, "final")


async def test_an_upload_lasts_a_day(stand: Stand, name: str, monkeypatch: pytest.MonkeyPatch):
    upload = await begun(stand, name, 3)
    now = uploads.time.time()
    monkeypatch.setattr(uploads.time, "time", lambda: now + 3600)
    assert (await upload.send("upload", 0, b"a"))[0] == 200
    monkeypatch.setattr(uploads.time, "time", lambda: now + 24 * 3600 + 1)
    status, state, answer = await upload.send("upload, finalize", 1, b"bc")
    assert (status, state, "expired" in answer["error"]["message"]) == (404, "final", True)


async def test_a_start_too_large_is_refused(stand: Stand, name: str):
    upload = Goog(stand, f"/upload/v1/environments/{name}/files/workspace/a", 2**31 + 1)
    with pytest.raises(AssertionError, match="2147483648"):
        await upload.start()


# ---- uploads with Content-Range


async def ranged(
    stand: Stand, name: str, headers: dict[str, str] | None = None, query: str = ""
) -> str:
    url = f"/upload/v1/environments/{name}/files/workspace/a?uploadType=resumable{query}"
    status, body, got = await stand.call("PUT", url, b"", headers=headers)
    assert status == 200, body
    return "/" + got["Location"].split("/", 3)[3]


async def test_a_file_in_ranges_without_a_key(stand: Stand, name: str):
    where = await ranged(stand, name, {"X-Upload-Content-Length": "6"})

    async def send(data: bytes, span: str) -> tuple[int, str | None, bytes]:
        status, body, got = await stand.call(
            "PUT", where, data, headers={"Content-Range": f"bytes {span}"}, key=None
        )
        return status, got.get("Range"), body

    assert (await send(b"", "*/6"))[:2] == (308, None)
    assert (await send(b"abc", "0-2/6"))[:2] == (308, "bytes=0-2")
    assert (await send(b"abc", "0-2/6"))[:2] == (308, "bytes=0-2")
    assert (await send(b"", "*/6"))[:2] == (308, "bytes=0-2")
    assert (await send(b"x", "4-4/6"))[0] == 400
    assert (await send(b"def", "3-5/7"))[0] == 400
    assert (await send(b"de", "3-5/6"))[0] == 400
    assert (await send(b"def", "3..5"))[0] == 400
    status, _, body = await send(b"def", "3-5/6")
    assert status == 200
    assert orjson.loads(body)["files"][0]["path"] == "workspace/a"
    assert await stand.read(name, "workspace/a") == b"abcdef"
    assert (await send(b"", "*/6"))[0] == 200


async def test_a_file_in_one_range_or_without(stand: Stand, name: str):
    where = await ranged(stand, name)
    assert (await stand.call("PUT", where, b"all", key=None))[0] == 200
    assert await stand.read(name, "workspace/a") == b"all"
    where = await ranged(stand, name, query="&overwrite=true")
    headers = {"Content-Range": "bytes 0-2/*"}
    assert (await stand.call("PUT", where, b"new", headers=headers, key=None))[0] == 308
    headers = {"Content-Range": "bytes */3"}
    assert (await stand.call("PUT", where, b"", headers=headers, key=None))[0] == 200
    assert await stand.read(name, "workspace/a") == b"new"


async def test_a_url_is_good_for_its_own_upload_only(stand: Stand, name: str):
    """Whatever path it is sent to, and not after a change."""
    where = await ranged(stand, name)
    path, _, token = where.partition("?")
    moved = path.replace("workspace/a", "workspace/b")
    assert (await stand.call("PUT", f"{moved}?{token}", b"x", key=None))[0] == 200
    assert await stand.paths(name) == ["workspace/a"]
    bad = f"{path}?{token[:-3]}AAA"
    assert (await stand.call("PUT", bad, b"x", key=None))[0] == 404
    assert (await stand.call("PUT", path, b"x", key=None))[0] == 401


# ---- entries


def test_times_that_cannot_be_shown_do_no_harm():
    entry = Entry(
        path="workspace/x", type="file", size_bytes=0, mime_type=None, created=1e30, modified=-1e30
    )
    shown = service.shown_entry(entry)
    assert shown["created"].startswith("1970")
    assert shown["mime_type"] == "application/octet-stream"


def test_links_that_lead_nowhere_are_told_apart():
    entry = Entry(
        path="home/l", type="symlink", size_bytes=3, mime_type=None, created=0, modified=0
    )
    assert service.shown_entry(entry)["type"] == "SYMLINK"
    assert "size_bytes" not in service.shown_entry(entry)


def test_a_bad_range_is_a_request_error():
    assert issubclass(OutOfRange, Invalid)
