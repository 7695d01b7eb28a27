"""What is known of each token before any text is seen: where it leads from the root, and which tokens
bring every track of a policy there from behind which others. `advance` says how it is used.
"""

from __future__ import annotations

import numpy as np

from streamguard_kernels.compiled import compiled
from streamguard_kernels.tables import HIT_BIT, STATE_MASK, move, unpack_tables
from streamguard_kernels.utf8 import MAX_MAPPED_BYTES, map_character


@compiled
def walk_tokens(packed, track, walks):
    """Fill in `token_walk` of one track; see `Tables`. walks int64[num_tokens, num_tracks], out."""
    t = unpack_tables(packed)
    num_tokens = t.token_special.shape[0]
    for token in range(num_tokens):
        state = np.int64(t.track_base[track])
        at = t.track_mapping[track] * (num_tokens + 1) + token
        begin, end = t.token_offsets[at], t.token_offsets[at + 1]
        plain = not t.token_special[token] and begin < end
        hit = np.int64(0) if plain else np.int64(HIT_BIT)
        for i in range(begin, end):
            class_ = t.class_of[track * 256 + t.token_data[i]]
            entry = np.int64(move(packed, track, state, class_))
            state = entry & STATE_MASK
            hit |= entry & HIT_BIT
        walks[token, track] = state | hit
        if begin < end:
            walks[token, track] |= np.int64(t.class_of[track * 256 + t.token_data[begin]]) << 32


@compiled
def first_classes(packed, track, tokens, width):
    """Classes of the first mapped bytes of each token: int64[num_tokens, width], -1 = there is none."""
    t = unpack_tables(packed)
    classes = np.full((tokens.shape[0], width), -1, np.int64)
    for i in range(tokens.shape[0]):
        at = t.track_mapping[track] * (t.token_special.shape[0] + 1) + tokens[i]
        begin, end = t.token_offsets[at], t.token_offsets[at + 1]
        for k in range(min(end - begin, width)):
            classes[i, k] = t.class_of[track * 256 + t.token_data[begin + k]]
    return classes


@compiled
def walk_characters(packed, track, num_characters, width):
    """As `walk_tokens` and `first_classes`, for the first characters, each as a text of its own.

    Returns states int64[num_characters]: bit 31 = it completes a match or is a surrogate; and classes
    int64[num_characters, width], -1 = there is none.
    """
    t = unpack_tables(packed)
    form = t.mapping_form[t.track_mapping[track]]
    page_of = t.page_of[form * 0x1100 : (form + 1) * 0x1100]
    buffer = np.zeros(MAX_MAPPED_BYTES, np.uint8)
    states = np.full(num_characters, HIT_BIT, np.int64)
    classes = np.full((num_characters, width), -1, np.int64)
    for code_point in range(num_characters):
        if 0xD800 <= code_point < 0xE000:
            continue
        n = map_character(code_point, page_of, t.entries, t.map_offsets, t.map_data, buffer)
        state, hit = np.int64(t.track_base[track]), np.int64(0)
        for i in range(n):
            class_ = np.int64(t.class_of[track * 256 + buffer[i]])
            entry = np.int64(move(packed, track, state, class_))
            state = entry & STATE_MASK
            hit |= entry
            if i < width:
                classes[code_point, i] = class_
        states[code_point] = state | hit & HIT_BIT
    return states, classes


@compiled
def find_calm(packed, track, states, classes):
    """The bits of `Tables.calm` as far as one track is concerned: uint32[num_rows, num_words].

    states int64[num_rows]; classes int64[num_columns, width]: from `first_classes`.
    """
    t = unpack_tables(packed)
    calm = np.zeros((states.shape[0], (classes.shape[0] + 31) // 32), np.uint32)
    for column in range(classes.shape[0]):
        for row in range(states.shape[0]):
            state, root = states[row], t.track_base[track]
            for k in range(classes.shape[1]):
                if classes[column, k] < 0:
                    break
                entry = move(packed, track, state, classes[column, k])
                if entry >> 31:
                    break
                state = np.int64(entry)
                root = np.int64(move(packed, track, root, classes[column, k])) & STATE_MASK
                if state == root:
                    calm[row, column >> 5] |= np.uint32(1 << (column & 31))
                    break
    return calm


@compiled
def find_steps(packed, track, states, classes):
    """Where one class leads from each state: int64[num_rows, num_classes], -1 = it completes a match.

    states int64[num_rows]; classes int64[num_classes].
    """
    steps = np.full((states.shape[0], classes.shape[0]), -1, np.int64)
    for row in range(states.shape[0]):
        for column in range(classes.shape[0]):
            entry = np.int64(move(packed, track, states[row], classes[column]))
            if entry & HIT_BIT == 0:
                steps[row, column] = entry
    return steps
