"""From an automaton over characters to one over the bytes of the mapped stream.

UTF-8 makes a small tree of each state's moves; equal branches of all states are one state. In a
stream with marks a character that is no word character comes as FF c FE, so the first byte already
tells the kind: what depends on the next character is reported there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from streamguard.compiler.regex_dfa import CharDfa, TooLargeError
from streamguard_kernels.utf8 import AFTER_NONWORD, BEFORE_NONWORD

#: Leading bytes of characters of 2, 3 and 4 bytes.
_LEADS = (range(0xC2, 0xE0), range(0xE0, 0xF0), range(0xF0, 0xF5))
_NEVER = -1
_FACTORS = np.random.default_rng(0).integers(1, 1 << 62, 64, np.int64) | 1


@dataclass(frozen=True)
class ByteDfa:
    """A deterministic automaton over bytes; state 0 is somewhere within a text.

    goto     int32[num_states, num_classes]; class_of uint8[256].
    here     per state the regexes, as bits, of which a match ends with the byte that led here;
    before   ... ended before the character that this byte begins.
    start    state at the start of a text.
    idle     per state: between two characters, and no match is under way.
    quiet    int32[num_states]: a copy of the state that does not report what ended before the next
             character, 0 = nothing may have.
    """

    goto: np.ndarray
    class_of: np.ndarray
    here: tuple[int, ...]
    before: tuple[int, ...]
    start: int
    idle: tuple[bool, ...]
    quiet: np.ndarray


def to_bytes(dfa: CharDfa, marks: bool, max_states: int) -> ByteDfa:
    """Spell the moves out in bytes. Raises TooLargeError beyond `max_states`."""
    return _Speller(dfa, marks, max_states).run()


class _Row(NamedTuple):
    """An array of numbers: which there are, and where each stands."""

    used: list[int]
    where: np.ndarray

    @classmethod
    def of(cls, array: np.ndarray) -> _Row:
        used, where = np.unique(array, return_inverse=True)
        return cls(used.tolist(), where.reshape(array.shape))


@dataclass(frozen=True)
class _Tree:
    """UTF-8 over all characters. Leaves are atoms: what templates are made from."""

    ascii: np.ndarray
    rows: tuple[np.ndarray, ...]
    leads: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Template:
    """The tree of UTF-8 under one partition of the characters; leaves are numbers of its parts.

    ascii [128] and rows[0] hold parts, rows[1] numbers of rows[0], rows[2] of rows[1];
    leads[n] numbers of rows[n]. _NEVER = occurs in no text.
    """

    ascii: _Row
    rows: tuple[_Row, ...]
    leads: tuple[_Row, ...]


def _distinct(rows: np.ndarray, fill: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Equal rows once, and which one each row is; a row that never occurs is number _NEVER.

    fill: within a row, what never occurs takes the commonest entry; more rows are equal then.
    """
    never = (rows == _NEVER).sum(1)
    if fill:
        rows = rows.copy()
        for i in np.flatnonzero((never > 0) & (never < rows.shape[1])).tolist():
            row = rows[i]
            row[row == _NEVER] = np.bincount(row[row != _NEVER]).argmax()
    which = np.full(len(rows), _NEVER, np.int64)
    there = never < rows.shape[1]
    found = rows[there]
    if not len(found):
        return found, which
    # By hash: comparing whole rows takes ten times as long. A collision (never seen) is noticed.
    _, first, which[there] = np.unique(found @ _FACTORS, return_index=True, return_inverse=True)
    if (found[first][which[there]] != found).any():
        distinct, which[there] = np.unique(found, axis=0, return_inverse=True)
        return distinct, which
    return found[first], which


def _tree(atom_of: np.ndarray) -> _Tree:
    blocks, block_of = _distinct(atom_of.astype(np.int64).reshape(-1, 64), fill=False)
    pages = block_of.reshape(-1, 64).copy()
    pages[0, :32] = _NEVER  # of 3 bytes only from U+0800 on
    rows, page_of = _distinct(pages, fill=False)
    planes = np.full((5, 64), _NEVER, np.int64)
    planes.reshape(-1)[16 : len(page_of)] = page_of[16:]  # of 4 bytes only from U+10000 on
    planes, plane_of = _distinct(planes, fill=False)
    leads = (block_of[2:32], page_of[:16], plane_of)
    return _Tree(atom_of[:128].astype(np.int64), (blocks, rows, planes), leads)


def _template(tree: _Tree, part_of_atom: np.ndarray) -> _Template:
    """part_of_atom  int64[num_atoms], _NEVER = characters of the atom do not stand here."""
    part_of = np.append(part_of_atom, _NEVER)  # _NEVER stays what it is
    ascii_parts = _Row.of(part_of[tree.ascii])
    rows, leads = [], []
    for level, leads_of in zip(tree.rows, tree.leads, strict=True):
        distinct, which = _distinct(part_of[level])
        part_of = np.append(which, _NEVER)
        rows.append(_Row.of(distinct))
        leads.append(_Row.of(part_of[leads_of]))
    return _Template(ascii_parts, tuple(rows), tuple(leads))


@dataclass
class _Speller:
    dfa: CharDfa
    marks: bool
    max_states: int
    _tree: _Tree = field(init=False)
    _templates: dict[tuple[int, ...], _Template] = field(default_factory=dict)
    _number: dict[object, int] = field(default_factory=dict)
    _todo: list[tuple[str, object]] = field(default_factory=list)
    _here: list[int] = field(default_factory=list)
    _before: list[int] = field(default_factory=list)

    def run(self) -> ByteDfa:
        self._tree = _tree(self.dfa.atom_of)
        self._state("char", 0, 0, 0)
        start = self._state("char", self.dfa.start, 0, 0)
        rows = []
        for kind, what in self._todo:  # grows as we go
            if kind == "char":
                assert isinstance(what, int)
                rows.append(self._character(what))
                if any(self._ends(what)[1:]):
                    self._state("quiet", what, 0, 0)
            elif kind == "quiet":
                assert isinstance(what, int)
                rows.append(self._character(what, quiet=True))
            elif kind == "nonword":
                assert isinstance(what, bytes)
                rows.append(self._nonword(what))
            elif kind == "closing":
                assert isinstance(what, int)
                row = np.zeros(256, np.int32)
                row[AFTER_NONWORD] = self._state("char", what, 0, 0)
                rows.append(row)
            else:
                assert isinstance(what, bytes)
                row = np.zeros(256, np.int32)
                row[0x80:0xC0] = np.frombuffer(what, np.int64)
                rows.append(row)
        idle = set(np.flatnonzero(self.dfa.idle).tolist())
        whole = np.array(rows, np.int32).reshape(len(rows), 256)
        classes: dict[bytes, int] = {}
        columns = np.ascontiguousarray(whole.T)
        class_of = [classes.setdefault(column.tobytes(), len(classes)) for column in columns]
        _, representative = np.unique(class_of, return_index=True)
        return ByteDfa(
            np.ascontiguousarray(whole[:, representative]),
            np.array(class_of, np.uint8),
            tuple(self._here),
            tuple(self._before),
            start,
            tuple(kind == "char" and what in idle for kind, what in self._todo),
            np.array(
                [
                    self._number.get(("quiet", what, 0, 0), 0) * (kind == "char")
                    for kind, what in self._todo
                ],
                np.int32,
            ),
        )

    def _state(self, kind: str, what: object, here: int, before: int) -> int:
        """Number of a state: what comes next from there, and what ended on the way to it."""
        key = kind, what, here, before
        number = self._number.setdefault(key, len(self._number))
        if number == len(self._todo):
            if number == self.max_states:
                raise TooLargeError
            self._todo.append((kind, what))
            self._here.append(here)
            self._before.append(before)
        return number

    def _character(self, state: int, quiet: bool = False) -> np.ndarray:
        """Moves from between two characters."""
        _, if_nonword, if_word = self._ends(state)  # what ended here was reported on the way
        if quiet:
            if_nonword = if_word = 0
        row = np.zeros(256, np.int32)
        targets = self.dfa.target[state].astype(np.int64)
        if not self.marks:
            self._spell(row, targets, "char", 0)
            return row
        self._spell(row, np.where(self.dfa.word, targets, _NEVER), "char", if_word)
        rest = np.where(self.dfa.word, _NEVER, targets)
        row[BEFORE_NONWORD] = self._state("nonword", rest.tobytes(), 0, if_nonword)
        return row

    def _nonword(self, targets: bytes) -> np.ndarray:
        """Moves behind the mark that announces a character outside words."""
        row = np.zeros(256, np.int32)
        self._spell(row, np.frombuffer(targets, np.int64), "closing", 0)
        return row

    def _ends(self, state: int) -> tuple[int, int, int]:
        always, if_nonword, if_word = (self.dfa.outputs[e] for e in self.dfa.ends[state])
        return always, if_nonword, if_word

    def _spell(self, row: np.ndarray, targets: np.ndarray, kind: str, before: int) -> None:
        """Write the moves to `targets` (by atom) into `row`; `before` is reported on the first byte."""
        listed = targets.tolist()
        # In order of atoms: moves to other states by the same partition share a template.
        parts = list(dict.fromkeys(target for target in listed if target != _NEVER))
        place = {target: part for part, target in enumerate(parts)} | {_NEVER: _NEVER}
        key = tuple(place[target] for target in listed)
        tree = self._templates.get(key)
        if tree is None:
            tree = self._templates[key] = _template(self._tree, np.array(key, np.int64))

        def leaf(part: int, before: int) -> int:
            return self._state(kind, parts[part], self._ends(parts[part])[0], before)

        def branch(contents: list[bytes], index: int, before: int) -> int:
            return self._state("bytes", contents[index], 0, before)

        child: Callable[[int, int], int] = leaf
        _write(row[:0x80], tree.ascii, child, before)
        for rows, leads, bytes_of in zip(tree.rows, tree.leads, _LEADS, strict=True):
            children = np.zeros(rows.where.shape, np.int64)
            _write(children, rows, child, 0)
            child = partial(branch, [content.tobytes() for content in children])
            _write(row[bytes_of.start : bytes_of.stop], leads, child, before)


def _write(out: np.ndarray, what: _Row, child: Callable[[int, int], int], before: int) -> None:
    """Put child(n, before) where `what` holds n, and 0 for what never occurs."""
    numbers = [0 if n == _NEVER else child(n, before) for n in what.used]
    out[...] = np.array(numbers, np.int64)[what.where] if numbers else 0
