"""The guard inside vLLM's V1 model runner: persistent batch rows, host token lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.sampler import Sampler

from streamguard.vllm_plugin.body import Body
from streamguard.vllm_plugin.settings import Context

if TYPE_CHECKING:
    from vllm.v1.sample.logits_processor import BatchUpdate


@dataclass
class _Row:
    """A request in the persistent batch. `output` is vLLM's own live list."""

    slot: int
    output: list[int]


class GuardedSampler(Sampler):
    """Decides after sampling, where a completing token's probability is exactly the model's."""

    streamguard_body: V1Body
    _scrub_next = False

    def sample(self, logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        sampled, processed = super().sample(logits, sampling_metadata, *args, **kwargs)
        self.streamguard_body.after_sample(sampled, logits)
        # gather_logprobs comes next for these rows, and only if logprobs were asked for.
        wanted = sampling_metadata.max_num_logprobs
        self._scrub_next = wanted is not None and wanted >= 0
        return sampled, processed

    def gather_logprobs(self, *args: Any, **kwargs: Any) -> Any:
        tensors = Sampler.gather_logprobs(*args, **kwargs)
        if self._scrub_next:
            self._scrub_next = False
            self.streamguard_body.scrub_alternatives(tensors)
        return tensors


class V1Body(Body):
    """Rows of the persistent batch to slots of a RowGuard.

    On a GPU sampled tokens are read back once a step, which waits for the GPU; Model Runner V2,
    vLLM's default there, needs no such wait.
    """

    known_sampler = Sampler
    guarded_sampler = GuardedSampler

    def __init__(self, context: Context, vllm_config: Any) -> None:
        num_slots = 2 * vllm_config.scheduler_config.max_num_seqs
        super().__init__(context, vllm_config, num_slots)
        self._rows: dict[int, _Row] = {}
        self._free = list(range(num_slots))

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
            self.admit(slot, params, prompt, len(output))
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
        with self.metrics.timed("commit"):
            slots: list[int] = []
            tokens: list[int] = []
            for row in self._rows.values():
                new = row.output[self.guard.committed(row.slot) :]
                slots += [row.slot] * len(new)
                tokens += new
            self.commit(slots, tokens)
            if self.context.codes.kept_beside:
                self.restore(self._request_ids())
        self.mask(logits, self._slot_of_row(len(logits)))

    def after_sample(self, sampled: torch.Tensor, logits: torch.Tensor) -> None:
        """Turn samples that would complete a match into verdicts, in place."""
        slot_of_row = self._slot_of_row(len(sampled))
        if slot_of_row:
            discarded = self.runner.discard_request_mask.np
            valid = {row: not discarded[row] for row in slot_of_row}
            if self.probing is not None:
                self._read_scores(slot_of_row, valid)
            with self.metrics.timed("decide"):
                self.decide(sampled, logits, slot_of_row, valid, self._request_ids())

    def _read_scores(self, slot_of_row: dict[int, int], valid: dict[int, bool]) -> None:
        """Rows of chunks whose sample is thrown away were computed, too, and never will be again."""
        rows = sorted(slot_of_row)
        if rows != list(range(len(rows))):
            slots = [slot_of_row[row] for row in rows]
            self._fail_probes(slots, "rows of the batch are unknown", self._request_ids())
            return
        self.read_scores(
            [slot_of_row[row] for row in rows],
            self.runner.input_batch.num_computed_tokens_cpu[: len(rows)],
            self.runner.query_start_loc.np[: len(rows) + 1],
            [valid[row] for row in rows],
            self._request_ids(),
        )

    def scrub_alternatives(self, tensors: Any) -> None:
        """Scrub the logprobs of the rows that were sampled last."""
        slot_of_row = self._slot_of_row(len(tensors.logprobs))
        self.scrub(tensors.logprob_token_ids, tensors.logprobs, slot_of_row)

    def _slot_of_row(self, num_rows: int) -> dict[int, int]:
        return {i: row.slot for i, row in self._rows.items() if i < num_rows}

    def _request_ids(self) -> dict[int, str]:
        if not self.context.codes.kept_beside:
            return {}
        return {row.slot: self.runner.input_batch.req_ids[i] for i, row in self._rows.items()}

    def _release(self, index: int) -> None:
        row = self._rows.pop(index, None)
        if row is not None:
            self._free_slot(row)

    def _free_slot(self, row: _Row) -> None:
        self.guard.release(row.slot)
        self._free.append(row.slot)
