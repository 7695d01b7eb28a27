"""Which tokens bring all tracks of a policy back to the walk from the root; DESIGN section 2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamguard_kernels.shortcuts import (
    continue_characters,
    find_calm,
    find_steps,
    first_classes,
    number_prefixes,
    walk_characters,
)
from streamguard_kernels.slots import EXCEPTIONS
from streamguard_kernels.tables import (
    LOOK_CLOSER,
    NO_TAIL,
    STATE_MASK,
    STEP_BIT,
    Tables,
)
from streamguard_kernels.utf8 import CHARACTERS, NUM_PREFIXES, SEPARATOR_BYTE

#: Most bytes of `Tables.calm` a policy, and how many of a token's first bytes are looked at, if they fit.
CALM_BYTES = 2 << 20
WIDTHS = (4, 3, 2)
#: Most bytes of `calm` for states that no token leads to from the root, and most places a policy.
SHALLOW_BYTES = 1 << 20
CALM_PLACES = 1 << 18
#: Most columns of a policy: with what else a row holds, its words have numbers of 13 bits.
COLUMNS = 1 << 17
#: In a word of `calm` that says a row: there is one.
HAS_ROW = 1 << 31


@dataclass(frozen=True)
class Calm:
    """What `synchronise` finds out of a policy. It stands at `begin` in `Tables.calm`.

    rows    uint32[num_rows * row_size].
    at      int64[num_places] of `Tables.calm_rows`.
    pages   int64[1 + NUM_PREFIXES, 65] of `Tables.character_sync`.
    shape   the policy's `Tables.calm_shape`, but for where `at` begins.
    """

    rows: np.ndarray
    at: np.ndarray
    pages: np.ndarray
    shape: tuple[int, int, int, int]


def synchronise(
    tables: Tables, packed: int, policy: int, tracks: np.ndarray, failure: np.ndarray, begin: int
) -> Calm:
    """Fill in `Tables.token_sync` of a policy, and say what belongs into `calm` from `begin` on.

    tracks  int64[]: of the policy, without twins, which are in step with the track before them if
    both are in step with the root.
    failure  int32[num_states]: links between the states of the first of them, as numbers.
    """
    walks = tables.token_walk[:, tracks]
    ordinary = np.flatnonzero(~(walks >> 31 & 1).any(axis=1))
    single = len(tracks) == 1 and len(ordinary) > 0
    characters = _distinct_characters(tables, packed, tracks)
    states, row = _distinct_rows(
        np.concatenate([walks[ordinary], characters.states[characters.calm]]) & STATE_MASK
    )
    for width in (*WIDTHS, 1):
        firsts = [first_classes(packed, track, ordinary, width) for track in tracks.tolist()]
        for k, first in enumerate(characters.first):
            firsts[k] = np.concatenate([firsts[k], first[characters.calm, :width]])
        classes, column = _distinct_rows(np.concatenate(firsts, axis=1))
        if len(states) * len(classes) <= 8 * CALM_BYTES and len(classes) <= COLUMNS:
            break
    at, shift, num_steps = np.zeros(0, np.int32), 0, 0
    if single:
        if width > 1:  # what says a row comes first
            short = _are_steps(tables, int(tracks[0]), classes)
            order = np.argsort(~short, kind="stable")
            classes, column = classes[order], np.argsort(order)[column]
            num_steps = int(short.sum())
        states, at, shift = _with_shallow_states(tables, int(tracks[0]), states, len(classes))
    longer = len(classes) - num_steps
    bits = np.full((len(states), (longer + 31) // 32), 0xFFFFFFFF, np.uint32)
    for k, track in enumerate(tracks.tolist()):
        mine, which = np.unique(states[:, k], return_inverse=True)
        columns = np.ascontiguousarray(classes[num_steps:, width * k : width * (k + 1)])
        bits &= find_calm(packed, track, mine, columns)[which]
    lo, hi = tables.policy_tracks[policy : policy + 2].tolist()
    of_track = np.searchsorted(tracks, np.arange(lo, hi), "right") - 1  # twins have those before
    num_words = bits.shape[1]
    size = num_words + num_steps + 1 + hi - lo
    next_rows = np.zeros((len(states), num_steps + 1), np.int64)
    next_rows[:, num_steps] = HAS_ROW | begin + np.arange(len(states)) * size
    if num_steps:
        behind = find_steps(packed, int(tracks[0]), states[:, 0], classes[:num_steps])
        place = (behind - tables.track_base[tracks[0]]) >> shift
        known = (behind >= 0) & (place < len(at))
        index = at[np.where(known, place, 0)]
        next_rows[:, :num_steps] = np.where(
            known & (index >= 0), HAS_ROW | begin + index.astype(np.int64) * size, 0
        )
    rows = np.concatenate(
        [bits, next_rows.astype(np.uint32), states[:, of_track].astype(np.uint32)], axis=1
    )
    # What `token_sync` says of a column: a word and a bit of it.
    of_column = np.arange(len(classes)) - num_steps
    steps = (num_words + np.arange(num_steps + 1)) << 50 | STEP_BIT | 31 << 32
    of_column = (of_column >> 5) << 50 | (of_column & 31) << 32
    of_column[:num_steps] = steps[:num_steps]
    entries = (begin + row * size) | of_column[column]
    sync = tables.token_sync[policy]
    sync[:] = LOOK_CLOSER
    lengths = np.diff(tables.token_offsets[tables.track_mapping[tracks]])
    sync[(lengths == 0).all(axis=0) & (tables.token_special == 0)] = steps[num_steps]
    sync[ordinary] = entries[: len(ordinary)]
    numbers = number_prefixes(tables.token_pending)
    sync[sync >= 0] |= numbers[sync >= 0] << 38
    sync[numbers > NUM_PREFIXES] = LOOK_CLOSER
    whole = np.full(len(characters.states), LOOK_CLOSER, np.int64)
    whole[characters.nothing] = steps[num_steps]
    whole[characters.calm] = entries[len(ordinary) :]
    pages = np.full((1 + NUM_PREFIXES, NO_TAIL + 1), LOOK_CLOSER, np.int64)
    if len(whole):
        behind = continue_characters()
        unfinished = np.where(behind < -1, steps[num_steps] | (-1 - behind) << 38, LOOK_CLOSER)
        pages[1:, :NO_TAIL] = np.where(behind < 0, unfinished, whole[characters.which[behind]])
    at = np.where(at >= 0, (begin + at.astype(np.int64) * size) << 32, -1)
    if single:
        at = _with_borrowed_rows(tables, int(tracks[0]), failure, at, shift)
    shape = (num_words + num_steps + 1, 0, len(at), shift)
    return Calm(rows.reshape(-1), at, pages, shape)


def _are_steps(tables: Tables, track: int, classes: np.ndarray) -> np.ndarray:
    """Columns of which a row says where they lead, not only whether that is where the root leads.

    classes int64[num_columns, width >= 2]. All that are one class long; and where separators are passed
    over, so that a single letter continues what stood before it, a separator and one letter.
    """
    short: np.ndarray = classes[:, 1] < 0
    if classes.shape[1] > 2 and tables.mapping_shrinks[tables.track_mapping[track]] & 1:
        separator = tables.class_of[track, SEPARATOR_BYTE]
        short |= (classes[:, 0] == separator) & (classes[:, 2] < 0)
    return short


@dataclass(frozen=True)
class _Characters:
    """What characters do to the tracks of a policy: each of those that differ once.

    states   int64[num_kinds, num_tracks], bit 31 = it completes a match in the track.
    first    int16[num_kinds, widest] a track: classes of its first mapped bytes, -1 = there is none.
    which    int64[CHARACTERS]: the kind of each character.
    calm, nothing  int64[]: kinds that complete nothing and are read as something in each track, and
    as nothing in any.
    """

    states: np.ndarray
    first: list[np.ndarray]
    which: np.ndarray
    calm: np.ndarray
    nothing: np.ndarray


def _distinct_characters(tables: Tables, packed: int, tracks: np.ndarray) -> _Characters:
    """None if a track reads bytes: in the midst of a character it is not where the others are."""
    widest, which = WIDTHS[0], np.zeros(CHARACTERS, np.int64)
    if (
        not len(tables.token_special)
        or (tables.mapping_form[tables.track_mapping[tracks]] < 0).any()
    ):
        none = np.zeros(0, np.int64)
        states = np.zeros((0, len(tracks)), np.int64)
        return _Characters(
            states, [np.zeros((0, widest), np.int16)] * len(tracks), none, none, none
        )
    walks = [walk_characters(packed, track, widest) for track in tracks.tolist()]
    for found, classes in walks:
        same, mine = _distinct_rows(np.column_stack([found, classes]))
        which = np.unique(which * len(same) + mine, return_inverse=True)[1].reshape(-1)
    one = np.zeros(which.max() + 1, np.int64)
    one[which] = np.arange(CHARACTERS)
    states = np.stack([found[one] for found, _ in walks], axis=1)
    first = [classes[one] for _, classes in walks]
    quiet = (states <= STATE_MASK).all(axis=1)
    read = np.stack([classes[:, 0] >= 0 for classes in first], axis=1)
    return _Characters(
        states,
        first,
        which,
        np.flatnonzero(quiet & read.all(axis=1)),
        np.flatnonzero(quiet & ~read.any(axis=1)),
    )


def _with_shallow_states(
    tables: Tables, track: int, states: np.ndarray, num_columns: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """More rows for a single track: the states nearest to the root, where texts mostly are.

    states int64[num_rows, 1]. Returns them with the others, the row of each place (int32, -1 = none)
    and the shift that makes a place of a state: rows of `trans` are at least 1 << shift long.
    """
    base, limit = int(tables.track_base[track]), int(tables.track_limit[track])
    num_classes = int(tables.track_classes[track])
    shift = num_classes.bit_length() - 1
    num_shallow = min((limit - base) // num_classes, 8 * SHALLOW_BYTES // num_columns)
    shallow = base + np.arange(num_shallow, dtype=np.int64) * num_classes
    more = np.setdiff1d(shallow, states[:, 0])
    states = np.concatenate([states, more.reshape(-1, 1)])
    place = (states[:, 0] - base) >> shift
    # Cold states are no rows: their places would be those of others.
    near = (states[:, 0] < limit) & (place < CALM_PLACES)
    at = np.full(int(place[near].max()) + 1, -1, np.int32)
    at[place[near]] = np.flatnonzero(near)
    return states, at, shift


def _with_borrowed_rows(
    tables: Tables, track: int, failure: np.ndarray, at: np.ndarray, shift: int
) -> np.ndarray:
    """`at` with rows for states that have none: of the next state on the failure path that has one.

    They lead to the same states by all classes but those of the state's own children, mostly, and
    where two classes at most differ they fit into the entry.
    """
    base, limit = int(tables.track_base[track]), int(tables.track_limit[track])
    num_classes = int(tables.track_classes[track])
    num_states = min((limit - base) // num_classes, len(failure), CALM_PLACES)
    place = np.arange(num_states) * num_classes >> shift
    place = place[place < CALM_PLACES]
    at = np.pad(at, (0, max(0, int(place[-1]) + 1 - len(at))), constant_values=-1)
    link = np.where(at[place] >= 0, np.arange(len(place)), failure[: len(place)])
    while (link != link[link]).any():
        link = link[link]
    moves = tables.trans[base : base + len(place) * num_classes].reshape(-1, num_classes)
    for low in range(0, len(place), 1 << 14):
        mine = low + np.flatnonzero(at[place[low : low + (1 << 14)]] < 0)
        differs = moves[mine] != moves[link[mine]]
        first, last = differs.argmax(axis=1), num_classes - 1 - differs[:, ::-1].argmax(axis=1)
        exceptions = np.where(differs.any(axis=1), first + 1 | last + 1 << 8, EXCEPTIONS)
        fits = (differs.sum(axis=1) <= 2) & (at[place[link[mine]]] >= 0)
        at[place[mine[fits]]] = at[place[link[mine[fits]]]] | exceptions[fits]
    return at


def _distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of int64[num_rows, width] in order of their first places, and which each is.

    By hash, since sorting whole rows takes ten times as long; a collision would be noticed.
    """
    factors = np.random.default_rng(0).integers(1, 1 << 62, rows.shape[1], np.int64) | 1
    _, first, which = np.unique(rows @ factors, return_index=True, return_inverse=True)
    if (rows[first][which] != rows).any():
        _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return np.ascontiguousarray(rows[first[order]]), np.argsort(order)[which.reshape(-1)]
