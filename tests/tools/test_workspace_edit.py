"""Edits: the right place, or none; everything else stays as it is."""

import threading
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.tools.files import Bench, refused, use

from openinteractions.errors import Invalid
from openinteractions.tools.workspace import edits

CODE = "def a():\n    return 1\n\n\ndef b():\n    return 2\n"

LINES = st.lists(st.text("ab \t", max_size=5), max_size=8)
TEXTS = st.text("ab\n \r\t", max_size=40)


async def edit(data: bytes | str, old: str, new: str, **more: object) -> tuple[bytes, str]:
    place = Bench(files={"workspace/a": data.encode() if isinstance(data, str) else data})
    said = await use(place, "edit_file", path="a", old_text=old, new_text=new, **more)
    return place.files["workspace/a"], said


async def no_edit(data: bytes | str, old: str, new: str, **more: object) -> str:
    before = data.encode() if isinstance(data, str) else data
    place = Bench(files={"workspace/a": before})
    said = await refused(place, "edit_file", path="a", old_text=old, new_text=new, **more)
    assert place.files == {"workspace/a": before}
    assert place.changes == []
    return said


async def test_a_large_edit_does_not_stop_the_loop(monkeypatch):
    replace, threads = edits.replace, list[int]()

    def replaced(*given: Any, **more: Any) -> Any:
        threads.append(threading.get_ident())
        return replace(*given, **more)

    monkeypatch.setattr(edits, "replace", replaced)
    data, said = await edit("X" + "\n" * 3_000_000, "X", "Y" + "\n" * 12_000_000)
    assert len(data) == 15_000_001
    assert "[… 11999963 more lines]" in said
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


# ---- what is found


async def test_a_unique_text_is_replaced_and_the_change_is_shown():
    data, said = await edit(CODE, "return 2", "return 3")
    assert data == CODE.replace("2", "3").encode()
    assert said == (
        "Edited /workspace/a: 1 place, now:\n"
        "     3\t\n     4\t\n     5\tdef b():\n     6\t    return 3"
    )


async def test_text_is_deleted_and_added():
    data, said = await edit(CODE, "def a():\n    return 1\n\n\n", "")
    assert data == b"def b():\n    return 2\n"
    assert said.endswith("now:\n     1\tdef b():\n     2\t    return 2")
    data, _ = await edit("a", "a", "a\nb")
    assert data == b"a\nb"


async def test_several_places_are_named():
    said = await no_edit(CODE, "return", "yield")
    assert "2 times, at lines 2, 6." in said
    assert "replace_all" in said
    data, said = await edit(CODE, "return", "yield", replace_all=True)
    assert data == CODE.replace("return", "yield").encode()
    assert "2 places (lines 2, 6), the first of them now:" in said


async def test_places_that_overlap_are_several():
    assert "2 times" in await no_edit("xaaax", "aa", "b")
    data, _ = await edit("xaaax", "aa", "b", replace_all=True)
    assert data == b"xbax"


async def test_a_long_change_is_shown_in_part():
    _, said = await edit("x\n", "x", "\n".join(f"new {n}" for n in range(500)))
    assert len(said) < 2000
    assert said.endswith("    40\tnew 39\n[… 460 more lines]")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("", "x", "write_file"),
        ("def a", "def a", "nothing would change"),
        ("nothing like it at all", "x", "Nothing in it is like it"),
        ("  \n  \n  \n", "x", "only whitespace"),
        ("     1\tdef a():\n     2\t    return 1", "x", "line numbers"),
        ("def a():\n  return 1", "x", "differ only in whitespace"),
        ("def a():\n\treturn 1", "x", "     1\tdef a():\n     2\t    return 1"),
        (
            "def b():\n    return 3",
            "x",
            "nearest lines are:\n     5\tdef b():\n     6\t    return 2",
        ),
        ("retrun 1", "x", "nearest lines are:\n     2\t    return 1"),
    ],
    ids=["empty", "same", "none", "blank", "numbers", "indent", "tabs", "near", "typo"],
)
async def test_what_is_not_found_is_helped(old, new, says):
    assert says in await no_edit(CODE, old, new)


async def test_a_missing_file():
    place = Bench(files={"workspace/main.py": b""})
    said = await refused(place, "edit_file", path="man.py", old_text="a", new_text="b")
    assert said == "There is no /workspace/man.py. Did you mean /workspace/main.py?"
    said = await refused(place, "edit_file", path="new.py", old_text="", new_text="b")
    assert "To make it, use write_file." in said


async def test_what_cannot_be_edited():
    assert "is no text" in await no_edit(b"a\0b", "a", "c")
    assert "4.2 MB at most" in await no_edit("a" * (4 * 2**20 + 1), "b", "c")
    assert "is a folder" in await refused(
        Bench(files={"workspace/d/a": b""}), "edit_file", path="d", old_text="a", new_text="b"
    )
    said = await no_edit("a" * 2**20, "a", "b" * 1000, replace_all=True)
    assert "100000 times" in said
    said = await no_edit("a\n" * 50_000, "a", "b" * 1000, replace_all=True)
    assert "too long" in said


# ---- what is nearly found


@pytest.mark.parametrize(
    ("text", "old", "new", "after"),
    [
        ("a\r\nb\r\nc\r\n", "a\nb", "x\ny\nz", "x\r\ny\r\nz\r\nc\r\n"),
        ("a\r\nb\r\n", "b\n", "", "a\r\n"),
        ("a\r\nb\r\nc\r\n", "\nb\n", "\n", "a\r\nc\r\n"),
        ("a\r\nb\r\n", "b", "b\nc", "a\r\nb\r\nc\r\n"),
        ("a\nb\n", "a\r\nb\r\n", "x\r\ny\r\n", "x\ny\n"),
        ("a  \nb\t\nc\n", "a\nb\nc", "x\nb\nc", "x\nb\nc\n"),
        ("a\nb\nc\n", "a  \nb  \nc  ", "x\ny", "x\ny\n"),
        ("a\nb  ", "a\nb\n", "x\ny\n", "x\ny  "),
        ("a\nb", "a\nb\n", "x\ny\n", "x\ny"),
        ("a\r\nb\n", "a\r\n", "a\n", "a\nb\n"),
        ("\ufeffa\r\nb", "a", "x", "\ufeffx\r\nb"),
    ],
    ids=[
        *("crlf", "crlf-line", "crlf-inside", "crlf-new", "lf", "trailing", "too-much"),
        *("at-the-end", "no-last-end", "explicit", "bom"),
    ],
)
async def test_line_ends_and_trailing_space_need_not_be_exact(text, old, new, after):
    data, _ = await edit(text, old, new)
    assert data.decode() == after


async def test_what_is_nearly_found_is_said_and_is_unique_too():
    _, said = await edit("a \nb\n", "a\nb", "x")
    assert "not quite the file's" in said
    said = await no_edit("a \nb\na\t\nb\n", "a\nb", "x")
    assert "2 times, at lines 1, 3." in said
    data, _ = await edit("a \nb\na\t\nb\n", "a\nb", "x", replace_all=True)
    assert data == b"x\nx\n"


async def test_an_exact_match_goes_before_a_near_one():
    data, said = await edit("a \nb\na\nb\n", "a\nb", "x")
    assert data == b"a \nb\nx\n"
    assert "not quite" not in said


async def test_a_near_match_does_not_end_inside_a_line():
    assert "nearest lines" in await no_edit("first\nsecond\n", "first\nsec  ", "x")
    data, _ = await edit("first \nsecond\n", "first\nsec", "x")
    assert data == b"xond\n"


async def test_bytes_that_are_no_text_stay():
    data, said = await edit(b"caf\xe9\nx\n", "x", "y")
    assert data == b"caf\xe9\ny\n"
    assert said.encode()
    assert (await no_edit(b"caf\xe9 one\n", "cafe one\nmore", "y")).encode()


# ---- properties


def attempt(text: str, old: str, new: str, *, replace_all: bool = False) -> edits.Edited | str:
    try:
        return edits.replace(text, old, new, replace_all=replace_all)
    except Invalid as error:
        return error.message


def one_place(text: str, old: str) -> bool:
    at = text.find(old)
    return at >= 0 and text.find(old, at + 1) < 0


def starts(text: str, old: str) -> int:
    return sum(text.startswith(old, at) for at in range(len(text)))


def normal(text: str) -> str:
    return "\n".join(line.rstrip(" \t\r") for line in text.split("\n"))


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_a_unique_text_changes_and_nothing_around_it(before, old, after, new):
    text = before + old + after
    if not old or old == new or not one_place(text, old):
        return
    edited = attempt(text, old, new)
    if isinstance(edited, str):
        # New line ends were made those of the file, and so the text became what it was.
        assert "already" in edited
        assert "\r" in text
        return
    assert edited.text.startswith(before)
    assert edited.text.endswith(after)
    put = edited.text[len(before) : len(edited.text) - len(after)]
    assert put.replace("\r\n", "\n") == new.replace("\r\n", "\n")
    assert (edited.count, edited.is_loose) == (1, False)
    assert edited.places == [(len(before), len(before) + len(put))]
    assert edited.report()


@given(LINES, LINES, LINES, st.sampled_from(["\n", "\r\n"]), st.data())
@example([], ["a"], [], "\r\n", None)
def test_whatever_matches_loosely_leaves_the_rest(before, old, after, end, data):
    """Lines with other ends and trailing space: what is around them stays, to the byte."""
    if not any(line.strip() for line in old):
        return
    text = end.join([*before, *old, *after])
    given_old = "\n".join(line.rstrip(" \t") for line in old)
    edited = attempt(text, given_old, "NEW")
    if isinstance(edited, str):
        assert "times" in edited
        assert starts(normal(text), normal(given_old)) > 1
        return
    head, _, tail = edited.text.partition("NEW")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert normal(text[len(head) : len(text) - len(tail)]).strip() == normal(given_old).strip()


@given(TEXTS, TEXTS.filter(bool), TEXTS)
def test_every_place_is_what_python_would_replace(text, old, new):
    if old not in text or old == new or "\r" in text + old + new:
        return
    edited = edits.replace(text, old, new, replace_all=True)
    assert edited.text == text.replace(old, new)
    assert edited.count == text.count(old)
    for start, stop in edited.places:
        assert edited.text[start:stop] == new


@given(TEXTS, TEXTS, TEXTS, st.booleans())
def test_any_edit_ends_in_a_change_or_a_hint(text, old, new, replace_all):
    edited = attempt(text, old, new, replace_all=replace_all)
    if isinstance(edited, str):
        assert len(edited) > 20
    else:
        assert edited.text != text
        assert edited.report().count("\n") < 60


@pytest.mark.parametrize(
    ("text", "old"),
    [
        (" " * 4_000_000 + "x", "y\nz"),
        ("some line of code that is like others\n" * 100_000, "some lime of code that was like it"),
        ("\n" * 4_000_000, "a\n\n\nb"),
        ("ab" * 2_000_000, "a" * 1000 + "b\n"),
        ("x = 1\n" * 600_000, "x = 1\n" * 1000 + "y"),
    ],
    ids=["spaces", "alike", "blank", "one-line", "votes"],
)
def test_no_text_takes_long(text, old):
    started = time.process_time()
    with pytest.raises(Invalid):
        edits.replace(text, old, "n", replace_all=False)
    # Without bounds it is minutes.
    assert time.process_time() - started < 30
