"""Walk slots over tokens: commit them (`advance`), try them (`peek`), or try the whole vocabulary.

All tables of all policies sit in one `Tables` tuple of flat arrays, so that one call serves a batch
whose rows follow different policies. A *track* is one automaton over one *mapping* of the text
(which normal forms, marks at word boundaries or not); a policy owns a contiguous run of tracks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streamguard_kernels.packing import borrowing, pack, unpacker
from streamguard_kernels.utf8 import (
    BEFORE_NONWORD,
    REPLACEMENT,
    map_character,
    utf8_step,
)

STATE_MASK = 0x7FFFFFFF
HIT_BIT = 0x80000000
#: What the end of a text does to its token: its own text is not read; nothing follows it.
UNSEEN, LAST = 1, 2
# Constants are passed on as np.int64(…): numba compiles a function anew for every literal it gets.


class Tables(NamedTuple):
    """Everything the kernels read; frozen after compilation.

    trans            uint32[num_entries]        next row start | bit 31 = the move completes a match
    class_of         uint8[num_tracks, 256]     byte class
    track_base       int64[num_tracks]          first entry of the track in `trans`
    track_classes    int64[num_tracks]
    track_states     int64[num_tracks]          first state of the track in the per-state arrays
    track_mapping    int64[num_tracks]
    track_start      int64[num_tracks]          state at the start of a text
    track_twin       uint8[num_tracks]          1 = same automaton as the track before it, but blind
                                                to the prompt: reads the output as a text of its own
    policy_tracks    int64[num_policies + 1]
    first_pattern    int32[num_states]          see `automaton.collect_outputs`; ids are global
    next_pattern     int32[num_patterns]
    suffix_link      int32[num_states]          local to the track
    best_rule        int32[num_states]
    groups           uint8[num_states]
    pattern_rule     int32[num_patterns]        global rule index
    pattern_length   int32[num_patterns]        mapped bytes without the leading mark of a word
    rule_rank        int32[num_rules]           lower = more severe
    token_offsets    int64[num_mappings, num_tokens + 1]   into `token_data`
    token_data       uint8[num_bytes]           mapped bytes of each token, mapping after mapping
    token_pending    uint32[num_tokens]         unfinished character at the token's end
    token_special    uint8[num_tokens]          1 = hidden from readers who skip special tokens
    raw_offsets      int64[num_tokens + 1]      the raw bytes, for tokens inside a character
    raw_data         uint8[num_raw_bytes]
    mapping_form     int64[num_mappings]        -1 = raw bytes, else a page of `page_of`
    mapping_wrap     int64[num_mappings]        1 = marks around non-word characters
    page_of          int32[num_forms, 0x1100]   see `utf8.map_character`
    entries          int32[num_pages, 256]
    map_offsets      int64[num_strings + 1]
    map_data         uint8[num_map_bytes]
    """

    trans: np.ndarray
    class_of: np.ndarray
    track_base: np.ndarray
    track_classes: np.ndarray
    track_states: np.ndarray
    track_mapping: np.ndarray
    track_start: np.ndarray
    track_twin: np.ndarray
    policy_tracks: np.ndarray
    first_pattern: np.ndarray
    next_pattern: np.ndarray
    suffix_link: np.ndarray
    best_rule: np.ndarray
    groups: np.ndarray
    pattern_rule: np.ndarray
    pattern_length: np.ndarray
    rule_rank: np.ndarray
    token_offsets: np.ndarray
    token_data: np.ndarray
    token_pending: np.ndarray
    token_special: np.ndarray
    raw_offsets: np.ndarray
    raw_data: np.ndarray
    mapping_form: np.ndarray
    mapping_wrap: np.ndarray
    page_of: np.ndarray
    entries: np.ndarray
    map_offsets: np.ndarray
    map_data: np.ndarray


_TABLES = "u b2 l l l l l b l i i i i b i i i l2 b u b l b l l i2 i2 l b"
#: Makes packed tables a `Tables` again, within a kernel.
unpack_tables = unpacker(Tables, _TABLES)


def pack_tables(tables):
    """What the kernels take in place of a `Tables`, as long as that lives: int64[29, 3]."""
    return pack(tables, _TABLES)


@borrowing
def _record(packed, track, state, best, row, events, num_events):
    """Fold the rules of an accept state into `best`; append (row, rule) events while they fit."""
    t = unpack_tables(packed)
    index = (state - t.track_base[track]) // t.track_classes[track]
    first_state = t.track_states[track]
    rule = t.best_rule[first_state + index]
    if best < 0 or t.rule_rank[rule] < t.rule_rank[best]:
        best = rule
    if events.shape[0]:
        while True:
            pattern = t.first_pattern[first_state + index]
            while pattern >= 0:
                if num_events[0] < events.shape[0]:
                    events[num_events[0], 0] = row
                    events[num_events[0], 1] = t.pattern_rule[pattern]
                num_events[0] += 1
                pattern = t.next_pattern[pattern]
            index = t.suffix_link[first_state + index]
            if index == 0:
                break
    return best


@borrowing
def _feed_mapped(packed, track, state, data, begin, end, best, row, events, num_events):
    """Walk one track over data[begin:end]; return (state, best)."""
    t = unpack_tables(packed)
    for i in range(begin, end):
        entry = np.int64(t.trans[state + t.class_of[track, data[i]]])
        state = entry & STATE_MASK
        if entry & HIT_BIT:
            best = _record(packed, track, state, best, row, events, num_events)
    return state, best


@borrowing
def _feed_character(packed, lo, hi, states, code_point, buffer, best, row, events, num_events):
    """Walk every mapped track of [lo, hi) over one character."""
    t = unpack_tables(packed)
    for track in range(lo, hi):
        mapping = t.track_mapping[track]
        form = t.mapping_form[mapping]
        if form < 0:
            continue
        n = map_character(
            code_point, t.mapping_wrap[mapping], t.page_of[form], t.entries,
            t.map_offsets, t.map_data, buffer,
        )  # fmt: skip
        states[track - lo], best = _feed_mapped(
            packed, track, states[track - lo], buffer, np.int64(0), n, best, row, events, num_events
        )
    return best


@borrowing
def feed_token(packed, lo, hi, states, pending, token, buffer, best, row, events, num_events):
    """Walk all tracks [lo, hi) of one slot over one visible token; return (pending, best).

    states  int64[hi - lo], in/out. The caller has dealt with hidden special tokens.
    """
    t = unpack_tables(packed)
    if pending == 0:
        before = np.int64(-1)
        for track in range(lo, hi):
            mapping = t.track_mapping[track]
            state = states[track - lo]
            if t.track_twin[track] and state == before:
                states[track - lo] = states[track - lo - 1]  # the twins have met
                continue
            before = state
            for i in range(t.token_offsets[mapping, token], t.token_offsets[mapping, token + 1]):
                entry = np.int64(t.trans[state + t.class_of[track, t.token_data[i]]])
                state = entry & STATE_MASK
                if entry & HIT_BIT:
                    best = _record(packed, track, state, best, row, events, num_events)
            states[track - lo] = state
        return np.int64(t.token_pending[token]), best
    begin, end = t.raw_offsets[token], t.raw_offsets[token + 1]
    for track in range(lo, hi):
        if t.mapping_form[t.track_mapping[track]] < 0:
            states[track - lo], best = _feed_mapped(
                packed,
                track,
                states[track - lo],
                t.raw_data,
                begin,
                end,
                best,
                row,
                events,
                num_events,
            )
    for i in range(begin, end):
        pending, broken, code_point = utf8_step(pending, np.int64(t.raw_data[i]))
        if broken:
            best = _feed_character(
                packed, lo, hi, states, np.int64(REPLACEMENT), buffer, best, row, events, num_events
            )
        if code_point >= 0:
            best = _feed_character(
                packed, lo, hi, states, code_point, buffer, best, row, events, num_events
            )
    return pending, best


@borrowing
def feed_end(packed, lo, hi, states, pending, buffer, best, row, events, num_events):
    """Tell all tracks that the text ends here: an unfinished character breaks, a word closes."""
    t = unpack_tables(packed)
    if pending != 0:
        best = _feed_character(
            packed, lo, hi, states, np.int64(REPLACEMENT), buffer, best, row, events, num_events
        )
    for track in range(lo, hi):
        mapping = t.track_mapping[track]
        if t.mapping_form[mapping] >= 0 and t.mapping_wrap[mapping]:
            buffer[0] = BEFORE_NONWORD
            states[track - lo], best = _feed_mapped(
                packed, track, states[track - lo], buffer, np.int64(0), np.int64(1), best, row, events,
                num_events,
            )  # fmt: skip
    return best


@borrowing
def in_range(slots, tokens, num_slots, num_tokens):
    """Whether all slots and tokens (int64[num_rows] each) exist: one call, where numpy needs four."""
    for row in range(slots.shape[0]):  # noqa: SIM110  (numba compiles no generators here)
        if not (0 <= slots[row] < num_slots and 0 <= tokens[row] < num_tokens):
            return False
    return True


@borrowing
def _end_bits(token, slot, row, last, end_tokens, end_bits):
    ends = np.int64(0)
    for i in range(end_tokens.shape[1]):
        if end_tokens[slot, i] == token:
            ends = np.int64(end_bits[slot])
            break
        if end_tokens[slot, i] < 0:
            break
    if last.shape[0] and last[row]:
        ends |= LAST
    return ends


@borrowing
def advance_kernel(
    packed, slots, tokens, last, policy, hidden, end_tokens, end_bits, state, pending, best, events,
    num_events, buffer, scratch,
):  # fmt: skip
    """Walk each slot over its newest token and commit; tokens of one slot may follow in order.

    One table read per byte: failure links are folded into `trans`, so the cost follows bytes fed,
    not the number of patterns.

    packed   the `Tables`, packed. slots, tokens int64[num_rows].
    last     uint8[num_rows] or empty: 1 = the text ends after this token, whatever it is.
    policy   int64[num_slots], -1 = not guarded; hidden uint8[num_slots], 1 = special tokens unseen.
    end_tokens int64[num_slots, width], filled up with -1: tokens that end the slot's text;
    end_bits uint8[num_slots]: UNSEEN and LAST as they hold for such a token.
    state    int64[num_slots, max_tracks], in/out; pending int64[num_slots], in/out.
    best     int64[num_rows], out: most severe rule that completed, -1 = none.
    events   int64[capacity, 2], out: (row, rule) of every pattern that completed; num_events
             int64[1], in/out, counts also those beyond the capacity. Capacity 0 = not wanted.
    buffer   uint8[MAX_MAPPED_BYTES], scratch int64[max_tracks]: work space.

    Unchecked: ids are in range; `Session` validates once per batch and raises ShapeError.
    """
    t = unpack_tables(packed)
    for row in range(slots.shape[0]):
        slot = slots[row]
        rule = np.int64(-1)
        p = policy[slot]
        if p >= 0:
            lo, hi = t.policy_tracks[p], t.policy_tracks[p + 1]
            token = tokens[row]
            states = state[slot]
            at = pending[slot]
            ends = _end_bits(token, slot, row, last, end_tokens, end_bits)
            if (ends & UNSEEN) == 0 and not (hidden[slot] and t.token_special[token]):
                at, rule = feed_token(
                    packed, lo, hi, states, at, token, buffer, rule, row, events, num_events
                )
            if ends & LAST:
                rule = feed_end(packed, lo, hi, states, at, buffer, rule, row, events, num_events)
                at = 0
            pending[slot] = at
        best[row] = rule


@borrowing
def peek_kernel(
    packed, slots, tokens, last, policy, hidden, end_tokens, end_bits, state, pending, best, events,
    num_events, buffer, scratch,
):  # fmt: skip
    """Say what `advance_kernel` would find; commit nothing. Same arguments; state is read only.

    A token of -1 is none at all: with last = 1 it asks what the end of the text would complete.
    """
    t = unpack_tables(packed)
    for row in range(slots.shape[0]):
        slot = slots[row]
        rule = np.int64(-1)
        p = policy[slot]
        if p >= 0:
            lo, hi = t.policy_tracks[p], t.policy_tracks[p + 1]
            token = tokens[row]
            for i in range(hi - lo):
                scratch[i] = state[slot, i]
            at = pending[slot]
            ends = _end_bits(token, slot, row, last, end_tokens, end_bits)
            if (
                token >= 0
                and (ends & UNSEEN) == 0
                and not (hidden[slot] and t.token_special[token])
            ):
                at, rule = feed_token(
                    packed, lo, hi, scratch, at, token, buffer, rule, row, events, num_events
                )
            if ends & LAST:
                rule = feed_end(packed, lo, hi, scratch, at, buffer, rule, row, events, num_events)
        best[row] = rule
