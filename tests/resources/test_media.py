"""Media inside steps: out into blobs and back; what cannot be read loses no result."""

import base64
import hashlib

import pytest

from openinteractions.resources.files import media

LARGE = bytes(media.KEEP_INLINE_BYTES)


def step(*blocks: media.Json) -> media.Json:
    return {"type": "function_result", "result": list(blocks)}


def image(data: object) -> media.Json:
    return {"type": "image", "mime_type": "image/png", "data": data}


def test_large_media_are_taken_out_and_put_back():
    data = base64.b64encode(LARGE).decode()
    given = step({"type": "text", "text": "see"}, image(data), image("iVBO"))
    bare, (blob,) = media.take_out(given)
    assert blob.data == LARGE
    assert bare["result"][1] == {
        "type": "image",
        "mime_type": "image/png",
        "blob": hashlib.sha256(LARGE).hexdigest(),
    }
    assert bare["result"][2] == image("iVBO")
    assert given["result"][1]["data"] == data
    assert media.put_back(bare, {blob.sha256: blob}, for_model=True) == given


@pytest.mark.parametrize(
    "data",
    ["A" * 20_001, "!A" * 10_000, "é" * 20_000, "AAAA\n" * 5000, "=" * 20_000],
    ids=["length", "alphabet", "no ASCII", "lines", "padding"],
)
def test_data_that_is_no_base64_becomes_a_text(data: str):
    good = image(base64.b64encode(LARGE).decode())
    given = step({"type": "text", "text": "see"}, image(data), good)
    bare, taken = media.take_out(given)
    assert bare["result"][0] == {"type": "text", "text": "see"}
    text = "[image left out: its data was not base64.]"
    assert bare["result"][1] == {"type": "text", "text": text}
    assert [blob.data for blob in taken] == [LARGE]


def test_what_is_no_media_block_keeps_its_data():
    given = step({"data": "A" * 20_000}, {"type": "row", "data": "row! " * 10_000})
    assert media.take_out(given) == (given, [])
