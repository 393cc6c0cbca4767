"""Positions, cursors and rows of the log come back as they went in."""

from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openinteractions.errors import Invalid
from openinteractions.events.types import (
    END,
    KINDS,
    STOP,
    Event,
    Position,
    decode_cursor,
    encode_cursor,
    join,
    parse_row,
)

POSITIONS = st.builds(Position, st.integers(-1, END), st.integers(-1, STOP))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
EVENTS = st.builds(
    Event,
    st.sampled_from(sorted(KINDS)),
    POSITIONS,
    st.dictionaries(TEXTS, TEXTS, max_size=3).map(orjson.dumps),
)


@given(st.uuids(), st.integers(0, 2**63 - 1), POSITIONS)
def test_a_cursor_comes_back(interaction_id: UUID, seq: int, position: Position):
    text = encode_cursor(interaction_id, seq, position)
    cursor = decode_cursor(interaction_id, text)
    assert (cursor.seq, cursor.position) == (seq, position)
    assert text.replace("-", "").replace("_", "").isalnum()


@given(st.uuids(), st.uuids())
def test_another_interactions_cursor_is_refused(first: UUID, second: UUID):
    text = encode_cursor(first, 5, Position(0, 0))
    if first.int & 0xFFFF_FFFF != second.int & 0xFFFF_FFFF:
        with pytest.raises(Invalid):
            decode_cursor(second, text)


@given(st.uuids(), st.text(max_size=60))
def test_nonsense_is_refused_and_never_crashes(interaction_id: UUID, text: str):
    with pytest.raises(Invalid):
        decode_cursor(interaction_id, text)


@given(
    st.uuids(),
    st.integers(-(2**70), 2**70),
    st.integers(-(2**40), 2**40),
    st.integers(-(2**40), 2**40),
)
def test_forged_numbers_are_in_range_or_refused(
    interaction_id: UUID, seq: int, index: int, offset: int
):
    text = encode_cursor(interaction_id, seq, Position(index, offset))
    try:
        cursor = decode_cursor(interaction_id, text)
    except Invalid:
        return
    assert 0 <= cursor.seq < 2**63
    assert -1 <= cursor.position.index <= END
    assert -1 <= cursor.position.offset <= STOP


@given(st.lists(EVENTS, min_size=1, max_size=10))
def test_a_row_comes_apart_as_it_was_joined(events: list[Event]):
    assert list(parse_row(join(events))) == events


def test_positions_order_a_stream():
    order = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (0, STOP), (1, -1), (END, -1), (END, 0)]
    assert sorted(Position(*item) for item in reversed(order)) == [Position(*i) for i in order]
