"""The look-ahead mask: which vocabulary tokens would complete a match from a slot's state.

In the order of their mapped bytes the tokens that begin with a given string are one range. A token
completes a match from state s in one of two ways: it contains a whole pattern (a static list, the
same for every state), or it begins with the rest v of a pattern u·v whose first part u ends the
text. All such u lie on the failure path of s, so each state keeps only the ranges of its *own* u
and a link to the next state on the path that has any: about 10 bytes a state, and exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streamguard_kernels.advance import LAST, UNSEEN, feed_end, feed_token
from streamguard_kernels.compiled import borrowing, compiled
from streamguard_kernels.packing import pack, unpacker
from streamguard_kernels.slots import INSIDE, settle, unpack_slots
from streamguard_kernels.tables import (
    HIT_BIT,
    STATE_MASK,
    is_quiet,
    move,
    output_place,
    state_number,
    unpack_tables,
)
from streamguard_kernels.utf8 import REPLACEMENT, SEPARATOR_BYTE, map_character

_WALK = 4
#: How a policy's mask rules are applied.
RANGES_SUFFICE, WALKED, RANGES_AND_REGEXES = 1, 2, 3


class Ranges(NamedTuple):
    """Look-ahead of one group of rules over all tracks; frozen.

    own_offsets     int32[num_states + num_tracks]  per automaton num_states + 1 entries
    own_base        int64[num_tracks]               the track's first entry in `own_offsets`
    own             int32[num_ranges, 2]            (first, last + 1) into the track's token order
    link            int32[num_states]               next on the failure path with ranges, 0 none
    state_base      int64[num_tracks]               the track's first entry in `link`
    order           int32[num_mappings, num_tokens] tokens by mapped bytes; -1 after order_length
    order_length    int64[num_mappings]
    whole_span      int64[num_tracks, 2]            the track's stretch of `whole`
    whole           int32[num_whole]                tokens that contain a whole pattern of the track
    continuation    int32[num_continuation]         tokens that begin inside a character
    continues       uint8[num_tokens]               the same as flags
    visible         int32[num_special]              special tokens: not in `order` but walked
    group           int64[1]                        the group's bit

    Packed, it holds flat arrays only.
    """

    own_offsets: np.ndarray
    own_base: np.ndarray
    own: np.ndarray
    link: np.ndarray
    state_base: np.ndarray
    order: np.ndarray
    order_length: np.ndarray
    whole_span: np.ndarray
    whole: np.ndarray
    continuation: np.ndarray
    continues: np.ndarray
    visible: np.ndarray
    group: np.ndarray


_RANGES = "i l i i l i l l i i b i l"
#: Makes packed ranges a `Ranges` again, within a kernel.
unpack_ranges = unpacker(Ranges, _RANGES)


def pack_ranges(ranges):
    """What the kernels take in place of a `Ranges`, as long as that lives: int64[13, 2]."""
    return pack(ranges, _RANGES)


@borrowing
def _compare(data, begin, end, other, first, last):
    """-1, 0, 1: data[begin:end] before, a prefix-or-equal match of, or after other[first:last].

    0 means that other[first:last] begins with data[begin:end].
    """
    n = end - begin
    m = last - first
    for i in range(min(n, m)):
        a, b = data[begin + i], other[first + i]
        if a != b:
            return -1 if a < b else 1
    return 0 if n <= m else 1


@compiled
def token_order(offsets, data, skip):
    """Sort tokens by their bytes; tokens without bytes and those in `skip` are left out.

    offsets int64[num_tokens + 1], data uint8[], skip uint8[num_tokens]. Returns int32[num_sorted].
    """
    n = 0
    for token in range(skip.shape[0]):
        if not skip[token] and offsets[token + 1] > offsets[token]:
            n += 1
    order = np.empty(n, np.int32)
    n = 0
    for token in range(skip.shape[0]):
        if not skip[token] and offsets[token + 1] > offsets[token]:
            order[n] = token
            n += 1
    scratch = np.empty(n, np.int32)
    width = 1
    while width < n:
        for low in range(0, n, 2 * width):
            middle, high = min(low + width, n), min(low + 2 * width, n)
            i, j = low, middle
            for k in range(low, high):
                take_left = j >= high
                if not take_left and i < middle:
                    a, b = order[i], order[j]
                    # "a is not after b" as whole strings: prefix first
                    la, lb = offsets[a + 1] - offsets[a], offsets[b + 1] - offsets[b]
                    m = min(la, lb)
                    c = 0
                    for x in range(m):
                        u, v = data[offsets[a] + x], data[offsets[b] + x]
                        if u != v:
                            c = -1 if u < v else 1
                            break
                    take_left = c < 0 or (c == 0 and la <= lb)
                elif i >= middle:
                    take_left = False
                if take_left:
                    scratch[k] = order[i]
                    i += 1
                else:
                    scratch[k] = order[j]
                    j += 1
        order, scratch = scratch, order
        width *= 2
    return order


@borrowing
def _tokens_that_begin_with(text, begin, end, order, offsets, data, begins):
    """Where in `order` the tokens lie whose bytes begin with text[begin:end]: (first, last + 1).

    begins  from `first_bytes`.
    """
    two = np.int64(text[begin]) << 8
    if end - begin == 1:
        return np.int64(begins[two]), np.int64(begins[two + 256])
    two += text[begin + 1]
    first, most = np.int64(begins[two]), np.int64(begins[two + 1])
    low, high = first, most
    while low < high:
        middle = (low + high) // 2
        token = order[middle]
        if _compare(text, begin, end, data, offsets[token], offsets[token + 1]) > 0:
            low = middle + 1
        else:
            high = middle
    first = low
    high = most
    while low < high:
        middle = (low + high) // 2
        token = order[middle]
        if _compare(text, begin, end, data, offsets[token], offsets[token + 1]) >= 0:
            low = middle + 1
        else:
            high = middle
    return first, low


@compiled
def first_bytes(order, offsets, data):
    """Where in `order` the tokens of each first two bytes begin: int32[65537]; alone, a byte counts as
    if a zero followed."""
    begins = np.zeros(65537, np.int32)
    for token in order:
        at = offsets[token]
        second = data[at + 1] if at + 1 < offsets[token + 1] else 0
        begins[(np.int64(data[at]) << 8) + second + 1] += 1
    for i in range(65536):
        begins[i + 1] += begins[i]
    return begins


@compiled
def build_own_ranges(
    packed, track, pattern_data, pattern_offsets, wanted, shortest, num_states, failure, order,
    offsets, data,
):  # fmt: skip
    """Ranges of every state's own pattern rests.

    packed, track                  address of packed `Tables`, and the track.
    pattern_data, pattern_offsets  the track's mapped patterns; wanted uint8[num_patterns] picks the
    group, shortest the rests: those of at least so many bytes.
    failure                        int32[num_states]: numbers of states.
    order, offsets, data           the track's token order and mapped token bytes.
    Returns own_offsets int32[num_states + 1], own int32[num_ranges, 2], link int32[num_states].
    """
    t = unpack_tables(packed)
    separators = t.mapping_shrinks[t.track_mapping[track]] & 1
    longest = 0
    for k in range(order.shape[0]):
        longest = max(longest, offsets[order[k] + 1] - offsets[order[k]])
    begins = first_bytes(order, offsets, data)
    capacity = 1024
    keys = np.empty(capacity, np.int64)
    ends = np.empty(capacity, np.int32)
    count = 0
    for p in range(pattern_offsets.shape[0] - 1):
        if not wanted[p]:
            continue
        begin, end = pattern_offsets[p], pattern_offsets[p + 1]
        state = np.int64(t.track_base[track])
        for i in range(begin, end - 1):
            class_ = t.class_of[track * 256 + pattern_data[i]]
            state = np.int64(move(packed, track, state, class_)) & STATE_MASK
            if end - i - 1 < shortest:
                continue
            # Behind a separator a token may begin with more of them: as if the rest began there.
            again = separators and pattern_data[i] == SEPARATOR_BYTE
            for rest in range(i if again else i + 1, i + 2):
                if end - rest > longest:
                    continue
                first, last = _tokens_that_begin_with(
                    pattern_data, rest, end, order, offsets, data, begins
                )
                if first == last:
                    continue
                if count == capacity:
                    capacity *= 2
                    more_keys = np.empty(capacity, np.int64)
                    more_ends = np.empty(capacity, np.int32)
                    more_keys[:count], more_ends[:count] = keys[:count], ends[:count]
                    keys, ends = more_keys, more_ends
                keys[count] = (state_number(packed, track, state) << 32) | first
                ends[count] = last
                count += 1
    by_key = np.argsort(keys[:count])
    own = np.empty((count, 2), np.int32)
    own_offsets = np.zeros(num_states + 1, np.int32)
    used = 0
    last_state = np.int64(-1)
    for k in by_key:
        state = keys[k] >> 32
        first = keys[k] & 0xFFFFFFFF
        if state == last_state and first <= own[used - 1, 1]:
            own[used - 1, 1] = max(own[used - 1, 1], ends[k])
            continue
        own[used, 0], own[used, 1] = first, ends[k]
        used += 1
        own_offsets[state + 1] += 1
        last_state = state
    for s in range(num_states):
        own_offsets[s + 1] += own_offsets[s]
    link = np.zeros(num_states, np.int32)
    for s in range(1, num_states):
        f = failure[s]
        link[s] = f if f and own_offsets[f + 1] > own_offsets[f] else link[f]
    return own_offsets, own[:used].copy(), link


@compiled
def quiet_ranges(states, own_offsets, own, link):
    """All ranges on the failure path of each of `states`, in one list a state.

    states int32[num_quiet]; the rest as `build_own_ranges` returns it.
    Returns offsets int32[num_quiet + 1], ranges int32[num_ranges, 2].
    """
    offsets = np.zeros(states.shape[0] + 1, np.int32)
    for turn in range(2):
        if turn == 1:
            ranges = np.empty((offsets[-1], 2), np.int32)
        used = 0
        for k in range(states.shape[0]):
            index = np.int64(states[k])
            while index:
                for i in range(own_offsets[index], own_offsets[index + 1]):
                    if turn == 1:
                        ranges[used] = own[i]
                    used += 1
                index = np.int64(link[index])
            offsets[k + 1] = used
    return offsets, ranges


@compiled
def tokens_with_whole_patterns(packed, track, group, order, offsets, data):
    """Tokens of `order` that complete a match of `group` from the empty text: int32[num_whole]."""
    t = unpack_tables(packed)
    out = np.empty(order.shape[0], np.int32)
    n = 0
    for k in range(order.shape[0]):
        state = np.int64(t.track_base[track])
        token = order[k]
        for i in range(offsets[token], offsets[token + 1]):
            entry = np.int64(move(packed, track, state, t.class_of[track * 256 + data[i]]))
            state = entry & STATE_MASK
            if entry & HIT_BIT:
                place = output_place(packed, track, state)
                if t.groups[t.track_places[track] + place] & group:
                    out[n] = token
                    n += 1
                    break
    return out[:n].copy()


@borrowing
def _walk_completes(packed, packed_slots, lo, hi, slot, token, ends, rule_in_group):
    """Slow and sure: walk `token` from the slot's state, look at the most severe rule it completes.

    ends = UNSEEN | LAST bits.
    """
    s = unpack_slots(packed_slots)
    first = slot * s.scratch.shape[0]
    settle(packed, packed_slots, slot)
    for i in range(hi - lo):
        s.scratch[i] = s.state[first + i]
    pending, best, silent = s.pending[slot], np.int64(-1), np.int64(-1)
    if (ends & UNSEEN) == 0:
        pending, best = feed_token(packed, packed_slots, lo, hi, pending, token, best, silent)
    if ends & LAST:
        best = feed_end(packed, packed_slots, lo, hi, pending, best, silent)
    return best >= 0 and rule_in_group[best] != 0


@borrowing
def mark_forbidden(
    packed, packed_slots, packed_ranges, slot, last, rule_in_group, walks, forbidden
):  # fmt: skip
    """Set forbidden[token] = 1 for each token that would complete a match of the group.

    A token that completes a more severe group's match too may be left out: whoever cares marks that
    group as well.

    last        1 = whatever token comes next is the last of the text: each one is walked.
    rule_in_group uint8[num_rules]; walks uint8[num_tokens]: zeros. forbidden uint8[num_tokens], in/out.
    """
    t, s, r = unpack_tables(packed), unpack_slots(packed_slots), unpack_ranges(packed_ranges)
    settle(packed, packed_slots, slot)
    p, pending = s.policy[slot], s.pending[slot]
    lo, hi = t.policy_tracks[p], t.policy_tracks[p + 1]
    num_tokens = t.token_special.shape[0]
    # Tokens that no range speaks for are walked: _WALK and what they do to the text.
    if last:
        walks[:] = _WALK | LAST
    else:
        for track in range(lo, hi):
            mapping = t.track_mapping[track]
            form = t.mapping_form[mapping]
            state = s.state[slot * s.scratch.shape[0] + track - lo]
            if pending != 0 and form >= 0:
                # Tokens that do not go on with the unfinished character break it first.
                n = map_character(
                    REPLACEMENT, t.page_of[form * 0x1100 : (form + 1) * 0x1100], t.entries,
                    t.map_offsets, t.map_data, s.buffer,
                )  # fmt: skip
                completed = False
                for i in range(n):
                    class_ = t.class_of[track * 256 + s.buffer[i]]
                    entry = np.int64(move(packed, track, state, class_))
                    state = entry & STATE_MASK
                    if entry & HIT_BIT:
                        place = output_place(packed, track, state)
                        if t.groups[t.track_places[track] + place] & r.group[0]:
                            completed = True
                if completed:
                    for token in range(num_tokens):
                        if (
                            t.raw_offsets[token + 1] > t.raw_offsets[token]
                            and not (t.token_special[token])
                        ):
                            forbidden[token] = 1
            if is_quiet(packed, track, state):  # only right behind a prompt; it has no ranges
                walks[:] = _WALK
                break
            index = state_number(packed, track, state)
            order = mapping * num_tokens
            while index:
                at = r.own_base[track] + index
                for k in range(r.own_offsets[at], r.own_offsets[at + 1]):
                    for i in range(r.own[2 * k], r.own[2 * k + 1]):
                        forbidden[r.order[order + i]] = 1
                index = np.int64(r.link[r.state_base[track] + index])
            for k in range(r.whole_span[2 * track], r.whole_span[2 * track + 1]):
                forbidden[r.whole[k]] = 1
        if pending != 0:
            for k in range(r.continuation.shape[0]):
                walks[r.continuation[k]] = _WALK
        if not s.hidden[slot]:
            for k in range(r.visible.shape[0]):
                walks[r.visible[k]] = _WALK
    num_ends = s.end_tokens.shape[0] // s.policy.shape[0]
    for k in range(slot * num_ends, (slot + 1) * num_ends):
        if s.end_tokens[k] >= 0:
            walks[s.end_tokens[k]] = _WALK | s.end_bits[slot]
    for token in range(num_tokens):
        if walks[token]:
            unseen = UNSEEN if s.hidden[slot] and t.token_special[token] else 0
            forbidden[token] = _walk_completes(
                packed, packed_slots, lo, hi, slot, token, walks[token] | unseen, rule_in_group
            )


@borrowing
def apply_ranges(packed, packed_slots, packed_ranges, masking, rows, slots, logits, left):
    """Write -inf to the masked tokens of each row for which ranges say it all; return how many are not.

    masking      uint8[num_policies]: 0 = no mask rules, RANGES_SUFFICE = nothing more severe shares a
                 state and no text's end completes a match, RANGES_AND_REGEXES = the same, but for
                 what regexes and the text's end complete, else WALKED: `mark_forbidden` has to.
    rows, slots  int64[num_rows]; logits float32[num_logits_rows, >= num_tokens], in/out.
    left         int64[num_rows], out: indices k of the rows that were left to `mark_forbidden`, and
                 ~k (below 0) where only regexes and the text's end are left.
    Returns -1 if a row or slot is out of range, with nothing done.
    """
    t, s, r = unpack_tables(packed), unpack_slots(packed_slots), unpack_ranges(packed_ranges)
    num_tokens, num_left = t.token_special.shape[0], 0
    for k in range(rows.shape[0]):
        if not (0 <= slots[k] < s.policy.shape[0] and 0 <= rows[k] < logits.shape[0]):
            return -1
    for k in range(rows.shape[0]):
        slot = slots[k]
        p = s.policy[slot]
        if p < 0 or masking[p] == 0:
            continue
        known = s.synced[slot]
        in_row = known >= 0 and known & INSIDE == 0 and masking[p] == RANGES_SUFFICE
        if not in_row:
            settle(packed, packed_slots, slot)
        ordinary = s.plain[slot] and s.hidden[slot] and (in_row or s.pending[slot] == 0)
        if not ordinary or masking[p] == WALKED:
            left[num_left] = k
            num_left += 1
            continue
        lo, hi = t.policy_tracks[p], t.policy_tracks[p + 1]
        if masking[p] == RANGES_AND_REGEXES:
            for track in range(lo, hi):
                ordinary &= not is_quiet(
                    packed, track, s.state[slot * s.scratch.shape[0] + track - lo]
                )
            left[num_left] = ~k if ordinary else k
            num_left += 1
            if not ordinary:
                continue
        row = logits[rows[k]]
        for track in range(lo, hi):
            order = t.track_mapping[track] * num_tokens
            if in_row:
                place = (known >> 32) + t.calm_shape[4 * p]
                state = np.int64(t.calm[np.uintp(place + track - lo)])
            else:
                state = s.state[slot * s.scratch.shape[0] + track - lo]
            index = state_number(packed, track, state)
            while index:
                at = r.own_base[track] + index
                for j in range(r.own_offsets[at], r.own_offsets[at + 1]):
                    for i in range(r.own[2 * j], r.own[2 * j + 1]):
                        row[r.order[order + i]] = -np.inf
                index = np.int64(r.link[r.state_base[track] + index])
            for j in range(r.whole_span[2 * track], r.whole_span[2 * track + 1]):
                row[r.whole[j]] = -np.inf
    return num_left
