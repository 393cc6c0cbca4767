"""A picture is looked at by its headers: its kind, whether it is whole, and how large it is."""

import struct

import pytest

from openinteractions.wire import pictures
from tests import pictures as samples

KINDS = {
    "png": (samples.PNG, "image/png"),
    "jpeg": (samples.JPEG, "image/jpeg"),
    "progressive": (samples.PROGRESSIVE, "image/jpeg"),
    "gif": (samples.GIF, "image/gif"),
    "webp": (samples.WEBP, "image/webp"),
    "lossless": (samples.LOSSLESS, "image/webp"),
    "extended": (samples.EXTENDED, "image/webp"),
}
each = pytest.mark.parametrize(("data", "kind"), KINDS.values(), ids=KINDS)


@each
def test_a_whole_picture_may_be_seen(data: bytes, kind: str):
    assert pictures.kind_of(data) == kind
    assert pictures.problem(data) is None
    assert pictures.problem(data + b"and what is behind it") is None


@each
def test_one_that_is_cut_anywhere_may_not(data: bytes, kind: str):
    # A GIF without its last byte, the trailer, is read by everybody.
    most = len(data) - (kind == "image/gif")
    for length in range(most):
        problem = pictures.problem(data[:length])
        assert problem in ("is cut off or damaged", "is no PNG, JPEG, WebP or GIF")


def large(data: bytes, at: int, form: str, *sides: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, *sides)
    return bytes(changed)


LARGE = {
    "png": samples.png(9000, 100),
    "jpeg": large(samples.JPEG, samples.JPEG.index(b"\xff\xc0") + 5, ">HH", 100, 9000),
    "progressive": large(
        samples.PROGRESSIVE, samples.PROGRESSIVE.index(b"\xff\xc2") + 5, ">HH", 100, 9000
    ),
    "gif": large(samples.GIF, 6, "<HH", 9000, 100),
    "gif's image": large(samples.GIF, samples.GIF.index(b",\0\0\0\0\7\0") + 5, "<HH", 9000, 100),
    "webp": large(samples.WEBP, 26, "<HH", 9000, 100),
    "lossless": large(samples.LOSSLESS, 21, "<I", 8999 | 99 << 14),
    "extended": large(samples.EXTENDED, 24, "<HBHB", 8999, 0, 99, 0),
}


@pytest.mark.parametrize("data", LARGE.values(), ids=LARGE)
def test_one_that_is_too_large_may_not(data: bytes):
    said = pictures.problem(data)
    assert said is not None
    assert said.startswith("has 9000 x ")
    assert said.endswith("8000 a side are the most")


def test_the_largest_may_be_seen():
    assert pictures.problem(samples.png(8000, 1)) is None
    assert pictures.problem(samples.png(1, 8001)) is not None
    assert pictures.problem(samples.png(0, 5)) == "is cut off or damaged"


@pytest.mark.parametrize(
    "data",
    [
        samples.PNG[:33] + bytes(12) * 400_000,
        b"\xff\xd8\xff" + b"\xff" * 3_000_000,
        samples.GIF[:13] + b"\x21\xfe" + b"\1x" * 400_000,
        b"",
        b"<svg>",
    ],
    ids=["png", "jpeg", "gif", "nothing", "svg"],
)
def test_what_is_made_to_be_slow_is_given_up(data: bytes):
    assert pictures.problem(data) is not None
