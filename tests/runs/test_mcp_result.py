"""What MCP tools give becomes a string, an object or content blocks that every vendor takes."""

import pytest
from mcp import types

from openinteractions.runs.mcp_result import MAX_CHARS, result_of

PNG = {"type": "image", "mime_type": "image/png", "data": "iVBORw0KGgo="}


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
        ([image("image/svg+xml")], "[image/svg+xml, about 9 bytes: left out]"),
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
    found = shown(image(data="A" * 9_000_000), image(data="A" * 9_000_000))
    assert [block["type"] for block in found] == ["image", "text"]
