"""What is kept of a command's output, and how readers follow it."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openinteractions.broker import record as records
from openinteractions.broker.record import Record
from openinteractions.sandbox import messages
from openinteractions.sandbox.pipe import Omitted
from openinteractions.sandbox.port import Exit, Output

ENDED = Exit(outcome="exited", code=0)


async def taken(record, offset=0):
    return [piece async for piece in record.follow(offset)]


def positions(pieces, start=0):
    """Where each byte of output lies, and what was left out; pieces must join."""
    seen, at = {}, start
    for piece in pieces:
        if isinstance(piece, Omitted):
            at += piece.byte_count
        elif isinstance(piece, Output):
            for byte in piece.data:
                seen[at] = (piece.stream, byte)
                at += 1
    return seen, at


outputs = st.lists(
    st.builds(Output, st.sampled_from([1, 2]), st.binary(min_size=1, max_size=40)), max_size=30
)


@given(outputs, st.integers(2, 200), st.integers(0, 50))
async def test_head_and_tail_are_kept_where_they_were(written, bound, offset):
    record = Record(bound)
    whole = []
    for output in written:
        record.add(output)
        whole += [(output.stream, byte) for byte in output.data]
    record.finish(ENDED)
    offset = min(offset, len(whole))
    pieces = await taken(record, offset)
    seen, end = positions(pieces, offset)
    assert pieces[-1] == replace(ENDED, truncated=len(whole) > bound)
    assert end == len(whole)
    assert all(whole[at] == byte for at, byte in seen.items())
    if len(whole) <= bound:
        assert len(seen) == len(whole) - offset
    assert len(seen) <= bound
    assert len(whole) - 1 in seen or offset == len(whole)
    stored = Record.load(record.dump(), messages.exit_fields(ENDED))
    assert positions(await taken(stored, offset), offset) == (seen, end)


async def test_a_reader_that_keeps_up_sees_no_more_than_the_bound():
    record, got = Record(10), []

    async def read():
        async for piece in record.follow(0):
            got.append(piece)  # noqa: PERF401 - as it comes

    reading = asyncio.ensure_future(read())
    for number in range(50):
        record.add(Output(1, b"%03d" % number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if number == 1:
            # What comes first is shown while it comes.
            assert b"".join(piece.data for piece in got) == b"00000"
    record.finish(ENDED)
    await reading
    head = [piece.data for piece in got if isinstance(piece, Output)]
    assert [piece.byte_count for piece in got if isinstance(piece, Omitted)] == [140]
    assert b"".join(head).startswith(b"00000\n[... 140 bytes")
    assert b"".join(head).endswith(b"...]\n48049")
    assert got[-1] == replace(ENDED, truncated=True)


def test_one_large_piece_is_cut_at_the_bound():
    record = Record(100)
    record.add(Output(1, b"a" * 60_000 + b"z"))
    record.finish(ENDED)
    head, tail = [part.output.data for part in (*record._head, *record._tail)]
    assert (head, tail) == (b"a" * 50, b"a" * 49 + b"z")


def test_a_sandbox_that_counts_without_end_does_not_break_the_record():
    record = Record(4096)
    record.add(Output(1, b"a"))
    for _ in range(9):
        record.add(Omitted(1, b"", 1 << 62))
        record.add(Output(1, b"b"))
    record.finish(ENDED)
    stored = Record.load(record.dump(), messages.exit_fields(ENDED))
    assert stored.position == record.position <= 1 << 62


@pytest.mark.parametrize("is_gapped", [True, False])
def test_tiny_pieces_do_not_cost_an_object_each(is_gapped):
    record = Record(1 << 20)
    for number in range(30_000):
        record.add(Output(1 + number % 2, b"x"))
        if is_gapped:
            record.add(messages.omitted(1))
    record.finish(ENDED)
    parts = len(record._head) + len(record._tail)
    assert parts <= 2 * records._MAX_PARTS
    assert record.exit.truncated
    stored = Record.load(record.dump(), messages.exit_fields(ENDED))
    assert len(stored._head) + len(stored._tail) == parts


async def test_what_the_sandbox_left_out_stays_left_out():
    record = Record(1000)
    record.add(Output(1, b"head"))
    record.add(messages.omitted(100))
    record.add(Output(2, b"tail"))
    record.finish(ENDED)
    head, gap, tail, ended = await taken(record)
    assert (head.data, gap.byte_count, tail.data, ended) == (b"head", 100, b"tail", ENDED)
    assert record.position == 108
    assert positions(await taken(record, 50), 50)[1] == 108


async def test_the_first_word_about_the_end_counts():
    record = Record(10)
    record.finish(ENDED)
    record.finish(Exit(outcome="unknown"))
    assert await taken(record) == [ENDED]
