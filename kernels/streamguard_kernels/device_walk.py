"""The walk of the device kernels: Triton functions over lanes; see `device`.

The lanes of a walk are the tracks of one slot (all automata of a policy move at once, so the latency
is that of one) or tokens of the vocabulary. What differs between lanes is masked. `t` and `s` are
`device_tables.DeviceTables` and `device_tables.Slots`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from streamguard_kernels import advance
from streamguard_kernels.device_tables import NO_RANK, TRACK_FIELDS

UNSEEN = tl.constexpr(advance.UNSEEN)
LAST = tl.constexpr(advance.LAST)
#: What a walk records of the matches: nothing, the most severe rule, or all of them.
STATES, BEST, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
#: Rules that completed are gathered in the bits of an int64; the last bit says that there are more.
PAGE = tl.constexpr(63)

_REPLACEMENT = tl.constexpr(advance.REPLACEMENT)
_BEFORE_NONWORD = tl.constexpr(0xFF)
_AFTER_NONWORD = tl.constexpr(0xFE)
_STATE_MASK = tl.constexpr(0x7FFFFFFF)
_PAGES = tl.constexpr(0x1100)


@triton.jit
def _any(lanes):
    return tl.max(lanes.to(tl.int32), axis=0) > 0


@triton.jit
def _utf8_step(pending, byte):
    """`utf8.utf8_step`, without branches."""
    count = pending >> 24
    lead = pending & 0xFF
    low = tl.where(lead == 0xE0, 0xA0, tl.where(lead == 0xF0, 0x90, 0x80))
    high = tl.where(lead == 0xED, 0x9F, tl.where(lead == 0xF4, 0x8F, 0xBF))
    low = tl.where(count == 1, low, 0x80)
    high = tl.where(count == 1, high, 0xBF)
    goes_on = (pending != 0) & (byte >= low) & (byte <= high)
    need = tl.where(lead < 0xE0, 2, tl.where(lead < 0xF0, 3, 4))
    complete = goes_on & (count + 1 == need)
    last = byte & 0x3F
    second = (pending >> 8) & 0x3F
    third = (pending >> 16) & 0x3F
    two = ((lead & 0x1F) << 6) | last
    three = ((lead & 0x0F) << 12) | (second << 6) | last
    four = ((lead & 0x07) << 18) | (second << 12) | (third << 6) | last
    finished = tl.where(need == 2, two, tl.where(need == 3, three, four))
    begins = (byte >= 0xC2) & (byte <= 0xF4)
    alone = tl.where(byte < 0x80, byte, tl.where(begins, -1, _REPLACEMENT))
    longer = ((count + 1) << 24) | (pending & 0xFFFFFF) | (byte << (8 * count))
    after = tl.where(goes_on, tl.where(complete, 0, longer), tl.where(begins, (1 << 24) | byte, 0))
    code_point = tl.where(goes_on, tl.where(complete, finished, -1), alone)
    return after, (pending != 0) & (goes_on == 0), code_point


@triton.jit
def lanes_of(t, track):
    """What a walk needs to know of its tracks: one of each a lane."""
    fields = t.tracks + track * TRACK_FIELDS
    return (
        track,
        tl.load(fields),
        tl.load(fields + 1),
        tl.load(fields + 2),
        tl.load(fields + 3),
        tl.load(fields + 4),
        tl.load(fields + 5),
        tl.load(fields + 11),
        fields,
    )


@triton.jit
def state_number(state, base, classes, limit):
    """The number of a state, counted from the root by depth; see `tables.state_number`."""
    cold = (limit - base) // classes + state - limit
    return tl.where(state < limit, (state - base) // classes, cold)


@triton.jit
def _output_place(t, lane, state, hit):
    """Where the outputs of accept states stand; see `tables.output_place`."""
    number = state_number(state, lane[1], lane[2], lane[7])
    packed = hit & (tl.load(lane[8] + 13) != 0)
    if _any(packed):
        begin = tl.load(lane[8] + 14)
        low = begin
        high = tl.where(packed, tl.load(lane[8] + 15), begin)
        while tl.max(high - low, axis=0) > 0:
            middle = (low + high) // 2
            before = tl.load(t.accepts + middle, mask=low < high, other=0) < number
            high = tl.where((low < high) & (before == 0), middle, high)
            low = tl.where((low < high) & before, middle + 1, low)
        number = tl.where(packed, low - begin + 1, number)
    return number


@triton.jit
def _move_cold(t, lane, state, kind, cold):
    """Entries of the lanes whose states have no row; see `tables.move`."""
    base, classes, limit, fields = lane[1], lane[2], lane[7], lane[8]
    first, num_cold = tl.load(fields + 12), tl.load(fields + 13)
    separator = tl.load(fields + 16)
    number = state - limit - num_cold
    quiet = cold & (number >= 0)
    num_hot = (limit - base) // classes
    heard = tl.where(number < num_hot, base + number * classes, limit + number - num_hot)
    state = tl.where(quiet, heard, state)
    entry = tl.zeros(state.shape, tl.int32)
    searching = cold & (state >= limit)
    hot = cold & (state < limit)
    while _any(searching):
        record = t.cold + (first + state - limit) * 3
        shape = tl.load(record + 2, mask=searching, other=0)
        stays = searching & (kind == separator) & ((shape & 0xFF) == separator)
        child = tl.load(record, mask=searching, other=0) & _STATE_MASK
        count = shape >> 16
        found = searching & (stays == 0) & (count > 0) & (((shape >> 8) & 0xFF) == kind)
        others = searching & (stays == 0) & (found == 0) & (count > 1)
        while _any(others):
            child = tl.where(others, child + 1, child)
            count = tl.where(others, count - 1, count)
            label = tl.load(t.cold + (first + child) * 3 + 2, mask=others, other=0) & 0xFF
            found = found | (others & (label == kind))
            others = others & (label != kind) & (count > 1)
        hit = tl.load(t.cold + (first + child) * 3, mask=found, other=0) & ~_STATE_MASK
        entry = tl.where(stays, state, tl.where(found, (limit + child) | hit, entry))
        fails = searching & (stays == 0) & (found == 0)
        state = tl.where(fails, tl.load(record + 1, mask=searching, other=0), state)
        searching = fails & (state >= limit)
        hot = hot | (fails & (state < limit))
    entry = tl.where(hot, tl.load(t.trans + state + kind, mask=hot, other=0), entry)
    silent = quiet & ((kind == separator) | (kind == tl.load(fields + 17)))
    return tl.where(silent, entry & _STATE_MASK, entry)


@triton.jit
def _completed(t, lane, index, hit, seen, window):
    """Gather the rules in the output chains of accept states: bit n is rule window + n."""
    places = lane[3]
    while _any(hit):
        pattern = tl.load(t.first_pattern + places + index, mask=hit, other=-1)
        listed = hit & (pattern >= 0)
        while _any(listed):
            rule = tl.load(t.pattern_rule + pattern, mask=listed, other=0)
            place = tl.minimum(rule - window, PAGE)
            bit = tl.full(seen.shape, 1, tl.int64) << tl.maximum(place, 0).to(tl.int64)
            seen |= tl.where(listed & (place >= 0), bit, 0)
            pattern = tl.load(t.next_pattern + pattern, mask=listed, other=-1)
            listed = listed & (pattern >= 0)
        index = tl.load(t.suffix_link + places + index, mask=hit, other=0)
        hit = hit & (index != 0)
    return seen


@triton.jit
def _move(t, lane, state, byte, live, best, seen, window, RECORD: tl.constexpr):
    """Move the live lanes by one byte each."""
    kind = tl.load(t.class_of + lane[0] * 256 + byte, mask=live, other=0).to(tl.int32)
    cold = live & (state >= lane[7])
    entry = tl.load(t.trans + state + kind, mask=live & (cold == 0), other=0)
    if _any(cold):
        entry = tl.where(cold, _move_cold(t, lane, state, kind, cold), entry)
    state = tl.where(live, entry & _STATE_MASK, state)
    if RECORD != STATES:
        hit = live & (entry < 0)
        index = _output_place(t, lane, state, hit)
        rank = tl.load(t.best_rank + lane[3] + index, mask=hit, other=NO_RANK)
        best = tl.minimum(best, rank)
        if RECORD == ALL:
            seen = _completed(t, lane, index, hit, seen, window)
    return state, best, seen


@triton.jit
def _feed_bytes(t, lane, state, begin, count, live, best, seen, window, RECORD: tl.constexpr):
    """Walk the live lanes over token_data[begin : begin + count]."""
    count = tl.where(live, count, 0)
    for i in range(tl.max(count, axis=0)):
        moves = i < count
        byte = tl.load(t.token_data + begin + i, mask=moves, other=0).to(tl.int32)
        state, best, seen = _move(t, lane, state, byte, moves, best, seen, window, RECORD)
    return state, best, seen


@triton.jit
def _feed_character(t, lane, state, code_point, live, best, seen, window, RECORD: tl.constexpr):
    """Walk the live lanes over the mapped bytes of one character; see `utf8.map_character`."""
    code_point = tl.where(live, code_point, 0)
    table = tl.load(t.page_of + tl.maximum(lane[5], 0) * _PAGES + (code_point >> 8))
    entry = tl.load(t.entries + table * 256 + (code_point & 0xFF))
    marks = entry & 1
    string = entry >> 1
    begin = tl.load(t.map_offsets + string)
    size = 1 + (code_point >= 0x80).to(tl.int32) + (code_point >= 0x800).to(tl.int32)
    size += (code_point >= 0x10000).to(tl.int32)
    inner = tl.where(string != 0, tl.load(t.map_offsets + string + 1) - begin, size)
    count = tl.where(live, inner + 2 * marks, 0)
    for i in range(tl.max(count, axis=0)):
        moves = i < count
        j = i - marks
        folded = moves & (string != 0) & (j >= 0) & (j < inner)
        rest = code_point >> (6 * tl.minimum(tl.maximum(size - 1 - j, 0), 3))
        lead = ((0xF00 >> size) & 0xFF) | (code_point >> (6 * (size - 1)))
        plain = tl.where(size == 1, code_point, tl.where(j <= 0, lead, 0x80 | (rest & 0x3F)))
        byte = tl.load(t.map_data + begin + j, mask=folded, other=0).to(tl.int32)
        byte = tl.where(string != 0, byte, plain)
        byte = tl.where(j < 0, _BEFORE_NONWORD, tl.where(j >= inner, _AFTER_NONWORD, byte))
        byte = tl.where(moves, byte, 0)
        state, best, seen = _move(t, lane, state, byte, moves, best, seen, window, RECORD)
    return state, best, seen


@triton.jit
def _feed_token(
    t, lane, state, pending, token, num_tokens, live, best, seen, window, RECORD: tl.constexpr
):
    """Walk the live lanes over one visible token each; see `advance.feed_token`.

    Returns (state, pending, best, seen).
    """
    form = lane[5]
    raw_begin = tl.load(t.raw_offsets + token)
    raw_count = tl.load(t.raw_offsets + token + 1) - raw_begin
    first = tl.load(t.raw_data + raw_begin, mask=raw_count > 0, other=0).to(tl.int32)
    unfinished = live & (pending != 0) & (raw_count > 0)
    goes_on = unfinished & (first >= 0x80) & (first < 0xC0)
    breaks = unfinished & (goes_on == 0) & (form >= 0)
    if _any(breaks):
        state, best, seen = _feed_character(
            t, lane, state, _REPLACEMENT, breaks, best, seen, window, RECORD
        )
    at = t.token_offsets + lane[4] * (num_tokens + 1) + token
    begin = tl.load(at)
    whole = live & ((goes_on == 0) | (form < 0))
    state, best, seen = _feed_bytes(
        t, lane, state, begin, tl.load(at + 1) - begin, whole, best, seen, window, RECORD
    )
    stays = (pending != 0) & (raw_count == 0)
    after = tl.where(stays, pending, tl.load(t.token_pending + token))
    after = tl.where(live, after, pending)
    if _any(goes_on):
        # The token begins inside a character: decode it byte by byte.
        decoded = tl.where(goes_on, pending, 0)
        count = tl.where(goes_on, raw_count, 0)
        for i in range(tl.max(count, axis=0)):
            moves = i < count
            source = t.raw_data + raw_begin + tl.where(moves, i, 0)
            byte = tl.load(source, mask=moves, other=0).to(tl.int32)
            step, broken, code_point = _utf8_step(decoded, byte)
            decoded = tl.where(moves, step, decoded)
            moves = moves & (form >= 0)
            if _any(moves & broken):
                state, best, seen = _feed_character(
                    t, lane, state, _REPLACEMENT, moves & broken, best, seen, window, RECORD
                )
            if _any(moves & (code_point >= 0)):
                state, best, seen = _feed_character(
                    t,
                    lane,
                    state,
                    code_point,
                    moves & (code_point >= 0),
                    best,
                    seen,
                    window,
                    RECORD,
                )
        after = tl.where(goes_on, decoded, after)
    return state, after, best, seen


@triton.jit
def _feed_end(t, lane, state, pending, live, best, seen, window, RECORD: tl.constexpr):
    """Tell the live lanes that the text ends; see `advance.feed_end`."""
    live = live & (lane[5] >= 0)
    if _any(live & (pending != 0)):
        state, best, seen = _feed_character(
            t, lane, state, _REPLACEMENT, live & (pending != 0), best, seen, window, RECORD
        )
    closes = live & (lane[6] != 0)
    byte = tl.where(closes, _BEFORE_NONWORD, 0)
    return _move(t, lane, state, byte, closes, best, seen, window, RECORD)


@triton.jit
def end_bits(s, slot, token, end_stride, end_width):
    """What a token does to the text's end; token is one or one a lane."""
    bits = token * 0
    for i in range(end_width):
        bits |= (tl.load(s.end_tokens + slot * end_stride + i) == token).to(tl.int32)
    return bits * tl.load(s.end_bits + slot).to(tl.int32)


@triton.jit
def walk(
    t,
    s,
    slot,
    lane,
    live,
    state,
    pending,
    token,
    ends,
    hidden,
    num_tokens,
    best,
    seen,
    window,
    RECORD: tl.constexpr,
):
    """What `advance_kernel` does with one token: its text, then the text's end if it ends here."""
    # One value a lane from here on: the interpreter does not mix truth values of both shapes.
    token, pending, ends = token + state * 0, pending + state * 0, ends + state * 0
    skipped = hidden & tl.load(t.token_special + token).to(tl.int32)
    shown = live & ((ends & UNSEEN) == 0) & (skipped == 0)
    state, pending, best, seen = _feed_token(
        t, lane, state, pending, token, num_tokens, shown, best, seen, window, RECORD
    )
    last = live & ((ends & LAST) != 0)
    if _any(last):
        state, best, seen = _feed_end(t, lane, state, pending, last, best, seen, window, RECORD)
        pending = tl.where(last, 0, pending)
    return state, pending, best, seen
