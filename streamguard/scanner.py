"""Find matches in a byte stream that arrives in chunks: `streamguard scan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from streamguard_kernels.scan import scan_kernel

from streamguard.compiler.program import Program

_BLOCK = 1 << 16


class Match(NamedTuple):
    """One match: bytes start..end (exclusive) of the raw stream, and the rule's global index."""

    rule: int
    start: int
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
        size = 1 << int(2 * program.max_depth + 64).bit_length()
        self._walk = (  # what the kernel changes
            t.track_start[self._lo : self._hi].copy(),
            np.zeros(num, np.int64),
            np.zeros((num, size), np.int64),
            np.zeros(2, np.int64),
        )
        self._found = np.empty((4096, 4), np.int64)
        self._position = 0

    def feed(self, chunk: bytes) -> Iterator[Match]:
        """Matches that the chunk makes certain."""
        for at in range(0, len(chunk), _BLOCK):
            yield from self._step(np.frombuffer(bytearray(chunk[at : at + _BLOCK]), np.uint8), final=False)

    def finish(self) -> Iterator[Match]:
        """Matches that the end of the stream makes certain."""
        yield from self._step(np.zeros(0, np.uint8), final=True)

    def _step(self, data: np.ndarray, *, final: bool) -> Iterator[Match]:
        while True:
            states, positions, ring, pending = (array.copy() for array in self._walk)
            count = scan_kernel(
                self._tables, self._lo, self._hi, data, self._position, states, positions, ring,
                pending, self._found, int(final),
            )  # fmt: skip
            if count <= len(self._found):
                break
            self._found = np.empty((2 * count, 4), np.int64)
        self._walk = (states, positions, ring, pending)
        self._position += len(data)
        found = self._found[:count]
        # (known at, end, rule, start); the earliest start of each end and rule comes first
        found = found[np.lexsort((found[:, 3], found[:, 2], found[:, 1], found[:, 0]))]
        previous = None
        for _, end, rule, start in found.tolist():
            if (end, rule) != previous:
                yield Match(rule, start, end)
            previous = (end, rule)
