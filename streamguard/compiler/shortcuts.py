"""Which tokens bring all tracks of a policy back to the walk from the root; DESIGN section 2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamguard_kernels.shortcuts import find_calm, first_classes
from streamguard_kernels.tables import (
    LOOK_CLOSER,
    NO_BYTES,
    STATE_MASK,
    UNFINISHED_BIT,
    Tables,
)

#: Most bytes of `Tables.calm` a policy, and how many of a token's first bytes are looked at, if they fit.
CALM_BYTES = 2 << 20
WIDTHS = (4, 3, 2)
#: Most bytes of `calm` for states that no token leads to from the root, and most places a policy.
SHALLOW_BYTES = 1 << 20
CALM_PLACES = 1 << 18


@dataclass(frozen=True)
class Calm:
    """What `synchronise` finds out of a policy; places in `calm` are counted from 0.

    rows    uint8[num_rows, num_bytes] of `Tables.calm`.
    at      int32[num_places] of `Tables.calm_rows`; shift: see `Tables.calm_places`.
    """

    rows: np.ndarray
    at: np.ndarray
    shift: int


def synchronise(
    tables: Tables, packed: int, tracks: np.ndarray, token_sync: np.ndarray
) -> Calm:
    """Fill in `Tables.token_sync` of a policy, and say what belongs into `calm`.

    tracks  int64[]: of the policy, without twins, which are in step with the track before them if
    both are in step with the root.
    """
    walks = tables.token_walk[:, tracks]
    ordinary = np.flatnonzero(~(walks >> 31 & 1).any(axis=1))
    walks = walks[ordinary]
    states, row = _distinct_rows(walks & STATE_MASK)
    for width in (*WIDTHS, 1):
        firsts = [first_classes(packed, track, ordinary, width) for track in tracks.tolist()]
        classes, column = _distinct_rows(np.concatenate(firsts, axis=1))
        if len(states) * len(classes) <= 8 * CALM_BYTES:
            break
    num_bytes = (len(classes) + 7) // 8
    at, shift = np.zeros(0, np.int32), 0
    if len(tracks) == 1:
        states, at, shift = _with_shallow_states(tables, int(tracks[0]), states, num_bytes)
    calm = np.full((len(states), num_bytes), 0xFF, np.uint8)
    for k, track in enumerate(tracks.tolist()):
        mine, which = np.unique(states[:, k], return_inverse=True)
        first = np.ascontiguousarray(classes[:, width * k : width * (k + 1)])
        calm &= find_calm(packed, track, mine, first)[which]
    token_sync[:] = LOOK_CLOSER
    lengths = np.diff(tables.token_offsets[tables.track_mapping[tracks]])
    token_sync[(lengths == 0).all(axis=0) & (tables.token_special == 0)] = NO_BYTES
    unfinished = np.where(tables.token_pending[ordinary] != 0, UNFINISHED_BIT, 0)
    token_sync[ordinary] = row * num_bytes | unfinished | column << 32
    return Calm(calm, np.where(at >= 0, at * num_bytes, -1).astype(np.int32), shift)


def _with_shallow_states(
    tables: Tables, track: int, states: np.ndarray, num_bytes: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """More rows for a single track: the states nearest to the root, where texts mostly are.

    states int64[num_rows, 1]. Returns them with the others, the row of each place (int32, -1 = none)
    and the shift that makes a place of a state: rows of `trans` are at least 1 << shift long.
    """
    base, limit = int(tables.track_base[track]), int(tables.track_limit[track])
    num_classes = int(tables.track_classes[track])
    shift = num_classes.bit_length() - 1
    num_shallow = min((limit - base) // num_classes, SHALLOW_BYTES // num_bytes)
    shallow = base + np.arange(num_shallow, dtype=np.int64) * num_classes
    more = np.setdiff1d(shallow, states[:, 0])
    states = np.concatenate([states, more.reshape(-1, 1)])
    place = (states[:, 0] - base) >> shift
    # Cold states are no rows: their places would be those of others.
    near = (states[:, 0] < limit) & (place < CALM_PLACES)
    at = np.full(int(place[near].max()) + 1, -1, np.int32)
    at[place[near]] = np.flatnonzero(near)
    return states, at, shift


def _distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of int64[num_rows, width], and which of them each row is.

    By hash, since sorting whole rows takes ten times as long; a collision would be noticed.
    """
    factors = np.random.default_rng(0).integers(1, 1 << 62, rows.shape[1], np.int64) | 1
    _, first, which = np.unique(rows @ factors, return_index=True, return_inverse=True)
    if (rows[first][which] == rows).all():
        return np.ascontiguousarray(rows[first]), which
    found, which = np.unique(rows, axis=0, return_inverse=True)
    return found, which.reshape(-1)
