"""Find matches in a byte stream that arrives in chunks: `streamguard scan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from streamguard.compiler.program import Program
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
        p = program.default_policy if policy is None else policy
        self._tables = t
        self._lo, self._hi = int(t.policy_tracks[p]), int(t.policy_tracks[p + 1])
        num = self._hi - self._lo
        longest = int(t.pattern_length.max()) + 1  # not max_depth: regexes have no place to keep
        size = 1 << int(2 * longest + 64).bit_length()
        self._states = t.track_start[self._lo : self._hi].copy()
        self._positions = np.zeros(num, np.int64)
        self._ring = np.zeros((num, size), np.int64)
        self._pending = np.zeros(2, np.int64)
        most = 0
        for track in range(self._lo, self._hi):
            first = t.track_states[track]
            of_track = slice(first, first + program.states_of_track(track))
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

    def feed(self, chunk: bytes) -> Iterator[Match]:
        """Matches that the chunk makes certain."""
        for at in range(0, len(chunk), _BLOCK):
            yield from self._step(
                np.frombuffer(bytearray(chunk[at : at + _BLOCK]), np.uint8), final=False
            )

    def finish(self) -> Iterator[Match]:
        """Matches that the end of the stream makes certain."""
        yield from self._step(np.zeros(0, np.uint8), final=True)

    def _step(self, data: np.ndarray, *, final: bool) -> Iterator[Match]:
        left = len(data) + final
        while left:
            consumed, count = scan_kernel(
                self._tables, self._lo, self._hi, data, self._position, self._states,
                self._positions, self._ring, self._pending, self._found, int(final), self._reserve,
            )  # fmt: skip
            data = data[consumed:]
            self._position += consumed
            left -= consumed
            if not count:
                continue
            found = self._found[:count]
            # (known at, end, rule, start): the earliest start of each end and rule comes first
            found = found[np.lexsort((found[:, 3], found[:, 2], found[:, 1], found[:, 0]))]
            previous = None
            for known_at, end, rule, start in found.tolist():
                if (end, rule) == previous:
                    continue
                previous = (end, rule)
                if self._has_regexes:
                    self._recent = [seen for seen in self._recent if seen[0] >= known_at - 8]
                    if previous in self._recent:
                        continue
                    self._recent.append(previous)
                yield Match(rule, start if start >= 0 else None, end)
