"""What scores looked like, counted on the device: one launch a step, read by whoever publishes it.

Nothing is copied to the host or allocated, and the grid depends on shapes alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from streamguard_kernels import probe
from streamguard_kernels.device_probe import ProbeSlots
from streamguard_kernels.device_tables import Slots

LOWEST = tl.constexpr(probe.LOWEST)
NUM_BUCKETS = tl.constexpr(probe.NUM_BUCKETS)


class ScoreCounts(NamedTuple):
    """Counters of one server, on the device. Made by `new_score_counts`.

    watched   int32[num_policies, num_columns]: 1 = the policy reads the column in outputs, 2 = in
              prompts
    buckets   int64[num_columns, NUM_BUCKETS]: scores above the bound before and up to the bucket's own
    sums      float64[num_columns]: of all scores counted
    failures  int64[1]: slots of which scores were missing or no numbers; reported int32[num_slots]:
              1 = counted already
    """

    watched: torch.Tensor
    buckets: torch.Tensor
    sums: torch.Tensor
    failures: torch.Tensor
    reported: torch.Tensor


def new_score_counts(
    watched: torch.Tensor, num_slots: int, device: torch.device | str
) -> ScoreCounts:
    """Counters that have counted nothing. watched: see `ScoreCounts`."""
    num_columns = watched.shape[1]
    return ScoreCounts(
        watched.to(device, torch.int32).contiguous(),
        torch.zeros((num_columns, NUM_BUCKETS.value), dtype=torch.int64, device=device),
        torch.zeros(num_columns, dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(num_slots, dtype=torch.int32, device=device),
    )


def count_scores(
    c: ScoreCounts,
    q: ProbeSlots,
    s: Slots,
    scores: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    total_len: torch.Tensor,
) -> None:
    """Count the newest scores of each row whose sample will be committed, by column.

    Arguments as in `device_probe.read_scores`, after which it has to come. Scores of a text that has
    failed are not counted.
    """
    num_columns = c.watched.shape[1]
    _count_kernel[(idx_mapping.shape[0],)](
        c, q, s, scores, scores.stride(0), query_start_loc, positions, idx_mapping, total_len,
        num_columns, COLUMNS=triton.next_power_of_2(num_columns), num_warps=1,
    )  # fmt: skip


@triton.jit
def _count_kernel(
    c,
    q,
    s,
    scores,
    score_stride,
    query_start_loc,
    positions,
    idx_mapping,
    total_len,
    num_columns,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(idx_mapping + row).to(tl.int64)
    if slot < 0:
        return
    policy = tl.load(s.policy + slot).to(tl.int32)
    if policy < 0:
        return
    if tl.load(q.failed + slot) != 0:
        first = (tl.load(c.reported + slot) == 0).to(tl.int64)
        tl.atomic_add(c.failures, first, sem="relaxed")
        tl.store(c.reported + slot, 1)
        return
    last = tl.load(query_start_loc + row + 1).to(tl.int64) - 1
    if last < tl.load(query_start_loc + row):
        return
    position = tl.load(positions + last).to(tl.int32)
    if position + 1 < tl.load(total_len + slot):
        return
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    stage = tl.where(position < tl.load(q.prompt_len + slot), 2, 1)
    watched = tl.load(c.watched + policy * num_columns + column, mask=inside, other=0)
    counts = inside & ((watched & stage) != 0)
    score = tl.load(scores + last * score_stride + column, mask=counts, other=0.0).to(tl.float32)
    near = tl.minimum(tl.maximum(score, LOWEST - 1.0), -LOWEST + 1.0)
    bucket = tl.maximum(tl.ceil(near).to(tl.int32) - LOWEST, 0)
    place = c.buckets + column * NUM_BUCKETS + bucket
    tl.atomic_add(place, tl.full((COLUMNS,), 1, tl.int64), mask=counts, sem="relaxed")
    tl.atomic_add(c.sums + column, score.to(tl.float64), mask=counts, sem="relaxed")
