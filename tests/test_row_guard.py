"""What an engine's batch may rely on when something has gone wrong in a step."""

from __future__ import annotations

import numpy as np
import pytest
from guard_cases import policy, program, rule, vocabulary

from streamguard.errors import ShapeError
from streamguard.row_guard import RowGuard
from streamguard.verdict import FAILED, VerdictCodes

SPECIALS = (b"<s>", b"</s>", *(f"<reserved {i}>".encode() for i in range(8)))


def test_scripts_go_on_and_slots_pass_whatever_was_sampled_after_an_error() -> None:
    # An id beyond the vocabulary once raised again in the call that ends what had failed.
    compiled = program(policy(rule("halt", "bomb")), vocabulary([b"b", b"om"], SPECIALS))
    codes = VerdictCodes(1, 11, 10, ({9: 0},), ((9,),), {}, ((0,),), frozenset({9, 10, 11}))
    guard = RowGuard(compiled, codes, 3)
    for slot in range(3):
        guard.admit(slot, (), policy="default", max_tokens=9)
    guard.resume_verdict(0, FAILED, 0)
    guard.let_pass(1)
    guard.let_pass(2)
    sampled = np.array([10**6, -5, 10**9])
    assert guard.decide([0, 1, 2], sampled) == []
    assert sampled.tolist() == [11, -5, 10**9]


def test_a_token_that_the_matcher_refuses_does_not_come_again() -> None:
    # The engine asks for what is not committed yet: it would fail the whole batch in every step.
    compiled = program(policy(rule("halt", "bomb")), vocabulary([b"b", b"om"], SPECIALS))
    codes = VerdictCodes(1, 11, 10, ({9: 0},), ((9,),), {}, ((0,),), frozenset({9, 10, 11}))
    guard = RowGuard(compiled, codes, 2)
    for slot in range(2):
        guard.admit(slot, (), policy="default", max_tokens=9)
    for unknown in (10**6, -1):
        with pytest.raises(ShapeError, match="token ids range over"):
            guard.commit([0, 1], [0, unknown])
    assert guard.num_committed(np.arange(2)).tolist() == [2, 2]
