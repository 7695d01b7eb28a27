"""Sets of characters: what a class of a regex means, as ranges of code points.

A set is a sorted tuple of disjoint (first, last) pairs, both included. Surrogates are in no set: no
text holds them.
"""

from __future__ import annotations

import _sre
import re
import re._casefix as _casefix
from bisect import bisect_left
from collections.abc import Iterable
from functools import cache

import numpy as np

from streamguard.compiler.mapping import nonword_flags

CharSet = tuple[tuple[int, int], ...]

LAST = 0x10FFFF
#: No character above this one has case (see `mapping`).
_LAST_CASED = 0x1FFFF
_SURROGATES = (0xD800, 0xDFFF)
_NAMES = {
    "DIGIT": "d",
    "SPACE": "s",
    "WORD": "w",
}


def make(ranges: Iterable[tuple[int, int]]) -> CharSet:
    """Sort and join ranges; leave the surrogates out."""
    joined: list[list[int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    kept = []
    low, high = _SURROGATES
    for first, last in joined:
        if last < low or first > high:
            kept.append((first, last))
            continue
        if first < low:
            kept.append((first, low - 1))
        if last > high:
            kept.append((high + 1, last))
    return tuple(kept)


def negate(chars: CharSet) -> CharSet:
    """Every other character."""
    gaps, at = [], 0
    for first, last in chars:
        if at < first:
            gaps.append((at, first - 1))
        at = last + 1
    if at <= LAST:
        gaps.append((at, LAST))
    return make(gaps)


def common(one: CharSet, other: CharSet) -> CharSet:
    """The characters that both hold."""
    return negate(make((*negate(one), *negate(other))))


@cache
def category(name: str, ascii_only: bool) -> CharSet:
    r"""\d, \s, \w and their negations by the parser's names: CATEGORY_DIGIT, CATEGORY_NOT_WORD.

    \w is what `boundary: word` and \b count as a word character (TR18: marks and join controls
    too), not Python's narrower one: \w and \b must agree.
    """
    name = name.removeprefix("CATEGORY_")
    positive = name.removeprefix("NOT_")
    letter = _NAMES[positive]
    if ascii_only:
        found = [(c, c) for c in range(128) if re.fullmatch(f"(?a:\\{letter})", chr(c))]
    elif letter == "w":
        inside = np.flatnonzero(np.diff(nonword_flags(), prepend=1, append=1))
        found = list(zip(inside[::2].tolist(), (inside[1::2] - 1).tolist(), strict=True))
    else:
        every = "".join(map(chr, range(LAST + 1)))
        found = [(m.start(), m.end() - 1) for m in re.finditer(f"\\{letter}+", every)]
    chars = make(found)
    return chars if positive == name else negate(chars)


@cache
def _cased() -> tuple[list[int], dict[int, list[int]]]:
    """All characters that have case, in order; and by lower case, those that share it."""
    cased = [c for c in range(_LAST_CASED + 1) if _sre.unicode_iscased(c)]
    by_lower: dict[int, list[int]] = {}
    for c in cased:
        by_lower.setdefault(_sre.unicode_tolower(c), []).append(c)
    return cased, by_lower


def fold(chars: CharSet, ascii_only: bool) -> CharSet:
    """Add what equals a member under `re.IGNORECASE`: simple case, one character for one."""
    more: list[tuple[int, int]] = []
    if ascii_only:
        for c in range(128):
            if chr(c).isalpha() and _holds(chars, c):
                more.append((c ^ 0x20, c ^ 0x20))
        return make((*chars, *more))
    cased, by_lower = _cased()
    for first, last in chars:
        for at in range(bisect_left(cased, first), len(cased)):
            c = cased[at]
            if c > last:
                break
            lower = _sre.unicode_tolower(c)
            # `re` keeps by hand those that lower() alone does not join, such as s and ſ.
            for same in (lower, *_casefix._EXTRA_CASES.get(lower, ())):
                more += [(other, other) for other in (same, *by_lower.get(same, ()))]
    return make((*chars, *more))


def _holds(chars: CharSet, c: int) -> bool:
    return any(first <= c <= last for first, last in chars)


def atoms(sets: list[CharSet]) -> tuple[np.ndarray, list[int]]:
    """Cut all characters into classes that no set tells apart.

    Returns atom_of int32[0x110000] (-1 = surrogate) and, per atom, the sets that hold it as bits.
    """
    toggles: dict[int, int] = {0: 0}
    for index, chars in enumerate(sets):
        for first, last in chars:
            toggles[first] = toggles.get(first, 0) ^ (1 << index)
            toggles[last + 1] = toggles.get(last + 1, 0) ^ (1 << index)
    atom_of = np.zeros(LAST + 1, np.int32)
    members: dict[int, int] = {}
    inside = 0
    bounds = sorted(at for at in toggles if at <= LAST)
    for at, after in zip(bounds, [*bounds[1:], LAST + 1], strict=True):
        inside ^= toggles[at]
        atom_of[at:after] = members.setdefault(inside, len(members))
    low, high = _SURROGATES
    atom_of[low : high + 1] = -1
    return atom_of, list(members)
