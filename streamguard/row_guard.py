"""Decisions for an engine's batch: commit tokens, mask logits, turn completing samples into verdicts.

Engine-free, on the host: slots, rows and plain arrays. The V1 runner of vLLM and the tests' fake
engine drive it; the device kernels must agree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from streamguard.compiler.program import Program
from streamguard.compiler.rules import MASK, OBSERVE
from streamguard.session import Session
from streamguard.verdict import Progress, VerdictCodes


@dataclass(frozen=True)
class Fired:
    """A rule that fired: on which row of the call, and by which global index."""

    row: int
    rule: int


@dataclass
class _Slot:
    policy: int
    limit: int
    progress: Progress = field(default_factory=Progress)
    committed: int = 0


class RowGuard:
    """Guards up to `num_slots` texts inside a sampler's step.

    One step is: `commit` what was sampled before, `mask` the logits, sample, `decide`. Every call is
    a function of the committed tokens, so steps may be repeated or their samples thrown away.
    """

    def __init__(self, program: Program, codes: VerdictCodes, num_slots: int) -> None:
        self.program = program
        self.codes = codes
        self.session = Session(program, num_slots)
        self._slots: dict[int, _Slot] = {}
        self._group = [r.group for r in program.rules]

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
    ) -> None:
        """Begin a text. max_tokens = most tokens it can have, the engine's own limit included."""
        self.session.reset(
            slot,
            prompt_token_ids,
            policy=policy,
            hide_special_tokens=hide_special_tokens,
            end_token_ids=end_token_ids,
            show_end_token=show_end_token,
        )
        self._slots[slot] = _Slot(self.program.policies.index(policy), max_tokens)

    def warm_up(self) -> None:
        """Compile every kernel now (some ten seconds once per machine), not at the first request."""
        for policy in self.program.policies:
            self.admit(0, (0,), policy=policy, max_tokens=2, end_token_ids=(0,))
            self.commit([0], [0])
            self.decide([0], np.zeros(1, np.int64))
            if self.session.needs_mask(0):
                for last in (False, True):
                    self.session.forbidden(0, last=last)
                logits = np.zeros((1, len(self.program.vocabulary)), np.float32)
                self.session.apply_mask(logits, [0], [0], [False])
        self.release(0)

    def release(self, slot: int) -> None:
        """Forget a slot."""
        self._slots.pop(slot, None)
        self.session.release(slot)

    def committed(self, slot: int) -> int:
        """How many tokens of the slot's text were committed so far."""
        return self._slots[slot].committed

    def running_verdict(self, slot: int) -> int | None:
        """Global index of the rule whose script runs in the slot, if any."""
        return self._slots[slot].progress.rule

    def policy_name(self, slot: int) -> str:
        """Name of the policy that the slot is under."""
        return self.program.policies[self._slots[slot].policy]

    def let_pass(self, slot: int) -> None:
        """Stop matching in a slot: its rows never hit again."""
        self.session.release(slot)

    def resume_verdict(self, slot: int, rule: int, step: int) -> None:
        """Put a script in place that the committed tokens do not show (verdicts kept beside)."""
        self._slots[slot].progress.rule, self._slots[slot].progress.step = rule, step

    def commit(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Take in tokens that the engine committed; several of one slot in their order."""
        feed_slots, feed_tokens = [], []
        for slot, token in zip(slots, tokens, strict=True):
            state = self._slots[slot]
            state.committed += 1
            if not state.progress.commit(self.codes, state.policy, token):
                feed_slots.append(slot)
                feed_tokens.append(token)
        if feed_slots:
            self.session.advance(feed_slots, feed_tokens)

    def mask(self, logits: NDArray[np.float32], rows: Sequence[int], slots: Sequence[int]) -> None:
        """Make tokens that would complete a mask rule impossible; in place."""
        wanted = [
            (row, slot)
            for row, slot in zip(rows, slots, strict=True)
            if self.session.needs_mask(slot) and self._slots[slot].progress.rule is None
        ]
        if wanted:
            edit_rows, edit_slots = zip(*wanted, strict=True)
            self.session.apply_mask(logits, edit_rows, edit_slots, self._last(edit_slots))

    def decide(
        self,
        slots: Sequence[int],
        sampled: NDArray[np.int64],
        impossible: NDArray[np.bool_] | None = None,
    ) -> list[Fired]:
        """Replace samples that would complete a match, and run scripts on; in place.

        sampled     int64[num_rows]: row r belongs to slots[r].
        impossible  bool[num_rows]: the row had no possible token left after `mask`.
        Returns every rule that a sampled token completes, observe rules included; a script that
        merely goes on fires nothing.
        """
        fired: list[Fired] = []
        rows = []
        for row, slot in enumerate(slots):
            progress = self._slots[slot].progress
            if progress.rule is not None:
                sampled[row] = progress.forced(self.codes)
            else:
                rows.append(row)
                if int(sampled[row]) in self.codes.spare:
                    # The model itself chose a reserved id: to the reader that is no verdict.
                    sampled[row] = self.codes.eos_id
        if not rows:
            return fired
        live = [slots[row] for row in rows]
        hits = self.session.peek(live, sampled[rows], self._last(live))
        events: dict[int, list[int]] = {}
        if hits.any():
            for at, rule in self.session.events():
                events.setdefault(rows[at], []).append(rule)
        for row, slot in zip(rows, live, strict=True):
            rules = [r for r in events.get(row, ()) if self._group[r] != OBSERVE]
            if not rules and impossible is not None and impossible[row]:
                rules = [self._mask_rule(slot)]
            if not rules:
                fired += [Fired(row, r) for r in sorted(events.get(row, ()))]
                continue
            rule = min(rules, key=lambda r: self.program.rules[r].rank)
            progress = self._slots[slot].progress
            progress.remembered = rule
            sampled[row] = self.codes.scripts[rule][0]
            fired += [Fired(row, r) for r in sorted({*events.get(row, ()), rule})]
        return fired

    def completes(self, slot: int, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `tokens` would complete a mask, halt or redirect rule in the slot's text."""
        hits = self.session.peek(np.full(len(tokens), slot), tokens)
        blocks = np.zeros(len(tokens), bool)
        if hits.any():
            for row, rule in self.session.events():
                blocks[row] |= self._group[rule] != OBSERVE
        return blocks

    def _last(self, slots: Sequence[int]) -> list[bool]:
        states = (self._slots[slot] for slot in slots)
        return [state.committed + 1 >= state.limit for state in states]

    def _mask_rule(self, slot: int) -> int:
        rules = self.codes.policy_rules[self._slots[slot].policy]
        return next((r for r in rules if self._group[r] == MASK), rules[0])
