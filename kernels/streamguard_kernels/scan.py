"""Find every match in a byte stream, with its place in the raw bytes, in chunks of any size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streamguard_kernels.compiled import borrowing, compiled
from streamguard_kernels.hold import UNKNOWN
from streamguard_kernels.packing import pack, unpacker
from streamguard_kernels.tables import (
    HIT_BIT,
    STATE_MASK,
    move,
    output_place,
    state_number,
    unpack_tables,
)
from streamguard_kernels.utf8 import (
    BEFORE_NONWORD,
    REPLACEMENT,
    SEPARATOR_BYTE,
    map_character,
    utf8_step,
)

#: Places in the `call` of `scan_kernel`, after the two addresses.
LO, HI, POSITION, LENGTH, FINAL, RESERVE, WATCH, COUNT, CLOSINGS, HOLD = range(2, 12)
CALL_SIZE = 12


class Reading(NamedTuple):
    """Where the reading of one text stands, and its work space. `Scanner` owns it.

    place      int64[5 * num_tracks + 2]      the next five, one behind the other
    states     int64[num_tracks]
    positions  int64[num_tracks]              mapped bytes fed so far
    quiet      int64[num_tracks]              raw offset at which the track last held nothing
    newest     int64[num_tracks, 2]           the last mapped byte that is no mark, and the raw end of
                                              the last one that is neither a mark nor a separator that
                                              parts words
    pending    int64[2]                       unfinished character, raw offset of its first byte
    saved      int64[5 * num_tracks + 2]      work space
    idle       int64[num_tracks]              a state of the track in which it holds nothing, or -1
    ring       int64[num_tracks, size]        raw start of each recent mapped byte; size is a power of
                                              two above twice the longest pattern
    buffer     uint8[MAX_MAPPED_BYTES]        work space
    depths     int32[num_states]              `hold.hold_depths` of all tracks; read if WATCH
    first      int64[all tracks + 1]          where the states of each track begin in `depths`
    withholds  uint8[num_rules]               1 = its matches are withheld; read if WATCH
    data       uint8[capacity]                the raw bytes to read
    found      int64[capacity, 4]             out: known-at (raw offset whose byte made it certain),
                                              end, rule, start (-1 = not known: a regex)
    closings   int64[2 * len(data) + 2, 2]    out, if WATCH: raw offsets at which the text, if it ended
                                              there, would show a match, and where the character
                                              before each begins
    """

    place: np.ndarray
    states: np.ndarray
    positions: np.ndarray
    quiet: np.ndarray
    newest: np.ndarray
    pending: np.ndarray
    saved: np.ndarray
    idle: np.ndarray
    ring: np.ndarray
    buffer: np.ndarray
    depths: np.ndarray
    first: np.ndarray
    withholds: np.ndarray
    data: np.ndarray
    found: np.ndarray
    closings: np.ndarray


_READING = "l l l l l l l l l b i l b b l l"
#: Makes a packed reading a `Reading` of flat arrays again, within a kernel.
unpack_reading = unpacker(Reading, _READING)


def pack_reading(reading):
    """The addresses of a `Reading` whose own address the kernel takes: int64[16, 2]; see `pack`."""
    return pack(reading, _READING)


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


@borrowing
def _record(call, track, end, first, here):
    """Report the patterns of a track's state and of its suffixes; return 1 if one is withheld."""
    packed = call[0]
    t, s = unpack_tables(packed), unpack_reading(call[1])
    k = track - call[LO]
    size = s.ring.shape[0] // s.states.shape[0]
    first_place = t.track_places[track]
    index = output_place(packed, track, s.states[k])
    withheld = np.int64(0)
    while True:
        pattern = t.first_pattern[first_place + index]
        while pattern >= 0:
            length = np.int64(t.pattern_length[pattern])
            rule = np.int64(t.pattern_rule[pattern])
            at = 4 * call[COUNT]
            s.found[at] = here
            s.found[at + 1] = end if length >= 0 else first
            s.found[at + 2] = rule
            s.found[at + 3] = -1
            if length > 0:
                s.found[at + 3] = s.ring[k * size + ((s.positions[k] - length) & (size - 1))]
            call[COUNT] += 1
            if call[WATCH]:
                withheld |= np.int64(s.withholds[rule])
            pattern = t.next_pattern[pattern]
        index = np.int64(t.suffix_link[first_place + index])
        if index == 0:
            break
    return withheld


@borrowing
def _walk(call, track, n, first, last, here):
    """Walk one track over buffer[:n], what raw bytes first..last are mapped to; as `_record`."""
    t, s = unpack_tables(call[0]), unpack_reading(call[1])
    k = track - call[LO]
    size = np.uintp(s.ring.shape[0] // s.states.shape[0])
    mapping = t.track_mapping[track]
    mapped = t.mapping_form[mapping] >= 0
    separators = t.mapping_shrinks[mapping] & 1
    state, position = s.states[k], np.uintp(s.positions[k])
    ring, classes = np.uintp(k) * size, np.uintp(track * 256)
    withheld = np.int64(0)
    for j in range(n):
        byte = s.buffer[np.uintp(j)]
        mark = mapped and byte >= 0xFE
        parts = separators and byte == SEPARATOR_BYTE
        if parts and s.newest[2 * k] == SEPARATOR_BYTE:
            continue  # the automaton would stay where it is
        if not mark:
            s.newest[2 * k] = byte
            if not parts:
                s.newest[2 * k + 1] = last
        s.ring[ring + (position & (size - np.uintp(1)))] = first
        position += np.uintp(1)
        class_ = np.uintp(t.class_of[classes + np.uintp(byte)])
        entry = np.int64(move(call[0], track, np.uintp(state), class_))
        state = entry & STATE_MASK
        if entry & HIT_BIT:
            s.states[k], s.positions[k] = state, np.int64(position)
            # A mark or a separator that ends a match is no part of it.
            withheld |= _record(call, track, s.newest[2 * k + 1], first, here)
    s.states[k], s.positions[k] = state, np.int64(position)
    return withheld


@borrowing
def _shows(call, track, entry):
    """Whether the patterns of the state that a move leads to are a withheld match."""
    packed = call[0]
    t, s = unpack_tables(packed), unpack_reading(call[1])
    first_place = t.track_places[track]
    index = output_place(packed, track, np.int64(entry & STATE_MASK))
    while True:
        pattern = t.first_pattern[first_place + index]
        while pattern >= 0:
            if s.withholds[t.pattern_rule[pattern]]:
                return True
            pattern = t.next_pattern[pattern]
        index = np.int64(t.suffix_link[first_place + index])
        if index == 0:
            return False


@borrowing
def _is_idle(call, track):
    """Whether no match is under way in a track; the state is remembered then, to spare a division."""
    s = unpack_reading(call[1])
    k = track - call[LO]
    if s.depths[s.first[track] + state_number(call[0], track, s.states[k])] != 0:
        return False
    s.idle[k] = s.states[k]
    return True


@borrowing
def _feed_character(call, code_point, first, last, here):
    """Walk all tracks over one character, or U+FFFD for a broken one, at raw bytes first..last.

    Most tracks are of regexes, which need no ring, and complete nothing: that way is written out
    here, since a call a track and character costs more than the walk.
    """
    t, s = unpack_tables(call[0]), unpack_reading(call[1])
    n, mapped, closes = np.int64(0), np.int64(-1), False
    withheld = np.int64(0)
    lo, watch = np.uintp(call[LO]), call[WATCH]
    for track in range(lo, np.uintp(call[HI])):
        if t.track_twin[track]:
            continue
        mapping = np.uintp(t.track_mapping[track])
        form = t.mapping_form[mapping]
        if form < 0:
            continue
        if form != mapped:  # tracks of one mapping lie together
            mapped = form
            n = map_character(
                code_point, t.page_of[form * 0x1100 : (form + 1) * 0x1100],
                t.entries, t.map_offsets, t.map_data, s.buffer,
            )  # fmt: skip
        k, classes = track - lo, track * np.uintp(256)
        silent = False
        if t.track_regex[track]:
            state, hit = np.uintp(s.states[k]), np.uint32(0)
            for j in range(np.uintp(n)):
                entry = t.trans[state + np.uintp(t.class_of[classes + np.uintp(s.buffer[j])])]
                state = np.uintp(entry & np.uint32(STATE_MASK))
                hit |= entry
            silent = hit >> np.uint32(31) == 0
            if silent:
                s.states[k] = state
                s.newest[np.uintp(2) * k + np.uintp(1)] = last
        if not silent:
            withheld |= _walk(call, np.int64(track), n, first, last, here)
        if watch:
            if t.track_regex[track] and (
                s.states[k] == s.idle[k] or _is_idle(call, np.int64(track))
            ):
                s.quiet[k] = last
            if t.mapping_wrap[mapping]:
                closing = np.uintp(t.class_of[classes + np.uintp(BEFORE_NONWORD)])
                entry = move(call[0], np.int64(track), np.uintp(s.states[k]), closing)
                if entry >> np.uint32(31) and not closes:
                    closes = _shows(call, np.int64(track), entry)
    if closes:
        at = 2 * call[CLOSINGS]
        s.closings[at], s.closings[at + 1] = last, first
        call[CLOSINGS] += 1
    return withheld


@borrowing
def _feed_byte(call, here, byte):
    """Walk all tracks over one raw byte; return 1 if it completes a withheld match."""
    t, s = unpack_tables(call[0]), unpack_reading(call[1])
    withheld = np.int64(0)
    for track in range(call[LO], call[HI]):
        if t.mapping_form[t.track_mapping[track]] < 0 and not t.track_twin[track]:
            s.buffer[0] = byte
            withheld |= _walk(call, track, np.int64(1), here, here + 1, here)
    before, began = s.pending[0], s.pending[1]
    at, broken, code_point = utf8_step(before, byte)
    if broken:
        withheld |= _feed_character(call, np.int64(REPLACEMENT), began, here, here)
    if before == 0 or broken:
        began = here
    if code_point >= 0:
        withheld |= _feed_character(call, np.int64(code_point), began, here + 1, here)
    s.pending[0], s.pending[1] = at, began
    return withheld


@borrowing
def _feed_end(call, here):
    """Tell all tracks that the text ends here: an unfinished character breaks, a word closes."""
    t, s = unpack_tables(call[0]), unpack_reading(call[1])
    withheld = np.int64(0)
    if s.pending[0] != 0:
        withheld |= _feed_character(call, np.int64(REPLACEMENT), s.pending[1], here, here)
        s.pending[0] = 0
    for track in range(call[LO], call[HI]):
        mapping = t.track_mapping[track]
        wrap = t.mapping_form[mapping] >= 0 and t.mapping_wrap[mapping]
        if wrap and not t.track_twin[track]:
            s.buffer[0] = BEFORE_NONWORD
            withheld |= _walk(call, track, np.int64(1), here, here, here)
    return withheld


@borrowing
def _hold_start(call, end):
    """Raw offset before which nothing can be part of a withheld match any more; at most `end`."""
    t, s = unpack_tables(call[0]), unpack_reading(call[1])
    size = s.ring.shape[0] // s.states.shape[0]
    earliest = end
    for track in range(call[LO], call[HI]):
        if t.track_twin[track]:
            continue
        k = track - call[LO]
        number = state_number(call[0], track, s.states[k])
        depth = np.int64(s.depths[s.first[track] + number])
        if depth == 0:
            s.quiet[k] = end
        elif depth == UNKNOWN:
            earliest = min(earliest, s.quiet[k])
        else:
            earliest = min(earliest, s.ring[k * size + ((s.positions[k] - depth) & (size - 1))])
    return earliest


@borrowing
def scan_kernel(call):
    """Walk some tracks over a stretch of raw bytes and report every match with its place.

    call  int64[CALL_SIZE]: the addresses of packed `Tables` and `Reading`; LO, HI: the tracks;
          POSITION: raw offset of data[0]; LENGTH: bytes to read; FINAL: 1 = the text ends behind
          them, which is a step like a byte; RESERVE: room in `found` that a byte can need; WATCH: 1 =
          somebody shows the text up to where nothing is withheld.
          Out: COUNT of rows of `found`; if WATCH: CLOSINGS: count of rows of `closings`; HOLD: raw
          offset before which nothing can be part of a withheld match any more.
    Returns the number of steps taken, fewer than there are when `found` is full or, if WATCH, at a
    byte that completes a withheld match: it stops before that byte, so that what is shown before it
    is shown, and the next call reads that byte alone.
    """
    s = unpack_reading(call[1])
    watch = call[WATCH]
    call[COUNT] = call[CLOSINGS] = 0
    if watch:
        for i in range(s.place.shape[0]):
            s.saved[i] = s.place[i]
    steps = call[LENGTH] + call[FINAL]
    done = np.int64(0)
    while done < steps:
        if 4 * (call[COUNT] + call[RESERVE]) > s.found.shape[0]:
            break
        here = call[POSITION] + done
        if done < call[LENGTH]:
            withheld = _feed_byte(call, here, np.int64(s.data[done]))
        else:
            withheld = _feed_end(call, here)
        done += 1
        if watch and withheld:
            if done == 1:
                break
            # Matches are rare: reading up to here once more costs less than a copy every byte.
            for i in range(s.place.shape[0]):
                s.place[i] = s.saved[i]
            call[COUNT] = call[CLOSINGS] = 0
            steps, done = done - 1, np.int64(0)
    if watch:
        read = call[POSITION] + min(done, call[LENGTH])
        call[HOLD] = _hold_start(call, s.pending[1] if s.pending[0] else read)
    return done
