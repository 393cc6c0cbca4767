"""What is kept of a command's output, and how readers follow it."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

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
    assert pieces[-1] == ENDED
    assert end == len(whole)
    assert all(whole[at] == byte for at, byte in seen.items())
    if len(whole) <= bound // 2:
        assert len(seen) == len(whole) - offset
    # Whole pieces are kept, so the tail may be one of them longer.
    assert len(seen) <= bound + 40
    assert len(whole) - 1 in seen or offset == len(whole)
    stored = Record.load(record.dump(), messages.exit_fields(ENDED))
    assert positions(await taken(stored, offset), offset) == (seen, end)


async def test_a_reader_that_keeps_up_sees_everything():
    record, got = Record(10), []

    async def read():
        got.extend(await taken(record))

    reading = asyncio.ensure_future(read())
    for number in range(50):
        record.add(Output(1, b"%03d" % number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    record.finish(ENDED)
    await reading
    assert not any(isinstance(piece, Omitted) for piece in got)
    assert b"".join(piece.data for piece in got[:-1]) == b"".join(b"%03d" % n for n in range(50))


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
