"""Build an Aho-Corasick automaton over bytes, dense as far as a budget reaches.

Patterns are sorted first; then the trie is laid out level by level in one pass over them. States are
numbered by depth, so the hot ones lie together and the children of each follow each other. The first
`num_hot` states get a complete row (failure links folded in: a walk reads one entry a byte); the
others, if there are any, keep a record each: their children and a failure link.
Source: Aho & Corasick 1975.
"""

from __future__ import annotations

import numpy as np

from streamguard_kernels.compiled import borrowing, compiled

#: Bit 31 of a transition: the move completes at least one pattern.
HIT = np.uint32(1 << 31)
NO_RULE = np.int32(-1)
#: uint32 fields of a cold state's record; see `pack_cold`.
COLD_FIELDS = 3


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


@borrowing
def _sort_key(data, at, end):
    """The next 7 bytes as a number, and behind them how many there are (8 = more)."""
    key = np.uint64(0)
    for i in range(at, at + 7):
        key = (key << np.uint64(8)) | np.uint64(data[i] if i < end else 0)
    return (key << np.uint64(8)) | np.uint64(min(end - at, 8))


@compiled
def sort_patterns(data, offsets):
    """Order patterns by their bytes: int32[num_patterns]. Equal ones keep no order.

    data, offsets  uint8[num_bytes], int64[num_patterns + 1].
    """
    num_patterns = offsets.shape[0] - 1
    order = np.arange(num_patterns).astype(np.int32)
    # Stretches that agree in their first bytes, with how many: sorted by the next seven.
    stretches = [(0, num_patterns, 0)]
    while len(stretches):
        low, high, depth = stretches.pop()
        keys = np.empty(high - low, np.uint64)
        for k in range(low, high):
            p = order[k]
            keys[k - low] = _sort_key(data, offsets[p] + depth, offsets[p + 1])
        by_key = np.argsort(keys)
        order[low:high] = order[low:high][by_key]
        begin = 0
        for k in range(1, high - low + 1):
            if k < high - low and keys[by_key[k]] == keys[by_key[begin]]:
                continue
            if k - begin > 1 and keys[by_key[begin]] & np.uint64(0xFF) == np.uint64(8):
                stretches.append((low + begin, low + k, depth + 7))
            begin = k
    return order


@compiled
def build_trie(data, offsets, order, class_of, max_states):
    """Lay out the trie of sorted patterns level by level, which numbers the states by depth.

    data, offsets  uint8[], int64[num_patterns + 1]: pattern bytes; no pattern is empty.
    order          int32[num_patterns]: from `sort_patterns`.
    Returns label uint8[num_states]: byte class that leads to the state, children int32[num_states + 1]:
    those of s are children[s] .. children[s + 1], by class, and end_state int32[num_patterns].
    More than `max_states`: label is empty, and children[0] says how many there would be.
    """
    num_patterns = order.shape[0]
    # A copy in order: what follows reads it once a level.
    text = np.empty(data.shape[0], np.uint8)
    starts = np.zeros(num_patterns + 1, np.int64)
    shared = np.zeros(num_patterns, np.int64)  # with the pattern before
    num_states = 1
    for k in range(num_patterns):
        begin, size = offsets[order[k]], offsets[order[k] + 1] - offsets[order[k]]
        at = starts[k]
        starts[k + 1] = at + size
        before = starts[k - 1] if k else at
        n = 0
        same = k > 0
        for i in range(size):
            text[at + i] = data[begin + i]
            same = same and before + i < at and text[before + i] == text[at + i]
            n += same
        shared[k] = n
        num_states += size - n
    end_state = np.zeros(num_patterns, np.int32)
    if num_states > max_states:
        return np.zeros(0, np.uint8), np.full(1, num_states, np.int64).astype(np.int32), end_state
    label = np.zeros(num_states, np.uint8)
    children = np.zeros(num_states + 1, np.int32)
    node = np.zeros(num_patterns, np.int32)
    active = np.arange(num_patterns).astype(np.int32)
    count, depth, new, last = num_patterns, 0, 1, 0
    while count:
        kept = 0
        for j in range(count):
            k = active[j]
            if shared[k] <= depth:
                label[new] = class_of[text[starts[k] + depth]]
                children[node[k] + 1] += 1
                last = new
                new += 1
            node[k] = last
            if starts[k] + depth + 1 == starts[k + 1]:
                end_state[order[k]] = last
            else:
                active[kept] = k
                kept += 1
        count = kept
        depth += 1
    children[0] = 1
    for state in range(num_states):
        children[state + 1] += children[state]
    return label, children, end_state


@compiled
def link_trie(label, children, num_hot, num_classes, alias, aliased):
    """Failure link of each state, and the complete rows of the first `num_hot`.

    label, children  from `build_trie`. alias: byte class that at the root leads where the class
    `aliased` does, or -1. Depth order makes one pass enough: a failure link points to a state that
    is done. Returns failure int32[num_states], rows int32[num_hot, num_classes].
    """
    num_states = label.shape[0]
    failure = np.zeros(num_states, np.int32)
    rows = np.zeros((num_hot, num_classes), np.int32)
    for state in range(num_states):
        link = failure[state]
        if 0 < state < num_hot:
            for c in range(num_classes):
                rows[state, c] = rows[link, c]
        for child in range(children[state], children[state + 1]):
            c = label[child]
            if state < num_hot:
                failure[child] = rows[state, c] if state else 0
                rows[state, c] = child
                continue
            above = link
            while above >= num_hot:
                found = children[above]
                while found < children[above + 1] and label[found] != c:
                    found += 1
                if found < children[above + 1]:
                    break
                above = failure[above]
            failure[child] = rows[above, c] if above < num_hot else found
        if state == 0 and alias >= 0:
            rows[0, alias] = rows[0, aliased]
    return failure, rows


@compiled
def accepting_groups(end_state, pattern_rule, rule_group, failure):
    """Union of the groups of all patterns that end in each state or a suffix: uint8[num_states].

    rule_group  uint8[num_rules]: one bit per group of rules.
    """
    groups = np.zeros(failure.shape[0], np.uint8)
    for p in range(end_state.shape[0]):
        groups[end_state[p]] |= rule_group[pattern_rule[p]]
    for state in range(1, failure.shape[0]):
        groups[state] |= groups[failure[state]]
    return groups


@compiled
def collect_outputs(place, num_places, end_state, pattern_rule, rule_rank, failure):
    """Say which patterns end in a state, for every state that has a place.

    place  int32[num_states]: where a state's outputs stand; 0 = it has none, or is the root. States
    that accept have places that ascend with them.
    end_state, pattern_rule  int32[num_patterns]. rule_rank int32[num_rules]: lower = more severe.
    Returns
      first_pattern int32[num_places]    head of the list of patterns that end in the state, -1
      next_pattern  int32[num_patterns]  the rest of that list
      suffix_link   int32[num_places]    place of the nearest state on the failure path with a list, or 0
      best_rule     int32[num_places]    most severe rule over list and suffix links, -1 = none
    """
    first_pattern = np.full(num_places, -1, np.int32)
    next_pattern = np.full(end_state.shape[0], -1, np.int32)
    suffix_link = np.zeros(num_places, np.int32)
    best_rule = np.full(num_places, NO_RULE, np.int32)
    for p in range(end_state.shape[0] - 1, -1, -1):
        at = place[end_state[p]]
        next_pattern[p] = first_pattern[at]
        first_pattern[at] = p
        rule = pattern_rule[p]
        if best_rule[at] < 0 or rule_rank[rule] < rule_rank[best_rule[at]]:
            best_rule[at] = rule
    for state in range(1, failure.shape[0]):
        at, link = place[state], place[failure[state]]
        if at == 0 or link == 0:
            continue
        suffix_link[at] = link if first_pattern[link] >= 0 else suffix_link[link]
        other = best_rule[link]
        if other >= 0 and (best_rule[at] < 0 or rule_rank[other] < rule_rank[best_rule[at]]):
            best_rule[at] = other
    return first_pattern, next_pattern, suffix_link, best_rule


@compiled
def pack_rows(rows, groups, label, base, separator):
    """Flatten complete rows to uint32: where the next state stands, bit 31 = a hit.

    A hot state is the start of its row in a table that begins at `base`; cold ones are numbered on
    behind the last row.

    rows   int32[num_hot, num_classes]; groups uint8[num_states]; label uint8[num_states], not read
    without separators.
    separator  class behind which a state stays where it is when another one follows, silently, or -1.
    """
    num_hot, num_classes = rows.shape
    limit = base + np.int64(num_hot) * num_classes
    packed = np.empty(num_hot * num_classes, np.uint32)
    for state in range(num_hot):
        for c in range(num_classes):
            target = np.int64(rows[state, c])
            if c == separator and state and label[state] == c:
                packed[state * num_classes + c] = base + state * num_classes
                continue
            hot = target < num_hot
            value = np.uint32(base + target * num_classes if hot else limit + target - num_hot)
            if groups[target]:
                value |= HIT
            packed[state * num_classes + c] = value
    return packed


@compiled
def pack_cold(label, children, failure, groups, num_hot, num_classes, base):
    """Records of the states from `num_hot` on: uint32[num_cold * COLD_FIELDS].

    Of each: its first child, counted from the first cold state, and in bit 31 whether the state
    itself is a hit; where its failure link leads, as in `pack_rows`; the class that leads to it, in
    the next byte the class of its first child, and above them the number of children.
    """
    num_states = label.shape[0]
    limit = base + np.int64(num_hot) * num_classes
    cold = np.empty((num_states - num_hot) * COLD_FIELDS, np.uint32)
    for state in range(num_hot, num_states):
        at = (state - num_hot) * COLD_FIELDS
        first, end = np.int64(children[state]), np.int64(children[state + 1])
        link = np.int64(failure[state])
        cold[at] = np.uint32(first - num_hot) if first < end else np.uint32(0)
        if groups[state]:
            cold[at] |= HIT
        cold[at + 1] = base + link * num_classes if link < num_hot else limit + link - num_hot
        cold[at + 2] = np.uint32(label[state]) | np.uint32((end - first) << 16)
        if first < end:
            cold[at + 2] |= np.uint32(label[first]) << np.uint32(8)
    return cold
