"""Find matches in a byte stream that arrives in chunks: `streamguard scan`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from streamguard.compiler.program import Program
from streamguard_kernels.hold import hold_start
from streamguard_kernels.scan import most_matches_per_byte, scan_kernel
from streamguard_kernels.utf8 import MAX_MAPPED_BYTES

_BLOCK = 1 << 16


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
    """

    def __init__(self, program: Program, policy: int | None = None) -> None:
        t = program.tables
        self._program = program
        p = program.default_policy if policy is None else policy
        self._tables = t
        self._lo, self._hi = int(t.policy_tracks[p]), int(t.policy_tracks[p + 1])
        num = self._hi - self._lo
        longest = int(t.pattern_length.max()) + 1  # not max_depth: regexes have no place to keep
        size = 1 << int(2 * longest + 64).bit_length()
        # One array, so that a checkpoint is one copy.
        self._place = np.zeros(5 * num + 2, np.int64)
        self._states, self._positions, self._quiet, newest, self._pending = np.split(
            self._place, [num, 2 * num, 3 * num, 5 * num]
        )
        self._newest = newest.reshape(num, 2)
        self._states[:] = t.track_start[self._lo : self._hi]
        self._ring = np.zeros((num, size), np.int64)
        most = 0
        for track in range(self._lo, self._hi):
            of_track = program.outputs_of_track(track)
            most = max(
                most,
                most_matches_per_byte(
                    t.first_pattern[of_track], t.next_pattern, t.suffix_link[of_track]
                ),
            )
        # A byte can end two characters, of at most MAX_MAPPED_BYTES each, in every track.
        self._reserve = max(1, most) * 2 * MAX_MAPPED_BYTES * num
        self._found = np.empty((4096 + 2 * self._reserve, 4), np.int64)
        self._position = 0
        # A rule's literals and regexes may find one end at different bytes: up to a character apart.
        self._recent: list[tuple[int, int]] = []
        self._has_regexes = bool(t.track_regex[self._lo : self._hi].any())

    @cached_property
    def _hold_depths(self) -> np.ndarray:
        return self._program.hold_depths

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._position

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
        data = np.frombuffer(bytearray(block), np.uint8)
        left = len(data) + final
        while left:
            consumed, count = scan_kernel(
                self._tables, self._lo, self._hi, data, self._position, self._states,
                self._positions, self._ring, self._newest, self._pending, self._found, int(final),
                self._reserve,
            )  # fmt: skip
            data = data[consumed:]
            # The end is a step of its own, but no byte.
            self._position += consumed - (final and consumed == left)
            left -= consumed
            if not count:
                continue
            found = self._found[:count]
            # The earliest start of each end and rule comes first.
            found = found[np.lexsort((found[:, 3], found[:, 2], found[:, 1], found[:, 0]))]
            first = np.ones(count, bool)
            first[1:] = (found[1:, 1:3] != found[:-1, 1:3]).any(axis=1)
            found = found[first]
            yield self._unseen(found) if self._has_regexes else found

    def _unseen(self, found: np.ndarray) -> np.ndarray:
        """Leave out what a rule's literals or regexes found at an earlier byte."""
        new = []
        for row in found.tolist():
            self._recent = [seen for seen in self._recent if seen[0] >= row[0] - 8]
            new.append((row[1], row[2]) not in self._recent)
            if new[-1]:
                self._recent.append((row[1], row[2]))
        return found[new]

    def restart(self, position: int) -> None:
        """Go on at `position` as at the start of a text; what was read before is forgotten."""
        self._states[:] = self._tables.track_start[self._lo : self._hi]
        self._pending[:] = 0
        self._quiet[:] = position
        self._recent.clear()
        self._position = position

    def save(self) -> Checkpoint:
        """Where the reading stands, to come back to it with `load`."""
        return Checkpoint(self._place.copy(), self._position, tuple(self._recent))

    def load(self, saved: Checkpoint) -> None:
        """Come back to a checkpoint of this or another scanner of the same policy.

        Starts of matches and of the hold are right only for what is read from then on.
        """
        self._place[:] = saved.place
        self._position = saved.position
        self._recent = list(saved.recent)

    def hold_start(self) -> int:
        """Offset before which nothing can be part of a match of a withholding rule any more.

        Everything behind it can: of a match that has begun, or of an unfinished character.
        """
        t = self._tables
        end = int(self._pending[1]) if self._pending[0] else self._position
        return int(
            hold_start(
                self._hold_depths, t.track_base, t.track_classes, self._program.first_states, t.track_twin,
                self._lo, self._states, self._positions, self._ring, self._quiet, end,
            )
        )  # fmt: skip


class Checkpoint(NamedTuple):
    """Where a `Scanner` stands. place: its states, positions and pending as in `scan_kernel`."""

    place: np.ndarray
    position: int
    recent: tuple[tuple[int, int], ...]


def _matches(rows: np.ndarray) -> Iterator[Match]:
    for _, end, rule, start in rows.tolist():
        yield Match(rule, start if start >= 0 else None, end)
