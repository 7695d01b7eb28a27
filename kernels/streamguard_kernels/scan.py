"""Find every match in a byte stream, with its place in the raw bytes, in chunks of any size."""

from __future__ import annotations

import numpy as np

from streamguard_kernels.advance import HIT_BIT, STATE_MASK
from streamguard_kernels.compiled import compiled
from streamguard_kernels.utf8 import (
    BEFORE_NONWORD,
    MAX_MAPPED_BYTES,
    REPLACEMENT,
    SEPARATOR_BYTE,
    map_character,
    utf8_step,
)


@compiled
def most_matches_per_byte(first_pattern, next_pattern, suffix_link):
    """Most patterns that can end at one mapped byte of one automaton (arrays of that automaton)."""
    chain = np.zeros(first_pattern.shape[0], np.int64)
    longest = 0
    for state in range(first_pattern.shape[0]):
        count = 0 if state == 0 else chain[suffix_link[state]]
        pattern = first_pattern[state]
        while pattern >= 0:
            count += 1
            pattern = next_pattern[pattern]
        chain[state] = count
        longest = max(longest, count)
    return longest


@compiled
def scan_kernel(
    t, lo, hi, data, raw_position, states, positions, ring, newest, pending, found, final, reserve
):
    """Walk the tracks [lo, hi) over a stretch of raw bytes and report every match with its place.

    data          uint8[num_bytes]: the next raw bytes; raw_position is the offset of data[0].
    states        int64[hi - lo], in/out. positions int64[hi - lo], in/out: mapped bytes fed so far.
    ring          int64[hi - lo, size], in/out: raw start of each recent mapped byte; size is a power
                  of two above twice the longest pattern.
    newest        int64[hi - lo, 2], in/out: the last mapped byte that is no mark, and the raw end of
                  the last one that is neither a mark nor a separator that parts words.
    pending       int64[2], in/out: unfinished character, raw offset of its first byte.
    found         int64[capacity, 4], out: known-at (raw offset whose byte made it certain), end,
                  rule, start (-1 = not known: a regex).
    final         1 = the text ends after `data`.
    reserve       room in `found` that one byte can need; scanning stops before less is left.
    Returns (bytes consumed, number of matches).
    """
    buffer = np.empty(MAX_MAPPED_BYTES, np.uint8)
    size = ring.shape[1]
    count = 0
    at = pending[0]
    began = pending[1]
    consumed = 0
    for i in range(data.shape[0] + final):
        if count + reserve > found.shape[0]:
            break
        ending = i == data.shape[0]
        here = raw_position + i
        if ending:
            before, char_start = at, here
            broken, code_point = (1 if at != 0 else 0), -1
            at = 0
        else:
            byte = np.int64(data[i])
            before = at
            at, broken, code_point = utf8_step(at, byte)
            if before == 0 or broken:
                char_start = here
            else:
                char_start = began
        for track in range(lo, hi):
            mapping = t.track_mapping[track]
            form = t.mapping_form[mapping]
            wrap = t.mapping_wrap[mapping]
            separators = t.mapping_shrinks[mapping] & 1
            k = track - lo
            if t.track_twin[track]:
                continue
            for turn in range(3):
                # turn 0: a broken character before this byte; 1: the byte or character itself;
                # 2: the end of the text. [first, last) is its stretch of raw bytes.
                n = 0
                if turn == 0 and broken and form >= 0:
                    first, last = began, here
                    n = map_character(
                        REPLACEMENT,
                        t.page_of[form],
                        t.entries,
                        t.map_offsets,
                        t.map_data,
                        buffer,
                    )
                elif turn == 1 and form < 0 and not ending:
                    first, last = here, here + 1
                    buffer[0] = data[i]
                    n = 1
                elif turn == 1 and form >= 0 and code_point >= 0:
                    first, last = char_start, here + 1
                    n = map_character(
                        code_point,
                        t.page_of[form],
                        t.entries,
                        t.map_offsets,
                        t.map_data,
                        buffer,
                    )
                elif turn == 2 and ending and form >= 0 and wrap:
                    first, last = here, here
                    buffer[0] = BEFORE_NONWORD
                    n = 1
                for j in range(n):
                    mark = buffer[j] >= 0xFE and form >= 0
                    parts = separators and buffer[j] == SEPARATOR_BYTE
                    if parts and newest[k, 0] == SEPARATOR_BYTE:
                        continue  # the automaton would stay where it is
                    if not mark:
                        newest[k, 0] = buffer[j]
                    # A mark or a separator that ends a match is no part of it.
                    end = newest[k, 1] if mark or parts else last
                    newest[k, 1] = end
                    ring[k, positions[k] & (size - 1)] = first
                    positions[k] += 1
                    entry = np.int64(t.trans[states[k] + t.class_of[track, buffer[j]]])
                    states[k] = entry & STATE_MASK
                    if entry & HIT_BIT:
                        index = (states[k] - t.track_base[track]) // t.track_classes[track]
                        first_state = t.track_places[track]
                        while True:  # the patterns of this state and of its suffixes
                            pattern = t.first_pattern[first_state + index]
                            while pattern >= 0:
                                length = t.pattern_length[pattern]
                                found[count, 0] = here
                                found[count, 1] = end if length >= 0 else first
                                found[count, 2] = t.pattern_rule[pattern]
                                found[count, 3] = -1
                                if length > 0:
                                    found[count, 3] = ring[k, (positions[k] - length) & (size - 1)]
                                count += 1
                                pattern = t.next_pattern[pattern]
                            index = t.suffix_link[first_state + index]
                            if index == 0:
                                break
        if at != 0 and not ending and (code_point < 0) and (before == 0 or broken):
            began = here
        consumed += 1
    pending[0] = at
    pending[1] = began
    return consumed, count
