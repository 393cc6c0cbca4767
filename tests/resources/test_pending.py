"""Where a branch can be: after which steps of an interaction nothing waits for a result."""

import pytest

from openinteractions.errors import Invalid
from openinteractions.resources.interactions import pending


def called(call_id: str, kind: str = "code_execution") -> list[dict]:
    return [{"type": f"{kind}_call", "id": call_id}, {"type": f"{kind}_result", "call_id": call_id}]


def test_a_cut_inside_our_own_calls_names_the_steps_that_will_do():
    first, second = called("a"), called("b")
    steps = [{"type": "user_input"}, first[0], second[0], first[1], second[1]]
    with pytest.raises(Invalid, match=r"at step 3 .*: \[0, 4\]\.$"):
        pending.at(steps, 3)
    assert pending.at(steps, 4) == []
