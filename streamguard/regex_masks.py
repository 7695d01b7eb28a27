"""Which tokens a regex forbids in a state: worked out when a text first gets there, then kept."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from streamguard.compiler.program import Program
from streamguard_kernels.lookahead import token_order
from streamguard_kernels.regex_masks import completing_tokens, shared_beginnings

#: Most bytes of kept answers; the one that was not asked for longest goes first.
MAX_KEPT_BYTES = 64 << 20
_ENTRY_BYTES = 300  # of an answer without tokens


class RegexMasks:
    """The look-ahead of a program's regex tracks.

    Cost: about 0.5 ms for 50,000 tokens the first time in a state, then a look-up. Not thread-safe.
    """

    def __init__(self, program: Program) -> None:
        self._tables = program.tables
        self._orders: dict[int, tuple[NDArray[np.int32], NDArray[np.int32]]] = {}
        # Long lists are kept as bits: that is shorter from one token in 32 on.
        self._kept: OrderedDict[tuple[int, int], tuple[bool, NDArray[np.generic]]] = OrderedDict()
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all answers that are kept."""
        return self._size_bytes

    def tokens(self, track: int, state: int, group: int) -> NDArray[np.integer]:
        """Ordinary tokens that complete a match of `group` (a bit) in one track, ascending.

        state  as slots keep it, between two characters.
        """
        key = state, group  # states are numbered over all tracks; twins share theirs
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = self._pack(self._walk(track, state, group))
            self._size_bytes += found[1].nbytes + _ENTRY_BYTES
            while self._size_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
                _, (_, dropped) = self._kept.popitem(last=False)
                self._size_bytes -= dropped.nbytes + _ENTRY_BYTES
        else:
            self._kept.move_to_end(key)
        as_bits, array = found
        if as_bits:
            num_tokens = len(self._tables.token_special)
            return np.flatnonzero(np.unpackbits(array.view(np.uint8), count=num_tokens))
        return array.view(np.int32)

    def _pack(self, tokens: NDArray[np.int32]) -> tuple[bool, NDArray[np.generic]]:
        num_tokens = len(self._tables.token_special)
        if 32 * len(tokens) <= num_tokens:
            return False, tokens
        flags = np.zeros(num_tokens, np.uint8)
        flags[tokens] = 1
        return True, np.packbits(flags)

    def _walk(self, track: int, state: int, group: int) -> NDArray[np.int32]:
        t = self._tables
        mapping = int(t.track_mapping[track])
        offsets = t.token_offsets[mapping]
        if mapping not in self._orders:
            order = token_order(offsets, t.token_data, t.token_special)
            self._orders[mapping] = order, shared_beginnings(order, offsets, t.token_data)
        order, shared = self._orders[mapping]
        found: NDArray[np.int32] = completing_tokens(
            t.trans, t.class_of[track], int(t.track_base[track]), int(t.track_classes[track]),
            t.groups[t.track_places[track] :], group, state, order, shared, offsets, t.token_data,
        )  # fmt: skip
        return found
