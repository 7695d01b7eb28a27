"""What an engine's batch may rely on when something has gone wrong in a step."""

from __future__ import annotations

import numpy as np
from guard_cases import policy, program, rule, vocabulary

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
