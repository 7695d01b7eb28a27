"""Walk slots over tokens, to commit them or only to see what they would complete.

All tables of all policies sit in one `Tables` tuple of flat arrays, so that one call serves a batch
whose rows follow different policies. A *track* is one automaton over one *mapping* of the text
(which normal forms, marks at word boundaries or not); a policy owns a contiguous run of tracks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streamguard_kernels.automaton import COLD_FIELDS
from streamguard_kernels.compiled import borrowing, compiled
from streamguard_kernels.packing import pack, unpacker
from streamguard_kernels.utf8 import (
    BEFORE_NONWORD,
    REPLACEMENT,
    SEPARATOR_BYTE,
    map_character,
    utf8_step,
)

STATE_MASK = 0x7FFFFFFF
HIT_BIT = 0x80000000
#: What the end of a text does to its token: its own text is not read; nothing follows it.
UNSEEN, LAST = 1, 2
#: Places in the `call` of `walk_kernel`, after the two addresses.
COMMIT, ENDS, FIRST, SILENT = 2, 3, 4, 5
# Constants are passed on as np.int64(…): numba compiles a function anew for every literal it gets.


class Tables(NamedTuple):
    """Everything the kernels read; frozen after compilation. Packed, it holds flat arrays only.

    trans            uint32[num_entries]        state behind the move | bit 31 = it completes a match;
                                                a state is where its row of `trans` begins
    cold             uint32[num_cold * 3]       records of the states that have no row: see
                                                `automaton.pack_cold` and `track_limit`
    class_of         uint8[num_tracks, 256]     byte class
    track_base       int64[num_tracks]          first entry of the track in `trans`
    track_classes    int64[num_tracks]
    track_limit      int64[num_tracks]          end of its rows. A state from here on is cold, and
                                                counts the records behind `track_cold`; behind the
                                                last it is the quiet copy of the state of that number
    track_cold       int64[num_tracks]          its first record
    track_num_cold   int64[num_tracks]          0 = the layout is dense, else packed
    track_places     int64[num_tracks]          where the track's outputs begin: one place a state if
                                                dense; if packed, one for none and then one for each
                                                accept state, listed in `accepts`
    track_accepts    int64[num_tracks, 2]       its stretch of `accepts`
    accepts          int32[num_accepts]         numbers of accept states, ascending
    track_mapping    int64[num_tracks]
    track_start      int64[num_tracks]          state at the start of a text
    track_twin       uint8[num_tracks]          1 = same automaton as the track before it, but blind
                                                to the prompt: reads the output as a text of its own
    policy_tracks    int64[num_policies + 1]
    first_pattern    int32[num_places]          see `automaton.collect_outputs`; ids are global
    next_pattern     int32[num_patterns]
    suffix_link      int32[num_places]          local to the track
    best_rule        int32[num_places]
    groups           uint8[num_places]
    quiet            int32[num_places]          dense only: the state's copy for the end of a prompt,
                                                0 = none: there the mark behind a word completes
                                                nothing; of regex tracks: -1 = no match is under way
    pattern_rule     int32[num_patterns]        global rule index
    pattern_length   int32[num_patterns]        mapped bytes without the leading mark of a word;
                                                0 = unknown, -1 = that too, and the match ended
                                                before the character that this byte begins
    rule_rank        int32[num_rules]           lower = more severe
    token_offsets    int32[num_mappings, num_tokens + 1]   into `token_data`
    token_data       uint8[num_bytes]           mapped bytes of each token, mapping after mapping
    token_walk       int64[num_tokens, num_tracks]    state behind the token, read from the root;
                                                bit 31 = look closer: it completes a match, is
                                                special or empty, or ends inside a character; from
                                                bit 32 on the class of its first mapped byte
    token_sync       int64[num_policies, num_tokens]  all tracks of a policy at once: where in `calm`
                                                the row of the states behind the token begins; from
                                                bit 32 on the column of its first classes; -1 = look
                                                closer, in any track
    calm             uint8[num_calm]            bits: whether from the states of a row the classes of a
                                                column lead all tracks where they lead from the root,
                                                and complete nothing; then so does all that follows
    token_pending    uint32[num_tokens]         unfinished character at the token's end
    token_special    uint8[num_tokens]          1 = hidden from readers who skip special tokens
    raw_offsets      int64[num_tokens + 1]      the raw bytes, for tokens inside a character
    raw_data         uint8[num_raw_bytes]
    mapping_form     int64[num_mappings]        -1 = raw bytes, else a row of `page_of`
    mapping_wrap     int64[num_mappings]        1 = marks around non-word characters
    mapping_shrinks  int64[num_mappings]        bit 0: runs of SEPARATOR_BYTE are read as one;
                                                bit 1: characters may map to nothing
    page_of          int32[num_forms, 0x1100]   see `utf8.map_character`
    entries          int32[num_pages * 256]
    map_offsets      int64[num_strings + 1]
    map_data         uint8[num_map_bytes]
    track_regex      uint8[num_tracks]          1 = made from regexes: see `regex_masks`
    """

    trans: np.ndarray
    cold: np.ndarray
    class_of: np.ndarray
    track_base: np.ndarray
    track_classes: np.ndarray
    track_limit: np.ndarray
    track_cold: np.ndarray
    track_num_cold: np.ndarray
    track_places: np.ndarray
    track_accepts: np.ndarray
    accepts: np.ndarray
    track_mapping: np.ndarray
    track_start: np.ndarray
    track_twin: np.ndarray
    policy_tracks: np.ndarray
    first_pattern: np.ndarray
    next_pattern: np.ndarray
    suffix_link: np.ndarray
    best_rule: np.ndarray
    groups: np.ndarray
    quiet: np.ndarray
    pattern_rule: np.ndarray
    pattern_length: np.ndarray
    rule_rank: np.ndarray
    token_offsets: np.ndarray
    token_data: np.ndarray
    token_walk: np.ndarray
    token_sync: np.ndarray
    calm: np.ndarray
    token_pending: np.ndarray
    token_special: np.ndarray
    raw_offsets: np.ndarray
    raw_data: np.ndarray
    mapping_form: np.ndarray
    mapping_wrap: np.ndarray
    mapping_shrinks: np.ndarray
    page_of: np.ndarray
    entries: np.ndarray
    map_offsets: np.ndarray
    map_data: np.ndarray
    track_regex: np.ndarray


_TABLES = "u u b l l l l l l l i l l b l i i i i b i i i i i b l l b u b l b l l l i i l b b"
#: Makes packed tables a `Tables` again, within a kernel.
unpack_tables = unpacker(Tables, _TABLES)


def pack_tables(tables):
    """The addresses of a `Tables` whose own address kernels take: int64[41, 2]; see `pack`."""
    return pack(tables, _TABLES)


class Slots(NamedTuple):
    """What changes while texts go on. `Session` owns it.

    policy      int64[num_slots]              -1 = not guarded
    plain       uint8[num_slots]              1 = guarded, and only special tokens end the text
    hidden      uint8[num_slots]              1 = the reader does not see special tokens
    end_tokens  int64[num_slots, num_ends]    tokens that end the slot's text; filled up with -1
    end_bits    uint8[num_slots]              UNSEEN and LAST as they hold for such a token
    state       int64[num_slots, max_tracks]  not up to date where the next says something; `settle`
    synced      int64[num_slots]              the states are those of `token_walk` behind this token;
                                              from bit 32 on their row in `calm`; -1 = `state` holds
    pending     int64[num_slots]              unfinished character, see `utf8`
    events      int64[capacity, 2]            (row, rule) of every pattern that completed
    num_events  int64[1]                      counts also those beyond the capacity
    buffer      uint8[MAX_MAPPED_BYTES]       work space
    scratch     int64[max_tracks]             work space
    row_last    uint8[most_rows]              1 = the text ends after the row's token, whatever it is
    best        int64[most_rows]              1 + the most severe rule that completed, 0 = none
    """

    policy: np.ndarray
    plain: np.ndarray
    hidden: np.ndarray
    end_tokens: np.ndarray
    end_bits: np.ndarray
    state: np.ndarray
    synced: np.ndarray
    pending: np.ndarray
    events: np.ndarray
    num_events: np.ndarray
    buffer: np.ndarray
    scratch: np.ndarray
    row_last: np.ndarray
    best: np.ndarray


_SLOTS = "l b b l b l l l l l b l b l"
#: Makes packed slots a `Slots` of flat arrays again, within a kernel.
unpack_slots = unpacker(Slots, _SLOTS)


def pack_slots(slots):
    """The addresses of a `Slots` whose own address kernels take: int64[14, 2]; see `pack`."""
    return pack(slots, _SLOTS)


@borrowing
def move(packed, track, state, class_):
    """Where a byte of a class leads from a state: an entry as in `Tables.trans`, uint32."""
    t = unpack_tables(packed)
    if state < t.track_limit[track]:
        return t.trans[state + class_]
    return _move_cold(packed, np.int64(track), np.int64(state), np.int64(class_))


@borrowing
def _move_cold(packed, track, state, class_):
    """`move` from a cold state: to a child, or by failure links to where there is one, or a row."""
    t = unpack_tables(packed)
    limit, num_cold, first = t.track_limit[track], t.track_num_cold[track], t.track_cold[track]
    mapping = t.track_mapping[track]
    separator = np.int64(-1)
    if t.mapping_shrinks[mapping] & 1:
        separator = np.int64(t.class_of[track * 256 + SEPARATOR_BYTE])
    heard = np.uint32(0xFFFFFFFF)
    if state - limit >= num_cold:
        if class_ == separator or class_ == t.class_of[track * 256 + BEFORE_NONWORD]:
            heard = np.uint32(STATE_MASK)
        state = state_of(packed, track, state - limit - num_cold)
    while state >= limit:
        at = COLD_FIELDS * (first + state - limit)
        shape = np.int64(t.cold[at + 2])
        if class_ == separator and shape & 0xFF == separator:
            return np.uint32(state)
        child = np.int64(t.cold[at] & STATE_MASK)
        count = shape >> 16
        found = count > 0 and (shape >> 8) & 0xFF == class_
        while not found and count > 1:
            child += 1
            count -= 1
            found = t.cold[COLD_FIELDS * (first + child) + 2] & 0xFF == class_
        if found:
            hit = t.cold[COLD_FIELDS * (first + child)] & np.uint32(HIT_BIT)
            return (np.uint32(limit + child) | hit) & heard
        state = np.int64(t.cold[at + 1])
    return t.trans[state + class_] & heard


@borrowing
def state_of(packed, track, number):
    """The state of a number, counted from the root by depth; not one of a quiet copy."""
    t = unpack_tables(packed)
    limit, base = t.track_limit[track], t.track_base[track]
    num_hot = (limit - base) // t.track_classes[track]
    if number < num_hot:
        return base + number * t.track_classes[track]
    return limit + number - num_hot


@borrowing
def state_number(packed, track, state):
    """The number of a state, counted from the root by depth; quiet copies come behind all others."""
    t = unpack_tables(packed)
    limit, base = t.track_limit[track], t.track_base[track]
    if state < limit:
        return (state - base) // t.track_classes[track]
    return (limit - base) // t.track_classes[track] + state - limit


@borrowing
def is_quiet(packed, track, state):
    """Whether a state is the quiet copy of another one in a packed track."""
    t = unpack_tables(packed)
    num_cold = t.track_num_cold[track]
    return num_cold > 0 and state - t.track_limit[track] >= num_cold


@borrowing
def output_place(packed, track, state):
    """Where a state's outputs stand, counted from `track_places`; 0 = it has none."""
    t = unpack_tables(packed)
    number = state_number(packed, track, state)
    if t.track_num_cold[track] == 0:
        return number
    begin, end = t.track_accepts[2 * track], t.track_accepts[2 * track + 1]
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        if t.accepts[middle] < number:
            low = middle + 1
        else:
            high = middle
    return low - begin + 1 if low < end and t.accepts[low] == number else np.int64(0)


@borrowing
def _record(packed, packed_slots, track, state, best, row):
    """Fold the rules of an accept state into `best`; append (row, rule) events while they fit."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    index = output_place(packed, track, state)
    first_place = t.track_places[track]
    rule = np.int64(t.best_rule[first_place + index])
    if best < 0 or t.rule_rank[rule] < t.rule_rank[best]:
        best = rule
    if row < 0:
        return best
    while True:
        pattern = t.first_pattern[first_place + index]
        while pattern >= 0:
            at = 2 * s.num_events[0]
            if at < s.events.shape[0]:
                s.events[at] = row
                s.events[at + 1] = t.pattern_rule[pattern]
            s.num_events[0] += 1
            pattern = t.next_pattern[pattern]
        index = np.int64(t.suffix_link[first_place + index])
        if index == 0:
            break
    return best


@borrowing
def _feed_mapped(packed, packed_slots, track, state, data, begin, end, best, row):
    """Walk one track over data[begin:end]; return (state, best)."""
    t = unpack_tables(packed)
    for i in range(begin, end):
        entry = np.int64(move(packed, track, state, t.class_of[track * 256 + data[i]]))
        state = entry & STATE_MASK
        if entry & HIT_BIT:
            best = _record(packed, packed_slots, track, state, best, row)
    return state, best


@borrowing
def _feed_character(packed, packed_slots, lo, hi, code_point, best, row):
    """Walk every mapped track of [lo, hi) over one character."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    for track in range(lo, hi):
        mapping = t.track_mapping[track]
        form = t.mapping_form[mapping]
        if form < 0:
            continue
        n = map_character(
            code_point, t.page_of[form * 0x1100 : (form + 1) * 0x1100],
            t.entries, t.map_offsets, t.map_data, s.buffer,
        )  # fmt: skip
        s.scratch[track - lo], best = _feed_mapped(
            packed, packed_slots, track, s.scratch[track - lo], s.buffer, np.int64(0), n, best, row
        )
    return best


@borrowing
def _feed_bytes(packed, packed_slots, lo, hi, pending, token, best, row):
    """Walk all tracks over a token that begins inside a character; return (pending, best)."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    begin, end = t.raw_offsets[token], t.raw_offsets[token + 1]
    for track in range(lo, hi):
        if t.mapping_form[t.track_mapping[track]] < 0:
            s.scratch[track - lo], best = _feed_mapped(
                packed,
                packed_slots,
                track,
                s.scratch[track - lo],
                t.raw_data,
                begin,
                end,
                best,
                row,
            )
    for i in range(begin, end):
        pending, broken, code_point = utf8_step(pending, np.int64(t.raw_data[i]))
        if broken:
            best = _feed_character(packed, packed_slots, lo, hi, np.int64(REPLACEMENT), best, row)
        if code_point >= 0:
            best = _feed_character(packed, packed_slots, lo, hi, code_point, best, row)
    return pending, best


@borrowing
def feed_token(packed, packed_slots, lo, hi, pending, token, best, row):
    """Walk all tracks [lo, hi) of `scratch` over one visible token; return (pending, best).

    row = where its events belong, -1 = events are not wanted. The caller has dealt with hidden
    special tokens.
    """
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    if pending != 0:
        return _feed_bytes(packed, packed_slots, lo, hi, pending, token, best, row)
    num_tokens = t.token_special.shape[0]
    before = np.int64(-1)
    for track in range(lo, hi):
        state = s.scratch[track - lo]
        if t.track_twin[track] and state == before:
            s.scratch[track - lo] = s.scratch[track - lo - 1]  # the twins have met
            continue
        before = state
        at = t.track_mapping[track] * (num_tokens + 1) + token
        s.scratch[track - lo], best = _feed_mapped(
            packed, packed_slots, track, state, t.token_data, np.int64(t.token_offsets[at]),
            np.int64(t.token_offsets[at + 1]), best, row,
        )  # fmt: skip
    return np.int64(t.token_pending[token]), best


@borrowing
def feed_end(packed, packed_slots, lo, hi, pending, best, row):
    """Tell all tracks that the text ends here: an unfinished character breaks, a word closes."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    if pending != 0:
        best = _feed_character(packed, packed_slots, lo, hi, np.int64(REPLACEMENT), best, row)
    for track in range(lo, hi):
        mapping = t.track_mapping[track]
        if t.mapping_form[mapping] >= 0 and t.mapping_wrap[mapping]:
            s.buffer[0] = BEFORE_NONWORD
            s.scratch[track - lo], best = _feed_mapped(
                packed, packed_slots, track, s.scratch[track - lo], s.buffer, np.int64(0),
                np.int64(1), best, row,
            )  # fmt: skip
    return best


@compiled
def walk_tokens(packed, track, walks):
    """Fill in `token_walk` of one track; see `Tables`. walks int64[num_tokens, num_tracks], out."""
    t = unpack_tables(packed)
    num_tokens = t.token_special.shape[0]
    for token in range(num_tokens):
        state = np.int64(t.track_base[track])
        at = t.track_mapping[track] * (num_tokens + 1) + token
        begin, end = t.token_offsets[at], t.token_offsets[at + 1]
        plain = not t.token_special[token] and not t.token_pending[token] and begin < end
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
def find_calm(packed, track, states, classes):
    """`Tables.calm` as far as one track is concerned: uint8[num_rows, num_bytes].

    states int64[num_rows]; classes int64[num_columns, width]: from `first_classes`.
    """
    t = unpack_tables(packed)
    calm = np.zeros((states.shape[0], (classes.shape[0] + 7) // 8), np.uint8)
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
                    calm[row, column >> 3] |= np.uint8(1 << (column & 7))
                    break
    return calm


@borrowing
def settle(packed, packed_slots, slot):
    """Write down the states of a slot, if `Slots.synced` stands for them."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    token = s.synced[slot]
    if token >= 0:
        token &= 0xFFFFFFFF
        lo, hi = t.policy_tracks[s.policy[slot]], t.policy_tracks[s.policy[slot] + 1]
        walks, mine = token * t.track_base.shape[0], slot * s.scratch.shape[0]
        for track in range(lo, hi):
            s.state[mine + track - lo] = t.token_walk[walks + track] & STATE_MASK


@compiled
def close_prompts(packed, lo, states):
    """Go over to the quiet copy of each state that the end of a word would complete; in place.

    states int64[num_tracks of the policy]. What stands whole at the end of a prompt is not the
    model's, whatever follows it.
    """
    t = unpack_tables(packed)
    for k in range(states.shape[0]):
        track, state = lo + k, states[k]
        if t.track_num_cold[track] == 0:
            number = state_number(packed, track, state)
            quiet = np.int64(t.quiet[t.track_places[track] + number])
            if quiet > 0:
                states[k] = t.track_base[track] + quiet * t.track_classes[track]
        elif t.mapping_wrap[t.track_mapping[track]]:
            entry = move(packed, track, state, t.class_of[track * 256 + BEFORE_NONWORD])
            if t.mapping_shrinks[t.track_mapping[track]] & 1:
                entry |= move(packed, track, state, t.class_of[track * 256 + SEPARATOR_BYTE])
            if entry >> 31:
                number = state_number(packed, track, state)
                states[k] = t.track_limit[track] + t.track_num_cold[track] + number


@borrowing
def end_groups(packed, lo, states):
    """Groups of what the end of a word, or of the text, would complete in any of a policy's tracks."""
    t = unpack_tables(packed)
    groups = 0
    for k in range(states.shape[0]):
        track = lo + k
        if t.mapping_wrap[t.track_mapping[track]]:
            class_ = t.class_of[track * 256 + BEFORE_NONWORD]
            entry = np.int64(move(packed, track, states[k], class_))
            if entry & HIT_BIT:
                place = output_place(packed, track, entry & STATE_MASK)
                groups |= t.groups[t.track_places[track] + place]
    return groups


@borrowing
def _walk_row(packed, packed_slots, slot, token, ends, row):
    """Walk a slot's tracks, copied to `scratch`, over any token; return (pending, rule or -1).

    ends = UNSEEN | LAST bits that hold whatever the token is; token = -1 is none at all.
    """
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    pending, rule = s.pending[slot], np.int64(-1)
    lo, hi = t.policy_tracks[s.policy[slot]], t.policy_tracks[s.policy[slot] + 1]
    max_tracks, num_ends = s.scratch.shape[0], s.end_tokens.shape[0] // s.policy.shape[0]
    settle(packed, packed_slots, slot)
    for i in range(max_tracks):
        s.scratch[i] = s.state[slot * max_tracks + i]
    for i in range(slot * num_ends, (slot + 1) * num_ends):
        if token >= 0 and s.end_tokens[i] == token:
            ends |= s.end_bits[slot]
    unseen = token < 0 or ends & UNSEEN or (s.hidden[slot] and t.token_special[token])
    if not unseen:
        pending, rule = feed_token(packed, packed_slots, lo, hi, pending, token, rule, row)
    if ends & LAST:
        rule = feed_end(packed, packed_slots, lo, hi, pending, rule, row)
        pending = np.int64(0)
    return pending, rule


@borrowing
def walk_kernel(call, slots, tokens):
    """Walk each slot over its newest token; tokens of one slot may follow in order.

    At most two table reads per byte: failure links are folded into `trans`, so the cost follows the
    bytes fed, not the number of patterns. Mostly one byte is fed: a track that meets the walk of the
    same bytes from the root goes on as that does, and where that leads is in `token_walk`. And mostly
    all tracks do so, from where all of them were: one bit in `calm` says it, however many they are.

    call    int64[6]: the addresses of packed `Tables` and `Slots`; COMMIT: 1 = the slots go on behind
            the token, 0 = only look, and a token of -1 is none at all: if it is the last, that asks
            what the end of the text would complete; ENDS: 1 = `row_last` counts, 0 = no text ends;
            FIRST: row to begin with, and the events of rows before it are kept; SILENT: 1 = events
            are not wanted.
    slots, tokens int64[num_rows]; what completed is in `Slots.best`.
    Returns num_rows, or num_rows + 1 if anything completed. Less: the number of rows done, the events
    of the next one do not fit (make room and go on from that row). -1: an id is out of range, the
    lengths differ, or there are more than most_rows; nothing is done then.

    Few arguments, since each costs 0.1 µs: at batch 1 they are half of the time.
    """
    packed, packed_slots = call[0], call[1]
    commit, ends_count, first = call[COMMIT], call[ENDS], call[FIRST]
    silent = np.int64(-1)
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    num_slots, num_tokens = s.policy.shape[0], t.token_special.shape[0]
    max_tracks, num_tracks = s.scratch.shape[0], np.uintp(t.track_base.shape[0])
    lowest = 0 if commit else -1
    if slots.shape[0] != tokens.shape[0] or slots.shape[0] > s.best.shape[0]:
        return -1
    wrong = False
    for row in range(slots.shape[0]):  # without a branch: several rows at once
        wrong |= (slots[row] < 0) | (slots[row] >= num_slots)
        wrong |= (tokens[row] < lowest) | (tokens[row] >= num_tokens)
    if wrong:
        return -1
    if first == 0:
        s.num_events[0] = 0
    completed = np.int64(s.num_events[0] > 0)
    for row in range(first, slots.shape[0]):
        slot, token = np.uintp(slots[row]), np.uintp(tokens[row])
        mine = slot * np.uintp(max_tracks)
        if s.policy[slot] < 0:
            s.best[row] = 0
            continue
        # Nearly every row: an ordinary token within the text that completes nothing. What this part
        # cannot settle, `_walk_row` does from the start.
        before = s.synced[slot]
        settled = before >= 0 or (s.plain[slot] and s.pending[slot] == 0)
        if settled and not ends_count:
            p = np.uintp(s.policy[slot])
            here = t.token_sync[p * np.uintp(num_tokens) + token]
            synced = np.int64(token) | (here << np.int64(32)) if here >= 0 else np.int64(-1)
            if here >= 0 and before >= 0:
                column = np.uintp(here >> np.int64(32))
                byte = t.calm[np.uintp(before >> np.int64(32)) + (column >> np.uintp(3))]
                if (byte >> np.uint8(column & np.uintp(7))) & np.uint8(1):
                    if commit:
                        s.synced[slot] = synced
                    s.best[row] = 0
                    continue
            if before >= 0:
                settle(packed, packed_slots, np.int64(slot))
            lo, hi = np.uintp(t.policy_tracks[p]), np.uintp(t.policy_tracks[p + np.uintp(1)])
            track = lo
            while track < hi:
                known = t.token_walk[token * num_tracks + track]
                whole = np.uint32(known)
                if whole >> np.uint32(31):
                    settled = False
                    break
                root = np.uintp(t.track_base[track])
                limit = np.uintp(t.track_limit[track])
                state = np.uintp(s.state[mine + track - lo])
                s.scratch[track - lo] = state
                class_ = np.uintp(known >> np.int64(32))
                behind = t.trans[root + class_]
                if state < limit:
                    entry = t.trans[state + class_]
                else:
                    entry = _move_cold(packed, np.int64(track), np.int64(state), np.int64(class_))
                if entry != behind:
                    hit = entry
                    state, root = np.uintp(entry & STATE_MASK), np.uintp(behind)
                    at = np.uintp(t.track_mapping[track]) * np.uintp(num_tokens + 1) + token
                    i = np.uintp(t.token_offsets[at]) + np.uintp(1)
                    end = np.uintp(t.token_offsets[at + np.uintp(1)])
                    classes = track * np.uintp(256)
                    while state != root and i < end:
                        class_ = np.uintp(t.class_of[classes + np.uintp(t.token_data[i])])
                        entry = move(packed, track, state, class_)
                        hit |= entry
                        state = np.uintp(entry & STATE_MASK)
                        root = np.uintp(move(packed, track, root, class_))
                        i += np.uintp(1)
                    if hit >> np.uint32(31):
                        settled = False
                        break
                    if state != root:
                        whole = np.uint32(state)
                        synced = np.int64(-1)
                if commit:
                    s.state[mine + track - lo] = whole
                track += np.uintp(1)
            if settled:
                if commit:
                    s.synced[slot] = synced
                s.best[row] = 0
                continue
            while commit and track > lo:  # take it back
                track -= np.uintp(1)
                s.state[mine + track - lo] = s.scratch[track - lo]
        ends = np.int64(LAST) if ends_count and s.row_last[row] else np.int64(0)
        events = s.num_events[0]
        told = silent if call[SILENT] else np.int64(row)
        pending, rule = _walk_row(packed, packed_slots, slots[row], tokens[row], ends, told)
        if 2 * s.num_events[0] > s.events.shape[0]:
            s.num_events[0] = events
            return row
        if commit:
            s.pending[slot], s.synced[slot] = pending, -1
            for k in range(max_tracks):
                s.state[mine + np.uintp(k)] = s.scratch[k]
        s.best[row] = rule + 1
        completed |= np.int64(rule >= 0)
    return slots.shape[0] + completed
