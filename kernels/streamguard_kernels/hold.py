"""How much of a text may still become part of a match: hold-back from automaton states."""

from __future__ import annotations

import numpy as np

from streamguard_kernels.advance import STATE_MASK
from streamguard_kernels.compiled import compiled

#: In place of a hold depth: nothing is known of where a live partial match of this state begins.
UNKNOWN = -1


@compiled
def hold_depths(trans, base, num_classes, ends, lead, depths):
    """Say for every state of one Aho-Corasick track how many mapped bytes may still begin a match.

    That is the longest suffix of the text that is a proper prefix of a pattern with `ends` set: the
    state's own depth if such a pattern goes on from it, else what its failure link holds. Depth and
    failure links are read off the folded table: a move leads one level deeper only along the trie.

    trans        uint32[], the track's rows begin at `base`, one of num_classes entries a state.
    ends         uint8[num_states]: 1 = a pattern that counts ends in this very state.
    lead         bytes at the front of each pattern that are no part of its match (the mark of a word).
    depths       int32[num_states], out. Cost: two passes over the track's rows.
    """
    num_states = ends.shape[0]
    parent = np.full(num_states, -1, np.int32)
    failure = np.zeros(num_states, np.int32)
    live = np.zeros(num_states, np.uint8)
    depths[0] = 0
    parent[0] = 0
    for state in range(num_states):  # numbered by depth: a parent comes before its children
        row = base + state * num_classes
        for c in range(num_classes):
            child = (np.int64(trans[row + c] & STATE_MASK) - base) // num_classes
            if parent[child] < 0:
                parent[child] = state
                depths[child] = depths[state] + 1
                if state != 0:
                    behind = base + np.int64(failure[state]) * num_classes + c
                    failure[child] = (np.int64(trans[behind] & STATE_MASK) - base) // num_classes
    for state in range(num_states - 1, 0, -1):
        if parent[state] >= 0 and (ends[state] or live[state]):  # to quiet states nothing leads
            live[parent[state]] = 1
    for state in range(num_states):
        if state == 0:
            depths[state] = 0
        elif live[state]:
            depths[state] = max(depths[state] - lead, 0)
        else:
            depths[state] = depths[failure[state]]
