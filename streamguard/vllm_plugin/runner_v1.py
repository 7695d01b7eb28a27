"""The guard inside vLLM's V1 model runner: persistent batch rows, host token lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from streamguard.row_guard import RowGuard
from streamguard.vllm_plugin import beside
from streamguard.vllm_plugin.settings import KEY, Context

if TYPE_CHECKING:
    from vllm.v1.sample.logits_processor import BatchUpdate


@dataclass
class _Row:
    """A request in the persistent batch. `output` is vLLM's own live list."""

    slot: int
    output: list[int]


def admit(guard: RowGuard, slot: int, params: Any, prompt: Any, max_model_len: int) -> None:
    """Begin a request in a slot, from its parameters as admission completed them.

    A request that reached the engine without admission falls under the default policy.
    """
    entry = (params.extra_args or {}).get(KEY) or {}
    prompt = prompt if prompt is not None else ()
    room = max_model_len - len(prompt)
    guard.admit(
        slot,
        prompt,
        policy=entry.get("policy", guard.program.policies[guard.program.default_policy]),
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        hide_special_tokens=params.skip_special_tokens,
        end_token_ids=entry.get("ends", params.stop_token_ids or ()),
        show_end_token=params.include_stop_str_in_output,
    )


class V1Body:
    """Rows of the persistent batch to slots of a RowGuard.

    On a GPU sampled tokens are read back once a step, which waits for the GPU; Model Runner V2,
    vLLM's default there, needs no such wait.
    """

    def __init__(self, context: Context, vllm_config: Any) -> None:
        self.context = context
        self.metrics = context.worker_metrics
        num_slots = 2 * vllm_config.scheduler_config.max_num_seqs
        self.guard = RowGuard(context.program, context.codes, num_slots)
        self.guard.warm_up()
        self._max_model_len = vllm_config.model_config.max_model_len
        self._rows: dict[int, _Row] = {}
        self._free = list(range(num_slots))
        self.runner: Any = None  # set by attest

    def update_state(self, update: BatchUpdate | None) -> None:
        """Apply removals, additions and moves, in vLLM's order."""
        if update is None:
            return
        for index in update.removed:
            self._release(index)
        for index, params, prompt, output in update.added:
            self._release(index)
            slot = self._free.pop()
            self._rows[index] = _Row(slot, output)
            admit(self.guard, slot, params, prompt, self._max_model_len)
        for first, second, direction in update.moved:
            a, b = self._rows.pop(first, None), self._rows.pop(second, None)
            if direction.name == "SWAP":
                if b is not None:
                    self._rows[first] = b
            elif b is not None:
                self._free_slot(b)
            if a is not None:
                self._rows[second] = a

    def apply(self, logits: torch.Tensor, _ctx: Any = None) -> None:
        """Commit what the engine committed since the last step, then mask."""
        rows = self._rows
        with self.metrics.timed("commit"):
            slots: list[int] = []
            tokens: list[int] = []
            for row in rows.values():
                new = row.output[self.guard.committed(row.slot) :]
                slots += [row.slot] * len(new)
                tokens += new
            for fired in self.guard.commit(slots, tokens):
                self.metrics.verdict(self.context.labels(fired.rule))
            if self.context.codes.kept_beside:
                self._restore()
        masked = [i for i, row in rows.items() if self.guard.session.needs_mask(row.slot)]
        if masked:
            with self.metrics.timed("mask"):
                edit_logits(self.guard, logits, masked, [rows[i].slot for i in masked])

    def after_sample(self, sampled: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turn samples that would complete a match into verdicts.

        sampled  int[num_rows]; logits as the sampler left them.
        """
        order = [i for i in sorted(self._rows) if i < sampled.shape[0]]
        if not order:
            return sampled
        with self.metrics.timed("decide"):
            slots = [self._rows[i].slot for i in order]
            chosen = sampled.cpu().numpy().astype(np.int64)
            mine = chosen[order]
            impossible = empty_rows(self.guard, logits, order, slots, mine)
            fired = self.guard.decide(slots, mine, impossible)
            discarded = self.runner.discard_request_mask.np
            valid = [not discarded[i] for i in order]
            for entry in fired:
                if valid[entry.row]:
                    self.metrics.verdict(self.context.labels(entry.rule))
                    if self.context.codes.kept_beside:
                        self._keep_beside(order[entry.row], slots[entry.row], entry.rule)
            self.metrics.tokens(sum(valid))
            if (mine != chosen[order]).any():
                chosen[order] = mine
                sampled.copy_(torch.from_numpy(chosen).to(sampled.dtype))
        return sampled

    def scrub(self, token_ids: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Hide alternatives that would complete a match behind the sampled token's own entry.

        token_ids, logprobs  [num_rows, 1 + num_logprobs], in/out; column 0 is the sampled token.
        """
        for index, row in self._rows.items():
            if index < token_ids.shape[0] and self.guard.running_verdict(row.slot) is None:
                scrub_row(self.guard, row.slot, token_ids[index], logprobs[index])

    def _keep_beside(self, index: int, slot: int, rule: int) -> None:
        if self.context.table.rules[rule].rule.action == "observe":
            return
        request_id = self.runner.input_batch.req_ids[index]
        beside.write(request_id, rule)
        beside.running[request_id] = (rule, self.guard.committed(slot))
        self.guard.resume_verdict(slot, rule, 0)

    def _restore(self) -> None:
        """Scripts without spare ids do not show in the tokens: put them back after a resume."""
        for index, row in self._rows.items():
            kept = beside.running.get(self.runner.input_batch.req_ids[index])
            if kept is not None:
                rule, began = kept
                self.guard.resume_verdict(row.slot, rule, self.guard.committed(row.slot) - began)

    def _release(self, index: int) -> None:
        row = self._rows.pop(index, None)
        if row is not None:
            self._free_slot(row)

    def _free_slot(self, row: _Row) -> None:
        self.guard.release(row.slot)
        self._free.append(row.slot)


def edit_logits(
    guard: RowGuard, logits: torch.Tensor, rows: list[int], slots: list[int]
) -> None:
    """Run `RowGuard.mask` on a tensor of any device."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        guard.mask(logits.numpy(), rows, slots)
        return
    scratch = np.zeros((len(rows), logits.shape[1]), np.float32)
    guard.mask(scratch, list(range(len(rows))), slots)
    index = torch.tensor(rows, device=logits.device)
    logits[index] += torch.from_numpy(scratch).to(logits.device, logits.dtype)


def empty_rows(
    guard: RowGuard, logits: torch.Tensor, rows: list[int], slots: list[int], sampled: np.ndarray
) -> np.ndarray | None:
    """Rows in which nothing was possible: the sampler then returns a token of logit -inf or NaN."""
    if not any(map(guard.session.needs_mask, slots)):
        return None
    index = torch.tensor(rows, device=logits.device)
    values = logits[index, torch.from_numpy(sampled).to(logits.device)].cpu()
    masked = np.array([guard.session.needs_mask(slot) for slot in slots])
    return ~torch.isfinite(values).numpy() & masked


def scrub_row(
    guard: RowGuard, slot: int, token_ids: torch.Tensor, logprobs: torch.Tensor
) -> None:
    """One row of `scrub`."""
    ids = token_ids.cpu().numpy().astype(np.int64)
    hidden = guard.completes(slot, np.clip(ids, 0, len(guard.program.vocabulary) - 1))
    hidden[0] = False
    if hidden.any():
        where = torch.from_numpy(np.flatnonzero(hidden)).to(token_ids.device)
        token_ids[where] = token_ids[0].clone()
        logprobs[where] = logprobs[0].clone()
