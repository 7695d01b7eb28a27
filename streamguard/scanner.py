"""Find matches in a byte stream that arrives in chunks: `streamguard scan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from streamguard.compiler.program import Program
from streamguard.compiler.rules import MASK, STOP
from streamguard_kernels.packing import address
from streamguard_kernels.scan import (
    CALL_SIZE,
    CLOSINGS,
    COUNT,
    FINAL,
    HI,
    HOLD,
    LENGTH,
    LO,
    POSITION,
    RESERVE,
    WATCH,
    Reading,
    most_matches_per_byte,
    pack_reading,
    scan_kernel,
)
from streamguard_kernels.tables import Tables, pack_tables
from streamguard_kernels.utf8 import MAX_MAPPED_BYTES

_BLOCK = 1 << 16
#: Most bytes that `Scanner.watch` takes at a time.
WATCHED = 1 << 12


class Match(NamedTuple):
    """One match: bytes start..end (exclusive) of the raw stream, and the rule's global index.

    start is None where a regex ends: it may have begun at several places.
    """

    rule: int
    start: int | None
    end: int


class Scanner:
    """Matches of one policy over one stream, the same whatever the chunks.

    Matches come in the order in which they become certain: a match of a `boundary: word` rule is
    certain only with the next character. One per rule and end, with the earliest start.

    watching  whether `watch` will be called, in place of `feed` and `rows`.
    """

    def __init__(
        self, program: Program, policy: int | None = None, *, watching: bool = False
    ) -> None:
        plan = _plan_of(program, program.default_policy if policy is None else policy)
        num = len(plan.start)
        place = np.zeros(5 * num + 2, np.int64)
        states, positions, quiet, newest, pending = np.split(
            place, [num, 2 * num, 3 * num, 5 * num]
        )
        states[:] = plan.start
        num_bytes = WATCHED if watching else _BLOCK
        self._reading = Reading(
            place, states, positions, quiet, newest, pending, place.copy(),
            idle=np.full(num, -1, np.int64),
            ring=np.zeros((num, plan.ring_size), np.int64),
            buffer=np.empty(MAX_MAPPED_BYTES, np.uint8),
            depths=program.hold_depths if watching else np.zeros(0, np.int32),
            first=program.first_states,
            withholds=plan.withholds,
            data=np.empty(num_bytes, np.uint8),
            found=np.empty((4096 + 2 * plan.reserve, 4), np.int64),
            closings=np.empty((2 * num_bytes + 2 if watching else 0, 2), np.int64),
        )  # fmt: skip
        self._data = memoryview(self._reading.data)  # type: ignore[arg-type]
        # Kept, because kernels have nothing but the addresses.
        self._plan, self._packed = plan, pack_reading(self._reading)
        self._arguments = np.zeros(CALL_SIZE, np.int64)
        self._call = memoryview(self._arguments)  # type: ignore[arg-type]
        self._call[0], self._call[1] = address(plan.packed_tables), address(self._packed)
        self._call[LO], self._call[HI] = plan.lo, plan.lo + num
        self._call[RESERVE], self._call[WATCH] = plan.reserve, int(watching)
        #: Bytes read so far.
        self.position = 0
        # A rule's literals and regexes may find one end at different bytes: up to a character apart.
        self._recent: list[tuple[int, int]] = []

    @property
    def hold_start(self) -> int:
        """Offset before which nothing can be part of a match of a withholding rule any more.

        Everything behind it can: of a match that has begun, or of an unfinished character. As it was
        after the last `watch`.
        """
        return self._call[HOLD]

    def feed(self, chunk: bytes) -> Iterator[Match]:
        """Matches that the chunk makes certain."""
        for at in range(0, len(chunk), _BLOCK):
            for rows in self.rows(chunk[at : at + _BLOCK], final=False):
                yield from _matches(rows)

    def finish(self) -> Iterator[Match]:
        """Matches that the end of the stream makes certain."""
        for rows in self.rows(b"", final=True):
            yield from _matches(rows)

    def rows(self, block: bytes, *, final: bool) -> Iterator[np.ndarray]:
        """The same as int64[num_matches, 4]: known at, end, rule, start; one per rule and end.

        known at = offset of the byte that made it certain (the stream's length for its end).
        """
        done = 0
        while done < len(block) + final:
            steps = self._read(block[done:] if done else block, final)
            done += steps
            if self._call[COUNT]:
                yield self._rows()

    def watch(self, block: bytes | bytearray, *, final: bool) -> tuple[int, np.ndarray | None]:
        """Read up to the next withheld match; return (steps taken, rows as above or None).

        block  at most WATCHED bytes, maybe none. Every byte is a step, and so is the end.
        A byte that completes a withheld match is read alone: the call before stops in front of it.
        """
        steps = self._read(block, final)
        return steps, (self._rows() if self._call[COUNT] else None)

    def closings(self) -> list[tuple[int, int]]:
        """What the last `watch` came by: (offset, start of the character before it) of places.

        If the text ended there it would show a match of a withholding rule.
        """
        count = self._call[CLOSINGS]
        if not count:
            return []
        return [(at, before) for at, before in self._reading.closings[:count].tolist()]

    def restart(self, position: int) -> None:
        """Go on at `position` as at the start of a text; what was read before is forgotten."""
        self._reading.states[:] = self._plan.start
        self._reading.pending[:] = 0
        self._reading.quiet[:] = position
        self._recent.clear()
        self.position = position

    def _read(self, block: bytes | bytearray, final: bool) -> int:
        call, size = self._call, len(block)
        self._data[:size] = block
        call[POSITION], call[LENGTH], call[FINAL] = self.position, size, final
        steps: int = scan_kernel(self._arguments)
        self.position += min(steps, size)
        return steps

    def _rows(self) -> np.ndarray:
        found = self._reading.found[: self._call[COUNT]]
        # The earliest start of each end and rule comes first.
        found = found[np.lexsort((found[:, 3], found[:, 2], found[:, 1], found[:, 0]))]
        first = np.ones(len(found), bool)
        first[1:] = (found[1:, 1:3] != found[:-1, 1:3]).any(axis=1)
        found = found[first]
        return self._unseen(found) if self._plan.has_regexes else found

    def _unseen(self, found: np.ndarray) -> np.ndarray:
        """Leave out what a rule's literals or regexes found at an earlier byte."""
        new = []
        for row in found.tolist():
            self._recent = [seen for seen in self._recent if seen[0] >= row[0] - 8]
            new.append((row[1], row[2]) not in self._recent)
            if new[-1]:
                self._recent.append((row[1], row[2]))
        return found[new]


@dataclass(frozen=True)
class _Plan:
    """What all readings of one policy share.

    lo         its first track; start: int64[num_tracks], their states at the start of a text.
    reserve    rows of matches that one byte can need.
    withholds  uint8[num_rules], as in `Reading`.
    """

    tables: Tables
    packed_tables: np.ndarray
    lo: int
    start: np.ndarray
    ring_size: int
    reserve: int
    withholds: np.ndarray
    has_regexes: bool


def _plan_of(program: Program, policy: int) -> _Plan:
    """Made once for a program, and kept with it: it takes longer than all else of a new stream."""
    plans = program.scan_plans
    if policy not in plans:
        t = program.tables
        lo, hi = int(t.policy_tracks[policy]), int(t.policy_tracks[policy + 1])
        longest = (
            int(t.pattern_length.max(initial=0)) + 1
        )  # not max_depth: regexes have no place to keep
        # A byte can end two characters, of at most MAX_MAPPED_BYTES each, in every track.
        most = max(1, _most_matches(program, lo, hi)) * 2 * MAX_MAPPED_BYTES * (hi - lo)
        withholds = np.array([r.group in (MASK, STOP) for r in program.rules], np.uint8)
        plans[policy] = _Plan(
            t, pack_tables(t), lo, t.track_start[lo:hi],
            1 << int(2 * longest + 64).bit_length(), most, withholds,
            bool(t.track_regex[lo:hi].any()),
        )  # fmt: skip
    return plans[policy]


def _most_matches(program: Program, lo: int, hi: int) -> int:
    t = program.tables
    most = 0
    for track in range(lo, hi):
        if t.track_twin[track]:
            continue
        mine = program.outputs_of_track(track)
        most = max(
            most,
            most_matches_per_byte(t.first_pattern[mine], t.next_pattern, t.suffix_link[mine]),
        )
    return most


def _matches(rows: np.ndarray) -> Iterator[Match]:
    for _, end, rule, start in rows.tolist():
        yield Match(rule, start if start >= 0 else None, end)
