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
        pending.at(steps, 3, given=1)
    assert pending.at(steps, 4, given=1) == []


def test_a_function_that_the_run_has_answered_itself_is_our_own_too():
    write, look = called("a", "function"), called("b", "function")
    steps = [{"type": "user_input"}, write[0], look[0], write[1]]
    for cut in (1, 2):
        with pytest.raises(Invalid, match=r"at step \d .*: \[0\]\.$"):
            pending.at(steps, cut, given=1)
    assert pending.at(steps, 3, given=1) == pending.at(steps, None, given=1) == [look[0]]
    # One that came with its result is the caller's: the result may be given anew.
    assert pending.at([*write, {"type": "model_output"}], 0, given=2) == [write[0]]
