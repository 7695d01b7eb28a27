"""Walks of many tracks that were met before.

Of a policy with several tracks not all combinations of states have a row of `calm`: in numbers and keys
several regexes are under way at once. A walk of 25 tracks takes some 150 ns, to look one up 10: so states
behind walks are kept, and where a token leads from them, as far as texts get there. What is full is
emptied; the slots then walk on from their own states.
"""

from __future__ import annotations

import numpy as np

from streamguard_kernels.compiled import borrowing
from streamguard_kernels.slots import BORROWED, EXCEPTIONS, KEPT, settle, unpack_slots
from streamguard_kernels.tables import unpack_tables
from streamguard_kernels.utf8 import NUM_PREFIXES, prefix_number

_ODD = np.uint64(0x9E3779B97F4A7C15)


@borrowing
def _mixed(hash_, value):
    """A hash with one more value in it."""
    hash_ = (hash_ ^ np.uint64(value)) * _ODD
    return hash_ ^ hash_ >> np.uint64(29)


@borrowing
def _find_walk(packed_slots, known, token):
    """Where in `memo_walks` a walk stands, or is to stand."""
    s = unpack_slots(packed_slots)
    last = np.uintp(s.memo_walks.shape[0] // 3 - 1)
    at = np.uintp(_mixed(_mixed(np.uint64(0), known), token)) & last
    while s.memo_walks[np.uintp(3) * at + np.uintp(1)] != 0:
        here = np.uintp(3) * at
        if s.memo_walks[here] == known and s.memo_walks[here + np.uintp(1)] == token + 1:
            break
        at = (at + np.uintp(1)) & last
    return np.uintp(3) * at


@borrowing
def _find_states(packed_slots, slot, num_tracks):
    """The place in `memo_states` of a slot's states, put there if need be."""
    s = unpack_slots(packed_slots)
    mine = np.uintp(slot)
    last, max_tracks = np.uintp(s.memo_places.shape[0] - 1), np.uintp(s.scratch.shape[0])
    # Cold states of one policy may be called like those of another.
    first, whose = mine * max_tracks, s.policy[mine] << np.int64(32)
    hash_ = _mixed(np.uint64(0), whose)
    for k in range(num_tracks):
        hash_ = _mixed(hash_, s.state[first + np.uintp(k)])
    at = np.uintp(hash_) & last
    while s.memo_places[at] != 0:
        place = (s.memo_places[at] & np.int64(0xFFFFFFFF)) - 1
        same = s.memo_places[at] - place - 1 == whose
        for k in range(num_tracks):
            kept = s.memo_states[np.uintp(place) * max_tracks + np.uintp(k)]
            same &= np.int64(kept) == s.state[first + np.uintp(k)]
        if same:
            return place
        at = (at + np.uintp(1)) & last
    place = s.num_memo[0]
    s.num_memo[0] += 1
    s.memo_places[at] = whose | (place + 1)
    for k in range(num_tracks):
        kept = np.uint32(s.state[first + np.uintp(k)])
        s.memo_states[np.uintp(place) * max_tracks + np.uintp(k)] = kept
    return place


@borrowing
def _forget(packed, packed_slots):
    """Empty the memo."""
    s = unpack_slots(packed_slots)
    for slot in range(s.policy.shape[0]):
        known = s.synced[slot]
        if known & EXCEPTIONS == KEPT:
            if s.policy[slot] >= 0:
                settle(packed, packed_slots, slot)
            s.synced[slot] = np.int64(-1)
    s.memo_places[:] = 0
    s.memo_walks[:] = 0
    s.num_memo[:] = 0


@borrowing
def remembered(packed_slots, known, token):
    """What `Slots.synced` says behind a token by a walk that was met before; -1 = none was.

    known = what it says before, not -1.
    """
    s = unpack_slots(packed_slots)
    if s.memo_walks.shape[0] == 0:
        return np.int64(-1)
    at = _find_walk(packed_slots, known, np.int64(token))
    found = s.memo_walks[at + np.uintp(1)] != 0
    return s.memo_walks[at + np.uintp(2)] if found else np.int64(-1)


@borrowing
def remember(packed, packed_slots, slot, before, token, known):
    """Keep a walk that completed nothing; returns what `Slots.synced` is to say of the slot.

    before = what it said before the token, -1 = nothing; known = what it says by itself: the states
    and what is unfinished are up to date.
    """
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    mine = np.uintp(slot)
    p = np.uintp(s.policy[mine])
    num_tracks = t.policy_tracks[p + np.uintp(1)] - t.policy_tracks[p]
    number = prefix_number(s.pending[mine]) + 1 if s.pending[mine] else np.int64(0)
    if num_tracks < 3 or not s.plain[mine] or number > NUM_PREFIXES:
        return known
    full = 2 * s.num_memo[0] >= s.memo_places.shape[0]
    if full or 6 * s.num_memo[1] >= s.memo_walks.shape[0]:
        s.synced[mine] = np.int64(-1)  # its states are those behind the token
        _forget(packed, packed_slots)
        before = np.int64(-1)
    if known == -1:
        place = _find_states(packed_slots, slot, num_tracks)
        known = BORROWED | place << np.int64(32) | number << np.int64(16) | KEPT
    if before != -1:
        at = _find_walk(packed_slots, before, np.int64(token))
        s.num_memo[1] += np.int64(s.memo_walks[at + np.uintp(1)] == 0)
        s.memo_walks[at] = before
        s.memo_walks[at + np.uintp(1)] = np.int64(token) + 1
        s.memo_walks[at + np.uintp(2)] = known
    return known
