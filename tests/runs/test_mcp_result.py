"""What MCP tools give becomes a string, an object or content blocks that every vendor takes."""

import base64

import pytest
from mcp import types
from tests import pictures

from openinteractions.runs.mcp_result import MAX_CHARS, result_of

PNG = {"type": "image", "mime_type": "image/png", "data": pictures.PNG_BASE64}


def made(*content, **more):
    return types.CallToolResult.model_validate({"content": content, **more}, by_name=False)


def shown(*content, hide=lambda text: text, **more):
    return result_of(made(*content, **more), hide)


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(kind: str = "image/png", data: str = PNG["data"]) -> dict:
    return {"type": "image", "mimeType": kind, "data": data}


def resource(**more) -> dict:
    return {"type": "resource", "resource": {"uri": "file:///a", **more}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], ""),
        ([text("a"), text("b")], "a\nb"),
        ([text("a"), image()], [text("a"), PNG]),
        ([image("image/svg+xml")], "[image/svg+xml, about 69 bytes: left out]"),
        (
            [{"type": "audio", "mimeType": "audio/wav", "data": "AAAA"}],
            "[audio/wav, about 3 bytes: left out]",
        ),
        (
            [{"type": "resource_link", "uri": "https://x.example/a", "name": "a"}],
            "[Resource 'a' at https://x.example/a]",
        ),
        ([resource(text="hello", mimeType="text/plain")], "[Resource file:///a]\nhello"),
        ([resource(blob=PNG["data"], mimeType="image/png")], [PNG]),
        ([resource(blob="AAAA")], "[application/octet-stream, about 3 bytes: left out]"),
    ],
)
def test_every_kind_of_content_has_its_place(content, expected):
    assert shown(*content) == expected


def test_an_image_that_vendors_refuse_is_told():
    large, cut = pictures.png(9000, 10), pictures.PNG[:30]
    said = shown(*(image(data=base64.b64encode(each).decode()) for each in (large, cut)))
    assert "[image/png: left out, since it has 9000 x 10 pixels" in said
    assert "[image/png: left out, since it is cut off" in said


def test_an_object_stays_one_where_there_is_nothing_else():
    assert shown(structuredContent={"a": [1]}) == {"a": [1]}
    assert shown(text("a"), structuredContent={"a": 1}) == "a"


def test_an_object_that_is_too_long_or_has_a_secret_becomes_text():
    cut = shown(structuredContent={"a": "x" * MAX_CHARS})
    assert isinstance(cut, str)
    assert "more characters were left out" in cut
    hidden = shown(structuredContent={"a": "pst"}, hide=lambda t: t.replace("pst", "***"))
    assert hidden == '{"a":"***"}'


def test_text_is_bounded_over_all_blocks():
    found = shown(text("x" * (MAX_CHARS - 1)), text("yy"), text("z"))
    assert found.endswith("\ny\n[2 more characters were left out. Ask for less at once.]")


def test_images_are_bounded():
    found = shown(*[image()] * 25)
    assert [block["type"] for block in found].count("image") == 20
    large = image(data=base64.b64encode(pictures.PNG + bytes(7_000_000)).decode())
    found = shown(large, large)
    assert [block["type"] for block in found] == ["image", "text"]


@pytest.mark.parametrize(
    "data",
    [
        "A" * 20_001, "iVBORw0K$Ggo", "ïVBORw0KGgo=", "",
        base64.b64encode(b"<svg/>").decode(), base64.b64encode(b"%PDF-1.7").decode(),
    ],
    ids=["length", "alphabet", "letters", "none", "svg", "pdf"],
)  # fmt: skip
def test_what_is_no_image_is_said_to_be_none(data):
    said = "[image/png: left out, since its data is not base64 of such an image]"
    assert shown(image(data=data)) == said
    assert shown(resource(blob=data, mimeType="image/png")) == said


def test_an_image_is_shown_as_what_it_is():
    jpeg = base64.b64encode(pictures.JPEG).decode()
    wrapped = "\n".join((jpeg[:76], jpeg[76:]))
    expected = {"type": "image", "mime_type": "image/jpeg", "data": jpeg}
    assert shown(image(data=wrapped)) == [expected]
    assert shown(image(data=PNG["data"].rstrip("="))) == [PNG]


def test_blocks_are_bounded():
    found = shown(*[text("a")] * 5_000, image())
    assert found.count("a\n") == 1_000
    assert found.endswith("[4001 more blocks were left out. Ask for less at once.]")


def test_a_long_text_is_looked_through_for_secrets_as_far_as_it_is_shown():
    found = shown(text("pst " * MAX_CHARS), hide=lambda t: t.replace("pst", "***"))
    assert "pst" not in found
    assert found.endswith(f"[{3 * MAX_CHARS} more characters were left out. Ask for less at once.]")
