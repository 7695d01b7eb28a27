"""What is known of each token before any text is seen: where it leads from the root, and which tokens
bring every track of a policy there from behind which others. `advance` says how it is used.
"""

from __future__ import annotations

import numpy as np

from streamguard_kernels.compiled import compiled
from streamguard_kernels.tables import (
    HIT_BIT,
    STATE_MASK,
    move,
    unpack_tables,
)
from streamguard_kernels.utf8 import (
    CHARACTERS,
    MAX_MAPPED_BYTES,
    NUM_PREFIXES,
    map_character,
    prefix_number,
    utf8_step,
)


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
def walk_characters(packed, track, width):
    """As `walk_tokens` and `first_classes`, for the first characters, each as a text of its own.

    Returns states int64[CHARACTERS]: bit 31 = it completes a match or is a surrogate; and classes
    int16[CHARACTERS, width], -1 = there is none.
    """
    t = unpack_tables(packed)
    form = t.mapping_form[t.track_mapping[track]]
    page_of = t.page_of[form * 0x1100 : (form + 1) * 0x1100]
    buffer = np.zeros(MAX_MAPPED_BYTES, np.uint8)
    states = np.full(CHARACTERS, HIT_BIT, np.int64)
    classes = np.full((CHARACTERS, width), -1, np.int16)
    for code_point in range(CHARACTERS):
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
def continue_characters():
    """What each further byte makes of an unfinished character: int64[NUM_PREFIXES, 64].

    By the low bits of the byte: a code point; -1 = it breaks the character, or there is none of this
    number; less: it takes more of them, and this is -1 - `number_prefixes` of it.
    """
    behind = np.full((NUM_PREFIXES, 64), -1, np.int64)
    found = [utf8_step(0, lead)[0] for lead in range(0xC2, 0xF5)]
    while len(found):
        pending = found.pop()
        number = prefix_number(pending)
        if number >= NUM_PREFIXES:
            continue
        for low in range(64):
            longer, broken, code_point = utf8_step(pending, 0x80 | low)
            if code_point >= 0:
                behind[number, low] = code_point if not broken else -1
            elif not broken and prefix_number(longer) < NUM_PREFIXES:
                behind[number, low] = -2 - prefix_number(longer)
                found.append(longer)
    return behind


@compiled
def number_prefixes(pending):
    """1 + `prefix_number` of each unfinished character, 0 = there is none: int64[num_tokens]."""
    numbers = np.zeros(pending.shape[0], np.int64)
    for token in range(pending.shape[0]):
        if pending[token]:
            numbers[token] = 1 + prefix_number(np.int64(pending[token]))
    return numbers


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
    """Where classes lead from each state: int64[num_rows, num_columns], -1 = they complete a match.

    states int64[num_rows]; classes int64[num_columns, width]: read in turn, up to the first -1.
    """
    steps = np.full((states.shape[0], classes.shape[0]), -1, np.int64)
    for row in range(states.shape[0]):
        for column in range(classes.shape[0]):
            state = states[row]
            for k in range(classes.shape[1]):
                if classes[column, k] < 0:
                    break
                entry = np.int64(move(packed, track, state, classes[column, k]))
                if entry & HIT_BIT:
                    state = np.int64(-1)
                    break
                state = entry
            steps[row, column] = state
    return steps
