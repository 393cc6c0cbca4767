"""A citation covers the sentence that rests on a page, to the byte, whatever the text is."""
# ruff: noqa: RUF001 - punctuation of East Asia

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openinteractions.loop.citations import annotations, normalised, sources

PAGES = {
    "https://a.example/x": "A page",
    "https://b.example/y/": "",
    "https://en.example/wiki/Foo_(bar)": "Foo",
}


def cited(text: str, pages=PAGES) -> list[tuple[str, str]]:
    """Each citation: the URL, and the text that it covers."""
    return [
        (note["url"], text.encode()[note["start_index"] : note["end_index"]].decode())
        for note in annotations(text, pages)
    ]


A, B, FOO = PAGES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("First. It is 5 ([A](https://a.example/x)). Last.",
         [(A, "It is 5 ([A](https://a.example/x)).")]),
        ("Größe: 5 €. Sie ist 6 [hier](https://a.example/x)! Ende.",
         [(A, "Sie ist 6 [hier](https://a.example/x)!")]),
        ("See https://b.example/y. More.", [(B, "See https://b.example/y.")]),
        ("It is so <https://a.example/x>, yes.", [(A, "It is so <https://a.example/x>, yes.")]),
        ("A claim. [Source](https://a.example/x)\n\nMore.",
         [(A, "A claim. [Source](https://a.example/x)")]),
        ("A claim. [1](https://a.example/x) [2](https://b.example/y)",
         [(A, "A claim. [1](https://a.example/x) [2](https://b.example/y)"),
          (B, "A claim. [1](https://a.example/x) [2](https://b.example/y)")]),
        ("Old.\n\n[Source](https://a.example/x)", [(A, "[Source](https://a.example/x)")]),
        ("| shop | price |\n|---|---|\n| [A. B. C](https://a.example/x) | 5 |\n| b | 6 |",
         [(A, "| [A. B. C](https://a.example/x) | 5 |")]),
        ("Found:\n- One. Two https://b.example/y\n- three\n", [(B, "- One. Two https://b.example/y")]),
        ("1. One https://a.example/x\n2. two", [(A, "1. One https://a.example/x")]),
        ("So (https://en.example/wiki/Foo_(bar)). No.",
         [(FOO, "So (https://en.example/wiki/Foo_(bar)).")]),
        ("[Foo. Bar! Baz](https://en.example/wiki/Foo_(bar)) is it. No.",
         [(FOO, "[Foo. Bar! Baz](https://en.example/wiki/Foo_(bar)) is it.")]),
        ('[x](https://a.example/x "A title. Of two.") says so.',
         [(A, '[x](https://a.example/x "A title. Of two.") says so.')]),
        ("一つ。二つ [甲](https://a.example/x)。三つ。", [(A, "二つ [甲](https://a.example/x)。")]),
        (("One [a](https://a.example/x). Two [a](https://a.example/x). Three. "
          "Four [a](https://a.example/x)."),
         [(A, "One [a](https://a.example/x). Two [a](https://a.example/x)."),
          (A, "Four [a](https://a.example/x).")]),
        ("Run:\n```\ncurl https://a.example/x\n```\nDone.", []),
        ("```\nhttps://b.example/y\n```\nIt is [so](https://a.example/x).",
         [(A, "It is [so](https://a.example/x).")]),
        ("一つ（https://a.example/x）。二つ。", [(A, "一つ（https://a.example/x）。")]),
        ("一つ https://a.example/x、二つ。三つ。", [(A, "一つ https://a.example/x、二つ。")]),
        ("【https://a.example/x】一つ", [(A, "【https://a.example/x】一つ")]),
        ("It is 5 [1]. And 6. It is 7 [2].\n\n[1]: https://a.example/x\n[2]: https://b.example/y",
         [(A, "It is 5 [1]."), (B, "It is 7 [2].")]),
        ("It is 5.[^a] And 6.\n\n[^a]: [A](https://a.example/x), read today.",
         [(A, "It is 5.[^a]")]),
        ("It is 5.[^1] And 6. [2] And 7.\n\n[^1]: <https://a.example/x>\n- [2] B: https://b.example/y",
         [(A, "It is 5.[^1]"), (B, "And 6. [2]")]),
        ("As [they say][src] it is 5 [1, src]. No.\n\n[src]: https://a.example/x\n[1]: https://b.example/y",
         [(A, "As [they say][src] it is 5 [1, src]."),
          (B, "As [they say][src] it is 5 [1, src].")]),
        ("It is 5 [1][2]. No [3].\n[1] https://a.example/x\n[2] https://b.example/y\n[3] https://c.example",
         [(A, "It is 5 [1][2]."), (B, "It is 5 [1][2].")]),
        ("Nobody refers to it.\n\n[1]: https://a.example/x", [(A, "[1]: https://a.example/x")]),
        ("[Note] see https://a.example/x. A [note] more.", [(A, "[Note] see https://a.example/x.")]),
        ("五つ。[1]六つ。\n\n[1]：https://a.example/x", [(A, "五つ。[1]")]),
        ("```\na[1]\n```\nIt is 5 [1].\n\n[1]: https://a.example/x", [(A, "It is 5 [1].")]),
        ("It is https://unknown.example/x.", []),
        ("No link at all.", []),
    ],
)  # fmt: skip
def test_a_citation_covers_what_its_link_stands_in(text: str, expected: list):
    assert cited(text) == expected


def test_a_title_is_shown_where_it_is_known():
    first, second = annotations("a https://a.example/x\n\nb https://b.example/y", PAGES)
    assert first["title"] == "A page"
    assert "title" not in second
    assert first["type"] == "url_citation"


def test_one_page_in_two_spellings_has_one_url_and_any_title():
    pages = {"https://a.example/x/": "", "https://A.example/x": "Named"}
    (note,) = annotations("So https://a.example/x#part.", pages)
    assert (note["url"], note["title"]) == ("https://a.example/x/", "Named")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("HTTPS://A.Example/x", "https://a.example/x"),
        ("https://a.example:443/x", "https://a.example/x"),
        ("http://a.example:80", "http://a.example/"),
        ("https://a.example/x/", "https://a.example/x"),
        ("https://a.example/x#top", "https://a.example/x"),
        ("https://a.example/x?utm_source=m&q=1&gclid=z", "https://a.example/x?q=1"),
        ("https://a.example/sch%C3%B6n", "https://a.example/schön"),
        ("https://a.example/a%2fb?q=a+b", "https://a.example/a%2Fb?q=a%20b"),
    ],
)
def test_spellings_of_one_page(one: str, other: str):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://a.example/x", "https://a.example/X"),
        ("https://a.example/x", "https://b.example/x"),
        ("https://a.example/x?q=1", "https://a.example/x?q=2"),
        ("https://a.example:8443/x", "https://a.example/x"),
        ("http://a.example/x", "https://a.example/x"),
    ],
)
def test_other_pages(one: str, other: str):
    assert normalised(one) != normalised(other)


@given(st.text())
@example("https://[::1")
@example("https://a:99999/x")
def test_any_text_has_a_normal_form(text: str):
    assert isinstance(normalised("https://" + text), str)


PIECES = st.lists(
    st.one_of(
        st.sampled_from(["https://a.example/x", "[w. x](https://b.example/y)", "é😀", ". ", "\n",
                         "\n\n", "| ", "- ", "](", ")", "[", "<", "```\n", "。", '?!" ']),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    ),
    max_size=25,
)  # fmt: skip


@settings(max_examples=500)
@given(PIECES)
def test_offsets_are_borders_of_characters_around_a_link(pieces: list[str]):
    text = "".join(pieces)
    notes = annotations(text, PAGES)
    for note in notes:
        covered = text.encode()[note["start_index"] : note["end_index"]].decode()
        assert covered == covered.strip()
        assert any(normalised(url) == normalised(note["url"]) for url in PAGES)
        host = note["url"].split("/")[2]
        assert host in covered
    assert notes == sorted(notes, key=lambda n: (n["start_index"], n["end_index"]))
    of_one = [(n["url"], n["start_index"]) for n in notes]
    assert len(set(of_one)) == len(of_one)


LINK = "https://a.example/x"


@pytest.mark.parametrize(
    "piece",
    [".", "[", "[]", "(", ".'", "http://", "https://", "\n", " ", "- ", "```\n", "? ", "|\n",
     f"]({LINK}", f"[x]({LINK}). ", f"[x]({LINK} ", f"{LINK} ", "é",
     "[1]", "[1],", "[a, ", "[1] ", ".[1]", "\n[1]: ", f"\n[1]: {LINK} ", f"[1]\n[1]: {LINK}\n",
     f"{LINK}（"],
)  # fmt: skip
def test_hostile_texts_take_linear_time(piece: str):
    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        begin = time.thread_time()
        annotations(f"{text} {LINK}", PAGES)
        annotations(f"{LINK}{text}", PAGES)
        return time.thread_time() - begin

    def least(size: int) -> float:
        return min(seconds(size) for _ in range(3))

    seconds(1_000)
    # Four times as much in ten times the time: what grows with the square takes sixteen times.
    assert least(160_000) < 10 * max(least(40_000), 0.02)


def test_pages_that_were_read_or_found_are_sources():
    steps = [
        {"type": "url_context_result", "call_id": "1", "result": [
            {"url": "https://a.example", "status": "success", "title": " A\n page "},
            {"url": "https://bad.example", "status": "error", "message": "404"},
        ]},
        {"type": "google_search_result", "call_id": "2", "result": [
            {"url": "https://b.example", "title": "B", "snippet": "s"},
            {"url": "https://a.example", "title": "other"},
            {"search_suggestions": "<div>"}, 7,
        ]},
        {"type": "google_search_result", "call_id": "3", "result": "It failed.", "is_error": True},
        {"type": "function_call", "id": "4", "name": "browser", "arguments": {
            "action": "open", "url": "https://c.example"}},
        {"type": "function_result", "call_id": "4", "name": "browser", "result": "text"},
        {"type": "function_call", "id": "5", "name": "browser", "arguments": {
            "action": "open", "url": "https://d.example"}},
        {"type": "function_result", "call_id": "5", "result": "no", "is_error": True},
        {"type": "function_call", "id": "6", "name": "other", "arguments": {"url": "https://e"}},
        {"type": "function_result", "call_id": "6", "result": "x"},
    ]  # fmt: skip
    assert sources(steps) == {
        "https://a.example": "A page",
        "https://b.example": "B",
        "https://c.example": "",
    }
