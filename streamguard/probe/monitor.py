"""Probe rules over a batch of texts, on the host: scores in, the rules that fired out.

Engine-free. The V1 runner and the tests' fake engine drive it through `RowGuard`; the device kernel
(`streamguard_kernels.device_probe`) must agree with it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamguard.errors import ShapeError
from streamguard.probe.columns import ProbeTable
from streamguard_kernels.packing import address
from streamguard_kernels.probe import (
    NUM_BUCKETS,
    Monitors,
    MonitorSlots,
    pack_monitors,
    read_scores,
)


class Monitor:
    """Statistics and alarms of `num_slots` concurrent texts.

    State is a function of the scores of a text's positions, each read once: rows that come again
    after a restart are skipped, and rows that are missing are a failure. Not thread-safe.
    """

    def __init__(self, table: ProbeTable, num_slots: int) -> None:
        if num_slots < 1:
            raise ShapeError(f"num_slots is {num_slots}; a monitor needs at least 1 slot.")
        self.table = table
        fields = {name: getattr(table, name) for name in Monitors._fields}
        fields["stop"] = fields["stop"].astype(np.uint8)
        watched = table.rule.shape[1]
        self._s = MonitorSlots(
            policy=np.full(num_slots, -1, np.int64),
            prompt_len=np.zeros(num_slots, np.int64),
            count_from=np.zeros(num_slots, np.int64),
            expected=np.zeros(num_slots, np.int64),
            value=np.zeros((num_slots, watched), np.float32),
            ring=np.zeros((num_slots, watched, int(table.size.max())), np.float32),
            above=np.zeros((num_slots, watched), np.uint8),
            pending=np.zeros((num_slots, watched), np.uint8),
            failed=np.zeros(num_slots, np.uint8),
            news=np.zeros(num_slots, np.uint8),
            counts=np.zeros((table.num_columns, NUM_BUCKETS), np.int64),
            sums=np.zeros(table.num_columns),
        )
        # Kept, because kernels have nothing but the addresses.
        self._m = Monitors(**fields)
        self._packed = pack_monitors(self._m, self._s)
        self._call = np.array([address(packed) for packed in self._packed], np.int64)
        none = np.zeros(0, np.int64)  # compiles the kernel now, not at the first request
        self.feed(none, none, np.zeros(1, np.int64), np.zeros((0, table.num_columns), np.float32))

    def reset(self, slot: int, policy: int, prompt_len: int, count_from: int | None = None) -> None:
        """Begin a text, or begin it again, in a slot: its scores are read from the start.

        policy      index in the rule table. prompt_len: tokens of its prompt.
        count_from  position of the first token whose crossings of an observe rule count. A request
                    of `length` tokens that resumes gives length - 1: all before was counted. The
                    prompt's last token if None, which is that of a new request.
        """
        if not 0 <= slot < len(self._s.policy) or not 0 <= policy < len(self._m.rule):
            raise ShapeError(
                f"slot is {slot}, policy {policy}; allowed: 0..{len(self._s.policy) - 1} and "
                f"0..{len(self._m.rule) - 1}."
            )
        s = self._s
        s.policy[slot], s.prompt_len[slot] = policy, prompt_len
        s.count_from[slot] = prompt_len - 1 if count_from is None else count_from
        s.expected[slot] = 0 if self.table.reads_prompt(policy) else prompt_len
        s.value[slot], s.above[slot], s.pending[slot] = 0, 0, 0
        s.failed[slot] = s.news[slot] = 0

    def release(self, slot: int) -> None:
        """Forget a slot: its rows are not read and nothing fires until its next `reset`."""
        self._s.policy[slot] = -1
        self._s.failed[slot] = self._s.news[slot] = 0

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many scores fell into which bucket so far: int64[num_columns, NUM_BUCKETS]; ever growing."""
        return self._s.counts

    @property
    def sums(self) -> NDArray[np.float64]:
        """Sum of the scores counted: float64[num_columns]."""
        return self._s.sums

    def feed(
        self,
        slots: ArrayLike,
        starts: ArrayLike,
        row_offsets: ArrayLike,
        scores: ArrayLike,
        num_output: ArrayLike | None = None,
        commits: ArrayLike | None = None,
    ) -> NDArray[np.bool_]:
        """Read the scores of one step; return which slots have failed: bool[n].

        slots        int[n]; starts int[n]: position in the text, prompt included and counted from
                     0, of each slot's first row.
        row_offsets  int[n + 1]: slot i owns scores[row_offsets[i]:row_offsets[i + 1]].
        scores       float32[>= num_rows, num_columns], columns as `ProbeTable` has them.
        num_output   int[n]: tokens of each text behind its prompt; commits bool[n]: whether the
                     engine will commit a sample of the row. Nothing is committed if None.

        A slot fails for good if a position is missing, or a score that its policy reads is NaN or
        infinite: the caller applies `on_error`. So does, this time, a row that commits while scores
        of its text are unread: nothing would fire, and nobody would know. The newest scores of rows
        that commit and have not failed are counted, by column. Cost: some microseconds, and about
        30 ns a row and monitor. Raises ShapeError for shapes and slots that do not fit; nothing is
        read then.
        """
        mine = np.ascontiguousarray(slots, np.int64)
        begins = np.ascontiguousarray(starts, np.int64)
        offsets = np.ascontiguousarray(row_offsets, np.int64)
        rows = np.ascontiguousarray(scores, np.float32)
        if not rows.flags.writeable:
            rows = rows.copy()  # numba would compile the kernel anew for such arrays
        failed = np.zeros(len(mine), np.bool_)
        if num_output is None or commits is None:
            num_output, commits = np.zeros(len(mine), np.int64), failed
        written = np.ascontiguousarray(num_output, np.int64)
        valid = np.ascontiguousarray(commits, np.bool_)
        fits = offsets.ndim == 1 and rows.shape[1:] == (self.table.num_columns,)
        fits = fits and mine.shape == begins.shape == written.shape == valid.shape
        fits = fits and mine.shape == (len(offsets) - 1,)
        if not fits or not read_scores(
            self._call, mine, begins, offsets, rows, written, valid, failed
        ):
            raise ShapeError(
                f"slots has shape {mine.shape}, starts {begins.shape}, row_offsets {offsets.shape} "
                f"(up to {offsets.max(initial=0)}), scores {rows.shape}, num_output "
                f"{written.shape}, commits {valid.shape}; needed: n slots below "
                f"{len(self._s.policy)}, n starts, n + 1 ascending offsets into rows of "
                f"{self.table.num_columns} columns, n of the others."
            )
        return failed

    def fired(self, slots: ArrayLike) -> list[tuple[int, int]]:
        """(row, global rule index) of what the scores read so far say of the next token.

        Stop rules whenever asked, once they fired. Observe rules once a crossing; those of a prompt
        when all of it was read.
        """
        mine, s = np.asarray(slots, np.int64), self._s
        news = s.news[mine]
        if not news.any():
            return []
        rows = np.flatnonzero(news)
        found: list[tuple[int, int]] = []
        for row in rows.tolist():
            slot = int(mine[row])
            policy = s.policy[slot]
            stop = self.table.stop[policy] & (s.above[slot] != 0)
            whole = s.expected[slot] >= s.prompt_len[slot]
            observed = (s.pending[slot] != 0) & ((self._m.stage[policy] == 0) | whole)
            s.pending[slot, observed] = 0
            s.news[slot] = stop.any() or s.pending[slot].any()
            found += [(row, rule) for rule in self._m.rule[policy, stop | observed].tolist()]
        return found

    def watches(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a slot's policy has probe rules: bool[n]."""
        policy = self._s.policy[slots]
        found: NDArray[np.bool_] = (policy >= 0) & (self._m.rule[policy, 0] >= 0)
        return found

    def failed(self, slot: int) -> bool:
        """Whether scores of the slot's text were missing, or no numbers."""
        return bool(self._s.failed[slot])
