"""The guard inside Model Runner V2: slots, tokens in device buffers.

State is rebuilt from `all_token_ids[slot, :total_len]`, which is authoritative: preempted requests,
async scheduling and prefill chunks come out right without any call being counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.sampler import Sampler

from streamguard.errors import AttestationError
from streamguard.row_guard import RowGuard
from streamguard.vllm_plugin.runner_v1 import admit, edit_logits, empty_rows, scrub_row
from streamguard.vllm_plugin.settings import Context


class V2Body:
    """Slots of the runner are slots of a RowGuard."""

    def __init__(self, context: Context, vllm_config: Any, req_states: Any) -> None:
        self.context = context
        self.metrics = context.worker_metrics
        self.guard = RowGuard(context.program, context.codes, req_states.max_num_reqs)
        self.guard.warm_up()
        self._max_model_len = vllm_config.model_config.max_model_len
        self._requests = req_states
        self._params: dict[int, Any] = {}  # slots that begin with their next step
        self._guarded: set[int] = set()
        self.runner: Any = None  # set by attest

    def add_request(self, slot: int, params: Any) -> bool:
        """Begin a request; its tokens are read with its first step."""
        self.guard.release(slot)
        self._guarded.discard(slot)
        self._params[slot] = params
        entry = self.context.table
        policy = entry.default_policy
        name = ((params.extra_args or {}).get("streamguard") or {}).get("policy")
        if name is not None:
            policy = entry.policies.index(name)
        from streamguard.compiler.rules import MASK

        return entry.uses(MASK, policy)

    def apply(self, logits: torch.Tensor, ctx: Any) -> None:
        """Commit, then mask."""
        slots = ctx.idx_mapping_np.tolist()
        self._commit(slots)
        rows = [r for r, slot in enumerate(slots) if self._masks(slot)]
        if rows:
            with self.metrics.timed("mask"):
                edit_logits(self.guard, logits, rows, [slots[r] for r in rows])

    def after_sample(
        self, sampled: torch.Tensor, processed: torch.Tensor, slots: list[int], pos: torch.Tensor
    ) -> torch.Tensor:
        """Turn samples that would complete a match into verdicts."""
        self._commit(slots)
        rows = [r for r, slot in enumerate(slots) if slot in self._guarded]
        if not rows:
            return sampled
        with self.metrics.timed("decide"):
            mine_slots = [slots[r] for r in rows]
            chosen = sampled.cpu().numpy().astype(np.int64)
            mine = chosen[rows]
            impossible = empty_rows(self.guard, processed, rows, mine_slots, mine)
            fired = self.guard.decide(mine_slots, mine, impossible)
            total = self._requests.total_len.gpu.cpu().numpy()
            at = pos.cpu().numpy()
            valid = [at[r] + 1 >= total[slot] for r, slot in zip(rows, mine_slots, strict=True)]
            for entry in fired:
                if valid[entry.row]:
                    self.metrics.verdict(self.context.labels(entry.rule))
            self.metrics.tokens(sum(map(bool, valid)))
            if (mine != chosen[rows]).any():
                chosen[rows] = mine
                sampled.copy_(torch.from_numpy(chosen).to(sampled.device, sampled.dtype))
        return sampled

    def scrub(self, tensors: Any, slots: list[int]) -> None:
        """Hide alternatives that would complete a match; see `V1Body.scrub`."""
        for row, slot in enumerate(slots):
            if slot in self._guarded and self.guard.running_verdict(slot) is None:
                scrub_row(
                    self.guard, slot, tensors.logprob_token_ids[row], tensors.logprobs[row]
                )

    def _masks(self, slot: int) -> bool:
        return slot in self._guarded and self.guard.session.needs_mask(slot)

    def _commit(self, slots: list[int]) -> None:
        with self.metrics.timed("commit"):
            total = self._requests.total_len.gpu.cpu().numpy()
            feed_slots: list[int] = []
            feed_tokens: list[int] = []
            for slot in slots:
                params = self._params.pop(slot, None)
                if params is not None:
                    prompt_len = int(self._requests.prompt_len.np[slot])
                    prompt = self._tokens(slot, 0, prompt_len)
                    admit(self.guard, slot, params, prompt, self._max_model_len)
                    self._guarded.add(slot)
                if slot not in self._guarded:
                    continue
                begin = int(self._requests.prompt_len.np[slot]) + self.guard.committed(slot)
                new = self._tokens(slot, begin, int(total[slot]))
                feed_slots += [slot] * len(new)
                feed_tokens += new
            for fired in self.guard.commit(feed_slots, feed_tokens):
                self.metrics.verdict(self.context.labels(fired.rule))

    def _tokens(self, slot: int, begin: int, end: int) -> list[int]:
        ids: list[int] = self._requests.all_token_ids.gpu[slot, begin:end].cpu().tolist()
        return ids


class GuardedSampler(Sampler):
    """Decides after sampling, where a completing token's probability is exactly the model's."""

    streamguard_body: V2Body

    def __call__(self, logits: Any, input_batch: Any) -> Any:
        output = super().__call__(logits, input_batch)
        if output.logprobs_tensors is not None:
            slots = input_batch.idx_mapping_np.tolist()
            self.streamguard_body.scrub(output.logprobs_tensors, slots)
        return output

    def sample(
        self, logits: Any, expanded_idx_mapping: Any, idx_mapping: Any, idx_mapping_np: Any,
        pos: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        sampled, processed = super().sample(
            logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, *args, **kwargs
        )
        sampled = self.streamguard_body.after_sample(
            sampled, processed, idx_mapping_np.tolist(), pos
        )
        return sampled, processed


def guard_sampler(sampler: Any, body: V2Body) -> None:
    """Turn a sampler into a guarded one, in place."""
    if type(sampler) is not Sampler:
        raise AttestationError(
            f"this worker samples with {type(sampler).__module__}.{type(sampler).__qualname__}, which "
            f"streamguard does not know. Use vLLM's own sampler."
        )
    sampler.streamguard_body = body
    sampler.__class__ = GuardedSampler
