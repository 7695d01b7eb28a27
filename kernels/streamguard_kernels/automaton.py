"""Build a dense Aho-Corasick automaton over bytes.

States are numbered by depth, so the hot ones lie together. Failure links are folded into the
transition table: a walk reads exactly one entry a byte, whatever the number of patterns.
Source: Aho & Corasick 1975.
"""

from __future__ import annotations

import numpy as np

from streamguard_kernels.compiled import compiled

#: Bit 31 of a transition: the move completes at least one pattern.
HIT = np.uint32(1 << 31)
NO_RULE = np.int32(-1)


@compiled
def byte_classes(data):
    """Give each byte that occurs in a pattern a class of its own; all others share class 0.

    data  uint8[num_bytes], at most 255 distinct (UTF-8 and both marks have 245). Returns class_of
    uint8[256], num_classes.
    """
    class_of = np.zeros(256, np.uint8)
    for i in range(data.shape[0]):
        class_of[data[i]] = 1
    num_classes = 1
    for byte in range(256):
        if class_of[byte]:
            class_of[byte] = num_classes
            num_classes += 1
    return class_of, num_classes


@compiled
def build_trie(data, offsets, class_of, num_classes, max_states):
    """Insert all patterns level by level, which numbers the states by depth.

    data, offsets  uint8[], int64[num_patterns + 1]: pattern bytes; no pattern is empty.
    Returns goto int32[num_states, num_classes] (0 = no child; the root is nobody's child) and
    end_state int32[num_patterns]. Above `max_states` it stops at once: goto has no rows then.
    """
    num_patterns = offsets.shape[0] - 1
    # numba's zeros are written, not mapped: rows that can never be used would cost memory.
    goto = np.zeros((max(min(data.shape[0] + 1, max_states), 1), num_classes), np.int32)
    node = np.zeros(num_patterns, np.int32)
    num_states = 1
    depth = 0
    active = num_patterns
    while active:
        active = 0
        for p in range(num_patterns):
            at = offsets[p] + depth
            if at >= offsets[p + 1]:
                continue
            active += 1
            c = class_of[data[at]]
            child = goto[node[p], c]
            if child == 0:
                if num_states >= max_states:
                    return goto[:0], node
                child = num_states
                goto[node[p], c] = child
                num_states += 1
            node[p] = child
        depth += 1
    return goto[:num_states], node


@compiled
def fold_failure_links(goto):
    """Complete `goto` in place to a transition table; return the failure link of each state.

    goto  int32[num_states, num_classes], in: children, out: next state.
    Depth order makes one pass enough: a failure link always points to a completed row.
    """
    num_states, num_classes = goto.shape
    failure = np.zeros(num_states, np.int32)
    for state in range(num_states):
        link = failure[state]
        for c in range(num_classes):
            child = goto[state, c]
            if child > state:
                failure[child] = 0 if state == 0 else goto[link, c]
            elif state != 0:
                goto[state, c] = goto[link, c]
    return failure


@compiled
def absorb_runs(goto, ends_in):
    """Let every state behind a separator stay where it is when another one follows; in place.

    goto  int32[num_states, num_classes], complete. ends_in int32[num_states]: from
    `states_behind`. A state that ends in none has moved to one that does, or to the root.
    """
    for state in range(goto.shape[0]):
        if ends_in[state]:
            goto[state, ends_in[state]] = state


@compiled
def states_behind(goto, class_):
    """Which states end in a byte of `class_`: int32[num_states], the class or 0.

    goto  int32[num_states, num_classes]: children only, from `build_trie`.
    """
    behind = np.zeros(goto.shape[0], np.int32)
    for state in range(goto.shape[0]):
        child = goto[state, class_]
        if child > state:
            behind[child] = class_
    return behind


@compiled
def collect_outputs(num_states, end_state, pattern_rule, rule_rank, rule_group, failure):
    """Say for every state which patterns end there.

    end_state, pattern_rule  int32[num_patterns]. rule_rank int32[num_rules]: lower = more severe.
    rule_group  uint8[num_rules]: one bit per group of rules.
    Returns
      first_pattern int32[num_states]    head of the list of patterns that end in the state, -1
      next_pattern  int32[num_patterns]  the rest of that list
      suffix_link   int32[num_states]    nearest state on the failure path with a list, 0 = none
      best_rule     int32[num_states]    most severe rule over list and suffix links, -1 = none
      groups        uint8[num_states]    union of `rule_group` over the same
    """
    first_pattern = np.full(num_states, -1, np.int32)
    next_pattern = np.full(end_state.shape[0], -1, np.int32)
    suffix_link = np.zeros(num_states, np.int32)
    best_rule = np.full(num_states, NO_RULE, np.int32)
    groups = np.zeros(num_states, np.uint8)
    for p in range(end_state.shape[0] - 1, -1, -1):
        state = end_state[p]
        next_pattern[p] = first_pattern[state]
        first_pattern[state] = p
        rule = pattern_rule[p]
        groups[state] |= rule_group[rule]
        if best_rule[state] < 0 or rule_rank[rule] < rule_rank[best_rule[state]]:
            best_rule[state] = rule
    for state in range(1, num_states):
        link = failure[state]
        suffix_link[state] = link if first_pattern[link] >= 0 else suffix_link[link]
        groups[state] |= groups[link]
        other = best_rule[link]
        if other >= 0:
            mine = best_rule[state]
            if mine < 0 or rule_rank[other] < rule_rank[mine]:
                best_rule[state] = other
    return first_pattern, next_pattern, suffix_link, best_rule, groups


@compiled
def pack_transitions(goto, groups, base, ends_in):
    """Flatten to uint32: the next row's start in a table that begins at `base`, bit 31 = a hit.

    ends_in  int32[num_states] or empty: see `absorb_runs`. What is absorbed completes nothing anew.
    """
    num_states, num_classes = goto.shape
    packed = np.empty(num_states * num_classes, np.uint32)
    for state in range(num_states):
        silent = ends_in[state] if ends_in.shape[0] else 0
        for c in range(num_classes):
            target = goto[state, c]
            value = np.uint32(base + np.int64(target) * num_classes)
            if groups[target] and not (silent != 0 and c == silent):
                value |= HIT
            packed[state * num_classes + c] = value
    return packed
