"""Subset construction over characters: regexes together as one deterministic automaton, minimised.

A state is the set of positions that were just met and the kind of the character that met them. It
reports the *ends* of all matches: a regex is searched for from every place of the text at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamguard.compiler.regex_classes import CharSet, atoms, category
from streamguard.compiler.regex_nfa import ALL_GAPS, INNER_GAPS, START, Nfa, bits

#: Most states before they are minimised, and most elementary steps: about a second.
MAX_RAW_STATES = 20_000
MAX_STEPS = 2_000_000
#: Rounds of refinement, and table entries read in all, after which an automaton is left as it is.
_MAX_ROUNDS, _MAX_READ = 300, 30_000_000


class TooLargeError(Exception):
    """The automaton does not fit its budget."""


@dataclass(frozen=True)
class CharDfa:
    """A deterministic automaton over classes of characters; state 0 is somewhere within a text.

    atom_of  int32[0x110000]: class of each character, -1 = surrogate. word bool[num_atoms].
    target   int32[num_states, num_atoms].
    ends     int64[num_states, 3]: regexes, as numbers into `outputs`, of which a match ends with the
             character that led here, and of which one does if a character that is no word character
             (or the end), or one that is, comes next.
    start    state at the start of a text.
    idle     bool[num_states]: no match is under way.
    """

    atom_of: np.ndarray
    word: np.ndarray
    target: np.ndarray
    ends: np.ndarray
    outputs: tuple[int, ...]
    start: int
    idle: np.ndarray


def determinise(nfas: Sequence[Nfa], marks: bool, max_raw_states: int = MAX_RAW_STATES) -> CharDfa:
    """Build the automaton that finds all `nfas`; `outputs` hold which, as bits.

    nfas  of one `values`: those with a checksum come one by one.
    Raises TooLargeError beyond `max_raw_states` or MAX_STEPS, after about a second at most.
    """
    sets: dict[CharSet, int] = {}
    position_set = [sets.setdefault(chars, len(sets)) for nfa in nfas for chars in nfa.classes]
    words = category("CATEGORY_WORD", False)
    if marks:
        sets.setdefault(words, len(sets))
    of_value = [sets.setdefault(chars, len(sets)) for chars in nfas[0].values]
    atom_of, members = atoms(list(sets))
    takes = [0] * len(sets)  # positions by set
    for position, index in enumerate(position_set):
        takes[index] |= 1 << position
    atom_takes = [_gather(takes, held) for held in members]
    is_word = [bool(marks and held >> sets[words] & 1) for held in members]

    first, follow, last = _together(nfas)
    kinds = (0, 1) if marks else (0,)
    # (value, its atoms of this kind), where there are any
    of_kind = [
        [
            (value, mine)
            for value, index in enumerate(of_value)
            if (
                mine := [
                    a for a, held in enumerate(members) if held >> index & 1 and is_word[a] == kind
                ]
            )
        ]
        for kind in (0, 1)
    ]
    begins = START if any(nfa.starts for nfa in nfas) else 0
    # (positions, 1 = after a word character, kind of gap that matches may begin in, less `after`)
    middle = (0, 1, 2) if marks else (0, 0, 0)
    start = (0, 0, begins)
    number = {middle: 0}
    number.setdefault(start, len(number))
    states = list(number)
    target: list[list[int]] = []
    ends: list[tuple[int, int, int]] = []
    outputs: dict[int, int] = {0: 0}
    steps = 0
    for positions, _, before in states:  # grows as we go
        held = list(bits(positions))
        row = [0] * len(members)
        steps += len(held) * len(kinds) * len(of_value) + len(members)
        if steps > MAX_STEPS or len(states) > max_raw_states:
            raise TooLargeError
        ended = [0, 0]
        for kind in kinds:
            inner = (before & 3) + kind
            for regex, bits_of in enumerate(last):
                if positions & bits_of[inner]:
                    ended[kind] |= 1 << regex
            for value, mine in of_kind[kind]:
                following = first[value][before + kind]
                for position in held:
                    following |= follow[position][value][inner]
                for atom in mine:
                    key = (following & atom_takes[atom], kind, 2 * kind)
                    known = number.get(key)
                    if known is None:
                        known = number[key] = len(states)
                        states.append(key)
                    row[atom] = known
        always = ended[0] & ended[1] if marks else ended[0]
        later = [e & ~always if marks else 0 for e in ended]
        target.append(row)
        ends.append(tuple(outputs.setdefault(e, len(outputs)) for e in (always, *later)))  # type: ignore[arg-type]
    whole = CharDfa(
        atom_of,
        np.array(is_word, bool),
        np.array(target, np.int32).reshape(len(states), len(members)),
        np.array(ends, np.int64),
        tuple(outputs),
        number[start],
        np.array([positions == 0 for positions, _, _ in states], bool),
    )
    return _minimised(whole)


def _gather(takes: Sequence[int], held: int) -> int:
    positions = 0
    for index in bits(held):
        positions |= takes[index]
    return positions


def _together(
    nfas: Sequence[Nfa],
) -> tuple[list[list[int]], list[tuple[tuple[int, ...], ...]], list[list[int]]]:
    """first, follow and, per regex, last over the positions of all, one regex after another."""
    first = [[0] * len(ALL_GAPS) for _ in nfas[0].values]
    follow: list[tuple[tuple[int, ...], ...]] = []
    last: list[list[int]] = []
    for nfa in nfas:
        shift = len(follow)
        for mine, of_gap in zip(first, nfa.first, strict=True):
            for gap in ALL_GAPS:
                mine[gap] |= of_gap[gap] << shift
        last.append([nfa.last[gap] << shift for gap in INNER_GAPS])
        if shift:
            follow += [
                tuple(tuple(mask << shift for mask in of_gap) for of_gap in by_value)
                for by_value in nfa.follow
            ]
        else:  # as they are: with a checksum there are many
            follow += nfa.follow
    return first, follow, last


def _minimised(dfa: CharDfa) -> CharDfa:
    """Merge the states that nothing tells apart (Moore's refinement, rows compared by hash)."""
    num_atoms = dfa.target.shape[1]
    random = np.random.default_rng(0)  # any odd factors will do; the result is checked below
    factors = random.integers(1, 1 << 62, num_atoms + 1, np.int64) | 1
    _, block = np.unique(dfa.ends, axis=0, return_inverse=True)
    block = block.reshape(-1).astype(np.int64)
    count = int(block.max()) + 1
    for _ in range(min(_MAX_ROUNDS, _MAX_READ // dfa.target.size)):
        hashed = block * factors[-1]
        hashed = hashed + ((block[dfa.target] + 1) * factors[:-1]).sum(1)
        _, block = np.unique(hashed, return_inverse=True)
        before, count = count, int(block.max()) + 1
        if count == before:
            break
    else:
        return dfa
    _, kept = np.unique(block, return_index=True)
    # State 0 stays state 0.
    order = np.argsort(kept)
    renumber = np.empty(count, np.int64)
    renumber[order] = np.arange(count)
    new, kept = renumber[block], kept[order]
    idle = np.zeros(count, bool)
    idle[new[dfa.idle]] = True  # one that behaves as an idle one does is one
    merged = CharDfa(
        dfa.atom_of, dfa.word, new[dfa.target[kept]].astype(np.int32), dfa.ends[kept], dfa.outputs,
        int(new[dfa.start]), idle,
    )  # fmt: skip
    same = (merged.target[new] == new[dfa.target]).all() and (merged.ends[new] == dfa.ends).all()
    return merged if same else dfa
