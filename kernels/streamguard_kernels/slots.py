"""What changes while texts go on, and how a slot's states are written down."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streamguard_kernels.compiled import borrowing
from streamguard_kernels.packing import pack, unpacker
from streamguard_kernels.tables import NUMBER_BITS, STATE_MASK, unpack_tables
from streamguard_kernels.utf8 import numbered_prefix

#: In `Slots.synced`: the row is borrowed; two classes behind which it says nothing; 1 + the number of
#: the unfinished character in which the slot stands, 0 = in none; any of these.
BORROWED = np.int64(-1 << 63)
EXCEPTIONS = 0xFFFF
INSIDE = NUMBER_BITS << 16
DETOUR = BORROWED | INSIDE
#: In place of two classes, which are smaller: a place in `Slots.memo_states`, and no row of `calm`.
KEPT = 0xFFFE


class Slots(NamedTuple):
    """What changes while texts go on. `Session` owns it.

    policy      int64[num_slots]              -1 = not guarded
    plain       uint8[num_slots]              1 = guarded, and only special tokens end the text
    hidden      uint8[num_slots]              1 = the reader does not see special tokens
    end_tokens  int64[num_slots, num_ends]    tokens that end the slot's text; filled up with -1
    end_bits    uint8[num_slots]              UNSEEN and LAST as they hold for such a token
    state       int64[num_slots, max_tracks]  not up to date where the next says something; `settle`
    synced      int64[num_slots]              what `calm_rows` says of the states: from bit 32 on a row
                                              of `calm`; BORROWED = `state` holds; with KEPT a place
                                              in `memo_states`; -1 = neither, `state` holds. From bit 16
                                              on the number of the unfinished character, see INSIDE
    pending     int64[num_slots]              unfinished character, see `utf8`; as `state`
    events      int64[capacity, 2]            (row, rule) of every pattern that completed
    num_events  int64[1]                      counts also those beyond the capacity
    buffer      uint8[MAX_MAPPED_BYTES]       work space
    scratch     int64[max_tracks]             work space
    row_last    uint8[most_rows]              1 = the text ends after the row's token, whatever it is
    best        int64[most_rows]              1 + the most severe rule that completed, 0 = none
    memo_states uint32[most_kept * max_tracks]  see `memo`; no policy has several tracks: these are empty
    memo_places int64[2 * most_kept]          by their hash 1 + the place of states, 0 = free; from bit 32
                                              on whose policy's they are
    memo_walks  int64[8 * most_kept, 3]       by the hash of the first two what `synced` said before a
                                              walk, 1 + the token, 0 = free, and what it says behind it
    num_memo    int64[2]                      how many states and walks there are
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
    memo_states: np.ndarray
    memo_places: np.ndarray
    memo_walks: np.ndarray
    num_memo: np.ndarray


_SLOTS = "l b b l b l l l l l b l b l u l l l"
#: Makes packed slots a `Slots` of flat arrays again, within a kernel.
unpack_slots = unpacker(Slots, _SLOTS)


def pack_slots(slots):
    """The addresses of a `Slots` whose own address kernels take: int64[18, 2]; see `pack`."""
    return pack(slots, _SLOTS)


@borrowing
def settle(packed, packed_slots, slot):
    """Write down the states of a slot and its character, if `Slots.synced` stands for them."""
    t, s = unpack_tables(packed), unpack_slots(packed_slots)
    mine = np.uintp(slot)
    known = s.synced[mine]
    if known < 0 and known & EXCEPTIONS != KEPT:
        return
    s.pending[mine] = numbered_prefix(known >> np.int64(16) & NUMBER_BITS)
    p, at = np.uintp(s.policy[mine]), np.uintp(known >> np.int64(32) & np.int64(STATE_MASK))
    k, end = np.uintp(t.policy_tracks[p]), np.uintp(t.policy_tracks[p + np.uintp(1)])
    mine *= np.uintp(s.scratch.shape[0])
    if known >= 0:
        at += np.uintp(t.calm_shape[np.uintp(4) * p])
        while k < end:
            s.state[mine] = t.calm[at]
            mine, at, k = mine + np.uintp(1), at + np.uintp(1), k + np.uintp(1)
    else:
        at *= np.uintp(s.scratch.shape[0])
        while k < end:
            s.state[mine] = s.memo_states[at]
            mine, at, k = mine + np.uintp(1), at + np.uintp(1), k + np.uintp(1)
