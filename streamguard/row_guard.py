"""Decisions for an engine's batch: commit tokens, mask logits, turn completing samples into verdicts.

Engine-free, on the host: slots, rows and plain arrays. The V1 runner of vLLM and the tests' fake
engine drive it; the device kernels must agree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamguard.compiler.program import Program
from streamguard.compiler.rules import MASK, OBSERVE
from streamguard.probe.columns import ProbeTable
from streamguard.probe.monitor import Monitor
from streamguard.session import Session
from streamguard.verdict import Progress, VerdictCodes
from streamguard_kernels.rows import count_tokens, live_rows


@dataclass(frozen=True)
class Fired:
    """A rule that fired: on which row of the call, and by which global index."""

    row: int
    rule: int


class RowGuard:
    """Guards up to `num_slots` texts inside a sampler's step.

    One step is: `commit` what was sampled before, `mask` the logits, sample, `decide`. Every call is
    a function of the committed tokens, so steps may be repeated or their samples thrown away.
    Where policies have probe rules (`probe` is their monitor then, else None), `feed_scores` comes
    between the forward pass and `decide`.
    """

    def __init__(self, program: Program, codes: VerdictCodes, num_slots: int) -> None:
        self.program = program
        self.codes = codes
        self.session = Session(program, num_slots)
        self._policy = np.zeros(num_slots, np.int64)
        self._limit = np.zeros(num_slots, np.int64)
        self._committed = np.zeros(num_slots, np.int64)
        self._progress = [Progress() for _ in range(num_slots)]
        self._running = np.zeros(num_slots, bool)  # progress.rule is not None
        self._guarded = np.zeros(num_slots, bool)
        self._masked_slots: set[int] = set()
        self._policy_masks = [program.uses(MASK, p) for p in range(len(program.policies))]
        self._spare = np.zeros(len(program.vocabulary), bool)
        self._spare[list(codes.spare)] = True
        self._group = np.array([r.group for r in program.rules])
        self.probe: Monitor | None = None
        if any(rule.rule.probe for rule in program.rules):
            self.probe = Monitor(ProbeTable.from_table(program.table), num_slots)

    def admit(
        self,
        slot: int,
        prompt_token_ids: Sequence[int],
        *,
        policy: str,
        max_tokens: int,
        hide_special_tokens: bool = True,
        end_token_ids: Sequence[int] = (),
        show_end_token: bool = False,
        prompt_len: int | None = None,
        count_from: int | None = None,
    ) -> None:
        """Begin a text. max_tokens = most tokens it can have, the engine's own limit included.

        prompt_len  tokens of the prompt, if prompt_token_ids holds not all of them.
        count_from  see `Monitor.reset`; of probe rules only.
        """
        self.session.reset(
            slot,
            prompt_token_ids,
            policy=policy,
            hide_special_tokens=hide_special_tokens,
            end_token_ids=end_token_ids,
            show_end_token=show_end_token,
        )
        number = self.program.policies.index(policy)
        self._policy[slot], self._guarded[slot] = number, True
        self._masked_slots.discard(slot)
        if self._policy_masks[number]:
            self._masked_slots.add(slot)
        self._limit[slot], self._committed[slot] = max_tokens, 0
        self._progress[slot], self._running[slot] = Progress(), False
        if self.probe is not None:
            length = len(prompt_token_ids) if prompt_len is None else prompt_len
            self.probe.reset(slot, number, length, count_from)

    def warm_up(self) -> None:
        """Compile every kernel now (some ten seconds once per machine), not at the first request."""
        for policy in self.program.policies:
            self.admit(0, (0,), policy=policy, max_tokens=2, end_token_ids=(0,))
            self.commit([0], [0])
            self.decide([0], np.zeros(1, np.int64))
            if self.session.needs_mask([0]).any():
                for last in (False, True):
                    self.session.forbidden(0, last=last)
                logits = np.zeros((1, len(self.program.vocabulary)), np.float32)
                self.session.apply_mask(logits, [0], [0], [False])
        self.release(0)

    def release(self, slot: int) -> None:
        """Forget a slot."""
        self._running[slot] = False
        self.let_pass(slot)

    def committed(self, slot: int) -> int:
        """How many tokens of the slot's text were committed so far."""
        return int(self._committed[slot])

    def num_committed(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """`committed` of several slots: int64[n]."""
        return self._committed[slots]

    @property
    def has_masks(self) -> bool:
        """Whether any slot is under a policy with mask rules."""
        return bool(self._masked_slots)

    def running_verdict(self, slot: int) -> int | None:
        """Global index of the rule whose script runs in the slot, if any."""
        return self._progress[slot].rule if self._running[slot] else None

    def policy_name(self, slot: int) -> str:
        """Name of the policy that the slot is under."""
        return self.program.policies[self._policy[slot]]

    def let_pass(self, slot: int) -> None:
        """Stop matching in a slot: its rows never hit again."""
        self.session.release(slot)
        self._guarded[slot] = False
        self._masked_slots.discard(slot)
        if self.probe is not None:
            self.probe.release(slot)

    def let_probes_pass(self, slot: int) -> None:
        """Stop reading scores in a slot; its patterns go on."""
        if self.probe is not None:
            self.probe.release(slot)

    def resume_verdict(self, slot: int, rule: int, step: int) -> None:
        """Put a script in place that the committed tokens do not show (verdicts kept beside)."""
        self._progress[slot].rule, self._progress[slot].step = rule, step
        self._running[slot] = True

    def commit(self, slots: ArrayLike, tokens: ArrayLike) -> None:
        """Take in tokens that the engine committed; several of one slot in their order."""
        fed, text = np.asarray(slots, np.int64), np.asarray(tokens, np.int64)
        if count_tokens(fed, text, self._committed, self._running, self._spare):
            pairs = zip(fed.tolist(), text.tolist(), strict=True)
            ordinary = np.array([not self._commit_script(*pair) for pair in pairs])
            fed, text = fed[ordinary], text[ordinary]
        self.session.advance(fed, text)

    def _commit_script(self, slot: int, token: int) -> bool:
        progress = self._progress[slot]
        belongs = progress.commit(self.codes, int(self._policy[slot]), token)
        self._running[slot] = progress.rule is not None
        return belongs

    def feed_scores(
        self,
        slots: ArrayLike,
        starts: ArrayLike,
        row_offsets: ArrayLike,
        scores: ArrayLike,
        commits: ArrayLike | None = None,
    ) -> NDArray[np.bool_]:
        """Take in the scores of a forward pass; see `Monitor.feed`.

        commits  bool[n]: whether the engine will commit the row's sample; none of them if None.
        Returns which slots have failed, bool[n]: their policy's `on_error` decides, by
        `resume_verdict(slot, FAILED, 0)` or `let_pass(slot)`. False of slots without probe rules.
        """
        mine = np.asarray(slots, np.int64)
        if self.probe is None:
            return np.zeros(len(mine), bool)
        num_output = self._committed[mine]
        return self.probe.feed(mine, starts, row_offsets, scores, num_output, commits)

    def watches(self, slots: ArrayLike) -> NDArray[np.bool_]:
        """Whether a slot's policy has probe rules that are in force: bool[n]."""
        mine = np.asarray(slots, np.int64)
        return np.zeros(len(mine), bool) if self.probe is None else self.probe.watches(mine)

    def mask(self, logits: NDArray[np.float32], rows: ArrayLike, slots: ArrayLike) -> None:
        """Make tokens that would complete a mask rule impossible; in place."""
        edited, mine = np.asarray(rows, np.int64), np.asarray(slots, np.int64)
        running = self._running[mine]
        if running.any():
            edited, mine = edited[~running], mine[~running]
        self.session.apply_mask(logits, edited, mine, self._last(mine))

    def decide(
        self,
        slots: ArrayLike,
        sampled: NDArray[np.int64],
        impossible: NDArray[np.bool_] | None = None,
    ) -> list[Fired]:
        """Replace samples that would complete a match, or that a probe forbids; run scripts on. In place.

        sampled     int64[num_rows]: row r belongs to slots[r].
        impossible  bool[num_rows]: the row had no possible token left after `mask`.
        Returns every rule that a sampled token completes or that the scores read so far fire,
        observe rules included; a script that merely goes on fires nothing.
        """
        mine = np.asarray(slots, np.int64)
        work, ends = np.empty((3, len(mine)), np.int64), np.empty(len(mine), np.uint8)
        # Slots that were let pass after an error are not looked at: the error may come again.
        num_live = live_rows(
            mine, sampled, self._running, self._guarded, self._committed, self._limit, self._spare,
            self.codes.eos_id, *work, ends,
        )  # fmt: skip
        rows, live, chosen = work[:, :num_live]
        if num_live < len(mine):
            for row in np.flatnonzero(self._running[mine]):
                sampled[row] = self._progress[mine[row]].forced(self.codes)
        hits = self.session.peek(live, chosen, ends[:num_live])
        events: dict[int, list[int]] = {}
        if hits.any():
            for at, rule in self.session.events():
                events.setdefault(int(rows[at]), []).append(rule)
        if self.probe is not None:
            for at, rule in self.probe.fired(live):
                events.setdefault(int(rows[at]), []).append(rule)
        for row in () if impossible is None else rows[impossible[rows]].tolist():
            if all(self._group[rule] == OBSERVE for rule in events.get(row, ())):
                events.setdefault(row, []).append(self._mask_rule(mine[row]))
        for row, rules in events.items():
            stops = [rule for rule in rules if self._group[rule] != OBSERVE]
            if stops:
                rule = min(stops, key=lambda r: self.program.rules[r].rank)
                self._progress[mine[row]].remembered = rule
                sampled[row] = self.codes.scripts[rule][0]
        return [Fired(row, rule) for row in sorted(events) for rule in sorted(set(events[row]))]

    def completes(self, slot: int, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `tokens` would complete a mask, halt or redirect rule in the slot's text."""
        hits = self.session.peek(np.full(len(tokens), slot), tokens)
        blocks = np.zeros(len(tokens), bool)
        if hits.any():
            for row, rule in self.session.events():
                blocks[row] |= self._group[rule] != OBSERVE
        return blocks

    def _last(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self._committed[slots] + 1 >= self._limit[slots]

    def _mask_rule(self, slot: int) -> int:
        rules = self.codes.policy_rules[self._policy[slot]]
        return next((r for r in rules if self._group[r] == MASK), rules[0])
