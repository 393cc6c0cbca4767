"""What a sandbox says is bounded where it is collected."""

import tracemalloc

from openinteractions.runs.workplace import Bounded

MOST = 48 * 1024


def test_what_fits_is_whole():
    text = Bounded(MOST)
    for number in range(100):
        text.add(f"line {number}\n".encode())
    assert text.read() == "".join(f"line {number}\n" for number in range(100))


def test_of_what_does_not_fit_the_middle_is_left_out():
    text = Bounded(MOST)
    text.add(b"begin ")
    for _ in range(100):
        text.add(b"x" * 10_000)
    text.add(b" end")
    shown = text.read()
    assert shown.startswith("begin xxx")
    assert shown.endswith("xxx end")
    assert len(shown) < MOST + 400
    left_out = 1_000_010 - len(shown.replace("\n", "").split("[")[0]) - len(shown.split("]\n")[1])
    assert f"[… {left_out} bytes left out …]" in shown


def test_a_flood_takes_no_memory():
    text = Bounded(MOST)
    piece = b"y" * 65_536
    tracemalloc.start()
    for _ in range(2_000):
        text.add(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert len(text.read()) < MOST + 400


def test_bytes_that_are_no_text_are_replaced():
    text = Bounded(MOST)
    text.add(b"\xff\xfe ok")
    assert text.read().endswith(" ok")
