"""The tables that all kernels read, and how a state is followed in them.

All tables of all policies sit in one `Tables` tuple of flat arrays, so that one call serves a batch
whose rows follow different policies. A *track* is one automaton over one *mapping* of the text
(which normal forms, marks at word boundaries or not); a policy owns a contiguous run of tracks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streamguard_kernels.automaton import COLD_FIELDS
from streamguard_kernels.compiled import borrowing
from streamguard_kernels.packing import pack, unpacker
from streamguard_kernels.utf8 import BEFORE_NONWORD, SEPARATOR_BYTE

STATE_MASK = 0x7FFFFFFF
HIT_BIT = 0x80000000
#: An entry of `Tables.token_sync` or `Tables.character_sync`; in others: its word of `calm` says the
#: next row; as many bits for the number of an unfinished character.
LOOK_CLOSER, STEP_BIT, NUMBER_BITS = -1, 1 << 37, 0xFFF
#: In `Tables.token_tail`: the token is not one byte that goes on with a character.
NO_TAIL = 64


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
                                                special or maps to nothing; from bit 32 on the class
                                                of its first mapped byte
    token_sync       int64[num_policies, num_tokens]  all tracks of a policy at once: where in `calm`
                                                the row of the states behind the token begins; in five
                                                bits from bit 32 on which bit of a word of a row of
                                                `calm` says that it may go on so, and from bit 50 on
                                                which word; bit 37 = that word also says the row behind
                                                the token; from bit 38 on 1 + `utf8.prefix_number` of
                                                the character that it leaves unfinished, 0 = none;
                                                LOOK_CLOSER = so in any track
    calm             uint32[num_calm]           a row for each known combination of a policy's states.
                                                First bits, one for each column of first classes:
                                                whether from there these lead all tracks where they
                                                lead from the root, and complete nothing; then so does
                                                all that follows. Then of a policy of one track (and
                                                its twin) for each class, and some pairs of them, the
                                                row behind it | bit 31, or 0. Then the same of what maps
                                                to nothing: this row.
                                                Then the states themselves, one a track
    calm_shape       int64[num_policies, 4]     where in a row of `calm` the states are; where the
                                                policy begins in `calm_rows`, how many places it has
                                                there, and a shift
    calm_rows        int64[num_calm_places]     of policies of one track (and its twin): from bit 32 on
                                                where the row of a state begins, -1 = it has none. If it
                                                is borrowed from another state, two bytes say 1 + the
                                                classes behind which it does not hold, other than 0. The
                                                place of a state is its distance from the root shifted
                                                to the right, which no other has
    character_page   int32[num_policies, 1 + NUM_PREFIXES]  where in the next the page of each
                                                unfinished character begins, by 1 + its number
    character_sync   int64[num_pages * 65]      as `token_sync`, of the character that each further byte
                                                makes whole, or of nothing if it takes yet more; NO_TAIL
                                                says LOOK_CLOSER. The first page says so only: all that
                                                is not of a policy whose tracks read characters is there
    token_pending    uint32[num_tokens]         unfinished character at the token's end
    token_tail       uint8[num_tokens]          low six bits of a byte that goes on with a character;
                                                NO_TAIL = the token is not one
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
    calm_shape: np.ndarray
    calm_rows: np.ndarray
    character_page: np.ndarray
    character_sync: np.ndarray
    token_pending: np.ndarray
    token_tail: np.ndarray
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


_TABLES = (
    "u u b l l l l l l l i l l b l i i i i b i i i i i b l l u l l i l u b b l b l l l i i l b b"
)
#: Makes packed tables a `Tables` again, within a kernel.
unpack_tables = unpacker(Tables, _TABLES)


def pack_tables(tables):
    """The addresses of a `Tables` whose own address kernels take: int64[46, 2]; see `pack`."""
    return pack(tables, _TABLES)


@borrowing
def move(packed, track, state, class_):
    """Where a byte of a class leads from a state: an entry as in `Tables.trans`, uint32."""
    t = unpack_tables(packed)
    # All of one kind: numba compares signed and unsigned integers as floating-point numbers.
    if np.uintp(state) < np.uintp(t.track_limit[np.uintp(track)]):
        return t.trans[np.uintp(state) + np.uintp(class_)]
    return move_cold(packed, np.int64(track), np.int64(state), np.int64(class_))


@borrowing
def move_cold(packed, track, state, class_):
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
