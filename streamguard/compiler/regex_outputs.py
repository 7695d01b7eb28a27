"""What the states of a regex automaton say: the lists of rules that `advance` and `scan` read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from streamguard.compiler.regex_bytes import ByteDfa
from streamguard.compiler.regex_nfa import bits

#: `Tables.pattern_length` of a match whose start is not known: it ends with the byte that completes
#: it, or ended before the character that this byte begins.
ENDS_HERE, ENDED_BEFORE = 0, -1


class Outputs(NamedTuple):
    """As `automaton.collect_outputs` gives them; suffix links are not needed."""

    first_pattern: np.ndarray
    next_pattern: np.ndarray
    pattern_rule: np.ndarray
    pattern_length: np.ndarray
    best_rule: np.ndarray
    groups: np.ndarray


def outputs_of(
    dfa: ByteDfa, rules: Sequence[Sequence[int]], rank: np.ndarray, group: np.ndarray
) -> Outputs:
    """List the rules of every state.

    rules  per regex (bit of the automaton's outputs) the global indices of its rules; rank and
    group int32, uint8[num_rules] as in `automaton.collect_outputs`. States that say the same share
    one list.
    """
    num_states = len(dfa.here)
    first_pattern = np.full(num_states, -1, np.int32)
    best_rule = np.full(num_states, -1, np.int32)
    groups = np.zeros(num_states, np.uint8)
    lists: dict[tuple[int, int], tuple[int, int, int]] = {(0, 0): (-1, -1, 0)}
    next_pattern: list[int] = []
    pattern_rule: list[int] = []
    pattern_length: list[int] = []
    for state, said in enumerate(zip(dfa.here, dfa.before, strict=True)):
        if said not in lists:
            begin = len(pattern_rule)
            for mask, length in zip(said, (ENDS_HERE, ENDED_BEFORE), strict=True):
                mine = sorted({rule for regex in bits(mask) for rule in rules[regex]})
                pattern_rule += mine
                pattern_length += [length] * len(mine)
            named = pattern_rule[begin:]
            next_pattern += [*range(begin + 1, len(pattern_rule)), -1]
            best = min(named, key=lambda rule: int(rank[rule]))
            lists[said] = begin, best, int(np.bitwise_or.reduce(group[named]))
        first_pattern[state], best_rule[state], groups[state] = lists[said]
    return Outputs(
        first_pattern,
        np.array(next_pattern, np.int32),
        np.array(pattern_rule, np.int32),
        np.array(pattern_length, np.int32),
        best_rule,
        groups,
    )
