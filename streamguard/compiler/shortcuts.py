"""Which tokens bring all tracks of a policy back to the walk from the root; DESIGN section 2."""

from __future__ import annotations

import numpy as np

from streamguard_kernels.shortcuts import find_calm, first_classes
from streamguard_kernels.tables import STATE_MASK, Tables

#: Most bytes of `Tables.calm` a policy, and how many of a token's first bytes are looked at, if they fit.
CALM_BYTES = 2 << 20
WIDTHS = (4, 3, 2)


def synchronise(
    tables: Tables, packed: int, tracks: np.ndarray, token_sync: np.ndarray
) -> np.ndarray:
    """Fill in `Tables.token_sync` of a policy and return its rows of `calm`, from where 0 is.

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
    calm = np.full((len(states), (len(classes) + 7) // 8), 0xFF, np.uint8)
    for k, track in enumerate(tracks.tolist()):
        mine, which = np.unique(states[:, k], return_inverse=True)
        first = np.ascontiguousarray(classes[:, width * k : width * (k + 1)])
        calm &= find_calm(packed, track, mine, first)[which]
    token_sync[:] = -1
    token_sync[ordinary] = row * calm.shape[1] | column << 32
    return calm


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
