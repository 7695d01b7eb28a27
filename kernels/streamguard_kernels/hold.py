"""How much of a text may still become part of a match: hold-back from automaton states."""

from __future__ import annotations

import numpy as np

from streamguard_kernels.automaton import COLD_FIELDS
from streamguard_kernels.compiled import compiled
from streamguard_kernels.tables import (
    STATE_MASK,
    output_place,
    state_number,
    state_of,
    unpack_tables,
)

#: In place of a hold depth: nothing is known of where a live partial match of this state begins.
UNKNOWN = -1


@compiled
def hold_depths(packed, track, withholds, depths):
    """Say for every state of one Aho-Corasick track how many mapped bytes may still begin a match.

    That is the longest suffix of the text that is a proper prefix of a pattern of a rule with
    `withholds` set: the state's own depth if such a pattern goes on from it, else what its failure
    link holds. Depth and failure links are read off the folded table: a move leads one level deeper
    only along the trie.

    withholds    uint8[num_rules].
    depths       int32[num_states], out; num_states is less than that of `Tables` by quiet copies that
                 a packed track does not list. Cost: two passes over the track's rows.
    """
    t = unpack_tables(packed)
    base, num_classes = t.track_base[track], t.track_classes[track]
    # The mark at the front of a word is no part of its match.
    lead = np.int64(t.mapping_wrap[t.track_mapping[track]])
    num_states, num_hot = depths.shape[0], (t.track_limit[track] - base) // num_classes
    parent = np.full(num_states, -1, np.int32)
    failure = np.zeros(num_states, np.int32)
    live = np.zeros(num_states, np.uint8)
    depths[0] = 0
    parent[0] = 0
    for state in range(num_states):  # numbered by depth: a parent comes before its children
        if state >= num_hot:
            at = COLD_FIELDS * (t.track_cold[track] + state - num_hot)
            first = num_hot + np.int64(t.cold[at] & STATE_MASK)
            failure[state] = state_number(packed, track, np.int64(t.cold[at + 1]))
            for child in range(first, first + np.int64(t.cold[at + 2] >> 16)):
                parent[child] = state
                depths[child] = depths[state] + 1
            continue
        row = base + state * num_classes
        for c in range(num_classes):
            child = state_number(packed, track, np.int64(t.trans[row + c] & STATE_MASK))
            if parent[child] < 0:
                parent[child] = state
                depths[child] = depths[state] + 1
                if state != 0 and child < num_hot:
                    behind = t.trans[base + np.int64(failure[state]) * num_classes + c]
                    failure[child] = state_number(packed, track, np.int64(behind & STATE_MASK))
    for state in range(num_states - 1, 0, -1):
        if parent[state] < 0:
            continue  # a quiet copy: nothing leads there
        goes_on = live[state] != 0
        place = t.track_places[track] + output_place(
            packed, track, state_of(packed, track, np.int64(state))
        )
        pattern = t.first_pattern[place] if place > t.track_places[track] else np.int32(-1)
        while pattern >= 0 and not goes_on:
            goes_on = withholds[t.pattern_rule[pattern]] != 0
            pattern = t.next_pattern[pattern]
        if goes_on:
            live[parent[state]] = 1
    for state in range(num_states):
        if state == 0:
            depths[state] = 0
        elif live[state]:
            depths[state] = max(depths[state] - lead, 0)
        else:
            depths[state] = depths[failure[state]]
